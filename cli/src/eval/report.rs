//! What a run found, as Markdown for people and JSON for programs.

use super::arm::{Held, Outcome, PLACES, Place};
use super::boundary::Tally;
use super::plot::{self, Axes, Line, Point};
use super::score::{Mean, Score, mean};
use crate::bytes::human_bytes as bytes;
use serde::Serialize;
use std::fmt::Write;

/// Cuts against what the generator knows, of one arm.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Boundary {
    /// Cuts counted.
    pub n_cuts: usize,
    /// F1 against ends of facts.
    pub f1_facts: f64,
    /// F1 against ends of all sentences.
    pub f1_sentences: f64,
    /// Share of fact ends with a cut.
    pub recall_facts: f64,
    /// Tokens per cut inside facts.
    pub rate_facts: f64,
    /// Tokens per cut inside filler.
    pub rate_filler: f64,
    /// Times p rose above tau, per cut; learned deciders only.
    pub crossings_per_cut: Option<f64>,
    /// Tokens with p above tau, per cut.
    pub tokens_above_per_cut: Option<f64>,
}

impl Boundary {
    fn new(t: &Tally) -> Boundary {
        Boundary {
            n_cuts: t.n_cuts,
            f1_facts: t.f1_facts(),
            f1_sentences: t.f1_sentences(),
            recall_facts: t.recall_facts(),
            rate_facts: t.rate_facts(),
            rate_filler: t.rate_filler(),
            crossings_per_cut: t.crossings(),
            tokens_above_per_cut: t.tokens_above(),
        }
    }
}

/// Accuracy at one place.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct At {
    /// Where the facts lay.
    pub place: Place,
    /// How well they were remembered.
    #[serde(flatten)]
    pub score: Mean,
}

/// One arm on one task at one length.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Task.
    pub task: String,
    /// Length asked for, tokens; 0 for files.
    pub length: usize,
    /// The arm as given.
    pub arm: String,
    /// The memory as used; of the first sample where it is sized per sample.
    pub memory: String,
    /// How answers are scored.
    pub scored: Score,
    /// Texts read.
    pub n_texts: usize,
    /// Mean score of all questions.
    pub score: Mean,
    /// What guessing gets.
    pub chance: f64,
    /// The same by place; places without questions are left out.
    pub places: Vec<At>,
    /// Bytes and rates, means over texts.
    pub held: Held,
    /// Bytes of cells and states together.
    pub bytes: f64,
    /// Bytes of a full cache over those of the cells held.
    pub cell_ratio: f64,
    /// The same over cells and states.
    pub byte_ratio: f64,
    /// Seconds to read a text, mean.
    pub read_seconds: f64,
    /// Seconds to answer a question, mean.
    pub ask_seconds: f64,
    /// Cuts against the generator's ends.
    pub boundary: Option<Boundary>,
}

