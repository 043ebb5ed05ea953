//! The walk over pages that every vector instruction set shares: which rows see which cells, the
//! running soft-max of a partition, and the merge of partitions. The arithmetic of one page is
//! the instruction set's ([`PageKernels`]).

use super::ahead::{Ahead, Pace};
use super::layout::{BLOCK, HALF_CELLS, KvType, PAGE_CELLS, PageLayout};
use super::{PARTITION_CELLS, Sequence, Visible};
use crate::pool::Pool;
use crate::split::SplitMut;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Rows (query, head) that share one pass over the cells: enough that converting a page and
/// fetching it from memory is paid once for many products, few enough to stay in the L2 cache.
const TILE_ROWS: usize = 128;
/// Rows whose queries lie interleaved, as the widest micro-kernel reads them.
pub(crate) const ROWS: usize = 8;
/// Largest magnitude of a 16-bit query: both its bytes, the lower one signed, stay in range.
const Q16_MAX: f32 = 32639.0;

/// What an instruction set does with one page of one kv head. `seen` marks cells that at least
/// one row sees; no other cell's bytes may reach a result.
pub(crate) struct PageKernels {
    /// Fills [`Tile::s`] with the scores of the seen cells; the pointer is to the head's keys.
    pub(crate) scores: unsafe fn(&mut Tile, *const u8, u64),
    /// Turns scores into weights relative to the page's largest, updates [`Tile::m`] and
    /// [`Tile::l`], leaves the factors of old and new sums in [`Tile::alpha`] and [`Tile::beta`].
    pub(crate) soft_max: unsafe fn(&mut Tile),
    /// `acc = alpha acc + beta sum_c s[c] v[c]`; the pointer is to the head's values.
    pub(crate) weigh: unsafe fn(&mut Tile, *const u8, u64),
    /// Called before the pages of a partition, and after them.
    pub(crate) enter: unsafe fn(),
    pub(crate) leave: unsafe fn(),
    /// Whether Q8_0 keys want queries as integers ([`Tile::q16`]).
    pub(crate) integer_q: bool,
    /// Whether it wants them also as rows of bytes ([`Tile::q8`]).
    pub(crate) byte_q: bool,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// 64-byte aligned numbers.
#[derive(Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// Makes room for `len` numbers and returns where they start. What they hold is unspecified.
    pub(crate) fn room(&mut self, len: usize) -> *mut f32 {
        let n = len.div_ceil(16);
        if self.lines.len() < n {
            self.lines.resize(n, Line([0.0; 16]));
        }
        self.ptr()
    }

    pub(crate) fn ptr(&mut self) -> *mut f32 {
        self.lines.as_mut_ptr().cast()
    }

    /// The first `len` numbers.
    pub(crate) fn slice(&mut self, len: usize) -> &mut [f32] {
        let start = self.room(len);
        // SAFETY: `room` made at least `len` initialised numbers.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// The rows of one kv head of a task and their running sums. Some per thread, reused.
pub(crate) struct Tile {
    pub(crate) n_rows: usize,
    pub(crate) dim_k: usize,
    /// Values as stored, see [`PageLayout::dim_v_padded`].
    pub(crate) dim_v: usize,
    pub(crate) ty_k: KvType,
    pub(crate) ty_v: KvType,
    /// Queries times `scale * log2(e)`, `[row / ROWS][dim_k][ROWS]`.
    pub(crate) q: Buffer,
    /// Queries as 16-bit integers, `[row / ROWS][dim / 4][even, odd][ROWS]` words: numbers 0 and 2
    /// of four neighbours, then 1 and 3.
    pub(crate) q16: Vec<i32>,
    /// -128 times the sum of a block's integers, `[row][dim / 32]`: undoes the bias of stored keys.
    pub(crate) q16_bias: Vec<i32>,
    /// What an integer of `q16` is worth, `[row]`.
    pub(crate) q16_step: Vec<f32>,
    /// The integers as two signed bytes, `[row / ROWS][dim / BLOCK][high, low][ROWS][BLOCK]`.
    pub(crate) q8: Vec<u8>,
    /// Scores in units of log 2, then weights, `[row][PAGE_CELLS]`.
    pub(crate) s: Buffer,
    /// Cells of the page that a row sees, `[row]`.
    pub(crate) seen: Vec<u64>,
    /// Largest score of the partition so far, `[row]`.
    pub(crate) m: Vec<f32>,
    pub(crate) alpha: Vec<f32>,
    pub(crate) beta: Vec<f32>,
    /// Sum of weights, in 16 parts, `[row][16]`.
    pub(crate) l: Buffer,
    /// Weighted sum of values, `[row][dim_v]`.
    pub(crate) acc: Buffer,
    /// Room for a page of keys or values as F32.
    pub(crate) wide: Buffer,
    pub(crate) ahead: Ahead,
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "only the form on AMX asks so")
    )]
    pub(crate) pace: Pace,
    /// Room for integer weights, `[row][2][64]` bytes, for whole groups of `ROWS` rows.
    pub(crate) w16: Vec<u8>,
    /// Room for tiles of integer sums.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "only the form on AMX has such tiles")
    )]
    pub(crate) sums: Buffer,
    /// Merged partitions: `[row]`, `[row]`, `[row][dim_v]`.
    total_m: Vec<f32>,
    total_l: Vec<f32>,
    total_acc: Vec<f32>,
    /// Ranking of kept cells, `[query][cell]`, and the outcome, `[query][page]`.
    rank: Vec<f32>,
    chosen: Vec<u64>,
    order: Vec<u32>,
    /// Number of the call, and the task in it, whose queries these are.
    started: (u64, usize),
}

