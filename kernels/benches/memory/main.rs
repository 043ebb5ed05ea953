//! Times `attend` and `recur` against what this machine can do, read bandwidth and F32 FMA peak, both
//! measured in turns with the kernel, and against ggml's ops on the same shapes. One Markdown table,
//! then one JSON line.
//!
//! `cargo bench -p mneme-kernels --bench memory --features ggml-sys/native [-- filter]`:
//! without `native` ggml is compiled for any processor, and slow.
//! `--processor-time` counts what the busiest thread has run instead of the wall clock, for a
//! machine that does other things too (ggml's second thread is not counted so: compare one).

mod ggml;

use mneme_kernels::attend::{KvType, PAGE_CELLS, Page, PageLayout, Sequence, Visible, attend};
use mneme_kernels::dispatch::{self, Isa};
use mneme_kernels::peak::{Meter, Peak};
use mneme_kernels::pool::Pool;
use mneme_kernels::recur::{Form, Numbers, Recur, Rule, recur};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Bytes that no cache of a core holds; cold benches walk through as many.
const COLD_BYTES: usize = 256 << 20;

struct Row {
    name: String,
    threads: usize,
    seconds: f64,
    /// What the machine could do at the time.
    peak: Peak,
    /// Seconds of ggml's op; NaN where it has none.
    ggml: f64,
    tokens: f64,
    flops: f64,
    bytes: f64,
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let wanted = |name: &str| filter.as_ref().is_none_or(|f| name.contains(f.as_str()));
    let pools = [Pool::new(1), Pool::new(2)];
    let meters = [0, 1].map(|i| Meter::new(&pools[i]));
    let mut rows = Vec::new();
    for (pool, meter) in pools.iter().zip(&meters) {
        for ty in [KvType::F16, KvType::BF16, KvType::Q8_0] {
            let name = format!("attend decode 16k {}", ty.name());
            if wanted(&name) {
                rows.push(decode(meter, pool, name, ty, 16384, COLD_BYTES));
            }
            let name = format!("attend decode 2k in cache {}", ty.name());
            if wanted(&name) {
                rows.push(decode(meter, pool, name, ty, 2048, 1));
            }
        }
        for ty in [KvType::F16, KvType::Q8_0] {
            for cells in [4096, 16384, 65536] {
                let name = format!("attend prefill 512 over {}k {}", cells / 1024, ty.name());
                if wanted(&name) {
                    rows.push(prefill(meter, pool, name, ty, cells, cells as u64, 0));
                }
            }
            for total in [4096, 16384, 131_072] {
                let name = format!(
                    "attend prefill 512, window 2k of {}k {}",
                    total / 1024,
                    ty.name()
                );
                if wanted(&name) {
                    rows.push(prefill(meter, pool, name, ty, total, 2048, 0));
                }
                // A node for every 64 tokens before them.
                let nodes = total / 64;
                let name = format!(
                    "attend prefill 512, {nodes} nodes and 512 of {}k {}",
                    total / 1024,
                    ty.name()
                );
                if wanted(&name) {
                    rows.push(prefill(meter, pool, name, ty, total, 512, nodes));
                }
            }
        }
        for rule in [Rule::GatedDelta, Rule::Delta, Rule::Ssd] {
            for (form, n, calls) in [
                (Form::Recurrent, 1, 1),
                (Form::Recurrent, 1, 1024),
                (Form::Recurrent, 1024, 1),
                (Form::Chunked, 1024, 1),
            ] {
                for dim in [64, 128, 256] {
                    let name = match calls {
                        1 => format!("recur {rule:?} {form:?} {n} tokens d={dim}"),
                        _ => format!("recur {rule:?} {form:?} {calls} tokens one by one d={dim}"),
                    };
                    if wanted(&name) {
                        rows.push(recurrence(meter, pool, name, rule, form, (n, calls), dim));
                    }
                }
            }
        }
    }
    report(&rows);
}

/// Seconds of the fastest of several rounds of ours and of ggml's op (NaN where it has none), and the
/// machine's peaks, all in turns: neighbours come and go.
fn side_by_side(
    meter: &Meter<'_>,
    pool: &Pool,
    mut ours: impl FnMut(),
    ggml: Option<&ggml::Graph>,
) -> (f64, f64, Peak) {
    let theirs = || ggml.map_or(f64::NAN, |graph| fastest(pool, || graph.run()));
    let (mut seconds, mut others) = (fastest(pool, &mut ours), theirs());
    let mut peak = meter.round();
    // What takes many seconds is measured once.
    if seconds + others.max(0.0) < 4.0 {
        for _ in 0..2 {
            seconds = seconds.min(fastest(pool, &mut ours));
            others = others.min(theirs());
            peak = peak.max(meter.round());
        }
    }
    (seconds, others, peak)
}

