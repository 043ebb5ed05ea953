//! `mul_mat` of types with blocks of 32 and VNNI dot products; `mul_mat` calls these forms.
//!
//! The types differ in how a block's bytes become one quant a byte, where their zero is, and whether
//! there is a minimum; `dot32` is the same for all. What [`unpack`] makes of them `mul_mat_tile` takes.

use super::mul_mat::{end, fifth_bits, four, halves, load, put};
use crate::cpu::fetch::{fetch, fetch_scales};
use crate::cpu::mul_mat::Panel;
use crate::mul_mat::activations::Group;
use crate::mul_mat::layout::{
    Q4_1_BLOCK, Q5_0_BLOCK, Q5_0_HIGH, Q5_1_BLOCK, ROWS, VECTOR, panel_bytes, scales_step,
};
use crate::quant::{IQ4_VALUES, WeightType};
use std::arch::x86_64::*;
use std::ops::Range;

/// Which words [`dot32`] finds in a panel.
#[repr(u8)]
enum Words {
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Iq4Nl,
}
const Q8_0: u8 = Words::Q8_0 as u8;
const Q4_0: u8 = Words::Q4_0 as u8;
const Q4_1: u8 = Words::Q4_1 as u8;
const Q5_0: u8 = Words::Q5_0 as u8;
const Q5_1: u8 = Words::Q5_1 as u8;
const IQ4_NL: u8 = Words::Iq4Nl as u8;

/// Bytes of a block of such words.
const fn block_bytes(words: u8) -> usize {
    match words {
        Q4_0 | IQ4_NL => 4 * VECTOR,
        Q4_1 => Q4_1_BLOCK,
        Q5_0 => Q5_0_BLOCK,
        Q5_1 => Q5_1_BLOCK,
        _ => 8 * VECTOR,
    }
}

const fn has_minima(words: u8) -> bool {
    matches!(words, Q4_1 | Q5_1)
}

/// Where [`dot32`] finds block 0 of a panel, and what is behind it.
#[derive(Clone, Copy)]
struct Source {
    words: *const u8,
    /// F16 scales of a block (then its minima), and bytes to the next block's.
    scales: *const u8,
    step: usize,
    /// From one panel to the next.
    panel_bytes: usize,
}

impl Source {
    fn of(p: &Panel<'_>) -> Source {
        Source {
            words: p.bytes,
            scales: p.scales(),
            step: scales_step(p.ty),
            panel_bytes: panel_bytes(p.ty, p.n_cols).unwrap_or(0),
        }
    }
}

/// All blocks of a panel for `T` tokens, unpacked in registers.
///
/// # Safety
/// The instruction set is available; the panel has blocks of 32, the group `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(super) unsafe fn vector<const T: usize>(p: &Panel<'_>, x: Group, acc: &mut [__m512; T]) {
    let (from, blocks) = (Source::of(p), 0..p.n_cols / 32);
    // SAFETY: passed on.
    unsafe {
        match p.ty {
            WeightType::Q8_0 => dot32::<T, Q8_0>(from, blocks, x, acc),
            WeightType::Q4_0 => dot32::<T, Q4_0>(from, blocks, x, acc),
            WeightType::Q4_1 => dot32::<T, Q4_1>(from, blocks, x, acc),
            WeightType::Q5_0 => dot32::<T, Q5_0>(from, blocks, x, acc),
            WeightType::Q5_1 => dot32::<T, Q5_1>(from, blocks, x, acc),
            _ => dot32::<T, IQ4_NL>(from, blocks, x, acc),
        }
    }
}

/// Four vectors of Q4_0's words as eight of one quant a byte.
///
/// # Safety
/// `words` holds four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn nibbles(words: *const u8) -> [__m512i; 8] {
    let low = _mm512_set1_epi8(15);
    std::array::from_fn(|j| {
        // SAFETY: four vectors by the caller's promise.
        let v = unsafe { load(words, j % 4) };
        let v = if j < 4 { v } else { _mm512_srli_epi16(v, 4) };
        _mm512_and_si512(v, low)
    })
}

/// IQ4_NL's values plus 128.
const VALUES: [u8; 16] = {
    let mut values = [0; 16];
    let mut i = 0;
    while i < 16 {
        values[i] = (IQ4_VALUES[i] as u8).wrapping_add(128);
        i += 1;
    }
    values
};

/// Four vectors of Q4_0's words, places in IQ4_NL's table, as eight of bytes with zero at 128.
///
/// # Safety
/// `words` holds four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn iq4_quants(words: *const u8) -> [__m512i; 8] {
    // SAFETY: 16 values; four vectors by the caller's promise.
    unsafe {
        let values = _mm512_broadcast_i32x4(_mm_loadu_si128(VALUES.as_ptr().cast()));
        let places = nibbles(words);
        std::array::from_fn(|j| _mm512_shuffle_epi8(values, places[j]))
    }
}