thread_local! {
    static TILES: RefCell<Vec<Tile>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `n` of the thread's tiles.
fn with_tiles(n: usize, f: impl FnOnce(&mut [Tile])) {
    TILES.with_borrow_mut(|tiles| {
        if tiles.len() < n {
            tiles.resize_with(n, Tile::new);
        }
        f(&mut tiles[..n]);
    });
}

/// Some queries of one sequence, and the kv heads whose cells they go through together, page by page.
struct Task {
    seq: usize,
    queries: Range<usize>,
    heads_kv: Range<usize>,
    kept: Range<usize>,
    raw: Range<usize>,
}

impl Task {
    fn n_parts(&self) -> usize {
        self.kept.len() + self.raw.len()
    }

    /// Rows of each of its tiles.
    fn n_rows(&self, call: &Call<'_>) -> usize {
        self.queries.len() * call.group
    }
}

/// A sequence without its output, which threads share.
struct Cells<'a> {
    q: &'a [f32],
    visible: &'a [Visible],
    kept: &'a [&'a [u8]],
    raw: &'a [&'a [u8]],
    raw_base: u64,
    n_always: usize,
    top_k: usize,
}

/// What does not differ between tasks.
struct Call<'a> {
    kernels: PageKernels,
    layout: &'a PageLayout,
    n_head: usize,
    group: usize,
    scale: f32,
}

