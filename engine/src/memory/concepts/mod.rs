//! `concepts`: contexts enter as concept embeddings (CompLLM, arXiv 2509.19228).
//!
//! A *context* is what lies between the two context tokens of the file. It is cut into *segments* of
//! whole sentences where they fit; each is compressed alone into a few embeddings, by the same model
//! with low-rank additions ([`tensors`]), and only those enter the main sequence, at ordinary
//! consecutive positions. The context tokens themselves and the tokens between them never enter.
//! Everything outside contexts is kept as under `full`.
//!
//! Since a segment's embeddings depend on nothing but its tokens, they are cached by content and
//! used again, by other sequences and other runs ([`crate::compress`]).

pub mod cache;
pub mod tensors;

use super::decider::sentence_ends_at;
use super::store::{Cell, Store};
use super::{Context, Entry, Memory, MemorySpec, NodeInfo, Plan, Source, Stats};
use crate::error::Result;
use crate::ops::Ops;
use crate::session::{Decoder, Encoder};
use mneme_kernels::attend::Visible;
use std::io;
use std::sync::Arc;

#[derive(Clone)]
struct Concepts {
    ctx: Context,
    spec: MemorySpec,
    store: Store,
    /// Context tokens: before and after a context.
    begin: u32,
    end: u32,
    /// Most tokens of a segment.
    segment: usize,
    /// Tokens of a segment that share an embedding.
    ratio: usize,
    at: At,
    /// Segments in order.
    segments: Vec<Segment>,
    /// Embeddings of the segments that the next plan closes, in their order.
    embeddings: Vec<Arc<[f32]>>,
}

/// Where the stream stands: a function of the tokens read. Small, since every plan begins with a copy.
#[derive(Clone, Debug, Default, PartialEq)]
struct At {
    n_tokens: usize,
    /// Entries of the main sequence, each with a cell.
    n_entries: usize,
    /// Whether a context is open.
    inside: bool,
    /// Tokens of the open context that no segment has yet.
    pending: Vec<u32>,
}

/// A segment that has been closed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Segment {
    /// Its tokens, as places in the text.
    start: usize,
    end: usize,
    n_slots: usize,
}

/// What a token adds to the main sequence.
enum Step {
    /// Nothing yet.
    Nothing,
    /// Itself.
    Token(u32),
    /// The embeddings of the segment of these tokens, which it closes.
    Segment(Segment, Vec<u32>),
}

pub(super) fn build(ctx: &Context, spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    let w = &ctx.weights;
    let Some(tensors) = &w.concepts else {
        return Err(spec.refuse(
            "the model has no compressor of contexts (tensor `mem.ce_proj.weight` not found)",
        ));
    };
    let [begin, end] = tensors.tokens;
    let ratio: usize = spec.get("ratio", tensors.ratios[0])?;
    if !tensors.ratios.contains(&ratio) {
        let known: Vec<String> = tensors.ratios.iter().map(usize::to_string).collect();
        return Err(spec.refuse(format!(
            "`ratio` {ratio} is not among those the compressor was trained for: {}",
            known.join(", ")
        )));
    }
    let segment: usize = spec.get("segment", tensors.segment)?;
    if segment == 0 || segment > tensors.segment {
        return Err(spec.refuse(format!(
            "`segment` is 1 to {}, what the compressor was trained for; got {segment}",
            tensors.segment
        )));
    }
    Ok(Box::new(Concepts {
        store: ctx.store(),
        spec: spec.clone(),
        begin,
        end,
        segment,
        ratio,
        at: At::default(),
        segments: Vec::new(),
        embeddings: Vec::new(),
        ctx: ctx.clone(),
    }))
}

impl Concepts {
    /// Reads one token.
    fn step(&self, at: &mut At, id: u32) -> Step {
        at.n_tokens += 1;
        if !at.inside {
            if id == self.begin {
                at.inside = true;
                return Step::Nothing;
            }
            at.n_entries += 1;
            return Step::Token(id);
        }
        if id == self.end {
            at.inside = false;
            return match at.pending.len() {
                0 => Step::Nothing,
                n => self.close(at, n, 1),
            };
        }
        at.pending.push(id);
        if at.pending.len() <= self.segment {
            return Step::Nothing;
        }
        let n = self.whole_sentences(&at.pending);
        self.close(at, n, 0)
    }

