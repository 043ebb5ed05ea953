//! `mul_mat` of the types with pairs of low bits, Q2_K and (`THREE`) Q3_K with its third bits, and
//! VNNI dot products; `mul_mat` calls these forms.

use super::mul_mat::{byte_pairs, end, end_min, four, halves, load, min_sum, put, q6_k_scale};
use crate::cpu::fetch::{fetch, fetch_scales};
use crate::cpu::mul_mat::{Panel, Unpacked};
use crate::mul_mat::activations::Group;
use crate::mul_mat::layout::{
    Q2_K_BLOCK, Q2_K_D, Q2_K_SCALES, Q3_K_BLOCK, Q3_K_HIGH, Q3_K_SCALES, VECTOR, panel_bytes,
};
use std::arch::x86_64::*;

const fn block_bytes(three: bool) -> usize {
    if three { Q3_K_BLOCK } else { Q2_K_BLOCK }
}

/// Quants of run `run` of 32 columns in half `half` of a block: the four words of one of its two
/// sub-blocks, from their low and third bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn quants<const THREE: bool>(
    low: [__m512i; 4],
    third: [__m512i; 4],
    half: usize,
    run: usize,
) -> [__m512i; 4] {
    // Turned by less than a byte each bit stays in its own, once the others are masked out.
    let down = _mm512_set1_epi32(2 * run as i32);
    let turn = _mm512_set1_epi32((4 * half as i32 + run as i32 - 2) & 31);
    std::array::from_fn(|j| {
        let q = _mm512_and_si512(_mm512_srlv_epi32(low[j], down), _mm512_set1_epi8(3));
        if !THREE {
            return q;
        }
        let third = _mm512_rorv_epi32(third[j], turn);
        _mm512_or_si512(q, _mm512_and_si512(third, _mm512_set1_epi8(4)))
    })
}

/// Scale of sub-block `s`, as 32-bit numbers.
///
/// # Safety
/// `block` is a whole block.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scale<const THREE: bool>(block: *const u8, s: usize) -> __m512i {
    // SAFETY: passed on.
    unsafe {
        if THREE {
            return q6_k_scale(load(block.add(Q3_K_SCALES), s / 4), s % 4);
        }
        let down = _mm512_set1_epi32(8 * (s % 4) as i32);
        let word = _mm512_srlv_epi32(load(block.add(Q2_K_SCALES), s / 4), down);
        _mm512_and_si512(word, _mm512_set1_epi32(15))
    }
}

/// Minima of a block of Q2_K: pairs of sub-blocks.
///
/// # Safety
/// `block` is a whole block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn minima(block: *const u8) -> [__m512i; 8] {
    std::array::from_fn(|i| {
        // SAFETY: passed on.
        let words = unsafe { load(block.add(Q2_K_SCALES), i / 2) };
        let mins = _mm512_and_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi8(15));
        byte_pairs(mins)[i % 2]
    })
}

/// Low and third bits of sub-blocks `sub` in half `half` of a block.
///
/// # Safety
/// `block` is a whole block.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn bits<const THREE: bool>(
    block: *const u8,
    half: usize,
    sub: usize,
) -> ([__m512i; 4], [__m512i; 4]) {
    // SAFETY: passed on.
    unsafe {
        let low = std::array::from_fn(|j| load(block, 8 * half + 4 * sub + j));
        let third = if THREE {
            std::array::from_fn(|j| load(block.add(Q3_K_HIGH), 4 * sub + j))
        } else {
            [_mm512_setzero_si512(); 4]
        };
        (low, third)
    }
}