/// Seconds of the fastest of several rounds. With `--processor-time`, seconds of processor of the
/// busiest thread: what the wall clock would show on a machine that does nothing else.
fn fastest(pool: &Pool, mut f: impl FnMut()) -> f64 {
    let busy = std::env::args().any(|a| a == "--processor-time");
    let clocks = || -> Vec<f64> {
        let clocks: Vec<AtomicU64> = (0..pool.n_threads()).map(|_| AtomicU64::new(0)).collect();
        pool.run(|t| clocks[t].store(processor_time().to_bits(), Ordering::Relaxed));
        clocks
            .into_iter()
            .map(|c| f64::from_bits(c.into_inner()))
            .collect()
    };
    let start = Instant::now();
    f();
    let first = start.elapsed().as_secs_f64();
    if first > 4.0 {
        return first;
    }
    // What takes a second needs no more warming, and what takes many was measured once.
    let (mut best, long, mut n) = (f64::INFINITY, first > 1.0, 0);
    let start = Instant::now();
    while n == 0 || start.elapsed().as_secs_f64() < 0.25 || (n < 3 && !long) {
        let before = clocks();
        let t = Instant::now();
        f();
        let mut seconds = t.elapsed().as_secs_f64();
        if busy {
            let spent = clocks().into_iter().zip(before).map(|(a, b)| a - b);
            seconds = spent.fold(0.0, f64::max);
        }
        best = best.min(seconds);
        n += 1;
    }
    best
}

/// Seconds the calling thread has run.
#[cfg(target_os = "linux")]
fn processor_time() -> f64 {
    // SAFETY: the call writes one timespec.
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t);
        t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
    }
}

#[cfg(not(target_os = "linux"))]
fn processor_time() -> f64 {
    0.0
}

