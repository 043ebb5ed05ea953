//! `mul_mat` of many tokens with VNNI dot products: 256 columns of one panel or two are unpacked into
//! the first-level cache, and all tokens run over them.
//!
//! Each activation is broadcast once for both panels: with one, reading them would take as long as
//! the products do. Words are outermost in a block, so that as many sums as there are tokens and panels
//! grow side by side.

use super::mul_mat::{
    end, end_min, four, halves, load, neg128, store, unpack_iq4_xs, unpack_q4_k, unpack_q6_k,
    unpacked_min_sum,
};
use super::mul_mat_2_bit;
use super::mul_mat_32::{self, add_minimum};
use crate::cpu::fetch::fetch_blocks;
use crate::cpu::mul_mat::{Panel, Scratch, Unpacked};
use crate::mul_mat::activations::{GROUP, Group, Quants};
use crate::mul_mat::layout::{
    IQ4_XS_BLOCK, Q4_K_BLOCK, Q5_K_BLOCK, Q6_K_BLOCK, ROWS, VECTOR, panel_bytes, scales_step,
};
use crate::quant::WeightType;
use std::arch::x86_64::*;
use std::ops::Range;

/// Tokens of a register tile.
const TILE: usize = 8;

/// `P` neighbouring panels times the tokens they share.
///
/// # Safety
/// As `mul_mat::panel`; the panels have the same shape, type and tokens, which are `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) unsafe fn tile<const P: usize>(
    panels: &[Panel<'_>; P],
    x: &Quants,
    scratch: &mut Scratch,
) {
    let p = &panels[0];
    // SAFETY: Unpacked is plain numbers.
    let (acc, unpacked) = unsafe { scratch.parts::<P, [Unpacked; P]>(p.tokens.len()) };
    acc.fill([[0.0; ROWS]; P]);
    let block_len = p.ty.block_len();
    let n_blocks = p.n_cols / block_len;
    let skip = (P - 1) * panel_bytes(p.ty, p.n_cols).unwrap_or(0);
    // SAFETY: blocks and tokens stay within the panels and their groups.
    unsafe {
        for b in (0..n_blocks).step_by(256 / block_len) {
            let blocks = b..(b + 256 / block_len).min(n_blocks);
            // With few tokens a panel is through before memory has thought of the next.
            for p in panels {
                fetch_blocks(p, blocks.clone(), 0, skip);
            }
            for (p, unpacked) in panels.iter().zip(unpacked.iter_mut()) {
                unpack(p, blocks.clone(), unpacked);
            }
            for p in panels {
                fetch_blocks(p, blocks.clone(), 1, skip);
            }
            let mut t = p.tokens.start;
            while t < p.tokens.end {
                let in_group = t % GROUP;
                let left = (p.tokens.end - t).min(GROUP - in_group);
                let x = x.group(t / GROUP).at_token(in_group);
                let acc = &mut acc[t - p.tokens.start..];
                t += match left {
                    TILE.. => add::<TILE, P>(panels, blocks.clone(), x, unpacked, acc),
                    4.. => add::<4, P>(panels, blocks.clone(), x, unpacked, acc),
                    2.. => add::<2, P>(panels, blocks.clone(), x, unpacked, acc),
                    _ => add::<1, P>(panels, blocks.clone(), x, unpacked, acc),
                };
            }
        }
        store_all(panels, acc);
    }
}

/// Writes the panels' rows of all tokens. Each lands on lines of its own: ask for them ahead.
///
/// # Safety
/// The instruction set is available; `acc` has the panels' tokens, whose rows nobody else writes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_all<const P: usize>(panels: &[Panel<'_>; P], acc: &[[[f32; ROWS]; P]]) {
    const STORES_AHEAD: usize = 24;
    for (t, acc) in panels[0].tokens.clone().zip(acc) {
        for (p, acc) in panels.iter().zip(acc) {
            let ahead = p.out.wrapping_add((t + STORES_AHEAD) * p.stride);
            _mm_prefetch::<_MM_HINT_ET0>(ahead.cast());
            // SAFETY: passed on.
            unsafe { store(p, t, _mm512_loadu_ps(acc.as_ptr())) };
        }
    }
}

