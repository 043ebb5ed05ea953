//! `ahn`: sinks, a sliding window, and per layer a fixed-size recurrent state that every token
//! leaving the window is written into (Artificial Hippocampus Networks, arXiv 2510.07318).
//!
//! At query t attention sees j with `t - j < window` or `j < sinks`; the state holds exactly
//! `sinks ..= t - window`. Token `u = t - window` is written with its own gates, taken from its
//! own hidden state when it was read, then query t reads; below `window + sinks` tokens the model
//! is exactly its base. Prefill, chunked prefill and decode all follow this one rule.

use super::store::Store;
use super::window::Span;
use super::{Context, Memory, MemorySpec, Plan, Recall, Stats};
use crate::error::{Error, Result};
use crate::hparams::Hparams;
use crate::ops::{Cpu, Matrix};
use crate::session::{Decoder, Encoder};
use crate::weights::Loader;
use mneme_kernels::recur::{Form, Recur, Rule};
use std::collections::VecDeque;
use std::io;

/// Window and sinks the authors evaluate with and describe as the default. The 256 / 0 of the
/// published configs is a training value.
const DEFAULT_WINDOW: usize = 32_640;
const DEFAULT_SINKS: usize = 128;
/// Epsilon of the norm of what is read, whatever the base model's.
const NORM_EPS: f32 = 1e-5;

/// `blk.N.ahn_*` of one layer.
pub struct AhnTensors {
    rule: Rule,
    /// `ahn_b.weight` `[n_head, n_embd]` (delta rules) or `ahn_dt.weight` (Mamba2): write strength.
    write: Matrix,
    /// `ahn_dt.bias` `[n_head]`: bias of the decay (gated delta net) or of the step (Mamba2).
    dt_bias: Vec<f32>,
    /// `ahn_a.weight` `[n_head, n_embd]`, gated delta net only: decay.
    decay: Option<Matrix>,
    /// `ahn_decay` `[n_head]`: `-exp(A_log)`.
    a: Vec<f32>,
    /// `ahn_g.weight` `[n_head, n_embd]`: gate of what is read.
    gate: Matrix,
    /// `ahn_g.bias` `[n_head]`, Mamba2 only.
    gate_bias: Vec<f32>,
    /// `ahn_norm.weight`: `[head_dim]` per head, or `[n_head * head_dim]` at once (Mamba2).
    norm: Vec<f32>,
    /// `ahn_out.weight` as `[n_head, in, out]`.
    out: Vec<f32>,
}

impl AhnTensors {
    /// Reads the layer's tensors if the file has any.
    pub fn load(from: &mut Loader<'_>, il: usize, hp: &Hparams) -> Result<Option<AhnTensors>> {
        let name = |suffix: &str| format!("blk.{il}.{suffix}");
        if !from.has(&name("ahn_out.weight")) {
            return Ok(None);
        }
        for refused in ["ahn_q.weight", "ahn_router_alpha", "ahn_router_beta"] {
            if from.has(&name(refused)) {
                return Err(Error::TensorType {
                    name: name(refused),
                    ty: "of AHN's experiments".into(),
                    role: "here: the published inference code for it does not work",
                });
            }
        }
        let (h, e, d) = (hp.n_head, hp.n_embd, hp.head_dim);
        let rule = if from.has(&name("ahn_a.weight")) {
            Rule::GatedDelta
        } else if from.has(&name("ahn_b.weight")) {
            Rule::Delta
        } else {
            Rule::Ssd
        };
        let ssd = rule == Rule::Ssd;
        let write = if ssd { "ahn_dt.weight" } else { "ahn_b.weight" };
        // Stored as [out, in] per head like every matrix; read here column by column.
        let stored = from.values(&name("ahn_out.weight"), h * d, d)?;
        let mut out = vec![0.0; h * d * d];
        for head in 0..h {
            for o in 0..d {
                for i in 0..d {
                    out[(head * d + i) * d + o] = stored[(head * d + o) * d + i];
                }
            }
        }
        Ok(Some(AhnTensors {
            write: from.matrix(&name(write), h, e)?,
            dt_bias: match rule {
                Rule::Delta => Vec::new(),
                _ => from.vector(&name("ahn_dt.bias"), h)?,
            },
            decay: match rule {
                Rule::GatedDelta => Some(from.matrix(&name("ahn_a.weight"), h, e)?),
                _ => None,
            },
            a: match rule {
                Rule::Delta => Vec::new(),
                _ => from.vector(&name("ahn_decay"), h)?,
            },
            gate: from.matrix(&name("ahn_g.weight"), h, e)?,
            gate_bias: if ssd {
                from.vector(&name("ahn_g.bias"), h)?
            } else {
                Vec::new()
            },
            norm: from.vector(&name("ahn_norm.weight"), if ssd { h * d } else { d })?,
            out,
            rule,
        }))
    }

