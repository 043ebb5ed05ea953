//! `attend` page by page with 8 lanes: lanes are cells while scores are made and dimensions while
//! values are weighed, as in the AVX-512 form, whose order of work and whose results these are.
//!
//! F16, BF16 and F32 cells are multiplied as F32: three rows by four vectors of cells stay in registers,
//! and the first rows' pass leaves the cells in F32 for the others. Q8_0 cells, queries, and weights of a
//! page are multiplied as 16-bit integers.

use crate::attend::ahead::Ahead;
use crate::attend::layout::{BLOCK, HALF_CELLS, K_BLOCK_BYTES, KvType, PAGE_CELLS, V_BLOCK_BYTES};
use crate::attend::tile::{PageKernels, ROWS, Tile, half_seen, nothing, runs};
use std::arch::asm;
use std::arch::x86_64::*;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Rows of F32 sums that the registers hold, each of four vectors.
const R: usize = 3;
/// The same for those that convert the cells.
const R_FIRST: usize = 2;
/// Rows of integer sums that they hold, each of two.
const R_Q8: usize = 4;
/// Bytes from the cell in use to the one asked for, as in the AVX-512 form.
const AHEAD: usize = 8192;

/// The kernels of AVX2.
pub(crate) const KERNELS: PageKernels = kernels::<false>();
/// The kernels of AVX-VNNI.
pub(crate) const KERNELS_VNNI: PageKernels = kernels::<true>();

const fn kernels<const VNNI: bool>() -> PageKernels {
    PageKernels {
        scores: scores::<VNNI>,
        soft_max,
        weigh: weigh::<VNNI>,
        enter: nothing,
        leave: nothing,
        integer_q: true,
        byte_q: false,
    }
}

/// `sum + a b` of pairs of 16-bit integers in every lane. By name, as compilers would bring the sums
/// into an order that needs more registers than there are.
///
/// # Safety
/// With `VNNI` the processor has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot<const VNNI: bool>(mut sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
    // SAFETY: registers only; the instruction is there.
    unsafe {
        if VNNI {
            asm!(
                "{{vex}} vpdpwssd {sum}, {a}, {b}",
                sum = inout(ymm_reg) sum,
                a = in(ymm_reg) a,
                b = in(ymm_reg) b,
                options(pure, nomem, nostack, preserves_flags),
            );
        } else {
            asm!(
                "vpmaddwd {t}, {a}, {b}",
                "vpaddd {sum}, {sum}, {t}",
                sum = inout(ymm_reg) sum,
                a = in(ymm_reg) a,
                b = in(ymm_reg) b,
                t = out(ymm_reg) _,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
    }
    sum
}

/// Asks for later cells, a cache line at a time, evenly spread over the arithmetic on the cells in use: a
/// core has two dozen requests on their way at once, and what is asked for in a burst waits.
#[derive(Clone, Copy)]
struct Asking {
    ahead: Ahead,
    /// The cell's line that a later one stands for.
    line: *const u8,
    /// Ticks from a line to the next.
    every: usize,
    wait: usize,
}

impl Asking {
    /// Lines from `first` on, one for each `every` ticks.
    fn new(ahead: Ahead, first: *const u8, every: usize) -> Asking {
        Asking {
            ahead,
            line: first,
            every,
            wait: 1,
        }
    }

    #[inline(always)]
    fn tick(&mut self) {
        self.wait -= 1;
        if self.wait == 0 {
            self.ahead.ask(self.line, AHEAD);
            self.line = self.line.wrapping_add(64);
            self.wait = self.every;
        }
    }
}

/// Calls `$f::<N, ..>` with the constant `N`, at most 3, equal to `$rows`.
macro_rules! with_rows {
    ($rows:expr, $f:ident::<$($g:tt),*>($($arg:expr),*)) => {
        match $rows {
            1 => $f::<1, $($g),*>($($arg),*),
            2 => $f::<2, $($g),*>($($arg),*),
            _ => $f::<R, $($g),*>($($arg),*),
        }
    };
}

/// 2^x for x <= 0, to 3e-7 relative; exactly 1 at 0, and 0 below -126.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp2(x: __m256) -> __m256 {
    let least = _mm256_set1_ps(-126.0);
    let some = _mm256_cmp_ps::<_CMP_GE_OQ>(x, least);
    let x = _mm256_max_ps(x, least);
    let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let f = _mm256_sub_ps(x, whole);
    // Minimax over [-1/2, 1/2] with the constant term held at 1.
    let p = _mm256_set1_ps(0.001_326_472);
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.009_671_513));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.055_507_336));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.240_222_42));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(std::f32::consts::LN_2));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0));
    let power = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(whole));
    let y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
    _mm256_and_ps(y, some)
}

