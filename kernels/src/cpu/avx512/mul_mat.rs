//! `mul_mat` with VNNI dot products: a panel's 16 rows in the lanes of one vector.
//!
//! The vector form (a few tokens) unpacks weights in registers, reading each once. The tile form
//! (`mul_mat_tile`) unpacks 256 columns into the first-level cache and runs all tokens over them. Both end a
//! block with the same operations (`end32`, `end256`) in the same order, so a token's result
//! does not depend on the form; inside a block sums are integers and exact.

use super::{mul_mat_2_bit, mul_mat_32};
use crate::cpu::fetch::{fetch, fetch_scales};
use crate::cpu::mul_mat::{Panel, Scratch, Tokens, Unpacked};
use crate::mul_mat::activations::{self, GROUP, Group, Parts, Place, Quants};
use crate::mul_mat::layout::{
    IQ4_XS_BLOCK, IQ4_XS_SCALES, Q4_K_BLOCK, Q4_K_D, Q4_K_SCALES, Q5_K_BLOCK, Q5_K_HIGH,
    Q6_K_BLOCK, Q6_K_HIGH, Q6_K_SCALES, ROWS, VECTOR, panel_bytes,
};
use crate::quant::WeightType;
use std::arch::x86_64::*;
use std::ops::Range;

/// Most tokens for which unpacking in registers, four tokens at a time, beats the tile form.
const VECTOR_TOKENS: usize = 4;
/// Fewest tokens for which panels are worked on in pairs: those of the tile form.
pub(crate) const PAIRS_FROM: usize = VECTOR_TOKENS + 1;

/// [`activations::quantize_row`] in vectors, the same to the bit.
///
/// # Safety
/// The instruction set is available; no other thread writes the same token.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(crate) unsafe fn quantize_row(x: &[f32], at: &Place, parts: &Parts<'_>) {
    if at.block_len == 32 {
        for (b, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let runs = x.as_chunks::<16>().0;
            let (d, inverse) = activations::scale(max_abs_bits(runs));
            // SAFETY: passed on; a block's bytes are contiguous.
            unsafe {
                let q = at.bytes(parts, 32 * b, 32).as_chunks_mut::<16>().0;
                let sum = _mm512_add_epi32(
                    round_16(&runs[0], inverse, &mut q[0]),
                    round_16(&runs[1], inverse, &mut q[1]),
                );
                at.end_32(parts, b, d, _mm512_reduce_add_epi32(sum));
            }
        }
    } else {
        for (b, x) in x.as_chunks::<256>().0.iter().enumerate() {
            let runs = x.as_chunks::<16>().0;
            let (d, inverse) = activations::scale(max_abs_bits(runs));
            let mut sums = [0; 16];
            for i in 0..16 {
                // SAFETY: passed on; 16 bytes of a block are contiguous.
                unsafe {
                    let q = at
                        .bytes(parts, 256 * b + 16 * i, 16)
                        .as_chunks_mut::<16>()
                        .0;
                    sums[i] = _mm512_reduce_add_epi32(round_16(&runs[i], inverse, &mut q[0]));
                }
            }
            // SAFETY: passed on.
            unsafe { at.end_256(parts, b, d, &sums) }
        }
    }
}

/// Largest magnitude of runs of 16 numbers, as bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn max_abs_bits(x: &[[f32; 16]]) -> u32 {
    let magnitude = _mm512_set1_epi32(0x7FFF_FFFF);
    let mut max = _mm512_setzero_si512();
    for run in x {
        // SAFETY: 16 numbers.
        let v = unsafe { _mm512_loadu_si512(run.as_ptr().cast()) };
        max = _mm512_max_epu32(max, _mm512_and_si512(v, magnitude));
    }
    _mm512_reduce_max_epu32(max)
}

/// Rounds 16 numbers times `inverse` to the nearest integers, ties to even; returns them.
#[inline]
#[target_feature(enable = "avx512f")]
fn round_16(x: &[f32; 16], inverse: f32, q: &mut [u8; 16]) -> __m512i {
    // SAFETY: 16 numbers in, 16 bytes out.
    unsafe {
        let v = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), _mm512_set1_ps(inverse));
        let v = _mm512_cvtps_epi32(v);
        _mm_storeu_si128(q.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v));
        v
    }
}

