//! `mneme bench`: tokens per second at depths of context, for each memory, beside what the
//! machine could do at most.

use crate::args::{CellArgs, ModelArgs, parse_positive};
use crate::bytes::human_bytes;
use crate::interrupt;
use crate::plots::{Line, Plot};
use crate::progress::{Progress, Unit};
use crate::report::{self, Report};
use anyhow::{Context, Result, bail};
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::ops::{Contexts, Peak};
use mneme_engine::{Engine, Error, Feed, Sequence, SequenceOptions, Want};
use mneme_kernels::dispatch;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;
use serde_json::json;
use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Arguments of `mneme bench`.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  mneme bench -m model.gguf -d 0,4096,16384 --memory full \
    --memory window:window=2048,sinks=4 -o bench.svg\n\n\
    Rows `pp` read a prompt of -p tokens, rows `tg` decode -n tokens one by one, rows `fill` read \
    the whole depth from nothing. GB/s counts weights and what the memory holds, GOP/s the \
    matrices of the model; both as share of what this machine was measured to reach."
)]
pub struct Args {
    /// Tokens of the prompt test; 0 leaves it out
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    n_prompt: usize,
    /// Tokens of the decode test; 0 leaves it out
    #[arg(short = 'n', long, value_name = "N", default_value_t = 64)]
    n_gen: usize,
    /// Tokens in the context before each test
    #[arg(
        short = 'd',
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "0"
    )]
    n_depth: Vec<usize>,
    /// Repetitions of each test
    #[arg(short = 'r', long, value_name = "N", default_value_t = 3, value_parser = parse_positive)]
    repetitions: usize,
    /// Memory to measure; may be repeated [default: full]
    #[arg(long, value_name = "NAME[:key=value,...]")]
    memory: Vec<MemorySpec>,
    /// Fill the context with this text over and over instead of random tokens
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Do not measure the machine's peaks first
    #[arg(long)]
    no_peaks: bool,
    /// End with one line of JSON
    #[arg(long)]
    json: bool,
    /// Write the results: .md, .json or .svg; may be repeated
    #[arg(short, long, value_name = "FILE")]
    output: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    cells: CellArgs,
}

/// One line of the table.
#[derive(Serialize)]
struct Row {
    memory: String,
    /// `pp`, `tg` or `fill`.
    test: &'static str,
    n_tokens: usize,
    depth: usize,
    /// Seconds of each repetition.
    seconds: Vec<f64>,
    tokens_per_second: f64,
    /// Standard deviation of the repetitions.
    spread: f64,
    /// Bytes per second of weights and memory; decoding only.
    bytes_per_second: Option<f64>,
    read_share: Option<f64>,
    /// Operations per second in the matrices; prompts only.
    ops_per_second: Option<f64>,
    int8_share: Option<f64>,
    /// The same on a card, whose matrix units take F16.
    f16_share: Option<f64>,
    /// Bytes the memory held before the test, and what a full cache takes.
    held_bytes: usize,
    full_bytes: usize,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    interrupt::watch();
    args.output
        .iter()
        .try_for_each(|path| report::check(path))?;
    let mut depths = args.n_depth.clone();
    depths.sort_unstable();
    depths.dedup();
    let deepest = depths.last().copied().unwrap_or(0);
    let n_tokens = deepest
        .checked_add(args.n_prompt.max(args.n_gen).max(WARM_UP + 1))
        .filter(|n| *n < 1 << 30)
        .with_context(|| format!("-d {deepest}: too deep"))?;
    let n_cells = match args.cells.ctx_size {
        0 => n_tokens,
        n => n,
    };
    let mut engine = args.model.load(Contexts {
        n_cells,
        ..args.cells.contexts(None)
    })?;
    let tokens = args.tokens(&engine, n_tokens)?;
    let mut options = args.cells.options(&engine.model)?;
    if args.cells.ctx_size == 0 {
        // Room for the slots that memories add; cells are only allocated when they are used.
        options.n_ctx = 2 * n_tokens + 64;
    }
    let full = "full".parse::<MemorySpec>()?;
    let specs = match &args.memory[..] {
        [] => vec![full],
        specs => specs.to_vec(),
    };
    // All descriptions are checked before the first is measured.
    for spec in &specs {
        engine.sequence(spec, options)?;
    }
    // Shares of one device's peaks say nothing where two run the model.
    let peak = match args.no_peaks || engine.ops().first_layer() > 0 {
        true => None,
        false => Some(engine.ops().peak()?),
    };
    let mut rows = Vec::new();
    let per_depth = args.repetitions * (args.n_prompt + args.n_gen);
    let work = specs.len() * (deepest + depths.len() * per_depth);
    let mut bar = Progress::new("bench", work as u64, Unit::Count);
    let mut worked = 0;
    for spec in &specs {
        let mut bench = Bench {
            engine: &mut engine,
            spec,
            options,
            tokens: &tokens,
            peak: peak.as_ref(),
            tick: &mut |n| {
                worked += n as u64;
                bar.set(worked);
            },
        };
        bench.run(args, &depths, &mut rows)?;
    }
    drop(bar);
    let report = report(args, &engine, peak.as_ref(), &rows);
    args.output.iter().try_for_each(|path| report.write(path))?;
    let mut out = std::io::stdout().lock();
    write!(out, "{}", report.table)?;
    if args.json {
        writeln!(out, "{}", report.json)?;
    }
    Ok(())
}

