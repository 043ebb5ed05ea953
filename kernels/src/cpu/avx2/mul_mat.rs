//! `mul_mat` with `vpmaddubsw`: a panel's 16 rows in two vectors of eight.

use crate::cpu::mul_mat::{Panel, Scratch, Tokens, Unpacked, by_chunks};
use crate::mul_mat::activations::{self, Group, Parts, Place};
use crate::mul_mat::layout::{ROWS, VECTOR};
use crate::quant::{IQ4_VALUES, WeightType};
use std::arch::x86_64::*;
use std::ops::Range;

/// Tokens of a register tile.
const TILE: usize = 4;
/// Rows of a vector.
const LANES: usize = 8;

/// [`activations::quantize_row`] with this instruction set.
///
/// # Safety
/// The instruction set is available; as the function itself.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn quantize_row(x: &[f32], at: &Place, parts: &Parts<'_>) {
    // SAFETY: passed on.
    unsafe { activations::quantize_row(x, at, parts) }
}

/// One panel times the unit's tokens.
///
/// # Safety
/// The instruction set is available; `p` describes live memory (see [`Panel`]).
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn panel(p: &Panel<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on; the tokens' kind is the type's (`Panel`).
    unsafe {
        match p.x {
            Tokens::F32(x) => match p.ty {
                WeightType::F32 => float::<F32>(p, x),
                WeightType::F16 => float::<F16>(p, x),
                _ => float::<BF16>(p, x),
            },
            Tokens::Quants(x) => by_chunks::<TILE>(p, x, scratch, tile, look_up),
        }
    }
}