    /// Write strength and log decay of each row of `h` `[n, n_embd]`, as `[n, 2, n_head]`.
    fn gates(&self, ops: &Cpu, h: &[f32], n: usize) -> Vec<f32> {
        let heads = self.write.n_rows();
        let mut write = vec![0.0; n * heads];
        let mut decay = vec![0.0; n * heads];
        match &self.decay {
            Some(m) => ops.mul_mat(h, n, &mut [(&self.write, &mut write), (m, &mut decay)]),
            None => ops.mul_mat(h, n, &mut [(&self.write, &mut write)]),
        }
        let mut gates = vec![0.0; n * 2 * heads];
        for t in 0..n {
            for j in 0..heads {
                let (w, a) = (write[t * heads + j], decay[t * heads + j]);
                let (beta, g) = match self.rule {
                    Rule::GatedDelta => (sigmoid(w), self.a[j] * softplus(a + self.dt_bias[j])),
                    Rule::Delta => (sigmoid(w), 0.0),
                    Rule::Ssd => {
                        let delta = softplus(w + self.dt_bias[j]);
                        (delta, self.a[j] * delta)
                    }
                };
                gates[t * 2 * heads + j] = beta;
                gates[(t * 2 + 1) * heads + j] = g;
            }
        }
        gates
    }

    /// Norms, gates and projects what was read, `o` `[n, n_head, d]`, and adds it to `out`.
    fn project(&self, ops: &Cpu, h: &[f32], o: &mut [f32], n: usize, d: usize, out: &mut [f32]) {
        let heads = self.write.n_rows();
        let mut gate = vec![0.0; n * heads];
        ops.mul_mat(h, n, &mut [(&self.gate, &mut gate)]);
        if !self.gate_bias.is_empty() {
            ops.add_bias(&mut gate, &self.gate_bias);
        }
        let scale = |o: &mut [f32], by: f32| o.iter_mut().for_each(|x| *x *= by);
        let silu = |g: f32| g * sigmoid(g);
        if self.rule == Rule::Ssd {
            // Mamba2 gates first, then norms all heads together.
            for (o, &g) in o.chunks_exact_mut(d).zip(&gate) {
                scale(o, silu(g));
            }
            ops.rms_norm_in_place(o, &self.norm, NORM_EPS);
        } else {
            ops.rms_norm_in_place(o, &self.norm, NORM_EPS);
            for (o, &g) in o.chunks_exact_mut(d).zip(&gate) {
                scale(o, silu(g));
            }
        }
        let base = out.as_mut_ptr() as usize;
        ops.pool().for_each(heads, 1, |range| {
            for head in range {
                let w = &self.out[head * d * d..(head + 1) * d * d];
                for t in 0..n {
                    let at = (t * heads + head) * d;
                    // SAFETY: rows (t, head) of different heads do not overlap, and each head
                    // belongs to one thread.
                    let to =
                        unsafe { std::slice::from_raw_parts_mut((base as *mut f32).add(at), d) };
                    for (&z, w) in o[at..at + d].iter().zip(w.chunks_exact(d)) {
                        for (to, &w) in to.iter_mut().zip(w) {
                            *to += z * w;
                        }
                    }
                }
            }
        });
    }
}

pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`; the identity above 20, where the difference is below F32 rounding.
pub(super) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// One layer's recurrent state and the gates of the tokens still in the window.
#[derive(Clone)]
struct LayerState {
    /// `[n_head, head_dim, head_dim]`, `S[k index, v index]`.
    state: Vec<f32>,
    /// `[2, n_head]` per raw cell not yet written: write strength and log decay.
    gates: VecDeque<f32>,
    /// State and new gates after the pass being planned; taken over at commit.
    next_state: Vec<f32>,
    next_gates: Vec<f32>,
}

#[derive(Clone)]
struct Ahn {
    ctx: Context,
    store: Store,
    span: Span,
    /// Layers with plain full attention and no state.
    full_layers: Vec<bool>,
    layers: Vec<LayerState>,
}

pub(super) fn build(ctx: &Context, spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    let w = &ctx.weights;
    let hp = &w.hparams;
    let file = w.memory_file();
    let key = |suffix, default| -> Result<usize> {
        let in_file = file.opt_u32(&w.memory_key(suffix))?;
        Ok(in_file.map_or(default, |n| n as usize))
    };
    let mut full_layers = vec![false; hp.n_layer];
    for layer in file
        .opt_arr_u32(&w.memory_key("ahn.full_layers"))?
        .unwrap_or_default()
    {
        match full_layers.get_mut(layer as usize) {
            Some(full) => *full = true,
            None => {
                return Err(spec.refuse(format!(
                    "ahn.full_layers names layer {layer} of {}",
                    hp.n_layer
                )));
            }
        }
    }
    for (il, layer) in w.layers.iter().enumerate() {
        if layer.ahn.is_none() && !full_layers[il] {
            return Err(spec.refuse(format!(
                "the model has no AHN tensors (`blk.{il}.ahn_out.weight` not found); convert an AHN \
                 checkpoint or add one with --memory-adapter"
            )));
        }
    }
    let state_len = hp.n_head * hp.head_dim * hp.head_dim;
    let layer = |full: &bool| LayerState {
        state: vec![0.0; if *full { 0 } else { state_len }],
        gates: VecDeque::new(),
        next_state: Vec::new(),
        next_gates: Vec::new(),
    };
    Ok(Box::new(Ahn {
        store: ctx.store(),
        span: Span::parse(
            spec,
            key("window", DEFAULT_WINDOW)?,
            key("sinks", DEFAULT_SINKS)?,
        )?,
        layers: full_layers.iter().map(layer).collect(),
        full_layers,
        ctx: ctx.clone(),
    }))
}

impl Ahn {
    /// Raw cells that leave the window while `n_new` tokens are read: the tokens to be written.
    fn evicted(&self, n_new: usize) -> std::ops::Range<u64> {
        let before = |n: usize| n.saturating_sub(self.span.window + self.span.sinks) as u64;
        before(self.span.n_tokens)..before(self.span.n_tokens + n_new)
    }

    /// Empties everything.
    fn clear(&mut self) {
        for layer in &mut self.layers {
            layer.state.fill(0.0);
            layer.gates.clear();
        }
    }
}

impl Memory for Ahn {
    fn name(&self) -> &'static str {
        "ahn"
    }

    fn plan(&mut self, _ops: &Cpu, tokens: &[u32], _wanted: bool) -> Result<Plan> {
        if self.full_layers.contains(&true) {
            self.ctx.check_room(&self.store, tokens.len())?;
        }
        Ok(self.span.plan(tokens))
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    fn sees_all(&self, layer: usize) -> bool {
        self.full_layers[layer]
    }

    fn recall(&mut self, ops: &Cpu, plan: &Plan, part: Recall<'_>) {
        let Some(tensors) = &self.ctx.weights.layers[part.layer].ahn else {
            return;
        };
        if self.full_layers[part.layer] {
            return;
        }
        let hp = &self.ctx.weights.hparams;
        let (heads, d, kv) = (hp.n_head, hp.head_dim, hp.n_head_kv * hp.head_dim);
        let n = plan.entries.len();
        let evicted = self.evicted(n);
        let n_read = (evicted.end - evicted.start) as usize;
        let state = &mut self.layers[part.layer];
        state.next_gates = tensors.gates(ops, part.h, n);
        if n_read == 0 {
            return;
        }
        // Token `u` of the eviction is read by the query `window` later: the last n_read rows.
        let (mut k, mut v) = (vec![0.0; n_read * kv], vec![0.0; n_read * kv]);
        let mut beta = vec![0.0; n_read * heads];
        let mut g = vec![0.0; n_read * heads];
        let held_from = self
            .span
            .n_tokens
            .saturating_sub(self.span.window + self.span.sinks);
        let first_new = self.span.n_tokens.saturating_sub(self.span.sinks) as u64;
        // New tokens that are sinks have gates too, never used.
        let new_sinks = self.span.sinks.saturating_sub(self.span.n_tokens);
        for (i, u) in evicted.clone().enumerate() {
            let kv_row = i * kv..(i + 1) * kv;
            self.store
                .read_raw(part.layer, u, &mut k[kv_row.clone()], &mut v[kv_row]);
            let to = i * heads..(i + 1) * heads;
            if u >= first_new {
                let row = ((u - first_new) as usize + new_sinks) * 2 * heads;
                beta[to.clone()].copy_from_slice(&state.next_gates[row..row + heads]);
                g[to].copy_from_slice(&state.next_gates[row + heads..row + 2 * heads]);
            } else {
                let row = (u as usize - held_from) * 2 * heads;
                let gates = state.gates.range(row..row + 2 * heads);
                for (to, &gate) in beta[to.clone()].iter_mut().chain(&mut g[to]).zip(gates) {
                    *to = gate;
                }
            }
        }
        state.next_state.clear();
        state.next_state.extend_from_slice(&state.state);
        let mut o = vec![0.0; n_read * heads * d];
        let from = (n - n_read) * heads * d;
        ops.recur(
            Form::Auto,
            &mut [Recur {
                rule: tensors.rule,
                n_tokens: n_read,
                n_head: heads,
                n_head_k: hp.n_head_kv,
                head_dim_k: d,
                head_dim_v: d,
                q: &part.q[from..],
                k: &k,
                v: &v,
                g: if tensors.rule == Rule::Delta { &[] } else { &g },
                beta: &beta,
                resets: &[],
                state: &mut state.next_state,
                out: &mut o,
            }],
        );
        let h = &part.h[(n - n_read) * hp.n_embd..];
        tensors.project(ops, h, &mut o, n_read, d, &mut part.out[from..]);
    }

    fn commit(&mut self, _: &Cpu, plan: &Plan, _: &[u32], _: Option<&[f32]>) -> usize {
        let heads = self.ctx.weights.hparams.n_head;
        let new_sinks = self.span.sinks.saturating_sub(self.span.n_tokens);
        let n_read = self.evicted(plan.n_tokens);
        let n_read = (n_read.end - n_read.start) as usize;
        for (il, layer) in self.layers.iter_mut().enumerate() {
            if self.full_layers[il] {
                continue;
            }
            if n_read > 0 {
                std::mem::swap(&mut layer.state, &mut layer.next_state);
            }
            let new_sinks = new_sinks.min(plan.n_tokens);
            layer
                .gates
                .extend(&layer.next_gates[new_sinks * 2 * heads..]);
            layer.gates.drain(..n_read * 2 * heads);
            layer.next_gates = Vec::new();
        }
        self.span.advance(&mut self.store, plan);
        // One cell more than the next query sees: it writes the token that has just left.
        let (begin, full_layers) = (self.evicted(0).start, &self.full_layers);
        self.store.release_raw(begin, |il| !full_layers[il]);
        plan.n_tokens
    }

    fn truncate(&mut self, n: usize) -> usize {
        let heads = self.ctx.weights.hparams.n_head;
        // The state cannot forget: only what has not left the window can be taken back.
        let n = n.min(self.span.n_tokens);
        let capacity = self.span.window + self.span.sinks;
        let exact = n == self.span.n_tokens || self.span.n_tokens <= capacity;
        let n = self
            .span
            .truncate(&mut self.store, if exact { n } else { 0 });
        if n == 0 {
            self.clear();
        }
        for layer in &mut self.layers {
            layer
                .gates
                .truncate(n.saturating_sub(self.span.sinks) * 2 * heads);
        }
        n
    }

    fn fork(&self) -> Box<dyn Memory> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        self.span.save(out)?;
        self.store.save(out)?;
        for layer in &self.layers {
            out.f32s(&layer.state)?;
            if !layer.state.is_empty() {
                out.f32s(&layer.gates.iter().copied().collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        self.span.restore(from)?;
        self.store.restore(from, self.ctx.n_ctx)?;
        self.span.check(&self.store)?;
        let heads = self.ctx.weights.hparams.n_head;
        let held = self.span.n_tokens.min(self.span.window + self.span.sinks);
        let n_gates = held.saturating_sub(self.span.sinks);
        for (il, layer) in self.layers.iter_mut().enumerate() {
            from.f32s_into(&mut layer.state)?;
            if self.full_layers[il] {
                continue;
            }
            let mut gates = vec![0.0; n_gates * 2 * heads];
            from.f32s_into(&mut gates)?;
            layer.gates = gates.into();
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let n_cells = self.store.n_cells();
        let hp = &self.ctx.weights.hparams;
        let gate_bytes = 2 * hp.n_head * size_of::<f32>();
        let state_bytes: usize = self
            .layers
            .iter()
            .map(|l| (l.state.len() + l.gates.len()) * size_of::<f32>())
            .sum();
        let n_dropped = if self.full_layers.iter().all(|f| *f) {
            0
        } else {
            self.evicted(0).start as usize
        };
        Stats {
            name: "ahn",
            n_tokens: self.span.n_tokens,
            n_entries: self.span.n_tokens,
            n_cells,
            n_dropped,
            cell_bytes: self.store.bytes(),
            state_bytes,
            full_bytes: self.span.n_tokens * self.ctx.cell_bytes(),
            bound_bytes: self.ctx.page_bound(n_cells + 1, 2)
                + state_bytes
                + hp.n_layer * gate_bytes,
            ..Stats::default()
        }
    }
}
