//! `nodes`: the stream is cut into segments; a closed segment leaves a node of a few slots and its
//! raw cells are freed. Semantics: docs/memory.md.
//!
//! Kept cells, in order: the sinks (the first `sinks` entries), then the slots of the nodes in the
//! order of the text. Raw cells are all other tokens.

mod fold;
mod rewind;
mod saved;

use super::decider::{Controller, Decider, sentence_ends_at, splitmix64};
use super::store::{Cell, Store};
use super::trunk::{NodeTensors, Stepped, TrunkState, TrunkStep};
use super::{Context, Entry, Memory, MemorySpec, NodeInfo, Plan, Source, Stats};
use crate::error::Result;
use crate::ops::{Buffer, Ops};
use crate::session::{Decoder, Encoder};
use fold::Folded;
use mneme_kernels::attend::Visible;
use std::io;
use std::sync::Arc;

/// Tokens per pass under the entropy rule, which learns of a cut only after the pass.
const ENTROPY_CHUNK: usize = 32;
/// Weight of the newest surprisal in the running mean and variance.
const ENTROPY_RATE: f32 = 1.0 / 64.0;

/// The dials of section 1 of docs/memory.md.
#[derive(Clone, Debug)]
struct Config {
    sinks: usize,
    window: usize,
    /// Positions return to the segment's start at a cut.
    compact: bool,
    /// A slot sees only sinks and slots.
    sees_nodes: bool,
    /// The active memory starts anew at each segment.
    reset: bool,
    tau: f32,
    min_segment: usize,
    max_segment: usize,
    top_k: usize,
    node_max: usize,
    fanin: usize,
    decider: Decider,
}

/// What a segment, or a run of nodes, left behind.
#[derive(Clone)]
struct Node {
    id: u64,
    level: u32,
    start: usize,
    end: usize,
    p: f32,
    children: Vec<u64>,
    /// The active memory's last readout, `[c]`: what consolidation folds.
    r: Box<[f32]>,
    /// First of its slots' positions.
    pos: u32,
    /// Slots that are kept cells of their own; fewer than all where slots are sinks.
    n_cells: usize,
}

/// The last token, which may yet turn out to end a segment.
#[derive(Clone)]
struct Last {
    id: u32,
    before: Option<u32>,
    /// Boundary probability; of the sentence rule unknown until the next token is.
    p: f32,
    r: Box<[f32]>,
}

/// Everything between two tokens but the cells.
#[derive(Clone)]
struct State {
    n_tokens: usize,
    n_entries: usize,
    pos: u32,
    /// First token, position and raw cell of the open segment, and how many sinks are in it.
    seg_start: usize,
    seg_pos: u32,
    seg_raw: u64,
    seg_sinks: u32,
    trunk: TrunkState,
    /// `None` at the start and after a cut that is done.
    last: Option<Last>,
    before: Option<u32>,
    control: Option<Controller>,
    next_id: u64,
    /// Closed segments: number, sum and sum of squares of their lengths, the longest.
    seg_count: u64,
    seg_sum: f64,
    seg_squares: f64,
    seg_longest: usize,
    /// Running mean and variance of surprisal, and the logits that predict the next token.
    surprisal: (f32, f32),
    logits: Vec<f32>,
}

/// A planned pass's consequences, taken over at commit.
struct Next {
    state: State,
    new_nodes: Vec<Node>,
    /// Nodes folded into the one new node.
    folded: Option<Folded>,
    /// The compressor's step over the pass's one token, where the pass is to run it.
    step: Option<Step>,
    /// New cells of either kind.
    n_kept: usize,
    n_raw: usize,
}

/// A token whose way through the compressor is the pass's work: nothing of it is asked for before
/// the next token comes.
struct Step {
    /// Whether the active memory starts anew before it.
    resets: bool,
    out: Stepped,
}

struct Nodes {
    ctx: Context,
    cfg: Config,
    store: Store,
    state: State,
    nodes: Vec<Node>,
    /// States to run forward from when tokens are taken back, oldest first; see `rewind`.
    checkpoints: Vec<Arc<State>>,
    next: Option<Next>,
    /// A state that nobody needs any more: the next pass's is written over it.
    spare: Option<TrunkState>,
}