impl Row {
    /// Sums up what one arm did with every sample of a task. `chance` is the mean over questions.
    pub fn new(
        (task, length): (&str, usize),
        (arm, memory): (&str, &str),
        scored: Score,
        chance: f64,
        outcomes: &[Outcome],
    ) -> Row {
        let replies = || outcomes.iter().flat_map(|o| &o.replies);
        let n = outcomes.len().max(1) as f64;
        let of = |f: fn(&Held) -> f64| outcomes.iter().map(|o| f(&o.held)).sum::<f64>() / n;
        let held = Held {
            n_tokens: of(|h| h.n_tokens),
            n_cells: of(|h| h.n_cells),
            cell_bytes: of(|h| h.cell_bytes),
            page_bytes: of(|h| h.page_bytes),
            state_bytes: of(|h| h.state_bytes),
            full_bytes: of(|h| h.full_bytes),
            n_nodes: of(|h| h.n_nodes),
            rate: of(|h| h.rate),
            tau: outcomes
                .iter()
                .map(|o| o.held.tau)
                .sum::<Option<f64>>()
                .filter(|_| !outcomes.is_empty())
                .map(|sum| sum / n),
        };
        let mut tally: Option<Tally> = None;
        for t in outcomes.iter().filter_map(|o| o.tally.as_ref()) {
            tally.get_or_insert_default().add(t);
        }
        let at = |place: Place| At {
            place,
            score: mean(replies().filter(|r| r.place == place).map(|r| r.score)),
        };
        Row {
            task: task.into(),
            length,
            arm: arm.into(),
            memory: memory.into(),
            scored,
            n_texts: outcomes.len(),
            score: mean(replies().map(|r| r.score)),
            chance,
            places: (PLACES.into_iter().map(at))
                .filter(|a| a.score.n > 0)
                .collect(),
            bytes: held.bytes(),
            cell_ratio: held.full_bytes / held.cell_bytes.max(1.0),
            byte_ratio: held.full_bytes / held.bytes().max(1.0),
            held,
            read_seconds: outcomes.iter().map(|o| o.read_seconds).sum::<f64>() / n,
            ask_seconds: outcomes.iter().map(|o| o.ask_seconds).sum::<f64>()
                / replies().count().max(1) as f64,
            boundary: tally.as_ref().map(Boundary::new),
        }
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The model file.
    pub model: String,
    /// Seed of the texts; `None` for files.
    pub seed: Option<u64>,
    /// Whether arms were sized to the bytes of the first arm with nodes.
    pub equal_bytes: bool,
    /// One per task, length and arm.
    pub rows: Vec<Row>,
}

fn percent(m: &Mean) -> String {
    format!(
        "{:.1} [{:.1}, {:.1}]",
        m.mean * 100.0,
        m.low * 100.0,
        m.high * 100.0
    )
}

impl Report {
    /// Tasks and lengths in order of the rows.
    fn groups(&self) -> Vec<(&str, usize)> {
        let mut out: Vec<(&str, usize)> = Vec::new();
        for row in &self.rows {
            let key = (row.task.as_str(), row.length);
            if !out.contains(&key) {
                out.push(key);
            }
        }
        out
    }

    fn of(&self, group: (&str, usize)) -> impl Iterator<Item = &Row> {
        self.rows
            .iter()
            .filter(move |r| (r.task.as_str(), r.length) == group)
    }

