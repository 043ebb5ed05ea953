//! `mul_mat` for many tokens with AMX tiles: 16 tokens times 16 rows times 64 columns at once.
//!
//! Types with a scale per 32 columns multiply tiles of 32 columns and finish each block in F32.
//! K types have integer scales inside their blocks of 256: here each quant is multiplied by its
//! scale first, which takes 14 bits, and split into two bytes, `128 * high + low`. Two products of
//! 64 columns then do what would be four or eight small ones, and a block is finished in F32
//! once. Sums are exact integers either way and the F32 operations are those of
//! `avx512::mul_mat`, so results are the same to the bit.

use crate::cpu::avx512;
use crate::cpu::avx512::mul_mat::{
    end, end_min, halves, load, put, store_all, unpack_iq4_xs, unpack_q4_k, unpack_q6_k,
    unpacked_min_sum,
};
use crate::cpu::avx512::mul_mat_2_bit;
use crate::cpu::avx512::mul_mat_32::{self, add_minimum};
use crate::cpu::mul_mat::{Panel, Scratch, Tokens, Unpacked};
use crate::mul_mat::activations::{GROUP, Group, Quants};
use crate::mul_mat::layout::{
    IQ4_XS_BLOCK, Q4_K_BLOCK, Q5_K_BLOCK, Q6_K_BLOCK, ROWS, VECTOR, scales_step,
};
use crate::quant::WeightType;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Fewest tokens of a group for which a whole tile beats AVX-512.
const MIN_TOKENS: usize = 6;

/// Results of one tile product: `[token][row]`.
type Sums = [[i32; ROWS]; GROUP];

/// Working memory of a thread.
#[repr(C, align(64))]
struct Work {
    /// Two sets, so that one can be written while the other is read.
    sums: [[Sums; 4]; 2],
    unpacked: Unpacked,
    /// `[64][16]` words of four signed bytes.
    low: [[u8; VECTOR]; 64],
    high: [[u8; VECTOR]; 64],
}

/// One panel times the unit's tokens.
///
/// # Safety
/// The instruction set is available; `p` describes live memory (see [`Panel`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
pub(crate) unsafe fn panel(p: &Panel<'_>, scratch: &mut Scratch) {
    let rest = p.tokens.len() % GROUP;
    let rest = if rest < MIN_TOKENS { rest } else { 0 };
    let split = p.tokens.end - rest;
    // SAFETY: passed on.
    unsafe {
        let Tokens::Quants(x) = p.x else {
            return avx512::mul_mat::panel(p, scratch);
        };
        if split > p.tokens.start {
            tiles(p, p.tokens.start..split, x, scratch);
        }
        if rest > 0 {
            let p = p.with_tokens(split..p.tokens.end);
            avx512::mul_mat::panel(&p, scratch);
        }
    }
}

/// Loads the tile shapes: products of 32 or of 64 columns.
unsafe fn configure(config: &super::TileConfig) {
    // SAFETY: the caller has AMX.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config, options(nostack, readonly)) }
}