pub(super) fn build(ctx: &Context, spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    let w = &ctx.weights;
    let Some(tensors) = &w.nodes else {
        return Err(spec.refuse(
            "the model has no compressor (`mem.in.weight` not found); convert a trained `nodes` \
             checkpoint or add one with --memory-adapter",
        ));
    };
    let file = w.memory_file_of("nodes");
    let number = |suffix: &str, default: usize| -> Result<usize> {
        let in_file = file.opt_u32(&w.memory_key(suffix))?;
        Ok(in_file.map_or(default, |n| n as usize))
    };
    let word = |suffix: &str, default: &str| -> Result<String> {
        let in_file = file.opt_str(&w.memory_key(suffix))?;
        Ok(in_file.unwrap_or(default).to_owned())
    };
    let choice = |key: &str, got: String, yes: &str, no: &str| match got {
        got if got == yes => Ok(true),
        got if got == no => Ok(false),
        got => Err(spec.refuse(format!("`{key}` is `{no}` or `{yes}`, got `{got}`"))),
    };
    let tau = file
        .opt_f32(&w.memory_key("decider.threshold"))?
        .unwrap_or(0.5);
    let position: String = spec.get("position", word("position", "keep")?)?;
    let sees: String = spec.get("sees", word("node.sees", "segment")?)?;
    let reset: String = spec.get("reset", word("reset", "cut")?)?;
    let cfg = Config {
        sinks: spec.get("sinks", number("sinks", 0)?)?,
        window: spec.get("window", number("window", 0)?)?,
        compact: choice("position", position, "compact", "keep")?,
        sees_nodes: choice("sees", sees, "nodes", "segment")?,
        reset: choice("reset", reset, "cut", "never")?,
        tau: spec.get("tau", tau)?,
        min_segment: spec.get("min", number("decider.min_segment", 1)?)?,
        max_segment: spec.get("max", number("decider.max_segment", 64)?)?,
        top_k: spec.get("top_k", number("node.top_k", 0)?)?,
        node_max: spec.get("node_max", number("node.max", 0)?)?,
        fanin: spec.get("fanin", number("node.fanin", 4)?)?,
        decider: Decider::parse(ctx, spec)?,
    };
    if cfg.compact && cfg.window > 0 {
        return Err(spec.refuse(format!(
            "position compact needs window 0, got {}: raw tokens outside their segment would share \
             positions with later ones",
            cfg.window
        )));
    }
    if cfg.max_segment == 0 || cfg.min_segment > cfg.max_segment {
        return Err(spec.refuse(format!(
            "segments of {}..={} tokens are impossible",
            cfg.min_segment, cfg.max_segment
        )));
    }
    if cfg.node_max > 0 && (cfg.fanin < 2 || cfg.node_max < tensors.n_slots) {
        return Err(spec.refuse(format!(
            "node_max {} needs fanin of at least 2 (got {}) and room for one node of {} slots",
            cfg.node_max, cfg.fanin, tensors.n_slots
        )));
    }
    if cfg.sees_nodes && matches!(cfg.decider, Decider::Entropy { .. }) {
        tracing::debug!(
            "the entropy rule needs every token's logits: closed segments are not skipped"
        );
    }
    let target = spec.get("target_rate", 0.0)?;
    if target < 0.0 {
        return Err(spec.refuse("`target_rate` must be positive"));
    }
    let mut memory = Nodes {
        store: ctx.store(),
        state: State::start(tensors, None),
        nodes: Vec::new(),
        checkpoints: Vec::new(),
        next: None,
        spare: None,
        ctx: ctx.clone(),
        cfg,
    };
    if target > 0.0 {
        memory
            .set("target_rate", target)
            .map_err(|e| spec.refuse(e))?;
    }
    Ok(Box::new(memory))
}

impl State {
    /// Before the first token.
    fn start(tensors: &NodeTensors, control: Option<Controller>) -> State {
        State {
            n_tokens: 0,
            n_entries: 0,
            pos: 0,
            seg_start: 0,
            seg_pos: 0,
            seg_raw: 0,
            seg_sinks: 0,
            trunk: tensors.start(),
            last: None,
            before: None,
            control,
            next_id: 0,
            seg_count: 0,
            seg_sum: 0.0,
            seg_squares: 0.0,
            seg_longest: 0,
            surprisal: (0.0, 0.0),
            logits: Vec::new(),
        }
    }

