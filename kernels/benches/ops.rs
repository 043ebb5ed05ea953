//! Every op against what this machine can do, measured in the same run.
//!
//! `cargo bench -p mneme-kernels --bench ops [-- WORD...]` prints the machine's peaks, then one
//! row per op, type and shape: rate with one and two threads (best of several rounds of over
//! 100 ms, threads taking turns round by round), their ratio, and the share of the peak that
//! limits the op. With words, only rows that contain one of them; `scalar`, `avx2`, `avx512` or
//! `amx` as a word chooses that instruction set for `mul_mat`. The last line is JSON.
//!
//! Shapes are those of Qwen2.5 0.5B (896, 4864) and 3B (2048, 11008). The vector form reads
//! matrices that together exceed any cache; the tile form has 512 tokens.

use mneme_kernels::add::add;
use mneme_kernels::dispatch::{self, Isa};
use mneme_kernels::mul_mat::{Packed, WeightType, mul_mat};
use mneme_kernels::peak::Peak;
use mneme_kernels::pool::Pool;
use mneme_kernels::rms_norm::rms_norm;
use mneme_kernels::rope::{RopeKind, rope};
use mneme_kernels::swiglu::swiglu;
use std::time::{Duration, Instant};

/// Bytes of weights a vector form goes through.
const VECTOR_BYTES: usize = 256 << 20;
const ROUND: Duration = Duration::from_millis(100);
const N_ROUNDS: usize = 5;
const N_TOKENS: usize = 512;

/// What limits an op.
#[derive(Clone, Copy, PartialEq)]
enum Limit {
    Read,
    Fma,
    Int8,
}

struct Row {
    name: String,
    limit: Limit,
    /// Bytes or operations per second with one and two threads.
    rates: [f64; 2],
}

fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let isa = dispatch::available()
        .iter()
        .copied()
        .find(|isa| words.iter().any(|word| word == isa.name()))
        .unwrap_or(dispatch::best());
    let wanted = |name: &str| {
        let mut words = words.iter().filter(|word| *word != isa.name()).peekable();
        words.peek().is_none() || words.any(|word| name.contains(word.as_str()))
    };
    let pools = [Pool::new(1), Pool::new(2)];
    let mut peaks = [0, 1].map(|i| Peak::measure(&pools[i], 3));
    let mut rows = Vec::new();
    for ty in [
        WeightType::Q8_0,
        WeightType::Q4_0,
        WeightType::Q4_1,
        WeightType::Q5_0,
        WeightType::Q5_1,
        WeightType::IQ4_NL,
        WeightType::Q2_K,
        WeightType::Q3_K,
        WeightType::Q4_K,
        WeightType::Q5_K,
        WeightType::Q6_K,
        WeightType::IQ4_XS,
        WeightType::F16,
        WeightType::BF16,
        WeightType::F32,
    ] {
        for (n_rows, n_cols) in [(4864, 896), (896, 4864), (11008, 2048), (2048, 11008)] {
            if ty.row_bytes(n_cols).is_some() {
                mul_mat_rows(isa, ty, n_rows, n_cols, &pools, &wanted, &mut rows);
            }
        }
        // Neighbours come and go: a peak is the best seen during the whole run.
        for (peak, pool) in peaks.iter_mut().zip(&pools) {
            let now = Peak::measure(pool, 1);
            peak.read = peak.read.max(now.read);
            peak.fma = peak.fma.max(now.fma);
            peak.int8 = peak.int8.max(now.int8);
            peak.int8_amx = peak.int8_amx.max(now.int8_amx);
        }
    }
    element_wise_rows(&pools, &wanted, &mut rows);
    let fork_join = fork_join_ns(&pools[1]);
    print(isa, &peaks, &rows, fork_join);
}

/// Nanoseconds of a region that does nothing on two threads: the least of many rounds.
fn fork_join_ns(pool: &Pool) -> f64 {
    let n = 1000;
    (0..200).fold(f64::INFINITY, |least, _| {
        let start = Instant::now();
        (0..n).for_each(|_| pool.run(|_| {}));
        least.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(n))
    })
}