/// Sets every tile's state to unused, so that a task switch need not save 8 KiB.
unsafe fn release() {
    // SAFETY: the caller has AMX.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn tiles(p: &Panel<'_>, tokens: Range<usize>, x: &Quants, scratch: &mut Scratch) {
    // SAFETY: Work is plain numbers.
    let (acc, work) = unsafe { scratch.parts::<1, Work>(tokens.len().next_multiple_of(GROUP)) };
    let acc = acc.as_flattened_mut();
    acc.fill([0.0; ROWS]);
    let block_len = p.ty.block_len();
    let n_blocks = p.n_cols / block_len;
    let groups = tokens.start / GROUP..tokens.end.div_ceil(GROUP);
    let acc = acc.as_chunks_mut::<GROUP>().0;
    // SAFETY: blocks and tokens stay within the panel and its groups.
    unsafe {
        if block_len == 32 {
            configure(&super::CONFIG_32);
            for b in (0..n_blocks).step_by(8) {
                let blocks = b..(b + 8).min(n_blocks);
                let words = if p.ty == WeightType::Q8_0 {
                    p.bytes
                } else {
                    mul_mat_32::unpack::<0>(p, blocks.clone(), &mut work.low);
                    work.low.as_ptr().cast::<u8>().wrapping_sub(b * 8 * VECTOR)
                };
                let groups = groups.clone();
                if p.ty.has_minima() {
                    blocks_of_32::<true>(p, words, blocks, groups, x, acc, &mut work.sums);
                } else {
                    blocks_of_32::<false>(p, words, blocks, groups, x, acc, &mut work.sums);
                }
            }
        } else {
            configure(&super::CONFIG);
            for b in 0..n_blocks {
                let unpacked = &mut work.unpacked;
                match p.ty {
                    WeightType::Q4_K => unpack_q4_k::<false>(p.bytes.add(b * Q4_K_BLOCK), unpacked),
                    WeightType::Q5_K => unpack_q4_k::<true>(p.bytes.add(b * Q5_K_BLOCK), unpacked),
                    WeightType::Q2_K => mul_mat_2_bit::unpack::<false>(p, b, unpacked),
                    WeightType::Q3_K => mul_mat_2_bit::unpack::<true>(p, b, unpacked),
                    WeightType::Q6_K => {
                        unpack_q6_k(p.bytes.add(b * Q6_K_BLOCK), p.scales(), b, unpacked);
                    }
                    _ => unpack_iq4_xs(p.bytes.add(b * IQ4_XS_BLOCK), p.scales(), b, unpacked),
                }
                match p.ty {
                    WeightType::Q2_K => split::<4, 0>(work),
                    WeightType::Q3_K | WeightType::Q6_K => split::<4, 32>(work),
                    WeightType::IQ4_XS => split::<8, 128>(work),
                    _ => split::<8, 0>(work),
                }
                let mut g = groups.start;
                let x_all = x;
                for pair in acc.chunks_mut(2) {
                    let x: [Group; 2] = std::array::from_fn(|i| x.group(g + i.min(pair.len() - 1)));
                    multiply_256(work, b, &x[..pair.len()]);
                    for next in g + 2..(g + 4).min(groups.end) {
                        fetch_group(&x_all.group(next), 256 * b..256 * (b + 1));
                    }
                    for (i, acc) in pair.iter_mut().enumerate() {
                        match p.ty.sub_minima() {
                            0 => finish_256::<0>(work, i, b, x[i], acc),
                            8 => finish_256::<4>(work, i, b, x[i], acc),
                            _ => finish_256::<8>(work, i, b, x[i], acc),
                        }
                    }
                    g += pair.len();
                }
            }
        }
        release();
        store_all(p, tokens, acc.as_flattened());
    }
}