/// Unpacks `blocks` of a panel: eight of 32 columns, or one of 256.
///
/// # Safety
/// The instruction set is available; the panel has these blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn unpack(p: &Panel<'_>, blocks: Range<usize>, to: &mut Unpacked) {
    let b = blocks.start;
    // SAFETY: passed on.
    unsafe {
        match p.ty {
            WeightType::Q4_K => unpack_q4_k::<false>(p.bytes.add(b * Q4_K_BLOCK), to),
            WeightType::Q5_K => unpack_q4_k::<true>(p.bytes.add(b * Q5_K_BLOCK), to),
            WeightType::Q2_K => mul_mat_2_bit::unpack::<false>(p, b, to),
            WeightType::Q3_K => mul_mat_2_bit::unpack::<true>(p, b, to),
            WeightType::Q6_K => unpack_q6_k(p.bytes.add(b * Q6_K_BLOCK), p.scales(), b, to),
            WeightType::IQ4_XS => unpack_iq4_xs(p.bytes.add(b * IQ4_XS_BLOCK), p.scales(), b, to),
            _ => mul_mat_32::unpack::<128>(p, blocks, &mut to.words),
        }
    }
}

/// Adds `blocks`, which [`unpack`] has unpacked, for `T` tokens; returns `T`.
///
/// # Safety
/// As [`tile`]; the group has these tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn add<const T: usize, const P: usize>(
    panels: &[Panel<'_>; P],
    blocks: Range<usize>,
    x: Group,
    unpacked: &[Unpacked; P],
    acc: &mut [[[f32; ROWS]; P]],
) -> usize {
    let acc = acc.first_chunk_mut().expect("sums for every token");
    let b = blocks.start;
    let words = std::array::from_fn(|i| unpacked[i].words.as_ptr().cast());
    let in_place = std::array::from_fn(|i| panels[i].bytes.wrapping_add(b * 8 * VECTOR));
    let ty = panels[0].ty;
    // SAFETY: passed on.
    unsafe {
        match ty {
            WeightType::Q8_0 => dot_32::<T, P, true, false>(panels, in_place, blocks, x, acc),
            WeightType::Q2_K => dot_256::<T, P, 4, 8>(unpacked, b, x, acc),
            WeightType::Q4_K | WeightType::Q5_K => dot_256::<T, P, 8, 4>(unpacked, b, x, acc),
            WeightType::Q3_K | WeightType::Q6_K => dot_256::<T, P, 4, 0>(unpacked, b, x, acc),
            WeightType::IQ4_XS => dot_256::<T, P, 8, 0>(unpacked, b, x, acc),
            _ if ty.has_minima() => dot_32::<T, P, false, true>(panels, words, blocks, x, acc),
            _ => dot_32::<T, P, false, false>(panels, words, blocks, x, acc),
        }
    }
    T
}

