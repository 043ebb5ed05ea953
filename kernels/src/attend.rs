//! Soft-max attention over two regions of cells, with no mask and no score matrix.
//!
//! *Kept* cells (sinks and memory nodes) are an append-only list of which each query sees a
//! prefix, or the best of it. *Raw* cells are the recent tokens, of which each query sees a range
//! of logical indices. This one op serves full attention, a window, nodes and gist tokens.
//!
//! Batch invariance: the visible cells of a region are cut at fixed multiples of
//! [`PARTITION_CELLS`] logical cells; each partition has its own running soft-max (Milakov and
//! Gimelshein, 2018) and partitions are merged in order, whatever the number of queries in the
//! call and of threads. So a query's result has the same bits in prefill and in decode.

pub(crate) mod ahead;
pub(crate) mod layout;
mod page;
pub(crate) mod tile;

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
use crate::split::SplitMut;
pub use layout::{KvType, PAGE_CELLS, PageLayout};
pub use page::Page;

/// Logical cells that share a running soft-max.
pub const PARTITION_CELLS: usize = 1024;

/// What one query sees: the first `n_kept` kept cells, and raw cells with a logical index in
/// `raw_begin..raw_end`. A query that sees nothing yields zeros.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visible {
    /// Kept cells seen, from the first.
    pub n_kept: u32,
    /// Logical index of the first raw cell seen.
    pub raw_begin: u64,
    /// Logical index after the last raw cell seen.
    pub raw_end: u64,
}

/// The queries of one sequence and the cells they look at.
pub struct Sequence<'a> {
    /// Queries, `[n_q, n_head, head_dim_k]`.
    pub q: &'a [f32],
    /// What each query sees, `[n_q]`.
    pub visible: &'a [Visible],
    /// Pages of kept cells: cell `i` lies in page `i / PAGE_CELLS`.
    pub kept: &'a [&'a [u8]],
    /// Kept cells that `top_k` never ranks away: the sinks.
    pub n_always: u32,
    /// If not zero: of the kept cells after `n_always`, each query sees per kv head only the
    /// `top_k` with the largest sum of q·k over the kv head's query heads; of equals, the older.
    pub top_k: u32,
    /// Pages of raw cells.
    pub raw: &'a [&'a [u8]],
    /// Logical index of cell 0 of `raw[0]`, a multiple of `PAGE_CELLS`.
    pub raw_base: u64,
    /// Result, `[n_q, n_head, head_dim_v]`; written whole.
    pub out: &'a mut [f32],
}

/// `out[q, h] = sum_c softmax_c(scale q[q, h]·k[c, h / group]) v[c, h / group]` over the visible
/// cells `c`, with `group = n_head / n_head_kv`.
///
/// Pages are buffers of [`PageLayout::page_bytes`], fastest when 64-byte aligned. Cells that no
/// query sees are not read and may hold anything. `scale` is positive. Sums are in F32; with Q8_0
/// keys the query enters as 16-bit integers, with Q8_0 values the weights of a page do.
///
/// # Panics
/// If shapes do not fit together or a query sees a cell that no page holds.
pub fn attend(
    pool: &Pool,
    layout: &PageLayout,
    n_head: usize,
    scale: f32,
    seqs: &mut [Sequence<'_>],
) {
    attend_with(dispatch::best(), pool, layout, n_head, scale, seqs);
}

/// [`attend`] with a chosen instruction set, which must be [`dispatch::available`].
pub fn attend_with(
    isa: Isa,
    pool: &Pool,
    layout: &PageLayout,
    n_head: usize,
    scale: f32,
    seqs: &mut [Sequence<'_>],
) {
    check(layout, n_head, seqs);
    match cpu::attend(isa) {
        Some(kernels) => tile::attend(kernels, pool, layout, n_head, scale, seqs),
        None => scalar(pool, layout, n_head, scale, seqs),
    }
}

/// One query of one head after another by the oracle.
fn scalar(pool: &Pool, layout: &PageLayout, n_head: usize, scale: f32, seqs: &mut [Sequence<'_>]) {
    for seq in seqs {
        let (visible, kept, raw) = (seq.visible, seq.kept, seq.raw);
        let cells = cpu::scalar::attend::Cells {
            layout,
            kept,
            raw,
            raw_base: seq.raw_base,
            n_always: seq.n_always as usize,
            top_k: seq.top_k as usize,
        };
        let group = n_head / layout.n_head_kv;
        let (dim_k, dim_v) = (layout.head_dim_k, layout.head_dim_v);
        let q = seq.q;
        let out = SplitMut::new(seq.out);
        pool.for_each(visible.len() * layout.n_head_kv, 1, |tasks| {
            for task in tasks {
                let (i, head_kv) = (task / layout.n_head_kv, task % layout.n_head_kv);
                let first = i * n_head + head_kv * group;
                let q = &q[first * dim_k..][..group * dim_k];
                // SAFETY: every task writes the heads of its own query and kv head.
                let out = unsafe { out.part(first * dim_v..(first + group) * dim_v) };
                cpu::scalar::attend::attend(&cells, head_kv, scale, visible[i], q, out);
            }
        });
    }
}

/// Refuses shapes that do not fit together, before any page is read.
fn check(layout: &PageLayout, n_head: usize, seqs: &[Sequence<'_>]) {
    assert!(
        layout.n_head_kv > 0 && n_head > 0 && n_head.is_multiple_of(layout.n_head_kv),
        "attend: {n_head} query heads on {} kv heads",
        layout.n_head_kv
    );
    assert!(
        layout.head_dim_k > 0 && layout.head_dim_v > 0,
        "attend: heads of no dimensions"
    );
    let page_bytes = layout.page_bytes();
    for seq in seqs {
        let n_q = seq.visible.len();
        assert_eq!(
            seq.q.len(),
            n_q * n_head * layout.head_dim_k,
            "attend: numbers in q for {n_q} queries"
        );
        assert_eq!(
            seq.out.len(),
            n_q * n_head * layout.head_dim_v,
            "attend: numbers in out for {n_q} queries"
        );
        assert!(
            seq.raw_base.is_multiple_of(PAGE_CELLS as u64),
            "attend: raw_base {} is not the start of a page",
            seq.raw_base
        );
        for page in seq.kept.iter().chain(seq.raw) {
            assert_eq!(page.len(), page_bytes, "attend: bytes of a page");
        }
        let raw_cells = (seq.raw.len() * PAGE_CELLS) as u64;
        for visible in seq.visible {
            assert!(
                visible.n_kept as usize <= seq.kept.len() * PAGE_CELLS,
                "attend: {} kept cells visible, pages for {}",
                visible.n_kept,
                seq.kept.len() * PAGE_CELLS
            );
            assert!(
                visible.raw_begin >= visible.raw_end
                    || (visible.raw_begin >= seq.raw_base
                        && visible.raw_end - seq.raw_base <= raw_cells),
                "attend: raw cells {}..{} visible, pages hold {}..{}",
                visible.raw_begin,
                visible.raw_end,
                seq.raw_base,
                seq.raw_base.saturating_add(raw_cells)
            );
        }
    }
}
