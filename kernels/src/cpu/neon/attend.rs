//! `attend` page by page with 4 lanes: lanes are cells while scores are made and dimensions while values are
//! weighed, as in the AVX-512 form, whose order of work this is.
//!
//! F16, BF16 and F32 cells are multiplied as F32: up to eight rows times eight cells or values stay in
//! registers, so that a cell is converted once for eight rows. Q8_0 cells are multiplied by `sdot` with
//! queries, and weights of a page, as integers of two bytes: two products a number, sixteen an instruction.

use crate::attend::layout::{BLOCK, HALF_CELLS, K_BLOCK_BYTES, KvType, PAGE_CELLS, V_BLOCK_BYTES};
use crate::attend::tile::{PageKernels, ROWS, Tile, half_seen, nothing, runs};
use std::arch::aarch64::*;
use std::arch::asm;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Vectors of cells in half a page.
const HALF_VECTORS: usize = HALF_CELLS / 4;
/// Rows of integer sums that the registers hold.
const R_Q8: usize = 4;

/// The kernels of NEON with dot products.
pub(crate) const KERNELS: PageKernels = PageKernels {
    scores,
    soft_max,
    weigh,
    enter: nothing,
    leave: nothing,
    integer_q: true,
    byte_q: true,
};

/// `$body` for every row `$r` of `$n`, which lane `L` of a vector of four rows stands for.
macro_rules! for_rows {
    ($n:expr, |$r:ident, $l:ident| $body:expr) => {
        for_rows!(@ $n, $r, $l, $body, 0 0, 1 1, 2 2, 3 3, 4 0, 5 1, 6 2, 7 3)
    };
    (@ $n:expr, $r:ident, $l:ident, $body:expr, $($row:literal $lane:literal),*) => {
        $(if $row < $n {
            const $l: i32 = $lane;
            let $r: usize = $row;
            $body
        })*
    };
}

/// `sum + a b` of four signed bytes each, in every lane; lane `L` of `b` for all.
///
/// # Safety
/// The processor has dot products.
#[inline(always)]
unsafe fn sdot<const L: i32>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    macro_rules! by {
        ($lane:literal) => {
            asm!(
                concat!(".arch_extension dotprod\nsdot {s:v}.4s, {a:v}.16b, {b:v}.4b[", $lane, "]"),
                s = inout(vreg) sum,
                a = in(vreg) a,
                b = in(vreg) b,
                options(pure, nomem, nostack, preserves_flags),
            )
        };
    }
    // SAFETY: registers only; the instruction is there.
    unsafe {
        match L {
            0 => by!("0"),
            1 => by!("1"),
            2 => by!("2"),
            _ => by!("3"),
        }
    }
    sum
}

/// Eight F16 numbers as F32.
#[inline(always)]
fn from_f16(x: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: registers only; the instruction is part of every AArch64.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {x:v}.4h",
            "fcvtl2 {high:v}.4s, {x:v}.8h",
            x = in(vreg) x,
            low = out(vreg) low,
            high = lateout(vreg) high,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    [low, high]
}

/// Eight numbers of type `TY`, the `i`-th to the `i + 7`-th after `p`.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn load<const TY: u8>(p: *const u8, i: usize) -> [float32x4_t; 2] {
    // SAFETY: readable by the caller's promise.
    unsafe {
        if TY == F32 {
            let p = p.cast::<f32>().add(i);
            return [vld1q_f32(p), vld1q_f32(p.add(4))];
        }
        let x = vld1q_u16(p.cast::<u16>().add(i));
        if TY == F16 {
            return from_f16(x);
        }
        let low = vshll_n_u16::<16>(vget_low_u16(x));
        let high = vshll_high_n_u16::<16>(x);
        [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
    }
}