/// Tokens read before anything is timed.
const WARM_UP: usize = 16;

impl Args {
    /// What is read: the given text over and over, or random ordinary tokens.
    fn tokens(&self, engine: &Engine, n: usize) -> Result<Vec<u32>> {
        let tokenizer = &engine.model.tokenizer;
        let Some(path) = &self.file else {
            let mut rng = SmallRng::seed_from_u64(1);
            let n_vocab = engine.model.hparams().n_vocab.min(tokenizer.n_vocab()) as u32;
            return Ok((0..n).map(|_| rng.random_range(0..n_vocab)).collect());
        };
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let ids = tokenizer.encode(&text, true, false);
        if ids.is_empty() {
            bail!("{}: no text", path.display());
        }
        Ok(ids.iter().copied().cycle().take(n).collect())
    }
}

/// The measurements of one memory.
struct Bench<'a> {
    engine: &'a mut Engine,
    spec: &'a MemorySpec,
    options: SequenceOptions,
    tokens: &'a [u32],
    peak: Option<&'a Peak>,
    tick: &'a mut dyn FnMut(usize),
}

impl Bench<'_> {
    fn run(&mut self, args: &Args, depths: &[usize], rows: &mut Vec<Row>) -> Result<()> {
        let mut warm = self.engine.sequence(self.spec, self.options)?;
        self.read(&mut warm, 0, WARM_UP)?;
        self.decode(&mut warm, WARM_UP, 1)?;
        let mut base = self.engine.sequence(self.spec, self.options)?;
        let mut fill = 0.0;
        for &depth in depths {
            let n = depth - base.n_past();
            fill += self.fill(&mut base, n)?;
            if depth > 0 {
                rows.push(self.row("fill", depth, 0, vec![fill], &base));
            }
            for (name, n) in [("pp", args.n_prompt), ("tg", args.n_gen)] {
                if n == 0 {
                    continue;
                }
                let mut seconds = Vec::with_capacity(args.repetitions);
                for _ in 0..args.repetitions {
                    let mut seq = base.fork();
                    seconds.push(match name {
                        "pp" => self.read(&mut seq, depth, n)?,
                        _ => self.decode(&mut seq, depth, n)?,
                    });
                    (self.tick)(n);
                }
                rows.push(self.row(name, n, depth, seconds, &base));
            }
        }
        Ok(())
    }

    /// Seconds to read `n` more tokens of the base, in passes, between which Ctrl-C is heard.
    fn fill(&mut self, seq: &mut Sequence, n: usize) -> Result<f64> {
        let end = seq.n_past() + n;
        let mut seconds = 0.0;
        while seq.n_past() < end {
            let at = seq.n_past();
            let n = self.engine.n_ubatch().min(end - at);
            seconds += self.step(seq, at, n, Want::None)?;
            (self.tick)(n);
        }
        Ok(seconds)
    }

    /// Seconds from a prompt of `n` tokens to its logits.
    fn read(&mut self, seq: &mut Sequence, at: usize, n: usize) -> Result<f64> {
        self.step(seq, at, n, Want::Last)
    }

    /// Seconds to decode `n` tokens one by one, each to the likeliest next one: what greedy sampling
    /// takes.
    fn decode(&mut self, seq: &mut Sequence, at: usize, n: usize) -> Result<f64> {
        (at..at + n).try_fold(0.0, |sum, i| Ok(sum + self.step(seq, i, 1, Want::Best(1))?))
    }

    fn step(&mut self, seq: &mut Sequence, at: usize, n: usize, want: Want) -> Result<f64> {
        interrupt::check()?;
        let tokens = &self.tokens[at..at + n];
        let start = Instant::now();
        let feed = Feed { seq, tokens, want };
        let done = self.engine.step_or_blame(&mut [feed]);
        done.map_err(Error::from)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn row(
        &self,
        test: &'static str,
        n_tokens: usize,
        depth: usize,
        seconds: Vec<f64>,
        base: &Sequence,
    ) -> Row {
        let stats = base.stats();
        let held = stats.cell_bytes + stats.state_bytes;
        let weights = &self.engine.model.weights;
        let rates: Vec<f64> = seconds.iter().map(|s| n_tokens as f64 / s).collect();
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        let var =
            rates.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (rates.len() - 1).max(1) as f64;
        let hp = &weights.hparams;
        let head = if test == "pp" {
            hp.n_embd * hp.n_vocab
        } else {
            0
        };
        let ops = 2.0 * (weights.macs_per_token() as f64 + head as f64 / n_tokens as f64);
        let (bytes, ops) = match test {
            "tg" => (Some((weights.bytes_per_token() + held) as f64 * mean), None),
            _ => (None, Some(ops * mean)),
        };
        let share = |x: Option<f64>, of: fn(&Peak) -> f64| {
            let limit = of(self.peak?);
            (limit > 0.0).then_some(x? / limit)
        };
        let matrix_share = share(ops, |p| p.matrix);
        let format = self.peak.map(|p| p.format);
        Row {
            memory: self.spec.text.clone(),
            test,
            n_tokens,
            depth,
            seconds,
            tokens_per_second: mean,
            spread: var.sqrt(),
            bytes_per_second: bytes,
            read_share: share(bytes, |p| p.read),
            ops_per_second: ops,
            int8_share: matrix_share.filter(|_| format != Some("f16")),
            f16_share: matrix_share.filter(|_| format == Some("f16")),
            held_bytes: held,
            full_bytes: stats.full_bytes,
        }
    }
}

