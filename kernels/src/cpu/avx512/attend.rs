//! `attend` page by page with 16 lanes: lanes are cells while scores are made and dimensions while
//! values are weighed, so nothing is summed across lanes but a row's weights.
//!
//! F16, BF16 and F32 cells are multiplied as F32. Q8_0 cells, queries, and weights of a page are
//! multiplied as 16-bit integers (VNNI): exact sums, and an error of a query or weight of at most
//! 2^-16 of the largest one.

use crate::attend::ahead::Ahead;
use crate::attend::layout::{BLOCK, HALF_CELLS, K_BLOCK_BYTES, KvType, PAGE_CELLS, V_BLOCK_BYTES};
use crate::attend::tile::{PageKernels, ROWS, Tile, half_seen, nothing, runs};
use std::arch::asm;
use std::arch::x86_64::*;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// The kernels of this instruction set.
pub(crate) const KERNELS: PageKernels = PageKernels {
    scores,
    soft_max: soft_max::<false>,
    weigh,
    enter: nothing,
    leave: nothing,
    integer_q: true,
    byte_q: false,
};

/// Bytes from the cell in use to the one asked for into the L2 cache: half a page of keys of 128
/// dimensions, about 1,000 cycles of eight rows. The processor's own prefetch stops at each 4 KiB boundary,
/// and does not know the next page.
const FAR: usize = 8192;
/// Bytes from the cell in use to the one asked for into the L1 cache.
const NEAR: usize = 1024;

/// `sum + a b` of pairs of 16-bit integers in every lane. By name: of the intrinsic compilers make a
/// product and a sum, twice the work, where they know more of an operand.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dpwssd(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: registers only.
    unsafe {
        asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) sum,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Calls `$f::<R, ..>` with the constant `R` equal to `$rows`.
macro_rules! with_rows {
    ($rows:expr, $f:ident $(::<$($g:tt),*>)? ($($arg:expr),*)) => {
        match $rows {
            1 => $f::<1 $($(, $g)*)?>($($arg),*),
            2 => $f::<2 $($(, $g)*)?>($($arg),*),
            3 => $f::<3 $($(, $g)*)?>($($arg),*),
            4 => $f::<4 $($(, $g)*)?>($($arg),*),
            5 => $f::<5 $($(, $g)*)?>($($arg),*),
            6 => $f::<6 $($(, $g)*)?>($($arg),*),
            7 => $f::<7 $($(, $g)*)?>($($arg),*),
            _ => $f::<8 $($(, $g)*)?>($($arg),*),
        }
    };
}

/// 2^x for x <= 0, to 3e-7 relative; exactly 1 at 0, and 0 far below.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    let x = _mm512_max_ps(x, _mm512_set1_ps(-1000.0));
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let f = _mm512_sub_ps(x, whole);
    // Minimax over [-1/2, 1/2] with the constant term held at 1.
    let p = _mm512_set1_ps(0.001_326_472);
    let p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009_671_513));
    let p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055_507_336));
    let p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240_222_42));
    let p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(std::f32::consts::LN_2));
    let p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0));
    _mm512_scalef_ps(p, whole)
}

/// Sixteen numbers of type `TY`, the `i`-th to the `i + 15`-th after `p`.
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load<const TY: u8>(p: *const u8, i: usize) -> __m512 {
    // SAFETY: readable by the caller's promise.
    unsafe {
        match TY {
            F32 => _mm512_loadu_ps(p.cast::<f32>().add(i)),
            // Not `_mm512_cvtph_ps`, which never reads from memory: that takes a shuffle more.
            F16 => _mm512_cvt_roundph_ps::<_MM_FROUND_CUR_DIRECTION>(_mm256_loadu_si256(
                p.add(2 * i).cast(),
            )),
            _ => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.add(2 * i).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }
}

/// The 32 numbers of type `TY` after `p`: 16 and 16 of them, but BF16 the even ones and the odd ones, which
/// takes an operation each instead of two. Sums of them go through [`in_order`].
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_two<const TY: u8>(p: *const u8) -> [__m512; 2] {
    // SAFETY: readable by the caller's promise.
    unsafe {
        if TY == BF16 {
            let bits = _mm512_loadu_si512(p.cast());
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)),
                _mm512_castsi512_ps(_mm512_and_si512(bits, upper)),
            ]
        } else {
            [load::<TY>(p, 0), load::<TY>(p, 16)]
        }
    }
}