/// Weights whose numbers are ordinary: scales near 0.01, quants of all values.
fn weights(ty: WeightType, n_rows: usize, n_cols: usize) -> Vec<u8> {
    let n_blocks = n_rows * n_cols / ty.block_len();
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        (state >> 24) as u8
    };
    let mut bytes = Vec::with_capacity(n_blocks * ty.block_bytes());
    let scale = half::f16::from_f32(0.01).to_le_bytes();
    for _ in 0..n_blocks {
        let start = bytes.len();
        bytes.extend((0..ty.block_bytes()).map(|_| next()));
        let block = &mut bytes[start..];
        match ty {
            WeightType::F32 => block.copy_from_slice(&0.01f32.to_le_bytes()),
            WeightType::F16 => block.copy_from_slice(&scale),
            WeightType::BF16 => block.copy_from_slice(&half::bf16::from_f32(0.01).to_le_bytes()),
            WeightType::Q8_0
            | WeightType::Q4_0
            | WeightType::Q5_0
            | WeightType::IQ4_NL
            | WeightType::IQ4_XS => block[..2].copy_from_slice(&scale),
            WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => {
                block[..2].copy_from_slice(&scale);
                block[2..4].copy_from_slice(&scale);
            }
            WeightType::Q2_K => {
                block[80..82].copy_from_slice(&scale);
                block[82..].copy_from_slice(&scale);
            }
            WeightType::Q3_K => block[108..].copy_from_slice(&scale),
            WeightType::Q6_K => block[208..].copy_from_slice(&scale),
        }
    }
    bytes
}

fn mul_mat_rows(
    isa: Isa,
    ty: WeightType,
    n_rows: usize,
    n_cols: usize,
    pools: &[Pool; 2],
    wanted: &dyn Fn(&str) -> bool,
    rows: &mut Vec<Row>,
) {
    let title = |form| format!("mul_mat {} {n_rows}x{n_cols} {form}", ty.name());
    let (vector, tile) = (title("vector"), title("tile"));
    if !wanted(&vector) && !wanted(&tile) {
        return;
    }
    let bytes = weights(ty, n_rows, n_cols);
    let first = Packed::pack_for(isa, &pools[1], ty, n_rows, n_cols, &bytes).expect("whole rows");
    drop(bytes);
    if wanted(&vector) {
        let n = VECTOR_BYTES.div_ceil(first.n_bytes());
        let copies: Vec<Packed> = (0..n).map(|_| first.clone()).collect();
        let x = vec![0.5; n_cols];
        let mut out = vec![0.0; n_rows];
        let rates = rates(pools, (n * first.n_bytes()) as f64, |pool| {
            for w in &copies {
                mul_mat(pool, &x, 1, &mut [(w, &mut out)]);
            }
        });
        rows.push(Row {
            name: vector,
            limit: Limit::Read,
            rates,
        });
    }
    if wanted(&tile) {
        let x = vec![0.5; N_TOKENS * n_cols];
        let mut out = vec![0.0; N_TOKENS * n_rows];
        let work = 2.0 * (n_rows * n_cols * N_TOKENS) as f64;
        let rates = rates(pools, work, |pool| {
            mul_mat(pool, &x, N_TOKENS, &mut [(&first, &mut out)]);
        });
        let limit = if ty.block_len() > 1 {
            Limit::Int8
        } else {
            Limit::Fma
        };
        rows.push(Row {
            name: tile,
            limit,
            rates,
        });
    }
}

/// 512 tokens of the 3B model; bytes are those read and written.
fn element_wise_rows(pools: &[Pool; 2], wanted: &dyn Fn(&str) -> bool, rows: &mut Vec<Row>) {
    let (n_embd, n_ff, n_head, head_dim) = (2048, 11008, 16, 128);
    let mut push = |name: &str, bytes: usize, op: &mut dyn FnMut(&Pool)| {
        if wanted(name) {
            rows.push(Row {
                name: name.to_string(),
                limit: Limit::Read,
                rates: rates(pools, bytes as f64, op),
            });
        }
    };
    let n = N_TOKENS * n_embd;
    let x = vec![0.5; n];
    let w = vec![1.5; n_embd];
    let mut out = vec![0.0; n];
    push("rms_norm 512x2048", 8 * n, &mut |pool| {
        rms_norm(pool, &x, &w, 1e-6, &mut out);
    });
    push("add 512x2048", 12 * n, &mut |pool| add(pool, &mut out, &x));
    let pos: Vec<u32> = (0..N_TOKENS as u32).collect();
    let inv_freq: Vec<f32> = (0..head_dim / 2)
        .map(|i| 1e6f32.powf(-2.0 * i as f32 / head_dim as f32))
        .collect();
    push("rope 512x16x128", 8 * n, &mut |pool| {
        let kind = RopeKind::Neox;
        rope(
            pool, kind, &mut out, n_head, head_dim, head_dim, &pos, &inv_freq, 1.0,
        );
    });
    let gate = vec![0.7; N_TOKENS * n_ff];
    let up = vec![0.7; N_TOKENS * n_ff];
    let mut out = vec![0.0; N_TOKENS * n_ff];
    push("swiglu 512x11008", 12 * gate.len(), &mut |pool| {
        swiglu(pool, &gate, &up, &mut out);
    });
}