    /// Whether the segment that ends with the last token is closed now that `next` arrives.
    fn cuts(&mut self, ctx: &Context, cfg: &Config, next: u32) -> bool {
        let len = self.n_tokens - self.seg_start;
        let Some(last) = &mut self.last else {
            return false;
        };
        match cfg.decider {
            Decider::Sentence => {
                let ends = sentence_ends_at(&*ctx.pieces, last.before, last.id, next);
                last.p = f32::from(u8::from(ends));
            }
            Decider::Stride(n) => last.p = f32::from(u8::from(len >= n)),
            Decider::Random { rate, seed } => {
                let coin = splitmix64(seed, self.n_tokens as u64 - 1);
                last.p = f32::from(u8::from(coin < rate));
            }
            Decider::Trained | Decider::Entropy { .. } => {}
        }
        let tau = self.control.map_or(cfg.tau, |c| c.tau(cfg.tau));
        len >= cfg.max_segment || (len >= cfg.min_segment && last.p > tau)
    }

    /// The open segment has left its `n_slots` entries; the next begins at raw cell `seg_raw`.
    fn close(&mut self, n_slots: usize, seg_raw: u64) {
        let len = self.n_tokens - self.seg_start;
        self.next_id += 1;
        self.seg_count += 1;
        self.seg_sum += len as f64;
        self.seg_squares += (len * len) as f64;
        self.seg_longest = self.seg_longest.max(len);
        self.seg_start = self.n_tokens;
        self.seg_pos = self.pos;
        self.seg_raw = seg_raw;
        self.seg_sinks = 0;
        if let Some(control) = &mut self.control {
            control.cut(n_slots);
        }
    }

    /// One more token has become an entry.
    fn take(&mut self, id: u32, p: f32, r: Box<[f32]>) {
        self.pos += 1;
        self.n_entries += 1;
        self.last = Some(Last {
            id,
            before: self.before,
            p,
            r,
        });
        self.before = Some(id);
        self.n_tokens += 1;
        if let Some(control) = &mut self.control {
            control.token();
        }
    }
}

impl Nodes {
    fn tensors(&self) -> &NodeTensors {
        let nodes = self.ctx.weights.nodes.as_ref();
        nodes.expect("build refuses models without a compressor")
    }

    /// Kept cells that are sinks.
    fn n_sinks(&self) -> usize {
        self.state.n_entries.min(self.cfg.sinks)
    }

    /// First raw cell any later entry may see.
    fn first_seen(&self) -> u64 {
        let window = self.store.raw_end().saturating_sub(self.cfg.window as u64);
        self.state.seg_raw.min(window)
    }

    /// A state to be written over.
    fn take_spare(&mut self) -> TrunkState {
        let spare = self.spare.take();
        spare.unwrap_or_else(|| self.tensors().start())
    }