/// Eight numbers of type `TY`, the `i`-th to the `i + 7`-th after `p`.
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load<const TY: u8>(p: *const u8, i: usize) -> __m256 {
    // SAFETY: readable by the caller's promise.
    unsafe {
        match TY {
            F32 => _mm256_loadu_ps(p.cast::<f32>().add(i)),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.add(2 * i).cast())),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(2 * i).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}

/// See [`PageKernels::scores`].
///
/// # Safety
/// As there; with `VNNI` the processor has AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores<const VNNI: bool>(tile: &mut Tile, keys: *const u8, seen: u64) {
    // SAFETY: `keys` are a page's of this type and dimension, by the caller's promise.
    unsafe {
        match tile.ty_k {
            KvType::F32 => scores_from::<F32>(tile, keys, seen),
            KvType::F16 => scores_from::<F16>(tile, keys, seen),
            KvType::BF16 => scores_from::<BF16>(tile, keys, seen),
            KvType::Q8_0 => scores_q8_0::<VNNI>(tile, keys, seen),
        }
    }
}

/// [`scores`] of cells of type `TY`.
///
/// # Safety
/// As [`PageKernels::scores`]; the cells are of that type.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores_from<const TY: u8>(tile: &mut Tile, keys: *const u8, seen: u64) {
    let (dim, n_rows) = (tile.dim_k, tile.n_rows);
    let (q, s, wide) = (tile.q.ptr(), tile.s.ptr(), tile.wide.ptr());
    let size = if TY == F32 { 4 } else { 2 };
    // Few rows use cells once or twice: what is left for them in F32 should stay in the L1 cache.
    let step = if n_rows <= ROWS { BLOCK } else { dim };
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        let start = keys.wrapping_add(half * dim * HALF_CELLS * size);
        let passes = n_rows / ROWS * ROWS.div_ceil(R) + (n_rows % ROWS).div_ceil(R);
        let mut asking = Asking::new(tile.ahead, start, (passes * 2).div_ceil(size));
        for first in (0..dim).step_by(step) {
            let n_dims = step.min(dim - first);
            // SAFETY: half a page holds `dim` rows of 32 keys' numbers; `q`, `s` and `wide` are sized
            // for the tile's rows and dimensions (`Tile::shape`, `Tile::start`).
            unsafe {
                let keys = keys.add((half * dim + first) * HALF_CELLS * size);
                for row in (0..n_rows).step_by(ROWS) {
                    let end = ROWS.min(n_rows - row);
                    let mut r = 0;
                    while r < end {
                        let rows = Scores {
                            q: q.add(row * dim + first * ROWS + r),
                            n_dims,
                            s: s.add((row + r) * PAGE_CELLS + half * HALF_CELLS),
                            add: first > 0,
                            wide,
                        };
                        let asking = &mut asking;
                        let n = end - r;
                        r += if TY == F32 {
                            with_rows!(n, score_rows::<F32, false>(&rows, keys, asking))
                        } else if row + r > 0 {
                            with_rows!(n, score_rows::<F32, false>(&rows, wide.cast(), asking))
                        } else if n_rows == 1 {
                            score_rows::<1, TY, false>(&rows, keys, asking)
                        } else {
                            score_rows::<R_FIRST, TY, true>(&rows, keys, asking)
                        };
                    }
                }
            }
        }
    }
}

