//! `mneme perplexity`: how well the model predicts a text, over all of it and by position.
//!
//! As in llama.cpp's tool the text is cut into chunks of the context's length and the second half
//! of each is scored, so the figures compare.

use crate::args::{MemoryArgs, ModelArgs, parse_positive};
use crate::interrupt;
use crate::plots::{Line, Plot};
use crate::progress::{Progress, Unit};
use crate::report::{self, Report};
use anyhow::{Context, Result, bail};
use mneme_engine::ops::Contexts;
use mneme_engine::{Engine, Feed, Want};
use mneme_kernels::pool::Pool;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// Arguments of `mneme perplexity`.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  mneme perplexity -m model.gguf -f text.txt -c 4096 \
    --by-position --memory window:window=512,sinks=4 -o curve.svg"
)]
pub struct Args {
    /// Text to predict (UTF-8)
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Score only the first N chunks
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    chunks: Option<usize>,
    /// Also show the mean loss by position in the chunk
    #[arg(long)]
    by_position: bool,
    /// Print the numbers as one line of JSON
    #[arg(long)]
    json: bool,
    /// Write the results: .md, .json or .svg; may be repeated
    #[arg(short, long, value_name = "FILE")]
    output: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    memory: MemoryArgs,
}

/// Tokens per chunk unless `-c` says otherwise.
const N_CTX: usize = 512;

/// Sum of the loss over the tokens of some positions.
#[derive(Clone, Copy, Default)]
struct Loss {
    n: usize,
    sum: f64,
    squares: f64,
}

impl Loss {
    fn add(&mut self, nll: f64) {
        self.n += 1;
        self.sum += nll;
        self.squares += nll * nll;
    }

    /// Negative log likelihood per token, nats.
    fn mean(&self) -> f64 {
        self.sum / self.n.max(1) as f64
    }

    /// Standard error of the mean.
    fn error(&self) -> f64 {
        let n = self.n as f64;
        if self.n < 2 {
            return 0.0;
        }
        let var = (self.squares / n - self.mean() * self.mean()).max(0.0);
        (var / (n - 1.0)).sqrt()
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    interrupt::watch();
    args.output
        .iter()
        .try_for_each(|path| report::check(path))?;
    let bytes = std::fs::read(&args.file).with_context(|| args.file.display().to_string())?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: not UTF-8 at byte {at}", args.file.display())
    })?;
    let mut engine = args.model.load(Contexts {
        all_logits: true,
        ..args.memory.contexts()
    })?;
    let mut memory = args.memory.clone();
    if memory.cells.ctx_size == 0 {
        memory.cells.ctx_size = N_CTX.min(engine.model.hparams().n_ctx_train);
    }
    let n_ctx = memory.cells.ctx_size;
    if n_ctx < 4 {
        bail!("-c {n_ctx}: chunks need at least 4 tokens");
    }
    let spec = memory.spec(&engine.model)?;
    let tokenizer = engine.model.tokenizer.clone();
    let tokens = tokenizer.encode(&text, true, false);
    let n_chunks = (tokens.len() / n_ctx).min(args.chunks.unwrap_or(usize::MAX));
    if n_chunks == 0 {
        bail!(
            "{}: {} tokens, one chunk needs {n_ctx}; give a longer text or a smaller -c",
            args.file.display(),
            tokens.len()
        );
    }
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let mut scored = Loss::default();
    let mut by_position = vec![Loss::default(); n_ctx];
    let mut bar = Progress::new("tokens", (n_chunks * n_ctx) as u64, Unit::Count);
    for i in 0..n_chunks {
        let mut chunk = tokens[i * n_ctx..(i + 1) * n_ctx].to_vec();
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        let mut seq = memory.cells.sequence(&engine, &spec)?;
        let first = if args.by_position { 0 } else { n_ctx / 2 };
        let losses = chunk_losses(&mut engine, &mut seq, &chunk, first, |done| {
            bar.set((i * n_ctx + done) as u64);
            interrupt::check()
        })?;
        for (at, nll) in (first + 1..).zip(losses) {
            by_position[at].add(nll);
            // llama.cpp scores the tokens after the first half.
            if at > n_ctx / 2 {
                scored.add(nll);
            }
        }
    }
    drop(bar);
    let ppl = scored.mean().exp();
    let buckets = if args.by_position {
        buckets(&by_position)
    } else {
        Vec::new()
    };
    let report = Report {
        table: table(&spec.text, scored, &buckets),
        json: json!({
            "model": engine.model.path.display().to_string(),
            "memory": spec.text,
            "n_ctx": n_ctx,
            "n_chunks": n_chunks,
            "n_tokens": scored.n,
            "nll": scored.mean(),
            "nll_error": scored.error(),
            "perplexity": ppl,
            "by_position": buckets.iter().map(|(begin, end, loss)| json!({
                "begin": begin, "end": end, "n_tokens": loss.n,
                "nll": loss.mean(), "nll_error": loss.error(),
            })).collect::<Vec<_>>(),
        }),
        plots: vec![Plot {
            title: format!("{}: loss by position", engine.model.path.display()),
            x_label: "position, tokens".into(),
            y_label: "nats per token".into(),
            log_x: true,
            from_zero: false,
            lines: vec![Line {
                name: spec.text.clone(),
                points: buckets
                    .iter()
                    .map(|(begin, end, loss)| ((begin + end) as f64 / 2.0, loss.mean()))
                    .collect(),
            }],
        }],
    };
    args.output.iter().try_for_each(|path| report.write(path))?;
    let mut out = std::io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", report.json)?,
        false => write!(out, "{}", report.table)?,
    }
    Ok(())
}