    /// Of pending tokens, one more than a segment holds: how many its last whole sentence ends
    /// with; as many as it holds where no sentence ends in it.
    fn whole_sentences(&self, pending: &[u32]) -> usize {
        let pieces = &*self.ctx.pieces;
        let ends = |&n: &usize| {
            let before = (n >= 2).then(|| pending[n - 2]);
            sentence_ends_at(pieces, before, pending[n - 1], pending[n])
        };
        (1..=self.segment).rev().find(ends).unwrap_or(self.segment)
    }

    /// Closes a segment of the first `n` pending tokens, which end `behind` the token in hand.
    fn close(&self, at: &mut At, n: usize, behind: usize) -> Step {
        let rest = at.pending.split_off(n);
        let tokens = std::mem::replace(&mut at.pending, rest);
        let end = at.n_tokens - behind - at.pending.len();
        let n_slots = n.div_ceil(self.ratio);
        at.n_entries += n_slots;
        let start = end - n;
        let segment = Segment {
            start,
            end,
            n_slots,
        };
        Step::Segment(segment, tokens)
    }

    /// Reads tokens, and returns the segments that they close.
    fn read<'a>(
        &'a self,
        at: &'a mut At,
        tokens: &'a [u32],
    ) -> impl Iterator<Item = (Segment, Vec<u32>)> + 'a {
        let steps = tokens.iter().map(|&id| self.step(at, id));
        steps.filter_map(|step| match step {
            Step::Segment(segment, tokens) => Some((segment, tokens)),
            _ => None,
        })
    }
}

