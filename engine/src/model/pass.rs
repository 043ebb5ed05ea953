//! One pass: the rows of several sequences that go through the layers together, the buffers they
//! pass through, and the two places where a row meets its own sequence's memory.

use crate::memory::store::Cell;
use crate::memory::{Memory, Plan, Recall, Source};
use crate::ops::Cpu;
use crate::weights::{Layer, Weights};
use mneme_kernels::attend::{Sequence, Visible};
use std::ops::Range;

/// Activations, kept between passes so that their memory is not asked for anew each token.
#[derive(Default)]
pub struct Scratch {
    /// Residual stream `[n, n_embd]`.
    pub x: Vec<f32>,
    /// Normed input of a block, and a block's output `[n, n_embd]`.
    pub h: Vec<f32>,
    /// Queries `[n, n_head, head_dim]`.
    pub q: Vec<f32>,
    /// Keys `[n, n_head_kv, head_dim]`.
    pub k: Vec<f32>,
    /// Values `[n, n_head_kv, head_dim]`.
    pub v: Vec<f32>,
    /// Attention output `[n, n_head, head_dim]`.
    pub att: Vec<f32>,
    /// Feed-forward gate `[n, n_ff]`.
    pub gate: Vec<f32>,
    /// Feed-forward up `[n, n_ff]`.
    pub up: Vec<f32>,
    /// Feed-forward activation `[n, n_ff]`.
    pub act: Vec<f32>,
    /// Logits of the rows asked for `[n_out, n_vocab]`.
    pub logits: Vec<f32>,
}

/// One sequence's share of a pass.
struct Part<'a> {
    memory: &'a mut (dyn Memory + 'static),
    plan: &'a Plan,
    cells: Vec<Cell>,
    visible: Vec<Visible>,
    rows: Range<usize>,
}

/// Rows of all sequences, stacked.
pub struct Pass<'a> {
    /// The verbs.
    pub ops: &'a Cpu,
    /// The tensors.
    pub w: &'a Weights,
    /// The buffers.
    pub s: &'a mut Scratch,
    /// Rotary position of each row.
    pub pos: Vec<u32>,
    /// Whether the pass ends with hidden states in `s.h` instead of logits.
    pub hidden: bool,
    /// Rows whose logits are wanted, ascending.
    out_rows: Vec<usize>,
    parts: Vec<Part<'a>>,
}