    /// Tables, one per task and length.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        for group in self.groups() {
            let rows: Vec<&Row> = self.of(group).collect();
            let first = rows[0];
            let _ = write!(out, "### {}", first.task);
            if first.length > 0 {
                let _ = write!(out, ", {} tokens", first.length);
            }
            let _ = write!(
                out,
                "\n\n{} texts, {} questions; mean text {:.0} tokens",
                first.n_texts, first.score.n, first.held.n_tokens
            );
            if first.chance > 0.0 {
                let _ = write!(out, "; chance {:.1} %", first.chance * 100.0);
            }
            out.push_str(". Accuracy in percent with its 95 % interval.\n\n");
            out.push_str(
                "| arm | accuracy | in window | evicted | across a cut | cells | bytes | states | \
                 full | cells fewer | rate | read s | ask s |\n\
                 |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
            );
            for row in &rows {
                let at = |place: Place| {
                    let found = row.places.iter().find(|a| a.place == place);
                    found.map_or("–".into(), |a| {
                        format!("{:.1} ({})", a.score.mean * 100.0, a.score.n)
                    })
                };
                let _ = writeln!(
                    out,
                    "| {} | {} | {} | {} | {} | {:.0} | {} | {} | {} | {:.1}x | {} | {:.3} | {:.4} |",
                    row.arm,
                    percent(&row.score),
                    at(Place::InWindow),
                    at(Place::Evicted),
                    at(Place::AcrossCut),
                    row.held.n_cells,
                    bytes(row.bytes),
                    bytes(row.held.state_bytes),
                    bytes(row.held.full_bytes),
                    row.cell_ratio,
                    match row.held.rate > 0.0 {
                        true => format!("{:.1}", row.held.rate),
                        false => "–".into(),
                    },
                    row.read_seconds,
                    row.ask_seconds,
                );
            }
            out.push('\n');
            self.boundaries(&rows, &mut out);
        }
        out
    }

    fn boundaries(&self, rows: &[&Row], out: &mut String) {
        let with: Vec<(&Row, Boundary)> = rows
            .iter()
            .filter_map(|r| r.boundary.map(|b| (*r, b)))
            .collect();
        if with.is_empty() {
            return;
        }
        out.push_str(
            "| cuts of | cuts | F1, ends of facts | F1, ends of sentences | fact ends cut | \
             tokens per cut in facts | in filler | filler / facts | rises of p per cut | \
             tokens above tau per cut | tau |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
        );
        let or_dash = |x: Option<f64>| x.map_or("–".into(), |x| format!("{x:.2}"));
        for (row, b) in with {
            let _ = writeln!(
                out,
                "| {} | {} | {:.3} | {:.3} | {:.3} | {:.1} | {:.1} | {:.1} | {} | {} | {} |",
                row.arm,
                b.n_cuts,
                b.f1_facts,
                b.f1_sentences,
                b.recall_facts,
                b.rate_facts,
                b.rate_filler,
                b.rate_filler / b.rate_facts.max(1e-9),
                or_dash(b.crossings_per_cut),
                or_dash(b.tokens_above_per_cut),
                or_dash(row.held.tau),
            );
        }
        out.push('\n');
    }

    /// Everything as one line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("a report holds plain numbers and strings")
    }

    /// The plots this run has data for: file names and contents.
    pub fn plots(&self) -> Vec<(String, String)> {
        let mut out = Vec::new();
        let point = |x: f64, row: &Row| Point {
            x,
            y: row.score.mean,
            low: row.score.low,
            high: row.score.high,
        };
        for group in self.groups() {
            let lines: Vec<Line> = (self.of(group))
                .map(|row| Line {
                    name: row.arm.clone(),
                    points: vec![point(row.bytes, row)],
                })
                .collect();
            let title = match group.1 {
                0 => group.0.to_owned(),
                n => format!("{}, {n} tokens", group.0),
            };
            let axes = Axes {
                title: &title,
                x: "bytes of cells and states",
                y: "accuracy",
                tick: bytes,
            };
            let stem = match group.1 {
                0 => file_name(group.0),
                n => format!("{}-{n}", file_name(group.0)),
            };
            out.push((format!("bytes-{stem}.svg"), plot::lines(&axes, &lines)));
            let bars: Vec<(String, Vec<f64>)> = (self.of(group))
                .filter_map(|row| {
                    let b = row.boundary?;
                    Some((row.arm.clone(), vec![b.rate_facts, b.rate_filler]))
                })
                .collect();
            if !bars.is_empty() {
                let svg = plot::bars(
                    &title,
                    "tokens per cut",
                    &["inside facts", "inside filler"],
                    &bars,
                );
                out.push((format!("rate-{stem}.svg"), svg));
            }
        }
        let mut tasks: Vec<&str> = self.rows.iter().map(|r| r.task.as_str()).collect();
        tasks.dedup();
        for task in tasks {
            let rows = || self.rows.iter().filter(|r| r.task == task);
            let mut arms: Vec<&str> = Vec::new();
            for row in rows() {
                if !arms.contains(&row.arm.as_str()) {
                    arms.push(&row.arm);
                }
            }
            let line = |arm: &&str| {
                let mut points: Vec<Point> = (rows().filter(|r| r.arm == *arm))
                    .map(|r| point(r.held.n_tokens, r))
                    .collect();
                points.sort_by(|a, b| a.x.total_cmp(&b.x));
                Line {
                    name: (*arm).to_owned(),
                    points,
                }
            };
            let lines: Vec<Line> = arms.iter().map(line).collect();
            if lines.iter().any(|l| l.points.len() > 1) {
                let axes = Axes {
                    title: task,
                    x: "tokens of the text",
                    y: "accuracy",
                    tick: |v| format!("{v:.0}"),
                };
                let name = format!("length-{}.svg", file_name(task));
                out.push((name, plot::lines(&axes, &lines)));
            }
        }
        out
    }
}

