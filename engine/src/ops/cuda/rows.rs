//! What kernels read of a pass's rows: positions, cells, page tables. Sent in three pieces before
//! the layers run, so that the layers themselves are the same from step to step.

use super::card::{Card, Pool};
use crate::error::{Error, Result};
use crate::memory::store::{Region, Store};
use crate::ops::{Page, Rows};
use mneme_kernels::attend::{PAGE_CELLS, Visible};
use mneme_kernels::cuda::attend::Table;
use mneme_kernels::cuda::{self, Plain};
use std::ops::Range;
use std::sync::Arc;

/// The slot of an entry without a cell.
const NONE: u32 = u32::MAX;

/// Device memory for all of it, kept between passes.
#[derive(Default)]
pub(super) struct Arena {
    words: Option<cuda::Buffer<u32>>,
    visible: Option<cuda::Buffer<Visible>>,
    tables: Option<cuda::Buffer<Table>>,
}

/// Where in the [`Arena`] a pass's rows are.
pub struct CardRows {
    n: usize,
    n_parts: usize,
    /// First layer on the card: those before it have nothing here.
    first: usize,
    out: Range<usize>,
    steps: Range<usize>,
    node_slots: Range<usize>,
    /// Slots of each layer's cells `[n_layer, n]` and, behind `gates`, of their gates.
    slots: usize,
    gates: usize,
    /// Slots of the cells recalled `[n_layer, n_recalls]`, and of their gates.
    recalls: usize,
    recall_gates: usize,
    n_recalls: usize,
    /// First recalled cell of each part.
    recalls_at: Vec<usize>,
    /// First page number; they reach to the end of the arena.
    pages: usize,
    /// First row of each layer in the list of what rows see.
    visible: Vec<usize>,
    pub(super) pool: Arc<Pool>,
    pub(super) gate_pool: Option<Arc<Pool>>,
    /// Upper bound on the cells a row walks over, rounded up so that recordings fit many steps.
    pub(super) max_cells: usize,
    /// The same for kept cells that are ranked.
    pub(super) max_ranked: usize,
}

fn page_number(page: &Page) -> (u32, &Arc<Pool>) {
    let page = page.card();
    (page.number, &page.pool)
}

fn slot(place: Option<(&Page, usize)>, pool: &mut Option<Arc<Pool>>) -> u32 {
    place.map_or(NONE, |(page, cell)| {
        let (number, of) = page_number(page);
        if pool.is_none() {
            *pool = Some(Arc::clone(of));
        }
        number * PAGE_CELLS as u32 + cell as u32
    })
}

impl Arena {
    /// Sends what `rows` have in the layers from `first` on, given where their sequences' pages lie.
    pub(super) fn send(
        &mut self,
        card: &Card,
        rows: &Rows,
        stores: &[&Store],
        first: usize,
    ) -> Result<CardRows> {
        let layers = first..stores.first().map_or(first, |store| store.n_layer());
        let n = rows.n();
        let (mut pool, mut gate_pool) = (None, None);
        let mut words: Vec<u32> = rows.pos.clone();
        for (i, part) in rows.parts.iter().enumerate() {
            words.extend(part.rows.clone().map(|_| i as u32));
        }
        let out = words.len()..words.len() + rows.out.len();
        words.extend(rows.out.iter().map(|&row| row as u32));
        let steps = words.len()..words.len() + rows.steps.len();
        words.extend(rows.steps.iter().map(|&row| row as u32));
        let node_slots = words.len()..words.len() + rows.node_slots.len();
        words.extend(rows.node_slots.iter().map(|&row| row as u32));

        let slots = words.len();
        let cells = |layer: usize, region: Region, words: &mut Vec<u32>, pool: &mut _| {
            for (part, store) in rows.parts.iter().zip(stores) {
                let place = |&cell| slot(store.place(layer, cell, region), pool);
                words.extend(part.cells.iter().map(place));
            }
        };
        for layer in layers.clone() {
            cells(layer, Region::Cells, &mut words, &mut pool);
        }
        let gates = words.len();
        let has_gates = stores.iter().any(|store| store.gates_layout().is_some());
        if has_gates {
            for layer in layers.clone() {
                cells(layer, Region::Gates, &mut words, &mut gate_pool);
            }
        }
        let recall = |layer: usize, region: Region, words: &mut Vec<u32>, pool: &mut _| {
            for (part, store) in rows.parts.iter().zip(stores) {
                let place = |cell| slot(store.raw_place(layer, cell, region), pool);
                words.extend(part.recalls.clone().map(place));
            }
        };
        let recalls = words.len();
        for layer in layers.clone() {
            recall(layer, Region::Cells, &mut words, &mut pool);
        }
        let recall_gates = words.len();
        for layer in layers.clone() {
            recall(layer, Region::Gates, &mut words, &mut gate_pool);
        }
        let mut n_recalls = 0;
        let recalls_at = rows.parts.iter().map(|part| {
            n_recalls += part.n_recalls();
            n_recalls - part.n_recalls()
        });
        let recalls_at = recalls_at.collect();

        let pages = words.len();
        let mut tables = Vec::with_capacity(layers.len() * stores.len());
        let (mut max_cells, mut max_ranked) = (0, 0);
        for layer in layers.clone() {
            for (part, store) in rows.parts.iter().zip(stores) {
                let (kept, raw, raw_base) = store.pages(layer);
                let first_kept = words.len() - pages;
                words.extend(kept.map(|page| page_number(page).0));
                let first_raw = words.len() - pages;
                words.extend(raw.map(|page| page_number(page).0));
                tables.push(Table {
                    kept: first_kept as u32,
                    n_kept: (first_raw - first_kept) as u32,
                    raw: first_raw as u32,
                    n_raw: (words.len() - pages - first_raw) as u32,
                    raw_base,
                    n_always: part.n_always,
                    top_k: part.top_k,
                });
                for seen in part.visible(layer) {
                    let raw = seen.raw_end.saturating_sub(raw_base) as usize;
                    max_cells = max_cells.max(seen.n_kept as usize + raw);
                    if part.top_k > 0 {
                        max_ranked = max_ranked.max(seen.n_kept as usize);
                    }
                }
            }
        }
        let mut seen: Vec<Visible> = Vec::with_capacity(n);
        rows.parts
            .iter()
            .for_each(|part| seen.extend(&part.visible));
        let mut visible = Vec::with_capacity(layers.len());
        for layer in layers {
            let full = |part: &crate::ops::Part| part.full_layers.get(layer) == Some(&true);
            if rows.parts.iter().any(full) {
                visible.push(seen.len());
                let parts = rows.parts.iter();
                parts.for_each(|part| seen.extend(part.visible(layer)));
            } else {
                visible.push(0);
            }
        }

        send(card, &mut self.words, &words)?;
        send(card, &mut self.visible, &seen)?;
        send(card, &mut self.tables, &tables)?;
        let pool = pool.expect("a pass has rows, and rows have cells");
        let same = |store: &&Store| store.layout() == stores[0].layout();
        if !stores.iter().all(same) {
            return Err(Error::MixedCells);
        }
        let round = |n: usize| n.next_power_of_two().max(256);
        Ok(CardRows {
            n,
            n_parts: stores.len(),
            first,
            out,
            steps,
            node_slots,
            slots,
            gates,
            recalls,
            recall_gates,
            n_recalls,
            recalls_at,
            pages,
            visible,
            pool,
            gate_pool,
            max_cells: round(max_cells),
            max_ranked: match max_ranked {
                0 => 0,
                n => round(n),
            },
        })
    }

