//! Every op of the first GPU against what that GPU can do, measured in the same run.
//!
//! `cargo bench -p mneme-kernels --features cuda --bench cuda [-- WORD...]` prints the device's
//! peaks (a copy inside device memory, matrix products in registers), then one row per op, type
//! and shape: its rate and its share of the peak that limits it. With words, only rows that
//! contain one of them. The last line is JSON. Without a GPU it says so and ends.
//!
//! A round is a recorded graph of many calls over operands that together exceed the second-level
//! cache, best of five. Shapes are those of Llama 3 8B (4096, 14336) and Qwen2.5 0.5B (896, 4864).

use mneme_kernels::attend::{KvType, PageLayout, Visible};
use mneme_kernels::cuda::attend::{Cells, Queries, Table, attend, page_bytes};
use mneme_kernels::cuda::mul_mat::{Packed, mul_mat};
use mneme_kernels::cuda::peak::Peak;
use mneme_kernels::cuda::recur::{Form, Recur, Rule, recur};
use mneme_kernels::cuda::{Device, Error, rms_norm, swiglu, top_k};
use mneme_kernels::mul_mat::WeightType;
use std::time::Instant;

/// Bytes that a round goes through, several times any second-level cache.
const ROUND_BYTES: usize = 512 << 20;

/// What limits an op.
#[derive(Clone, Copy)]
enum Limit {
    Bytes,
    Products,
}

struct Bench<'a> {
    dev: &'a Device,
    peak: Peak,
    words: Vec<String>,
    json: Vec<String>,
}

fn main() {
    let words = std::env::args().skip(1).filter(|w| !w.starts_with("--"));
    let words: Vec<String> = words.collect();
    let dev = match Device::open(0) {
        Ok(dev) => dev,
        Err(e) => {
            println!("{e}");
            return;
        }
    };
    let run = || -> Result<(), Error> {
        let peak = Peak::measure(&dev, ROUND_BYTES)?;
        println!(
            "{}: copy {:.0} GB/s, F16 products {:.0} TFLOP/s",
            dev.name(),
            peak.copy / 1e9,
            peak.mma / 1e12
        );
        let mut bench = Bench {
            dev: &dev,
            peak,
            words,
            json: Vec::new(),
        };
        bench.mul_mats()?;
        bench.attends()?;
        bench.recurs()?;
        bench.rows()?;
        println!(
            "{{\"device\":{:?},\"rows\":[{}]}}",
            dev.name(),
            bench.json.join(",")
        );
        Ok(())
    };
    if let Err(e) = run() {
        eprintln!("{e}");
        std::process::exit(1);
    }
}