/// One panel or a pair times the unit's tokens.
///
/// # Safety
/// The instruction set is available; `p` describes live memory (see [`Panel`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(crate) unsafe fn panel(p: &Panel<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on; the tokens' kind is the type's (`Panel`).
    unsafe {
        match p.x {
            Tokens::Quants(x) if p.tokens.len() > VECTOR_TOKENS && p.is_pair() => {
                let both = [p.of_pair(0), p.of_pair(1)];
                super::mul_mat_tile::tile(&both, x, scratch);
            }
            _ if p.is_pair() => {
                panel(&p.of_pair(0), scratch);
                panel(&p.of_pair(1), scratch);
            }
            Tokens::F32(x) => super::mul_mat_float::panel(p, x),
            Tokens::Quants(x) if p.tokens.len() <= VECTOR_TOKENS => vector(p, x),
            Tokens::Quants(x) => super::mul_mat_tile::tile(std::array::from_ref(p), x, scratch),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn vector(p: &Panel<'_>, x: &Quants) {
    let mut t = p.tokens.start;
    while t < p.tokens.end {
        let in_group = t % GROUP;
        let n = (p.tokens.end - t).min(GROUP - in_group).min(VECTOR_TOKENS);
        // SAFETY: `t` and the `n - 1` tokens after it are in this group.
        unsafe {
            let x = x.group(t / GROUP).at_token(in_group);
            match n {
                1 => vector_n::<1>(p, x, t),
                2 => vector_n::<2>(p, x, t),
                3 => vector_n::<3>(p, x, t),
                _ => vector_n::<4>(p, x, t),
            }
        }
        t += n;
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn vector_n<const T: usize>(p: &Panel<'_>, x: Group, t: usize) {
    let mut acc = [_mm512_setzero_ps(); T];
    let blocks = 0..p.n_cols / p.ty.block_len();
    let next = panel_bytes(p.ty, p.n_cols).unwrap_or(0);
    // SAFETY: the panel has these blocks, the group these tokens.
    unsafe {
        match p.ty {
            WeightType::Q4_K => vector_q4_k::<T, false>(p.bytes, blocks, x, &mut acc),
            WeightType::Q5_K => vector_q4_k::<T, true>(p.bytes, blocks, x, &mut acc),
            WeightType::Q2_K => mul_mat_2_bit::vector::<T, false>(p, x, &mut acc),
            WeightType::Q3_K => mul_mat_2_bit::vector::<T, true>(p, x, &mut acc),
            WeightType::Q6_K => vector_q6_k(next, p.bytes, p.scales(), blocks, x, &mut acc),
            WeightType::IQ4_XS => vector_iq4_xs(next, p.bytes, p.scales(), blocks, x, &mut acc),
            _ => mul_mat_32::vector(p, x, &mut acc),
        }
        for (i, acc) in acc.into_iter().enumerate() {
            store(p, t + i, acc);
        }
    }
}

/// Writes the panel's rows of token `t`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::cpu) unsafe fn store(p: &Panel<'_>, t: usize, acc: __m512) {
    let mask = (0xFFFFu32 >> (ROWS - p.rows)) as u16;
    // SAFETY: the mask keeps the panel's own rows of this token.
    unsafe { _mm512_mask_storeu_ps(p.out.add(t * p.stride), mask, acc) }
}

/// Writes the panel's rows of all tokens. Each lands on lines of its own: ask for them ahead.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::cpu) unsafe fn store_all(p: &Panel<'_>, tokens: Range<usize>, acc: &[[f32; ROWS]]) {
    const STORES_AHEAD: usize = 24;
    for (t, acc) in tokens.zip(acc) {
        let ahead = p.out.wrapping_add((t + STORES_AHEAD) * p.stride);
        _mm_prefetch::<_MM_HINT_ET0>(ahead.cast());
        // SAFETY: passed on.
        unsafe { store(p, t, _mm512_loadu_ps(acc.as_ptr())) };
    }
}

/// Vector `i` of the words at `bytes`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::cpu) unsafe fn load(bytes: *const u8, i: usize) -> __m512i {
    // SAFETY: the caller has that many vectors.
    unsafe { _mm512_loadu_si512(bytes.add(i * VECTOR).cast()) }
}

/// Four neighbouring activations in every lane.
///
/// # Safety
/// Four bytes can be read at `q`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn four(q: *const i8) -> __m512i {
    // SAFETY: the caller has these four bytes.
    unsafe { _mm512_set1_epi32(q.cast::<i32>().read_unaligned()) }
}