/// Four blocks of 32 columns times a group: `sums[i]` is block `first + i`. The group is in
/// chunks of two blocks, `chunk` bytes apart.
#[inline]
unsafe fn multiply_32(q: *const i8, chunk: usize, words: *const u8, sums: *mut Sums) {
    // SAFETY: the caller has four blocks of columns and of words, starting at an even block.
    unsafe {
        asm!(
            "tileloadd tmm4, [{q} + {step}*1]",
            "tileloadd tmm6, [{words} + {step}*1]",
            "tilezero tmm0",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{q} + {step}*1 + 32]",
            "tileloadd tmm7, [{words} + {step}*1 + 512]",
            "tilezero tmm1",
            "tdpbssd tmm1, tmm5, tmm7",
            "tileloadd tmm4, [{next} + {step}*1]",
            "tileloadd tmm6, [{words} + {step}*1 + 1024]",
            "tilezero tmm2",
            "tdpbssd tmm2, tmm4, tmm6",
            "tileloadd tmm5, [{next} + {step}*1 + 32]",
            "tileloadd tmm7, [{words} + {step}*1 + 1536]",
            "tilezero tmm3",
            "tdpbssd tmm3, tmm5, tmm7",
            "tilestored [{sums} + {step}*1], tmm0",
            "tilestored [{sums} + {step}*1 + 1024], tmm1",
            "tilestored [{sums} + {step}*1 + 2048], tmm2",
            "tilestored [{sums} + {step}*1 + 3072], tmm3",
            q = in(reg) q,
            next = in(reg) q.add(chunk),
            words = in(reg) words,
            sums = in(reg) sums,
            step = in(reg) VECTOR,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// One block of 32 columns times a group, where fewer than four are left.
#[inline]
unsafe fn multiply_one_32(q: *const i8, words: *const u8, sums: *mut Sums) {
    // SAFETY: the caller has the block.
    unsafe {
        asm!(
            "tileloadd tmm4, [{q} + {step}*1]",
            "tileloadd tmm6, [{words} + {step}*1]",
            "tilezero tmm0",
            "tdpbssd tmm0, tmm4, tmm6",
            "tilestored [{sums} + {step}*1], tmm0",
            q = in(reg) q,
            words = in(reg) words,
            sums = in(reg) sums,
            step = in(reg) VECTOR,
            out("tmm0") _, out("tmm4") _, out("tmm6") _,
            options(nostack),
        );
    }
}

/// Up to four blocks of 32 columns, from the even block `first` on, times a group.
#[inline]
unsafe fn multiply_blocks(
    words: *const u8,
    first: usize,
    end: usize,
    x: &Group,
    sums: &mut [Sums; 4],
) {
    let chunk = x.width * 64;
    let sums = sums.as_mut_ptr();
    // SAFETY: the panel and the group have these blocks.
    unsafe {
        let q = x.q.add(first / 2 * chunk);
        let words = words.wrapping_add(first * 8 * VECTOR);
        if end - first >= 4 {
            return multiply_32(q, chunk, words, sums);
        }
        for i in 0..end - first {
            let q = q.add(i / 2 * chunk + i % 2 * 32);
            multiply_one_32(q, words.add(i * 8 * VECTOR), sums.add(i));
        }
    }
}

/// Adds the products of blocks `blocks` to a group's sums. In a group that is not `FULL` the
/// tokens it lacks get numbers that nobody reads.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn finish_32<const FULL: bool, const MINIMA: bool>(
    sums: &[Sums; 4],
    p: &Panel<'_>,
    blocks: Range<usize>,
    x: &Group,
    acc: &mut [__m512; GROUP],
) {
    for (b, sums) in blocks.zip(sums) {
        // SAFETY: the panel and the group have these blocks.
        unsafe {
            let scales = p.scales().wrapping_add(b * scales_step(p.ty));
            let d = halves(scales, 0);
            let m = if MINIMA {
                halves(scales, 1)
            } else {
                _mm512_setzero_ps()
            };
            for t in 0..GROUP {
                let sum = load(sums[t].as_ptr().cast(), 0);
                let at = b * x.width + if FULL { t } else { t.min(x.width - 1) };
                acc[t] = end(acc[t], sum, d, _mm512_set1_ps(*x.d.add(at)));
                if MINIMA {
                    acc[t] = add_minimum(acc[t], m, *x.dsum.add(at));
                }
            }
        }
    }
}

/// Adds up to eight blocks of 32 columns to all groups' sums. The next tiles are multiplied
/// before the last ones are finished: a product takes some hundred cycles to reach memory, and
/// the F32 arithmetic of another fills them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn blocks_of_32<const MINIMA: bool>(
    p: &Panel<'_>,
    words: *const u8,
    blocks: Range<usize>,
    groups: Range<usize>,
    x: &Quants,
    acc: &mut [[[f32; ROWS]; GROUP]],
    sums: &mut [[Sums; 4]; 2],
) {
    let middle = (blocks.start + 4).min(blocks.end);
    let [first, second] = sums;
    // SAFETY: the panel has these blocks and x these groups; a narrow group's tiles have rows of
    // other numbers, whose results are not used.
    unsafe {
        let mut now = x.group(groups.start);
        multiply_blocks(words, blocks.start, middle, &now, first);
        for (g, acc) in groups.clone().zip(acc) {
            multiply_blocks(words, middle, blocks.end, &now, second);
            let mut a: [__m512; GROUP] = std::array::from_fn(|t| _mm512_loadu_ps(acc[t].as_ptr()));
            let full = now.width == GROUP;
            if full {
                finish_32::<true, MINIMA>(first, p, blocks.start..middle, &now, &mut a);
            } else {
                finish_32::<false, MINIMA>(first, p, blocks.start..middle, &now, &mut a);
            }
            let before = now;
            if g + 1 < groups.end {
                now = x.group(g + 1);
                multiply_blocks(words, blocks.start, middle, &now, first);
            }
            if g + 2 < groups.end {
                fetch_group(&x.group(g + 2), 32 * blocks.start..32 * blocks.end);
            }
            if full {
                finish_32::<true, MINIMA>(second, p, middle..blocks.end, &before, &mut a);
            } else {
                finish_32::<false, MINIMA>(second, p, middle..blocks.end, &before, &mut a);
            }
            for (acc, a) in acc.iter_mut().zip(a) {
                _mm512_storeu_ps(acc.as_mut_ptr(), a);
            }
        }
    }
}

/// Asks for a group's bytes of these columns: its chunks are contiguous but far from those of the
/// group before, which no hardware prefetcher guesses.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn fetch_group(x: &Group, columns: Range<usize>) {
    let chunk = x.width * 64;
    for byte in (columns.start / 64 * chunk..columns.end.div_ceil(64) * chunk).step_by(VECTOR) {
        _mm_prefetch::<_MM_HINT_T0>(x.q.wrapping_add(byte));
    }
}