fn report(args: &Args, engine: &Engine, peak: Option<&Peak>, rows: &[Row]) -> Report {
    let weights = &engine.model.weights;
    let name = engine.model.path.file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    let mut text = format!(
        "{name}: {} of weights per token, {}",
        human_bytes(weights.bytes_per_token() as f64),
        engine.ops().name(),
    );
    if let Some(peak) = peak {
        let rates = peak.rates.iter();
        let rates: Vec<String> = rates
            .map(|(name, rate)| match *name {
                "read" | "copy" => format!("{name} {:.1} GB/s", rate / 1e9),
                _ => format!("{name} {:.0} GOP/s", rate / 1e9),
            })
            .collect();
        text += &format!("; measured peaks: {}", rates.join(", "));
    }
    let of_matrix = format!("of {}", peak.map_or("int8", |p| p.format));
    let share = |x: Option<f64>| x.map_or(String::new(), |x| format!("{:.0} %", 100.0 * x));
    let giga = |x: Option<f64>| x.map_or(String::new(), |x| format!("{:.1}", x / 1e9));
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.memory.clone(),
                format!("{}{}", r.test, r.n_tokens),
                r.depth.to_string(),
                format!("{:.2}", r.tokens_per_second),
                format!("{:.2}", r.spread),
                giga(r.bytes_per_second),
                share(r.read_share),
                giga(r.ops_per_second),
                share(r.int8_share.or(r.f16_share)),
                human_bytes(r.held_bytes as f64),
                human_bytes(r.full_bytes as f64),
            ]
        })
        .collect();
    let head = [
        "memory", "test", "depth", "tokens/s", "±", "GB/s", "of read", "GOP/s", &of_matrix, "held",
        "full",
    ];
    let lines = |test: &str| -> Vec<Line> {
        let mut lines: Vec<Line> = Vec::new();
        for r in rows.iter().filter(|r| r.test == test) {
            let point = (r.depth as f64, r.tokens_per_second);
            match lines.iter_mut().find(|l| l.name == r.memory) {
                Some(line) => line.points.push(point),
                None => lines.push(Line {
                    name: r.memory.clone(),
                    points: vec![point],
                }),
            }
        }
        lines
    };
    let plot = |test: &str, what: String| Plot {
        title: format!("{name}: {what}"),
        x_label: "depth, tokens".into(),
        y_label: "tokens/s".into(),
        log_x: rows.iter().filter(|r| r.depth > 0).count() > 2,
        from_zero: true,
        lines: lines(test),
    };
    Report {
        table: format!("{text}\n\n{}", report::table(&head, &cells, 2)),
        json: json!({
            "model": engine.model.path.display().to_string(),
            "bytes_per_token": weights.bytes_per_token(),
            "n_threads": engine.ops().host().n_threads(),
            "n_ubatch": engine.n_ubatch(),
            "isa": dispatch::best().name(),
            "device": engine.ops().name(),
            "peak": peak.map(|p| p.rates.iter().copied().collect::<HashMap<_, _>>()),
            "rows": rows,
        }),
        plots: [
            ("tg", args.n_gen, "decode"),
            ("pp", args.n_prompt, "prefill"),
        ]
        .into_iter()
        .filter(|(_, n, _)| *n > 0)
        .map(|(test, n, what)| plot(test, format!("{what} of {n} tokens")))
        .collect(),
    }
}