/// Some rows of a tile at some dimensions of half a page of keys.
struct Scores {
    /// The first row's query, from the first of these dimensions on.
    q: *const f32,
    n_dims: usize,
    s: *mut f32,
    /// Whether `s` holds the sums over earlier dimensions.
    add: bool,
    wide: *mut f32,
}

/// `s[r][c] += sum_i q[i][r] keys[i][c]` for `N` rows and 32 cells. `KEEP`: the keys are left in `wide`.
/// Returns `N`.
///
/// # Safety
/// `rows` are `N` rows, `keys` as many dimensions of 32 cells as it says.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn score_rows<const N: usize, const TY: u8, const KEEP: bool>(
    rows: &Scores,
    keys: *const u8,
    asking: &mut Asking,
) -> usize {
    let mut ask = *asking;
    let mut sum = [[_mm256_setzero_ps(); 4]; N];
    // SAFETY: `n_dims` rows of 32 keys' numbers and of `ROWS` queries; `s` has `N` rows.
    unsafe {
        if rows.add {
            for r in 0..N {
                for j in 0..4 {
                    sum[r][j] = _mm256_loadu_ps(rows.s.add(r * PAGE_CELLS + j * 8));
                }
            }
        }
        for i in 0..rows.n_dims {
            ask.tick();
            let mut q = [_mm256_setzero_ps(); N];
            for r in 0..N {
                q[r] = _mm256_set1_ps(*rows.q.add(i * ROWS + r));
            }
            for j in 0..4 {
                let k = load::<TY>(keys, i * HALF_CELLS + j * 8);
                if KEEP {
                    _mm256_storeu_ps(rows.wide.add(i * HALF_CELLS + j * 8), k);
                }
                for r in 0..N {
                    sum[r][j] = _mm256_fmadd_ps(q[r], k, sum[r][j]);
                }
            }
        }
        for r in 0..N {
            for j in 0..4 {
                _mm256_storeu_ps(rows.s.add(r * PAGE_CELLS + j * 8), sum[r][j]);
            }
        }
    }
    *asking = ask;
    N
}

/// [`scores`] of Q8_0 keys.
///
/// # Safety
/// As [`PageKernels::scores`]; the keys are of that type.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores_q8_0<const VNNI: bool>(tile: &mut Tile, keys: *const u8, seen: u64) {
    let (n_rows, n_blocks) = (tile.n_rows, tile.dim_k.div_ceil(BLOCK));
    let s = tile.s.ptr();
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        let start = keys.wrapping_add(half * n_blocks * K_BLOCK_BYTES);
        let mut asking = Asking::new(tile.ahead, start, n_rows.div_ceil(R_Q8));
        for row in (0..n_rows).step_by(R_Q8) {
            // SAFETY: half a page holds `n_blocks` blocks; `s` has `n_rows` rows, `q16` and its biases
            // cover `n_blocks` blocks of whole groups of rows.
            unsafe {
                let keys = start;
                let group = row / ROWS * n_blocks * (BLOCK / 2) * ROWS;
                let rows = ScoresQ8 {
                    q: tile.q16.as_ptr().add(group + row % ROWS),
                    bias: tile.q16_bias.as_ptr().add(row * n_blocks),
                    step: tile.q16_step.as_ptr().add(row),
                    n_blocks,
                    s: s.add(row * PAGE_CELLS + half * HALF_CELLS),
                };
                let asking = &mut asking;
                match n_rows - row {
                    1 => score_rows_q8_0::<1, VNNI>(&rows, keys, asking),
                    2 => score_rows_q8_0::<2, VNNI>(&rows, keys, asking),
                    3 => score_rows_q8_0::<3, VNNI>(&rows, keys, asking),
                    _ => score_rows_q8_0::<R_Q8, VNNI>(&rows, keys, asking),
                }
            }
        }
    }
}

/// Up to four rows of a tile at half a page of Q8_0 keys.
struct ScoresQ8 {
    /// The first row's integers.
    q: *const i32,
    /// The biases of its blocks, then the next row's.
    bias: *const i32,
    /// What an integer of each row is worth.
    step: *const f32,
    n_blocks: usize,
    s: *mut f32,
}