    /// The pass over `tokens`; stops before a token whose arrival closes a segment that overfills
    /// the nodes. The state of the compressor afterwards is written over `trunk`: here, or with
    /// `alone`, which says that there is one token only, by the pass.
    fn plan_tokens(
        &self,
        ops: &dyn Ops,
        tokens: &[u32],
        skip: bool,
        alone: bool,
        mut trunk: TrunkState,
    ) -> Result<(Plan, Next)> {
        let (tensors, cfg) = (self.tensors(), &self.cfg);
        let (c, n_slots) = (tensors.width, tensors.n_slots);
        let embd = &self.ctx.weights.token_embd;
        let mut state = self.state.clone();
        let before = &self.state.trunk;
        let s = &mut *tensors.scratch();

        // The trunk, and with it every probability. Of other rules than a trained one they are known
        // when the next token is, or after the pass.
        let decides = cfg.decider == Decider::Trained;
        let p = match alone {
            true => Vec::new(),
            false => tensors.read(ops, s, before, &mut trunk, embd, tokens, decides)?,
        };

        // Which tokens open a segment.
        let mut scan = state.clone();
        let mut opens = vec![false; tokens.len()];
        let mut verdicts = vec![0.0; tokens.len()];
        let mut n_nodes = self.nodes.len();
        let mut stop = None;
        for (i, &id) in tokens.iter().enumerate() {
            if scan.cuts(&self.ctx, cfg, id) {
                opens[i] = true;
                verdicts[i] = scan.last.as_ref().map_or(0.0, |last| last.p);
                n_nodes += 1;
                scan.seg_start = scan.n_tokens;
                if let Some(control) = &mut scan.control {
                    control.cut(n_slots);
                }
                if cfg.node_max > 0 && n_nodes * n_slots > cfg.node_max && n_nodes > 1 {
                    stop = Some(i);
                    break;
                }
            }
            scan.last = Some(Last {
                id,
                before: scan.before,
                p: p.get(i).copied().unwrap_or(0.0),
                r: Box::default(),
            });
            scan.before = Some(id);
            scan.n_tokens += 1;
            if let Some(control) = &mut scan.control {
                control.token();
            }
        }
        let n = stop.unwrap_or(tokens.len());
        if n < tokens.len() {
            // The tokens behind the stop come again: the trunk must not have read them.
            tensors.read(ops, s, before, &mut trunk, embd, &tokens[..n], false)?;
        }

        // The active memory over the tokens taken.
        let resets: Vec<usize> = (0..n).filter(|&i| opens[i] && cfg.reset).collect();
        let step = (alone && n == 1).then(|| Step {
            resets: !resets.is_empty(),
            out: Stepped::default(),
        });
        let r = match step {
            Some(_) => {
                trunk.own(ops.of_layer(0).device(), before)?;
                &[]
            }
            None => tensors.fold(ops, s, before, &mut trunk, n, &resets)?,
        };
        if stop.is_some() && cfg.reset {
            trunk.set_active(&tensors.start());
        }
        state.trunk = trunk;

        // Rows: slots before each token that opens a segment, then the token.
        let mut plan = Plan {
            n_tokens: n,
            ..Plan::default()
        };
        let mut new_nodes = Vec::new();
        let (mut kept, mut raw) = (0, 0);
        let (n_kept, raw_end) = (self.store.n_kept(), self.store.raw_end());
        let last_open = (0..tokens.len().min(n + 1)).rev().find(|&i| opens[i]);
        for i in 0..=n {
            if i < tokens.len() && opens[i] {
                let mut last = state.last.take().expect("a cut follows a token");
                last.p = verdicts[i];
                if cfg.compact {
                    state.pos = state.seg_pos + state.seg_sinks;
                }
                let pos = state.pos;
                let mut n_cells = 0;
                for _ in 0..n_slots {
                    let sink = state.n_entries < cfg.sinks;
                    n_cells += usize::from(!sink);
                    let end = raw_end + raw as u64;
                    let window = end.saturating_sub(cfg.window as u64);
                    plan.entries.push(Entry {
                        source: Source::Slot,
                        token: None,
                        pos: state.pos,
                        cell: Cell::Kept(kept),
                        visible: Visible {
                            n_kept: (n_kept + kept + 1) as u32,
                            raw_begin: if cfg.sees_nodes {
                                end
                            } else {
                                state.seg_raw.min(window)
                            },
                            raw_end: end,
                        },
                    });
                    kept += 1;
                    state.pos += 1;
                    state.n_entries += 1;
                }
                new_nodes.push(Node {
                    id: state.next_id,
                    level: 0,
                    start: state.seg_start,
                    end: state.n_tokens,
                    p: last.p,
                    children: Vec::new(),
                    r: last.r.clone(),
                    pos,
                    n_cells,
                });
                plan.readouts.extend_from_slice(&last.r);
                state.close(n_slots, raw_end + raw as u64);
            }
            if i == n {
                break;
            }
            let sink = state.n_entries < cfg.sinks;
            let cell = if sink {
                state.seg_sinks += 1;
                kept += 1;
                Some(Cell::Kept(kept - 1))
            } else if skip && last_open.is_some_and(|open| i < open) {
                None
            } else {
                raw += 1;
                Some(Cell::Raw(raw - 1))
            };
            if let Some(cell) = cell {
                let end = raw_end + raw as u64;
                let me = end - u64::from(!sink);
                let window = me.saturating_sub(cfg.window as u64);
                plan.entries.push(Entry {
                    source: Source::Token(tokens[i]),
                    token: Some(i),
                    pos: state.pos,
                    cell,
                    visible: Visible {
                        n_kept: (n_kept + kept) as u32,
                        raw_begin: state.seg_raw.min(window),
                        raw_end: end,
                    },
                });
            }
            let p = p.get(i).copied().unwrap_or(0.0);
            let r = r.get(i * c..(i + 1) * c).unwrap_or_default();
            state.take(tokens[i], p, r.into());
        }
        let next = Next {
            state,
            new_nodes,
            folded: None,
            step,
            n_kept: kept,
            n_raw: raw,
        };
        Ok((plan, next))
    }