/// Places in IQ4_NL's table become its values.
///
/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx2")]
unsafe fn look_up(words: &mut [[u8; VECTOR]]) {
    // SAFETY: 16 values; 32 of each vector's bytes at a time.
    unsafe {
        let values = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_VALUES.as_ptr().cast()));
        for q in words.as_flattened_mut().chunks_exact_mut(32) {
            let q = q.as_mut_ptr().cast();
            _mm256_storeu_si256(q, _mm256_shuffle_epi8(values, _mm256_loadu_si256(q)));
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn tile(
    ty: WeightType,
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: as `by_chunks` promises.
    unsafe {
        match acc.as_chunks_mut::<TILE>().0.first_mut() {
            Some(acc) => tile_n::<TILE>(ty, w, blocks, x, acc),
            None => tile_n::<1>(ty, w, blocks, x, &mut acc.as_chunks_mut::<1>().0[0]),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_n<const T: usize>(
    ty: WeightType,
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[f32; ROWS]; T],
) {
    // SAFETY: as `by_chunks` promises.
    unsafe {
        match ty {
            WeightType::Q8_0 | WeightType::Q5_0 | WeightType::IQ4_NL => {
                dot32::<T, SIGNED>(w, blocks, x, acc);
            }
            WeightType::Q4_0 => dot32::<T, ZERO_AT_8>(w, blocks, x, acc),
            WeightType::Q4_1 | WeightType::Q5_1 => dot32::<T, MINIMA>(w, blocks, x, acc),
            WeightType::IQ4_XS => dot256::<T, SIGNED>(w, blocks.start, x, acc),
            WeightType::Q2_K => dot256::<T, MINIMA_OF_16>(w, blocks.start, x, acc),
            WeightType::Q4_K | WeightType::Q5_K => dot256::<T, MINIMA>(w, blocks.start, x, acc),
            _ => dot256::<T, ZERO_AT_32>(w, blocks.start, x, acc),
        }
    }
}

/// What [`Unpacked`]'s words are: signed, or unsigned with zero at 8 or 32, or with minima of 32 or of
/// 16 columns.
const SIGNED: u8 = 0;
const ZERO_AT_8: u8 = 1;
const ZERO_AT_32: u8 = 2;
const MINIMA: u8 = 3;
const MINIMA_OF_16: u8 = 4;

/// Rows `8 * half..` of a vector of words.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(words: *const u8, half: usize) -> __m256i {
    // SAFETY: a whole vector of 64 bytes by the caller's promise.
    unsafe { _mm256_loadu_si256(words.add(half * VECTOR / 2).cast()) }
}

/// Four neighbouring bytes in every lane.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four(q: *const i8) -> __m256i {
    // SAFETY: the caller has these four bytes.
    unsafe { _mm256_set1_epi32(q.cast::<i32>().read_unaligned()) }
}

/// `sum` plus each lane's four products. Signed quants go as magnitude times signed activation;
/// no pair of products leaves 16 bits, as activations stop at 127.
#[inline]
#[target_feature(enable = "avx2")]
fn dot4<const WORDS: u8>(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    let pairs = if WORDS == SIGNED {
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    } else {
        _mm256_maddubs_epi16(w, x)
    };
    _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Adds a block: `sum * (weights' scale * activations' scale)`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn end(acc: &mut [f32; ROWS], half: usize, sum: __m256i, d: &[f32; ROWS], dx: f32) {
    // SAFETY: eight of sixteen numbers each.
    unsafe {
        let acc = acc.as_mut_ptr().add(LANES * half);
        let d = _mm256_loadu_ps(d.as_ptr().add(LANES * half));
        let scale = _mm256_mul_ps(d, _mm256_set1_ps(dx));
        let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(acc));
        _mm256_storeu_ps(acc, sum);
    }
}

/// Adds a block's minimum: `m * (activations' scale * sum)`.
///
/// # Safety
/// The instruction set is available; `half` is 0 or 1.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_minimum(acc: &mut [f32; ROWS], half: usize, m: &[f32; ROWS], dsum: f32) {
    // SAFETY: eight of sixteen numbers each.
    unsafe {
        let acc = acc.as_mut_ptr().add(LANES * half);
        let m = _mm256_loadu_ps(m.as_ptr().add(LANES * half));
        let sum = _mm256_fmadd_ps(m, _mm256_set1_ps(dsum), _mm256_loadu_ps(acc));
        _mm256_storeu_ps(acc, sum);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot32<const T: usize, const WORDS: u8>(
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[f32; ROWS]; T],
) {
    for (i, b) in blocks.enumerate() {
        for half in 0..2 {
            // SAFETY: as `by_chunks` promises.
            unsafe {
                let q = x.q.add(b / 2 * x.width * 64 + b % 2 * 32);
                let mut sums = [_mm256_setzero_si256(); T];
                if WORDS == ZERO_AT_8 {
                    for t in 0..T {
                        sums[t] = _mm256_set1_epi32(*x.neg8.add(b * x.width + t));
                    }
                }
                for j in 0..8 {
                    let w = load(w.words[8 * i + j].as_ptr(), half);
                    for t in 0..T {
                        sums[t] = dot4::<WORDS>(sums[t], w, four(q.add(64 * t + 4 * j)));
                    }
                }
                for t in 0..T {
                    let dx = *x.d.add(b * x.width + t);
                    end(&mut acc[t], half, sums[t], &w.d[i], dx);
                    if WORDS == MINIMA {
                        let dsum = *x.dsum.add(b * x.width + t);
                        add_minimum(&mut acc[t], half, &w.m[i], dsum);
                    }
                }
            }
        }
    }
}

/// Adds block `b` of 256 columns for `T` tokens.
///
/// # Safety
/// The instruction set must be there; the block must be one of panel and tokens.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot256<const T: usize, const WORDS: u8>(
    w: &Unpacked,
    b: usize,
    x: Group,
    acc: &mut [[f32; ROWS]; T],
) {
    let words_per_sub = match WORDS {
        ZERO_AT_32 | MINIMA_OF_16 => 4,
        _ => 8,
    };
    for half in 0..2 {
        // SAFETY: as `by_chunks` promises.
        unsafe {
            let mut total = [_mm256_setzero_si256(); T];
            for s in 0..64 / words_per_sub {
                let first = s * words_per_sub;
                let q =
                    x.q.add((4 * b + first / 16) * x.width * 64 + first % 16 * 4);
                let mut sums = [_mm256_setzero_si256(); T];
                if WORDS == ZERO_AT_32 {
                    for t in 0..T {
                        let at = 16 * (b * x.width + t) + s;
                        sums[t] = _mm256_set1_epi32(*x.neg32.add(at));
                    }
                }
                for j in 0..words_per_sub {
                    let w = load(w.words[first + j].as_ptr(), half);
                    for t in 0..T {
                        sums[t] = dot4::<WORDS>(sums[t], w, four(q.add(64 * t + 4 * j)));
                    }
                }
                let scale = load(w.scales[s].as_ptr().cast(), half);
                for t in 0..T {
                    let scaled = _mm256_mullo_epi32(sums[t], scale);
                    total[t] = _mm256_add_epi32(total[t], scaled);
                }
            }
            for t in 0..T {
                let at = b * x.width + t;
                let dx = *x.d.add(at);
                end(&mut acc[t], half, total[t], &w.d[0], dx);
                if matches!(WORDS, MINIMA | MINIMA_OF_16) {
                    let (n, sums) = if WORDS == MINIMA {
                        (8, x.sum32)
                    } else {
                        (16, x.sum16)
                    };
                    let mut sum = _mm256_setzero_si256();
                    for i in 0..n / 2 {
                        let min = load(w.mins[i].as_ptr().cast(), half);
                        let pair = four(sums.add(n * at + 2 * i).cast());
                        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(min, pair));
                    }
                    // Taking away is adding the negated integer, to the bit.
                    let sum = _mm256_sub_epi32(_mm256_setzero_si256(), sum);
                    end(&mut acc[t], half, sum, &w.dmin, dx);
                }
            }
        }
    }
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Rows `8 * half..` of columns `2 * pair` and `2 * pair + 1`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn pair_of<const TY: u8>(bytes: *const u8, pair: usize, half: usize) -> [__m256; 2] {
    // SAFETY: the caller has both columns; BF16 pads its last pair.
    unsafe {
        match TY {
            F32 => [0, 1].map(|i| {
                let column = bytes.add((2 * pair + i) * VECTOR + half * VECTOR / 2);
                _mm256_loadu_ps(column.cast())
            }),
            F16 => [0, 1].map(|i| {
                let column = bytes.add(((2 * pair + i) * ROWS + LANES * half) * 2);
                _mm256_cvtph_ps(_mm_loadu_si128(column.cast()))
            }),
            _ => {
                let v = load(bytes.add(pair * VECTOR), half);
                let high = _mm256_set1_epi32(0xFFFF_0000u32 as i32);
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(v, high)),
                ]
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float<const TY: u8>(p: &Panel<'_>, x: &[f32]) {
    let mut t = p.tokens.start;
    while t < p.tokens.end {
        // SAFETY: that many tokens are left.
        unsafe {
            t += match p.tokens.end - t {
                4.. => dot_float::<4, TY>(p, x, t),
                _ => dot_float::<1, TY>(p, x, t),
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_float<const T: usize, const TY: u8>(p: &Panel<'_>, x: &[f32], t: usize) -> usize {
    let n_cols = p.n_cols;
    let x = &x[t * n_cols..(t + T) * n_cols];
    for half in 0..2 {
        let mut even = [_mm256_setzero_ps(); T];
        let mut odd = [_mm256_setzero_ps(); T];
        // SAFETY: columns below n_cols of the panel and of T tokens; rows below the panel's.
        unsafe {
            let at = |t: usize, k: usize| _mm256_set1_ps(*x.get_unchecked(t * n_cols + k));
            for pair in 0..n_cols / 2 {
                let [w0, w1] = pair_of::<TY>(p.bytes, pair, half);
                for t in 0..T {
                    even[t] = _mm256_fmadd_ps(w0, at(t, 2 * pair), even[t]);
                    odd[t] = _mm256_fmadd_ps(w1, at(t, 2 * pair + 1), odd[t]);
                }
            }
            if n_cols % 2 == 1 {
                let last = crate::cpu::mul_mat::column(p.ty, p.bytes, n_cols - 1);
                let w = _mm256_loadu_ps(last.as_ptr().add(LANES * half));
                for t in 0..T {
                    even[t] = _mm256_fmadd_ps(w, at(t, n_cols - 1), even[t]);
                }
            }
            for i in 0..T {
                let mut rows = [0.0f32; LANES];
                _mm256_storeu_ps(rows.as_mut_ptr(), _mm256_add_ps(even[i], odd[i]));
                let n = p.rows.saturating_sub(LANES * half).min(LANES);
                let out = p.out.wrapping_add((t + i) * p.stride + LANES * half);
                std::ptr::copy_nonoverlapping(rows.as_ptr(), out, n);
            }
        }
    }
    T
}