/// The `i`-th run of 16 F16 numbers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::cpu) unsafe fn halves(bytes: *const u8, i: usize) -> __m512 {
    // SAFETY: the caller has that many.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.add(2 * ROWS * i).cast())) }
}

/// Adds a block of 32: `sum * (weights' scale * activations' scale)`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::cpu) fn end(acc: __m512, sum: __m512i, d: __m512, dx: __m512) -> __m512 {
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(d, dx), acc)
}

/// Takes a block's minima away: `sum * (weights' dmin * activations' scale)`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::cpu) fn end_min(acc: __m512, sum: __m512i, dmin: __m512, dx: __m512) -> __m512 {
    _mm512_fnmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(dmin, dx), acc)
}

/// The two words of 6-bit numbers (sub-blocks 0..4 and 4..8) of Q4_K's scales and minima.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn q4_k_scales(block: *const u8) -> ([__m512i; 2], [__m512i; 2]) {
    // SAFETY: a whole block by the caller's promise.
    let [s, m, top] = unsafe {
        let words = block.add(Q4_K_SCALES);
        [load(words, 0), load(words, 1), load(words, 2)]
    };
    let six = _mm512_set1_epi8(63);
    let four = _mm512_set1_epi8(15);
    let two = _mm512_set1_epi8(0x30);
    let and = |a, b| _mm512_and_si512(a, b);
    let join = |low, v| _mm512_or_si512(low, and(_mm512_srli_epi32(v, 2), two));
    (
        [and(s, six), join(and(top, four), s)],
        [and(m, six), join(and(_mm512_srli_epi32(top, 4), four), m)],
    )
}

/// Bytes 2i and 2i + 1 of every lane as a pair of 16-bit numbers, for i = 0 and 1.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn byte_pairs(v: __m512i) -> [__m512i; 2] {
    let even = _mm512_set1_epi32(0x00FF_00FF);
    // Lane bytes (a, b, c, d): (a, c) and (b, d) as 16-bit numbers, then regrouped.
    let ac = _mm512_and_si512(v, even);
    let bd = _mm512_and_si512(_mm512_srli_epi16(v, 8), even);
    let first = _mm512_set1_epi32(0xFFFF);
    [
        _mm512_or_si512(_mm512_and_si512(ac, first), _mm512_slli_epi32(bd, 16)),
        _mm512_or_si512(_mm512_srli_epi32(ac, 16), _mm512_andnot_si512(first, bd)),
    ]
}

/// Sum of minima times activations over a block of 256: `mins` are pairs of sub-blocks, `sums` the
/// activations' of each.
///
/// # Safety
/// `sums` has two numbers a vector of `mins`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(in crate::cpu) unsafe fn min_sum(mins: &[__m512i], sums: *const i16) -> __m512i {
    let mut sum = _mm512_setzero_si512();
    for (i, &min) in mins.iter().enumerate() {
        // SAFETY: a sum for each minimum by the caller's promise.
        sum = _mm512_dpwssd_epi32(sum, min, unsafe { four(sums.add(2 * i).cast()) });
    }
    sum
}

/// [`min_sum`] of `PAIRS` pairs of unpacked minima and the token's block at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(in crate::cpu) unsafe fn unpacked_min_sum<const PAIRS: usize>(
    w: &Unpacked,
    x: Group,
    at: usize,
) -> __m512i {
    // SAFETY: the group has this token and block by the caller's promise.
    unsafe {
        let mins: [__m512i; PAIRS] = std::array::from_fn(|i| load(w.mins[i].as_ptr().cast(), 0));
        let sums = if PAIRS == 8 { x.sum16 } else { x.sum32 };
        min_sum(&mins, sums.wrapping_add(2 * PAIRS * at))
    }
}

/// The fifth bits of sub-block `s` of Q5_K (of word `s` of Q5_0 or Q5_1), in their place: they are at
/// bit `s` of each byte, and turning by the distance to bit 4 leaves each in its byte.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn fifth_bits(high: __m512i, s: usize) -> __m512i {
    let turn = _mm512_set1_epi32((s as i32 - 4) & 31);
    _mm512_and_si512(_mm512_rorv_epi32(high, turn), _mm512_set1_epi8(16))
}