/// All blocks of a panel for `T` tokens, unpacked in registers.
///
/// # Safety
/// The instruction set is available; the panel is of that type, the group has `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) unsafe fn vector<const T: usize, const THREE: bool>(
    p: &Panel<'_>,
    x: Group,
    acc: &mut [__m512; T],
) {
    let n = p.n_cols / 256;
    let next = panel_bytes(p.ty, p.n_cols).unwrap_or(0);
    for b in 0..n {
        // SAFETY: in bounds by the caller's promise.
        unsafe {
            let block = p.bytes.add(b * block_bytes(THREE));
            if THREE {
                fetch_scales(p.scales(), b, 3, n, next);
            }
            let mut total = [_mm512_setzero_si512(); T];
            for half in 0..2 {
                for sub in 0..2 {
                    // A quarter of the block's lines, which are 21 and 28.
                    let quarter = 2 * half + sub;
                    fetch(
                        block.wrapping_add(7 * quarter * VECTOR),
                        if THREE { 7 } else { 6 },
                    );
                    let (low, third) = bits::<THREE>(block, half, sub);
                    for run in 0..4 {
                        let w = quants::<THREE>(low, third, half, run);
                        let s = 8 * half + 2 * run + sub;
                        let scale = scale::<THREE>(block, s);
                        let q = x.q.add((4 * b + s / 4) * x.width * 64 + s % 4 * 16);
                        for t in 0..T {
                            let mut sum = _mm512_setzero_si512();
                            if THREE {
                                // The zero is at 4.
                                let neg32 = *x.neg32.add(16 * (b * x.width + t) + s);
                                sum = _mm512_set1_epi32(neg32 >> 3);
                            }
                            for j in 0..4 {
                                sum = _mm512_dpbusd_epi32(sum, w[j], four(q.add(64 * t + 4 * j)));
                            }
                            let sum = _mm512_mullo_epi32(sum, scale);
                            total[t] = _mm512_add_epi32(total[t], sum);
                        }
                    }
                }
            }
            let at = |t: usize| b * x.width + t;
            if THREE {
                let d = halves(p.scales(), b);
                for t in 0..T {
                    acc[t] = end(acc[t], total[t], d, _mm512_set1_ps(*x.d.add(at(t))));
                }
            } else {
                let (d, dmin) = (halves(block.add(Q2_K_D), 0), halves(block.add(Q2_K_D), 1));
                let mins = minima(block);
                for t in 0..T {
                    let dx = _mm512_set1_ps(*x.d.add(at(t)));
                    acc[t] = end(acc[t], total[t], d, dx);
                    let min = min_sum(&mins, x.sum16.add(16 * at(t)));
                    acc[t] = end_min(acc[t], min, dmin, dx);
                }
            }
        }
    }
}

/// Unpacks block `b` of a panel; zero of Q3_K is then at 32, where Q6_K has it.
///
/// # Safety
/// The instruction set is available; the panel is of that type and has the block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(in crate::cpu) unsafe fn unpack<const THREE: bool>(p: &Panel<'_>, b: usize, to: &mut Unpacked) {
    let up = _mm512_set1_epi8(if THREE { 28 } else { 0 });
    // SAFETY: a whole block by the caller's promise; every store is to a whole array.
    unsafe {
        let block = p.bytes.add(b * block_bytes(THREE));
        for half in 0..2 {
            for sub in 0..2 {
                let (low, third) = bits::<THREE>(block, half, sub);
                for run in 0..4 {
                    let words = quants::<THREE>(low, third, half, run);
                    for (j, w) in words.into_iter().enumerate() {
                        let to = &mut to.words[32 * half + 8 * run + 4 * sub + j];
                        put(to, _mm512_add_epi8(w, up));
                    }
                }
            }
        }
        for s in 0..16 {
            let scale = scale::<THREE>(block, s);
            _mm512_storeu_si512(to.scales[s].as_mut_ptr().cast(), scale);
        }
        if THREE {
            return _mm512_storeu_ps(to.d[0].as_mut_ptr(), halves(p.scales(), b));
        }
        for (to, min) in to.mins.iter_mut().zip(minima(block)) {
            _mm512_storeu_si512(to.as_mut_ptr().cast(), min);
        }
        _mm512_storeu_ps(to.d[0].as_mut_ptr(), halves(block.add(Q2_K_D), 0));
        _mm512_storeu_ps(to.dmin.as_mut_ptr(), halves(block.add(Q2_K_D), 1));
    }
}