/// 2^x for x <= 0, to 3e-7 relative; exactly 1 at 0, and 0 below -126.
#[inline]
#[target_feature(enable = "neon")]
fn exp2(x: float32x4_t) -> float32x4_t {
    let least = vdupq_n_f32(-126.0);
    let some = vcgeq_f32(x, least);
    let x = vmaxq_f32(x, least);
    let whole = vrndnq_f32(x);
    let f = vsubq_f32(x, whole);
    // Minimax over [-1/2, 1/2] with the constant term held at 1.
    let p = vdupq_n_f32(0.001_326_472);
    let p = vfmaq_f32(vdupq_n_f32(0.009_671_513), p, f);
    let p = vfmaq_f32(vdupq_n_f32(0.055_507_336), p, f);
    let p = vfmaq_f32(vdupq_n_f32(0.240_222_42), p, f);
    let p = vfmaq_f32(vdupq_n_f32(std::f32::consts::LN_2), p, f);
    let p = vfmaq_f32(vdupq_n_f32(1.0), p, f);
    let power = vreinterpretq_u32_s32(vshlq_n_s32::<23>(vcvtq_s32_f32(whole)));
    let y = vaddq_u32(vreinterpretq_u32_f32(p), power);
    vreinterpretq_f32_u32(vandq_u32(y, some))
}

/// Which of four cells from `first` on are seen, as lanes of ones.
#[inline]
#[target_feature(enable = "neon")]
fn lanes_seen(seen: u64, first: usize) -> uint32x4_t {
    const BITS: [u32; 4] = [1, 2, 4, 8];
    // SAFETY: four numbers.
    let bits = unsafe { vld1q_u32(BITS.as_ptr()) };
    vtstq_u32(vdupq_n_u32((seen >> first) as u32), bits)
}

/// See [`PageKernels::scores`].
///
/// # Safety
/// As there; the processor has dot products.
unsafe fn scores(tile: &mut Tile, keys: *const u8, seen: u64) {
    // SAFETY: `keys` are a page's of this type and dimension, by the caller's promise.
    unsafe {
        match tile.ty_k {
            KvType::F32 => scores_from::<F32>(tile, keys, seen),
            KvType::F16 => scores_from::<F16>(tile, keys, seen),
            KvType::BF16 => scores_from::<BF16>(tile, keys, seen),
            KvType::Q8_0 => scores_q8_0(tile, keys, seen),
        }
    }
}

/// [`scores`] of cells of type `TY`.
///
/// # Safety
/// As [`PageKernels::scores`]; the cells are of that type.
unsafe fn scores_from<const TY: u8>(tile: &mut Tile, keys: *const u8, seen: u64) {
    let (dim, n_rows) = (tile.dim_k, tile.n_rows);
    let (q, s) = (tile.q.ptr(), tile.s.ptr());
    let size = if TY == F32 { 4 } else { 2 };
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        let mut row = 0;
        while row < n_rows {
            // SAFETY: half a page holds `dim` rows of 32 keys' numbers; `q` and `s` are sized for the tile's
            // rows and dimensions (`Tile::shape`, `Tile::start`).
            unsafe {
                let keys = keys.add(half * dim * HALF_CELLS * size);
                let q = q.add(row / ROWS * ROWS * dim + row % ROWS);
                let s = s.add(row * PAGE_CELLS + half * HALF_CELLS);
                row += match n_rows - row {
                    8.. => score_rows::<8, 2, TY>(q, dim, keys, s),
                    4.. => score_rows::<4, 4, TY>(q, dim, keys, s),
                    2.. => score_rows::<2, 8, TY>(q, dim, keys, s),
                    _ => score_rows::<1, 8, TY>(q, dim, keys, s),
                };
            }
        }
    }
}

