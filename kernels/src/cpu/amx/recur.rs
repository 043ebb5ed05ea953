//! The chunked form of `recur` with AMX tiles: products of BF16 with F32 sums.
//!
//! Each F32 operand is split into two BF16 numbers, which together hold 16 bits of it, and a
//! product is three: high x high, high x low, low x high. The error is that of operands rounded
//! to 2^-17; at a third of the tiles' speed it is still several times that of F32 vectors.

use super::CONFIG;
use crate::mul_mat::buffer::Buffer;
use crate::recur::Inputs;
use crate::recur::chunk::{self, Product};
use std::arch::asm;
use std::arch::x86_64::*;

/// Bytes of a tile: 16 rows of 64.
const TILE: usize = 1024;
/// Rows of `b`, and columns of `a`, that one tile covers.
const DEPTH: usize = 32;

/// The chunked form of one head; see [`chunk::chunked`].
///
/// # Safety
/// As [`crate::cpu::avx512::recur::recurrent`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(crate) unsafe fn chunked(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    // SAFETY: passed on; the buffers have the shapes that `Product` states. Tiles are configured
    // before and released after their use.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly));
        chunk::chunked(x, head, state, out, |shape, a, b, c, operands| {
            product(shape, a, b, c, operands);
        });
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// See [`Product`]; two tiles by two at a time.
///
/// # Safety
/// `a`, `b` and `c` must have the shapes it states, and tiles be configured.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn product(
    shape: &Product,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    operands: &mut Buffer,
) {
    let depth = shape.k / DEPTH;
    let (m, n) = (shape.m / 16, shape.n / 16);
    // Tile (i, d) of `a` is the pair number i * depth + d, tile (d, j) of `b` is j * depth + d.
    operands.reserve((m + n) * depth * 2 * TILE);
    let pa = operands.as_mut_ptr();
    let pb = pa.wrapping_add(m * depth * 2 * TILE);
    // SAFETY: tiles within the matrices and the room just made.
    unsafe {
        for i in 0..m {
            for d in 0..depth {
                let from = a.add(i * 16 * shape.lda + d * DEPTH);
                split_a(from, shape.lda, pa.add((i * depth + d) * 2 * TILE));
            }
        }
        for d in 0..depth {
            for j in 0..n {
                let from = b.add(d * DEPTH * shape.ldb + j * 16);
                split_b(from, shape.ldb, pb.add((j * depth + d) * 2 * TILE));
            }
        }
        for j in (0..n).step_by(2) {
            for i in (0..m).step_by(2) {
                let (pa, pb) = (pa.add(i * depth * 2 * TILE), pb.add(j * depth * 2 * TILE));
                let c = c.add(i * 16 * shape.ldc + j * 16);
                // The second row or column of tiles repeats the first where there is none.
                let right = if j + 1 < n { 1 } else { 0 };
                let below = if i + 1 < m { 1 } else { 0 };
                four_tiles(
                    depth,
                    [pa, pa.add(below * depth * 2 * TILE)],
                    [pb, pb.add(right * depth * 2 * TILE)],
                    [
                        c,
                        c.add(right * 16),
                        c.add(below * 16 * shape.ldc),
                        c.add(below * 16 * shape.ldc + right * 16),
                    ],
                    shape.ldc * 4,
                    shape.add,
                );
            }
        }
    }
}

/// `c[2 i + j] (+)= a[i] b[j]` over `depth` pairs of tiles each.
///
/// # Safety
/// The tiles must be there and configured, `depth` at least 1.
unsafe fn four_tiles(
    depth: usize,
    a: [*const u8; 2],
    b: [*const u8; 2],
    c: [*mut f32; 4],
    ldc_bytes: usize,
    add: bool,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jnz 2f",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "jmp 3f",
            "2:",
            "tileloadd tmm0, [{c0} + {ldc}*1]",
            "tileloadd tmm1, [{c1} + {ldc}*1]",
            "tileloadd tmm2, [{c2} + {ldc}*1]",
            "tileloadd tmm3, [{c3} + {ldc}*1]",
            "3:",
            "tileloadd tmm4, [{a0} + {line}*1]",
            "tileloadd tmm6, [{b0} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {line}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Low halves of b.
            "tileloadd tmm6, [{b0} + {line}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{b1} + {line}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            // Low halves of a.
            "tileloadd tmm6, [{b0} + {line}*1]",
            "tileloadd tmm4, [{a0} + {line}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a1} + {line}*1 + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{b1} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 2048",
            "add {a1}, 2048",
            "add {b0}, 2048",
            "add {b1}, 2048",
            "dec {depth}",
            "jnz 3b",
            "tilestored [{c0} + {ldc}*1], tmm0",
            "tilestored [{c1} + {ldc}*1], tmm1",
            "tilestored [{c2} + {ldc}*1], tmm2",
            "tilestored [{c3} + {ldc}*1], tmm3",
            add = in(reg) u64::from(add),
            depth = inout(reg) depth => _,
            a0 = inout(reg) a[0] => _, a1 = inout(reg) a[1] => _,
            b0 = inout(reg) b[0] => _, b1 = inout(reg) b[1] => _,
            c0 = in(reg) c[0], c1 = in(reg) c[1], c2 = in(reg) c[2], c3 = in(reg) c[3],
            ldc = in(reg) ldc_bytes,
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The two BF16 numbers of 16 F32: the nearest, as the upper halves of words, and the nearest to
/// what is left.
#[inline]
#[target_feature(enable = "avx512f")]
fn split(x: __m512) -> (__m512i, __m512i) {
    let half = _mm512_set1_epi32(0x8000);
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let high = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(high));
    (high, _mm512_add_epi32(_mm512_castps_si512(rest), half))
}

/// A tile of `a`: 16 rows of 32 numbers in order.
///
/// # Safety
/// Both must be there.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn split_a(from: *const f32, ld: usize, to: *mut u8) {
    // The upper half of each word of two vectors, in order.
    let order = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19,
        17, 15, 13, 11, 9, 7, 5, 3, 1,
    );
    for r in 0..16 {
        // SAFETY: row `r` of both.
        unsafe {
            let (h0, l0) = split(_mm512_loadu_ps(from.add(r * ld)));
            let (h1, l1) = split(_mm512_loadu_ps(from.add(r * ld + 16)));
            let to = to.add(r * 64);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(h0, order, h1));
            _mm512_storeu_si512(
                to.add(TILE).cast(),
                _mm512_permutex2var_epi16(l0, order, l1),
            );
        }
    }
}

/// A tile of `b`: 32 rows of 16 numbers, two neighbouring rows side by side.
///
/// # Safety
/// Both must be there.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn split_b(from: *const f32, ld: usize, to: *mut u8) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for r in 0..16 {
        // SAFETY: rows `2 r` and `2 r + 1` of `from`, row `r` of `to`.
        unsafe {
            let (h0, l0) = split(_mm512_loadu_ps(from.add(2 * r * ld)));
            let (h1, l1) = split(_mm512_loadu_ps(from.add((2 * r + 1) * ld)));
            let pair = |even, odd| {
                // (odd & upper) | (even >> 16)
                _mm512_ternarylogic_epi32::<0xec>(odd, _mm512_srli_epi32::<16>(even), upper)
            };
            let to = to.add(r * 64);
            _mm512_storeu_si512(to.cast(), pair(h0, h1));
            _mm512_storeu_si512(to.add(TILE).cast(), pair(l0, l1));
        }
    }
}
