//! The compressor of `nodes`: a small trunk of gated delta blocks over token embeddings, the
//! active memory that folds the open segment, and the map from it to slot embeddings.
//!
//! All of it runs on the host, whatever device runs the model.
//!
//! The trunk reads token embeddings only, so all cuts of a prompt are known before the model
//! runs. Its recurrences always take the step-by-step form: their cost is a thousandth of the
//! model's, and the cuts come out the same however a prompt is chunked.

use crate::error::{Error, Result};
use crate::hparams::Hparams;
use crate::ops::{Cpu, Matrix, Table};
use crate::ops::{sigmoid, softplus};
use crate::weights::Loader;
use mneme_kernels::recur::{Form, Numbers, Recur, Rule};

/// Epsilon of every norm inside the compressor.
const EPS: f32 = 1e-6;
/// Inputs the causal convolution spans.
const CONV: usize = 4;

/// A gated delta recurrence's own projections.
struct Delta {
    /// `qkv.weight` `[3c, c]`.
    qkv: Matrix,
    /// `beta.weight` `[n_head, c]`.
    beta: Matrix,
    /// `alpha.weight` `[n_head, c]`.
    alpha: Matrix,
    /// `a` `[n_head]`: `-exp(A_log)`.
    a: Vec<f32>,
    /// `dt.bias` `[n_head]`.
    dt_bias: Vec<f32>,
    /// `gate.weight` `[c, c]`.
    gate: Matrix,
    /// `head_norm.weight` `[c / n_head]`.
    head_norm: Vec<f32>,
}

/// One trunk block, `mem.blk.B.*`.
struct Block {
    norm: Vec<f32>,
    delta: Delta,
    /// `conv.weight` `[3c, 4]`, the current input last.
    conv: Vec<f32>,
    out: Matrix,
    ffn_norm: Vec<f32>,
    ffn_gate: Matrix,
    ffn_up: Matrix,
    ffn_down: Matrix,
    n_ff: usize,
}

/// How the boundary probability is read off the trunk.
pub enum Head {
    /// `sigmoid(w h + b)`.
    Linear {
        /// `mem.decider.weight` `[1, c]`.
        weight: Vec<f32>,
        /// `mem.decider.bias` `[1]`.
        bias: f32,
    },
    /// `sigmoid(w1 silu(w0 h + b0) + b1)`.
    Mlp {
        /// `mem.decider.0.weight` `[hidden, c]`.
        weight0: Matrix,
        /// `mem.decider.0.bias` `[hidden]`.
        bias0: Vec<f32>,
        /// `mem.decider.1.weight` `[1, hidden]`.
        weight1: Vec<f32>,
        /// `mem.decider.1.bias` `[1]`.
        bias1: f32,
    },
    /// `(1 - cos(W_q x_{t-1}, W_k x_t)) / 2` over trunk outputs (H-Net, arXiv 2507.07955).
    Cosine {
        /// `mem.decider.q.weight` `[c, c]`.
        q: Matrix,
        /// `mem.decider.k.weight` `[c, c]`.
        k: Matrix,
    },
}

/// All `mem.*` tensors.
pub struct NodeTensors {
    /// Compressor width c.
    pub width: usize,
    /// Heads of its recurrences.
    pub n_head: usize,
    /// Slots a node leaves behind, N_g.
    pub n_slots: usize,
    in_norm: Vec<f32>,
    input: Matrix,
    blocks: Vec<Block>,
    out_norm: Vec<f32>,
    /// The trained decider, if the file has one.
    pub head: Option<Head>,
    active: Delta,
    /// `mem.node.map.weight` `[n_slots * n_embd, c]`.
    map: Matrix,
    /// `mem.node.slot.weight` `[n_slots, n_embd]`.
    slot: Vec<f32>,
}

