//! One pass: the rows of several sequences that go through the layers together, the buffers they
//! pass through, and the two places where a row meets its own sequence's memory.

use super::Forward;
use crate::error::Result;
use crate::memory::trunk::TrunkScratch;
use crate::memory::{Memory, Plan, Recall, RecallScratch, Source};
use crate::ops::{Buffer, Ops, Part, Rows};
use crate::weights::{Layer, Weights};
use mneme_kernels::attend::Visible;

/// Activations, kept between passes so that their memory is not asked for anew each token.
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
    /// What the compressor of `nodes` steps with.
    pub trunk: TrunkScratch,
}

/// Rows of all sequences, stacked.
pub struct Pass<'a> {
    /// The verbs.
    pub ops: &'a dyn Ops,
    /// The tensors.
    pub w: &'a Weights,
    /// The buffers.
    pub s: &'a mut Scratch,
    /// What each row has of its own.
    pub rows: Rows,
    /// Rows that are still computed: all, then those whose logits are wanted.
    n: usize,
    /// Whether the pass ends with hidden states in `s.h` instead of logits.
    pub hidden: bool,
    memories: Vec<&'a mut (dyn Memory + 'static)>,
}

impl<'a> Pass<'a> {
    /// Stacks the planned rows of several sequences, reserves their cells and fills the residual
    /// stream with their embeddings. `out_rows` are the rows (in the stacked order) whose logits
    /// are wanted. On an error no memory has changed.
    pub fn new(
        ops: &'a dyn Ops,
        w: &'a Weights,
        s: &'a mut Scratch,
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
        let (n_q, n_kv) = (hp.n_head * hp.head_dim, hp.n_head_kv * hp.head_dim);
        let device = ops.device();
        for (buffer, len) in [
            (&mut s.h, n * hp.n_embd),
            (&mut s.q, n * n_q),
            (&mut s.k, n * n_kv),
            (&mut s.v, n * n_kv),
            (&mut s.att, n * n_q),
            (&mut s.gate, n * hp.n_ff),
            (&mut s.up, n * hp.n_ff),
            (&mut s.act, n * hp.n_ff),
            (&mut s.logits, n_out * hp.n_vocab),
        ] {
            device.resize(buffer, len)?;
        }
        if memories.iter().any(|m| m.store().gates_layout().is_some()) {
            let r = &mut s.recall;
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
        }
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
            let entries = plans.iter().flat_map(|plan| &plan.entries);
            for (entry, row) in entries.zip(x.chunks_exact_mut(hp.n_embd)) {
                // Slots are made where the pass runs.
                if let Source::Token(id) = entry.source {
                    w.token_embd.read_row(id as usize, row);
                }
            }
        })?;
        let stores: Vec<_> = memories.iter().map(|m| m.store()).collect();
        ops.begin(&mut rows, &stores)?;
        Ok(Pass {
            ops,
            w,
            s,
            rows,
            n,
            hidden: false,
            memories,
        })
    }

    /// Runs what the plans have left to the pass, and the layers.
    pub fn run(&mut self, forward: Forward) {
        let (rows, s) = (&self.rows, &mut *self.s);
        if let Some(nodes) = &self.w.nodes {
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
    pub fn feed_forward(&mut self, layer: &Layer) {
        let (n, eps) = (self.n(), self.w.hparams.rms_eps);
        let s = &mut *self.s;
        self.ops.rms_norm(&s.x, &layer.ffn_norm, eps, &mut s.h);
        self.ops.mul_mat(
            &s.h,
            0..n,
            &mut [(&layer.ffn_gate, &mut s.gate), (&layer.ffn_up, &mut s.up)],
        );
        self.ops.swiglu(&s.gate, &s.up, &mut s.act);
        self.ops
            .mul_mat(&s.act, 0..n, &mut [(&layer.ffn_down, &mut s.h)]);
        self.ops.add(&mut s.x, &s.h);
    }

    /// Last norm and head: logits of the wanted rows into `s.logits`, or their normed hidden states
    /// left in `s.h`.
    pub fn head(&mut self) {
        let hp = &self.w.hparams;
        let n = self.n();
        let s = &mut *self.s;
        if n == 0 {
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
