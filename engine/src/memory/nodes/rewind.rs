//! Taking tokens back: to the last cut before them, exactly.
//!
//! Node cells are still there and a closed segment's raw cells are not needed any more, so all that
//! must be had again is the state between two tokens. It depends on tokens and cuts alone: it is run
//! forward from a checkpoint through the trunk, without the model, and what is read again by the
//! model is the rest of one segment.

use super::{Controller, Nodes, State};
use crate::error::Result;
use crate::memory::Memory;
use crate::ops::Ops;
use crate::session::{Decoder, Encoder};
use std::io;
use std::sync::Arc;

/// Tokens between two checkpoints at least. The trunk reads as many in a fraction of a second; a
/// checkpoint takes as much as some nodes.
const SPACING: usize = 16384;
/// Checkpoints kept: past it every other one goes, and those to come stand twice as far apart.
const MOST: usize = 4;
/// Tokens run forward at a time.
const STRIDE: usize = 512;

impl Nodes {
    /// Whether the state is a matter of tokens and cuts, and cells of closed segments are not read.
    fn can_rewind(&self) -> bool {
        let cfg = &self.cfg;
        cfg.window == 0 && cfg.reset && cfg.node_max == 0 && !self.reads_logits()
    }

    /// Bytes of one checkpoint.
    pub(super) fn checkpoint_bytes(&self) -> usize {
        size_of::<State>() + self.state.trunk.bytes() + self.tensors().width * size_of::<f32>()
    }

    /// Keeps the present state if it is far enough from the last one kept.
    pub(super) fn keep_checkpoint(&mut self) {
        let at = |c: Option<&Arc<State>>| c.map_or(0, |c| c.n_tokens);
        let spacing = at(self.checkpoints.first()).max(SPACING);
        if self.state.n_tokens >= at(self.checkpoints.last()) + spacing {
            self.push_checkpoint();
        }
    }

    /// Keeps the present state, where tokens can be taken back at all.
    pub(super) fn push_checkpoint(&mut self) {
        if !self.can_rewind() {
            return;
        }
        if self.checkpoints.len() == MOST {
            let mut nth = 0;
            self.checkpoints.retain(|_| {
                nth += 1;
                nth % 2 == 0
            });
        }
        let mut state = self.state.clone();
        // The active memory is empty at every cut: it need not be kept.
        state.trunk = state.trunk.without_active();
        self.checkpoints.push(Arc::new(state));
    }

    /// Goes back to the last cut that at least one of the first `n` of `tokens` follows; returns how
    /// many tokens that is. `None` where the way back is not known, or the device fails; then nothing
    /// has changed.
    pub(super) fn rewind(&mut self, ops: &dyn Ops, tokens: &[u32], n: usize) -> Option<usize> {
        let n_nodes = self.nodes.partition_point(|node| node.end < n);
        if !self.can_rewind() || n_nodes == 0 {
            return None;
        }
        let held = self.nodes[n_nodes - 1].end;
        let checkpoint = self.checkpoints.iter().rfind(|c| c.n_tokens <= held);
        let mut state = match checkpoint {
            Some(checkpoint) => State::clone(checkpoint),
            None => State::start(
                self.tensors(),
                self.state.control.map(|c| Controller::new(c.target)),
            ),
        };
        let run = self.run_forward(ops, &mut state, tokens.get(..held)?, n_nodes);
        if let Err(e) = run {
            tracing::warn!("the state of {held} tokens is not had again: {e}");
            return None;
        }
        state.trunk.set_active(&self.tensors().start());
        self.nodes.truncate(n_nodes);
        let slots: usize = self.nodes.iter().map(|node| node.n_cells).sum();
        let n_kept = state.n_entries.min(self.cfg.sinks) + slots;
        // Where closed segments were skipped fewer cells were written than tokens read.
        state.seg_raw = state.seg_raw.min(self.store.raw_end());
        self.store
            .rewind(n_kept.min(self.store.n_kept()), state.seg_raw);
        self.checkpoints.retain(|c| c.n_tokens <= held);
        self.state = state;
        Some(held)
    }

    /// Moves `state` to the end of `tokens`, where the last of the first `n_nodes` nodes was cut off.
    fn run_forward(
        &self,
        ops: &dyn Ops,
        state: &mut State,
        tokens: &[u32],
        n_nodes: usize,
    ) -> Result<()> {
        let (tensors, embd) = (self.tensors(), &self.ctx.weights.token_embd);
        let (s, mut next) = (&mut *tensors.scratch(), tensors.start());
        for part in tokens[state.n_tokens..].chunks(STRIDE) {
            tensors.read(ops, s, &state.trunk, &mut next, embd, part, false)?;
            std::mem::swap(&mut state.trunk, &mut next);
        }
        let mut cuts = self.nodes[..n_nodes].iter().map(|node| node.end);
        let mut next_cut = cuts
            .find(|&end| end > state.n_tokens || (end == state.n_tokens && state.last.is_some()));
        while let Some(cut) = next_cut {
            for &id in &tokens[state.n_tokens..cut] {
                state.seg_sinks += u32::from(state.n_entries < self.cfg.sinks);
                state.take(id, 0.0, Box::default());
            }
            state.last = None;
            if self.cfg.compact {
                state.pos = state.seg_pos + state.seg_sinks;
            }
            state.pos += tensors.n_slots as u32;
            state.n_entries += tensors.n_slots;
            let n_raw = cut - state.seg_start - state.seg_sinks as usize;
            state.close(tensors.n_slots, state.seg_raw + n_raw as u64);
            next_cut = cuts.next();
        }
        Ok(())
    }

    pub(super) fn save_checkpoints(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        out.u64(self.checkpoints.len() as u64)?;
        self.checkpoints.iter().try_for_each(|c| c.save(out))
    }

    pub(super) fn restore_checkpoints(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        let width = self.tensors().width;
        self.checkpoints.clear();
        let mut before = 0;
        for _ in 0..from.u64()? {
            let mut state = State::start(self.tensors(), None);
            state.trunk = state.trunk.without_active();
            state.restore(from, &self.ctx, width)?;
            let now = &self.state;
            let in_order = (before..=now.n_tokens).contains(&state.n_tokens)
                && state.n_entries <= now.n_entries
                && state.seg_raw <= now.seg_raw
                && (state.seg_start.checked_add(state.seg_sinks as usize))
                    .is_some_and(|first| first <= state.n_tokens);
            if !in_order {
                return Err(io::Error::other(
                    "the states to go back to are out of order",
                ));
            }
            before = state.n_tokens;
            self.checkpoints.push(Arc::new(state));
        }
        Ok(())
    }
}
