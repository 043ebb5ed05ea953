//! The compressor of `nodes`: a small trunk of gated delta blocks over token embeddings, the
//! active memory that folds the open segment, and the map from it to slot embeddings.
//!
//! It runs where the first layer runs: it reads embeddings, which are on the host, and its slots
//! enter that layer, so that under a split nothing of it crosses. The decider's heads stay on the
//! host: they are a dot product for each token, or two small matrices, and what they decide is
//! control work. Home come the trunk's outputs, for a trained decider, and the readouts, each once a
//! chunk or pass; slots are made of readouts in the pass that they join.
//!
//! The trunk reads token embeddings only, so all cuts of a prompt are known before the model
//! runs. Of a token that comes alone nothing is needed before the next one comes: the pass it
//! belongs to runs the compressor over it before its first layer, together with those of other
//! sequences. Its recurrences
//! always take the step-by-step form: their cost is a thousandth of the model's, and the cuts come
//! out the same however a prompt is chunked.

use crate::error::{Error, Result};
use crate::hparams::Hparams;
use crate::ops::sigmoid;
use crate::ops::{Buffer, ConvSeq, Cpu, Device, Fold, FoldSeq, Matrix, Ops, Rows, Rule, Table};
use crate::weights::Loader;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Epsilon of every norm inside the compressor.
const EPS: f32 = 1e-6;
/// Inputs the causal convolution spans.
const CONV: usize = 4;
/// Most dimensions of a head whose recurrence a card has kernels for.
const CARD_HEAD_DIM: usize = 256;
/// Tokens read at a time where nobody says otherwise.
const CHUNK: usize = 512;

/// A gated delta recurrence's own projections.
struct Delta {
    /// `qkv.weight` `[3c, c]`.
    qkv: Matrix,
    /// `beta.weight` `[n_head, c]`.
    beta: Matrix,
    /// `alpha.weight` `[n_head, c]`.
    alpha: Matrix,
    /// `a` `[n_head]`: `-exp(A_log)`.
    a: Buffer,
    /// `dt.bias` `[n_head]`.
    dt_bias: Buffer,
    /// `gate.weight` `[c, c]`.
    gate: Matrix,
    /// `head_norm.weight` `[c / n_head]`.
    head_norm: Buffer,
}

/// One trunk block, `mem.blk.B.*`.
struct Block {
    norm: Buffer,
    delta: Delta,
    /// `conv.weight` `[3c, 4]`, the current input last.
    conv: Buffer,
    out: Matrix,
    ffn_norm: Buffer,
    ffn_gate: Matrix,
    ffn_up: Matrix,
    ffn_down: Matrix,
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
    in_norm: Buffer,
    input: Matrix,
    blocks: Vec<Block>,
    out_norm: Buffer,
    /// The trained decider, if the file has one.
    pub head: Option<Head>,
    active: Delta,
    /// `mem.node.map.weight` `[n_slots * n_embd, c]`.
    map: Matrix,
    /// `mem.node.slot.weight` `[n_slots, n_embd]`.
    slot: Buffer,
    /// The state at the start of every text.
    start: TrunkState,
    scratch: Mutex<TrunkScratch>,
}

/// A token that comes alone, left to the pass it belongs to: the compressor runs over those of all
/// sequences together.
pub struct TrunkStep<'a> {
    /// The states before it.
    pub from: &'a TrunkState,
    /// The states after it, with buffers of their own ([`TrunkState::own`]).
    pub to: &'a mut TrunkState,
    /// Whether the active memory starts anew before it.
    pub resets: bool,
    /// Whether its boundary probability is wanted.
    pub decides: bool,
    /// What comes home.
    pub out: &'a mut Stepped,
}

/// What came of a [`TrunkStep`].
#[derive(Default)]
pub struct Stepped {
    /// Boundary probability; 0 where it was not wanted or there is no decider.
    pub p: f32,
    /// The active memory's readout `[c]`.
    pub r: Box<[f32]>,
}