/// `s[r][c] = step[r] sum_b scale[b][c] sum_(i in b) q[r][i] keys[i][c]` for `N` rows and 32 cells.
///
/// # Safety
/// `rows` has `N` rows, `keys` is half a page.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn score_rows_q8_0<const N: usize, const VNNI: bool>(
    rows: &ScoresQ8,
    keys: *const u8,
    asking: &mut Asking,
) {
    let mut ask = *asking;
    const WORDS: usize = BLOCK / 4;
    let byte = _mm256_set1_epi16(0xff);
    for lane in (0..HALF_CELLS).step_by(16) {
        for b in 0..rows.n_blocks {
            // SAFETY: block `b` holds 8 words of 32 cells and their scales; `q` has `N` of `ROWS` rows,
            // `s` as many of `PAGE_CELLS`.
            unsafe {
                let keys = keys.add(b * K_BLOCK_BYTES);
                let scales = keys.add(WORDS * 128);
                let keys = keys.add(lane * 4);
                let q = rows.q.add(b * WORDS * 2 * ROWS);
                let mut sum = [[_mm256_setzero_si256(); 2]; N];
                for r in 0..N {
                    sum[r] = [_mm256_set1_epi32(*rows.bias.add(r * rows.n_blocks + b)); 2];
                }
                for word in 0..WORDS {
                    let k = keys.add(word * 128);
                    ask.tick();
                    let k = [
                        _mm256_loadu_si256(k.cast()),
                        _mm256_loadu_si256(k.add(32).cast()),
                    ];
                    let q = q.add(word * 2 * ROWS);
                    let even = [_mm256_and_si256(k[0], byte), _mm256_and_si256(k[1], byte)];
                    for r in 0..N {
                        let x = _mm256_set1_epi32(*q.add(r));
                        sum[r][0] = dot::<VNNI>(sum[r][0], even[0], x);
                        sum[r][1] = dot::<VNNI>(sum[r][1], even[1], x);
                    }
                    let odd = [_mm256_srli_epi16::<8>(k[0]), _mm256_srli_epi16::<8>(k[1])];
                    for r in 0..N {
                        let x = _mm256_set1_epi32(*q.add(ROWS + r));
                        sum[r][0] = dot::<VNNI>(sum[r][0], odd[0], x);
                        sum[r][1] = dot::<VNNI>(sum[r][1], odd[1], x);
                    }
                }
                if lane == 0 {
                    ask.tick(); // for the scales
                }
                let scale = [load::<F16>(scales, lane), load::<F16>(scales, lane + 8)];
                for r in 0..N {
                    for j in 0..2 {
                        // Sums of blocks wait in memory: the registers are full.
                        let s = rows.s.add(r * PAGE_CELLS + lane + j * 8);
                        let old = if b == 0 {
                            _mm256_setzero_ps()
                        } else {
                            _mm256_loadu_ps(s)
                        };
                        let x = _mm256_cvtepi32_ps(sum[r][j]);
                        _mm256_storeu_ps(s, _mm256_fmadd_ps(x, scale[j], old));
                    }
                }
            }
        }
        for r in 0..N {
            for j in 0..2 {
                // SAFETY: as above.
                unsafe {
                    let s = rows.s.add(r * PAGE_CELLS + lane + j * 8);
                    let step = _mm256_set1_ps(*rows.step.add(r));
                    _mm256_storeu_ps(s, _mm256_mul_ps(_mm256_loadu_ps(s), step));
                }
            }
        }
    }
    *asking = ask;
}