impl<'a> Pass<'a> {
    /// Stacks the planned rows of several sequences and fills the residual stream with their
    /// embeddings. `out_rows` are the rows (in the stacked order) whose logits are wanted.
    pub fn new(
        ops: &'a Cpu,
        w: &'a Weights,
        s: &'a mut Scratch,
        sequences: Vec<(&'a mut (dyn Memory + 'static), &'a Plan)>,
        out_rows: Vec<usize>,
    ) -> Pass<'a> {
        let mut pos = Vec::new();
        let mut parts = Vec::with_capacity(sequences.len());
        for (memory, plan) in sequences {
            let start = pos.len();
            pos.extend(plan.entries.iter().map(|e| e.pos));
            parts.push(Part {
                memory,
                plan,
                cells: plan.entries.iter().map(|e| e.cell).collect(),
                visible: plan.entries.iter().map(|e| e.visible).collect(),
                rows: start..pos.len(),
            });
        }
        let hp = &w.hparams;
        let n = pos.len();
        resize(&mut s.x, n * hp.n_embd);
        resize(&mut s.h, n * hp.n_embd);
        resize(&mut s.q, n * hp.n_head * hp.head_dim);
        resize(&mut s.k, n * hp.n_head_kv * hp.head_dim);
        resize(&mut s.v, n * hp.n_head_kv * hp.head_dim);
        resize(&mut s.att, n * hp.n_head * hp.head_dim);
        resize(&mut s.gate, n * hp.n_ff);
        resize(&mut s.up, n * hp.n_ff);
        resize(&mut s.act, n * hp.n_ff);
        for part in &parts {
            let rows = s.x[part.rows.start * hp.n_embd..].chunks_exact_mut(hp.n_embd);
            for (entry, row) in part.plan.entries.iter().zip(rows) {
                match entry.source {
                    Source::Token(id) => w.token_embd.read_row(id as usize, row),
                    Source::Embed(i) => {
                        row.copy_from_slice(&part.plan.embeds[i * hp.n_embd..][..hp.n_embd]);
                    }
                }
            }
        }
        Pass {
            ops,
            w,
            s,
            pos,
            hidden: false,
            out_rows,
            parts,
        }
    }

    /// Rows in the pass.
    pub fn n(&self) -> usize {
        self.pos.len()
    }

    /// Writes this layer's keys and values into each memory's cells, attends over what each row
    /// sees, and adds what recurrent memories recall: `q, k, v, h -> att`.
    pub fn attend(&mut self, layer: usize) {
        let hp = &self.w.hparams;
        let (n_q, n_kv) = (hp.n_head * hp.head_dim, hp.n_head_kv * hp.head_dim);
        let s = &mut *self.s;
        for part in &mut self.parts {
            let kv = part.rows.start * n_kv..part.rows.end * n_kv;
            let store = part.memory.store_mut();
            store.write(layer, &part.cells, &s.k[kv.clone()], &s.v[kv]);
        }
        let everything: Vec<Option<Vec<Visible>>> = self
            .parts
            .iter()
            .map(|part| {
                part.memory.sees_all(layer).then(|| {
                    let from_start = |v: &Visible| Visible { raw_begin: 0, ..*v };
                    part.visible.iter().map(from_start).collect()
                })
            })
            .collect();
        let views: Vec<_> = self
            .parts
            .iter()
            .map(|part| part.memory.store().view(layer))
            .collect();
        let mut out = &mut s.att[..];
        let mut sequences = Vec::with_capacity(self.parts.len());
        for ((part, view), everything) in self.parts.iter().zip(&views).zip(&everything) {
            let (mine, rest) = out.split_at_mut(part.rows.len() * n_q);
            out = rest;
            let (n_always, top_k) = part.memory.ranking();
            sequences.push(Sequence {
                q: &s.q[part.rows.start * n_q..part.rows.end * n_q],
                visible: everything.as_deref().unwrap_or(&part.visible),
                kept: &view.kept,
                n_always,
                top_k,
                raw: &view.raw,
                raw_base: view.raw_base,
                out: mine,
            });
        }
        let layout = *self.parts[0].memory.store().layout();
        let scale = 1.0 / (hp.head_dim as f32).sqrt();
        self.ops.attend(&layout, hp.n_head, scale, &mut sequences);
        drop(sequences);
        drop(views);
        for part in &mut self.parts {
            part.memory.recall(
                self.ops,
                part.plan,
                Recall {
                    layer,
                    h: &s.h[part.rows.start * hp.n_embd..part.rows.end * hp.n_embd],
                    q: &s.q[part.rows.start * n_q..part.rows.end * n_q],
                    out: &mut s.att[part.rows.start * n_q..part.rows.end * n_q],
                },
            );
        }
    }

    /// After the last layer's attention only the rows whose logits are wanted go on.
    pub fn keep_wanted_rows(&mut self, layer: usize) {
        let hp = &self.w.hparams;
        if layer + 1 < hp.n_layer || self.out_rows.len() == self.n() {
            return;
        }
        let n_q = hp.n_head * hp.head_dim;
        for (to, &from) in self.out_rows.iter().enumerate() {
            let x = from * hp.n_embd..(from + 1) * hp.n_embd;
            self.s.x.copy_within(x, to * hp.n_embd);
            self.s
                .att
                .copy_within(from * n_q..(from + 1) * n_q, to * n_q);
        }
        let n = self.out_rows.len();
        self.s.x.truncate(n * hp.n_embd);
        self.s.h.truncate(n * hp.n_embd);
        self.s.att.truncate(n * n_q);
        self.s.gate.truncate(n * hp.n_ff);
        self.s.up.truncate(n * hp.n_ff);
        self.s.act.truncate(n * hp.n_ff);
        self.pos = self.out_rows.iter().map(|&r| self.pos[r]).collect();
        self.out_rows = (0..n).collect();
    }

    /// `x += W_down(silu(W_gate h) * (W_up h))` with `h = rms_norm(x)`: the feed-forward block all
    /// supported architectures share.
    pub fn feed_forward(&mut self, layer: &Layer) {
        let (n, eps) = (self.n(), self.w.hparams.rms_eps);
        let s = &mut *self.s;
        self.ops.rms_norm(&s.x, &layer.ffn_norm, eps, &mut s.h);
        self.ops.mul_mat(
            &s.h,
            n,
            &mut [(&layer.ffn_gate, &mut s.gate), (&layer.ffn_up, &mut s.up)],
        );
        self.ops.swiglu(&s.gate, &s.up, &mut s.act);
        self.ops
            .mul_mat(&s.act, n, &mut [(&layer.ffn_down, &mut s.h)]);
        self.ops.add(&mut s.x, &s.h);
    }

    /// Last norm and head: logits of the wanted rows into `s.logits`, or their normed hidden states
    /// left in `s.h`.
    pub fn head(&mut self) {
        let hp = &self.w.hparams;
        let n = self.n();
        let s = &mut *self.s;
        let n_logits = if self.hidden { 0 } else { n };
        resize(&mut s.logits, n_logits * hp.n_vocab);
        if n == 0 {
            return;
        }
        self.ops
            .rms_norm(&s.x, &self.w.output_norm, hp.rms_eps, &mut s.h);
        if self.hidden {
            return;
        }
        self.ops
            .mul_mat(&s.h, n, &mut [(&self.w.output, &mut s.logits)]);
    }
}

/// Gives `buffer` exactly `n` values of unspecified content, keeping its memory.
fn resize(buffer: &mut Vec<f32>, n: usize) {
    buffer.resize(n, 0.0);
}