/// Work per second with each pool: the best of rounds in which the pools take turns.
fn rates(pools: &[Pool; 2], work: f64, mut op: impl FnMut(&Pool)) -> [f64; 2] {
    let mut best = [0.0f64; 2];
    for round in 0..=N_ROUNDS {
        for (pool, best) in pools.iter().zip(&mut best) {
            let start = Instant::now();
            let mut calls = 0;
            while start.elapsed() < ROUND {
                op(pool);
                calls += 1;
            }
            // The first round touches memory for the first time.
            if round > 0 {
                *best = best.max(work * f64::from(calls) / start.elapsed().as_secs_f64());
            }
        }
    }
    best
}

fn print(isa: Isa, peaks: &[Peak; 2], rows: &[Row], fork_join: f64) {
    println!(
        "\ninstruction set {}, fork and join of two threads {fork_join:.0} ns\n",
        isa.name()
    );
    println!("| peak | unit | 1 thread | 2 threads | 1 to 2 |");
    println!("|---|---|--:|--:|--:|");
    let peak_row = |name: &str, unit: &str, of: &dyn Fn(&Peak) -> f64| {
        let [one, two] = [of(&peaks[0]), of(&peaks[1])];
        println!(
            "| {name} | {unit} | {:.1} | {:.1} | {:.2} |",
            one / 1e9,
            two / 1e9,
            two / one
        );
    };
    peak_row("read", "GB/s", &|peak| peak.read);
    peak_row("FP32 FMA", "GFLOP/s", &|peak| peak.fma);
    peak_row("int8", "GOP/s", &|peak| peak.int8);
    peak_row("int8 AMX", "GOP/s", &|peak| peak.int8_amx);
    println!("\n| op | unit | 1 thread | 2 threads | 1 to 2 | share of peak, 2 threads |");
    println!("|---|---|--:|--:|--:|---|");
    let mut json = Vec::new();
    for row in rows {
        let (unit, peak, what) = match row.limit {
            Limit::Read => ("GB/s", peaks[1].read, "read"),
            Limit::Fma => ("GFLOP/s", peaks[1].fma, "FP32 FMA"),
            Limit::Int8 => ("GOP/s", peaks[1].int8, "int8"),
        };
        let [one, two] = row.rates;
        println!(
            "| {} | {unit} | {:.1} | {:.1} | {:.2} | {:.0} % of {what} |",
            row.name,
            one / 1e9,
            two / 1e9,
            two / one,
            100.0 * two / peak
        );
        json.push(format!(
            r#"{{"op":"{}","unit":"{unit}","threads_1":{:.2},"threads_2":{:.2},"share":{:.3}}}"#,
            row.name,
            one / 1e9,
            two / 1e9,
            two / peak
        ));
    }
    let peaks: Vec<String> = peaks
        .iter()
        .map(|p| {
            format!(
                r#"{{"threads":{},"read":{:.2},"fma":{:.1},"int8":{:.1},"int8_amx":{:.1}}}"#,
                p.n_threads,
                p.read / 1e9,
                p.fma / 1e9,
                p.int8 / 1e9,
                p.int8_amx / 1e9
            )
        })
        .collect();
    println!(
        r#"{{"bench":"ops","isa":"{}","fork_join_ns":{fork_join:.0},"peaks":[{}],"rows":[{}]}}"#,
        isa.name(),
        peaks.join(","),
        json.join(",")
    );
}
