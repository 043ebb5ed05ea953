//! Streams tokens without end through a memory and prints what it holds and how fast it reads, to
//! see that a bounded memory stays bounded:
//!
//! `cargo run --release -p mneme-engine --example stream -- MODEL MEMORY N_TOKENS [ADAPTER]`

use mneme_engine::ops::Cpu;
use mneme_engine::{Engine, Feed, LoadOptions, Model, SequenceOptions, Want};
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, memory, n_tokens, adapter @ ..] = &args[..] else {
        return Err("usage: stream MODEL MEMORY N_TOKENS [ADAPTER]".into());
    };
    let n_tokens: usize = n_tokens.parse()?;
    let ops = Cpu::new(std::thread::available_parallelism()?.get());
    let load = LoadOptions {
        memory_adapter: adapter.first().map(Into::into),
    };
    let model = Model::load(Path::new(model), &load, &ops, |_, _| {})?;
    let n_vocab = model.hparams().n_vocab as u64;
    let mut engine = Engine::new(model, ops, 512);
    let options = SequenceOptions {
        n_ctx: n_tokens.max(1),
        ..SequenceOptions::default()
    };
    let mut seq = engine.sequence(&memory.parse()?, options)?;
    println!("tokens  tokens/s  cells  cell_bytes  state_bytes  full_bytes  nodes");
    let report = (n_tokens / 10).max(1);
    let (mut since, mut next, mut state) = (Instant::now(), report, 1u64);
    while seq.n_past() < n_tokens {
        let tokens: Vec<u32> = (0..512.min(n_tokens - seq.n_past()))
            .map(|_| {
                // Any stream without a short period will do.
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                ((state >> 33) % n_vocab) as u32
            })
            .collect();
        let want = Want::Last;
        engine.step(&mut [Feed {
            seq: &mut seq,
            tokens: &tokens,
            want,
        }])?;
        if seq.n_past() >= next {
            let stats = seq.stats();
            println!(
                "{}  {:.0}  {}  {}  {}  {}  {}",
                stats.n_tokens,
                report as f64 / since.elapsed().as_secs_f64(),
                stats.n_cells,
                stats.cell_bytes,
                stats.state_bytes,
                stats.full_bytes,
                stats.n_nodes
            );
            (since, next) = (Instant::now(), next + report);
        }
    }
    Ok(())
}