impl NodeTensors {
    /// Reads the compressor if the file has one.
    pub fn load(from: &mut Loader<'_>, hp: &Hparams) -> Result<Option<NodeTensors>> {
        if !from.has("mem.in.weight") {
            return Ok(None);
        }
        let file = from.adapter.unwrap_or(from.gguf);
        let key = |suffix: &str| format!("{}.memory.{suffix}", hp.arch);
        let need = |suffix: &str| match file.opt_u32(&key(suffix))? {
            Some(n @ 1..=65_536) => Ok(n as usize),
            other => Err(Error::Key {
                key: key(suffix),
                what: match other {
                    None => "not found".into(),
                    Some(n) => format!("{n} is outside 1..=65536"),
                },
            }),
        };
        let c = need("compressor.embedding_length")?;
        let n_head = need("compressor.head_count")?;
        let n_blocks = file.opt_u32(&key("compressor.block_count"))?.unwrap_or(0) as usize;
        let n_slots = match file.opt_u32(&key("node.slots"))? {
            None => 1,
            Some(_) => need("node.slots")?,
        };
        if !c.is_multiple_of(n_head) {
            return Err(Error::Key {
                key: key("compressor.head_count"),
                what: format!("{n_head} does not divide the width {c}"),
            });
        }
        if n_blocks > 64 {
            return Err(Error::Key {
                key: key("compressor.block_count"),
                what: format!("{n_blocks} blocks are more than 64"),
            });
        }
        if let Some(k) = file.opt_u32(&key("compressor.conv_kernel"))?
            && k as usize != CONV
        {
            return Err(Error::Key {
                key: key("compressor.conv_kernel"),
                what: format!("expected {CONV}, got {k}"),
            });
        }
        let n_ff = match n_blocks {
            0 => 0,
            _ => need("compressor.feed_forward_length")?,
        };
        let blocks = (0..n_blocks)
            .map(|b| Block::load(from, &format!("mem.blk.{b}"), c, n_head, n_ff))
            .collect::<Result<Vec<_>>>()?;
        Ok(Some(NodeTensors {
            in_norm: from.vector("mem.in_norm.weight", hp.n_embd)?,
            input: from.host_matrix("mem.in.weight", c, hp.n_embd)?,
            out_norm: from.vector("mem.out_norm.weight", c)?,
            head: Head::load(from, c)?,
            active: Delta::load(from, "mem.active", c, n_head)?,
            map: from.host_matrix("mem.node.map.weight", n_slots * hp.n_embd, c)?,
            slot: from.values("mem.node.slot.weight", n_slots, hp.n_embd)?,
            width: c,
            n_head,
            n_slots,
            blocks,
        }))
    }

    /// A trunk at the start of a text.
    pub fn start(&self) -> TrunkState {
        let block = BlockState {
            state: vec![0.0; self.width * self.width / self.n_head],
            conv: vec![0.0; (CONV - 1) * 3 * self.width],
        };
        TrunkState {
            blocks: vec![block; self.blocks.len()],
            last: None,
        }
    }

    /// Runs the trunk over embeddings `x` `[n, n_embd]`: its outputs h `[n, c]`, and the boundary
    /// probability of each token if the file has a decider.
    pub fn read(
        &self,
        ops: &Cpu,
        at: &mut TrunkState,
        x: &[f32],
        n: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let c = self.width;
        if n == 0 {
            return (Vec::new(), Vec::new());
        }
        let mut normed = vec![0.0; x.len()];
        ops.rms_norm(x, &self.in_norm, EPS, &mut normed);
        let mut u = vec![0.0; n * c];
        ops.mul_mat(&normed, n, &mut [(&self.input, &mut u)]);
        for (block, state) in self.blocks.iter().zip(&mut at.blocks) {
            block.forward(ops, state, &mut u, n, self.n_head);
        }
        ops.rms_norm_in_place(&mut u, &self.out_norm, EPS);
        let p = self
            .head
            .as_ref()
            .map(|head| head.probabilities(ops, &u, n, c, at.last.as_deref()))
            .unwrap_or_default();
        at.last = Some(u[(n - 1) * c..].into());
        (u, p)
    }