/// Two vectors in the order of [`load_two`], in the order of numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order<const TY: u8>(x: [__m512; 2]) -> [__m512; 2] {
    if TY != BF16 {
        return x;
    }
    let first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    [
        _mm512_permutex2var_ps(x[0], first, x[1]),
        _mm512_permutex2var_ps(x[0], second, x[1]),
    ]
}

/// Converts `n` numbers of 16 bits, a multiple of 16, to F32.
///
/// # Safety
/// `from` and `to` must hold `n` numbers.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn widen<const TY: u8>(from: *const u8, to: *mut f32, n: usize, ahead: Ahead) {
    for i in (0..n).step_by(16) {
        if i.is_multiple_of(32) {
            ahead.ask_twice(from.wrapping_add(2 * i), NEAR, FAR);
        }
        // SAFETY: within the `n` numbers.
        unsafe { _mm512_storeu_ps(to.add(i), load::<TY>(from, i)) }
    }
}

/// See [`PageKernels::scores`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn scores_from<const TY: u8>(tile: &mut Tile, keys: *const u8, seen: u64) {
    let (dim, n_rows) = (tile.dim_k, tile.n_rows);
    let (q, ahead) = (tile.q.ptr(), tile.ahead);
    let s = tile.s.ptr();
    let len = dim * HALF_CELLS;
    let size = if TY == F32 { 4 } else { 2 };
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        // SAFETY: half a page holds `len` keys' numbers; `q`, `s` and `wide` are sized for the
        // tile's rows and dimensions (`Tile::shape`, `Tile::start`).
        unsafe {
            let keys = keys.add(half * len * size);
            let s = s.add(half * HALF_CELLS);
            if TY != F32 && n_rows > ROWS {
                let wide = tile.wide.ptr();
                widen::<TY>(keys, wide, len, ahead);
                for row in (0..n_rows).step_by(ROWS) {
                    let (q, s) = (q.add(row * dim), s.add(row * PAGE_CELLS));
                    with_rows!(
                        n_rows - row,
                        score_rows::<F32>(q, dim, wide.cast(), s, ahead)
                    );
                }
            } else {
                for row in (0..n_rows).step_by(ROWS) {
                    let (q, s) = (q.add(row * dim), s.add(row * PAGE_CELLS));
                    with_rows!(n_rows - row, score_rows::<TY>(q, dim, keys, s, ahead));
                }
            }
        }
    }
}

/// `s[r][c] = sum_i q[i][r] keys[i][c]` for `R` rows and 32 cells.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn score_rows<const R: usize, const TY: u8>(
    q: *const f32,
    dim: usize,
    keys: *const u8,
    s: *mut f32,
    ahead: Ahead,
) {
    let mut sum = [[_mm512_setzero_ps(); 2]; R];
    for (dims, later) in ahead.stretches(keys, dim, HALF_CELLS * 2, FAR) {
        for i in dims {
            // SAFETY: `dim` rows of 32 keys' numbers and of `ROWS` queries.
            unsafe {
                if TY != F32 {
                    let line = keys.wrapping_add(i * HALF_CELLS * 2);
                    _mm_prefetch::<_MM_HINT_T1>(line.wrapping_offset(later).cast());
                    _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(NEAR).cast());
                }
                let size = if TY == F32 { 4 } else { 2 };
                let k = load_two::<TY>(keys.add(i * HALF_CELLS * size));
                for r in 0..R {
                    let q = _mm512_set1_ps(*q.add(i * ROWS + r));
                    sum[r][0] = _mm512_fmadd_ps(q, k[0], sum[r][0]);
                    sum[r][1] = _mm512_fmadd_ps(q, k[1], sum[r][1]);
                }
            }
        }
    }
    for r in 0..R {
        // SAFETY: `s` has `R` rows of `PAGE_CELLS`, of which this half takes 32.
        unsafe {
            let sum = in_order::<TY>(sum[r]);
            _mm512_storeu_ps(s.add(r * PAGE_CELLS), sum[0]);
            _mm512_storeu_ps(s.add(r * PAGE_CELLS + 16), sum[1]);
        }
    }
}