/// Blocks of Q4_K, or of Q5_K with its fifth bits `FIVE`.
///
/// # Safety
/// The instruction set must be there; the panel must be of that type.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn vector_q4_k<const T: usize, const FIVE: bool>(
    bytes: *const u8,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [__m512; T],
) {
    let low = _mm512_set1_epi8(15);
    let byte = _mm512_set1_epi32(255);
    for b in blocks {
        // SAFETY: in bounds by the caller's promise.
        unsafe {
            let block = bytes.add(b * if FIVE { Q5_K_BLOCK } else { Q4_K_BLOCK });
            let (scales, mins) = q4_k_scales(block);
            let mut high = [_mm512_setzero_si512(); 8];
            if FIVE {
                fetch(block.wrapping_add(Q5_K_HIGH), 8);
                high = std::array::from_fn(|j| load(block.add(Q5_K_HIGH), j));
            }
            fetch(block.wrapping_add(Q4_K_SCALES), 4);
            let mut total = [_mm512_setzero_si512(); T];
            for pair in 0..4 {
                let words = block.add(8 * pair * VECTOR);
                fetch(words, 8);
                let v: [__m512i; 8] = std::array::from_fn(|j| load(words, j));
                let scales = scales[pair / 2];
                for half in 0..2 {
                    let w: [__m512i; 8] = std::array::from_fn(|j| {
                        let v = if half == 0 {
                            v[j]
                        } else {
                            _mm512_srli_epi16(v[j], 4)
                        };
                        let w = _mm512_and_si512(v, low);
                        if FIVE {
                            _mm512_or_si512(w, fifth_bits(high[j], 2 * pair + half))
                        } else {
                            w
                        }
                    });
                    let shift = _mm_cvtsi32_si128((pair % 2 * 16 + half * 8) as i32);
                    let scale = _mm512_and_si512(_mm512_srl_epi32(scales, shift), byte);
                    let q = x.q.add((4 * b + pair) * x.width * 64 + 32 * half);
                    for t in 0..T {
                        let mut sum = _mm512_setzero_si512();
                        for j in 0..8 {
                            sum = _mm512_dpbusd_epi32(sum, w[j], four(q.add(64 * t + 4 * j)));
                        }
                        let sum = _mm512_mullo_epi32(sum, scale);
                        total[t] = _mm512_add_epi32(total[t], sum);
                    }
                }
            }
            let d = halves(block.add(Q4_K_D), 0);
            let dmin = halves(block.add(Q4_K_D), 1);
            let ([m0, m1], [m2, m3]) = (byte_pairs(mins[0]), byte_pairs(mins[1]));
            for t in 0..T {
                let at = b * x.width + t;
                let dx = _mm512_set1_ps(*x.d.add(at));
                acc[t] = end(acc[t], total[t], d, dx);
                let min = min_sum(&[m0, m1, m2, m3], x.sum32.add(8 * at));
                acc[t] = end_min(acc[t], min, dmin, dx);
            }
        }
    }
}

/// Four vectors of Q6_K quants, run `run` of 32 columns, from their low and high bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn q6_k_quants(low: [__m512i; 4], high: [__m512i; 4], run: usize) -> [__m512i; 4] {
    let four = _mm512_set1_epi8(15);
    let two = _mm512_set1_epi8(0x30);
    std::array::from_fn(|j| {
        let (l, h) = (low[j], high[j]);
        let l = if run < 2 { l } else { _mm512_srli_epi16(l, 4) };
        let h = match run {
            0 => _mm512_slli_epi16(h, 4),
            1 => _mm512_slli_epi16(h, 2),
            2 => h,
            _ => _mm512_srli_epi16(h, 2),
        };
        // (l & 15) | (h & 0x30)
        _mm512_or_si512(_mm512_and_si512(l, four), _mm512_and_si512(h, two))
    })
}