    /// Boundary probability of each of `tokens` read from the start of a text, for people to look
    /// at; empty if the file has no trained decider.
    pub fn boundary_probabilities(
        &self,
        ops: &Cpu,
        token_embd: &Table,
        n_embd: usize,
        tokens: &[u32],
    ) -> Vec<f32> {
        let mut trunk = self.start();
        let mut out = Vec::with_capacity(tokens.len());
        for part in tokens.chunks(512) {
            let mut x = vec![0.0; part.len() * n_embd];
            ops.get_rows(token_embd, part, &mut x);
            out.extend(self.read(ops, &mut trunk, &x, part.len()).1);
        }
        out
    }

    /// Folds `h` `[n, c]` into the active memory `state`, which starts anew before each of
    /// `resets`, and returns the readout r `[n, c]` after every token.
    pub fn fold(
        &self,
        ops: &Cpu,
        state: &mut [f32],
        h: &[f32],
        n: usize,
        resets: &[usize],
    ) -> Vec<f32> {
        let c = self.width;
        let mut qkv = vec![0.0; n * 3 * c];
        let mut gate = vec![0.0; n * c];
        ops.mul_mat(
            h,
            n,
            &mut [(&self.active.qkv, &mut qkv), (&self.active.gate, &mut gate)],
        );
        let mut r = self
            .active
            .recur(ops, state, h, &qkv, n, self.n_head, resets);
        ops.swiglu_gate(&mut r, &gate);
        r
    }

    /// Values in the active memory's state.
    pub fn active_len(&self) -> usize {
        self.width * self.width / self.n_head
    }

    /// Slot embeddings `[n, n_slots, n_embd]` of `n` readouts `[n, c]`.
    pub fn slots(&self, ops: &Cpu, r: &[f32], n: usize) -> Vec<f32> {
        let mut e = vec![0.0; n * self.slot.len()];
        if n == 0 {
            return e;
        }
        ops.mul_mat(r, n, &mut [(&self.map, &mut e)]);
        ops.add_bias(&mut e, &self.slot);
        e
    }
}

impl Delta {
    fn load(from: &mut Loader<'_>, prefix: &str, c: usize, n_head: usize) -> Result<Delta> {
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        Ok(Delta {
            qkv: from.host_matrix(&name("qkv.weight"), 3 * c, c)?,
            beta: from.host_matrix(&name("beta.weight"), n_head, c)?,
            alpha: from.host_matrix(&name("alpha.weight"), n_head, c)?,
            a: from.vector(&name("a"), n_head)?,
            dt_bias: from.vector(&name("dt.bias"), n_head)?,
            gate: from.host_matrix(&name("gate.weight"), c, c)?,
            head_norm: from.vector(&name("head_norm.weight"), c / n_head)?,
        })
    }

    /// The recurrence over `qkv` `[n, 3, c]` with gates from `y` `[n, c]`; normed readout `[n, c]`.
    fn recur(
        &self,
        ops: &Cpu,
        state: &mut [f32],
        y: &[f32],
        qkv: &[f32],
        n: usize,
        n_head: usize,
        resets: &[usize],
    ) -> Vec<f32> {
        let d = self.head_norm.len();
        let c = d * n_head;
        let mut beta = vec![0.0; n * n_head];
        let mut g = vec![0.0; n * n_head];
        ops.mul_mat(y, n, &mut [(&self.beta, &mut beta), (&self.alpha, &mut g)]);
        for t in 0..n {
            for j in 0..n_head {
                let at = t * n_head + j;
                beta[at] = sigmoid(beta[at]);
                g[at] = self.a[j] * softplus(g[at] + self.dt_bias[j]);
            }
        }
        let third = |i: usize| -> Vec<f32> {
            qkv.chunks_exact(3 * c)
                .flat_map(|row| &row[i * c..(i + 1) * c])
                .copied()
                .collect()
        };
        let (q, k, v) = (third(0), third(1), third(2));
        let mut o = vec![0.0; n * c];
        ops.recur(
            Form::Recurrent,
            &mut [Recur {
                rule: Rule::GatedDelta,
                n_tokens: n,
                n_head,
                n_head_k: n_head,
                head_dim_k: d,
                head_dim_v: d,
                q: Numbers::F32(&q),
                k: Numbers::F32(&k),
                v: Numbers::F32(&v),
                g: Numbers::F32(&g),
                beta: Numbers::F32(&beta),
                resets,
                state,
                out: &mut o,
            }],
        );
        ops.rms_norm_in_place(&mut o, &self.head_norm, EPS);
        o
    }
}

