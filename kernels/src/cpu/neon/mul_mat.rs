//! `mul_mat` with `sdot`: a panel's 16 rows in four vectors of four.

use crate::cpu::mul_mat::{Panel, Scratch, Tokens, Unpacked, by_chunks, column, halves};
use crate::mul_mat::activations::{self, Group, Parts, Place};
use crate::mul_mat::layout::{ROWS, VECTOR};
use crate::quant::{IQ4_VALUES, WeightType};
use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

/// Tokens of a register tile.
const TILE: usize = 4;
/// Rows of a vector, and vectors of a panel.
const LANES: usize = 4;

/// [`activations::quantize_row`]; NEON is part of every AArch64.
///
/// # Safety
/// As the function itself.
pub(crate) unsafe fn quantize_row(x: &[f32], at: &Place, parts: &Parts<'_>) {
    // SAFETY: passed on.
    unsafe { activations::quantize_row(x, at, parts) }
}

/// One panel times the unit's tokens.
///
/// # Safety
/// The processor has dot products; `p` describes live memory (see [`Panel`]).
pub(crate) unsafe fn panel(p: &Panel<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on; the tokens' kind is the type's (`Panel`).
    unsafe {
        match p.x {
            Tokens::F32(x) => float(p, x),
            Tokens::Quants(x) => by_chunks::<TILE>(p, x, scratch, tile, look_up, halves),
        }
    }
}

/// Places in IQ4_NL's table become its values.
///
/// # Safety
/// The instruction set is available.
unsafe fn look_up(words: &mut [[u8; VECTOR]]) {
    // SAFETY: 16 values; 16 of each vector's bytes at a time.
    unsafe {
        let values = vld1q_s8(IQ4_VALUES.as_ptr());
        for q in words.as_flattened_mut().chunks_exact_mut(16) {
            let places = vld1q_u8(q.as_ptr());
            vst1q_s8(q.as_mut_ptr().cast(), vqtbl1q_s8(values, places));
        }
    }
}

unsafe fn tile(
    ty: WeightType,
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[f32; ROWS]],
) {
    for (t, acc) in acc.iter_mut().enumerate() {
        // SAFETY: as `by_chunks` promises.
        unsafe {
            let x = x.at_token(t);
            match ty.block_len() {
                32 => dot32(ty, w, blocks.clone(), x, acc),
                _ => dot256(ty, w, blocks.start, x, acc),
            }
        }
    }
}

/// `sum` plus each lane's four products. Rust's intrinsic for it is not stable.
#[inline(always)]
unsafe fn dot4(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    // SAFETY: the caller's processor has dot products; registers only.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack),
        );
    }
    sum
}

/// Rows `4 * quarter..` of a vector of words. Quants of 4, 5 and 6 bits are small enough to be
/// signed bytes as they are.
#[inline(always)]
unsafe fn load(words: &[u8; VECTOR], quarter: usize) -> int8x16_t {
    // SAFETY: 16 of 64 bytes.
    unsafe { vld1q_s8(words.as_ptr().add(16 * quarter).cast()) }
}

/// Four neighbouring bytes in every lane.
#[inline(always)]
unsafe fn four(q: *const i8) -> int8x16_t {
    // SAFETY: the caller has these four bytes.
    unsafe { vreinterpretq_s8_s32(vdupq_n_s32(q.cast::<i32>().read_unaligned())) }
}

/// Adds a block: `sum * (weights' scale * activations' scale)`.
#[inline(always)]
unsafe fn end(acc: &mut [f32; ROWS], quarter: usize, sum: int32x4_t, d: &[f32; ROWS], dx: f32) {
    // SAFETY: four of sixteen numbers each.
    unsafe {
        let acc = acc.as_mut_ptr().add(LANES * quarter);
        let scale = vmulq_n_f32(vld1q_f32(d.as_ptr().add(LANES * quarter)), dx);
        vst1q_f32(acc, vfmaq_f32(vld1q_f32(acc), vcvtq_f32_s32(sum), scale));
    }
}