/// Multiplies the unpacked quants minus `ZERO` by their sub-blocks' scales and splits the
/// products, of at most 13 bits and a sign, into `128 * high + low`. `WORDS` make a sub-block.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn split<const WORDS: usize, const ZERO: i16>(work: &mut Work) {
    let even = _mm512_set1_epi16(0xFF);
    let seven = _mm512_set1_epi16(0x7F);
    let upper = _mm512_set1_epi16(0xFF00u16 as i16);
    let zero = _mm512_set1_epi16(ZERO);
    for s in 0..64 / WORDS {
        // SAFETY: whole arrays.
        let scale = unsafe { load(work.unpacked.scales[s].as_ptr().cast(), 0) };
        // Both 16-bit halves of a row's lane.
        let scale = _mm512_or_si512(
            _mm512_and_si512(scale, _mm512_set1_epi32(0xFFFF)),
            _mm512_slli_epi32(scale, 16),
        );
        for i in s * WORDS..(s + 1) * WORDS {
            // SAFETY: whole arrays.
            unsafe {
                let w = load(work.unpacked.words[i].as_ptr(), 0);
                let p = _mm512_sub_epi16(_mm512_and_si512(w, even), zero);
                let q = _mm512_sub_epi16(_mm512_srli_epi16(w, 8), zero);
                let p = _mm512_mullo_epi16(p, scale);
                let q = _mm512_mullo_epi16(q, scale);
                let low = _mm512_or_si512(
                    _mm512_and_si512(p, seven),
                    _mm512_slli_epi16(_mm512_and_si512(q, seven), 8),
                );
                // Bits 7..15 of each product, as they are in two's complement.
                let high = _mm512_or_si512(
                    _mm512_and_si512(_mm512_srli_epi16(p, 7), even),
                    _mm512_and_si512(_mm512_slli_epi16(q, 1), upper),
                );
                put(&mut work.low[i], low);
                put(&mut work.high[i], high);
            }
        }
    }
}

/// One or two groups times block `b` of 256 columns: `sums[2i]` low, `sums[2i + 1]` high.
unsafe fn multiply_256(work: &mut Work, b: usize, x: &[Group]) {
    let low = work.low.as_ptr();
    let high = work.high.as_ptr();
    let sums = (&raw mut work.sums).cast::<Sums>();
    // SAFETY: the groups have this block, the words are 256 columns.
    unsafe {
        let q0 = x[0].q.add(4 * b * x[0].width * 64);
        let chunk0 = x[0].width * 64;
        if let [_, second] = x {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{q0} + {step}*1]",
                "tileloadd tmm6, [{low} + {step}*1]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{high} + {step}*1]",
                "tdpbssd tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{q1} + {step}*1]",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "add {low}, 1024",
                "add {high}, 1024",
                "add {q0}, {chunk0}",
                "add {q1}, {chunk1}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{sums} + {step}*1], tmm0",
                "tilestored [{sums} + {step}*1 + 1024], tmm1",
                "tilestored [{sums} + {step}*1 + 2048], tmm2",
                "tilestored [{sums} + {step}*1 + 3072], tmm3",
                q0 = inout(reg) q0 => _,
                q1 = inout(reg) second.q.add(4 * b * second.width * 64) => _,
                chunk0 = in(reg) chunk0,
                chunk1 = in(reg) second.width * 64,
                low = inout(reg) low => _,
                high = inout(reg) high => _,
                n = inout(reg) 4usize => _,
                sums = in(reg) sums,
                step = in(reg) VECTOR,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{q0} + {step}*1]",
                "tileloadd tmm6, [{low} + {step}*1]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{high} + {step}*1]",
                "tdpbssd tmm1, tmm4, tmm7",
                "add {low}, 1024",
                "add {high}, 1024",
                "add {q0}, {chunk0}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{sums} + {step}*1], tmm0",
                "tilestored [{sums} + {step}*1 + 1024], tmm1",
                q0 = inout(reg) q0 => _,
                chunk0 = in(reg) chunk0,
                low = inout(reg) low => _,
                high = inout(reg) high => _,
                n = inout(reg) 4usize => _,
                sums = in(reg) sums,
                step = in(reg) VECTOR,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Adds group `i`'s products of block `b` to its sums, with `PAIRS` pairs of minima.
///
/// # Safety
/// The instruction set must be there; `b` must be a block of the group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn finish_256<const PAIRS: usize>(
    work: &Work,
    i: usize,
    b: usize,
    x: Group,
    acc: &mut [[f32; ROWS]; GROUP],
) {
    let w = &work.unpacked;
    // SAFETY: the group has this block and `width` tokens.
    unsafe {
        let d = _mm512_loadu_ps(w.d[0].as_ptr());
        let dmin = _mm512_loadu_ps(w.dmin.as_ptr());
        for (t, acc) in acc.iter_mut().enumerate().take(x.width) {
            let low = load(work.sums[0][2 * i][t].as_ptr().cast(), 0);
            let high = load(work.sums[0][2 * i + 1][t].as_ptr().cast(), 0);
            let sum = _mm512_add_epi32(low, _mm512_slli_epi32(high, 7));
            let at = b * x.width + t;
            let dx = _mm512_set1_ps(*x.d.add(at));
            let mut a = end(_mm512_loadu_ps(acc.as_ptr()), sum, d, dx);
            if PAIRS > 0 {
                a = end_min(a, unpacked_min_sum::<PAIRS>(w, x, at), dmin, dx);
            }
            _mm512_storeu_ps(acc.as_mut_ptr(), a);
        }
    }
}
