//! `gist`: learned gist tokens after each sentence stand for it (Sentence-Anchored Gist
//! Compression, arXiv 2511.08128). The gist tokens are part of the text; a run of them closes a
//! segment, and the next ordinary token frees the segment's cells.

use super::store::{Cell, Store};
use super::{Context, Entry, Memory, MemorySpec, NodeInfo, Plan, Source, Stats};
use crate::error::Result;
use crate::ops::Ops;
use crate::session::{Decoder, Encoder};
use mneme_kernels::attend::Visible;
use std::io;

#[derive(Clone)]
struct Gist {
    ctx: Context,
    store: Store,
    /// Gist tokens of a node in order, `tokenizer.ggml.gist_token_ids`.
    ids: Vec<u32>,
    /// First entries always seen.
    sinks: usize,
    /// Raw tokens of closed segments still seen.
    window: usize,
    bos: Option<u32>,
    keep_bos: bool,
    at: At,
}

/// Where the stream stands.
#[derive(Clone, Default)]
struct At {
    n_tokens: usize,
    n_sinks: usize,
    /// First token and raw cell of the open segment.
    seg_start: usize,
    seg_raw: u64,
    last: Option<u32>,
    nodes: Vec<(usize, usize)>,
}

pub(super) fn build(ctx: &Context, spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    let w = &ctx.weights;
    let file = w.memory_file_of("gist");
    let ids = file
        .opt_arr_u32("tokenizer.ggml.gist_token_ids")?
        .unwrap_or_default();
    if ids.is_empty() {
        return Err(spec.refuse(
            "the model has no gist tokens (key `tokenizer.ggml.gist_token_ids` not found)",
        ));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= w.hparams.n_vocab) {
        return Err(spec.refuse(format!(
            "gist token {id} is outside the vocabulary of {}",
            w.hparams.n_vocab
        )));
    }
    let in_file = file
        .opt_bool(&w.memory_key("gist.keep_bos"))?
        .unwrap_or(true);
    let number = |suffix| -> Result<usize> {
        Ok(file.opt_u32(&w.memory_key(suffix))?.unwrap_or(0) as usize)
    };
    Ok(Box::new(Gist {
        store: ctx.store(),
        ids,
        sinks: number("sinks")?,
        window: number("window")?,
        bos: w.gguf.opt_u32("tokenizer.ggml.bos_token_id")?,
        keep_bos: spec.get("keep_bos", in_file)?,
        at: At::default(),
        ctx: ctx.clone(),
    }))
}

impl Gist {
    /// Where the stream stands after `tokens`, and the entries they become.
    fn walk(&self, tokens: &[u32]) -> (At, Plan) {
        let mut at = self.at.clone();
        let (mut kept, mut raw) = (0, 0);
        let (n_kept, raw_end) = (self.store.n_kept(), self.store.raw_end());
        let mut plan = Plan {
            n_tokens: tokens.len(),
            ..Plan::default()
        };
        for (i, &id) in tokens.iter().enumerate() {
            let gist = self.ids.contains(&id);
            let after_gist = at.last.is_some_and(|l| self.ids.contains(&l));
            if gist && !after_gist && at.n_tokens > 0 {
                at.nodes.push((at.seg_start, at.n_tokens));
            }
            if !gist && after_gist {
                at.seg_start = at.n_tokens;
                at.seg_raw = raw_end + raw as u64;
            }
            let first_bos = self.keep_bos && at.n_tokens == 0 && self.bos == Some(id);
            let sink = at.n_tokens < self.sinks || first_bos;
            at.n_sinks += usize::from(sink);
            let cell = if sink || gist {
                kept += 1;
                Cell::Kept(kept - 1)
            } else {
                raw += 1;
                Cell::Raw(raw - 1)
            };
            let end = raw_end + raw as u64;
            let me = end - u64::from(matches!(cell, Cell::Raw(_)));
            plan.entries.push(Entry {
                source: Source::Token(id),
                token: Some(i),
                pos: at.n_tokens as u32,
                cell,
                visible: Visible {
                    n_kept: (n_kept + kept) as u32,
                    raw_begin: at.seg_raw.min(me.saturating_sub(self.window as u64)),
                    raw_end: end,
                },
            });
            at.n_tokens += 1;
            at.last = Some(id);
        }
        (at, plan)
    }

    /// Where the stream stood after the last whole group of gist tokens within the first `n` of
    /// `tokens`, and the kept cells of then. No later entry sees a raw cell of before.
    fn before_segment(&self, tokens: &[u32], n: usize) -> Option<(At, usize)> {
        if self.window > 0 {
            return None;
        }
        let gist = |i: usize| self.ids.contains(&tokens[i]);
        let last = *self.ids.last()?;
        let after_group = |&i: &usize| tokens[i - 1] == last && !gist(i);
        let n_tokens = (1..=n).rev().find(after_group)?;
        let is_sink =
            |i: usize| i < self.sinks || (i == 0 && self.keep_bos && self.bos == Some(tokens[0]));
        let n_kept = (0..n_tokens).filter(|&i| is_sink(i) || gist(i)).count();
        let n_nodes = self.at.nodes.partition_point(|&(_, end)| end < n_tokens);
        let nodes = self.at.nodes[..n_nodes].to_vec();
        let at = At {
            n_tokens,
            n_sinks: (0..n_tokens).filter(|&i| is_sink(i)).count(),
            seg_start: nodes.last()?.0,
            seg_raw: (n_tokens - n_kept) as u64,
            last: Some(last),
            nodes,
        };
        Some((at, n_kept))
    }

