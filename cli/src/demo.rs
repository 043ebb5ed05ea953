//! `mneme demo`: a long document, what each memory remembers of it, and the reader's own questions.
//!
//! The document is generated from a seed, so that nothing large is shipped; facts stand all over
//! it. The model is the small one under `models/`.

use crate::args::ModelArgs;
use crate::bytes::human_bytes;
use crate::device::DeviceArgs;
use crate::eval::arm::{Opened, Outcome, Rig};
use crate::eval::prompt::{Form, Style};
use crate::eval::records::{Relations, Shape, fitting};
use crate::eval::sample::{Question, Sample};
use crate::eval::score::mean;
use crate::interrupt;
use crate::progress::{Progress, Unit};
use anyhow::{Context, Result, bail};
use mneme_engine::SequenceOptions;
use mneme_engine::gguf::Gguf;
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::ops::Contexts;
use rustyline::error::ReadlineError;
use serde_json::json;
use std::fmt::Write as _;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

/// Arguments of `mneme demo`
#[derive(clap::Args)]
#[command(
    after_help = "Without -m the model that comes with mneme is used. Questions are read \
    from standard input, one a line, until it ends or a line is empty; ask in the words of the \
    document, such as \"Where does Anna live?\"."
)]
pub struct Args {
    /// Model file [default: the first model among models/*.gguf beside the program or in the current folder]
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Trained memory to lay over the model (GGUF adapter)
    #[arg(long, value_name = "FILE")]
    memory_adapter: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// The memory to show beside full and window [default: the one the file was trained for]
    #[arg(long, value_name = "NAME[:key=value,...]")]
    memory: Option<MemorySpec>,
    /// Tokens of the document
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    length: usize,
    /// Facts in the document
    #[arg(long, value_name = "N", default_value_t = 96)]
    facts: usize,
    /// Questions about it
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = crate::args::parse_positive)]
    questions: usize,
    /// Seed of the document
    #[arg(short, long, default_value_t = 1)]
    seed: u64,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = crate::args::parse_positive)]
    threads: Option<usize>,
    /// End after the table
    #[arg(long)]
    no_ask: bool,
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
}

/// Questions drawn, to choose some from every part of the document.
const CANDIDATES: usize = 512;
/// Tokens an answer may take.
const N_PREDICT: usize = 24;
/// Letters of a bar.
const BAR: usize = 20;
/// Parts of the document that accuracy is shown for.
const PARTS: usize = 4;

/// Whether a file is no model but a memory to lay over one.
fn is_adapter(path: &Path) -> bool {
    let file = Gguf::open(path);
    file.is_ok_and(|file| file.opt_str("general.type").ok().flatten() == Some("adapter"))
}

/// The model to use when none is named.
fn shipped_model() -> Result<PathBuf> {
    let exe = std::env::current_exe().ok();
    let beside = exe.as_deref().and_then(Path::parent);
    let mut places = vec![PathBuf::from("models")];
    if let Some(dir) = beside {
        places.push(dir.join("models"));
        places.push(dir.join("../models"));
        places.push(dir.join("../share/mneme/models"));
        // A binary under target/ of the repository.
        places.push(dir.join("../../models"));
    }
    for place in &places {
        let Ok(entries) = std::fs::read_dir(place) else {
            continue;
        };
        let mut files: Vec<PathBuf> = entries
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|x| x == "gguf") && !is_adapter(p))
            .collect();
        files.sort();
        if let Some(first) = files.into_iter().next() {
            return Ok(first);
        }
    }
    let list: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
    bail!(
        "no model found in {}; name one with -m FILE",
        list.join(", ")
    )
}

/// One question near each of `n` evenly spaced places of the text, each asked once, and some that
/// are left over.
fn choose(sample: &mut Sample, n: usize) -> Vec<Question> {
    let len = sample.text.len() as f64;
    let depth = |q: &Question| q.facts.first().map_or(0.0, |f| f.start as f64 / len);
    let mut left: Vec<Question> = Vec::new();
    for q in std::mem::take(&mut sample.questions) {
        // Two wordings of one question are one question.
        if !left.iter().any(|l| l.facts == q.facts) {
            left.push(q);
        }
    }
    for i in 0..n.min(left.len()) {
        let at = (i as f64 + 0.5) / n.min(left.len().max(1)) as f64;
        let near = (0..left.len()).min_by(|&a, &b| {
            let far = |q: &Question| (depth(q) - at).abs();
            far(&left[a]).total_cmp(&far(&left[b]))
        });
        if let Some(near) = near {
            sample.questions.push(left.remove(near));
        }
    }
    sample
        .questions
        .sort_by(|a, b| depth(a).total_cmp(&depth(b)));
    left
}

