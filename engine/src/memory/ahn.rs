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
use crate::ops::{Buffer, Matrix, Ops, Recurrence, Rule};
use crate::session::{Decoder, Encoder};
use crate::weights::Loader;
use std::io;
use std::ops::Range;
use std::sync::Arc;

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
    dt_bias: Buffer,
    /// `ahn_a.weight` `[n_head, n_embd]`, gated delta net only: decay.
    decay: Option<Matrix>,
    /// `ahn_decay` `[n_head]`: `-exp(A_log)`.
    a: Buffer,
    /// `ahn_g.weight` `[n_head, n_embd]`: gate of what is read.
    gate: Matrix,
    /// `ahn_g.bias` `[n_head]`, Mamba2 only.
    gate_bias: Option<Buffer>,
    /// `ahn_norm.weight`: `[head_dim]` per head, or `[n_head * head_dim]` at once (Mamba2).
    norm: Buffer,
    /// `ahn_out.weight` as `[n_head, in, out]`.
    out: Buffer,
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
                Rule::Delta => Buffer::default(),
                _ => from.buffer(&name("ahn_dt.bias"), h)?,
            },
            decay: match rule {
                Rule::GatedDelta => Some(from.matrix(&name("ahn_a.weight"), h, e)?),
                _ => None,
            },
            a: match rule {
                Rule::Delta => Buffer::default(),
                _ => from.buffer(&name("ahn_decay"), h)?,
            },
            gate: from.matrix(&name("ahn_g.weight"), h, e)?,
            gate_bias: if ssd {
                Some(from.buffer(&name("ahn_g.bias"), h)?)
            } else {
                None
            },
            norm: from.buffer(&name("ahn_norm.weight"), if ssd { h * d } else { d })?,
            out: from.ops.device().upload(out)?,
            rule,
        }))
    }

    /// Write strength and log decay of `rows` of `h` `[n, n_embd]`.
    fn gates(
        &self,
        ops: &dyn Ops,
        h: &Buffer,
        rows: Range<usize>,
        beta: &mut Buffer,
        g: &mut Buffer,
    ) {
        match &self.decay {
            Some(m) => ops.mul_mat(h, rows, &mut [(&self.write, &mut *beta), (m, &mut *g)]),
            None => ops.mul_mat(h, rows, &mut [(&self.write, &mut *beta)]),
        }
        ops.gates(self.rule, beta, g, &self.a, &self.dt_bias);
    }

    /// Norms, gates and projects what the `rows` of `h` read, `o` `[rows, n_head, d]`, and adds it
    /// to those rows of `out`.
    fn project(
        &self,
        ops: &dyn Ops,
        h: &Buffer,
        rows: Range<usize>,
        o: &mut Buffer,
        gate: &mut Buffer,
        d: usize,
        out: &mut Buffer,
    ) {
        let first = rows.start;
        ops.mul_mat(h, rows, &mut [(&self.gate, &mut *gate)]);
        if let Some(bias) = &self.gate_bias {
            ops.add_bias(gate, bias);
        }
        if self.rule == Rule::Ssd {
            // Mamba2 gates first, then norms all heads together.
            ops.gate_heads(o, gate, d);
            ops.rms_norm_in_place(o, &self.norm, NORM_EPS);
        } else {
            ops.rms_norm_in_place(o, &self.norm, NORM_EPS);
            ops.gate_heads(o, gate, d);
        }
        ops.add_heads(o, &self.out, self.write.n_rows(), d, out, first);
    }
}