/// See [`PageKernels::soft_max`].
///
/// # Safety
/// As there.
#[target_feature(enable = "avx2,fma")]
unsafe fn soft_max(tile: &mut Tile) {
    let (s, l) = (tile.s.ptr(), tile.l.ptr());
    let hidden = _mm256_set1_ps(f32::NEG_INFINITY);
    let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for row in 0..tile.n_rows {
        let seen = tile.seen[row];
        // SAFETY: `s` has `PAGE_CELLS` and `l` 16 numbers for each row.
        unsafe {
            let s = s.add(row * PAGE_CELLS);
            let l = l.add(row * 16);
            let mut x = [hidden; 8];
            let mut largest = hidden;
            for i in 0..8 {
                let bits = _mm256_set1_epi32((seen >> (8 * i)) as i32);
                let mask = _mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit);
                let score = _mm256_loadu_ps(s.add(8 * i));
                x[i] = _mm256_blendv_ps(hidden, score, _mm256_castsi256_ps(mask));
                largest = _mm256_max_ps(largest, x[i]);
            }
            if seen == 0 {
                for i in 0..8 {
                    _mm256_storeu_ps(s.add(8 * i), _mm256_setzero_ps());
                }
                tile.alpha[row] = 1.0;
                tile.beta[row] = 0.0;
                continue;
            }
            let mut lanes = [0f32; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), largest);
            let largest = lanes.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
            let m = _mm256_set1_ps(largest);
            let mut sums = [_mm256_setzero_ps(); 2];
            for i in 0..8 {
                let weight = exp2(_mm256_sub_ps(x[i], m));
                _mm256_storeu_ps(s.add(8 * i), weight);
                sums[i % 2] = _mm256_add_ps(sums[i % 2], weight);
            }
            let old = tile.m[row];
            let new = old.max(largest);
            tile.m[row] = new;
            let to = _mm256_blend_ps::<2>(_mm256_set1_ps(old), m);
            let factor = exp2(_mm256_sub_ps(to, _mm256_set1_ps(new)));
            let alpha = _mm256_cvtss_f32(factor);
            let beta = _mm256_cvtss_f32(_mm256_permute_ps::<1>(factor));
            tile.alpha[row] = alpha;
            tile.beta[row] = beta;
            for (i, sum) in sums.into_iter().enumerate() {
                let l = l.add(8 * i);
                let old = _mm256_mul_ps(_mm256_loadu_ps(l), _mm256_set1_ps(alpha));
                _mm256_storeu_ps(l, _mm256_fmadd_ps(sum, _mm256_set1_ps(beta), old));
            }
        }
    }
}

/// See [`PageKernels::weigh`].
///
/// # Safety
/// As there; with `VNNI` the processor has AVX-VNNI.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh<const VNNI: bool>(tile: &mut Tile, values: *const u8, seen: u64) {
    // SAFETY: `values` are a page's of this type and dimension, by the caller's promise.
    unsafe {
        match tile.ty_v {
            KvType::F32 => weigh_from::<F32>(tile, values, seen),
            KvType::F16 => weigh_from::<F16>(tile, values, seen),
            KvType::BF16 => weigh_from::<BF16>(tile, values, seen),
            KvType::Q8_0 => weigh_q8_0::<VNNI>(tile, values, seen),
        }
    }
}

/// [`weigh`] of cells of type `TY`.
///
/// # Safety
/// As [`PageKernels::weigh`]; the cells are of that type.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh_from<const TY: u8>(tile: &mut Tile, values: *const u8, seen: u64) {
    let (n_rows, dim) = (tile.n_rows, tile.dim_v);
    let (s, acc, wide) = (tile.s.ptr(), tile.acc.ptr(), tile.wide.ptr());
    let size = if TY == F32 { 4 } else { 2 };
    for chunk in 0..dim.div_ceil(BLOCK) {
        let (first, width) = tile.v_chunk(chunk);
        // SAFETY: the chunk holds 64 cells of `width` numbers, `wide` has room for them, `s` and
        // `acc` have `n_rows` rows, `alpha` and `beta` as many numbers.
        unsafe {
            let values = values.add(first * size);
            let passes = (n_rows + R - R_FIRST).div_ceil(R);
            let every = (passes * BLOCK * 2).div_ceil(width * size);
            let mut asking = Asking::new(tile.ahead, values, every);
            let mut row = 0;
            while row < n_rows {
                let rows = Rows {
                    s: s.add(row * PAGE_CELLS),
                    acc: acc.add(row * dim + chunk * BLOCK),
                    dim,
                    alpha: tile.alpha.as_ptr().add(row),
                    beta: tile.beta.as_ptr().add(row),
                    wide,
                };
                let asking = &mut asking;
                row += match width {
                    32 => weigh_chunk::<4, TY>(&rows, n_rows, row, values, seen, asking),
                    _ => weigh_chunk::<2, TY>(&rows, n_rows, row, values, seen, asking),
                };
            }
        }
    }
}

