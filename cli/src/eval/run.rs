//! `mneme eval run`: arms side by side over the same texts.

use super::arm::{Held, Outcome, Rig};
use super::budget;
use super::jsonl;
use super::prompt::{Form, Style};
use super::records;
use super::report::{Report, Row};
use super::sample::Sample;
use super::score::Score;
use super::text::Texts;
use crate::args::{CellArgs, ModelArgs};
use crate::interrupt;
use crate::progress::{Progress, Unit};
use crate::report::write_text;
use anyhow::{Context, Result, bail};
use clap::Parser;
use mneme_engine::SequenceOptions;
use mneme_engine::memory::spec::MemorySpec;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

/// Arguments of `mneme eval run`.
#[derive(Parser)]
pub struct Args {
    #[command(flatten)]
    texts: Texts,
    /// Samples from a file instead: ours, RULER's or LongBench's format.
    #[arg(long, value_name = "FILE")]
    jsonl: Vec<PathBuf>,
    /// How answers are scored [default: by task, of files by format]; `exact` asks for all of several
    /// values in their order.
    #[arg(long, value_enum)]
    score: Option<Score>,
    /// A memory to try, such as `full`, `window:window=256` or `nodes:decider=stride,stride=16`,
    /// and after an @ the file of another model to try it with: `gist@rival.gguf`; may be given
    /// many times [default: full, and the model's own].
    #[arg(long, value_name = "MEMORY[@FILE]")]
    arm: Vec<Arm>,
    /// Try every arm with nodes at each of these values of one option: `tau=0.1,0.3,0.9`.
    #[arg(long, value_name = "OPTION=VALUES", value_parser = parse_sweep)]
    sweep: Option<Sweep>,
    /// Size windows and stride, random and sentence cuts so that each holds as many bytes as the
    /// first arm with nodes.
    #[arg(long)]
    equal_bytes: bool,
    /// How text and question are put to the model.
    #[arg(long, value_enum, default_value = "auto")]
    style: Style,
    /// Most tokens of an answer [default: by task].
    #[arg(long)]
    predict: Option<usize>,
    /// Where to write the report as JSON [default: the last line of standard output].
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Where to write the tables; they are printed in any case.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Folder for plots: accuracy against bytes, accuracy against length, rates.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Where to write every answer, as JSONL.
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cells: CellArgs,
}

/// A memory, and the model it reads with.
#[derive(Clone, Debug)]
struct Arm {
    spec: MemorySpec,
    /// Another model than that of the run.
    file: Option<PathBuf>,
}

impl FromStr for Arm {
    type Err = mneme_engine::Error;

    fn from_str(text: &str) -> Result<Arm, Self::Err> {
        let (spec, file) = match text.split_once('@') {
            Some((spec, file)) => (spec, Some(PathBuf::from(file))),
            None => (text, None),
        };
        Ok(Arm {
            spec: spec.parse()?,
            file,
        })
    }
}

impl Arm {
    /// Its name in tables, with `spec` for its memory.
    fn label(&self, spec: &MemorySpec) -> String {
        match &self.file {
            Some(file) => format!("{}@{}", spec.text, file.display()),
            None => spec.text.clone(),
        }
    }
}

/// One option and its values.
#[derive(Clone, Debug)]
struct Sweep {
    key: String,
    values: Vec<String>,
}

fn parse_sweep(text: &str) -> Result<Sweep> {
    match text.split_once('=') {
        Some((key, values)) if !key.is_empty() && !values.is_empty() => Ok(Sweep {
            key: key.trim().into(),
            values: values.split(',').map(|v| v.trim().to_owned()).collect(),
        }),
        _ => bail!("expected option=value,value,..."),
    }
}

/// Arms after the sweep.
fn arms(given: Vec<Arm>, sweep: Option<&Sweep>) -> Vec<Arm> {
    let mut out = Vec::new();
    for arm in given {
        match sweep {
            Some(sweep) if arm.spec.name == "nodes" => {
                let at = |v: &String| Arm {
                    spec: budget::with(&arm.spec, &[(&sweep.key, v.clone())]),
                    file: arm.file.clone(),
                };
                out.extend(sweep.values.iter().map(at));
            }
            _ => out.push(arm),
        }
    }
    out
}

/// Samples of one table.
struct Group {
    task: String,
    length: usize,
    samples: Vec<Sample>,
}