/// [`scores`] of Q8_0 keys.
///
/// # Safety
/// As [`PageKernels::scores`]; the keys are of that type.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn scores_q8_0(tile: &mut Tile, keys: *const u8, seen: u64) {
    let n_blocks = tile.dim_k.div_ceil(BLOCK);
    let n_rows = tile.n_rows;
    let s = tile.s.ptr();
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        for row in (0..n_rows).step_by(ROWS) {
            let q = &tile.q16[row * n_blocks * (BLOCK / 2)..];
            let bias = &tile.q16_bias[row * n_blocks..];
            let step = &tile.q16_step[row..];
            let ahead = tile.ahead;
            // SAFETY: half a page holds `n_blocks` blocks; `s` has `n_rows` rows.
            unsafe {
                let keys = keys.add(half * n_blocks * K_BLOCK_BYTES);
                let s = s.add(row * PAGE_CELLS + half * HALF_CELLS);
                with_rows!(
                    n_rows - row,
                    score_rows_q8_0(q, bias, step, n_blocks, keys, s, ahead)
                );
            }
        }
    }
}

/// `s[r][c] = step[r] sum_b scale[b][c] sum_(i in b) q[r][i] keys[i][c]` for `R` rows, 32 cells.
///
/// # Safety
/// `q`, `bias` and `step` are of `R` rows of a group, `keys` half a page, `s` rows of `PAGE_CELLS`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn score_rows_q8_0<const R: usize>(
    q: &[i32],
    bias: &[i32],
    step: &[f32],
    n_blocks: usize,
    keys: *const u8,
    s: *mut f32,
    ahead: Ahead,
) {
    const WORDS: usize = BLOCK / 4;
    let byte = _mm512_set1_epi16(0xff);
    let mut score = [[_mm512_setzero_ps(); 2]; R];
    for b in 0..n_blocks {
        // SAFETY: block `b` of `K_BLOCK_BYTES`; `q` and `bias` cover `n_blocks` blocks of 8 rows.
        unsafe {
            let keys = keys.add(b * K_BLOCK_BYTES);
            let q = q.as_ptr().add(b * WORDS * 2 * ROWS);
            let mut sum = [[_mm512_setzero_si512(); 2]; R];
            for r in 0..R {
                sum[r] = [_mm512_set1_epi32(*bias.as_ptr().add(r * n_blocks + b)); 2];
            }
            for word in 0..WORDS {
                ahead.ask_twice(keys.add(word * 128), NEAR, FAR);
                ahead.ask_twice(keys.add(word * 128 + 64), NEAR, FAR);
                let k = [
                    _mm512_loadu_si512(keys.add(word * 128).cast()),
                    _mm512_loadu_si512(keys.add(word * 128 + 64).cast()),
                ];
                let q = q.add(word * 2 * ROWS);
                let even = [_mm512_and_si512(k[0], byte), _mm512_and_si512(k[1], byte)];
                for r in 0..R {
                    let x = _mm512_set1_epi32(*q.add(r));
                    sum[r][0] = dpwssd(sum[r][0], even[0], x);
                    sum[r][1] = dpwssd(sum[r][1], even[1], x);
                }
                let odd = [_mm512_srli_epi16::<8>(k[0]), _mm512_srli_epi16::<8>(k[1])];
                for r in 0..R {
                    let x = _mm512_set1_epi32(*q.add(ROWS + r));
                    sum[r][0] = dpwssd(sum[r][0], odd[0], x);
                    sum[r][1] = dpwssd(sum[r][1], odd[1], x);
                }
            }
            let scales = keys.add(WORDS * 128);
            ahead.ask_twice(scales, NEAR, FAR);
            let scale = [load::<F16>(scales, 0), load::<F16>(scales, 16)];
            for r in 0..R {
                for half in 0..2 {
                    let x = _mm512_cvtepi32_ps(sum[r][half]);
                    score[r][half] = _mm512_fmadd_ps(x, scale[half], score[r][half]);
                }
            }
        }
    }
    for r in 0..R {
        let step = _mm512_set1_ps(step[r]);
        // SAFETY: `s` has `R` rows of `PAGE_CELLS`, of which this half takes 32.
        unsafe {
            _mm512_storeu_ps(s.add(r * PAGE_CELLS), _mm512_mul_ps(score[r][0], step));
            _mm512_storeu_ps(s.add(r * PAGE_CELLS + 16), _mm512_mul_ps(score[r][1], step));
        }
    }
}