/// Adds a block's minimum: `m * (activations' scale * sum)`.
///
/// # Safety
/// The instruction set is available; `quarter` is below 4.
#[inline(always)]
unsafe fn add_minimum(acc: &mut [f32; ROWS], quarter: usize, m: &[f32; ROWS], dsum: f32) {
    // SAFETY: four of sixteen numbers each.
    unsafe {
        let acc = acc.as_mut_ptr().add(LANES * quarter);
        let m = vld1q_f32(m.as_ptr().add(LANES * quarter));
        vst1q_f32(acc, vfmaq_n_f32(vld1q_f32(acc), m, dsum));
    }
}

unsafe fn dot32(
    ty: WeightType,
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [f32; ROWS],
) {
    for (i, b) in blocks.enumerate() {
        for quarter in 0..ROWS / LANES {
            // SAFETY: as `by_chunks` promises.
            unsafe {
                let q = x.q.add(b / 2 * x.width * 64 + b % 2 * 32);
                let start = if ty == WeightType::Q4_0 {
                    *x.neg8.add(b * x.width)
                } else {
                    0
                };
                let mut sum = vdupq_n_s32(start);
                for j in 0..8 {
                    sum = dot4(sum, load(&w.words[8 * i + j], quarter), four(q.add(4 * j)));
                }
                end(acc, quarter, sum, &w.d[i], *x.d.add(b * x.width));
                if ty.has_minima() {
                    add_minimum(acc, quarter, &w.m[i], *x.dsum.add(b * x.width));
                }
            }
        }
    }
}

unsafe fn dot256(ty: WeightType, w: &Unpacked, b: usize, x: Group, acc: &mut [f32; ROWS]) {
    let minima = ty.has_minima();
    let zero_at_32 = matches!(ty, WeightType::Q3_K | WeightType::Q6_K);
    let words_per_sub = match ty {
        WeightType::Q2_K | WeightType::Q3_K | WeightType::Q6_K => 4,
        _ => 8,
    };
    for quarter in 0..ROWS / LANES {
        // SAFETY: as `by_chunks` promises.
        unsafe {
            let at = b * x.width;
            let mut total = vdupq_n_s32(0);
            for s in 0..64 / words_per_sub {
                let first = s * words_per_sub;
                let q =
                    x.q.add((4 * b + first / 16) * x.width * 64 + first % 16 * 4);
                let start = if zero_at_32 {
                    *x.neg32.add(16 * at + s)
                } else {
                    0
                };
                let mut sum = vdupq_n_s32(start);
                for j in 0..words_per_sub {
                    sum = dot4(sum, load(&w.words[first + j], quarter), four(q.add(4 * j)));
                }
                let scale = vld1q_s32(w.scales[s].as_ptr().add(LANES * quarter));
                total = vmlaq_s32(total, sum, scale);
            }
            let dx = *x.d.add(at);
            end(acc, quarter, total, &w.d[0], dx);
            if minima {
                let mut sum = [0i32; LANES];
                let n = ty.sub_minima();
                let sums = if n == 16 { x.sum16 } else { x.sum32 };
                for (r, sum) in sum.iter_mut().enumerate() {
                    for s in 0..n {
                        let min = w.mins[s / 2][2 * (LANES * quarter + r) + s % 2];
                        *sum -= i32::from(min) * i32::from(*sums.add(n * at + s));
                    }
                }
                end(acc, quarter, vld1q_s32(sum.as_ptr()), &w.dmin, dx);
            }
        }
    }
}

unsafe fn float(p: &Panel<'_>, x: &[f32]) {
    for t in p.tokens.clone() {
        let x = &x[t * p.n_cols..(t + 1) * p.n_cols];
        // Sums of even and of odd columns.
        let mut sums = [[0.0f32; ROWS]; 2];
        for (k, &x) in x.iter().enumerate() {
            // SAFETY: columns below n_cols.
            let w = unsafe { column(p.ty, p.bytes, k) };
            for (sum, w) in sums[k % 2].iter_mut().zip(w) {
                *sum = w.mul_add(x, *sum);
            }
        }
        for r in 0..p.rows {
            // SAFETY: the panel's own rows of this token.
            unsafe { *p.out.add(t * p.stride + r) = sums[0][r] + sums[1][r] };
        }
    }
}