/// `s[r][c] = sum_i q[i][r] keys[i][c]` for `R` rows and 32 cells, `V` vectors of them at a time. Returns `R`.
///
/// # Safety
/// `q` are `R` rows, `keys` half a page of `dim` dimensions; `s` has `R` rows.
#[target_feature(enable = "neon")]
unsafe fn score_rows<const R: usize, const V: usize, const TY: u8>(
    q: *const f32,
    dim: usize,
    keys: *const u8,
    s: *mut f32,
) -> usize {
    for first in (0..HALF_VECTORS).step_by(V) {
        let mut sum = [[vdupq_n_f32(0.0); V]; R];
        // SAFETY: by the caller's promise.
        unsafe {
            for i in 0..dim {
                let q = q.add(i * ROWS);
                let mut rows = [vdupq_n_f32(0.0); 2];
                match R {
                    8 => rows = [vld1q_f32(q), vld1q_f32(q.add(4))],
                    4 => rows[0] = vld1q_f32(q),
                    2 => rows[0] = vcombine_f32(vld1_f32(q), vdup_n_f32(0.0)),
                    _ => rows[0] = vld1q_dup_f32(q),
                }
                for j in (0..V).step_by(2) {
                    let k = load::<TY>(keys, i * HALF_CELLS + (first + j) * 4);
                    for_rows!(R, |r, L| {
                        sum[r][j] = vfmaq_laneq_f32::<L>(sum[r][j], k[0], rows[r / 4]);
                        sum[r][j + 1] = vfmaq_laneq_f32::<L>(sum[r][j + 1], k[1], rows[r / 4]);
                    });
                }
            }
            for r in 0..R {
                for j in 0..V {
                    vst1q_f32(s.add(r * PAGE_CELLS + (first + j) * 4), sum[r][j]);
                }
            }
        }
    }
    R
}

/// [`scores`] of Q8_0 keys.
///
/// # Safety
/// As [`PageKernels::scores`]; the keys are of that type.
unsafe fn scores_q8_0(tile: &mut Tile, keys: *const u8, seen: u64) {
    let (n_rows, n_blocks) = (tile.n_rows, tile.dim_k.div_ceil(BLOCK));
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        for row in (0..n_rows).step_by(R_Q8) {
            // SAFETY: half a page holds `n_blocks` blocks; `q8` covers as many of whole groups of rows,
            // `q16_step` and `s` the rows that there are.
            unsafe {
                let keys = keys.add(half * n_blocks * K_BLOCK_BYTES);
                let q = tile
                    .q8
                    .as_ptr()
                    .add(row / ROWS * n_blocks * 2 * ROWS * BLOCK);
                let q = q.add(row % ROWS * BLOCK).cast();
                let step = tile.q16_step.as_ptr().add(row);
                let s = tile.s.ptr().add(row * PAGE_CELLS + half * HALF_CELLS);
                match n_rows - row {
                    1 => score_rows_q8_0::<1>(q, step, n_blocks, keys, s),
                    2 => score_rows_q8_0::<2>(q, step, n_blocks, keys, s),
                    3 => score_rows_q8_0::<3>(q, step, n_blocks, keys, s),
                    _ => score_rows_q8_0::<R_Q8>(q, step, n_blocks, keys, s),
                }
            }
        }
    }
}