/// A number with a comma every three digits.
fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A bar of [`BAR`] letters, `share` of it full.
fn bar(share: f64, fancy: bool) -> String {
    let full = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    let (on, off) = if fancy { ("█", "░") } else { ("#", ".") };
    on.repeat(full) + &off.repeat(BAR - full)
}

/// Right answers and questions by part of the document.
fn by_part(sample: &Sample, outcome: &Outcome) -> [(f64, usize); PARTS] {
    let mut out = [(0.0, 0); PARTS];
    for (q, reply) in sample.questions.iter().zip(&outcome.replies) {
        let at = q.facts.first().map_or(0, |f| f.start);
        let part = (at * PARTS / sample.text.len().max(1)).min(PARTS - 1);
        out[part].0 += reply.score;
        out[part].1 += 1;
    }
    out
}

/// The comparison, a line per memory.
fn table(sample: &Sample, arms: &[Arm], fancy: bool) -> String {
    let mut out = String::from(
        "memory   right                                by quarter of the text      held        \
         time\n",
    );
    let most = (arms.iter().map(|a| a.outcome.held.bytes())).fold(1.0, f64::max);
    for Arm {
        spec, outcome: o, ..
    } in arms
    {
        let right = mean(o.replies.iter().map(|r| r.score));
        let parts: Vec<String> = by_part(sample, o)
            .iter()
            .map(|(right, n)| format!("{right:.0}/{n}"))
            .collect();
        let _ = writeln!(
            out,
            "{:<8} {} {:>5.1} %       {:<26} {:>10} {:>8.1} s",
            spec.name,
            bar(right.mean, fancy),
            right.mean * 100.0,
            parts.join("  "),
            human_bytes(o.held.bytes()),
            o.read_seconds + o.ask_seconds,
        );
    }
    out.push_str("\nbytes held after reading\n");
    for Arm {
        spec, outcome: o, ..
    } in arms
    {
        let share = o.held.bytes() / most;
        let fewer = o.held.full_bytes / o.held.cell_bytes.max(1.0);
        let what = match o.held.n_nodes > 0.0 {
            true => format!("{:.0} nodes, ", o.held.n_nodes),
            false => String::new(),
        };
        let _ = writeln!(
            out,
            "{:<8} {} {:>10}   {what}{} cells, {fewer:.1}x fewer than tokens",
            spec.name,
            bar(share, fancy),
            human_bytes(o.held.bytes()),
            grouped(o.held.n_cells as usize),
        );
    }
    out
}

