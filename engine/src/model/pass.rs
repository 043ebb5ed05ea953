//! One pass: the rows of several sequences that go through the layers together, the buffers they
//! pass through, and the two places where a row meets its own sequence's memory.
//!
//! Of a split model the first layers run on the host and the others on a card: a pass is at the
//! layers of one device at a time, with that device's verbs and buffers, and crosses over once. The
//! compressor of `nodes` reads embeddings, so that its part of a pass comes before the first layer.

use super::Forward;
use crate::error::Result;
use crate::hparams::Hparams;
use crate::memory::concepts::tensors::{LayerLora, LowRank};
use crate::memory::trunk::TrunkScratch;
use crate::memory::{Memory, Plan, Recall, RecallScratch, Source};
use crate::ops::{Buffer, Device, Ops, Part, Rows};
use crate::weights::{Layer, Weights};
use mneme_kernels::attend::Visible;
use std::ops::Range;

/// Activations on one device, kept between passes so that their memory is not asked for anew each
/// token.
#[derive(Default)]
pub struct Scratch {
    /// Residual stream `[n, n_embd]`.
    pub x: Buffer,
    /// Normed input of a block, and a block's output `[n, n_embd]`.
    pub h: Buffer,
    /// Queries `[n, n_head, head_dim]`.
    pub q: Buffer,
    /// Keys `[n, n_head_kv, head_dim]`.
    pub k: Buffer,
    /// Values `[n, n_head_kv, head_dim]`.
    pub v: Buffer,
    /// Attention output `[n, n_head, head_dim]`.
    pub att: Buffer,
    /// Feed-forward gate `[n, n_ff]`.
    pub gate: Buffer,
    /// Feed-forward up `[n, n_ff]`.
    pub up: Buffer,
    /// Feed-forward activation `[n, n_ff]`.
    pub act: Buffer,
    /// Logits of the rows asked for `[n_out, n_vocab]`.
    pub logits: Buffer,
    /// What recurrent memories compute with.
    pub recall: RecallScratch,
    /// What the compressor of `nodes` steps with, on the device of the first layer.
    pub trunk: TrunkScratch,
    /// Between the two matrices of a low-rank addition `[n, rank]`, where a pass has them.
    low: Buffer,
    /// A low-rank addition `[n, n_out]`.
    addition: Buffer,
}

impl Scratch {
    /// Room for `n` rows of a model, for logits of `n_out` of them, and for recurrent memories where
    /// a row `recalls`.
    fn resize(
        &mut self,
        device: &Device,
        hp: &Hparams,
        n: usize,
        n_out: usize,
        recalls: bool,
    ) -> Result<()> {
        let (n_q, n_kv) = (hp.n_head * hp.head_dim, hp.n_head_kv * hp.head_dim);
        for (buffer, len) in [
            (&mut self.x, n * hp.n_embd),
            (&mut self.h, n * hp.n_embd),
            (&mut self.q, n * n_q),
            (&mut self.k, n * n_kv),
            (&mut self.v, n * n_kv),
            (&mut self.att, n * n_q),
            (&mut self.gate, n * hp.n_ff),
            (&mut self.up, n * hp.n_ff),
            (&mut self.act, n * hp.n_ff),
            (&mut self.logits, n_out * hp.n_vocab),
        ] {
            device.resize(buffer, len)?;
        }
        if !recalls {
            return Ok(());
        }
        let r = &mut self.recall;
        for (buffer, len) in [
            (&mut r.beta, n * hp.n_head),
            (&mut r.g, n * hp.n_head),
            (&mut r.k, n * n_kv),
            (&mut r.v, n * n_kv),
            (&mut r.o, n * n_q),
            (&mut r.gate, n * hp.n_head),
        ] {
            device.resize(buffer, len)?;
        }
        Ok(())
    }
}

/// Rows of all sequences, stacked.
pub struct Pass<'a> {
    /// The verbs of the layers that the pass is at.
    pub ops: &'a dyn Ops,
    /// The tensors.
    pub w: &'a Weights,
    /// The buffers of the layers that the pass is at.
    pub s: &'a mut Scratch,
    /// Those layers: all, unless the model is split.
    layers: Range<usize>,
    /// Verbs and buffers of the layers behind them, on another device.
    behind: Option<(&'a dyn Ops, &'a mut Scratch)>,
    /// What each row has of its own.
    pub rows: Rows,
    /// Rows that are still computed: all, then those whose logits are wanted.
    n: usize,
    /// Whether the pass ends with hidden states in `s.h` instead of logits.
    pub hidden: bool,
    /// Whether this is a pass of the compressor of `concepts`, with its low-rank additions.
    adapted: bool,
    memories: Vec<&'a mut (dyn Memory + 'static)>,
}