/// `s[r][c] = step[r] sum_b scale[b][c] sum_(i in b) q[r][i] keys[i][c]` for `R` rows and 32 cells.
///
/// # Safety
/// `q` and `step` are those of `R` rows, `keys` half a page; `s` has `R` rows.
#[target_feature(enable = "neon")]
unsafe fn score_rows_q8_0<const R: usize>(
    q: *const i8,
    step: *const f32,
    n_blocks: usize,
    keys: *const u8,
    s: *mut f32,
) {
    const WORDS: usize = BLOCK / 4;
    let bias = vdupq_n_u8(0x80);
    for cell in (0..HALF_CELLS).step_by(8) {
        let mut total = [[vdupq_n_f32(0.0); 2]; R];
        for b in 0..n_blocks {
            let mut high = [[vdupq_n_s32(0); 2]; R];
            let mut low = high;
            // SAFETY: block `b` holds 8 words of 32 cells and their scales; `q` has its bytes, the high ones
            // of all rows first.
            unsafe {
                let keys = keys.add(b * K_BLOCK_BYTES);
                let q = q.add(b * 2 * ROWS * BLOCK);
                for part in 0..2 {
                    let mut qh = [vdupq_n_s8(0); R];
                    let mut ql = qh;
                    for r in 0..R {
                        qh[r] = vld1q_s8(q.add(r * BLOCK + 16 * part));
                        ql[r] = vld1q_s8(q.add((ROWS + r) * BLOCK + 16 * part));
                    }
                    macro_rules! word {
                        ($lane:literal) => {
                            let k = keys.add((part * 4 + $lane) * 128 + cell * 4);
                            let k = [vld1q_u8(k), vld1q_u8(k.add(16))];
                            let k = k.map(|k| vreinterpretq_s8_u8(veorq_u8(k, bias)));
                            for r in 0..R {
                                for j in 0..2 {
                                    high[r][j] = sdot::<$lane>(high[r][j], k[j], qh[r]);
                                    low[r][j] = sdot::<$lane>(low[r][j], k[j], ql[r]);
                                }
                            }
                        };
                    }
                    word!(0);
                    word!(1);
                    word!(2);
                    word!(3);
                }
                let scales = keys.add(WORDS * 128 + cell * 2).cast();
                let scale = from_f16(vld1q_u16(scales));
                for r in 0..R {
                    for j in 0..2 {
                        let sum = vaddq_s32(vshlq_n_s32::<8>(high[r][j]), low[r][j]);
                        total[r][j] = vfmaq_f32(total[r][j], vcvtq_f32_s32(sum), scale[j]);
                    }
                }
            }
        }
        for r in 0..R {
            for j in 0..2 {
                // SAFETY: `R` rows.
                unsafe {
                    let total = vmulq_n_f32(total[r][j], *step.add(r));
                    vst1q_f32(s.add(r * PAGE_CELLS + cell + 4 * j), total);
                }
            }
        }
    }
}

/// See [`PageKernels::soft_max`].
///
/// # Safety
/// As there.
#[target_feature(enable = "neon")]
unsafe fn soft_max(tile: &mut Tile) {
    let (s, l) = (tile.s.ptr(), tile.l.ptr());
    let hidden = vdupq_n_f32(f32::NEG_INFINITY);
    for row in 0..tile.n_rows {
        let seen = tile.seen[row];
        // SAFETY: `s` has `PAGE_CELLS` and `l` 16 numbers for each row.
        unsafe {
            let (s, l) = (s.add(row * PAGE_CELLS), l.add(row * 16));
            if seen == 0 {
                for i in 0..16 {
                    vst1q_f32(s.add(4 * i), vdupq_n_f32(0.0));
                }
                tile.alpha[row] = 1.0;
                tile.beta[row] = 0.0;
                continue;
            }
            let mut x = [hidden; 16];
            let mut largest = hidden;
            for i in 0..16 {
                x[i] = vbslq_f32(lanes_seen(seen, 4 * i), vld1q_f32(s.add(4 * i)), hidden);
                largest = vmaxq_f32(largest, x[i]);
            }
            let largest = vmaxvq_f32(largest);
            let m = vdupq_n_f32(largest);
            let mut sums = [vdupq_n_f32(0.0); 4];
            for i in 0..16 {
                let weight = exp2(vsubq_f32(x[i], m));
                vst1q_f32(s.add(4 * i), weight);
                sums[i % 4] = vaddq_f32(sums[i % 4], weight);
            }
            let old = tile.m[row];
            let new = old.max(largest);
            tile.m[row] = new;
            let to = vsetq_lane_f32::<1>(old, m);
            let factors = exp2(vsubq_f32(to, vdupq_n_f32(new)));
            let beta = vgetq_lane_f32::<0>(factors);
            let alpha = vgetq_lane_f32::<1>(factors);
            tile.alpha[row] = alpha;
            tile.beta[row] = beta;
            for (i, sum) in sums.into_iter().enumerate() {
                let old = vmulq_n_f32(vld1q_f32(l.add(4 * i)), alpha);
                vst1q_f32(l.add(4 * i), vfmaq_n_f32(old, sum, beta));
            }
        }
    }
}

