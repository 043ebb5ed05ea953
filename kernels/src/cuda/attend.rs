//! Soft-max attention over paged cells in device memory; see [`crate::attend`].
//!
//! Pages lie in one pool and are named by number; which pages a sequence has, what its queries see
//! and which sequence a query belongs to are read from device memory, so that a recorded step can
//! be replayed while sequences grow. Cells are cut into parts of [`PART_CELLS`] with a running
//! soft-max each, merged in order; a query's result has the same bits in prefill and in decode.

mod page;

use super::device::Shape;
use super::{Device, Error, View, ViewMut};
pub use crate::attend::{KvType, PAGE_CELLS, PageLayout, Visible};
use page::PageShape;
pub use page::{page_bytes, page_from_host, page_to_host};

/// Logical cells that share a running soft-max.
pub const PART_CELLS: usize = 128;

/// One sequence's pages, in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// First entry of its kept pages in [`Cells::pages`].
    pub kept: u32,
    /// Kept pages: cell `i` lies in page `i / PAGE_CELLS`.
    pub n_kept: u32,
    /// First entry of its raw pages.
    pub raw: u32,
    /// Raw pages.
    pub n_raw: u32,
    /// Logical index of cell 0 of the first raw page, a multiple of `PAGE_CELLS`.
    pub raw_base: u64,
    /// Kept cells that `top_k` never ranks away: the sinks.
    pub n_always: u32,
    /// If not zero: of the kept cells after `n_always`, each query sees per kv head only the
    /// `top_k` with the largest sum of q·k over the kv head's query heads; of equals, the older.
    pub top_k: u32,
}

/// A layer's cells.
#[derive(Clone, Copy)]
pub struct Cells<'a> {
    /// Pages of [`page_bytes`] each; a page's number is its place.
    pub pool: View<'a, u8>,
    /// Page numbers of all sequences' tables.
    pub pages: View<'a, u32>,
    /// A table for each sequence.
    pub tables: View<'a, Table>,
}