/// A few questions with the answers of every memory.
fn examples(sample: &Sample, arms: &[Arm], n_tokens: f64) -> String {
    let mut out = String::new();
    let n = sample.questions.len();
    let shown = 4.min(n);
    for i in (0..shown).map(|i| i * n / shown) {
        let q = &sample.questions[i];
        let share = q.facts.first().map_or(0, |f| f.start) as f64 / sample.text.len() as f64;
        let ago = ((1.0 - share) * n_tokens) as usize;
        let _ = writeln!(
            out,
            "{}  ({}, told about {} tokens ago)",
            q.text,
            q.answers.join(" or "),
            grouped(ago)
        );
        for Arm {
            spec, outcome: o, ..
        } in arms
        {
            let mark = if o.replies[i].score >= 1.0 {
                "right"
            } else {
                "wrong"
            };
            // A model that has lost the thread may go on and on.
            let got = &o.replies[i].text;
            let short: String = got.chars().take(24).collect();
            let more = if short.len() < got.len() { "…" } else { " " };
            let _ = writeln!(out, "    {:<8} {short:<24}{more} {mark}", spec.name);
        }
    }
    out
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    interrupt::watch();
    let path = match &args.model {
        Some(path) => path.clone(),
        None => shipped_model()?,
    };
    let engine = ModelArgs {
        model: Some(path.clone()),
        hf_repo: None,
        concept_cache: None,
        memory_adapter: args.memory_adapter.clone(),
        threads: args.threads,
        ubatch_size: None,
        device: args.device.clone(),
    }
    .load(Contexts::default())?;
    let mut rig = Rig {
        form: Form::of(Style::Auto, &engine.model.tokenizer)?,
        options: SequenceOptions::default(),
        n_predict: Some(N_PREDICT),
        engine,
    };
    let own = match &args.memory {
        Some(spec) => spec.clone(),
        None => rig.engine.model.default_memory(),
    };
    rig.sequence(&own, 1)?;

    let model = rig.engine.model.clone();
    let count = |s: &str| model.tokenizer.encode(s, false, false).len();
    let shape = Shape {
        task: "single".into(),
        n_facts: args.facts,
        n_filler: 0,
        n_questions: CANDIDATES,
        relations: Relations::English,
        repeat: 0.0,
        terse: 0.0,
    };
    let seed = format!("demo:{}", args.seed);
    let (mut sample, n_filler) = fitting(&seed, &shape, args.length, None, &count)
        .with_context(|| format!("--length {} --facts {}", args.length, args.facts))?;
    let left = choose(&mut sample, args.questions);

    let fancy = std::io::stdout().is_terminal();
    let mut out = std::io::stdout();
    writeln!(
        out,
        "{}\na document of {} sentences, {} of them facts, the rest filler:\n",
        path.display(),
        grouped(sample.segments.len()),
        sample.segments.len() - n_filler,
    )?;
    let excerpt = sample.segments.get(7).map_or(0, |s| s.range.end);
    writeln!(out, "    {} …\n", &sample.text[..excerpt])?;

    // The window is sized to what the memory holds: the memory reads first.
    let mut arms: Vec<Arm> = Vec::new();
    let held = match own.name.as_str() {
        // A model without a memory: let the window hold a 16th.
        "full" => None,
        _ => {
            let arm = read(&mut rig, own.clone(), &sample)?;
            let held = arm.outcome.held;
            arms.push(arm);
            Some(held)
        }
    };
    let window = match &held {
        // Sinks cost little and keep attention over a window sane.
        Some(held) => rig.equal(&"window:sinks=4".parse()?, held, &sample)?,
        None => format!("window:sinks=4,window={}", (args.length / 16).max(1)).parse()?,
    };
    arms.insert(0, read(&mut rig, window, &sample)?);
    arms.insert(0, read(&mut rig, "full".parse()?, &sample)?);
    let n_tokens = arms[0].outcome.held.n_tokens;
    writeln!(
        out,
        "\n{} tokens read, {} questions asked\n\n{}\n{}",
        grouped(n_tokens as usize),
        sample.questions.len(),
        table(&sample, &arms, fancy),
        examples(&sample, &arms, n_tokens)
    )?;
    if args.json {
        writeln!(out, "{}", summary(&sample, &arms))?;
    }
    match args.no_ask {
        true => Ok(()),
        // Questions nobody has asked yet, if there are any.
        false if left.is_empty() => converse(&mut rig, &arms, &sample.questions),
        false => converse(&mut rig, &arms, &left),
    }
}

/// A memory that has read the document.
struct Arm {
    spec: MemorySpec,
    text: Opened,
    outcome: Outcome,
}

/// Lets `spec` read and answer, saying so first: it may take a while.
fn read(rig: &mut Rig, spec: MemorySpec, sample: &Sample) -> Result<Arm> {
    writeln!(std::io::stderr(), "{spec} reads it …")?;
    let mut bar = Progress::new("reading", 0, Unit::Count);
    bar.set_len(rig.document(&spec, sample)?.ids.len() as u64);
    let mut done = 0;
    let (text, outcome) = rig.run(&spec, sample, &mut |n| {
        done += n as u64;
        bar.set(done);
    })?;
    Ok(Arm {
        spec,
        text,
        outcome,
    })
}

