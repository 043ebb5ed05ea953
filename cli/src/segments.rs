//! `mneme inspect --segments`: how a memory cuts a text, as a page to look at.
//!
//! The page needs nothing but itself: the text coloured by segment, the boundary probability under
//! every token, the nodes with their spans and bytes, and the rate over the text.

use crate::args::{MemoryArgs, ModelArgs};
use crate::bytes::human_bytes;
use crate::interrupt;
use crate::plots::{Line, Plot, escape, page};
use crate::progress::{Progress, Unit};
use crate::report::write_text;
use anyhow::{Context, Result, bail};
use mneme_engine::memory::{NodeInfo, Stats};
use mneme_engine::{Engine, Feed, Want};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// Tokens fed between two looks at the nodes: consolidation may fold a node soon after its cut.
const STEP: usize = 32;
/// Nodes over which the rate is also shown.
const RECENT: usize = 16;

/// Reads the text of `text` with the model's memory and writes the page to `out`.
pub fn write_page(model: &ModelArgs, memory: &MemoryArgs, text: &Path, out: &Path) -> Result<()> {
    interrupt::watch();
    let bytes = std::fs::read(text).with_context(|| text.display().to_string())?;
    let source = String::from_utf8(bytes)
        .map_err(|e| e.utf8_error())
        .with_context(|| format!("{}: not UTF-8", text.display()))?;
    let mut engine = model.load(memory.contexts())?;
    let spec = memory.spec(&engine.model)?;
    let tokens = match spec.name.as_str() {
        "concepts" => engine.model.context_ids(&spec, &source),
        _ => engine.model.tokenizer.encode(&source, true, false),
    };
    if tokens.is_empty() {
        bail!("{}: no text", text.display());
    }
    let mut seq = memory.cells.sequence(&engine, &spec)?;
    let mut nodes = BTreeMap::new();
    let mut bar = Progress::new("tokens", tokens.len() as u64, Unit::Count);
    for part in tokens.chunks(STEP) {
        interrupt::check()?;
        engine.step(&mut [Feed {
            seq: &mut seq,
            tokens: part,
            want: Want::None,
        }])?;
        nodes.extend(seq.nodes().into_iter().map(|n| (n.id, n)));
        bar.set(seq.n_past() as u64);
    }
    drop(bar);
    if nodes.is_empty() {
        bail!(
            "the {} memory made no nodes of {} tokens: nothing to show",
            spec.name,
            tokens.len()
        );
    }
    let held: Vec<u64> = seq.nodes().iter().map(|n| n.id).collect();
    let view = View {
        title: format!("{} read by {spec}", text.display()),
        model: engine.model.path.display().to_string(),
        tokens: &tokens,
        p: probabilities(&engine, &tokens)?,
        nodes: nodes.into_values().collect(),
        held,
        stats: seq.stats(),
    };
    write_text(out, &view.html(|ids| pieces(&engine, ids)))
}

/// Boundary probability of every token; empty without a trained decider.
fn probabilities(engine: &Engine, tokens: &[u32]) -> Result<Vec<f32>> {
    let weights = &engine.model.weights;
    let Some(nodes) = &weights.nodes else {
        return Ok(Vec::new());
    };
    Ok(nodes.boundary_probabilities(engine.ops(), &weights.token_embd, tokens)?)
}

/// The tokens' text; a character spread over several tokens is shown with the last of them.
fn pieces(engine: &Engine, ids: &[u32]) -> Vec<String> {
    let mut stream = engine.model.tokenizer.stream();
    let mut out: Vec<String> = ids
        .iter()
        .map(|&id| stream.push(id).unwrap_or_default())
        .collect();
    if let (Some(last), Some(rest)) = (out.last_mut(), stream.flush()) {
        last.push_str(&rest);
    }
    out
}