    /// Under the entropy rule: how many of the pass's tokens stand, given their logits `[n,
    /// n_vocab]`: up to the first whose surprisal calls for a cut. Leaves that token's probability
    /// and the running statistics in `state`.
    fn surprise(
        &self,
        sigma: f32,
        plan: &Plan,
        tokens: &[u32],
        logits: &[f32],
        state: &mut State,
    ) -> (usize, f32) {
        let n_vocab = self.ctx.weights.hparams.n_vocab;
        let opened = plan.entries.first().is_some_and(|e| e.token.is_none());
        let mut len = match opened {
            true => 0,
            false => self.state.n_tokens - self.state.seg_start,
        };
        let mut p = 0.0;
        for (i, &id) in tokens.iter().enumerate() {
            let row = match i {
                0 => &self.state.logits[..],
                _ => &logits[(i - 1) * n_vocab..i * n_vocab],
            };
            let (mean, var) = state.surprisal;
            p = 0.0;
            if !row.is_empty() {
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = row.iter().map(|l| (l - max).exp()).sum();
                let s = max + sum.ln() - row[id as usize];
                p = f32::from(u8::from(var > 0.0 && s > mean + sigma * var.sqrt()));
                let rate = if var > 0.0 { ENTROPY_RATE } else { 1.0 };
                let d = s - mean;
                state.surprisal = (
                    mean + rate * d,
                    ((1.0 - rate) * (var + rate * d * d)).max(1e-3),
                );
            }
            len += 1;
            let cut =
                len >= self.cfg.max_segment || (len >= self.cfg.min_segment && p > self.cfg.tau);
            if cut {
                state.logits = logits[i * n_vocab..(i + 1) * n_vocab].to_vec();
                return (i + 1, p);
            }
        }
        let n = tokens.len();
        state.logits = logits[(n - 1) * n_vocab..].to_vec();
        (n, p)
    }
}