/// Byte `i` of every lane of the scales' word, sign-extended.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn q6_k_scale(word: __m512i, i: usize) -> __m512i {
    let up = _mm_cvtsi32_si128(24 - 8 * i as i32);
    _mm512_srai_epi32(_mm512_sll_epi32(word, up), 24)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn vector_q6_k<const T: usize>(
    panel_bytes: usize,
    bytes: *const u8,
    scales: *const u8,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [__m512; T],
) {
    let n = blocks.end;
    for b in blocks {
        // SAFETY: in bounds by the caller's promise.
        unsafe {
            let block = bytes.add(b * Q6_K_BLOCK);
            fetch(block.wrapping_add(Q6_K_SCALES), 4);
            fetch_scales(scales, b, 3, n, panel_bytes);
            let mut total = [_mm512_setzero_si512(); T];
            for half in 0..2 {
                for sub in 0..2 {
                    let low = block.add((16 * half + 4 * sub) * VECTOR);
                    let high = block.add(Q6_K_HIGH + (8 * half + 4 * sub) * VECTOR);
                    fetch(low, 4);
                    fetch(low.wrapping_add(8 * VECTOR), 4);
                    fetch(high, 4);
                    let low0 = std::array::from_fn(|j| load(low, j));
                    let low1 = std::array::from_fn(|j| load(low, 8 + j));
                    let high = std::array::from_fn(|j| load(high, j));
                    for run in 0..4 {
                        let low = if run % 2 == 0 { low0 } else { low1 };
                        let w = q6_k_quants(low, high, run);
                        let s = 8 * half + 2 * run + sub;
                        let word = load(block.add(Q6_K_SCALES), s / 4);
                        let scale = q6_k_scale(word, s % 4);
                        let q = x.q.add((4 * b + s / 4) * x.width * 64 + s % 4 * 16);
                        for t in 0..T {
                            let start = *x.neg32.add(16 * (b * x.width + t) + s);
                            let mut sum = _mm512_set1_epi32(start);
                            for j in 0..4 {
                                sum = _mm512_dpbusd_epi32(sum, w[j], four(q.add(64 * t + 4 * j)));
                            }
                            let sum = _mm512_mullo_epi32(sum, scale);
                            total[t] = _mm512_add_epi32(total[t], sum);
                        }
                    }
                }
            }
            let d = halves(scales, b);
            for t in 0..T {
                let dx = _mm512_set1_ps(*x.d.add(b * x.width + t));
                acc[t] = end(acc[t], total[t], d, dx);
            }
        }
    }
}

/// `-128 * sum` in every lane.
///
/// # Safety
/// `sum` can be read.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn neg128(sum: *const i16) -> __m512i {
    // SAFETY: passed on.
    _mm512_set1_epi32(-128 * i32::from(unsafe { *sum }))
}

/// Sub-block `s` of an IQ4_XS block: bytes with zero at 128, and the scale.
///
/// # Safety
/// The instruction set must be there; `block` must be a whole block of that type.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn iq4_xs_quants(block: *const u8, s: usize) -> ([__m512i; 8], __m512i) {
    // SAFETY: a whole block by the caller's promise.
    unsafe {
        let scales = load(block.add(IQ4_XS_SCALES), s / 4);
        let words = mul_mat_32::iq4_quants(block.add(4 * s * VECTOR));
        (words, q6_k_scale(scales, s % 4))
    }
}