/// Some rows of a chunk `W` vectors wide, from `row` of `n_rows` on: the first ones convert its cells for the
/// others. Returns how many.
///
/// # Safety
/// As [`weigh_rows`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh_chunk<const W: usize, const TY: u8>(
    rows: &Rows,
    n_rows: usize,
    row: usize,
    values: *const u8,
    seen: u64,
    asking: &mut Asking,
) -> usize {
    let n = n_rows - row;
    // SAFETY: passed on.
    unsafe {
        if TY == F32 {
            with_rows!(n, weigh_rows::<W, F32, false>(rows, values, seen, asking))
        } else if row > 0 {
            let wide = rows.wide.cast_const().cast();
            with_rows!(n, weigh_rows::<W, F32, false>(rows, wide, seen, asking))
        } else if n_rows == 1 {
            weigh_rows::<1, W, TY, false>(rows, values, seen, asking)
        } else {
            weigh_rows::<R_FIRST, W, TY, true>(rows, values, seen, asking)
        }
    }
}

/// Up to three rows of a tile, at one chunk of their values.
struct Rows {
    s: *const f32,
    acc: *mut f32,
    /// Numbers from a row of `acc` to the next.
    dim: usize,
    alpha: *const f32,
    beta: *const f32,
    wide: *mut f32,
}

/// `acc[r] = alpha[r] acc[r] + beta[r] sum_c s[r][c] values[c]` for `N` rows, `W` vectors wide. `KEEP`: the
/// seen cells' values are left in `wide`. Returns `N`.
///
/// # Safety
/// `rows` are `N` rows, `values` 64 cells of `8 W` values.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh_rows<const N: usize, const W: usize, const TY: u8, const KEEP: bool>(
    rows: &Rows,
    values: *const u8,
    seen: u64,
    asking: &mut Asking,
) -> usize {
    let mut ask = *asking;
    let mut sum = [[_mm256_setzero_ps(); W]; N];
    for run in runs(seen) {
        for c in run {
            // SAFETY: 64 cells of `8 W` values, `N` rows of 64 weights.
            unsafe {
                ask.tick();
                let mut weight = [_mm256_setzero_ps(); N];
                for r in 0..N {
                    weight[r] = _mm256_set1_ps(*rows.s.add(r * PAGE_CELLS + c));
                }
                for j in 0..W {
                    let v = load::<TY>(values, (c * W + j) * 8);
                    if KEEP {
                        _mm256_storeu_ps(rows.wide.add((c * W + j) * 8), v);
                    }
                    for r in 0..N {
                        sum[r][j] = _mm256_fmadd_ps(weight[r], v, sum[r][j]);
                    }
                }
            }
        }
    }
    for r in 0..N {
        // SAFETY: `N` rows of `acc`, `alpha` and `beta`.
        unsafe {
            let alpha = _mm256_set1_ps(*rows.alpha.add(r));
            let beta = _mm256_set1_ps(*rows.beta.add(r));
            for j in 0..W {
                let acc = rows.acc.add(r * rows.dim + j * 8);
                let old = _mm256_mul_ps(_mm256_loadu_ps(acc), alpha);
                _mm256_storeu_ps(acc, _mm256_fmadd_ps(beta, sum[r][j], old));
            }
        }
    }
    *asking = ask;
    N
}

/// What turns weights of the cells in `seen` into integers, and what those are worth.
struct Steps {
    seen: u64,
    /// Integers in a weight of 1 of each of 64 cells.
    per_weight: [__m256; 8],
    worth: f32,
}

/// Largest integer weight.
const W_MAX: f32 = 32767.0;

/// Which of eight cells from `first` on are seen, as lanes of ones.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes_seen(seen: u64, first: usize) -> __m256 {
    let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let bits = _mm256_set1_epi32((seen >> first) as i32);
    _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit))
}