impl Block {
    fn load(
        from: &mut Loader<'_>,
        prefix: &str,
        c: usize,
        n_head: usize,
        n_ff: usize,
    ) -> Result<Block> {
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        Ok(Block {
            norm: from.vector(&name("norm.weight"), c)?,
            delta: Delta::load(from, prefix, c, n_head)?,
            conv: from.values(&name("conv.weight"), 3 * c, CONV)?,
            out: from.host_matrix(&name("out.weight"), c, c)?,
            ffn_norm: from.vector(&name("ffn_norm.weight"), c)?,
            ffn_gate: from.host_matrix(&name("ffn_gate.weight"), n_ff, c)?,
            ffn_up: from.host_matrix(&name("ffn_up.weight"), n_ff, c)?,
            ffn_down: from.host_matrix(&name("ffn_down.weight"), c, n_ff)?,
            n_ff,
        })
    }

    fn forward(&self, ops: &Cpu, at: &mut BlockState, u: &mut [f32], n: usize, n_head: usize) {
        let c = self.norm.len();
        let mut y = vec![0.0; n * c];
        ops.rms_norm(u, &self.norm, EPS, &mut y);
        let mut qkv = vec![0.0; n * 3 * c];
        let mut gate = vec![0.0; n * c];
        ops.mul_mat(
            &y,
            n,
            &mut [(&self.delta.qkv, &mut qkv), (&self.delta.gate, &mut gate)],
        );
        let qkv = self.convolve(&mut at.conv, &qkv, n);
        let mut o = self
            .delta
            .recur(ops, &mut at.state, &y, &qkv, n, n_head, &[]);
        ops.swiglu_gate(&mut o, &gate);
        ops.mul_mat(&o, n, &mut [(&self.out, &mut y)]);
        ops.add(u, &y);

        ops.rms_norm(u, &self.ffn_norm, EPS, &mut y);
        let mut gate = vec![0.0; n * self.n_ff];
        let mut up = vec![0.0; n * self.n_ff];
        ops.mul_mat(
            &y,
            n,
            &mut [(&self.ffn_gate, &mut gate), (&self.ffn_up, &mut up)],
        );
        ops.swiglu_gate(&mut up, &gate);
        ops.mul_mat(&up, n, &mut [(&self.ffn_down, &mut y)]);
        ops.add(u, &y);
    }

    /// `silu` of the causal depthwise convolution over the last four inputs; `past` holds the
    /// three before the first row and is moved on.
    fn convolve(&self, past: &mut [f32], qkv: &[f32], n: usize) -> Vec<f32> {
        let w = past.len() / (CONV - 1);
        let mut out = vec![0.0; n * w];
        let mut window = past.to_vec();
        window.extend_from_slice(qkv);
        for (t, out) in out.chunks_exact_mut(w).enumerate() {
            for (ch, out) in out.iter_mut().enumerate() {
                let taps = &self.conv[ch * CONV..(ch + 1) * CONV];
                let sum: f32 = (0..CONV).map(|i| taps[i] * window[(t + i) * w + ch]).sum();
                *out = sum * sigmoid(sum);
            }
        }
        past.copy_from_slice(&window[n * w..]);
        out
    }
}

impl Head {
    fn load(from: &mut Loader<'_>, c: usize) -> Result<Option<Head>> {
        if from.has("mem.decider.q.weight") {
            return Ok(Some(Head::Cosine {
                q: from.host_matrix("mem.decider.q.weight", c, c)?,
                k: from.host_matrix("mem.decider.k.weight", c, c)?,
            }));
        }
        if from.has("mem.decider.0.weight") {
            return Ok(Some(Head::Mlp {
                weight0: from.host_matrix("mem.decider.0.weight", c, c)?,
                bias0: from.vector("mem.decider.0.bias", c)?,
                weight1: from.vector("mem.decider.1.weight", c)?,
                bias1: from.vector("mem.decider.1.bias", 1)?[0],
            }));
        }
        if from.has("mem.decider.weight") {
            return Ok(Some(Head::Linear {
                weight: from.vector("mem.decider.weight", c)?,
                bias: from.vector("mem.decider.bias", 1)?[0],
            }));
        }
        Ok(None)
    }