/// Accumulates `blocks` of 32 columns for `T` tokens. `words` are those of the first of them: one
/// quant a byte, unsigned with zero at 128, `SIGNED` with zero at 0, or unsigned with `MINIMA`.
///
/// # Safety
/// `words` holds these blocks, `x` these tokens and blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn dot_32<const T: usize, const P: usize, const SIGNED: bool, const MINIMA: bool>(
    panels: &[Panel<'_>; P],
    words: [*const u8; P],
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[[f32; ROWS]; P]; T],
) {
    let zero = _mm512_set1_epi8(-128);
    let step = scales_step(panels[0].ty);
    let scales: [*const u8; P] = std::array::from_fn(|i| panels[i].scales());
    let mut words = words;
    // SAFETY: in bounds by the caller's promise.
    unsafe {
        for b in blocks {
            let mut sum = [[_mm512_setzero_si512(); P]; T];
            if !MINIMA {
                for t in 0..T {
                    sum[t] = [_mm512_set1_epi32(*x.neg128.add(b * x.width + t)); P];
                }
            }
            let q = x.q.add(b / 2 * x.width * 64 + b % 2 * 32);
            for j in 0..8 {
                let mut w = [zero; P];
                for i in 0..P {
                    w[i] = load(words[i], j);
                    if SIGNED {
                        w[i] = _mm512_xor_si512(w[i], zero);
                    }
                }
                for t in 0..T {
                    let q = four(q.add(64 * t + 4 * j));
                    for i in 0..P {
                        sum[t][i] = _mm512_dpbusd_epi32(sum[t][i], w[i], q);
                    }
                }
            }
            let mut d = [_mm512_setzero_ps(); P];
            let mut m = [_mm512_setzero_ps(); P];
            for i in 0..P {
                words[i] = words[i].wrapping_add(8 * VECTOR);
                d[i] = halves(scales[i].wrapping_add(b * step), 0);
                if MINIMA {
                    m[i] = halves(scales[i].wrapping_add(b * step), 1);
                }
            }
            for t in 0..T {
                let at = b * x.width + t;
                let dx = _mm512_set1_ps(*x.d.add(at));
                for i in 0..P {
                    let acc = &mut acc[t][i];
                    let mut a = end(_mm512_loadu_ps(acc.as_ptr()), sum[t][i], d[i], dx);
                    if MINIMA {
                        a = add_minimum(a, m[i], *x.dsum.add(at));
                    }
                    _mm512_storeu_ps(acc.as_mut_ptr(), a);
                }
            }
        }
    }
}

/// Adds unpacked block `b` of 256 columns for `T` tokens: sub-blocks of `WORDS` words with
/// `PAIRS` pairs of minima (Q2_K, Q4_K, Q5_K), or without and with zero at 32 (Q3_K, Q6_K) or, in
/// sub-blocks of 32 columns, at 128 (IQ4_XS).
///
/// # Safety
/// The instruction set must be there; `b` must be a block of the tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn dot_256<const T: usize, const P: usize, const WORDS: usize, const PAIRS: usize>(
    w: &[Unpacked; P],
    b: usize,
    x: Group,
    acc: &mut [[[f32; ROWS]; P]; T],
) {
    // SAFETY: the group has these tokens and this block.
    unsafe {
        let mut total = [[_mm512_setzero_si512(); P]; T];
        for s in 0..64 / WORDS {
            let first = s * WORDS;
            let q =
                x.q.add((4 * b + first / 16) * x.width * 64 + first % 16 * 4);
            let mut sum = [[_mm512_setzero_si512(); P]; T];
            for t in 0..T {
                let at = b * x.width + t;
                let start = match WORDS {
                    _ if PAIRS > 0 => _mm512_setzero_si512(),
                    4 => _mm512_set1_epi32(*x.neg32.add(16 * at + s)),
                    _ => neg128(x.sum32.add(8 * at + s)),
                };
                sum[t] = [start; P];
            }
            for j in 0..WORDS {
                let mut v = [_mm512_setzero_si512(); P];
                for i in 0..P {
                    v[i] = load(w[i].words[first + j].as_ptr(), 0);
                }
                for t in 0..T {
                    let q = four(q.add(64 * t + 4 * j));
                    for i in 0..P {
                        sum[t][i] = _mm512_dpbusd_epi32(sum[t][i], v[i], q);
                    }
                }
            }
            for i in 0..P {
                let scale = load(w[i].scales[s].as_ptr().cast(), 0);
                for t in 0..T {
                    let sum = _mm512_mullo_epi32(sum[t][i], scale);
                    total[t][i] = _mm512_add_epi32(total[t][i], sum);
                }
            }
        }
        for i in 0..P {
            let w = &w[i];
            let d = _mm512_loadu_ps(w.d[0].as_ptr());
            let dmin = _mm512_loadu_ps(w.dmin.as_ptr());
            for t in 0..T {
                let at = b * x.width + t;
                let dx = _mm512_set1_ps(*x.d.add(at));
                let acc = &mut acc[t][i];
                let mut a = end(_mm512_loadu_ps(acc.as_ptr()), total[t][i], d, dx);
                if PAIRS > 0 {
                    a = end_min(a, unpacked_min_sum::<PAIRS>(w, x, at), dmin, dx);
                }
                _mm512_storeu_ps(acc.as_mut_ptr(), a);
            }
        }
    }
}
