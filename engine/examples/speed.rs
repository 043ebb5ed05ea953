use mneme_engine::ops::Cpu;
use mneme_engine::*;
use std::time::Instant;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let nt: usize = a[2].parse().unwrap();
    let depth: usize = a[3].parse().unwrap();
    let mem = &a[4];
    let ops = Cpu::new(nt);
    let t = Instant::now();
    let model = Model::load(a[1].as_ref(), &LoadOptions::default(), &ops, |_, _| {}).unwrap();
    eprintln!("load {:.2}s", t.elapsed().as_secs_f64());
    let bpt = model.weights.bytes_per_token();
    let macs = model.weights.macs_per_token();
    let mut e = Engine::new(model, ops, 512);
    let mut seq = e
        .sequence(
            &mem.parse().unwrap(),
            SequenceOptions {
                n_ctx: 1 << 20,
                ..Default::default()
            },
        )
        .unwrap();
    let toks: Vec<u32> = (0..depth as u32).map(|i| (i * 7919) % 1000).collect();
    let t = Instant::now();
    if depth > 0 {
        e.step(&mut [Feed {
            seq: &mut seq,
            tokens: &toks,
            want: Want::None,
        }])
        .unwrap();
        eprintln!(
            "fill {depth}: {:.1} tok/s",
            depth as f64 / t.elapsed().as_secs_f64()
        );
    }
    let mut best = (0f64, 0f64);
    for _ in 0..3 {
        let mut s = seq.fork();
        let p: Vec<u32> = (0..512).map(|i| (i * 31) % 1000).collect();
        let t = Instant::now();
        e.step(&mut [Feed {
            seq: &mut s,
            tokens: &p,
            want: Want::Last,
        }])
        .unwrap();
        best.0 = best.0.max(512.0 / t.elapsed().as_secs_f64());
        let mut s = seq.fork();
        let t = Instant::now();
        for i in 0..32 {
            e.step(&mut [Feed {
                seq: &mut s,
                tokens: &[i],
                want: Want::Last,
            }])
            .unwrap();
        }
        best.1 = best.1.max(32.0 / t.elapsed().as_secs_f64());
    }
    println!(
        "pp512 {:.1} tok/s ({:.0} GOP/s)  tg {:.2} tok/s ({:.1} GB/s) cells {} MB",
        best.0,
        best.0 * macs as f64 * 2e-9,
        best.1,
        best.1 * bpt as f64 * 1e-9,
        seq.stats().cell_bytes >> 20
    );
}