    fn words(&self) -> &cuda::Buffer<u32> {
        self.words.as_ref().expect("a pass has begun")
    }

    pub(super) fn pos(&self, at: &CardRows) -> cuda::View<'_, u32> {
        self.words().slice(0..at.n)
    }

    pub(super) fn seq(&self, at: &CardRows) -> cuda::View<'_, u32> {
        self.words().slice(at.n..2 * at.n)
    }

    pub(super) fn out(&self, at: &CardRows) -> cuda::View<'_, u32> {
        self.words().slice(at.out.clone())
    }

    pub(super) fn steps(&self, at: &CardRows) -> cuda::View<'_, u32> {
        self.words().slice(at.steps.clone())
    }

    pub(super) fn node_slots(&self, at: &CardRows) -> cuda::View<'_, u32> {
        self.words().slice(at.node_slots.clone())
    }

    /// Cells of the rows of one layer.
    pub(super) fn slots(&self, at: &CardRows, layer: usize) -> cuda::View<'_, u32> {
        let first = at.slots + (layer - at.first) * at.n;
        self.words().slice(first..first + at.n)
    }

    /// Gates of some rows of one layer.
    pub(super) fn gates(
        &self,
        at: &CardRows,
        layer: usize,
        rows: Range<usize>,
    ) -> cuda::View<'_, u32> {
        let first = at.gates + (layer - at.first) * at.n;
        self.words().slice(first + rows.start..first + rows.end)
    }

    /// Cells that a part recalls, and their gates.
    pub(super) fn recalls(
        &self,
        at: &CardRows,
        layer: usize,
        part: usize,
        n: usize,
    ) -> (cuda::View<'_, u32>, cuda::View<'_, u32>) {
        let first = (layer - at.first) * at.n_recalls + at.recalls_at[part];
        let of = |start: usize| self.words().slice(start + first..start + first + n);
        (of(at.recalls), of(at.recall_gates))
    }

    pub(super) fn pages(&self, at: &CardRows) -> cuda::View<'_, u32> {
        self.words().slice(at.pages..self.words().len())
    }

    pub(super) fn visible(&self, at: &CardRows, layer: usize) -> cuda::View<'_, Visible> {
        let seen = self.visible.as_ref().expect("a pass has begun");
        let first = at.visible[layer - at.first];
        seen.slice(first..first + at.n)
    }

    pub(super) fn tables(&self, at: &CardRows, layer: usize) -> cuda::View<'_, Table> {
        let tables = self.tables.as_ref().expect("a pass has begun");
        let first = (layer - at.first) * at.n_parts;
        tables.slice(first..first + at.n_parts)
    }
}

/// Writes `values` to the front of `to`, which is made larger where it must be.
fn send<T: Plain>(card: &Card, to: &mut Option<cuda::Buffer<T>>, values: &[T]) -> Result<()> {
    let error = |e| card.error("sending the rows of a pass", e);
    if to.as_ref().is_none_or(|to| to.len() < values.len()) {
        let n = values.len().next_power_of_two().max(1024);
        *to = Some(card.dev.alloc(n).map_err(error)?);
        card.moved();
    }
    let to = to.as_mut().expect("made above");
    let to = to.slice_mut(0..values.len());
    card.dev.write(to, values).map_err(error)
}