impl<'a> Pass<'a> {
    /// Stacks the planned rows of several sequences, reserves their cells and fills the residual
    /// stream with their embeddings. `out_rows` are the rows (in the stacked order) whose logits
    /// are wanted. The buffers are of the layers before [`Ops::first_layer`], and of the others. On
    /// an error no memory has changed.
    pub fn new(
        ops: &'a dyn Ops,
        w: &'a Weights,
        [before, s]: [&'a mut Scratch; 2],
        sequences: Vec<(&'a mut (dyn Memory + 'static), &'a Plan)>,
        out_rows: Vec<usize>,
    ) -> Result<Pass<'a>> {
        let hp = &w.hparams;
        let mut rows = Rows::new(out_rows);
        let mut memories = Vec::with_capacity(sequences.len());
        let mut plans = Vec::with_capacity(sequences.len());
        for (memory, plan) in sequences {
            let (kept, raw) = plan.n_cells();
            memory.store_mut().reserve(kept, raw)?;
            let start = rows.pos.len();
            rows.pos.extend(plan.entries.iter().map(|e| e.pos));
            let visible: Vec<Visible> = plan.entries.iter().map(|e| e.visible).collect();
            let mut full_layers = Vec::new();
            let mut everything = Vec::new();
            if (0..hp.n_layer).any(|il| memory.sees_all(il)) {
                full_layers = (0..hp.n_layer).map(|il| memory.sees_all(il)).collect();
                let from_start = |v: &Visible| Visible { raw_begin: 0, ..*v };
                everything = visible.iter().map(from_start).collect();
            }
            if memory.trunk_step().is_some() {
                rows.steps.push(rows.pos.len() - 1);
            }
            let slots = plan.entries.iter().enumerate();
            let slots = slots.filter(|(_, e)| e.source == Source::Slot);
            rows.node_slots.extend(slots.map(|(i, _)| start + i));
            let (n_always, top_k) = memory.ranking();
            rows.parts.push(Part {
                rows: start..rows.pos.len(),
                cells: plan.entries.iter().map(|e| e.cell).collect(),
                visible,
                full_layers,
                everything,
                n_always,
                top_k,
                recalls: plan.recalls.clone(),
            });
            memories.push(memory);
            plans.push(plan);
        }
        let (n, n_out) = (rows.n(), rows.out.len());
        let recalls = memories.iter().any(|m| m.store().gates_layout().is_some());
        s.resize(ops.device(), hp, n, n_out, recalls)?;
        let (first, n_layer) = (ops.first_layer(), hp.n_layer);
        let (s, layers, behind) = match first {
            0 => (s, 0..n_layer, None),
            _ => {
                before.resize(&Device::Host, hp, n, 0, recalls)?;
                (before, 0..first, Some((ops, s)))
            }
        };
        let device = ops.of_layer(0).device();
        if let Some(nodes) = &w.nodes {
            let readouts = plans.iter().flat_map(|plan| &plan.readouts);
            let readouts: Vec<f32> = readouts.copied().collect();
            if !rows.steps.is_empty() {
                nodes.make_room(device, &mut s.trunk, rows.steps.len())?;
            }
            if !readouts.is_empty() {
                nodes.send_readouts(device, &mut s.trunk, &readouts)?;
            }
        }
        device.fill(&mut s.x, n * hp.n_embd, |x| {
            let entries = plans.iter().flat_map(|plan| {
                let vectors = plan.vectors.chunks_exact(hp.n_embd);
                plan.entries.iter().map(move |e| (e, vectors.clone()))
            });
            for ((entry, mut vectors), row) in entries.zip(x.chunks_exact_mut(hp.n_embd)) {
                match entry.source {
                    Source::Token(id) => w.token_embd.read_row(id as usize, row),
                    Source::Vector(i) => row.copy_from_slice(vectors.nth(i).expect("planned")),
                    // Made where the first layer runs.
                    Source::Slot => {}
                }
            }
        })?;
        let stores: Vec<_> = memories.iter().map(|m| m.store()).collect();
        ops.begin(&mut rows, &stores)?;
        Ok(Pass {
            ops: ops.of_layer(0),
            w,
            s,
            layers,
            behind,
            rows,
            n,
            hidden: false,
            adapted: false,
            memories,
        })
    }