/// Losses of `tokens[first + 1..]`, each given all before it.
fn chunk_losses(
    engine: &mut Engine,
    seq: &mut mneme_engine::Sequence,
    tokens: &[u32],
    first: usize,
    mut progress: impl FnMut(usize) -> Result<(), interrupt::Interrupted>,
) -> Result<Vec<f64>> {
    let n_vocab = engine.model.hparams().n_vocab;
    let mut losses = Vec::with_capacity(tokens.len() - first);
    let mut done = 0;
    while done < tokens.len() {
        // Tokens before the first scored one need no logits.
        let (n, want) = match done < first {
            true => (engine.n_ubatch().min(first - done), Want::None),
            false => (engine.n_ubatch().min(tokens.len() - done), Want::All),
        };
        let feed = Feed {
            seq,
            tokens: &tokens[done..done + n],
            want,
        };
        let logits = engine.step(&mut [feed])?;
        if want == Want::All {
            // The last token's logits predict what is outside the chunk.
            let next = &tokens[done + 1..(done + n + 1).min(tokens.len())];
            losses.extend(nlls(engine.ops().host().pool(), &logits[0], n_vocab, next));
        }
        done += n;
        progress(done)?;
    }
    Ok(losses)
}

/// Negative log probability of `next[i]` under row `i` of `logits`.
fn nlls(pool: &Pool, logits: &[f32], n_vocab: usize, next: &[u32]) -> Vec<f64> {
    let out: Vec<AtomicU64> = next.iter().map(|_| AtomicU64::new(0)).collect();
    pool.for_each(next.len(), 4, |range| {
        for i in range {
            let row = &logits[i * n_vocab..(i + 1) * n_vocab];
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|x| f64::from((x - max).exp())).sum();
            let nll = sum.ln() - f64::from(row[next[i] as usize] - max);
            out[i].store(nll.to_bits(), Ordering::Relaxed);
        }
    });
    out.into_iter()
        .map(|nll| f64::from_bits(nll.into_inner()))
        .collect()
}

/// Positions gathered in ranges that grow by half an octave: `[begin, end)` and their loss.
fn buckets(by_position: &[Loss]) -> Vec<(usize, usize, Loss)> {
    let mut out = Vec::new();
    let mut begin = 1;
    let mut width = 16.0f64;
    while begin < by_position.len() {
        let end = (width.round() as usize).clamp(begin + 1, by_position.len());
        let mut loss = Loss::default();
        for l in &by_position[begin..end] {
            loss.n += l.n;
            loss.sum += l.sum;
            loss.squares += l.squares;
        }
        out.push((begin, end, loss));
        begin = end;
        width *= std::f64::consts::SQRT_2;
    }
    out
}

fn table(memory: &str, scored: Loss, buckets: &[(usize, usize, Loss)]) -> String {
    let mut text = String::new();
    if !buckets.is_empty() {
        let rows: Vec<Vec<String>> = buckets
            .iter()
            .map(|(begin, end, loss)| {
                vec![
                    format!("{begin}..{end}"),
                    loss.n.to_string(),
                    format!("{:.4}", loss.mean()),
                    format!("{:.4}", loss.error()),
                    format!("{:.3}", loss.mean().exp()),
                ]
            })
            .collect();
        let head = ["position", "tokens", "nats/token", "±", "perplexity"];
        text = report::table(&head, &rows, 1) + "\n";
    }
    let ppl = scored.mean().exp();
    text + &format!(
        "{memory}: perplexity {ppl:.4} ± {:.4} ({:.5} nats/token over {} tokens)\n",
        ppl * scored.error(),
        scored.mean(),
        scored.n
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_of_a_row_is_its_negative_log_softmax() {
        let pool = Pool::new(1);
        let logits = [0.0, 0.0, 0.0, 0.0, 1000.0, 0.0, -5.0, 3.0f32];
        let got = nlls(&pool, &logits, 4, &[2, 0]);
        assert!((got[0] - 4f64.ln()).abs() < 1e-12, "{got:?}");
        assert!(got[1].abs() < 1e-12, "{got:?}");
    }

    #[test]
    fn buckets_cover_every_position_once() {
        for n in [4, 17, 512, 5000] {
            let by_position = vec![
                Loss {
                    n: 1,
                    sum: 2.0,
                    squares: 4.0
                };
                n
            ];
            let buckets = buckets(&by_position);
            assert_eq!(buckets[0].0, 1);
            assert_eq!(buckets.last().unwrap().1, n);
            assert!(buckets.windows(2).all(|w| w[0].1 == w[1].0));
            assert!(buckets.iter().all(|b| b.2.n == b.1 - b.0));
            assert!((buckets[0].2.mean() - 2.0).abs() < 1e-12);
        }
    }
}