fn groups(args: &Args, rig: &Rig) -> Result<Vec<Group>> {
    let mut out: Vec<Group> = Vec::new();
    for path in &args.jsonl {
        let all = jsonl::read(path, args.score)?;
        let n = args.texts.n.unwrap_or(usize::MAX);
        for sample in all.into_iter().take(n) {
            match out.iter_mut().find(|g| g.task == sample.task) {
                Some(group) => group.samples.push(sample),
                None => out.push(Group {
                    task: sample.task.clone(),
                    length: 0,
                    samples: vec![sample],
                }),
            }
        }
    }
    if !args.jsonl.is_empty() {
        return Ok(out);
    }
    let tokenizer = &rig.engine.model.tokenizer;
    let count = |s: &str| tokenizer.encode(s, false, false).len();
    for group in args.texts.groups() {
        let samples = (0..args.texts.n())
            .map(|i| {
                let sample = args.texts.sample(&group, i, &count)?.0;
                Ok(match args.score {
                    Some(score) => records::scored(sample, score),
                    None => sample,
                })
            })
            .collect::<Result<_>>()?;
        let length = if args.texts.filler.is_some() {
            0
        } else {
            group.1
        };
        out.push(Group {
            task: group.0,
            length,
            samples,
        });
    }
    Ok(out)
}

/// The model of `model` on its threads, ready to be asked.
fn rig(args: &Args, model: &ModelArgs) -> Result<Rig> {
    let engine = model.load(args.cells.contexts(None))?;
    Ok(Rig {
        form: Form::of(args.style, &engine.model.tokenizer)?,
        options: SequenceOptions {
            n_ctx: args.cells.ctx_size,
            ..args.cells.options(&engine.model)?
        },
        n_predict: args.predict,
        engine,
    })
}

/// Opens the models of other files that arms name behind `rigs`, which holds that of the run;
/// returns which one each arm reads with.
fn open_others(args: &Args, arms: &[Arm], rigs: &mut Vec<Rig>) -> Result<Vec<usize>> {
    let mut files = vec![None];
    let mut whose = Vec::new();
    for arm in arms {
        let at = files.iter().position(|f| *f == arm.file.as_ref());
        whose.push(at.unwrap_or(files.len()));
        if let (None, Some(file)) = (at, &arm.file) {
            rigs.push(rig(args, &args.model.of(file))?);
            files.push(Some(file));
        }
    }
    Ok(whose)
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    interrupt::watch();
    let mut rigs = vec![rig(args, &args.model)?];
    let given = match args.arm.is_empty() {
        false => args.arm.clone(),
        true => {
            let mut specs = vec!["full".parse::<MemorySpec>()?];
            let own = rigs[0].engine.model.default_memory();
            if own.name != "full" {
                specs.push(own);
            }
            let arm = |spec| Arm { spec, file: None };
            specs.into_iter().map(arm).collect()
        }
    };
    let arms = arms(given, args.sweep.as_ref());
    let whose = open_others(args, &arms, &mut rigs)?;
    for (arm, &rig) in arms.iter().zip(&whose) {
        // Wrong descriptions are better refused before an hour of work.
        rigs[rig].sequence(&arm.spec, 1)?;
    }
    let first = arms.iter().position(|a| a.spec.name == "nodes");
    if args.equal_bytes && first.is_none() {
        bail!("--equal-bytes needs an arm with nodes to be equal to");
    }
    let target = first.filter(|_| args.equal_bytes);
    let mut answers = match &args.answers {
        None => None,
        Some(path) => {
            let file = std::fs::File::create(path)
                .with_context(|| format!("cannot create {}", path.display()))?;
            Some(std::io::BufWriter::new(file))
        }
    };
    let mut report = Report {
        model: rigs[0].engine.model.path.display().to_string(),
        seed: args.jsonl.is_empty().then_some(args.texts.seed),
        equal_bytes: args.equal_bytes,
        rows: Vec::new(),
    };
    for group in groups(args, &rigs[0])? {
        let (outcomes, used) = side_by_side(&mut rigs, &arms, &whose, target, &group)?;
        let questions = || group.samples.iter().flat_map(|s| &s.questions);
        let chance = questions().map(|q| q.chance).sum::<f64>() / questions().count().max(1) as f64;
        if let Some(file) = &mut answers {
            write_answers(file, &group, &arms, &outcomes).context("cannot write the answers")?;
        }
        let scored = group.samples.first().map_or(Score::Exact, |s| s.score);
        for ((arm, used), outcomes) in arms.iter().zip(&used).zip(&outcomes) {
            let key = (group.task.as_str(), group.length);
            let label = arm.label(&arm.spec);
            let names = (label.as_str(), used.as_str());
            report
                .rows
                .push(Row::new(key, names, scored, chance, outcomes));
        }
    }
    if let Some(mut file) = answers {
        file.flush().context("cannot write the answers")?;
    }
    publish(args, &report)
}