    /// Makes this a pass of the compressor of `concepts`: with its low-rank additions, and hidden states
    /// at the end.
    pub fn adapt(&mut self) -> Result<()> {
        let (hp, n) = (&self.w.hparams, self.n);
        let rank = self.w.concepts.as_ref().map_or(0, |c| c.rank);
        let widest = hp.n_ff.max(hp.n_embd).max(hp.n_head * hp.head_dim);
        let behind = self.behind.iter_mut().map(|(ops, s)| (*ops, &mut **s));
        for (ops, s) in std::iter::once((self.ops, &mut *self.s)).chain(behind) {
            ops.device().resize(&mut s.low, n * rank)?;
            ops.device().resize(&mut s.addition, n * widest)?;
        }
        (self.hidden, self.adapted) = (true, true);
        Ok(())
    }

    /// Runs what the plans have left to the pass, all layers and the head.
    pub fn run(&mut self, forward: Forward) -> Result<()> {
        let ops = self.ops;
        ops.run(self, forward)?;
        let Some((ops, s)) = self.behind.take() else {
            return Ok(());
        };
        // The residual stream is all that layers hand on.
        let before = std::mem::replace(&mut self.s, s);
        self.s.x.write(before.x.host())?;
        self.ops = ops;
        self.layers = self.layers.end..self.w.hparams.n_layer;
        ops.run(self, forward)
    }

    /// The part of [`Pass::run`] at one device, what a recording holds: the layers that the pass is
    /// at, with the compressor and the slots of `nodes` before the first of all.
    pub fn run_here(&mut self, forward: Forward) {
        let (rows, s) = (&self.rows, &mut *self.s);
        if let (Some(nodes), 0) = (&self.w.nodes, self.layers.start) {
            let steps = self.memories.iter_mut().filter_map(|m| m.trunk_step());
            let mut steps: Vec<_> = steps.collect();
            if !rows.node_slots.is_empty() {
                nodes.put_slots(self.ops, &mut s.trunk, rows, &mut s.x);
            }
            if !steps.is_empty() {
                nodes.step(self.ops, &mut s.trunk, &s.x, rows, &mut steps);
            }
        }
        forward(self);
    }

    /// The layers that the pass is at, with their numbers.
    pub fn layers(&self) -> impl Iterator<Item = (usize, &'a Layer)> + use<'a> {
        let (w, layers) = (self.w, self.layers.clone());
        layers.map(move |il| (il, &w.layers[il]))
    }

    /// Rows in the pass.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Buffers that passes of this shape share or that their memories own: what a recording of the
    /// pass would hold on to.
    pub fn buffers(&self) -> Vec<&Buffer> {
        let own = [&self.s.x, &self.s.logits].into_iter();
        own.chain(self.memories.iter().flat_map(|m| m.buffers()))
            .collect()
    }

    /// `q, k, v = W_q h, W_k h, W_v h`.
    pub fn project_qkv(&mut self, il: usize, layer: &Layer) {
        let (ops, n) = (self.ops, self.n);
        let lora = self.lora(il);
        let s = &mut *self.s;
        ops.mul_mat(
            &s.h,
            0..n,
            &mut [
                (&layer.attn_q, &mut s.q),
                (&layer.attn_k, &mut s.k),
                (&layer.attn_v, &mut s.v),
            ],
        );
        if let Some(lora) = lora {
            let room = (&mut s.low, &mut s.addition);
            let mats = &mut [
                (&lora.attn_q, &mut s.q),
                (&lora.attn_k, &mut s.k),
                (&lora.attn_v, &mut s.v),
            ];
            add_low_rank(ops, n, &s.h, mats, room);
        }
    }

    /// `h = W_output att`.
    pub fn project_output(&mut self, il: usize, layer: &Layer) {
        let (ops, n) = (self.ops, self.n);
        let lora = self.lora(il);
        let s = &mut *self.s;
        ops.mul_mat(&s.att, 0..n, &mut [(&layer.attn_output, &mut s.h)]);
        if let Some(lora) = lora {
            let room = (&mut s.low, &mut s.addition);
            let mats = &mut [(&lora.attn_output, &mut s.h)];
            add_low_rank(ops, n, &s.att, mats, room);
        }
    }

    /// A layer's low-rank additions, in a pass that has them.
    fn lora(&self, il: usize) -> Option<&'a LayerLora> {
        let concepts = self.w.concepts.as_ref().filter(|_| self.adapted)?;
        concepts.lora.get(il)
    }