/// The queries of a call.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// `[n_q, n_head, head_dim_k]`.
    pub q: View<'a, f32>,
    /// The sequence of each query, as an index into the tables, `[n_q]`; the queries of a sequence
    /// stand side by side.
    pub seq: View<'a, u32>,
    /// What each query sees, `[n_q]`.
    pub visible: View<'a, Visible>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    page: PageShape,
    q: u64,
    seq: u64,
    visible: u64,
    pool: u64,
    pages: u64,
    tables: u64,
    chosen: u64,
    parts: u64,
    out: u64,
    n_entries: u32,
    n_tables: u32,
    n_q: i32,
    n_head: i32,
    chosen_words: i32,
    max_parts: i32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RankArgs {
    page: PageShape,
    q: u64,
    seq: u64,
    visible: u64,
    pool: u64,
    pages: u64,
    tables: u64,
    ranks: u64,
    chosen: u64,
    n_entries: u32,
    n_tables: u32,
    n_q: i32,
    n_head: i32,
    chosen_words: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CellsArgs {
    page: PageShape,
    pool: u64,
    slots: u64,
    to: u64,
    k: u64,
    v: u64,
}

/// Rows of a warp.
const ROWS: usize = 16;
/// Most room for parts of few queries; beyond it queries walk their parts one after another.
const PARTS_BYTES: usize = 256 << 20;

/// `out[q, h] = sum_c softmax_c(scale q[q, h]·k[c, h / group]) v[c, h / group]` over the visible
/// cells `c`, with `group = n_head / n_head_kv`; `out` is `[n_q, n_head, head_dim_v]`.
///
/// `max_cells` bounds the cells (kept and raw together) that any query sees, `max_ranked` the kept
/// cells of queries whose table has a `top_k`, 0 if none has: a recorded call is good until a
/// sequence outgrows them. A query that sees nothing yields zeros; one that sees a cell which no
/// page of its table holds, or more cells than the caller said, yields NaN. Other cells are not
/// read into any result, whatever they hold. Values that are finite, `scale` positive.
///
/// Against exact arithmetic: queries are good to 2^-16, weights to 2^-11 of each with F16 and Q8_0
/// values and to 2^-16 with BF16 and F32; Q8_0 keys and values are multiplied out in F16, 2^-11.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If shapes do not fit together, a head has more than 256 dimensions, or the pool does not begin at
/// a multiple of 16 bytes.
pub fn attend(
    dev: &Device,
    layout: &PageLayout,
    n_head: usize,
    scale: f32,
    queries: &Queries<'_>,
    cells: &Cells<'_>,
    max_cells: usize,
    max_ranked: usize,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let page = PageShape::new(layout, cells.pool.len());
    check_pool(cells.pool);
    assert!(
        n_head > 0 && n_head.is_multiple_of(layout.n_head_kv),
        "attend: {n_head} query heads on {} kv heads",
        layout.n_head_kv
    );
    let n_q = queries.visible.len();
    assert_eq!(queries.seq.len(), n_q, "attend: sequences of {n_q} queries");
    assert_eq!(
        queries.q.len(),
        n_q * n_head * layout.head_dim_k,
        "attend: numbers in q for {n_q} queries"
    );
    assert_eq!(
        out.len(),
        n_q * n_head * layout.head_dim_v,
        "attend: numbers in out for {n_q} queries"
    );
    if n_q == 0 {
        return Ok(());
    }
    let group = n_head / layout.n_head_kv;
    // A region may begin and end inside a part.
    let max_parts = max_cells.div_ceil(PART_CELLS) + 3;
    let parts_bytes = (n_q * n_head)
        .saturating_mul(max_parts)
        .saturating_mul((page.padded_v() + 2) * 4);
    // Larger heads need more shared memory for each warp, and not every device has much.
    let warps = if page.padded_k().max(page.padded_v()) > 128 {
        2
    } else {
        4
    };
    let tiles = (n_q * group).div_ceil(ROWS) * layout.n_head_kv;
    // Enough rows fill the device by themselves and then read every cell once for 64 of them.
    let split = tiles < 16 * dev.n_multiprocessors().max(8)
        && n_q * group.div_ceil(ROWS) <= 65_535
        && parts_bytes <= PARTS_BYTES;
    let chosen_words = max_ranked.div_ceil(32);
    let ranks_bytes = n_q * layout.n_head_kv * chosen_words * (32 * 4 + 4);
    let parts_bytes = if split { parts_bytes } else { 0 };
    let workspace = dev.workspace(parts_bytes + ranks_bytes)?;
    let parts = workspace.address();
    let ranks = parts + parts_bytes as u64;
    let chosen = ranks + (n_q * layout.n_head_kv * chosen_words * 32 * 4) as u64;
    let args = Args {
        page,
        q: dev.input(&queries.q),
        seq: dev.input(&queries.seq),
        visible: dev.input(&queries.visible),
        pool: dev.input(&cells.pool),
        pages: dev.input(&cells.pages),
        tables: dev.input(&cells.tables),
        chosen,
        parts,
        out: dev.output(&out),
        n_entries: cells.pages.len() as u32,
        n_tables: cells.tables.len() as u32,
        n_q: n_q as i32,
        n_head: n_head as i32,
        chosen_words: chosen_words as i32,
        max_parts: max_parts as i32,
        scale: scale * std::f32::consts::LOG2_E,
    };
    if chosen_words > 0 {
        rank(dev, &args, ranks, layout)?;
    }
    // Queries as operands, two terms; the rows' form also gathers there.
    let query_bytes = page.padded_k() / 64 * 8 * 32 * 16;
    let width = page.width();
    let name = |split: &[&'static str; 3]| {
        split[[64, 128, 256].iter().position(|&w| w == width).unwrap_or(2)]
    };
    if split {
        let shape = Shape {
            grid: [
                max_parts.div_ceil(warps) as u32,
                (n_q * group.div_ceil(ROWS)) as u32,
                layout.n_head_kv as u32,
            ],
            block: [32 * warps as u32, 1, 1],
            shared_bytes: (warps * query_bytes) as u32,
        };
        let kernel = name(&["attend_split_64", "attend_split_128", "attend_split_256"]);
        // SAFETY: the struct is the kernel's, lengths are checked above and indices by the kernel;
        // the workspace has room for `max_parts` parts.
        unsafe { dev.launch(kernel, shape, &args)? };
        let shape = Shape {
            grid: [n_q as u32, n_head as u32, 1],
            block: [layout.head_dim_v.next_multiple_of(32) as u32, 1, 1],
            shared_bytes: 0,
        };
        // SAFETY: as above.
        unsafe { dev.launch("attend_merge", shape, &args) }
    } else {
        let shape = Shape {
            grid: [
                (n_q * group).div_ceil(ROWS * warps) as u32,
                layout.n_head_kv as u32,
                1,
            ],
            block: [32 * warps as u32, 1, 1],
            shared_bytes: (warps * (query_bytes + width / 8 * 32 * 16)) as u32,
        };
        let kernel = name(&["attend_rows_64", "attend_rows_128", "attend_rows_256"]);
        // SAFETY: as above.
        unsafe { dev.launch(kernel, shape, &args) }
    }
}

/// Fills `chosen`: the kept cells that each query reads.
fn rank(dev: &Device, of: &Args, ranks: u64, layout: &PageLayout) -> Result<(), Error> {
    let args = RankArgs {
        page: of.page,
        q: of.q,
        seq: of.seq,
        visible: of.visible,
        pool: of.pool,
        pages: of.pages,
        tables: of.tables,
        ranks,
        chosen: of.chosen,
        n_entries: of.n_entries,
        n_tables: of.n_tables,
        n_q: of.n_q,
        n_head: of.n_head,
        chosen_words: of.chosen_words,
    };
    let n_q = of.n_q as u32;
    assert!(
        n_q <= 65_535,
        "attend: {n_q} queries with top_k in one call"
    );
    let shape = Shape {
        grid: [
            (of.chosen_words as u32).div_ceil(2),
            n_q,
            layout.n_head_kv as u32,
        ],
        block: [PAGE_CELLS as u32, 1, 1],
        shared_bytes: 4 * layout.head_dim_k as u32,
    };
    // SAFETY: the structs are the kernels', lengths are checked by the caller and indices by the
    // kernels; the workspace has room for both results.
    unsafe { dev.launch("rank_cells", shape, &args)? };
    let shape = Shape {
        grid: [n_q, layout.n_head_kv as u32, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: as above.
    unsafe { dev.launch("choose_cells", shape, &args) }
}

/// Pages begin at multiples of 256 in the pool, and are read 16 bytes at a time.
fn check_pool(pool: View<'_, u8>) {
    assert!(
        pool.address().is_multiple_of(16),
        "a pool of pages begins inside a word of 16 bytes"
    );
}

fn check_cells(layout: &PageLayout, n: usize, k: usize, v: usize) {
    assert_eq!(
        k,
        n * layout.n_head_kv * layout.head_dim_k,
        "numbers in k of {n} cells"
    );
    assert_eq!(
        v,
        n * layout.n_head_kv * layout.head_dim_v,
        "numbers in v of {n} cells"
    );
}

/// A block for each cell and head.
fn cells_shape(page: &PageShape, n: usize, n_head_kv: usize) -> Shape {
    Shape {
        grid: [n as u32, n_head_kv as u32, 1],
        block: [(page.padded_k() + page.padded_v()) as u32, 1, 1],
        shared_bytes: 0,
    }
}

/// Writes cells from `k` `[n, n_head_kv, head_dim_k]` and `v` `[n, n_head_kv, head_dim_v]`. Cell
/// `i` goes to `slots[i]`: its page's number times `PAGE_CELLS` plus its place in the page. A slot
/// outside of the pool, `u32::MAX` say, is passed over.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn write_cells(
    dev: &Device,
    layout: &PageLayout,
    pool: ViewMut<'_, u8>,
    slots: View<'_, u32>,
    k: View<'_, f32>,
    v: View<'_, f32>,
) -> Result<(), Error> {
    let page = PageShape::new(layout, pool.len());
    check_pool(pool.as_view());
    check_cells(layout, slots.len(), k.len(), v.len());
    let args = CellsArgs {
        page,
        pool: dev.output(&pool),
        slots: dev.input(&slots),
        to: 0,
        k: dev.input(&k),
        v: dev.input(&v),
    };
    let shape = cells_shape(&page, slots.len(), layout.n_head_kv);
    // SAFETY: the struct is the kernel's, which only reads k and v and checks the slots.
    unsafe { dev.launch("write_cells", shape, &args) }
}

/// Reads cells as stored, the inverse of [`write_cells`]. Rows of slots outside of the pool stay
/// as they are.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn read_cells(
    dev: &Device,
    layout: &PageLayout,
    pool: View<'_, u8>,
    slots: View<'_, u32>,
    k: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let page = PageShape::new(layout, pool.len());
    check_pool(pool);
    check_cells(layout, slots.len(), k.len(), v.len());
    let args = CellsArgs {
        page,
        pool: dev.input(&pool),
        slots: dev.input(&slots),
        to: 0,
        k: dev.output(&k),
        v: dev.output(&v),
    };
    let shape = cells_shape(&page, slots.len(), layout.n_head_kv);
    // SAFETY: the struct is the kernel's, which only reads the pool and checks the slots.
    unsafe { dev.launch("read_cells", shape, &args) }
}

/// Copies cells byte for byte from `from[i]` to `to[i]`, slots as in [`write_cells`]. No slot may
/// be in both lists.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths differ.
pub fn copy_cells(
    dev: &Device,
    layout: &PageLayout,
    pool: ViewMut<'_, u8>,
    from: View<'_, u32>,
    to: View<'_, u32>,
) -> Result<(), Error> {
    assert_eq!(from.len(), to.len(), "copy_cells: from and to differ");
    let page = PageShape::new(layout, pool.len());
    check_pool(pool.as_view());
    let args = CellsArgs {
        page,
        pool: dev.output(&pool),
        slots: dev.input(&from),
        to: dev.input(&to),
        k: 0,
        v: 0,
    };
    let shape = cells_shape(&page, from.len(), layout.n_head_kv);
    // SAFETY: the struct is the kernel's, which checks the slots and uses neither k nor v.
    unsafe { dev.launch("copy_cells", shape, &args) }
}
