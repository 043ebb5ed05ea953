//! `mneme logits`: what the model says after every one of given tokens.

use crate::args::{MemoryArgs, ModelArgs, parse_positive};
use crate::interrupt;
use crate::npy;
use crate::progress::{Progress, Unit};
use anyhow::{Result, bail};
use mneme_engine::ops::Contexts;
use mneme_engine::{Feed, Want};
use std::path::PathBuf;

/// Arguments of `mneme logits`.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  mneme logits -m model.gguf --ids ids.npy --out logits.npy \
    --prefill 100 --chunk 7 --memory window:window=64,sinks=4"
)]
pub struct Args {
    /// Token ids, int32 or int64 [n] (.npy)
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,
    /// Logits, F32 [n, n_vocab] (.npy)
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Read the first N ids together and the rest one at a time [default: all together]
    #[arg(long, value_name = "N")]
    prefill: Option<usize>,
    /// Read the first ids C at a time instead of all in one pass
    #[arg(long, value_name = "C", value_parser = parse_positive)]
    chunk: Option<usize>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    memory: MemoryArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    interrupt::watch();
    let ids = npy::read_ids(&args.ids)?;
    if ids.is_empty() {
        bail!("{}: no token ids", args.ids.display());
    }
    let prefill = args.prefill.unwrap_or(ids.len());
    if prefill > ids.len() {
        bail!("--prefill {prefill}: there are {} ids", ids.len());
    }
    let mut engine = args.model.load(Contexts {
        all_logits: true,
        ..args.memory.contexts()
    })?;
    let n_vocab = engine.model.hparams().n_vocab;
    let mut seq = args.memory.sequence(&engine)?;
    let mut out = npy::RowWriter::create(&args.out, ids.len(), n_vocab)?;
    let mut bar = Progress::new("tokens", ids.len() as u64, Unit::Count);
    let mut done = 0;
    while done < ids.len() {
        interrupt::check()?;
        let n = match done {
            done if done >= prefill => 1,
            // A pass is never larger than --ubatch-size; larger feeds only hold more rows at once.
            done => args.chunk.unwrap_or(engine.n_ubatch()).min(prefill - done),
        };
        let rows = engine.step(&mut [Feed {
            seq: &mut seq,
            tokens: &ids[done..done + n],
            want: Want::All,
        }])?;
        out.write(&rows[0])?;
        done += n;
        bar.set(done as u64);
    }
    drop(bar);
    out.finish()
}