/// Largest of eight numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn largest_of(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// Steps for 64 cells' `scales`: the largest one's weight of 1 becomes [`W_MAX`].
///
/// # Safety
/// `scales` are those of a block of values.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn steps_of(scales: *const u8, seen: u64) -> Steps {
    let mut scale = [_mm256_setzero_ps(); 8];
    let mut largest = _mm256_setzero_ps();
    for i in 0..8 {
        // SAFETY: 64 scales.
        let x = unsafe { load::<F16>(scales, 8 * i) };
        scale[i] = _mm256_and_ps(x, lanes_seen(seen, 8 * i));
        largest = _mm256_max_ps(largest, scale[i]);
    }
    let largest = largest_of(largest);
    let inverse = if largest > 0.0 { W_MAX / largest } else { 0.0 };
    for i in 0..8 {
        scale[i] = _mm256_mul_ps(scale[i], _mm256_set1_ps(inverse));
    }
    Steps {
        seen,
        per_weight: scale,
        worth: largest / W_MAX,
    }
}

/// Weights of the seen cells times the cells' scales as integers of 15 bits, for each row in
/// [`Tile::w16`], and what they are worth in `worth`. Four neighbours are two words: the even cells' and the
/// odd ones'.
///
/// # Safety
/// `scales` are those of a block of values; `worth` has room for a number a row.
#[target_feature(enable = "avx2,f16c")]
unsafe fn integer_weights(tile: &mut Tile, scales: *const u8, worth: *mut f32) {
    let s = tile.s.ptr();
    // Of four neighbours the even ones first.
    let even_first = _mm256_set_epi64x(
        0x0f0e_0b0a_0d0c_0908,
        0x0706_0302_0504_0100,
        0x0f0e_0b0a_0d0c_0908,
        0x0706_0302_0504_0100,
    );
    // SAFETY: 64 scales; `w16` has 128 bytes, `s` `PAGE_CELLS` and `worth` one number a row.
    unsafe {
        let mut steps = steps_of(scales, tile.seen[0]);
        for row in 0..tile.n_rows {
            if tile.seen[row] != steps.seen {
                steps = steps_of(scales, tile.seen[row]);
            }
            let s = s.add(row * PAGE_CELLS);
            let to = tile.w16.as_mut_ptr().add(row * 2 * PAGE_CELLS);
            for i in 0..4 {
                let weight = |i: usize| {
                    let weight = _mm256_loadu_ps(s.add(8 * i));
                    _mm256_cvtps_epi32(_mm256_mul_ps(weight, steps.per_weight[i]))
                };
                let w = _mm256_packs_epi32(weight(2 * i), weight(2 * i + 1));
                // Packing leaves cells 0, 8, 4 and 12 first in their four.
                let w = _mm256_permute4x64_epi64::<0b11_01_10_00>(w);
                let w = _mm256_shuffle_epi8(w, even_first);
                _mm256_storeu_si256(to.add(32 * i).cast(), w);
            }
            worth.add(row).write(steps.worth);
        }
    }
}