impl Memory for Concepts {
    fn name(&self) -> &'static str {
        "concepts"
    }

    fn check(&self, tokens: &[u32], every: bool) -> Result<()> {
        let mut at = self.at.clone();
        let mut answered = true;
        for (i, &id) in tokens.iter().enumerate() {
            answered = match self.step(&mut at, id) {
                Step::Nothing => false,
                Step::Token(_) | Step::Segment(..) => !at.inside,
            };
            if every && !answered {
                let what = format!(
                    "token {i} of these is part of a context, after which there are no logits"
                );
                return Err(self.spec.refuse(what));
            }
        }
        match answered {
            true => Ok(()),
            false => Err(self.spec.refuse(
                "the text ends in a context that is open or empty: nothing comes after it yet",
            )),
        }
    }

    fn segments(&self, tokens: &[u32]) -> Vec<(Vec<u32>, usize)> {
        let mut at = self.at.clone();
        let closed = self.read(&mut at, tokens);
        closed.map(|(s, tokens)| (tokens, s.n_slots)).collect()
    }

    fn embed(&mut self, embeddings: Vec<Arc<[f32]>>) {
        self.embeddings = embeddings;
    }

    fn plan(&mut self, _ops: &dyn Ops, tokens: &[u32], _wanted: bool) -> Result<Plan> {
        let n_embd = self.ctx.weights.hparams.n_embd;
        let mut at = self.at.clone();
        let mut plan = Plan {
            n_tokens: tokens.len(),
            ..Plan::default()
        };
        let first = at.n_entries;
        let enter = |plan: &mut Plan, source, token| {
            let i = plan.entries.len();
            let pos = first + i;
            plan.entries.push(Entry {
                source,
                token,
                pos: pos as u32,
                cell: Cell::Raw(i),
                visible: Visible {
                    n_kept: 0,
                    raw_begin: 0,
                    raw_end: pos as u64 + 1,
                },
            });
        };
        let mut ready = self.embeddings.iter();
        for (i, &id) in tokens.iter().enumerate() {
            match self.step(&mut at, id) {
                Step::Nothing => {}
                Step::Token(id) => enter(&mut plan, Source::Token(id), Some(i)),
                Step::Segment(..) => {
                    let Some(vectors) = ready.next() else {
                        return Err(self.spec.refuse("a segment came without its embeddings"));
                    };
                    let from = plan.vectors.len() / n_embd;
                    let n = vectors.len() / n_embd;
                    plan.vectors.extend_from_slice(vectors);
                    for j in 0..n {
                        // The last one answers for the token that closed the context.
                        let token = (j + 1 == n && !at.inside).then_some(i);
                        enter(&mut plan, Source::Vector(from + j), token);
                    }
                }
            }
        }
        self.ctx.check_room(&self.store, plan.entries.len())?;
        Ok(plan)
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    fn commit(
        &mut self,
        _: &dyn Ops,
        plan: &Plan,
        tokens: &[u32],
        _: Option<&[f32]>,
    ) -> Result<usize> {
        let mut at = std::mem::take(&mut self.at);
        let closed = self.read(&mut at, &tokens[..plan.n_tokens]);
        let closed: Vec<Segment> = closed.map(|(segment, _)| segment).collect();
        self.segments.extend(closed);
        self.at = at;
        self.embeddings.clear();
        self.store.commit(0, plan.entries.len());
        Ok(plan.n_tokens)
    }

    fn truncate(&mut self, _: &dyn Ops, tokens: &[u32], n: usize) -> usize {
        let n = n.min(tokens.len());
        let mut at = At::default();
        let closed = self.read(&mut at, &tokens[..n]);
        self.segments = closed.map(|(segment, _)| segment).collect();
        self.at = at;
        self.store.truncate(0, self.at.n_entries as u64);
        n
    }

    fn fork(&self) -> Box<dyn Memory> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        out.u64(self.at.n_tokens as u64)?;
        out.u64(self.at.n_entries as u64)?;
        out.u32(u32::from(self.at.inside))?;
        out.u32s(&self.at.pending)?;
        out.u64(self.segments.len() as u64)?;
        for s in &self.segments {
            for n in [s.start, s.end, s.n_slots] {
                out.u64(n as u64)?;
            }
        }
        self.store.save(out)
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        let broken = |what: &str| io::Error::other(format!("concepts: {what}"));
        let n_tokens = from.u64()? as usize;
        let n_entries = from.u64()? as usize;
        let inside = from.u32()? != 0;
        let pending = from.u32s()?;
        if pending.len() > self.segment || (!inside && !pending.is_empty()) {
            return Err(broken("more tokens wait than a segment holds"));
        }
        let n = from.u64()?;
        let mut segments: Vec<Segment> = Vec::new();
        let mut slots = 0usize;
        for _ in 0..n {
            let [start, end, n_slots] = [from.u64()?, from.u64()?, from.u64()?].map(|n| n as usize);
            let before = segments.last().map_or(0, |s| s.end);
            let sane = before <= start
                && start < end
                && end <= n_tokens
                && n_slots == (end - start).div_ceil(self.ratio);
            if !sane {
                return Err(broken("segments that do not follow each other"));
            }
            slots += n_slots;
            segments.push(Segment {
                start,
                end,
                n_slots,
            });
        }
        self.store.restore(from, self.ctx.n_ctx)?;
        if self.store.raw_end() != n_entries as u64 || slots > n_entries {
            return Err(broken("the cells do not match the segments"));
        }
        self.at = At {
            n_tokens,
            n_entries,
            inside,
            pending,
        };
        self.segments = segments;
        Ok(())
    }

    fn stats(&self) -> Stats {
        let at = &self.at;
        let n_slots: usize = self.segments.iter().map(|s| s.n_slots).sum();
        let lengths = || self.segments.iter().map(|s| (s.end - s.start) as f64);
        let compressed: f64 = lengths().sum();
        let n = self.segments.len() as f64;
        let mean = compressed / n.max(1.0);
        let variance = lengths().map(|l| (l - mean).powi(2)).sum::<f64>() / n.max(1.0);
        Stats {
            name: "concepts",
            n_tokens: at.n_tokens,
            n_entries: at.n_entries,
            n_cells: at.n_entries,
            n_dropped: compressed as usize,
            n_nodes: self.segments.len(),
            n_slots,
            cell_bytes: self.store.bytes(),
            card_bytes: self.store.card_bytes(),
            full_bytes: at.n_tokens * self.ctx.cell_bytes(),
            // A token may close a segment, with all its embeddings.
            bound_bytes: self
                .ctx
                .page_bound(at.n_entries + self.segment.div_ceil(self.ratio), 1),
            rate: match n_slots {
                0 => 0.0,
                n => compressed / n as f64,
            },
            rate_spread: match self.segments.len() {
                0 | 1 => 0.0,
                _ => variance.sqrt() / mean,
            },
            longest_segment: lengths().fold(0.0, f64::max) as usize,
            ..Stats::default()
        }
    }

    fn nodes(&self) -> Vec<NodeInfo> {
        let cell_bytes = self.ctx.cell_bytes();
        let segments = self.segments.iter().enumerate();
        segments
            .map(|(id, s)| NodeInfo {
                id: id as u64,
                level: 0,
                start: s.start,
                end: s.end,
                p: 1.0,
                children: Vec::new(),
                bytes: s.n_slots * cell_bytes,
            })
            .collect()
    }
}