/// [`super::attend`] by an instruction set's kernels; shapes are checked.
pub(crate) fn attend(
    kernels: PageKernels,
    pool: &Pool,
    layout: &PageLayout,
    n_head: usize,
    scale: f32,
    seqs: &mut [Sequence<'_>],
) {
    let call = Call {
        kernels,
        layout,
        n_head,
        group: n_head / layout.n_head_kv,
        scale,
    };
    let mut cells = Vec::with_capacity(seqs.len());
    let mut outs = Vec::with_capacity(seqs.len());
    for seq in seqs {
        cells.push(Cells {
            q: seq.q,
            visible: seq.visible,
            kept: seq.kept,
            raw: seq.raw,
            raw_base: seq.raw_base,
            n_always: seq.n_always as usize,
            top_k: seq.top_k as usize,
        });
        outs.push(SplitMut::new(&mut *seq.out));
    }
    let tasks = tasks(&call, &cells, pool.n_threads());
    let out = |task: &Task, tiles: &[Tile]| {
        let width = layout.head_dim_v;
        for (head_kv, tile) in task.heads_kv.clone().zip(tiles) {
            for row in 0..tile.n_rows {
                let query = task.queries.start + row / call.group;
                let head = head_kv * call.group + row % call.group;
                let first = (query * n_head + head) * width;
                // SAFETY: every row of every tile of every task is a different query or head.
                let out = unsafe { outs[task.seq].part(first..first + width) };
                tile.finish(row, out);
            }
        }
    };
    // Few tasks (decode) are split by partitions, whose sums meet in a second region.
    let items: Vec<(usize, usize)> = tasks
        .iter()
        .enumerate()
        .flat_map(|(t, task)| (0..task.n_parts()).map(move |part| (t, part)))
        .collect();
    if pool.n_threads() == 1 || tasks.len() >= 8 * pool.n_threads() || items.len() <= tasks.len() {
        pool.for_each(tasks.len(), 1, |range| {
            for task in &tasks[range] {
                let cells = &cells[task.seq];
                with_tiles(task.heads_kv.len(), |tiles| {
                    for (head_kv, tile) in task.heads_kv.clone().zip(&mut *tiles) {
                        tile.start(&call, cells, task, head_kv);
                    }
                    for part in 0..task.n_parts() {
                        partition(tiles, &call, cells, task, part);
                        tiles.iter_mut().for_each(Tile::merge);
                    }
                    out(task, tiles);
                });
            }
        });
        return;
    }
    // Per row of a partition: its largest score, its sum of weights, its weighted values.
    let row_len = 2 + layout.dim_v_padded();
    let mut first_row = Vec::with_capacity(items.len() + 1);
    first_row.push(0);
    for &(t, _) in &items {
        let rows = tasks[t].n_rows(&call) * tasks[t].heads_kv.len();
        first_row.push(first_row.last().expect("starts with 0") + rows);
    }
    let mut partial = vec![0f32; first_row.last().expect("starts with 0") * row_len];
    static CALLS: AtomicU64 = AtomicU64::new(1);
    let number = CALLS.fetch_add(1, Ordering::Relaxed);
    {
        let partial = SplitMut::new(&mut partial);
        // Neighbouring partitions lie beside each other in memory: a stream for each thread.
        pool.for_each_in_parts(items.len(), 1, |range| {
            for i in range {
                let (t, part) = items[i];
                let task = &tasks[t];
                let cells = &cells[task.seq];
                let tile_len = task.n_rows(&call) * row_len;
                // SAFETY: every item owns the rows between its first and the next item's.
                let rows =
                    unsafe { partial.part(first_row[i] * row_len..first_row[i + 1] * row_len) };
                with_tiles(task.heads_kv.len(), |tiles| {
                    for (head_kv, tile) in task.heads_kv.clone().zip(&mut *tiles) {
                        // A thread's next partition is mostly one of the same task.
                        if tile.started != (number, t) {
                            tile.start(&call, cells, task, head_kv);
                            tile.started = (number, t);
                        }
                    }
                    partition(tiles, &call, cells, task, part);
                    for (tile, rows) in tiles.iter_mut().zip(rows.chunks_exact_mut(tile_len)) {
                        tile.save(rows);
                    }
                });
            }
        });
    }
    let mut first_item = Vec::with_capacity(tasks.len());
    let mut n = 0;
    for task in &tasks {
        first_item.push(n);
        n += task.n_parts();
    }
    pool.for_each(tasks.len(), 1, |range| {
        for t in range {
            let task = &tasks[t];
            let tile_len = task.n_rows(&call) * row_len;
            with_tiles(task.heads_kv.len(), |tiles| {
                tiles.iter_mut().for_each(|tile| tile.shape(&call, task));
                for item in first_item[t]..first_item[t] + task.n_parts() {
                    let rows = &partial[first_row[item] * row_len..first_row[item + 1] * row_len];
                    for (tile, rows) in tiles.iter_mut().zip(rows.chunks_exact(tile_len)) {
                        tile.load(rows);
                        tile.merge();
                    }
                }
                out(task, tiles);
            });
        }
    });
}

/// Cuts the call into tasks; the largest come first within a sequence's heads by nature. Where there are few
/// queries (decode), memory is what takes time: as many kv heads go through the pages together as
/// leave every thread some partitions, since their cells lie beside each other, and a processor that foresees
/// one stream does not foresee one that leaves out every other head.
fn tasks(call: &Call<'_>, cells: &[Cells<'_>], n_threads: usize) -> Vec<Task> {
    let step = (TILE_ROWS / call.group).max(1);
    let n_head_kv = call.layout.n_head_kv;
    let mut all_heads = Vec::new();
    for (seq, cells) in cells.iter().enumerate() {
        for start in (0..cells.visible.len()).step_by(step) {
            let queries = start..(start + step).min(cells.visible.len());
            let visible = &cells.visible[queries.clone()];
            let n_kept = visible.iter().map(|v| v.n_kept).max().unwrap_or(0) as usize;
            let raw = visible.iter().filter(|v| v.raw_begin < v.raw_end);
            let begin = raw.clone().map(|v| v.raw_begin).min().unwrap_or(0);
            let end = raw.map(|v| v.raw_end).max().unwrap_or(0);
            let part = PARTITION_CELLS as u64;
            all_heads.push(Task {
                seq,
                queries,
                heads_kv: 0..n_head_kv,
                kept: 0..n_kept.div_ceil(PARTITION_CELLS),
                raw: (begin / part) as usize..end.div_ceil(part) as usize,
            });
        }
    }
    let n_parts: usize = all_heads.iter().map(Task::n_parts).sum();
    let spare = match n_threads {
        1 => n_head_kv,
        _ => n_head_kv * n_parts / (4 * n_threads),
    };
    let mut tasks = Vec::new();
    for task in all_heads {
        let together = spare.min(TILE_ROWS / task.n_rows(call)).clamp(1, n_head_kv);
        for first in (0..n_head_kv).step_by(together) {
            tasks.push(Task {
                queries: task.queries.clone(),
                heads_kv: first..(first + together).min(n_head_kv),
                kept: task.kept.clone(),
                raw: task.raw.clone(),
                ..task
            });
        }
    }
    tasks
}