    /// Writes this layer's keys and values into each memory's cells, attends over what each row
    /// sees, and adds what recurrent memories recall: `q, k, v, h -> att`.
    pub fn attend(&mut self, layer: usize) {
        let (ops, rows, s) = (self.ops, &self.rows, &mut *self.s);
        let mut stores: Vec<_> = self.memories.iter_mut().map(|m| m.store_mut()).collect();
        ops.write_cells(layer, rows, &s.k, &s.v, &mut stores);
        let stores: Vec<_> = self.memories.iter().map(|m| m.store()).collect();
        ops.attend(
            layer,
            rows,
            self.w.hparams.n_head,
            &s.q,
            &stores,
            &mut s.att,
        );
        for (part, memory) in self.memories.iter_mut().enumerate() {
            memory.recall(
                ops,
                Recall {
                    layer,
                    rows,
                    part,
                    h: &s.h,
                    q: &s.q,
                    out: &mut s.att,
                    s: &mut s.recall,
                },
            );
        }
    }

    /// After the last layer's attention only the rows whose logits are wanted go on.
    pub fn keep_wanted_rows(&mut self, layer: usize) {
        let hp = &self.w.hparams;
        if layer + 1 < hp.n_layer || self.rows.out.len() == self.n {
            return;
        }
        let s = &mut *self.s;
        self.ops.keep_rows(&mut s.x, hp.n_embd, &self.rows);
        self.ops
            .keep_rows(&mut s.att, hp.n_head * hp.head_dim, &self.rows);
        self.n = self.rows.out.len();
        s.h.set_len(self.n * hp.n_embd);
        s.gate.set_len(self.n * hp.n_ff);
        s.up.set_len(self.n * hp.n_ff);
        s.act.set_len(self.n * hp.n_ff);
    }

    /// `x += W_down(silu(W_gate h) * (W_up h))` with `h = rms_norm(x)`: the feed-forward block all
    /// supported architectures share.
    pub fn feed_forward(&mut self, il: usize, layer: &Layer) {
        let (ops, n, eps) = (self.ops, self.n(), self.w.hparams.rms_eps);
        let lora = self.lora(il);
        let s = &mut *self.s;
        ops.rms_norm(&s.x, &layer.ffn_norm, eps, &mut s.h);
        ops.mul_mat(
            &s.h,
            0..n,
            &mut [(&layer.ffn_gate, &mut s.gate), (&layer.ffn_up, &mut s.up)],
        );
        if let Some(lora) = lora {
            let room = (&mut s.low, &mut s.addition);
            let mats = &mut [(&lora.ffn_gate, &mut s.gate), (&lora.ffn_up, &mut s.up)];
            add_low_rank(ops, n, &s.h, mats, room);
        }
        ops.swiglu(&s.gate, &s.up, &mut s.act);
        ops.mul_mat(&s.act, 0..n, &mut [(&layer.ffn_down, &mut s.h)]);
        if let Some(lora) = lora {
            let room = (&mut s.low, &mut s.addition);
            let mats = &mut [(&lora.ffn_down, &mut s.h)];
            add_low_rank(ops, n, &s.act, mats, room);
        }
        ops.add(&mut s.x, &s.h);
    }

    /// Behind the last layer its norm and the head: logits of the wanted rows into `s.logits`, or
    /// their normed hidden states left in `s.h`. Nothing where other layers follow.
    pub fn head(&mut self) {
        let hp = &self.w.hparams;
        let n = self.n();
        let s = &mut *self.s;
        if n == 0 || self.layers.end < hp.n_layer {
            return;
        }
        self.ops
            .rms_norm(&s.x, &self.w.output_norm, hp.rms_eps, &mut s.h);
        if self.hidden {
            return;
        }
        self.ops
            .mul_mat(&s.h, 0..n, &mut [(&self.w.output, &mut s.logits)]);
    }
}

/// `out += B (A x)` over the first `n` rows of `x`, for each of several additions that is there.
fn add_low_rank(
    ops: &dyn Ops,
    n: usize,
    x: &Buffer,
    mats: &mut [(&Option<LowRank>, &mut Buffer)],
    (low, addition): (&mut Buffer, &mut Buffer),
) {
    for (lora, out) in mats {
        let Some(lora) = lora else { continue };
        low.set_len(n * lora.rank);
        addition.set_len(out.len());
        ops.mul_mat(x, 0..n, &mut [(&lora.a, low)]);
        ops.mul_mat(low, 0..n, &mut [(&lora.b, addition)]);
        ops.add(out, addition);
    }
}