/// The comparison as JSON.
fn summary(sample: &Sample, arms: &[Arm]) -> serde_json::Value {
    let row = |arm: &Arm| {
        let o = &arm.outcome;
        json!({
            "memory": arm.spec.text,
            "score": mean(o.replies.iter().map(|r| r.score)),
            "by_quarter": by_part(sample, o),
            "held": o.held,
            "bytes": o.held.bytes(),
            "read_seconds": o.read_seconds,
            "ask_seconds": o.ask_seconds,
        })
    };
    json!({
        "n_questions": sample.questions.len(),
        "arms": arms.iter().map(row).collect::<Vec<_>>(),
    })
}

/// Answers questions from standard input until it ends.
fn converse(rig: &mut Rig, arms: &[Arm], hints: &[Question]) -> Result<()> {
    let mut out = std::io::stdout();
    let hints: Vec<&str> = hints.iter().take(3).map(|q| q.text.as_str()).collect();
    writeln!(out, "Your turn. Try: {}", hints.join(" · "))?;
    let answer = |rig: &mut Rig, line: &str| -> Result<()> {
        let q = Question {
            text: line.into(),
            prefix: String::new(),
            answers: Vec::new(),
            facts: Vec::new(),
            chance: 0.0,
        };
        let mut out = std::io::stdout();
        for arm in arms {
            let (text, _) = rig.ask(&arm.text, &q, N_PREDICT)?;
            writeln!(out, "    {:<8} {text}", arm.spec.name)?;
        }
        Ok(())
    };
    if !std::io::stdin().is_terminal() {
        for line in std::io::stdin().lock().lines() {
            let line = line.context("cannot read standard input")?;
            let line = line.trim();
            if line.is_empty() {
                break;
            }
            writeln!(out, "> {line}")?;
            answer(rig, line)?;
        }
        return Ok(());
    }
    let mut editor = rustyline::DefaultEditor::new()?;
    loop {
        match editor.readline("> ") {
            Ok(line) if line.trim().is_empty() => return Ok(()),
            Ok(line) => {
                // A line that cannot be remembered can still be asked.
                let _ = editor.add_history_entry(&line);
                answer(rig, line.trim())?;
            }
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::arm::{Held, Place, Reply};

    fn document() -> Sample {
        let shape = Shape {
            task: "single".into(),
            n_facts: 30,
            n_filler: 0,
            n_questions: CANDIDATES,
            relations: Relations::English,
            repeat: 0.0,
            terse: 0.0,
        };
        let words = |s: &str| s.split_whitespace().count();
        fitting("demo:1", &shape, 3000, None, &words).unwrap().0
    }

    #[test]
    fn questions_come_from_all_over() {
        let mut sample = document();
        let left = choose(&mut sample, 12);
        assert_eq!(sample.questions.len(), 12);
        let at = |q: &Question| q.facts[0].start * 4 / sample.text.len();
        for part in 0..4 {
            assert!(sample.questions.iter().filter(|q| at(q) == part).count() >= 2);
        }
        assert!(!left.is_empty());
        assert!(
            left.iter()
                .all(|l| sample.questions.iter().all(|q| q.facts != l.facts))
        );
        let mut few = document();
        few.questions.truncate(3);
        choose(&mut few, 12);
        assert!((1..=3).contains(&few.questions.len()));
    }

    #[test]
    fn numbers_and_bars() {
        assert_eq!(grouped(32768), "32,768");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_000_000), "1,000,000");
        assert_eq!(bar(0.5, false), "##########..........");
        assert_eq!(bar(7.0, true).chars().count(), BAR);
    }

    #[test]
    fn parts_add_up() {
        let mut sample = document();
        choose(&mut sample, 16);
        let reply = |i: usize| Reply {
            text: String::new(),
            score: f64::from(u8::from(i < 4)),
            place: Place::Unknown,
        };
        let outcome = Outcome {
            replies: (0..sample.questions.len()).map(reply).collect(),
            held: Held::default(),
            read_seconds: 0.0,
            ask_seconds: 0.0,
            tally: None,
        };
        let parts = by_part(&sample, &outcome);
        assert_eq!(parts.iter().map(|p| p.1).sum::<usize>(), 16);
        assert_eq!(parts.iter().map(|p| p.0).sum::<f64>(), 4.0);
        assert!(parts[0].0 >= 2.0 && parts[3].0 == 0.0);
    }
}
