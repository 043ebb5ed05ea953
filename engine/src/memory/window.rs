//! `window`: the first `sinks` tokens and the last `window` ones (StreamingLLM, arXiv
//! 2309.17453), at their true positions. Query t sees j when `t - j < window` or `j < sinks`.

use super::store::{Cell, Store};
use super::{Context, Entry, Memory, MemorySpec, Plan, Source, Stats};
use crate::error::Result;
use crate::ops::Ops;
use crate::session::{Decoder, Encoder};
use mneme_kernels::attend::Visible;
use std::io;

/// Sinks and window of a sequence and the tokens read so far; shared with `ahn`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Span {
    /// Most recent tokens seen, the current one included.
    pub window: usize,
    /// First tokens, always seen.
    pub sinks: usize,
    /// Tokens read.
    pub n_tokens: usize,
}

impl Span {
    /// Reads `window` and `sinks` of a description.
    pub fn parse(spec: &MemorySpec, window: usize, sinks: usize) -> Result<Span> {
        let span = Span {
            window: spec.get("window", window)?,
            sinks: spec.get("sinks", sinks)?,
            n_tokens: 0,
        };
        if span.window == 0 {
            return Err(spec.refuse("`window` must be at least 1"));
        }
        if span.window > u32::MAX as usize || span.sinks > u32::MAX as usize {
            return Err(spec.refuse("`window` and `sinks` must be below 2^32"));
        }
        Ok(span)
    }

    /// Rows of the next pass: sinks are kept cells, everything else is raw.
    pub fn plan(&self, tokens: &[u32]) -> Plan {
        let entries = tokens.iter().enumerate().map(|(i, &id)| {
            let t = self.n_tokens + i;
            // Raw cells are numbered from the first token after the sinks.
            let raw_end = (t + 1).saturating_sub(self.sinks) as u64;
            let raw_begin = (t + 1).saturating_sub(self.window + self.sinks) as u64;
            Entry {
                source: Source::Token(id),
                token: Some(i),
                pos: t as u32,
                cell: if t < self.sinks {
                    Cell::Kept(i)
                } else {
                    Cell::Raw(i - self.sinks.saturating_sub(self.n_tokens))
                },
                visible: Visible {
                    n_kept: (t + 1).min(self.sinks) as u32,
                    raw_begin,
                    raw_end,
                },
            }
        });
        Plan {
            n_tokens: tokens.len(),
            entries: entries.collect(),
            ..Plan::default()
        }
    }

    /// Takes over the cells of a pass.
    pub fn advance(&mut self, store: &mut Store, plan: &Plan) {
        let (kept, raw) = plan.n_cells();
        store.commit(kept, raw);
        self.n_tokens += plan.n_tokens;
    }

    /// First raw cell the next token will see.
    pub fn first_seen(&self) -> u64 {
        (self.n_tokens + 1).saturating_sub(self.window + self.sinks) as u64
    }

    /// Most tokens up to `n` that are still exactly known: all, as long as the window that ends
    /// there is still held, else none.
    pub fn truncate(&mut self, store: &mut Store, n: usize) -> usize {
        let n = n.min(self.n_tokens);
        let shorter = Span {
            n_tokens: n,
            ..*self
        };
        let n = if n == self.n_tokens || store.raw_begin() <= shorter.first_seen() {
            n
        } else {
            0
        };
        self.n_tokens = n;
        if n == 0 {
            store.clear();
        } else {
            store.truncate(n.min(self.sinks), n.saturating_sub(self.sinks) as u64);
        }
        n
    }

    pub fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        out.u64(self.n_tokens as u64)
    }

    pub fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        self.n_tokens = from.u64()? as usize;
        Ok(())
    }

    /// Whether the cells are those this many tokens leave behind.
    pub fn check(&self, store: &Store) -> io::Result<()> {
        let n_kept = self.n_tokens.min(self.sinks);
        if store.n_kept() == n_kept
            && store.raw_end() == (self.n_tokens - n_kept) as u64
            && store.raw_begin() <= self.first_seen()
        {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "{} tokens do not leave the cells the file holds",
                self.n_tokens
            )))
        }
    }
}

#[derive(Clone)]
struct Window {
    ctx: Context,
    store: Store,
    span: Span,
}

pub(super) fn build(ctx: &Context, spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    Ok(Box::new(Window {
        store: ctx.store(),
        ctx: ctx.clone(),
        span: Span::parse(spec, 4096, 4)?,
    }))
}

impl Memory for Window {
    fn name(&self) -> &'static str {
        "window"
    }

    fn plan(&mut self, _ops: &dyn Ops, tokens: &[u32], _wanted: bool) -> Result<Plan> {
        Ok(self.span.plan(tokens))
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    fn commit(&mut self, _: &dyn Ops, plan: &Plan, _: &[u32], _: Option<&[f32]>) -> Result<usize> {
        self.span.advance(&mut self.store, plan);
        self.store.release_raw(self.span.first_seen(), |_| true);
        Ok(plan.n_tokens)
    }

    fn truncate(&mut self, _: &dyn Ops, _: &[u32], n: usize) -> usize {
        self.span.truncate(&mut self.store, n)
    }

    fn fork(&self) -> Box<dyn Memory> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        self.span.save(out)?;
        self.store.save(out)
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        self.span.restore(from)?;
        self.store.restore(from, self.ctx.n_ctx)?;
        self.span.check(&self.store)
    }

    fn stats(&self) -> Stats {
        let n_cells = self.store.n_cells();
        Stats {
            name: "window",
            n_tokens: self.span.n_tokens,
            n_entries: self.span.n_tokens,
            n_cells,
            n_dropped: self.span.n_tokens - n_cells,
            cell_bytes: self.store.bytes(),
            card_bytes: self.store.card_bytes(),
            full_bytes: self.span.n_tokens * self.ctx.cell_bytes(),
            bound_bytes: self.ctx.page_bound(n_cells + 1, 2),
            ..Stats::default()
        }
    }
}