/// What the compressor computes with, kept between calls.
#[derive(Default)]
pub struct TrunkScratch {
    /// Embeddings `[n, n_embd]`, and the same normed.
    x: Buffer,
    normed: Buffer,
    /// Residual stream `[n, c]`.
    u: Buffer,
    /// Normed input of a block, and a block's output `[n, c]`.
    y: Buffer,
    /// The trunk's outputs h `[n, c]`.
    h: Buffer,
    /// Queries, keys and values `[n, 3, c]`, and the same convolved.
    qkv: Buffer,
    mixed: Buffer,
    read: ReadScratch,
    /// Feed-forward gate, up and activation `[n, n_ff]`.
    gate: Buffer,
    up: Buffer,
    act: Buffer,
    /// Slot embeddings `[n, n_slots, n_embd]` and the readouts `[n, c]` they are made of.
    slots: Buffer,
    closed: Buffer,
    /// What came home.
    home: Vec<f32>,
}

/// One sequence's share of a call: its rows follow those of the sequences before it.
struct Share<'a> {
    n: usize,
    from: &'a TrunkState,
    /// With buffers of its own.
    to: &'a mut TrunkState,
}

/// What a recurrence computes with.
#[derive(Default)]
struct ReadScratch {
    /// Write strengths and log decays `[n, n_head]`.
    beta: Buffer,
    g: Buffer,
    /// Gate of what is read `[n, c]`.
    gate: Buffer,
    /// What is read `[n, c]`: as it is and in the end gated, and normed in between.
    o: Buffer,
    normed: Buffer,
}

impl NodeTensors {
    /// Reads the compressor if the file has one.
    pub fn load(from: &mut Loader<'_>, hp: &Hparams) -> Result<Option<NodeTensors>> {
        let Some(file) = from.file_of("mem.in.weight").map(Arc::clone) else {
            return Ok(None);
        };
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
        let device = from.ops.device().clone();
        let d = c / n_head;
        if !device.is_host() && d > CARD_HEAD_DIM {
            return Err(Error::Key {
                key: key("compressor.head_count"),
                what: format!("heads of {d} dimensions; a card takes up to {CARD_HEAD_DIM}"),
            });
        }
        let blocks = (0..n_blocks)
            .map(|b| Block::load(from, &format!("mem.blk.{b}"), c, n_head, n_ff))
            .collect::<Result<Vec<_>>>()?;
        let state = Arc::new(device.zeros(c * d)?);
        let block = BlockState {
            state: Arc::clone(&state),
            conv: Arc::new(device.zeros((CONV - 1) * 3 * c)?),
        };
        let start = TrunkState {
            blocks: vec![block; n_blocks],
            last: None,
            active: state,
        };
        let slot = from.values("mem.node.slot.weight", n_slots, hp.n_embd)?;
        Ok(Some(NodeTensors {
            in_norm: from.buffer("mem.in_norm.weight", hp.n_embd)?,
            input: from.matrix("mem.in.weight", c, hp.n_embd)?,
            out_norm: from.buffer("mem.out_norm.weight", c)?,
            head: Head::load(from, c)?,
            active: Delta::load(from, "mem.active", c, n_head)?,
            map: from.matrix("mem.node.map.weight", n_slots * hp.n_embd, c)?,
            slot: device.upload(slot)?,
            width: c,
            n_head,
            n_slots,
            blocks,
            start,
            scratch: Mutex::default(),
        }))
    }

    /// A trunk and an active memory at the start of a text.
    pub fn start(&self) -> TrunkState {
        self.start.clone()
    }

    /// The active memory that a segment begins with.
    pub fn start_of_segment(&self) -> &Buffer {
        &self.start.active
    }