/// A task's name with nothing in it that a file name may not have.
fn file_name(task: &str) -> String {
    let keep = |c: char| match c.is_alphanumeric() || c == '_' || c == '-' {
        true => c,
        false => '-',
    };
    task.chars().map(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::arm::Reply;

    fn outcome(scores: &[(f64, Place)], n_cells: f64) -> Outcome {
        Outcome {
            replies: (scores.iter())
                .map(|&(score, place)| Reply {
                    text: "x".into(),
                    score,
                    place,
                })
                .collect(),
            held: Held {
                n_tokens: 1000.0,
                n_cells,
                cell_bytes: n_cells * 100.0,
                page_bytes: 12_800.0,
                state_bytes: 500.0,
                full_bytes: 100_000.0,
                n_nodes: 40.0,
                rate: 20.0,
                tau: Some(0.5),
            },
            read_seconds: 1.0,
            ask_seconds: 0.5,
            tally: Some(Tally {
                n_cuts: 10,
                n_ends: [10, 5],
                n_hits: [8, 1],
                n_tokens: [80, 60],
                n_cuts_in: [8, 2],
                above: Some((11, 12)),
            }),
        }
    }

    fn report() -> Report {
        let rows = [(512, 40.0), (1024, 60.0)].map(|(length, cells)| {
            let outcomes = [
                outcome(&[(1.0, Place::Evicted), (0.0, Place::InWindow)], cells),
                outcome(
                    &[(1.0, Place::Evicted), (1.0, Place::AcrossCut)],
                    cells + 20.0,
                ),
            ];
            let arm = ("nodes", "nodes");
            Row::new(("single", length), arm, Score::Exact, 0.05, &outcomes)
        });
        Report {
            model: "m.gguf".into(),
            seed: Some(1),
            equal_bytes: true,
            rows: rows.into(),
        }
    }

    #[test]
    fn rows_sum_up_their_samples() {
        let row = &report().rows[0];
        assert_eq!((row.n_texts, row.score.n), (2, 4));
        assert_eq!(row.score.mean, 0.75);
        let places: Vec<_> = row.places.iter().map(|a| (a.place, a.score.n)).collect();
        assert_eq!(
            places,
            [
                (Place::InWindow, 1),
                (Place::Evicted, 2),
                (Place::AcrossCut, 1)
            ]
        );
        assert_eq!(row.held.n_cells, 50.0);
        assert_eq!(row.bytes, 5500.0);
        assert_eq!(row.cell_ratio, 20.0);
        assert_eq!(row.ask_seconds, 0.25);
        let b = row.boundary.unwrap();
        assert_eq!((b.n_cuts, b.rate_facts, b.rate_filler), (20, 10.0, 30.0));
        assert_eq!(b.crossings_per_cut, Some(1.1));
    }

    #[test]
    fn markdown_json_and_plots() {
        let report = report();
        let text = report.markdown();
        assert!(text.contains("### single, 512 tokens"), "{text}");
        assert!(
            text.contains("| nodes | 75.0 [30.1, 95.4] | 0.0 (1) | 100.0 (2) | 100.0 (1) | 50 |")
        );
        let columns = |line: &str| line.matches('|').count();
        for table in text.split("\n\n").filter(|t| t.starts_with('|')) {
            let mut lines = table.trim_end().lines();
            let head = columns(lines.next().unwrap());
            assert!(lines.all(|l| columns(l) == head), "{table}");
        }
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json["rows"][0]["places"][1]["place"], "evicted");
        assert_eq!(json["rows"][1]["score"]["mean"], 0.75);
        let names: Vec<String> = report.plots().into_iter().map(|(n, _)| n).collect();
        assert_eq!(
            names,
            [
                "bytes-single-512.svg",
                "rate-single-512.svg",
                "bytes-single-1024.svg",
                "rate-single-1024.svg",
                "length-single.svg"
            ]
        );
    }

    #[test]
    fn an_arm_without_samples_is_no_crash() {
        let row = Row::new(("t/../x", 0), ("full", "full"), Score::F1, 0.0, &[]);
        assert_eq!((row.score.n, row.held.tau), (0, None));
        let report = Report {
            rows: vec![row],
            ..report()
        };
        assert!(report.markdown().contains("### t/../x\n"));
        assert_eq!(report.plots()[0].0, "bytes-t----x.svg");
    }
}