/// Largest number of each of 16 vectors, in their order.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest_of_each(v: &[__m512; 16]) -> __m512 {
    // In each 128 bits: two rows' halves beside each other, then four rows' wholes.
    let mut pairs = [v[0]; 8];
    for i in 0..8 {
        let (a, b) = (v[2 * i], v[2 * i + 1]);
        pairs[i] = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    let mut fours = [v[0]; 4];
    for i in 0..4 {
        let a = _mm512_castps_pd(pairs[2 * i]);
        let b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_max_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
        );
    }
    let across = |a, b| {
        _mm512_max_ps(
            _mm512_shuffle_f32x4::<0x88>(a, b),
            _mm512_shuffle_f32x4::<0xdd>(a, b),
        )
    };
    across(across(fours[0], fours[1]), across(fours[2], fours[3]))
}

/// See [`PageKernels::soft_max`]. Sixteen rows' maxima and factors are found together. `ASK`: cells
/// are asked for meanwhile ([`Tile::pace`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn soft_max<const ASK: bool>(tile: &mut Tile) {
    let mut pace = tile.pace;
    for first in (0..tile.n_rows).step_by(16) {
        let n = (tile.n_rows - first).min(16);
        let rows = first..first + n;
        let s = tile.s.ptr().wrapping_add(first * PAGE_CELLS);
        let l = tile.l.ptr().wrapping_add(first * 16);
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mask = |seen: u64| -> [__mmask16; 4] {
            std::array::from_fn(|i| (seen >> (16 * i)) as __mmask16)
        };
        let mut largest = [hidden; 16];
        let mut any: __mmask16 = 0;
        for (r, &seen) in tile.seen[rows.clone()].iter().enumerate() {
            let mask = mask(seen);
            let mut x = [hidden; 4];
            for i in 0..4 {
                // SAFETY: `s` has `PAGE_CELLS` numbers for each row.
                unsafe {
                    let s = s.add(r * PAGE_CELLS + i * 16);
                    x[i] = _mm512_mask_loadu_ps(hidden, mask[i], s);
                }
            }
            largest[r] = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
            any |= u16::from(seen != 0) << r;
        }
        let largest = largest_of_each(&largest);
        let all = 0xffffu16 >> (16 - n);
        // SAFETY: `m`, `alpha` and `beta` have a number for each of the `n` rows.
        unsafe {
            let old = _mm512_mask_loadu_ps(hidden, all, tile.m[rows.clone()].as_ptr());
            let new = _mm512_max_ps(old, largest);
            _mm512_mask_storeu_ps(tile.m[rows.clone()].as_mut_ptr(), all & any, new);
            let alpha = exp2(_mm512_sub_ps(old, new));
            let alpha = _mm512_mask_mov_ps(_mm512_set1_ps(1.0), any, alpha);
            _mm512_mask_storeu_ps(tile.alpha[rows.clone()].as_mut_ptr(), all, alpha);
            let beta = _mm512_maskz_mov_ps(any, exp2(_mm512_sub_ps(largest, new)));
            _mm512_mask_storeu_ps(tile.beta[rows.clone()].as_mut_ptr(), all, beta);
        }
        let mut maxima = [0.0; 16];
        // SAFETY: sixteen numbers.
        unsafe { _mm512_storeu_ps(maxima.as_mut_ptr(), largest) };
        for r in 0..n {
            let seen = tile.seen[first + r];
            let mask = mask(seen);
            // SAFETY: `s` has `PAGE_CELLS` and `l` 16 numbers for each row.
            unsafe {
                let s = s.add(r * PAGE_CELLS);
                let l = l.add(r * 16);
                let m = _mm512_set1_ps(maxima[r]);
                let mut x = [hidden; 4];
                for i in 0..4 {
                    if ASK {
                        pace.ask();
                    }
                    let score = _mm512_sub_ps(_mm512_loadu_ps(s.add(i * 16)), m);
                    x[i] = _mm512_maskz_mov_ps(mask[i], exp2(score));
                    _mm512_storeu_ps(s.add(i * 16), x[i]);
                }
                if seen == 0 {
                    continue;
                }
                let sum = _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
                let alpha = _mm512_set1_ps(tile.alpha[first + r]);
                let beta = _mm512_set1_ps(tile.beta[first + r]);
                let scaled = _mm512_mul_ps(_mm512_loadu_ps(l), alpha);
                _mm512_storeu_ps(l, _mm512_fmadd_ps(sum, beta, scaled));
            }
        }
    }
    tile.pace = pace;
}