/// See [`PageKernels::weigh`].
///
/// # Safety
/// As there; the processor has dot products.
unsafe fn weigh(tile: &mut Tile, values: *const u8, seen: u64) {
    // SAFETY: `values` are a page's of this type and dimension, by the caller's promise.
    unsafe {
        match tile.ty_v {
            KvType::F32 => weigh_from::<F32>(tile, values, seen),
            KvType::F16 => weigh_from::<F16>(tile, values, seen),
            KvType::BF16 => weigh_from::<BF16>(tile, values, seen),
            KvType::Q8_0 => weigh_q8_0(tile, values, seen),
        }
    }
}

/// Some rows of a tile at one chunk of their values.
struct Rows {
    s: *const f32,
    acc: *mut f32,
    /// Numbers from a row of `acc` to the next.
    dim: usize,
    alpha: *const f32,
    beta: *const f32,
}

impl Rows {
    /// `acc[r] = alpha[r] acc[r] + beta[r] sum` at four numbers from `first` on.
    ///
    /// # Safety
    /// Row `r` and those numbers must be there.
    #[inline(always)]
    unsafe fn take(&self, r: usize, first: usize, sum: float32x4_t) {
        // SAFETY: by the caller's promise.
        unsafe {
            let acc = self.acc.add(r * self.dim + first);
            let old = vmulq_n_f32(vld1q_f32(acc), *self.alpha.add(r));
            vst1q_f32(acc, vfmaq_n_f32(old, sum, *self.beta.add(r)));
        }
    }
}

/// [`weigh`] of cells of type `TY`.
///
/// # Safety
/// As [`PageKernels::weigh`]; the cells are of that type.
unsafe fn weigh_from<const TY: u8>(tile: &mut Tile, values: *const u8, seen: u64) {
    let (n_rows, dim) = (tile.n_rows, tile.dim_v);
    let (s, acc) = (tile.s.ptr(), tile.acc.ptr());
    let size = if TY == F32 { 4 } else { 2 };
    for chunk in 0..dim.div_ceil(BLOCK) {
        let (first, width) = tile.v_chunk(chunk);
        let mut row = 0;
        while row < n_rows {
            // SAFETY: the chunk holds 64 cells of `width` numbers; `s` and `acc` have `n_rows` rows, `alpha`
            // and `beta` as many numbers.
            unsafe {
                let values = values.add(first * size);
                let rows = Rows {
                    s: s.add(row * PAGE_CELLS),
                    acc: acc.add(row * dim + chunk * BLOCK),
                    dim,
                    alpha: tile.alpha.as_ptr().add(row),
                    beta: tile.beta.as_ptr().add(row),
                };
                row += match n_rows - row {
                    8.. => weigh_rows::<8, 2, TY>(&rows, values, width, seen),
                    4.. => weigh_rows::<4, 4, TY>(&rows, values, width, seen),
                    2.. => weigh_rows::<2, 4, TY>(&rows, values, width, seen),
                    _ => weigh_rows::<1, 4, TY>(&rows, values, width, seen),
                };
            }
        }
    }
}