/// Runs the soft-max of one partition from empty sums, a tile for each of the task's kv heads: kept
/// partitions first, then raw.
fn partition(tiles: &mut [Tile], call: &Call<'_>, cells: &Cells<'_>, task: &Task, part: usize) {
    for tile in &mut *tiles {
        tile.m.fill(f32::NEG_INFINITY);
        tile.l.slice(tile.n_rows * 16).fill(0.0);
        tile.acc.slice(tile.n_rows * tile.dim_v).fill(0.0);
    }
    let kept = part < task.kept.len();
    let first = if kept {
        task.kept.start + part
    } else {
        task.raw.start + part - task.kept.len()
    } as u64
        * PARTITION_CELLS as u64;
    // SAFETY: the kernels' set is available; so below.
    unsafe { (call.kernels.enter)() };
    for start in (first..first + PARTITION_CELLS as u64).step_by(PAGE_CELLS) {
        for (head_kv, tile) in task.heads_kv.clone().zip(&mut *tiles) {
            tile.page(call, cells, task, head_kv, kept, start);
        }
    }
    // SAFETY: as above.
    unsafe { (call.kernels.leave)() };
}

/// Nothing, where an instruction set needs nothing before and after pages.
pub(crate) unsafe fn nothing() {}

impl Tile {
    pub(crate) fn new() -> Tile {
        Tile {
            n_rows: 0,
            dim_k: 0,
            dim_v: 0,
            ty_k: KvType::F32,
            ty_v: KvType::F32,
            q: Buffer::default(),
            q16: Vec::new(),
            q16_bias: Vec::new(),
            q8: Vec::new(),
            q16_step: Vec::new(),
            s: Buffer::default(),
            seen: Vec::new(),
            m: Vec::new(),
            alpha: Vec::new(),
            beta: Vec::new(),
            l: Buffer::default(),
            acc: Buffer::default(),
            wide: Buffer::default(),
            ahead: Ahead::NOTHING,
            pace: Pace::new(&[], Ahead::NOTHING),
            w16: Vec::new(),
            sums: Buffer::default(),
            total_m: Vec::new(),
            total_l: Vec::new(),
            total_acc: Vec::new(),
            rank: Vec::new(),
            chosen: Vec::new(),
            order: Vec::new(),
            started: (0, 0),
        }
    }

    /// Sizes the tile for a task and empties the total.
    fn shape(&mut self, call: &Call<'_>, task: &Task) {
        let n = task.queries.len() * call.group;
        self.started = (0, 0);
        self.n_rows = n;
        self.dim_k = call.layout.head_dim_k;
        self.dim_v = call.layout.dim_v_padded();
        self.ty_k = call.layout.ty_k;
        self.ty_v = call.layout.ty_v;
        self.s.room(n * PAGE_CELLS);
        self.l.room(n * 16);
        self.acc.room(n * self.dim_v);
        self.wide
            .room((2 * n).max(PAGE_CELLS * self.dim_k.max(self.dim_v)));
        self.w16
            .resize(n.next_multiple_of(ROWS) * 2 * PAGE_CELLS, 0);
        self.seen.resize(n, 0);
        self.alpha.resize(n, 0.0);
        self.beta.resize(n, 0.0);
        self.m.resize(n, 0.0);
        self.total_m.clear();
        self.total_m.resize(n, f32::NEG_INFINITY);
        self.total_l.clear();
        self.total_l.resize(n, 0.0);
        self.total_acc.clear();
        self.total_acc.resize(n * self.dim_v, 0.0);
    }