    /// First raw cell any later entry may see.
    fn first_seen(&self) -> u64 {
        let open = self.at.last.is_none_or(|l| !self.ids.contains(&l));
        let end = self.store.raw_end();
        let seg = if open || self.forced_next().is_some() {
            self.at.seg_raw
        } else {
            end
        };
        seg.min(end.saturating_sub(self.window as u64))
    }
}

impl Memory for Gist {
    fn name(&self) -> &'static str {
        "gist"
    }

    fn plan(&mut self, _ops: &dyn Ops, tokens: &[u32], _wanted: bool) -> Result<Plan> {
        self.ctx.check_room(&self.store, tokens.len())?;
        Ok(self.walk(tokens).1)
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    fn ranking(&self) -> (u32, u32) {
        (self.at.n_sinks as u32, 0)
    }

    fn commit(
        &mut self,
        _: &dyn Ops,
        plan: &Plan,
        tokens: &[u32],
        _: Option<&[f32]>,
    ) -> Result<usize> {
        self.at = self.walk(&tokens[..plan.n_tokens]).0;
        let (kept, raw) = plan.n_cells();
        self.store.commit(kept, raw);
        let first_seen = self.first_seen();
        self.store.release_raw(first_seen, |_| true);
        Ok(plan.n_tokens)
    }

    fn truncate(&mut self, _: &dyn Ops, tokens: &[u32], n: usize) -> usize {
        if n >= self.at.n_tokens {
            return self.at.n_tokens;
        }
        match self.before_segment(tokens, n) {
            Some((at, n_kept)) => {
                self.store.rewind(n_kept, at.seg_raw);
                self.at = at;
            }
            None => {
                self.at = At::default();
                self.store.clear();
            }
        }
        self.at.n_tokens
    }

    fn fork(&self) -> Box<dyn Memory> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        let at = &self.at;
        for n in [at.n_tokens, at.n_sinks, at.seg_start] {
            out.u64(n as u64)?;
        }
        out.u64(at.seg_raw)?;
        out.u64(at.last.map_or(0, |l| u64::from(l) + 1))?;
        out.u64(at.nodes.len() as u64)?;
        for &(start, end) in &at.nodes {
            out.u64(start as u64)?;
            out.u64(end as u64)?;
        }
        self.store.save(out)
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        let mut at = At {
            n_tokens: from.u64()? as usize,
            n_sinks: from.u64()? as usize,
            seg_start: from.u64()? as usize,
            seg_raw: from.u64()?,
            last: from.u64()?.checked_sub(1).map(|l| l as u32),
            nodes: Vec::new(),
        };
        for _ in 0..from.u64()? {
            at.nodes.push((from.u64()? as usize, from.u64()? as usize));
        }
        self.store.restore(from, self.ctx.n_ctx)?;
        self.at = at;
        if self.at.seg_raw > self.store.raw_end() || self.store.raw_begin() > self.first_seen() {
            return Err(io::Error::other("the segments do not match the cells"));
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let n_cells = self.store.n_cells();
        let slots = self.store.n_kept() - self.at.n_sinks.min(self.store.n_kept());
        let closed: usize = self.at.nodes.iter().map(|(s, e)| e - s).sum();
        let lengths = || self.at.nodes.iter().map(|(s, e)| e - s);
        let held_raw = (self.store.raw_end() - self.first_seen()) as usize;
        Stats {
            name: "gist",
            n_tokens: self.at.n_tokens,
            n_entries: self.at.n_tokens,
            n_cells,
            n_dropped: self.at.n_tokens - (held_raw + self.store.n_kept()).min(self.at.n_tokens),
            n_nodes: self.at.nodes.len(),
            n_slots: slots,
            cell_bytes: self.store.bytes(),
            card_bytes: self.store.card_bytes(),
            state_bytes: self.at.nodes.len() * size_of::<(usize, usize)>(),
            full_bytes: self.at.n_tokens * self.ctx.cell_bytes(),
            bound_bytes: self.ctx.page_bound(n_cells + 1, 2)
                + (self.at.nodes.len() + 1) * size_of::<(usize, usize)>(),
            rate: if slots > 0 {
                closed as f64 / slots as f64
            } else {
                0.0
            },
            longest_segment: lengths().max().unwrap_or(0),
            ..Stats::default()
        }
    }

    fn nodes(&self) -> Vec<NodeInfo> {
        let cell = self.ctx.cell_bytes();
        let info = |(id, &(start, end)): (usize, &(usize, usize))| NodeInfo {
            id: id as u64,
            level: 0,
            start,
            end,
            p: 1.0,
            children: Vec::new(),
            bytes: cell * self.ids.len(),
        };
        self.at.nodes.iter().enumerate().map(info).collect()
    }

    fn forced_next(&self) -> Option<u32> {
        let last = self.at.last?;
        let i = self.ids.iter().position(|&id| id == last)?;
        self.ids.get(i + 1).copied()
    }
}