/// See [`PageKernels::weigh`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
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
            let direct = TY == F32 || n_rows <= ROWS;
            if !direct {
                for run in runs(seen) {
                    let at = run.start * width;
                    let from = values.add(at * size);
                    widen::<TY>(from, wide.add(at), run.len() * width, tile.ahead);
                }
            }
            for row in (0..n_rows).step_by(ROWS) {
                let rows = Rows {
                    s: s.add(row * PAGE_CELLS),
                    acc: acc.add(row * dim + chunk * BLOCK),
                    dim,
                    alpha: tile.alpha.as_ptr().add(row),
                    beta: tile.beta.as_ptr().add(row),
                    ahead: tile.ahead,
                };
                let n = n_rows - row;
                match (direct, width) {
                    (true, 32) => with_rows!(n, weigh_rows::<2, TY>(&rows, values, seen)),
                    (true, _) => with_rows!(n, weigh_rows::<1, TY>(&rows, values, seen)),
                    (_, 32) => with_rows!(n, weigh_rows::<2, F32>(&rows, wide.cast(), seen)),
                    _ => with_rows!(n, weigh_rows::<1, F32>(&rows, wide.cast(), seen)),
                }
            }
        }
    }
}

/// Up to eight rows of a tile, at one chunk of their values.
struct Rows {
    s: *const f32,
    acc: *mut f32,
    /// Numbers from a row of `acc` to the next.
    dim: usize,
    alpha: *const f32,
    beta: *const f32,
    ahead: Ahead,
}

/// `acc[r] = alpha[r] acc[r] + beta[r] sum_c s[r][c] values[c]`, `N` vectors wide.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn weigh_rows<const R: usize, const N: usize, const TY: u8>(
    rows: &Rows,
    values: *const u8,
    seen: u64,
) {
    let mut sum = [[_mm512_setzero_ps(); N]; R];
    for run in runs(seen) {
        let first = values.wrapping_add(run.start * N * 32);
        for (cells, later) in rows.ahead.stretches(first, run.len(), N * 32, FAR) {
            for c in cells {
                let c = run.start + c;
                // SAFETY: 64 cells of `16 N` values, `R` rows of 64 weights.
                unsafe {
                    if TY != F32 {
                        let line = values.wrapping_add(c * N * 32);
                        _mm_prefetch::<_MM_HINT_T1>(line.wrapping_offset(later).cast());
                        _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(NEAR).cast());
                    }
                    let mut v = [_mm512_setzero_ps(); N];
                    if N == 2 {
                        let size = if TY == F32 { 4 } else { 2 };
                        v.copy_from_slice(&load_two::<TY>(values.add(c * 32 * size)));
                    } else {
                        v[0] = load::<TY>(values, c * 16);
                    }
                    for r in 0..R {
                        let weight = _mm512_set1_ps(*rows.s.add(r * PAGE_CELLS + c));
                        for j in 0..N {
                            sum[r][j] = _mm512_fmadd_ps(weight, v[j], sum[r][j]);
                        }
                    }
                }
            }
        }
    }
    for r in 0..R {
        // SAFETY: `R` rows of `acc`, `alpha` and `beta`.
        unsafe {
            let mut sum = sum[r];
            if N == 2 {
                let two = in_order::<TY>([sum[0], sum[1]]);
                sum.copy_from_slice(&two);
            }
            let alpha = _mm512_set1_ps(*rows.alpha.add(r));
            let beta = _mm512_set1_ps(*rows.beta.add(r));
            for j in 0..N {
                let acc = rows.acc.add(r * rows.dim + j * 16);
                let old = _mm512_mul_ps(_mm512_loadu_ps(acc), alpha);
                _mm512_storeu_ps(acc, _mm512_fmadd_ps(beta, sum[j], old));
            }
        }
    }
}