    /// What calls compute with; one at a time.
    pub fn scratch(&self) -> MutexGuard<'_, TrunkScratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the trunk of state `from` over `tokens`, rows of `token_embd`, and leaves its outputs h
    /// `[n, c]` in `s`. The trunk of `to`, whatever it held, is the state afterwards; its active
    /// memory stays. Returns the boundary probability of each token when `decides`, nothing
    /// without a decider.
    pub fn read(
        &self,
        ops: &dyn Ops,
        s: &mut TrunkScratch,
        from: &TrunkState,
        to: &mut TrunkState,
        token_embd: &Table,
        tokens: &[u32],
        decides: bool,
    ) -> Result<Vec<f32>> {
        let (c, n) = (self.width, tokens.len());
        if n == 0 {
            to.blocks.clone_from(&from.blocks);
            to.last.clone_from(&from.last);
            return Ok(Vec::new());
        }
        let ops = ops.of_layer(0);
        let (device, n_embd) = (ops.device(), self.in_norm.len());
        self.make_room(device, s, n)?;
        device.fill(&mut s.x, n * n_embd, |x| {
            ops.host().get_rows(token_embd, tokens, x);
        })?;
        to.own_trunk(device, from)?;
        self.walk(ops, s, &mut [Share { n, from, to }]);

        to.last = None;
        let head = self.head.as_ref().filter(|h| decides || h.looks_back());
        let Some(head) = head else {
            return Ok(Vec::new());
        };
        let h = s.h.read_with(&mut s.home)?;
        let p = match decides {
            true => head.probabilities(ops.host(), h, n, c, from.last.as_deref()),
            false => Vec::new(),
        };
        to.last = head.looks_back().then(|| h[(n - 1) * c..].into());
        Ok(p)
    }

    /// Room for a call over `n` tokens.
    pub fn make_room(&self, device: &Device, s: &mut TrunkScratch, n: usize) -> Result<()> {
        let (c, n_embd) = (self.width, self.in_norm.len());
        let n_ff = self.blocks.first().map_or(0, |b| b.ffn_gate.n_rows());
        s.read.resize(device, n, c, self.n_head)?;
        for (buffer, len) in [
            (&mut s.x, n * n_embd),
            (&mut s.normed, n * n_embd),
            (&mut s.u, n * c),
            (&mut s.y, n * c),
            (&mut s.h, n * c),
            (&mut s.qkv, n * 3 * c),
            (&mut s.mixed, n * 3 * c),
            (&mut s.gate, n * n_ff),
            (&mut s.up, n * n_ff),
            (&mut s.act, n * n_ff),
        ] {
            device.resize(buffer, len)?;
        }
        Ok(())
    }

