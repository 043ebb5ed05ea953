//! `full`: every key and value of every token. The reference all others are held to.

use super::store::{Cell, Store};
use super::{Context, Entry, Memory, MemorySpec, Plan, Source, Stats};
use crate::error::Result;
use crate::ops::Ops;
use crate::session::{Decoder, Encoder};
use mneme_kernels::attend::Visible;
use std::io;

#[derive(Clone)]
struct Full {
    ctx: Context,
    store: Store,
}

pub(super) fn build(ctx: &Context, _spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    Ok(Box::new(Full {
        store: ctx.store(),
        ctx: ctx.clone(),
    }))
}

impl Memory for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn plan(&mut self, _ops: &dyn Ops, tokens: &[u32], _wanted: bool) -> Result<Plan> {
        self.ctx.check_room(&self.store, tokens.len())?;
        let past = self.store.raw_end();
        let entries = tokens.iter().enumerate().map(|(i, &id)| Entry {
            source: Source::Token(id),
            token: Some(i),
            pos: past as u32 + i as u32,
            cell: Cell::Raw(i),
            visible: Visible {
                n_kept: 0,
                raw_begin: 0,
                raw_end: past + i as u64 + 1,
            },
        });
        Ok(Plan {
            n_tokens: tokens.len(),
            entries: entries.collect(),
            ..Plan::default()
        })
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    fn commit(&mut self, _: &dyn Ops, plan: &Plan, _: &[u32], _: Option<&[f32]>) -> Result<usize> {
        self.store.commit(0, plan.n_tokens);
        Ok(plan.n_tokens)
    }

    fn truncate(&mut self, _: &dyn Ops, _: &[u32], n: usize) -> usize {
        let n = (n as u64).min(self.store.raw_end());
        self.store.truncate(0, n);
        n as usize
    }

    fn fork(&self) -> Box<dyn Memory> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        self.store.save(out)
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        self.store.restore(from, self.ctx.n_ctx)
    }

    fn stats(&self) -> Stats {
        let n_tokens = self.store.raw_end() as usize;
        Stats {
            name: "full",
            n_tokens,
            n_entries: n_tokens,
            n_cells: n_tokens,
            cell_bytes: self.store.bytes(),
            card_bytes: self.store.card_bytes(),
            full_bytes: n_tokens * self.ctx.cell_bytes(),
            bound_bytes: self.ctx.page_bound(n_tokens + 1, 1),
            ..Stats::default()
        }
    }
}