/// `acc[r] = alpha[r] acc[r] + beta[r] sum_c s[r][c] values[c]` for `R` rows, `V` vectors at a time. Returns
/// `R`.
///
/// # Safety
/// `rows` are `R` rows, `values` 64 cells of `width` values, which is a multiple of `4 V`.
#[target_feature(enable = "neon")]
unsafe fn weigh_rows<const R: usize, const V: usize, const TY: u8>(
    rows: &Rows,
    values: *const u8,
    width: usize,
    seen: u64,
) -> usize {
    for first in (0..width).step_by(4 * V) {
        let mut sum = [[vdupq_n_f32(0.0); V]; R];
        macro_rules! cell {
            ($c:expr, $weight:ident, $lane:literal) => {
                for j in (0..V).step_by(2) {
                    let v = load::<TY>(values, $c * width + first + 4 * j);
                    for r in 0..R {
                        sum[r][j] = vfmaq_laneq_f32::<$lane>(sum[r][j], v[0], $weight[r]);
                        sum[r][j + 1] = vfmaq_laneq_f32::<$lane>(sum[r][j + 1], v[1], $weight[r]);
                    }
                }
            };
        }
        for run in runs(seen) {
            let whole = run.start + run.len() / 4 * 4;
            // SAFETY: 64 cells of `width` values, `R` rows of 64 weights.
            unsafe {
                let mut weight = [vdupq_n_f32(0.0); R];
                for c in (run.start..whole).step_by(4) {
                    for r in 0..R {
                        weight[r] = vld1q_f32(rows.s.add(r * PAGE_CELLS + c));
                    }
                    cell!(c, weight, 0);
                    cell!(c + 1, weight, 1);
                    cell!(c + 2, weight, 2);
                    cell!(c + 3, weight, 3);
                }
                for c in whole..run.end {
                    for r in 0..R {
                        weight[r] = vld1q_dup_f32(rows.s.add(r * PAGE_CELLS + c));
                    }
                    cell!(c, weight, 0);
                }
            }
        }
        for r in 0..R {
            for j in 0..V {
                // SAFETY: `R` rows.
                unsafe { rows.take(r, first + 4 * j, sum[r][j]) }
            }
        }
    }
    R
}

/// Largest integer weight: its bytes are signed.
const W_MAX: f32 = 127.0 * 256.0 + 127.0;

/// What turns weights of the cells in `seen` into integers, and what those are worth.
struct Steps {
    seen: u64,
    /// Integers in a weight of 1 of each of 64 cells.
    per_weight: [float32x4_t; 16],
    worth: f32,
}

/// Steps for 64 cells' `scales`: the largest one's weight of 1 becomes [`W_MAX`].
///
/// # Safety
/// `scales` are those of a block of values.
#[target_feature(enable = "neon")]
unsafe fn steps_of(scales: *const u8, seen: u64) -> Steps {
    let mut scale = [vdupq_n_f32(0.0); 16];
    let mut largest = vdupq_n_f32(0.0);
    for i in 0..8 {
        // SAFETY: 64 scales.
        let pair = unsafe { load::<F16>(scales, 8 * i) };
        for (j, x) in pair.into_iter().enumerate() {
            let x = vandq_u32(vreinterpretq_u32_f32(x), lanes_seen(seen, 8 * i + 4 * j));
            scale[2 * i + j] = vreinterpretq_f32_u32(x);
            largest = vmaxq_f32(largest, scale[2 * i + j]);
        }
    }
    let largest = vmaxvq_f32(largest);
    let inverse = if largest > 0.0 { W_MAX / largest } else { 0.0 };
    Steps {
        seen,
        per_weight: scale.map(|scale| vmulq_n_f32(scale, inverse)),
        worth: largest / W_MAX,
    }
}

/// Weights of the seen cells times the cells' scales as integers, for each row 64 high bytes and 64 low ones
/// in [`Tile::w16`], and what they are worth in `worth`.
///
/// # Safety
/// `scales` are those of a block of values; `worth` has room for a number a row.
#[target_feature(enable = "neon")]
unsafe fn integer_weights(tile: &mut Tile, scales: *const u8, worth: *mut f32) {
    // SAFETY: 64 scales; `w16` has 128 bytes, `s` `PAGE_CELLS` and `worth` one number a row.
    unsafe {
        let mut steps = steps_of(scales, tile.seen[0]);
        for row in 0..tile.n_rows {
            if tile.seen[row] != steps.seen {
                steps = steps_of(scales, tile.seen[row]);
            }
            let s = tile.s.ptr().add(row * PAGE_CELLS);
            let to = tile.w16.as_mut_ptr().add(row * 2 * PAGE_CELLS).cast::<i8>();
            for i in 0..8 {
                let integers = |i: usize| {
                    let weight = vmulq_f32(vld1q_f32(s.add(4 * i)), steps.per_weight[i]);
                    vmovn_s32(vcvtnq_s32_f32(weight))
                };
                let w = vcombine_s16(integers(2 * i), integers(2 * i + 1));
                let low = vmovn_s16(w);
                let high = vshrn_n_s16::<8>(vsubq_s16(w, vmovl_s8(low)));
                vst1_s8(to.add(8 * i), high);
                vst1_s8(to.add(PAGE_CELLS + 8 * i), low);
            }
            worth.add(row).write(steps.worth);
        }
    }
}