    /// The trunk over the embeddings in `s`, the rows of `shares`; its outputs h are left in `s`.
    fn walk(&self, ops: &dyn Ops, s: &mut TrunkScratch, shares: &mut [Share<'_>]) {
        let n = shares.iter().map(|share| share.n).sum();
        ops.rms_norm(&s.x, &self.in_norm, EPS, &mut s.normed);
        ops.mul_mat(&s.normed, 0..n, &mut [(&self.input, &mut s.u)]);
        for (b, block) in self.blocks.iter().enumerate() {
            let states = shares.iter_mut();
            let states =
                states.map(|share| (share.n, &share.from.blocks[b], &mut share.to.blocks[b]));
            block.forward(ops, s, n, states.collect());
        }
        ops.rms_norm(&s.u, &self.out_norm, EPS, &mut s.h);
    }

    /// Runs the compressor by the first layer's verbs over the tokens of `steps`, whose embeddings are
    /// [`Rows::steps`] of `x` `[n, n_embd]`. There is room for them in `s`, which keeps what [`NodeTensors::bring_home`]
    /// takes; nothing is sent, waited for or allocated, so that this can be part of a recording.
    pub fn step(
        &self,
        ops: &dyn Ops,
        s: &mut TrunkScratch,
        x: &Buffer,
        rows: &Rows,
        steps: &mut [TrunkStep<'_>],
    ) {
        let n = steps.len();
        ops.take_rows(x, self.in_norm.len(), rows, &mut s.x);
        let shares = steps.iter_mut().map(|step| Share {
            n: 1,
            from: step.from,
            to: &mut *step.to,
        });
        self.walk(ops, s, &mut shares.collect::<Vec<_>>());
        self.active.project(ops, &s.h, n, &mut s.qkv, &mut s.read);
        let seqs = steps.iter_mut().map(|step| FoldSeq {
            n: 1,
            resets: &[],
            state: match step.resets {
                true => self.start_of_segment(),
                false => &step.from.active,
            },
            next: mine(&mut step.to.active),
        });
        self.active.recur(ops, &s.qkv, &mut s.read, seqs.collect());
    }

    /// Takes home what [`NodeTensors::step`] left in `s` for the same steps.
    pub fn bring_home(
        &self,
        ops: &dyn Ops,
        s: &mut TrunkScratch,
        steps: &mut [TrunkStep<'_>],
    ) -> Result<()> {
        let c = self.width;
        let decides = steps.iter().any(|step| step.decides);
        let head = self.head.as_ref().filter(|h| decides || h.looks_back());
        if let Some(head) = head {
            let h = s.h.read_with(&mut s.home)?;
            for (step, h) in steps.iter_mut().zip(h.chunks_exact(c)) {
                if step.decides {
                    let last = step.from.last.as_deref();
                    step.out.p = head.probabilities(ops.host(), h, 1, c, last)[0];
                }
                step.to.last = head.looks_back().then(|| h.into());
            }
        }
        let r = s.read.o.read_with(&mut s.home)?;
        for (step, r) in steps.iter_mut().zip(r.chunks_exact(c)) {
            step.out.r = r.into();
        }
        Ok(())
    }

    /// Boundary probability of each of `tokens` read from the start of a text, for people to look
    /// at; empty if the file has no trained decider.
    pub fn boundary_probabilities(
        &self,
        ops: &dyn Ops,
        token_embd: &Table,
        tokens: &[u32],
    ) -> Result<Vec<f32>> {
        let s = &mut *self.scratch();
        let (mut at, mut next) = (self.start(), self.start());
        let mut out = Vec::with_capacity(tokens.len());
        for part in tokens.chunks(CHUNK) {
            out.extend(self.read(ops, s, &at, &mut next, token_embd, part, true)?);
            std::mem::swap(&mut at, &mut next);
        }
        Ok(out)
    }

    /// Folds the first `n` outputs that [`NodeTensors::read`] left in `s` into the active memory of
    /// `from`, which starts anew before each of `resets`; that of `to` holds it afterwards. Returns
    /// the readout r `[n, c]` after every token.
    pub fn fold<'s>(
        &self,
        ops: &dyn Ops,
        s: &'s mut TrunkScratch,
        from: &TrunkState,
        to: &mut TrunkState,
        n: usize,
        resets: &[usize],
    ) -> Result<&'s [f32]> {
        if n == 0 {
            to.active = Arc::clone(&from.active);
            return Ok(&[]);
        }
        let ops = ops.of_layer(0);
        ops.device().resize(&mut s.qkv, n * 3 * self.width)?;
        s.read.resize(ops.device(), n, self.width, self.n_head)?;
        self.active.project(ops, &s.h, n, &mut s.qkv, &mut s.read);
        let seq = FoldSeq {
            n,
            resets,
            state: &from.active,
            next: own(ops.device(), &mut to.active, from.active.len())?,
        };
        self.active.recur(ops, &s.qkv, &mut s.read, vec![seq]);
        s.read.o.read_with(&mut s.home)
    }

    /// The last readout `[c]` of readouts `rs` `[n, c]` folded from the start, as outputs of a trunk
    /// are. `spare` lends its active memory's room.
    pub fn fold_readouts(
        &self,
        ops: &dyn Ops,
        s: &mut TrunkScratch,
        spare: &mut TrunkState,
        rs: &[f32],
    ) -> Result<Box<[f32]>> {
        let (c, n) = (self.width, rs.len() / self.width);
        let ops = ops.of_layer(0);
        ops.device()
            .fill(&mut s.h, rs.len(), |h| h.copy_from_slice(rs))?;
        let r = self.fold(ops, s, &self.start, spare, n, &[])?;
        Ok(r[(n - 1) * c..].into())
    }

    /// Sends readouts `rs` `[n, c]` of closed segments, and makes room for the slots of their nodes.
    pub fn send_readouts(&self, device: &Device, s: &mut TrunkScratch, rs: &[f32]) -> Result<()> {
        device.fill(&mut s.closed, rs.len(), |to| to.copy_from_slice(rs))?;
        let n = rs.len() / self.width;
        device.resize(&mut s.slots, n * self.slot.len())
    }

    /// Makes the slots of the readouts sent: their embeddings become rows [`Rows::node_slots`] of `x`
    /// `[n, n_embd]`.
    pub fn put_slots(&self, ops: &dyn Ops, s: &mut TrunkScratch, rows: &Rows, x: &mut Buffer) {
        let n = s.closed.len() / self.width;
        ops.mul_mat(&s.closed, 0..n, &mut [(&self.map, &mut s.slots)]);
        ops.add_bias(&mut s.slots, &self.slot);
        ops.put_rows(&s.slots, self.in_norm.len(), rows, x);
    }
}

/// `to` as a buffer of `len` numbers that nobody else holds, to be overwritten.
fn own<'a>(device: &Device, to: &'a mut Arc<Buffer>, len: usize) -> Result<&'a mut Buffer> {
    if Arc::get_mut(to).is_none_or(|to| to.len() != len) {
        *to = Arc::new(device.zeros(len)?);
    }
    Ok(mine(to))
}