    /// Takes in a task's queries and ranks kept cells where `top_k` asks for it.
    fn start(&mut self, call: &Call<'_>, cells: &Cells<'_>, task: &Task, head_kv: usize) {
        self.shape(call, task);
        let dim = self.dim_k;
        // Scores come out as logarithms to base 2, the exponential that hardware helps with.
        let factor = call.scale * std::f32::consts::LOG2_E;
        let q = self.q.slice(self.n_rows.next_multiple_of(ROWS) * dim);
        for row in 0..self.n_rows {
            let query = task.queries.start + row / call.group;
            let head = head_kv * call.group + row % call.group;
            let from = &cells.q[(query * call.n_head + head) * dim..][..dim];
            let to = &mut q[row / ROWS * ROWS * dim + row % ROWS..];
            for (i, x) in from.iter().enumerate() {
                to[i * ROWS] = x * factor;
            }
        }
        if self.ty_k == KvType::Q8_0 && call.kernels.integer_q {
            self.quantize_q();
            if call.kernels.byte_q {
                self.byte_q();
            }
        }
        if cells.top_k > 0 {
            self.choose(call, cells, task, head_kv);
        }
    }

    /// Fills `q16`, its biases and steps.
    fn quantize_q(&mut self) {
        let dim = self.dim_k;
        let n_blocks = dim.div_ceil(BLOCK);
        let n_words = n_blocks * BLOCK / 4;
        let q = self.q.slice(self.n_rows.next_multiple_of(ROWS) * dim);
        let (groups, _) = q.as_chunks::<ROWS>();
        self.q16.clear();
        self.q16
            .resize(self.n_rows.next_multiple_of(ROWS) * n_words * 2, 0);
        self.q16_bias.resize(self.n_rows * n_blocks, 0);
        self.q16_step.resize(self.n_rows, 0.0);
        for first in (0..self.n_rows).step_by(ROWS) {
            // Rows side by side, as they lie; what stands for missing ones is not read.
            let n = ROWS.min(self.n_rows - first);
            let q = &groups[first / ROWS * dim..][..dim];
            let mut largest = [0f32; ROWS];
            for x in q {
                for r in 0..ROWS {
                    largest[r] = largest[r].max(x[r].abs());
                }
            }
            let inverse = largest.map(|l| if l > 0.0 { Q16_MAX / l } else { 0.0 });
            for r in 0..n {
                self.q16_step[first + r] = largest[r] / Q16_MAX;
            }
            for b in 0..n_blocks {
                let mut sum = [0; ROWS];
                for word in b * BLOCK / 4..(b + 1) * BLOCK / 4 {
                    let mut x = [[0; ROWS]; 4];
                    for (j, x) in x.iter_mut().enumerate() {
                        let Some(q) = q.get(word * 4 + j) else { break };
                        for r in 0..ROWS {
                            // What is not a number becomes some number of 16 bits.
                            x[r] = i32::from(round(q[r] * inverse[r]) as i16);
                            sum[r] += x[r];
                        }
                    }
                    let to = &mut self.q16[q16_word(first, word, n_words)..][..2 * ROWS];
                    for r in 0..ROWS {
                        to[r] = (x[0][r] & 0xffff) | (x[2][r] << 16);
                        to[ROWS + r] = (x[1][r] & 0xffff) | (x[3][r] << 16);
                    }
                }
                for r in 0..n {
                    self.q16_bias[(first + r) * n_blocks + b] = -128 * sum[r];
                }
            }
        }
    }