impl Memory for Nodes {
    fn name(&self) -> &'static str {
        "nodes"
    }

    fn plan(&mut self, ops: &dyn Ops, tokens: &[u32], wanted: bool) -> Result<Plan> {
        if let Some(next) = self.next.take() {
            // A pass that was planned and not run.
            self.spare.get_or_insert(next.state.trunk);
        }
        if self.is_full() {
            return self.plan_fold(ops);
        }
        let reads_logits = self.reads_logits();
        let tokens = match reads_logits {
            // A cut in the middle of the chunk may already be due before its first token.
            true => &tokens[..tokens.len().min(ENTROPY_CHUNK)],
            false => tokens,
        };
        let skip = self.cfg.sees_nodes && self.cfg.window == 0 && !wanted && !reads_logits;
        let spare = self.take_spare();
        let alone = tokens.len() == 1;
        let (plan, next) = self.plan_tokens(ops, tokens, skip, alone, spare)?;
        self.ctx.check_room(&self.store, plan.entries.len())?;
        self.next = Some(next);
        Ok(plan)
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    fn ranking(&self) -> (u32, u32) {
        // A consolidated slot reads every node.
        let folding = self.next.as_ref().is_some_and(|n| n.folded.is_some());
        match folding {
            true => (0, 0),
            false => (self.cfg.sinks as u32, self.cfg.top_k as u32),
        }
    }

    fn trunk_step(&mut self) -> Option<TrunkStep<'_>> {
        let next = self.next.as_mut()?;
        let step = next.step.as_mut()?;
        Some(TrunkStep {
            from: &self.state.trunk,
            to: &mut next.state.trunk,
            resets: step.resets,
            decides: self.cfg.decider == Decider::Trained,
            out: &mut step.out,
        })
    }

    fn buffers(&self) -> Vec<&Buffer> {
        let next = self.next.as_ref();
        let Some((next, step)) = next.and_then(|next| Some((next, next.step.as_ref()?))) else {
            return Vec::new();
        };
        let states = self.state.trunk.buffers().chain(next.state.trunk.buffers());
        let anew = step.resets.then(|| self.tensors().start_of_segment());
        states.chain(anew).collect()
    }

    fn reads_logits(&self) -> bool {
        matches!(self.cfg.decider, Decider::Entropy { .. })
    }

    fn commit(
        &mut self,
        ops: &dyn Ops,
        plan: &Plan,
        tokens: &[u32],
        logits: Option<&[f32]>,
    ) -> Result<usize> {
        let mut next = self.next.take().expect("commit follows plan");
        let mut n_tokens = plan.n_tokens;
        if let (Some(step), Some(last)) = (next.step.take(), &mut next.state.last) {
            (last.p, last.r) = (step.out.p, step.out.r);
        }
        if let (Decider::Entropy { sigma }, Some(logits), true) =
            (&self.cfg.decider, logits, n_tokens > 0)
        {
            let mut state = self.state.clone();
            let (taken, p) = self.surprise(*sigma, plan, &tokens[..n_tokens], logits, &mut state);
            if taken < n_tokens {
                // Cells past `taken` were written but do not count: plan the prefix again for its
                // states; its rows are the same rows.
                let trunk = next.state.trunk;
                let planned = self.plan_tokens(ops, &tokens[..taken], false, false, trunk);
                next = planned?.1;
                n_tokens = taken;
            }
            next.state.surprisal = state.surprisal;
            next.state.logits = state.logits;
            if let Some(last) = &mut next.state.last {
                last.p = p;
            }
        }
        self.store.commit(next.n_kept, next.n_raw);
        match next.folded {
            None => self.nodes.extend(next.new_nodes),
            Some(Folded { first, n, kept }) => {
                self.store.rearrange_kept(ops, kept);
                self.nodes.splice(first..first + n, next.new_nodes);
            }
        }
        let before = std::mem::replace(&mut self.state, next.state);
        self.spare.get_or_insert(before.trunk);
        let first_seen = self.first_seen();
        self.store.release_raw(first_seen, |_| true);
        self.keep_checkpoint();
        Ok(n_tokens)
    }

    fn truncate(&mut self, ops: &dyn Ops, tokens: &[u32], n: usize) -> usize {
        if n >= self.state.n_tokens {
            return self.state.n_tokens;
        }
        if let Some(held) = self.rewind(ops, tokens, n) {
            return held;
        }
        self.state = State::start(
            self.tensors(),
            self.state.control.map(|c| Controller::new(c.target)),
        );
        self.nodes.clear();
        self.checkpoints.clear();
        self.store.clear();
        0
    }

    fn fork(&self) -> Box<dyn Memory> {
        Box::new(Nodes {
            ctx: self.ctx.clone(),
            cfg: self.cfg.clone(),
            store: self.store.clone(),
            state: self.state.clone(),
            nodes: self.nodes.clone(),
            checkpoints: self.checkpoints.clone(),
            next: None,
            spare: None,
        })
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        self.state.save(out)?;
        out.u64(self.nodes.len() as u64)?;
        for node in &self.nodes {
            node.save(out)?;
        }
        self.save_checkpoints(out)?;
        self.store.save(out)
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        let width = self.tensors().width;
        self.state.restore(from, &self.ctx, width)?;
        let n = from.u64()?;
        if n > self.ctx.n_ctx as u64 {
            return Err(io::Error::other(format!(
                "{n} nodes do not fit the context"
            )));
        }
        self.nodes = (0..n)
            .map(|_| Node::restore(from, width))
            .collect::<io::Result<_>>()?;
        self.restore_checkpoints(from)?;
        self.store.restore(from, self.ctx.n_ctx)?;
        let slots: usize = self.nodes.iter().map(|n| n.n_cells).sum();
        let ends = || self.nodes.iter().map(|n| n.end);
        let sound = self.store.n_kept() == self.n_sinks() + slots
            && ends().is_sorted_by(|a, b| a < b)
            && ends().all(|end| end <= self.state.n_tokens)
            && self.state.seg_start <= self.state.n_tokens
            && self.state.seg_raw <= self.store.raw_end()
            && self.store.raw_begin() <= self.first_seen()
            && self
                .nodes
                .iter()
                .all(|n| n.n_cells <= self.tensors().n_slots);
        if sound {
            Ok(())
        } else {
            Err(io::Error::other("the nodes do not match the cells"))
        }
    }

    fn stats(&self) -> Stats {
        let s = &self.state;
        let n_cells = self.store.n_cells();
        let width = self.tensors().width * size_of::<f32>();
        let state_bytes = s.trunk.bytes()
            + (s.trunk.active_len() + s.logits.len()) * size_of::<f32>()
            + self.nodes.len() * (size_of::<Node>() + width)
            + self.checkpoints.len() * self.checkpoint_bytes();
        let states = std::iter::once(s).chain(self.checkpoints.iter().map(|c| &**c));
        let held_raw = (self.store.raw_end() - self.first_seen()) as usize;
        let slots = s.seg_count as f64 * self.tensors().n_slots as f64;
        let mean = s.seg_sum / s.seg_count.max(1) as f64;
        let var = s.seg_squares / s.seg_count.max(1) as f64 - mean * mean;
        Stats {
            name: "nodes",
            n_tokens: s.n_tokens,
            n_entries: s.n_entries,
            n_cells,
            n_dropped: s.n_tokens.saturating_sub(held_raw + self.n_sinks()),
            n_nodes: self.nodes.len(),
            n_slots: self.nodes.len() * self.tensors().n_slots,
            cell_bytes: self.store.bytes(),
            state_bytes,
            card_bytes: self.store.card_bytes()
                + states.map(|s| s.trunk.card_bytes()).sum::<usize>(),
            full_bytes: s.n_tokens * self.ctx.cell_bytes(),
            bound_bytes: self.ctx.page_bound(n_cells + 1 + self.tensors().n_slots, 2)
                + state_bytes
                + size_of::<Node>()
                + width
                + self.checkpoint_bytes(),
            rate: if slots > 0.0 { s.seg_sum / slots } else { 0.0 },
            rate_spread: if s.seg_count > 1 {
                var.max(0.0).sqrt() / mean
            } else {
                0.0
            },
            longest_segment: s.seg_longest.max(s.n_tokens - s.seg_start),
            tau: Some(s.control.map_or(self.cfg.tau, |c| c.tau(self.cfg.tau))),
        }
    }

    fn nodes(&self) -> Vec<NodeInfo> {
        let cell = self.ctx.cell_bytes();
        let info = |n: &Node| NodeInfo {
            id: n.id,
            level: n.level,
            start: n.start,
            end: n.end,
            p: n.p,
            children: n.children.clone(),
            bytes: cell * self.tensors().n_slots,
        };
        self.nodes.iter().map(info).collect()
    }

    fn set(&mut self, dial: &str, value: f64) -> std::result::Result<(), String> {
        match dial {
            "tau" if (0.0..=1.0).contains(&value) => {
                self.cfg.tau = value as f32;
                self.state.control = None;
                for checkpoint in &mut self.checkpoints {
                    Arc::make_mut(checkpoint).control = None;
                }
            }
            "tau" => return Err(format!("tau {value} is outside 0..=1")),
            "target_rate" if value > 0.0 && value.is_finite() => {
                let control = Some(Controller::new(value));
                self.state.control = control;
                for checkpoint in &mut self.checkpoints {
                    Arc::make_mut(checkpoint).control = control;
                }
                if self.state.n_tokens > 0 {
                    self.push_checkpoint();
                }
            }
            "target_rate" => return Err(format!("target_rate {value} is not positive")),
            _ => {
                return Err(format!(
                    "the nodes memory has no dial `{dial}`; it has tau and target_rate"
                ));
            }
        }
        Ok(())
    }
}