/// A buffer that [`own`] has made its own.
fn mine(to: &mut Arc<Buffer>) -> &mut Buffer {
    Arc::get_mut(to).expect("held by nobody else")
}

impl ReadScratch {
    /// Room for `n` tokens.
    fn resize(&mut self, device: &Device, n: usize, c: usize, n_head: usize) -> Result<()> {
        for buffer in [&mut self.beta, &mut self.g] {
            device.resize(buffer, n * n_head)?;
        }
        for buffer in [&mut self.gate, &mut self.o, &mut self.normed] {
            device.resize(buffer, n * c)?;
        }
        Ok(())
    }
}

impl Delta {
    fn load(from: &mut Loader<'_>, prefix: &str, c: usize, n_head: usize) -> Result<Delta> {
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        Ok(Delta {
            qkv: from.matrix(&name("qkv.weight"), 3 * c, c)?,
            beta: from.matrix(&name("beta.weight"), n_head, c)?,
            alpha: from.matrix(&name("alpha.weight"), n_head, c)?,
            a: from.buffer(&name("a"), n_head)?,
            dt_bias: from.buffer(&name("dt.bias"), n_head)?,
            gate: from.matrix(&name("gate.weight"), c, c)?,
            head_norm: from.buffer(&name("head_norm.weight"), c / n_head)?,
        })
    }

    /// Queries, keys and values `[n, 3, c]`, gates of the recurrence and gates of what it reads, of
    /// the first `n` rows of `y` `[.., c]`.
    fn project(&self, ops: &dyn Ops, y: &Buffer, n: usize, qkv: &mut Buffer, s: &mut ReadScratch) {
        ops.mul_mat(
            y,
            0..n,
            &mut [
                (&self.qkv, qkv),
                (&self.gate, &mut s.gate),
                (&self.beta, &mut s.beta),
                (&self.alpha, &mut s.g),
            ],
        );
        ops.gates(
            Rule::GatedDelta,
            &mut s.beta,
            &mut s.g,
            &self.a,
            &self.dt_bias,
        );
    }