/// What every arm did with every sample, and the memory each arm used on the first.
fn side_by_side(
    rigs: &mut [Rig],
    arms: &[Arm],
    whose: &[usize],
    target: Option<usize>,
    group: &Group,
) -> Result<(Vec<Vec<Outcome>>, Vec<String>)> {
    let mut outcomes: Vec<Vec<Outcome>> = arms.iter().map(|_| Vec::new()).collect();
    let mut used: Vec<String> = arms.iter().map(|a| a.label(&a.spec)).collect();
    // The arm the others are equal to goes first on every sample.
    let mut order: Vec<usize> = (0..arms.len()).collect();
    if let Some(first) = target {
        order.swap(0, first);
    }
    let texts = group.samples.len() as u64;
    let mut bar = Progress::new("tokens read", 0, Unit::Count);
    let (mut done, mut all) = (0, 0);
    for (n, sample) in group.samples.iter().enumerate() {
        let mut size: Option<Held> = None;
        for &i in &order {
            let rig = &mut rigs[whose[i]];
            let spec = match &size {
                Some(held) => rig.equal(&arms[i].spec, held, sample)?,
                None => arms[i].spec.clone(),
            };
            let (_, outcome) = rig.run(&spec, sample, &mut |tokens| {
                done += tokens as u64;
                bar.set(done);
            })?;
            if n == 0 {
                // How much there is to read is known when every arm has read once.
                all += outcome.held.n_tokens as u64 * texts;
                bar.set_len(all);
                used[i] = arms[i].label(&spec);
            }
            if Some(i) == target {
                size = Some(outcome.held);
            }
            outcomes[i].push(outcome);
        }
    }
    Ok((outcomes, used))
}

fn write_answers(
    out: &mut impl Write,
    group: &Group,
    arms: &[Arm],
    outcomes: &[Vec<Outcome>],
) -> std::io::Result<()> {
    for (n, sample) in group.samples.iter().enumerate() {
        for (arm, outcomes) in arms.iter().zip(outcomes) {
            for (q, reply) in sample.questions.iter().zip(&outcomes[n].replies) {
                let row = json!({
                    "task": group.task,
                    "length": group.length,
                    "text": n,
                    "arm": arm.label(&arm.spec),
                    "question": q.text,
                    "answers": q.answers,
                    "got": reply.text,
                    "score": reply.score,
                    "place": reply.place,
                });
                writeln!(out, "{row}")?;
            }
        }
    }
    Ok(())
}

/// Prints the report and writes the files asked for.
fn publish(args: &Args, report: &Report) -> Result<()> {
    let tables = report.markdown();
    if let Some(path) = &args.markdown {
        write_text(path, &tables)?;
    }
    if let Some(dir) = &args.plot {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        for (name, svg) in report.plots() {
            write_text(&dir.join(name), &svg)?;
        }
    }
    let mut out = tables;
    match &args.output {
        Some(path) => write_text(path, &(report.json() + "\n"))?,
        None => out.push_str(&(report.json() + "\n")),
    }
    (std::io::stdout().write_all(out.as_bytes())).context("cannot write to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_multiplies_the_arms_with_nodes() {
        let specs = ["full", "nodes:tau=0.9", "window:window=8@other.gguf"];
        let given: Vec<Arm> = specs.iter().map(|s| s.parse().unwrap()).collect();
        let sweep = parse_sweep("tau=0.1, 0.5").unwrap();
        let texts =
            |arms: Vec<Arm>| -> Vec<String> { arms.iter().map(|a| a.label(&a.spec)).collect() };
        assert_eq!(
            texts(arms(given.clone(), Some(&sweep))),
            [
                "full",
                "nodes:tau=0.1",
                "nodes:tau=0.5",
                "window:window=8@other.gguf"
            ]
        );
        assert_eq!(texts(arms(given, None)), specs);
        for bad in ["tau", "tau=", "=1"] {
            assert!(parse_sweep(bad).is_err(), "{bad}");
        }
    }
}