impl Bench<'_> {
    fn wants(&self, name: &str) -> bool {
        self.words.is_empty() || self.words.iter().any(|w| name.contains(w.as_str()))
    }

    /// Runs `calls` once to grow the workspace, records it, and prints the best of five rounds.
    fn row(
        &mut self,
        name: &str,
        limit: Limit,
        work: f64,
        mut calls: impl FnMut() -> Result<(), Error>,
    ) -> Result<(), Error> {
        calls()?;
        let graph = self.dev.capture(&mut calls)?;
        graph.launch()?;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            self.dev.synchronize()?;
            let start = Instant::now();
            graph.launch()?;
            self.dev.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        let (rate, peak, unit) = match limit {
            Limit::Bytes => (work / best, self.peak.copy, "GB/s"),
            Limit::Products => (work / best, self.peak.mma, "GFLOP/s"),
        };
        println!(
            "{name:56} {:10.1} {unit:8} {:5.1} %",
            rate / 1e9,
            100.0 * rate / peak
        );
        self.json.push(format!(
            "{{\"name\":{name:?},\"rate\":{rate:e},\"share\":{:.4}}}",
            rate / peak
        ));
        Ok(())
    }

    fn mul_mats(&mut self) -> Result<(), Error> {
        for ty in WeightType::ALL {
            for (n_rows, n_cols) in [(4096, 4096), (14336, 4096), (4096, 14336), (4864, 896)] {
                let Some(row_bytes) = ty.row_bytes(n_cols) else {
                    continue;
                };
                let name = |form: &str| format!("mul_mat {} {n_rows}x{n_cols} {form}", ty.name());
                if !self.wants(&name("vector")) && !self.wants(&name("512 tokens")) {
                    continue;
                }
                // Bytes of ordinary halves and scales: 0x2c.. is near 0.07 in F16, tiny in BF16.
                let bytes = vec![0x2cu8; n_rows * row_bytes];
                let first = Packed::pack(self.dev, ty, n_rows, n_cols, &bytes)?;
                let n = ROUND_BYTES.div_ceil(first.n_bytes());
                let mut copies = vec![first];
                for _ in 1..n {
                    copies.push(Packed::pack(self.dev, ty, n_rows, n_cols, &bytes)?);
                }
                for n_tokens in [1, 8, 512] {
                    let vector = n_tokens <= 8;
                    let name = name(&format!("{n_tokens} tokens"));
                    if !self.wants(&name) {
                        continue;
                    }
                    let x = self.dev.upload(&vec![0.5f32; n_tokens * n_cols])?;
                    let mut out = self.dev.alloc::<f32>(n_tokens * n_rows)?;
                    let (limit, work) = if vector {
                        (Limit::Bytes, (n * copies[0].n_bytes()) as f64)
                    } else {
                        (
                            Limit::Products,
                            2.0 * (n * n_tokens * n_rows) as f64 * n_cols as f64,
                        )
                    };
                    let dev = self.dev;
                    self.row(&name, limit, work, || {
                        copies.iter().try_for_each(|w| {
                            mul_mat(dev, x.all(), n_tokens, &mut [(w, out.all_mut())])
                        })
                    })?;
                }
            }
        }
        Ok(())
    }

    fn attends(&mut self) -> Result<(), Error> {
        for ty in [KvType::F16, KvType::Q8_0] {
            for (n_q, n_cells) in [(1, 4096), (1, 32_768), (8, 4096), (512, 4096)] {
                let name = format!("attend {ty:?} {n_q} queries of 32 heads on 8, {n_cells} cells");
                if !self.wants(&name) {
                    continue;
                }
                let layout = PageLayout {
                    n_head_kv: 8,
                    head_dim_k: 128,
                    head_dim_v: 128,
                    ty_k: ty,
                    ty_v: ty,
                };
                let n_pages = (n_cells + n_q) / 64 + 1;
                let page = page_bytes(&layout);
                // As many layers as exceed the cache.
                let n_layer = ROUND_BYTES.div_ceil(n_pages * page);
                let pool = self.dev.zeroed::<u8>(n_layer * n_pages * page)?;
                let pages: Vec<u32> = (0..n_pages as u32).collect();
                let pages = self.dev.upload(&pages)?;
                let table = Table {
                    n_raw: n_pages as u32,
                    ..Table::default()
                };
                let tables = self.dev.upload(&[table])?;
                let q = self.dev.upload(&vec![0.1f32; n_q * 32 * 128])?;
                let seq = self.dev.upload(&vec![0u32; n_q])?;
                let visible: Vec<Visible> = (0..n_q as u64)
                    .map(|i| Visible {
                        n_kept: 0,
                        raw_begin: 0,
                        raw_end: n_cells as u64 + i,
                    })
                    .collect();
                let visible = self.dev.upload(&visible)?;
                let mut out = self.dev.alloc::<f32>(n_q * 32 * 128)?;
                let queries = Queries {
                    q: q.all(),
                    seq: seq.all(),
                    visible: visible.all(),
                };
                let (limit, work) = if n_q <= 8 {
                    (Limit::Bytes, (n_layer * n_cells / 64 * page) as f64)
                } else {
                    // Scores and weighted values.
                    (
                        Limit::Products,
                        4.0 * (n_layer * n_q * 32 * 128) as f64 * n_cells as f64,
                    )
                };
                let dev = self.dev;
                self.row(&name, limit, work, || {
                    (0..n_layer).try_for_each(|layer| {
                        let bytes = n_pages * page;
                        let cells = Cells {
                            pool: pool.slice(layer * bytes..(layer + 1) * bytes),
                            pages: pages.all(),
                            tables: tables.all(),
                        };
                        let max = n_cells + n_q;
                        attend(
                            dev,
                            &layout,
                            32,
                            0.09,
                            &queries,
                            &cells,
                            max,
                            0,
                            out.all_mut(),
                        )
                    })
                })?;
            }
        }
        Ok(())
    }

    fn recurs(&mut self) -> Result<(), Error> {
        let (n_head, d) = (16, 128);
        for n_tokens in [1, 512] {
            let name = format!("recur {n_head} heads of {d}, {n_tokens} tokens");
            if !self.wants(&name) {
                continue;
            }
            let n = n_tokens * n_head;
            let x = self.dev.upload(&vec![0.1f32; n * d])?;
            let gate = self.dev.upload(&vec![-0.1f32; n])?;
            let state_len = n_head * d * d;
            let n_state = if n_tokens == 1 {
                ROUND_BYTES / (4 * state_len)
            } else {
                8
            };
            let mut state = self.dev.zeroed::<f32>(n_state * state_len)?;
            let mut out = self.dev.alloc::<f32>(n * d)?;
            // One token reads and writes the state; many do three products with it each.
            let (limit, work) = match n_tokens {
                1 => (Limit::Bytes, (n_state * state_len * 8) as f64),
                _ => (Limit::Products, 6.0 * (n_state * n * d) as f64 * d as f64),
            };
            let dev = self.dev;
            self.row(&name, limit, work, || {
                (0..n_state).try_for_each(|i| {
                    let seq = Recur {
                        rule: Rule::GatedDelta,
                        n_tokens,
                        n_head,
                        n_head_k: n_head,
                        head_dim_k: d,
                        head_dim_v: d,
                        q: x.all(),
                        k: x.all(),
                        v: x.all(),
                        q_stride: 0,
                        k_stride: 0,
                        v_stride: 0,
                        g: Some(gate.all()),
                        beta: gate.all(),
                        resets: None,
                        from: None,
                        state: state.slice_mut(i * state_len..(i + 1) * state_len),
                        out: out.all_mut(),
                    };
                    recur(dev, Form::Auto, &mut [seq])
                })
            })?;
        }
        Ok(())
    }

    fn rows(&mut self) -> Result<(), Error> {
        let (n, d) = (8192, 4096);
        let x = self.dev.upload(&vec![0.5f32; n * d])?;
        let w = self.dev.upload(&vec![1f32; d])?;
        let mut out = self.dev.alloc::<f32>(n * d)?;
        let bytes = (4 * n * d) as f64;
        let dev = self.dev;
        if self.wants("rms_norm") {
            self.row(
                "rms_norm 8192 rows of 4096",
                Limit::Bytes,
                2.0 * bytes,
                || rms_norm::rms_norm(dev, x.all(), w.all(), 1e-6, out.all_mut()),
            )?;
        }
        if self.wants("swiglu") {
            self.row(
                "swiglu 8192 rows of 4096",
                Limit::Bytes,
                3.0 * bytes,
                || swiglu::swiglu(dev, x.all(), x.all(), out.all_mut()),
            )?;
        }
        // Logits of Qwen2.5's vocabulary, as many rows as exceed the cache.
        let n_vocab = 151_936;
        let n = x.len() / n_vocab;
        let x = x.slice(0..n * n_vocab);
        for k in [1, 40, 1024] {
            let name = format!("top_k {k} of {n} rows of {n_vocab}");
            if self.wants(&name) {
                let mut best = self.dev.alloc::<u32>(n * 2 * k)?;
                self.row(&name, Limit::Bytes, (4 * x.len()) as f64, || {
                    top_k::top_k(dev, x, n_vocab, k, best.all_mut())
                })?;
            }
        }
        Ok(())
    }
}