/// # Safety
/// The instruction set must be there; the panel must be of that type.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn vector_iq4_xs<const T: usize>(
    panel_bytes: usize,
    bytes: *const u8,
    scales: *const u8,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [__m512; T],
) {
    let n = blocks.end;
    for b in blocks {
        // SAFETY: in bounds by the caller's promise.
        unsafe {
            let block = bytes.add(b * IQ4_XS_BLOCK);
            fetch_scales(scales, b, 3, n, panel_bytes);
            fetch(block.wrapping_add(IQ4_XS_SCALES), 2);
            let mut total = [_mm512_setzero_si512(); T];
            for s in 0..8 {
                fetch(block.wrapping_add(4 * s * VECTOR), 4);
                let (w, scale) = iq4_xs_quants(block, s);
                let q = x.q.add((4 * b + s / 2) * x.width * 64 + s % 2 * 32);
                for t in 0..T {
                    let mut sum = neg128(x.sum32.add(8 * (b * x.width + t) + s));
                    for j in 0..8 {
                        sum = _mm512_dpbusd_epi32(sum, w[j], four(q.add(64 * t + 4 * j)));
                    }
                    let sum = _mm512_mullo_epi32(sum, scale);
                    total[t] = _mm512_add_epi32(total[t], sum);
                }
            }
            let d = halves(scales, b);
            for t in 0..T {
                let dx = _mm512_set1_ps(*x.d.add(b * x.width + t));
                acc[t] = end(acc[t], total[t], d, dx);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::cpu) unsafe fn put(to: &mut [u8; VECTOR], v: __m512i) {
    // SAFETY: 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), v) }
}

/// Unpacks a block of 16 rows of Q4_K, or of Q5_K with its fifth bits `FIVE`.
///
/// # Safety
/// The instruction set must be there; `block` must be a whole block of that type.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(in crate::cpu) unsafe fn unpack_q4_k<const FIVE: bool>(block: *const u8, to: &mut Unpacked) {
    let low = _mm512_set1_epi8(15);
    let byte = _mm512_set1_epi32(255);
    // SAFETY: a whole block by the caller's promise; every store is to a whole array.
    unsafe {
        for i in 0..32 {
            let v = load(block, i);
            let at = i / 8 * 16 + i % 8;
            let mut words = [v, _mm512_srli_epi16(v, 4)].map(|v| _mm512_and_si512(v, low));
            if FIVE {
                let high = load(block.add(Q5_K_HIGH), i % 8);
                for (half, w) in words.iter_mut().enumerate() {
                    *w = _mm512_or_si512(*w, fifth_bits(high, i / 8 * 2 + half));
                }
            }
            put(&mut to.words[at], words[0]);
            put(&mut to.words[at + 8], words[1]);
        }
        let (scales, mins) = q4_k_scales(block);
        for s in 0..8 {
            let shift = _mm_cvtsi32_si128((s % 4 * 8) as i32);
            let scale = _mm512_and_si512(_mm512_srl_epi32(scales[s / 4], shift), byte);
            _mm512_storeu_si512(to.scales[s].as_mut_ptr().cast(), scale);
        }
        for i in 0..4 {
            let pair = byte_pairs(mins[i / 2])[i % 2];
            _mm512_storeu_si512(to.mins[i].as_mut_ptr().cast(), pair);
        }
        _mm512_storeu_ps(to.d[0].as_mut_ptr(), halves(block.add(Q4_K_D), 0));
        _mm512_storeu_ps(to.dmin.as_mut_ptr(), halves(block.add(Q4_K_D), 1));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(in crate::cpu) unsafe fn unpack_q6_k(
    block: *const u8,
    scales: *const u8,
    b: usize,
    to: &mut Unpacked,
) {
    // SAFETY: a whole block by the caller's promise; every store is to a whole array.
    unsafe {
        for half in 0..2 {
            for sub in 0..2 {
                let low = block.add((16 * half + 4 * sub) * VECTOR);
                let high = block.add(Q6_K_HIGH + (8 * half + 4 * sub) * VECTOR);
                let low0 = std::array::from_fn(|j| load(low, j));
                let low1 = std::array::from_fn(|j| load(low, 8 + j));
                let high = std::array::from_fn(|j| load(high, j));
                for run in 0..4 {
                    let low = if run % 2 == 0 { low0 } else { low1 };
                    for (j, w) in q6_k_quants(low, high, run).into_iter().enumerate() {
                        put(&mut to.words[32 * half + 8 * run + 4 * sub + j], w);
                    }
                }
            }
        }
        for s in 0..16 {
            let scale = q6_k_scale(load(block.add(Q6_K_SCALES), s / 4), s % 4);
            _mm512_storeu_si512(to.scales[s].as_mut_ptr().cast(), scale);
        }
        _mm512_storeu_ps(to.d[0].as_mut_ptr(), halves(scales, b));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(in crate::cpu) unsafe fn unpack_iq4_xs(
    block: *const u8,
    scales: *const u8,
    b: usize,
    to: &mut Unpacked,
) {
    // SAFETY: a whole block by the caller's promise; every store is to a whole array.
    unsafe {
        for s in 0..8 {
            let (words, scale) = iq4_xs_quants(block, s);
            for (to, w) in to.words[8 * s..].iter_mut().zip(words) {
                put(to, w);
            }
            _mm512_storeu_si512(to.scales[s].as_mut_ptr().cast(), scale);
        }
        _mm512_storeu_ps(to.d[0].as_mut_ptr(), halves(scales, b));
    }
}