/// What turns weights of the cells in `seen` into integers, and what those are worth.
#[derive(Clone, Copy)]
pub(crate) struct Steps {
    pub(crate) seen: u64,
    /// Integers in a weight of 1 of each of 64 cells.
    pub(crate) per_weight: [__m512; 4],
    pub(crate) worth: f32,
}

/// Steps for 64 cells' `scales`: the largest one's weight of 1 becomes [`W_MAX`].
///
/// # Safety
/// `scales` are those of a block of values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn steps_of(scales: *const u8, seen: u64) -> Steps {
    let mut scale = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        let mask = (seen >> (16 * i)) as __mmask16;
        // SAFETY: 64 scales.
        scale[i] = _mm512_maskz_mov_ps(mask, unsafe { load::<F16>(scales, 16 * i) });
    }
    let largest = _mm512_reduce_max_ps(_mm512_max_ps(
        _mm512_max_ps(scale[0], scale[1]),
        _mm512_max_ps(scale[2], scale[3]),
    ));
    let inverse = if largest > 0.0 { W_MAX / largest } else { 0.0 };
    for i in 0..4 {
        scale[i] = _mm512_mul_ps(scale[i], _mm512_set1_ps(inverse));
    }
    Steps {
        seen,
        per_weight: scale,
        worth: largest / W_MAX,
    }
}

/// Weights of the seen cells times the cells' scales as integers of 15 bits, for each row in
/// [`Tile::w16`] in the order of [`word_at`], and what they are worth in `worth`. `first` are the first
/// row's steps; rows of one query see the same cells.
///
/// # Safety
/// `scales` are those of a block of values; `worth` has room for a number a row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn integer_weights(
    tile: &mut Tile,
    scales: *const u8,
    first: &Steps,
    worth: *mut f32,
) {
    let s = tile.s.ptr();
    // Of four neighbours the even ones first.
    let even_first = _mm512_set4_epi32(0x0f0e_0b0a, 0x0d0c_0908, 0x0706_0302, 0x0504_0100);
    let mut steps = *first;
    for row in 0..tile.n_rows {
        // SAFETY: 64 scales; `w16` has 128 bytes, `s` `PAGE_CELLS` and `worth` one number a row.
        unsafe {
            if tile.seen[row] != steps.seen {
                steps = steps_of(scales, tile.seen[row]);
            }
            let s = s.add(row * PAGE_CELLS);
            let mut w = [_mm512_setzero_si512(); 4];
            for i in 0..4 {
                let weight = _mm512_mul_ps(_mm512_loadu_ps(s.add(16 * i)), steps.per_weight[i]);
                w[i] = _mm512_cvtps_epi32(weight);
            }
            let a = _mm512_shuffle_epi8(_mm512_packs_epi32(w[0], w[1]), even_first);
            let b = _mm512_shuffle_epi8(_mm512_packs_epi32(w[2], w[3]), even_first);
            let to = tile.w16.as_mut_ptr().add(row * 2 * PAGE_CELLS);
            _mm512_storeu_si512(to.cast(), a);
            _mm512_storeu_si512(to.add(PAGE_CELLS).cast(), b);
            worth.add(row).write(steps.worth);
        }
    }
}

/// [`weigh`] of Q8_0 values.
///
/// # Safety
/// As [`PageKernels::weigh`]; the values are of that type.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn weigh_q8_0(tile: &mut Tile, values: *const u8, seen_cells: u64) {
    let (n_rows, dim) = (tile.n_rows, tile.dim_v);
    let acc = tile.acc.ptr();
    let n_chunks = dim / BLOCK;
    let scales = |chunk| values.wrapping_add(chunk * V_BLOCK_BYTES + PAGE_CELLS * BLOCK);
    // Steps wait for a maximum and a quotient: those of some chunks are made side by side.
    const CHUNKS: usize = 4;
    for some in (0..n_chunks).step_by(CHUNKS) {
        let seen = tile.seen[0];
        let last = n_chunks - 1;
        // SAFETY: the scales of a chunk.
        let steps: [Steps; CHUNKS] =
            std::array::from_fn(|i| unsafe { steps_of(scales((some + i).min(last)), seen) });
        for (i, steps) in steps.iter().enumerate().take(n_chunks - some) {
            let chunk = some + i;
            // SAFETY: the chunk is a block of `V_BLOCK_BYTES`; `w16` has 128 bytes and the others
            // `dim` and one number for each row.
            unsafe {
                let values = values.add(chunk * V_BLOCK_BYTES);
                let worth = tile.wide.ptr();
                tile.ahead.ask_twice(scales(chunk), NEAR, FAR);
                tile.ahead.ask_twice(scales(chunk).add(64), NEAR, FAR);
                integer_weights(tile, scales(chunk), steps, worth);
                for row in (0..n_rows).step_by(ROWS) {
                    let rows = RowsQ8 {
                        w: tile.w16.as_ptr().add(row * 2 * PAGE_CELLS),
                        step: worth.add(row),
                        acc: acc.add(row * dim + chunk * BLOCK),
                        dim,
                        alpha: tile.alpha.as_ptr().add(row),
                        beta: tile.beta.as_ptr().add(row),
                        ahead: tile.ahead,
                    };
                    with_rows!(n_rows - row, weigh_rows_q8_0(&rows, values, seen_cells));
                }
            }
        }
    }
}