    fn probabilities(
        &self,
        ops: &Cpu,
        h: &[f32],
        n: usize,
        c: usize,
        last: Option<&[f32]>,
    ) -> Vec<f32> {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
        match self {
            Head::Linear { weight, bias } => h
                .chunks_exact(c)
                .map(|h| sigmoid(dot(h, weight) + bias))
                .collect(),
            Head::Mlp {
                weight0,
                bias0,
                weight1,
                bias1,
            } => {
                let mut hidden = vec![0.0; n * c];
                ops.mul_mat(h, n, &mut [(weight0, &mut hidden)]);
                ops.add_bias(&mut hidden, bias0);
                hidden.iter_mut().for_each(|x| *x *= sigmoid(*x));
                hidden
                    .chunks_exact(c)
                    .map(|h| sigmoid(dot(h, weight1) + bias1))
                    .collect()
            }
            Head::Cosine { q, k } => {
                // Row t pairs W_q of the token before with W_k of token t; the first token of a
                // text has no neighbour and never looks like a boundary.
                let mut before = last.map_or_else(|| vec![0.0; c], <[f32]>::to_vec);
                before.extend_from_slice(&h[..n.saturating_sub(1) * c]);
                let (mut qs, mut ks) = (vec![0.0; n * c], vec![0.0; n * c]);
                ops.mul_mat(&before[..n * c], n, &mut [(q, &mut qs)]);
                ops.mul_mat(h, n, &mut [(k, &mut ks)]);
                let cosine = |(q, k): (&[f32], &[f32])| {
                    let norm = (dot(q, q) * dot(k, k)).sqrt();
                    let cos = if norm > 0.0 { dot(q, k) / norm } else { 1.0 };
                    ((1.0 - cos) / 2.0).clamp(0.0, 1.0)
                };
                qs.chunks_exact(c)
                    .zip(ks.chunks_exact(c))
                    .map(cosine)
                    .collect()
            }
        }
    }
}

/// One trunk block between two tokens.
#[derive(Clone)]
struct BlockState {
    /// `[n_head, d, d]`.
    state: Vec<f32>,
    /// The last three inputs of the convolution `[3, 3c]`.
    conv: Vec<f32>,
}

/// The trunk between two tokens.
#[derive(Clone)]
pub struct TrunkState {
    blocks: Vec<BlockState>,
    /// Output for the last token, which the cosine decider compares the next one with.
    last: Option<Box<[f32]>>,
}

impl TrunkState {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let block = |b: &BlockState| b.state.len() + b.conv.len();
        let values = self.blocks.iter().map(block).sum::<usize>()
            + self.last.as_ref().map_or(0, |l| l.len());
        values * size_of::<f32>()
    }

    /// Writes the state.
    pub fn save(&self, out: &mut crate::session::Encoder<'_>) -> std::io::Result<()> {
        for block in &self.blocks {
            out.f32s(&block.state)?;
            out.f32s(&block.conv)?;
        }
        out.f32s(self.last.as_deref().unwrap_or(&[]))
    }

    /// Reads what [`TrunkState::save`] wrote, into a state of the same model.
    pub fn restore(
        &mut self,
        from: &mut crate::session::Decoder<'_>,
        width: usize,
    ) -> std::io::Result<()> {
        for block in &mut self.blocks {
            from.f32s_into(&mut block.state)?;
            from.f32s_into(&mut block.conv)?;
        }
        let last = from.f32s()?;
        if !last.is_empty() && last.len() != width {
            return Err(std::io::Error::other(
                "the trunk's output has another width",
            ));
        }
        self.last = (!last.is_empty()).then(|| last.into());
        Ok(())
    }
}