    /// Fills `q8` from `q16`.
    fn byte_q(&mut self) {
        let n_blocks = self.dim_k.div_ceil(BLOCK);
        let n_words = n_blocks * BLOCK / 4;
        self.q8.clear();
        self.q8
            .resize(self.n_rows.next_multiple_of(ROWS) * n_blocks * BLOCK * 2, 0);
        for row in 0..self.n_rows {
            for word in 0..n_words {
                let from = q16_word(row, word, n_words);
                let (even, odd) = (self.q16[from], self.q16[from + ROWS]);
                let x = [even << 16 >> 16, odd << 16 >> 16, even >> 16, odd >> 16];
                let high = x.map(|x| ((x + 128) >> 8) as i8);
                let group = (row / ROWS * n_blocks + word * 4 / BLOCK) * 2 * ROWS;
                let to = (group + row % ROWS) * BLOCK + word * 4 % BLOCK;
                for i in 0..4 {
                    let low = x[i] - (i32::from(high[i]) << 8);
                    self.q8[to + i] = high[i] as u8;
                    self.q8[to + ROWS * BLOCK + i] = low as u8;
                }
            }
        }
    }

    /// Finds each query's `top_k` kept cells; leaves them in `chosen`.
    fn choose(&mut self, call: &Call<'_>, cells: &Cells<'_>, task: &Task, head_kv: usize) {
        let visible = &cells.visible[task.queries.clone()];
        let n_kept = visible.iter().map(|v| v.n_kept).max().unwrap_or(0) as usize;
        let n_pages = n_kept.div_ceil(PAGE_CELLS);
        let width = n_pages * PAGE_CELLS;
        let free = cells.n_always + cells.top_k;
        self.chosen.clear();
        self.chosen.resize(visible.len() * n_pages, u64::MAX);
        if n_kept <= free {
            return; // none is ranked away
        }
        self.rank.clear();
        self.rank.resize(visible.len() * width, 0.0);
        // SAFETY: the kernels' set is available; so below.
        unsafe { (call.kernels.enter)() };
        for page in cells.n_always / PAGE_CELLS..n_pages {
            let seen = first_bits(n_kept - page * PAGE_CELLS);
            // SAFETY: the layout's head lies in the page (`check`); the kernels' set is available.
            unsafe {
                let keys = cells.kept[page]
                    .as_ptr()
                    .add(head_kv * call.layout.head_bytes());
                (call.kernels.scores)(self, keys, seen);
            }
            let s = self.s.slice(self.n_rows * PAGE_CELLS);
            for (row, s) in s.chunks_exact(PAGE_CELLS).enumerate() {
                let rank = &mut self.rank[row / call.group * width + page * PAGE_CELLS..];
                for (rank, s) in rank.iter_mut().zip(s) {
                    *rank += s;
                }
            }
        }
        // SAFETY: as above.
        unsafe { (call.kernels.leave)() };
        for (i, v) in visible.iter().enumerate() {
            let n = v.n_kept as usize;
            if n <= free {
                continue;
            }
            let rank = &self.rank[i * width..][..width];
            self.order.clear();
            self.order.extend(cells.n_always as u32..n as u32);
            self.order.select_nth_unstable_by(cells.top_k, |&a, &b| {
                rank[b as usize]
                    .total_cmp(&rank[a as usize])
                    .then(a.cmp(&b))
            });
            let chosen = &mut self.chosen[i * n_pages..][..n_pages];
            for &cell in &self.order[cells.top_k..] {
                chosen[cell as usize / PAGE_CELLS] &= !(1 << (cell as usize % PAGE_CELLS));
            }
        }
    }