    /// The recurrences of `seqs` over `qkv` `[n, 3, c]` with the gates in `s`; what is read, normed
    /// and gated, into `s.o` `[n, c]`.
    fn recur(&self, ops: &dyn Ops, qkv: &Buffer, s: &mut ReadScratch, seqs: Vec<FoldSeq<'_>>) {
        ops.fold(Fold {
            n_head: self.a.len(),
            head_dim: self.head_norm.len(),
            qkv,
            beta: &s.beta,
            g: &s.g,
            seqs,
            out: &mut s.o,
        });
        ops.rms_norm(&s.o, &self.head_norm, EPS, &mut s.normed);
        ops.swiglu(&s.gate, &s.normed, &mut s.o);
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
        let conv = from.values(&name("conv.weight"), 3 * c, CONV)?;
        Ok(Block {
            norm: from.buffer(&name("norm.weight"), c)?,
            delta: Delta::load(from, prefix, c, n_head)?,
            conv: from.ops.device().upload(conv)?,
            out: from.matrix(&name("out.weight"), c, c)?,
            ffn_norm: from.buffer(&name("ffn_norm.weight"), c)?,
            ffn_gate: from.matrix(&name("ffn_gate.weight"), n_ff, c)?,
            ffn_up: from.matrix(&name("ffn_up.weight"), n_ff, c)?,
            ffn_down: from.matrix(&name("ffn_down.weight"), c, n_ff)?,
        })
    }