/// [`weigh`] of Q8_0 values.
///
/// # Safety
/// As [`PageKernels::weigh`]; the values are of that type.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh_q8_0<const VNNI: bool>(tile: &mut Tile, values: *const u8, seen: u64) {
    let (n_rows, dim) = (tile.n_rows, tile.dim_v);
    let (acc, worth) = (tile.acc.ptr(), tile.wide.ptr());
    // A bit for every four cells of which one is seen.
    let groups = (0..PAGE_CELLS / 4)
        .filter(|group| seen >> (4 * group) & 0xf != 0)
        .fold(0, |groups, group| groups | 1u32 << group);
    for chunk in 0..dim / BLOCK {
        // SAFETY: the chunk is a block of `V_BLOCK_BYTES`; `w16` has 128 bytes and the others `dim` and
        // one number for each row.
        unsafe {
            let values = values.add(chunk * V_BLOCK_BYTES);
            let scales = values.add(PAGE_CELLS * BLOCK);
            let mut asking = Asking::new(tile.ahead, values, n_rows.div_ceil(R_Q8));
            integer_weights(tile, scales, worth);
            for row in (0..n_rows).step_by(R_Q8) {
                let rows = RowsQ8 {
                    w: tile.w16.as_ptr().add(row * 2 * PAGE_CELLS),
                    step: worth.add(row),
                    acc: acc.add(row * dim + chunk * BLOCK),
                    dim,
                    alpha: tile.alpha.as_ptr().add(row),
                    beta: tile.beta.as_ptr().add(row),
                };
                let asking = &mut asking;
                match n_rows - row {
                    1 => weigh_rows_q8_0::<1, VNNI>(&rows, values, groups, asking),
                    2 => weigh_rows_q8_0::<2, VNNI>(&rows, values, groups, asking),
                    3 => weigh_rows_q8_0::<3, VNNI>(&rows, values, groups, asking),
                    _ => weigh_rows_q8_0::<R_Q8, VNNI>(&rows, values, groups, asking),
                }
            }
        }
    }
}

/// Up to four rows of a tile with integer weights, at one block of their values.
struct RowsQ8 {
    /// 64 cells of each row, two words for four.
    w: *const u8,
    /// What an integer product is worth.
    step: *const f32,
    acc: *mut f32,
    dim: usize,
    alpha: *const f32,
    beta: *const f32,
}

/// [`weigh_rows`] with integer weights, 32 dimensions wide, over the fours of cells in `groups`.
///
/// # Safety
/// `rows` has `N` rows, `values` is a block of 64 cells, `groups` has 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh_rows_q8_0<const N: usize, const VNNI: bool>(
    rows: &RowsQ8,
    values: *const u8,
    groups: u32,
    asking: &mut Asking,
) {
    let mut ask = *asking;
    for lane in (0..BLOCK).step_by(16) {
        let mut sum = [[_mm256_setzero_si256(); 2]; N];
        let mut left = groups;
        while left != 0 {
            let group = left.trailing_zeros() as usize;
            left &= left - 1;
            // SAFETY: 16 groups of 4 cells x 32 dimensions, `N` rows of 64 weights.
            unsafe {
                let v = values.add(group * 128 + lane * 4);
                ask.tick();
                let v = [
                    _mm256_loadu_si256(v.cast()),
                    _mm256_loadu_si256(v.add(32).cast()),
                ];
                let w = rows.w.cast::<i32>().add(2 * group);
                let even = [
                    _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v[0])),
                    _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v[1])),
                ];
                for r in 0..N {
                    let x = _mm256_set1_epi32(w.add(r * PAGE_CELLS / 2).read_unaligned());
                    sum[r][0] = dot::<VNNI>(sum[r][0], even[0], x);
                    sum[r][1] = dot::<VNNI>(sum[r][1], even[1], x);
                }
                let odd = [_mm256_srai_epi16::<8>(v[0]), _mm256_srai_epi16::<8>(v[1])];
                for r in 0..N {
                    let x = _mm256_set1_epi32(w.add(r * PAGE_CELLS / 2 + 1).read_unaligned());
                    sum[r][0] = dot::<VNNI>(sum[r][0], odd[0], x);
                    sum[r][1] = dot::<VNNI>(sum[r][1], odd[1], x);
                }
            }
        }
        for r in 0..N {
            // SAFETY: `N` rows of `acc`, `step`, `alpha` and `beta`.
            unsafe {
                let alpha = _mm256_set1_ps(*rows.alpha.add(r));
                let beta = _mm256_set1_ps(*rows.beta.add(r) * *rows.step.add(r));
                for j in 0..2 {
                    let acc = rows.acc.add(r * rows.dim + lane + j * 8);
                    let old = _mm256_mul_ps(_mm256_loadu_ps(acc), alpha);
                    let sum = _mm256_cvtepi32_ps(sum[r][j]);
                    _mm256_storeu_ps(acc, _mm256_fmadd_ps(beta, sum, old));
                }
            }
        }
    }
    *asking = ask;
}
