//! `mul_mat` for F32, F16 and BF16 weights: FMA in F32, even and odd columns summed apart.

use super::mul_mat::store;
use crate::cpu::mul_mat::Panel;
use crate::mul_mat::layout::{ROWS, VECTOR};
use crate::quant::WeightType;
use std::arch::x86_64::*;

/// Tokens of a register tile: two accumulators each leave room for two weight vectors.
const TILE: usize = 12;
/// How far ahead weights are fetched, in bytes.
const AHEAD: usize = 4096;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// One panel times the unit's tokens of `x`, `[n_tokens, n_cols]`.
///
/// # Safety
/// The instruction set is available; `p` describes live memory.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
pub(super) unsafe fn panel(p: &Panel<'_>, x: &[f32]) {
    // SAFETY: passed on.
    unsafe {
        match p.ty {
            WeightType::F32 => tokens::<F32>(p, x),
            WeightType::F16 => tokens::<F16>(p, x),
            _ => tokens::<BF16>(p, x),
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
unsafe fn tokens<const TY: u8>(p: &Panel<'_>, x: &[f32]) {
    let mut t = p.tokens.start;
    while t < p.tokens.end {
        // SAFETY: that many tokens are left.
        unsafe {
            t += match p.tokens.end - t {
                TILE.. => dot::<TILE, TY>(p, x, t),
                8.. => dot::<8, TY>(p, x, t),
                4.. => dot::<4, TY>(p, x, t),
                2.. => dot::<2, TY>(p, x, t),
                _ => dot::<1, TY>(p, x, t),
            }
        }
    }
}

/// Weights of columns `2 * pair` and `2 * pair + 1`.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
unsafe fn pair_of<const TY: u8>(bytes: *const u8, pair: usize) -> [__m512; 2] {
    // SAFETY: the caller has both columns.
    unsafe {
        match TY {
            F32 => {
                let at = bytes.add(2 * VECTOR * pair);
                [
                    _mm512_loadu_ps(at.cast()),
                    _mm512_loadu_ps(at.add(VECTOR).cast()),
                ]
            }
            F16 => {
                let at = bytes.add(VECTOR * pair);
                [
                    _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
                    _mm512_cvtph_ps(_mm256_loadu_si256(at.add(2 * ROWS).cast())),
                ]
            }
            _ => {
                let v = _mm512_loadu_si512(bytes.add(VECTOR * pair).cast());
                let high = _mm512_set1_epi32(0xFFFF_0000u32 as i32);
                [
                    _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
                    _mm512_castsi512_ps(_mm512_and_si512(v, high)),
                ]
            }
        }
    }
}

/// The last column when their number is odd.
#[inline]
#[target_feature(enable = "avx512f,f16c")]
unsafe fn last_of<const TY: u8>(bytes: *const u8, n_cols: usize) -> __m512 {
    // SAFETY: the caller has this column; BF16 pads its pair.
    unsafe {
        match TY {
            F32 => _mm512_loadu_ps(bytes.add(VECTOR * (n_cols - 1)).cast()),
            F16 => {
                let at = bytes.add(2 * ROWS * (n_cols - 1));
                _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()))
            }
            _ => pair_of::<BF16>(bytes, n_cols / 2)[0],
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")]
unsafe fn dot<const T: usize, const TY: u8>(p: &Panel<'_>, x: &[f32], t: usize) -> usize {
    let n_cols = p.n_cols;
    let x = &x[t * n_cols..(t + T) * n_cols];
    let mut even = [_mm512_setzero_ps(); T];
    let mut odd = [_mm512_setzero_ps(); T];
    // SAFETY: columns below n_cols of the panel and of T tokens.
    unsafe {
        let at = |t: usize, k: usize| _mm512_set1_ps(*x.get_unchecked(t * n_cols + k));
        for pair in 0..n_cols / 2 {
            if T < TILE {
                let step = if TY == F32 { 2 * VECTOR } else { VECTOR };
                let ahead = p.bytes.wrapping_add(AHEAD + pair * step);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                if TY == F32 {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(VECTOR).cast());
                }
            }
            let [w0, w1] = pair_of::<TY>(p.bytes, pair);
            for t in 0..T {
                even[t] = _mm512_fmadd_ps(w0, at(t, 2 * pair), even[t]);
                odd[t] = _mm512_fmadd_ps(w1, at(t, 2 * pair + 1), odd[t]);
            }
        }
        if n_cols % 2 == 1 {
            let w = last_of::<TY>(p.bytes, n_cols);
            for t in 0..T {
                even[t] = _mm512_fmadd_ps(w, at(t, n_cols - 1), even[t]);
            }
        }
        for i in 0..T {
            store(p, t + i, _mm512_add_ps(even[i], odd[i]));
        }
    }
    T
}