    /// Adds the page of cells `start..` of one of the regions to the partition.
    fn page(
        &mut self,
        call: &Call<'_>,
        cells: &Cells<'_>,
        task: &Task,
        head_kv: usize,
        kept: bool,
        start: u64,
    ) {
        let visible = &cells.visible[task.queries.clone()];
        let n_kept = visible.iter().map(|v| v.n_kept).max().unwrap_or(0) as usize;
        let n_pages = n_kept.div_ceil(PAGE_CELLS);
        let mut any = 0;
        for (i, v) in visible.iter().enumerate() {
            let seen = if kept {
                let seen = bits_in(0, u64::from(v.n_kept), start);
                if seen != 0 && cells.top_k > 0 {
                    seen & self.chosen[i * n_pages + start as usize / PAGE_CELLS]
                } else {
                    seen
                }
            } else {
                bits_in(v.raw_begin, v.raw_end, start)
            };
            any |= seen;
            self.seen[i * call.group..(i + 1) * call.group].fill(seen);
        }
        if any == 0 {
            return;
        }
        let (pages, at) = if kept {
            (cells.kept, start as usize / PAGE_CELLS)
        } else {
            let at = (start - cells.raw_base) / PAGE_CELLS as u64;
            (cells.raw, at as usize)
        };
        let page = pages[at];
        let head = head_kv * call.layout.head_bytes();
        let own = &page[head..][..call.layout.head_bytes()];
        let end = own.as_ptr_range().end;
        let next = pages.get(at + 1).map_or(page, |next| next);
        let first = task.heads_kv.start * call.layout.head_bytes();
        self.ahead = Ahead {
            end,
            jump: if head_kv + 1 < task.heads_kv.end {
                0 // the next head's cells follow
            } else {
                next[first..].as_ptr() as isize - end as isize
            },
        };
        self.pace = Pace::new(own, self.ahead);
        // SAFETY: the page has the layout's size (`check`), so the head's keys and values
        // lie in it; the kernels' set is available.
        unsafe {
            let keys = page.as_ptr().add(head);
            (call.kernels.scores)(self, keys, any);
            (call.kernels.soft_max)(self);
            (call.kernels.weigh)(self, keys.add(call.layout.k_bytes()), any);
        }
    }

    /// A partition's sum of weights of one row.
    fn weights(&mut self, row: usize) -> f32 {
        let l = &self.l.slice(self.n_rows * 16)[row * 16..][..16];
        let mut sums = [0f32; 4];
        for (i, l) in l.iter().enumerate() {
            sums[i % 4] += l;
        }
        (sums[0] + sums[2]) + (sums[1] + sums[3])
    }

    /// Adds the finished partition to the total.
    fn merge(&mut self) {
        for row in 0..self.n_rows {
            let m = self.m[row];
            if m == f32::NEG_INFINITY {
                continue; // the row sees nothing of this partition
            }
            let l = self.weights(row);
            let largest = self.total_m[row].max(m);
            let old = (self.total_m[row] - largest).exp2();
            let new = (m - largest).exp2();
            self.total_m[row] = largest;
            self.total_l[row] = self.total_l[row] * old + l * new;
            let acc = &self.acc.slice(self.n_rows * self.dim_v)[row * self.dim_v..][..self.dim_v];
            let total = &mut self.total_acc[row * self.dim_v..][..self.dim_v];
            for (total, acc) in total.iter_mut().zip(acc) {
                *total = *total * old + acc * new;
            }
        }
    }

    /// Writes the finished partition to `[row][2 + dim_v]` numbers.
    fn save(&mut self, rows: &mut [f32]) {
        let dim = self.dim_v;
        for row in 0..self.n_rows {
            let to = &mut rows[row * (2 + dim)..][..2 + dim];
            to[0] = self.m[row];
            to[1] = self.weights(row);
            let acc = self.acc.slice(self.n_rows * dim);
            to[2..].copy_from_slice(&acc[row * dim..][..dim]);
        }
    }

    /// The inverse of [`Tile::save`].
    fn load(&mut self, rows: &[f32]) {
        let dim = self.dim_v;
        for row in 0..self.n_rows {
            let from = &rows[row * (2 + dim)..][..2 + dim];
            self.m[row] = from[0];
            let l = &mut self.l.slice(self.n_rows * 16)[row * 16..][..16];
            l.fill(0.0);
            l[0] = from[1];
            let acc = self.acc.slice(self.n_rows * dim);
            acc[row * dim..][..dim].copy_from_slice(&from[2..]);
        }
    }

    /// The result of one row.
    fn finish(&self, row: usize, out: &mut [f32]) {
        let l = self.total_l[row];
        let inverse = if l > 0.0 { 1.0 / l } else { 0.0 };
        let total = &self.total_acc[row * self.dim_v..];
        for (out, total) in out.iter_mut().zip(total) {
            *out = total * inverse;
        }
    }

    /// Offset of the first number of a value chunk and its width, both in numbers.
    pub(crate) fn v_chunk(&self, chunk: usize) -> (usize, usize) {
        let width = BLOCK.min(self.dim_v - chunk * BLOCK);
        (chunk * BLOCK * PAGE_CELLS, width)
    }
}