/// Head shape of a 3B Qwen2.5: 16 query heads on 2 kv heads of 128.
fn layout(ty: KvType) -> (PageLayout, usize) {
    let layout = PageLayout {
        n_head_kv: 2,
        head_dim_k: 128,
        head_dim_v: 128,
        ty_k: ty,
        ty_v: ty,
    };
    (layout, 16)
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2) + 1;
    (0..n)
        .map(|_| {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (x >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// `n` pages of equal cells, allocated as the engine allocates them.
fn pages(layout: &PageLayout, n: usize) -> Vec<Page> {
    let k = noise(PAGE_CELLS * layout.n_head_kv * layout.head_dim_k, 1);
    let v = noise(PAGE_CELLS * layout.n_head_kv * layout.head_dim_v, 2);
    let mut first = vec![0; layout.page_bytes()];
    layout.write(&mut first, 0, PAGE_CELLS, &k, &v);
    (0..n)
        .map(|_| {
            let mut page = Page::zeroed(first.len());
            page.copy_from_slice(&first);
            page
        })
        .collect()
}

/// One query a call, on `total` bytes of sequences in turn.
fn decode(
    meter: &Meter<'_>,
    pool: &Pool,
    name: String,
    ty: KvType,
    cells: usize,
    total: usize,
) -> Row {
    let (layout, n_head) = layout(ty);
    let per_seq = cells / PAGE_CELLS;
    let n_seqs = total.div_ceil(per_seq * layout.page_bytes());
    let pages = pages(&layout, per_seq * n_seqs);
    let views: Vec<&[u8]> = pages.iter().map(|page| &page[..]).collect();
    let q = noise(n_head * 128, 3);
    let mut out = vec![0.0; n_head * 128];
    let graph = ggml::flash_attn(ty, (n_head, 2, 128), 1, cells, n_seqs, pool.n_threads());
    let ours = || {
        for raw in views.chunks_exact(per_seq) {
            let seq = Sequence {
                q: &q,
                visible: &[Visible {
                    n_kept: 0,
                    raw_begin: 0,
                    raw_end: cells as u64,
                }],
                kept: &[],
                n_always: 0,
                top_k: 0,
                raw,
                raw_base: 0,
                out: &mut out,
            };
            attend(pool, &layout, n_head, 0.088, &mut [seq]);
        }
    };
    let (seconds, ggml, peak) = side_by_side(meter, pool, ours, Some(&graph));
    let (seconds, ggml) = (seconds / n_seqs as f64, ggml / n_seqs as f64);
    Row {
        name,
        threads: pool.n_threads(),
        seconds,
        peak,
        ggml,
        tokens: 1.0,
        flops: (cells * n_head * 256 * 2) as f64,
        bytes: (per_seq * layout.page_bytes()) as f64,
    }
}

/// 512 queries at the end of `total` cells, each seeing the last `window` of them and `n_kept` others.
fn prefill(
    meter: &Meter<'_>,
    pool: &Pool,
    name: String,
    ty: KvType,
    total: usize,
    window: u64,
    n_kept: usize,
) -> Row {
    let (layout, n_head) = layout(ty);
    let n_q = 512;
    let pages = pages(&layout, total.div_ceil(PAGE_CELLS));
    let views: Vec<&[u8]> = pages.iter().map(|page| &page[..]).collect();
    let kept = &views[..n_kept.div_ceil(PAGE_CELLS)];
    let q = noise(n_q * n_head * 128, 3);
    let visible: Vec<Visible> = (0..n_q)
        .map(|i| {
            let end = (total - n_q + i + 1) as u64;
            Visible {
                n_kept: n_kept as u32,
                raw_begin: end.saturating_sub(window),
                raw_end: end,
            }
        })
        .collect();
    let seen = |v: &Visible| v.raw_end - v.raw_begin + u64::from(v.n_kept);
    let seen: u64 = visible.iter().map(seen).sum();
    let mut out = vec![0.0; n_q * n_head * 128];
    // ggml has no window, only a mask.
    let graph = (window >= total as u64)
        .then(|| ggml::flash_attn(ty, (n_head, 2, 128), n_q, total, 1, pool.n_threads()));
    let ours = || {
        let seq = Sequence {
            q: &q,
            visible: &visible,
            kept,
            n_always: 0,
            top_k: 0,
            raw: &views,
            raw_base: 0,
            out: &mut out,
        };
        attend(pool, &layout, n_head, 0.088, &mut [seq]);
    };
    let (seconds, ggml, peak) = side_by_side(meter, pool, ours, graph.as_ref());
    Row {
        name,
        threads: pool.n_threads(),
        seconds,
        peak,
        ggml,
        tokens: n_q as f64,
        flops: seen as f64 * (n_head * 256 * 2) as f64,
        bytes: 0.0,
    }
}

/// 16 heads, some calls of some tokens each. A single token walks through states that no cache holds;
/// many calls of one token are a prompt read by decode's means, each from where the last one ended.
fn recurrence(
    meter: &Meter<'_>,
    pool: &Pool,
    name: String,
    rule: Rule,
    form: Form,
    (n_tokens, n_calls): (usize, usize),
    dim: usize,
) -> Row {
    let n_head = 16;
    let state_len = n_head * dim * dim;
    let single = n_tokens * n_calls == 1;
    let n_seqs = if single {
        COLD_BYTES.div_ceil(state_len * 4)
    } else {
        1
    };
    let mut states = vec![0.0; n_seqs * state_len];
    let n_all = n_tokens * n_calls;
    let q = noise(n_all * n_head * dim, 1);
    let k = noise(n_all * n_head * dim, 2);
    let v = noise(n_all * n_head * dim, 3);
    let g: Vec<f32> = noise(n_all * n_head, 4)
        .iter()
        .map(|x| -0.05 * (1.0 + x))
        .collect();
    let beta: Vec<f32> = noise(n_all * n_head, 5)
        .iter()
        .map(|x| 0.5 + 0.4 * x)
        .collect();
    let mut out = vec![0.0; n_all * n_head * dim];
    let (per_call, gates) = (n_tokens * n_head * dim, n_tokens * n_head);
    let graph = (n_calls == 1).then(|| match rule {
        Rule::Ssd => ggml::ssm_scan(dim, n_head, n_tokens, n_seqs, pool.n_threads()),
        _ => ggml::gated_delta_net(dim, n_head, n_tokens, n_seqs, pool.n_threads()),
    });
    let ours = || {
        for state in states.chunks_exact_mut(state_len) {
            for (call, out) in out.chunks_exact_mut(per_call).enumerate() {
                let gate = call * gates..(call + 1) * gates;
                let row = call * per_call..(call + 1) * per_call;
                let seq = Recur {
                    rule,
                    n_tokens,
                    n_head,
                    n_head_k: n_head,
                    head_dim_k: dim,
                    head_dim_v: dim,
                    q: Numbers::F32(&q[row.clone()]),
                    k: Numbers::F32(&k[row.clone()]),
                    v: Numbers::F32(&v[row]),
                    g: Numbers::F32(if rule == Rule::Delta {
                        &[]
                    } else {
                        &g[gate.clone()]
                    }),
                    beta: Numbers::F32(&beta[gate]),
                    resets: &[],
                    state,
                    out,
                };
                recur(pool, form, &mut [seq]);
            }
        }
    };
    let (seconds, ggml, peak) = side_by_side(meter, pool, ours, graph.as_ref());
    let (seconds, ggml) = (seconds / n_seqs as f64, ggml / n_seqs as f64);
    // Products of the recurrent form: S^T k (not in Ssd), the write, S^T q.
    let per_token = if rule == Rule::Ssd { 2 } else { 3 };
    Row {
        name,
        threads: pool.n_threads(),
        seconds,
        peak,
        ggml,
        tokens: n_all as f64,
        flops: (n_all * per_token * 2 * state_len) as f64,
        bytes: if single {
            (2 * state_len * 4) as f64
        } else {
            0.0
        },
    }
}

/// `text`, or nothing where there is no such figure.
fn known(figure: f64, text: String) -> String {
    if figure > 0.0 { text } else { String::new() }
}

fn report(rows: &[Row]) {
    let with = |threads: usize| rows.iter().filter(move |row| row.threads == threads);
    let peaks: Vec<Peak> = (1..=2)
        .filter_map(|threads| with(threads).map(|row| row.peak).reduce(Peak::max))
        .collect();
    for peak in &peaks {
        println!(
            "{} thread(s), {}, at best: read {:.1} GB/s, F32 FMA {:.0} GFLOP/s, int8 {:.0} GOP/s",
            peak.n_threads,
            dispatch::best().name(),
            peak.read / 1e9,
            peak.fma / 1e9,
            peak.int8 / 1e9
        );
    }
    println!(
        "\n| op | threads | ms | tokens/s | GFLOP/s | of peak | GB/s | of peak | vs 1 thread | vs recurrent | vs one by one | ggml ms | vs ggml |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let mut json = Vec::new();
    for row in rows {
        let peak = &row.peak;
        let (flops, bytes) = (row.flops / row.seconds, row.bytes / row.seconds);
        let same = |name: &str, threads: usize| -> f64 {
            let other = |r: &&Row| r.name == name && r.threads == threads;
            let other = rows.iter().find(other);
            other.map_or(f64::NAN, |other| other.seconds / row.seconds)
        };
        // Byte kernels multiply each number of 16 bits as two of 8.
        let most = if row.name.ends_with("Q8_0") && dispatch::best() >= Isa::Avx512 {
            peak.int8 / 2.0
        } else {
            peak.fma
        };
        let than = |name: String| match name == row.name {
            true => f64::NAN,
            false => same(&name, row.threads),
        };
        let recurrent = than(row.name.replace("Chunked", "Recurrent"));
        let one_by_one = than(
            row.name
                .replace("Chunked", "Recurrent")
                .replace("1024 tokens d", "1024 tokens one by one d"),
        );
        let ggml = row.ggml * 1e3;
        let cells = [
            format!("{:.3}", row.seconds * 1e3),
            format!("{:.0}", row.tokens / row.seconds),
            format!("{:.1}", flops / 1e9),
            format!("{:.0} %", 100.0 * flops / most),
            known(bytes, format!("{:.1}", bytes / 1e9)),
            known(bytes, format!("{:.0} %", 100.0 * bytes / peak.read)),
            format!("{:.2}", same(&row.name, 1)),
            known(recurrent, format!("{recurrent:.2}")),
            known(one_by_one, format!("{one_by_one:.2}")),
            known(ggml, format!("{ggml:.3}")),
            known(ggml, format!("{:.2}", row.ggml / row.seconds)),
        ];
        println!("| {} | {} | {} |", row.name, row.threads, cells.join(" | "));
        json.push(format!(
            r#"{{"op":"{}","threads":{},"ms":{:.4},"tokens_s":{:.1},"gflop_s":{:.2},"gb_s":{:.2},"ggml_ms":{},"read_gb_s":{:.2},"fma_gflop_s":{:.1}}}"#,
            row.name,
            row.threads,
            row.seconds * 1e3,
            row.tokens / row.seconds,
            flops / 1e9,
            bytes / 1e9,
            if ggml.is_nan() { "null".to_string() } else { format!("{ggml:.4}") },
            peak.read / 1e9,
            peak.fma / 1e9,
        ));
    }
    let peaks: Vec<String> = peaks
        .iter()
        .map(|p| {
            format!(
                r#"{{"read_gb_s":{:.2},"fma_gflop_s":{:.1},"int8_gop_s":{:.1}}}"#,
                p.read / 1e9,
                p.fma / 1e9,
                p.int8 / 1e9
            )
        })
        .collect();
    println!(
        r#"{{"peaks":[{}],"rows":[{}]}}"#,
        peaks.join(","),
        json.join(",")
    );
}