/// [`weigh`] of Q8_0 values.
///
/// # Safety
/// As [`PageKernels::weigh`]; the values are of that type.
unsafe fn weigh_q8_0(tile: &mut Tile, values: *const u8, seen: u64) {
    let (n_rows, dim) = (tile.n_rows, tile.dim_v);
    let (acc, worth) = (tile.acc.ptr(), tile.wide.ptr());
    for chunk in 0..dim / BLOCK {
        // SAFETY: the chunk is a block of `V_BLOCK_BYTES`; `w16` has 128 bytes and the others `dim` and one
        // number for each row.
        unsafe {
            let values = values.add(chunk * V_BLOCK_BYTES);
            integer_weights(tile, values.add(PAGE_CELLS * BLOCK), worth);
            for row in (0..n_rows).step_by(R_Q8) {
                let rows = Rows {
                    s: worth.add(row),
                    acc: acc.add(row * dim + chunk * BLOCK),
                    dim,
                    alpha: tile.alpha.as_ptr().add(row),
                    beta: tile.beta.as_ptr().add(row),
                };
                let w = tile.w16.as_ptr().add(row * 2 * PAGE_CELLS).cast();
                match n_rows - row {
                    1 => weigh_rows_q8_0::<1>(&rows, w, values.cast(), seen),
                    2 => weigh_rows_q8_0::<2>(&rows, w, values.cast(), seen),
                    3 => weigh_rows_q8_0::<3>(&rows, w, values.cast(), seen),
                    _ => weigh_rows_q8_0::<R_Q8>(&rows, w, values.cast(), seen),
                }
            }
        }
    }
}

/// [`weigh_rows`] of a block of Q8_0 values with integer weights `w`, of which `rows.s` says what they are
/// worth. Cells go in fours, those that are not seen with a weight of 0.
///
/// # Safety
/// `rows` and `w` are those of `R` rows, `values` a block.
#[target_feature(enable = "neon")]
unsafe fn weigh_rows_q8_0<const R: usize>(rows: &Rows, w: *const i8, values: *const i8, seen: u64) {
    for first in (0..BLOCK).step_by(8) {
        let mut high = [[vdupq_n_s32(0); 2]; R];
        let mut low = high;
        for part in (0..4).filter(|part| seen >> (16 * part) & 0xffff != 0) {
            // SAFETY: 64 cells in fours of 32 values; `R` rows of two times 64 bytes.
            unsafe {
                let mut wh = [vdupq_n_s8(0); R];
                let mut wl = wh;
                for r in 0..R {
                    wh[r] = vld1q_s8(w.add(r * 2 * PAGE_CELLS + 16 * part));
                    wl[r] = vld1q_s8(w.add((r * 2 + 1) * PAGE_CELLS + 16 * part));
                }
                macro_rules! four {
                    ($lane:literal) => {
                        let v = values.add((part * 4 + $lane) * 128 + first * 4);
                        let v = [vld1q_s8(v), vld1q_s8(v.add(16))];
                        for r in 0..R {
                            for j in 0..2 {
                                high[r][j] = sdot::<$lane>(high[r][j], v[j], wh[r]);
                                low[r][j] = sdot::<$lane>(low[r][j], v[j], wl[r]);
                            }
                        }
                    };
                }
                four!(0);
                four!(1);
                four!(2);
                four!(3);
            }
        }
        for r in 0..R {
            for j in 0..2 {
                // SAFETY: `R` rows.
                unsafe {
                    let sum = vaddq_s32(vshlq_n_s32::<8>(high[r][j]), low[r][j]);
                    let sum = vmulq_n_f32(vcvtq_f32_s32(sum), *rows.s.add(r));
                    rows.take(r, first + 4 * j, sum);
                }
            }
        }
    }
}