/// The nearest integer, the even one of two; for magnitudes below 2^22. Adding 1.5 * 2^23 leaves
/// the integer in the low bits; `round_ties_even` is a library call on plain x86-64.
fn round(x: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

/// Where `q16` has the even numbers of word `word` of a row; the odd ones are `ROWS` on.
fn q16_word(row: usize, word: usize, n_words: usize) -> usize {
    (row / ROWS * n_words + word) * 2 * ROWS + row % ROWS
}

/// Bits `0..n`, all of them from 64 on.
fn first_bits(n: usize) -> u64 {
    if n >= PAGE_CELLS {
        u64::MAX
    } else {
        (1 << n) - 1
    }
}

/// Which of the cells `start..start + 64` lie in `begin..end`.
fn bits_in(begin: u64, end: u64, start: u64) -> u64 {
    if begin >= end || end <= start || begin >= start + PAGE_CELLS as u64 {
        return 0;
    }
    let low = begin.saturating_sub(start) as usize;
    let high = (end - start).min(PAGE_CELLS as u64) as usize;
    first_bits(high) & !first_bits(low)
}

/// The runs of set bits, lowest first, as ranges of bit numbers.
pub(crate) fn runs(mut bits: u64) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let start = bits.trailing_zeros() as usize;
        let len = (bits >> start).trailing_ones() as usize;
        bits &= !(first_bits(start + len) & !first_bits(start));
        Some(start..start + len)
    })
}

/// Whether any of the 32 cells of a half is marked.
pub(crate) fn half_seen(seen: u64, half: usize) -> bool {
    seen >> (half * HALF_CELLS) & u64::from(u32::MAX) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_bits_are_the_overlap() {
        assert_eq!(bits_in(0, 10, 0), 0x3ff);
        assert_eq!(bits_in(60, 70, 0), 0xf << 60);
        assert_eq!(bits_in(60, 70, 64), 0x3f);
        assert_eq!(bits_in(0, 1000, 64), u64::MAX);
        assert_eq!(bits_in(5, 5, 0), 0);
        assert_eq!(bits_in(64, 65, 0), 0);
        assert_eq!(bits_in(0, 64, 64), 0);
    }

    #[test]
    fn runs_cover_the_bits_in_order() {
        for bits in [0, 1, u64::MAX, 0xf0f0, 1 << 63, !1, 0x8000_0000_0000_0001] {
            let mut got = 0u64;
            let mut end = None;
            for run in runs(bits) {
                assert!(end.is_none_or(|e| run.start > e));
                end = Some(run.end);
                for bit in run {
                    got |= 1 << bit;
                }
            }
            assert_eq!(got, bits);
        }
    }

    /// Instruction sets that want bytes are rarer than those that want integers: both are checked
    /// wherever tests run.
    #[test]
    fn bytes_of_queries_are_their_integers() {
        let (n_rows, dim) = (11, 50);
        let mut tile = Tile::new();
        tile.n_rows = n_rows;
        tile.dim_k = dim;
        let q = tile.q.slice(n_rows.next_multiple_of(ROWS) * dim);
        for (i, q) in q.iter_mut().enumerate() {
            *q = (i as f32 * 0.7).sin() * (i % 13) as f32;
        }
        tile.quantize_q();
        tile.byte_q();
        let n_blocks = dim.div_ceil(BLOCK);
        let n_words = n_blocks * BLOCK / 4;
        for row in 0..n_rows {
            let mut sums = vec![0; n_blocks];
            let mut largest = 0;
            for i in 0..n_blocks * BLOCK {
                let word = tile.q16[q16_word(row, i / 4, n_words) + i % 2 * ROWS];
                let x = i32::from((word >> (i % 4 / 2 * 16)) as i16);
                let group = (row / ROWS * n_blocks + i / BLOCK) * 2 * ROWS + row % ROWS;
                let high = i32::from(tile.q8[group * BLOCK + i % BLOCK] as i8);
                let low = i32::from(tile.q8[(group + ROWS) * BLOCK + i % BLOCK] as i8);
                assert_eq!((high << 8) + low, x, "row {row}, number {i}");
                sums[i / BLOCK] += x;
                largest = largest.max(x.abs());
            }
            assert_eq!(largest, Q16_MAX as i32, "row {row}");
            for (b, sum) in sums.iter().enumerate() {
                assert_eq!(tile.q16_bias[row * n_blocks + b], -128 * sum);
            }
        }
    }
}