/// The block of words at `words`, one unsigned quant a byte.
///
/// # Safety
/// `words` is a whole block of that type.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn quants<const WORDS: u8>(words: *const u8) -> [__m512i; 8] {
    // SAFETY: a whole block by the caller's promise.
    unsafe {
        match WORDS {
            Q8_0 => {
                let zero = _mm512_set1_epi8(-128);
                std::array::from_fn(|j| _mm512_xor_si512(load(words, j), zero))
            }
            Q5_0 | Q5_1 => {
                let (low, high) = (nibbles(words), load(words.add(Q5_0_HIGH), 0));
                std::array::from_fn(|j| _mm512_or_si512(low[j], fifth_bits(high, j)))
            }
            IQ4_NL => iq4_quants(words),
            _ => nibbles(words),
        }
    }
}

/// Accumulates `blocks` of 32 columns for `T` tokens. What comes next is asked for, in the next
/// panel too.
///
/// # Safety
/// `from` holds these blocks, `x` these tokens and blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn dot32<const T: usize, const WORDS: u8>(
    from: Source,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [__m512; T],
) {
    let block = block_bytes(WORDS);
    let scales_inside = has_minima(WORDS);
    // SAFETY: in bounds by the caller's promise.
    unsafe {
        let n = blocks.end;
        for b in blocks {
            if scales_inside {
                fetch(from.words.wrapping_add(b * block), block / VECTOR);
            } else {
                fetch_scales(from.scales, b, 16, n, from.panel_bytes);
                // Whole panels are asked for in order, scales at their ends included.
                fetch(
                    from.words.wrapping_add(b * (block + 2 * ROWS)),
                    block / VECTOR + 1,
                );
            }
            let w = quants::<WORDS>(from.words.wrapping_add(b * block));
            let scales = from.scales.wrapping_add(b * from.step);
            let d = halves(scales, 0);
            let m = if has_minima(WORDS) {
                halves(scales, 1)
            } else {
                _mm512_setzero_ps()
            };
            let q = x.q.add(b / 2 * x.width * 64 + b % 2 * 32);
            for t in 0..T {
                let at = b * x.width + t;
                let mut sum = match WORDS {
                    Q4_0 => _mm512_set1_epi32(*x.neg8.add(at)),
                    Q5_0 => _mm512_set1_epi32(2 * *x.neg8.add(at)),
                    _ if has_minima(WORDS) => _mm512_setzero_si512(),
                    _ => _mm512_set1_epi32(*x.neg128.add(at)),
                };
                for j in 0..8 {
                    sum = _mm512_dpbusd_epi32(sum, w[j], four(q.add(64 * t + 4 * j)));
                }
                acc[t] = end(acc[t], sum, d, _mm512_set1_ps(*x.d.add(at)));
                if has_minima(WORDS) {
                    acc[t] = add_minimum(acc[t], m, *x.dsum.add(at));
                }
            }
        }
    }
}

/// Adds a block's minimum: `m * (activations' scale * sum)`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::cpu) fn add_minimum(acc: __m512, m: __m512, dsum: f32) -> __m512 {
    _mm512_fmadd_ps(m, _mm512_set1_ps(dsum), acc)
}

/// Blocks of a panel as bytes with zero at `ZERO` (modulo 256), or as they are where there are
/// minima. Q8_0 needs no unpacking.
///
/// # Safety
/// The instruction set is available; the panel has these blocks, at most eight.
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::cpu) unsafe fn unpack<const ZERO: i32>(
    p: &Panel<'_>,
    blocks: Range<usize>,
    to: &mut [[u8; VECTOR]; 64],
) {
    // SAFETY: passed on.
    unsafe {
        match p.ty {
            WeightType::Q8_0 => {}
            WeightType::Q4_0 => unpack_words::<Q4_0>(p.bytes, blocks, ZERO - 8, to),
            WeightType::Q5_0 => unpack_words::<Q5_0>(p.bytes, blocks, ZERO - 16, to),
            WeightType::Q4_1 => unpack_words::<Q4_1>(p.bytes, blocks, 0, to),
            WeightType::Q5_1 => unpack_words::<Q5_1>(p.bytes, blocks, 0, to),
            _ => unpack_words::<IQ4_NL>(p.bytes, blocks, ZERO - 128, to),
        }
    }
}

/// The quants of blocks, each byte plus `up` (modulo 256).
///
/// # Safety
/// `bytes` is a panel that has these blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack_words<const WORDS: u8>(
    bytes: *const u8,
    blocks: Range<usize>,
    up: i32,
    to: &mut [[u8; VECTOR]; 64],
) {
    let up = _mm512_set1_epi8(up as i8);
    for (b, to) in blocks.zip(to.as_chunks_mut::<8>().0) {
        // SAFETY: the panel has these blocks.
        let w = unsafe { quants::<WORDS>(bytes.add(b * block_bytes(WORDS))) };
        for (to, w) in to.iter_mut().zip(w) {
            // SAFETY: a whole vector.
            unsafe { put(to, _mm512_add_epi8(w, up)) };
        }
    }
}