/// What the page shows.
struct View<'a> {
    title: String,
    model: String,
    tokens: &'a [u32],
    p: Vec<f32>,
    /// Every node there ever was, by id.
    nodes: Vec<NodeInfo>,
    /// Ids of those still held.
    held: Vec<u64>,
    stats: Stats,
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;\
color:#111;background:#fff}h1{font-size:1.3em}h2{font-size:1.1em;margin-top:2em}\
.text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9}\
.s{padding:.1em 0}.s0{background:#dcebf7}.s1{background:#fbe6cf}.open{background:#eee}\
.t{border-bottom:4px solid rgb(190 30 45/var(--p,0))}.cut{border-right:2px solid #be1e2d}\
table{border-collapse:collapse;font-size:.9em}td,th{padding:.15em .6em;text-align:right;\
border-bottom:1px solid #ddd}td:last-child,th:last-child{text-align:left}.gone{color:#999}\
dl{display:grid;grid-template-columns:max-content auto;gap:.1em 1em}dd{margin:0}\
@media(prefers-color-scheme:dark){body{color:#eee;background:#111}.s0{background:#123a58}\
.s1{background:#573a12}.open{background:#333}td,th{border-color:#444}.gone{color:#777}}";

impl View<'_> {
    fn html(&self, pieces: impl Fn(&[u32]) -> Vec<String>) -> String {
        let pieces = pieces(self.tokens);
        let segments: Vec<&NodeInfo> = self.nodes.iter().filter(|n| n.level == 0).collect();
        let mut out = format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n<title>{0}</title>\n\
             <style>{STYLE}</style>\n<h1>{0}</h1>\n",
            escape(&self.title)
        );
        self.summary(&mut out);
        out += "<h2>Text</h2>\n<p>Colours change at cuts; the line under a token is its boundary \
                probability. Hover for numbers.</p>\n<div class=\"text\">";
        let mut at = 0;
        for (i, segment) in segments.iter().enumerate() {
            // Tokens no segment covers (before the first, or of a node missed) stand bare.
            self.span(&mut out, &pieces, at, segment.start, "open", None);
            let class = if i % 2 == 0 { "s s0" } else { "s s1" };
            let begin = segment.start.max(at);
            self.span(&mut out, &pieces, begin, segment.end, class, Some(segment));
            at = segment.end.max(at);
        }
        self.span(&mut out, &pieces, at, pieces.len(), "open", None);
        out += "</div>\n<h2>Rate</h2>\n";
        out += &page(&[self.rate(&segments)]);
        self.table(&mut out, &pieces);
        out + "</html>\n"
    }

    fn summary(&self, out: &mut String) {
        let s = &self.stats;
        let held = s.cell_bytes + s.state_bytes;
        let tau = s.tau.map_or("none".into(), |tau| format!("{tau:.3}"));
        let rows = [
            ("model", self.model.clone()),
            ("tokens", s.n_tokens.to_string()),
            (
                "nodes",
                format!("{} made, {} held", self.nodes.len(), s.n_nodes),
            ),
            ("tokens per slot", format!("{:.2}", s.rate)),
            (
                "spread of lengths",
                format!("{:.2} of the mean", s.rate_spread),
            ),
            ("longest segment", format!("{} tokens", s.longest_segment)),
            ("threshold tau", tau),
            (
                "bytes held",
                format!(
                    "{} of {} ({:.1} %)",
                    human_bytes(held as f64),
                    human_bytes(s.full_bytes as f64),
                    100.0 * held as f64 / s.full_bytes.max(1) as f64
                ),
            ),
            ("tokens dropped", s.n_dropped.to_string()),
        ];
        *out += "<dl>";
        for (name, value) in rows {
            let _ = write!(out, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
        }
        *out += "</dl>\n";
    }

    /// Tokens `[begin, end)` of one segment.
    fn span(
        &self,
        out: &mut String,
        pieces: &[String],
        begin: usize,
        end: usize,
        class: &str,
        node: Option<&NodeInfo>,
    ) {
        let end = end.min(pieces.len());
        if begin >= end {
            return;
        }
        let title = node.map_or("open".into(), |n| {
            format!("node {}: tokens {}..{}", n.id, n.start, n.end)
        });
        let _ = write!(out, "<span class=\"{class}\" title=\"{title}\">");
        for i in begin..end {
            let p = self.p.get(i).copied();
            // Rules without probabilities have one only where they cut.
            let cut = node.filter(|n| n.end == i + 1);
            let p = p.or(cut.map(|n| n.p));
            let text = escape(&pieces[i]);
            let class = if cut.is_some() { "t cut" } else { "t" };
            match p {
                Some(p) => {
                    let _ = write!(
                        out,
                        "<span class=\"{class}\" style=\"--p:{p:.3}\" title=\"{i}: p {p:.3}\">{text}</span>"
                    );
                }
                None => out.push_str(&text),
            }
        }
        *out += "</span>";
    }

    /// Tokens per slot up to each cut, over all and over the last few nodes.
    fn rate(&self, segments: &[&NodeInfo]) -> Plot {
        let slots = match (self.stats.n_slots, self.stats.n_nodes) {
            (slots, nodes) if nodes > 0 => slots as f64 / nodes as f64,
            _ => 1.0,
        };
        let over = |n: usize| -> Vec<(f64, f64)> {
            (0..segments.len())
                .map(|i| {
                    let first = (i + 1).saturating_sub(n);
                    let tokens = segments[i].end - segments[first].start;
                    let nodes = i + 1 - first;
                    (
                        segments[i].end as f64,
                        tokens as f64 / (slots * nodes as f64),
                    )
                })
                .collect()
        };
        Plot {
            title: "tokens per node slot".into(),
            x_label: "position, tokens".into(),
            y_label: "tokens per slot".into(),
            log_x: false,
            from_zero: true,
            lines: vec![
                Line {
                    name: "whole text".into(),
                    points: over(usize::MAX),
                },
                Line {
                    name: format!("last {RECENT} nodes"),
                    points: over(RECENT),
                },
            ],
        }
    }

    fn table(&self, out: &mut String, pieces: &[String]) {
        *out += "<h2>Nodes</h2>\n<p>Grey ones were folded into a node of a higher level.</p>\n\
                 <table><tr><th>id<th>level<th>tokens<th>length<th>p<th>bytes<th>text</tr>\n";
        for n in &self.nodes {
            let held = self.held.contains(&n.id);
            let text = pieces[n.start.min(pieces.len())..n.end.min(pieces.len())].concat();
            let short: String = text.chars().take(60).collect();
            let _ = writeln!(
                out,
                "<tr{}><td>{}<td>{}<td>{}..{}<td>{}<td>{:.3}<td>{}<td>{}</tr>",
                if held { "" } else { " class=\"gone\"" },
                n.id,
                n.level,
                n.start,
                n.end,
                n.end - n.start,
                n.p,
                if held {
                    human_bytes(n.bytes as f64)
                } else {
                    "0 B".into()
                },
                escape(&short)
            );
        }
        *out += "</table>\n";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u64, start: usize, end: usize) -> NodeInfo {
        NodeInfo {
            id,
            level: 0,
            start,
            end,
            p: 0.75,
            children: Vec::new(),
            bytes: 2048,
        }
    }

    #[test]
    fn every_token_is_shown_once_and_markup_is_escaped() {
        let tokens = [0, 1, 2, 3, 4];
        let view = View {
            title: "a & b".into(),
            model: "m.gguf".into(),
            tokens: &tokens,
            p: vec![0.1, 0.9, 0.2, 0.8, 0.3],
            nodes: vec![node(0, 0, 2), node(1, 2, 4)],
            held: vec![1],
            stats: Stats {
                n_tokens: 5,
                n_nodes: 2,
                n_slots: 4,
                ..Stats::default()
            },
        };
        let html = view.html(|ids| ids.iter().map(|i| format!("<{i}>")).collect());
        for i in 0..5 {
            assert_eq!(
                html.matches(&format!(">&lt;{i}&gt;</span>")).count(),
                1,
                "{i}"
            );
        }
        assert!(html.contains("a &amp; b") && !html.contains("a & b"));
        assert_eq!(html.matches("class=\"t cut\"").count(), 2);
        assert_eq!(html.matches("class=\"gone\"").count(), 1);
        assert!(
            !html.contains("src=") && !html.contains("href="),
            "nothing is fetched"
        );
        // Two tokens in two slots.
        assert!(html.contains("whole text: 1 at 2"), "{html}");
    }
}