/// Up to eight rows of a tile with integer weights, at one block of their values.
struct RowsQ8 {
    /// 64 cells of each row, groups of four in the order of [`word_at`].
    w: *const u8,
    /// What an integer product is worth.
    step: *const f32,
    acc: *mut f32,
    dim: usize,
    alpha: *const f32,
    beta: *const f32,
    ahead: Ahead,
}

/// Largest integer weight.
const W_MAX: f32 = 32767.0;

/// First of the two words of a group of four cells' integer weights: the even cells', then the odd
/// ones'. Packing within 128-bit lanes puts groups of two vectors beside each other.
pub(crate) const fn word_at(group: usize) -> usize {
    group / 8 * 16 + group % 4 * 4 + group / 4 % 2 * 2
}

/// [`weigh_rows`] with integer weights, 32 dimensions wide.
///
/// # Safety
/// `rows` has `R` rows, `values` is a block of 64 cells.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn weigh_rows_q8_0<const R: usize>(rows: &RowsQ8, values: *const u8, seen: u64) {
    let mut sum = [[_mm512_setzero_si512(); 2]; R];
    for group in 0..PAGE_CELLS / 4 {
        if seen >> (4 * group) & 0xf == 0 {
            continue;
        }
        // SAFETY: 16 groups of 4 cells x 32 dimensions, `R` rows of 64 weights.
        unsafe {
            rows.ahead.ask_twice(values.add(group * 128), NEAR, FAR);
            rows.ahead
                .ask_twice(values.add(group * 128 + 64), NEAR, FAR);
            let v = [
                _mm512_loadu_si512(values.add(group * 128).cast()),
                _mm512_loadu_si512(values.add(group * 128 + 64).cast()),
            ];
            let w = rows.w.cast::<i32>().add(word_at(group));
            let even = [
                _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(v[0])),
                _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(v[1])),
            ];
            for r in 0..R {
                let x = _mm512_set1_epi32(w.add(r * PAGE_CELLS / 2).read_unaligned());
                sum[r][0] = dpwssd(sum[r][0], even[0], x);
                sum[r][1] = dpwssd(sum[r][1], even[1], x);
            }
            let odd = [_mm512_srai_epi16::<8>(v[0]), _mm512_srai_epi16::<8>(v[1])];
            for r in 0..R {
                let x = _mm512_set1_epi32(w.add(r * PAGE_CELLS / 2 + 1).read_unaligned());
                sum[r][0] = dpwssd(sum[r][0], odd[0], x);
                sum[r][1] = dpwssd(sum[r][1], odd[1], x);
            }
        }
    }
    for r in 0..R {
        // SAFETY: `R` rows of `acc`, `step`, `alpha` and `beta`.
        unsafe {
            let alpha = _mm512_set1_ps(*rows.alpha.add(r));
            let beta = _mm512_set1_ps(*rows.beta.add(r) * *rows.step.add(r));
            for j in 0..2 {
                let acc = rows.acc.add(r * rows.dim + j * 16);
                let old = _mm512_mul_ps(_mm512_loadu_ps(acc), alpha);
                _mm512_storeu_ps(
                    acc,
                    _mm512_fmadd_ps(beta, _mm512_cvtepi32_ps(sum[r][j]), old),
                );
            }
        }
    }
}