/// One layer's recurrent state.
#[derive(Clone, Default)]
struct LayerState {
    /// `[n_head, head_dim, head_dim]`, `S[k index, v index]`; shared by forks, never changed. Empty
    /// in layers without.
    state: Arc<Buffer>,
    /// Room for the state after the pass being planned, which takes its place at commit.
    next: Option<Arc<Buffer>>,
    /// The state before any token was taken in, one for all layers of a device.
    zero: Arc<Buffer>,
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
    let file = w.memory_file_of("ahn");
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
    let mut layers = Vec::with_capacity(hp.n_layer);
    let mut zero = Arc::default();
    for (il, layer) in w.layers.iter().enumerate() {
        if il == 0 || layer.device != w.layers[il - 1].device {
            zero = Arc::new(layer.device.zeros(state_len)?);
        }
        layers.push(match full_layers[il] {
            true => LayerState::default(),
            false => LayerState {
                state: Arc::clone(&zero),
                next: None,
                zero: Arc::clone(&zero),
            },
        });
    }
    let mut store = ctx.store();
    store.keep_gates(hp.n_head, |il| !full_layers[il]);
    Ok(Box::new(Ahn {
        store,
        span: Span::parse(
            spec,
            key("window", DEFAULT_WINDOW)?,
            key("sinks", DEFAULT_SINKS)?,
        )?,
        layers,
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
}

impl Memory for Ahn {
    fn name(&self) -> &'static str {
        "ahn"
    }

    fn plan(&mut self, _ops: &dyn Ops, tokens: &[u32], _wanted: bool) -> Result<Plan> {
        if self.full_layers.contains(&true) {
            self.ctx.check_room(&self.store, tokens.len())?;
        }
        let recalls = self.evicted(tokens.len());
        let tensors = &self.ctx.weights.layers;
        let layers = self.layers.iter_mut().zip(&self.full_layers);
        for ((layer, full), tensors) in layers.zip(tensors) {
            // A fork may have taken the spare state, or taken to the state itself.
            let spare = layer
                .next
                .as_mut()
                .is_some_and(|s| Arc::get_mut(s).is_some());
            if !recalls.is_empty() && !full && !spare {
                let state = tensors.device.zeros(layer.state.len())?;
                layer.next = Some(Arc::new(state));
            }
        }
        Ok(Plan {
            recalls,
            ..self.span.plan(tokens)
        })
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

    fn recall(&mut self, ops: &dyn Ops, part: Recall<'_>) {
        let Some(tensors) = &self.ctx.weights.layers[part.layer].ahn else {
            return;
        };
        if self.full_layers[part.layer] {
            return;
        }
        let hp = &self.ctx.weights.hparams;
        let (heads, d, kv) = (hp.n_head, hp.head_dim, hp.n_head_kv * hp.head_dim);
        let (rows, s) = (&part.rows.parts[part.part], part.s);
        let n = rows.rows.len();
        s.beta.set_len(n * heads);
        s.g.set_len(n * heads);
        tensors.gates(ops, part.h, rows.rows.clone(), &mut s.beta, &mut s.g);
        let store = &mut self.store;
        ops.write_gates(part.layer, part.rows, part.part, &s.beta, &s.g, store);
        let n_read = rows.n_recalls();
        if n_read == 0 {
            return;
        }
        s.beta.set_len(n_read * heads);
        s.g.set_len(n_read * heads);
        s.k.set_len(n_read * kv);
        s.v.set_len(n_read * kv);
        ops.read_cells(
            part.layer,
            part.rows,
            part.part,
            store,
            &mut s.k,
            &mut s.v,
            &mut s.beta,
            &mut s.g,
        );
        s.o.set_len(n_read * heads * d);
        s.gate.set_len(n_read * heads);
        // A token taken in is read by the query `window` later: the last n_read rows.
        let readers = rows.rows.end - n_read..rows.rows.end;
        let layer = &mut self.layers[part.layer];
        let next = layer.next.as_mut().and_then(Arc::get_mut);
        ops.recur(Recurrence {
            rule: tensors.rule,
            rows: readers.clone(),
            n_head: heads,
            n_head_kv: hp.n_head_kv,
            head_dim: d,
            q: part.q,
            k: &s.k,
            v: &s.v,
            beta: &s.beta,
            g: &s.g,
            state: &layer.state,
            next: next.expect("the plan made room for the next state"),
            out: &mut s.o,
        });
        tensors.project(ops, part.h, readers, &mut s.o, &mut s.gate, d, part.out);
    }

    fn buffers(&self) -> Vec<&Buffer> {
        let states = self
            .layers
            .iter()
            .flat_map(|l| [Some(&l.state), l.next.as_ref()]);
        states
            .flatten()
            .map(|state| &**state)
            .filter(|state| !state.is_empty())
            .collect()
    }

    fn commit(&mut self, _: &dyn Ops, plan: &Plan, _: &[u32], _: Option<&[f32]>) -> Result<usize> {
        if !plan.recalls.is_empty() {
            for layer in &mut self.layers {
                if let Some(next) = &mut layer.next {
                    std::mem::swap(&mut layer.state, next);
                }
            }
        }
        self.span.advance(&mut self.store, plan);
        // One cell more than the next query sees: it writes the token that has just left.
        let (begin, full_layers) = (self.evicted(0).start, &self.full_layers);
        self.store.release_raw(begin, |il| !full_layers[il]);
        Ok(plan.n_tokens)
    }

    fn truncate(&mut self, _: &dyn Ops, _: &[u32], n: usize) -> usize {
        // The state cannot forget: only what has not left the window can be taken back.
        let n = n.min(self.span.n_tokens);
        let capacity = self.span.window + self.span.sinks;
        let exact = n == self.span.n_tokens || self.span.n_tokens <= capacity;
        let n = self
            .span
            .truncate(&mut self.store, if exact { n } else { 0 });
        if n == 0 {
            for layer in &mut self.layers {
                layer.state = Arc::clone(&layer.zero);
            }
        }
        n
    }

    fn fork(&self) -> Box<dyn Memory> {
        let mut fork = self.clone();
        fork.layers.iter_mut().for_each(|layer| layer.next = None);
        Box::new(fork)
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        self.span.save(out)?;
        self.store.save(out)?;
        let begin = self.evicted(0).start;
        for (il, layer) in self.layers.iter().enumerate() {
            out.f32s(&layer.state.read().map_err(io::Error::other)?)?;
            if !layer.state.is_empty() {
                self.store.save_gates(il, begin, out)?;
            }
        }
        Ok(())
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        self.span.restore(from)?;
        self.store.restore(from, self.ctx.n_ctx)?;
        self.span.check(&self.store)?;
        // The token that leaves next must still be held.
        if self.store.raw_begin() > self.evicted(0).start
            && self.layers.iter().any(|l| !l.state.is_empty())
        {
            return Err(io::Error::other(
                "the cell that leaves the window next is not in the file",
            ));
        }
        let begin = self.evicted(0).start;
        for (il, layer) in self.layers.iter_mut().enumerate() {
            let mut state = vec![0.0; layer.state.len()];
            from.f32s_into(&mut state)?;
            if self.full_layers[il] {
                continue;
            }
            let state = self.ctx.weights.layers[il].device.upload(state);
            layer.state = Arc::new(state.map_err(io::Error::other)?);
            self.store.restore_gates(il, begin, from)?;
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let n_cells = self.store.n_cells();
        let len = |l: &LayerState| l.state.len() * size_of::<f32>();
        let states: usize = self.layers.iter().map(len).sum();
        let there = self.layers.iter().filter(|l| !l.state.is_host());
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
            state_bytes: states + self.store.bytes_of_gates(),
            card_bytes: self.store.card_bytes() + there.map(len).sum::<usize>(),
            full_bytes: self.span.n_tokens * self.ctx.cell_bytes(),
            bound_bytes: self.ctx.page_bound(n_cells + 1, 2) + states + self.store.gates_bound(),
            ..Stats::default()
        }
    }
}