    /// The block over the `n` rows of the residual stream in `s`: of each sequence so many, from one
    /// state to another that has buffers of its own.
    fn forward(
        &self,
        ops: &dyn Ops,
        s: &mut TrunkScratch,
        n: usize,
        seqs: Vec<(usize, &BlockState, &mut BlockState)>,
    ) {
        ops.rms_norm(&s.u, &self.norm, EPS, &mut s.y);
        self.delta.project(ops, &s.y, n, &mut s.qkv, &mut s.read);
        let (mut convs, mut folds) = (Vec::new(), Vec::new());
        for (n, from, to) in seqs {
            convs.push(ConvSeq {
                n,
                past: &from.conv,
                next: mine(&mut to.conv),
            });
            folds.push(FoldSeq {
                n,
                resets: &[],
                state: &from.state,
                next: mine(&mut to.state),
            });
        }
        ops.conv_silu(&s.qkv, &self.conv, convs, &mut s.mixed);
        self.delta.recur(ops, &s.mixed, &mut s.read, folds);
        ops.mul_mat(&s.read.o, 0..n, &mut [(&self.out, &mut s.y)]);
        ops.add(&mut s.u, &s.y);

        ops.rms_norm(&s.u, &self.ffn_norm, EPS, &mut s.y);
        ops.mul_mat(
            &s.y,
            0..n,
            &mut [(&self.ffn_gate, &mut s.gate), (&self.ffn_up, &mut s.up)],
        );
        ops.swiglu(&s.gate, &s.up, &mut s.act);
        ops.mul_mat(&s.act, 0..n, &mut [(&self.ffn_down, &mut s.y)]);
        ops.add(&mut s.u, &s.y);
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

    /// Whether a token's probability depends on the output for the token before.
    fn looks_back(&self) -> bool {
        matches!(self, Head::Cosine { .. })
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
#[derive(Clone, Default)]
struct BlockState {
    /// `[n_head, d, d]`.
    state: Arc<Buffer>,
    /// The last three inputs of the convolution `[3, 3c]`.
    conv: Arc<Buffer>,
}

/// The trunk and the active memory between two tokens. Clones share their buffers, which are never
/// changed while they do.
#[derive(Clone)]
pub struct TrunkState {
    blocks: Vec<BlockState>,
    /// Output for the last token, where the decider compares the next one with it.
    last: Option<Box<[f32]>>,
    /// The active memory `[n_head, d, d]`; empty in states that are only kept at cuts.
    active: Arc<Buffer>,
}

impl TrunkState {
    /// Gives this state buffers of its own, as large as those of `like`, to be overwritten.
    pub fn own(&mut self, device: &Device, like: &TrunkState) -> Result<()> {
        own(device, &mut self.active, like.active.len())?;
        self.last = None;
        self.own_trunk(device, like)
    }

    /// The buffers: of the blocks, then the active memory.
    pub fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        let blocks = self.blocks.iter();
        let blocks = blocks.flat_map(|b| [&*b.state, &*b.conv]);
        blocks.chain([&*self.active])
    }

    /// As [`TrunkState::own`], of the trunk alone.
    fn own_trunk(&mut self, device: &Device, like: &TrunkState) -> Result<()> {
        self.blocks
            .resize_with(like.blocks.len(), BlockState::default);
        for (mine, like) in self.blocks.iter_mut().zip(&like.blocks) {
            own(device, &mut mine.state, like.state.len())?;
            own(device, &mut mine.conv, like.conv.len())?;
        }
        Ok(())
    }

    /// Bytes held, without those of the active memory.
    pub fn bytes(&self) -> usize {
        let block = |b: &BlockState| b.state.len() + b.conv.len();
        let values = self.blocks.iter().map(block).sum::<usize>()
            + self.last.as_ref().map_or(0, |l| l.len());
        values * size_of::<f32>()
    }

    /// Bytes in a card's memory, those of the active memory included.
    pub fn card_bytes(&self) -> usize {
        let blocks = self.blocks.iter().flat_map(|b| [&b.state, &b.conv]);
        let there = blocks.chain([&self.active]).filter(|b| !b.is_host());
        there.map(|b| b.len() * size_of::<f32>()).sum()
    }

    /// Values in the active memory.
    pub fn active_len(&self) -> usize {
        self.active.len()
    }

    /// Takes the active memory of `other`.
    pub fn set_active(&mut self, other: &TrunkState) {
        self.active = Arc::clone(&other.active);
    }

    /// The same without an active memory.
    pub fn without_active(&self) -> TrunkState {
        TrunkState {
            active: Arc::default(),
            ..self.clone()
        }
    }

    /// Writes the state.
    pub fn save(&self, out: &mut crate::session::Encoder<'_>) -> std::io::Result<()> {
        let mut home = Vec::new();
        let mut write = |out: &mut crate::session::Encoder<'_>, buffer: &Buffer| {
            let values = buffer.read_with(&mut home);
            out.f32s(values.map_err(std::io::Error::other)?)
        };
        for block in &self.blocks {
            write(out, &block.state)?;
            write(out, &block.conv)?;
        }
        out.f32s(self.last.as_deref().unwrap_or(&[]))?;
        write(out, &self.active)
    }

    /// Reads what [`TrunkState::save`] wrote, into a state of the same model.
    pub fn restore(
        &mut self,
        from: &mut crate::session::Decoder<'_>,
        width: usize,
        device: &Device,
    ) -> std::io::Result<()> {
        let read = |from: &mut crate::session::Decoder<'_>, buffer: &mut Arc<Buffer>| {
            let mut values = vec![0.0; buffer.len()];
            from.f32s_into(&mut values)?;
            let values = device.upload(values).map_err(std::io::Error::other)?;
            *buffer = Arc::new(values);
            Ok::<_, std::io::Error>(())
        };
        for block in &mut self.blocks {
            read(from, &mut block.state)?;
            read(from, &mut block.conv)?;
        }
        let last = from.f32s()?;
        if !last.is_empty() && last.len() != width {
            return Err(std::io::Error::other(
                "the trunk's output has another width",
            ));
        }
        self.last = (!last.is_empty()).then(|| last.into());
        read(from, &mut self.active)
    }
}
