//! F32 numbers as pairs of BF16, and products of tiles of them with F32 sums.
//!
//! A number is split into the nearest BF16 and the nearest BF16 to what is left: 16 bits of it. A
//! product is three: high x high, high x low, low x high. Its error is that of operands rounded to
//! 2^-17; at a third of the tiles' speed it is still several times that of F32 vectors.
//!
//! An *operand* is a grid of tile pairs (high, then low, [`TILE`] bytes each). Left operands have 16
//! rows of 32 numbers in order per tile; right operands 32 rows of 16, of which each two neighbours
//! lie side by side. Along the sum, tile pairs follow each other; the other index counts whole sums.

use std::arch::asm;
use std::arch::x86_64::*;

/// Bytes of a tile: 16 rows of 64.
pub(crate) const TILE: usize = 1024;
/// Bytes of a tile pair.
pub(crate) const PAIR: usize = 2 * TILE;
/// Terms of a sum that one tile covers.
pub(crate) const DEPTH: usize = 32;

/// `c[2 i + j] (+)= a[i] b[j]` over `depth` tile pairs each.
///
/// # Safety
/// The tiles must be there and configured, `depth` at least 1; rows of `c` are `ldc_bytes` apart.
pub(crate) unsafe fn four_tiles(
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

/// Writes a row of a left tile pair: 32 numbers in order.
///
/// # Safety
/// `to` is the row in the high tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn left_row(x: [__m512; 2], to: *mut u8) {
    // The upper half of each word of two vectors, in order.
    let order = _mm512_set_epi16(
        63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19,
        17, 15, 13, 11, 9, 7, 5, 3, 1,
    );
    let ((h0, l0), (h1, l1)) = (split(x[0]), split(x[1]));
    // SAFETY: by the caller's promise.
    unsafe {
        let high = _mm512_permutex2var_epi16(h0, order, h1);
        let low = _mm512_permutex2var_epi16(l0, order, l1);
        _mm512_store_si512(to.cast(), high);
        _mm512_store_si512(to.add(TILE).cast(), low);
    }
}

/// Writes a row of a right tile pair: 16 numbers of two neighbouring rows.
///
/// # Safety
/// `to` is the row in the high tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn right_row(even: __m512, odd: __m512, to: *mut u8) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    // (odd & upper) | (even >> 16)
    let side_by_side =
        |even, odd| _mm512_ternarylogic_epi32::<0xec>(odd, _mm512_srli_epi32::<16>(even), upper);
    let ((h0, l0), (h1, l1)) = (split(even), split(odd));
    // SAFETY: by the caller's promise.
    unsafe {
        _mm512_store_si512(to.cast(), side_by_side(h0, h1));
        _mm512_store_si512(to.add(TILE).cast(), side_by_side(l0, l1));
    }
}

/// A left tile becomes the right tile of its transpose, or the other way round: words, each two
/// neighbours of the sum, change places across the diagonal.
///
/// # Safety
/// Both are tiles (of a pair: call it for each).
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn transpose(from: *const u8, to: *mut u8) {
    // SAFETY: 16 rows of 64 bytes each.
    unsafe {
        // Words of rows r, r + 4, r + 8 and r + 12, one row in each lane of 128 bits.
        let quarter = |r: usize, c: usize| {
            let at = |i: usize| from.add((r + 4 * i) * 64 + c * 16).cast::<__m128i>();
            let x = _mm512_castsi128_si512(_mm_load_si128(at(0)));
            let x = _mm512_inserti32x4::<1>(x, _mm_load_si128(at(1)));
            let x = _mm512_inserti32x4::<2>(x, _mm_load_si128(at(2)));
            _mm512_inserti32x4::<3>(x, _mm_load_si128(at(3)))
        };
        // Words 4 c.. of four rows in each lane: four rows of the outcome, in order.
        for c in 0..4 {
            let x = [quarter(0, c), quarter(1, c), quarter(2, c), quarter(3, c)];
            let a = _mm512_unpacklo_epi32(x[0], x[1]);
            let b = _mm512_unpackhi_epi32(x[0], x[1]);
            let d = _mm512_unpacklo_epi32(x[2], x[3]);
            let e = _mm512_unpackhi_epi32(x[2], x[3]);
            let rows = [
                _mm512_unpacklo_epi64(a, d),
                _mm512_unpackhi_epi64(a, d),
                _mm512_unpacklo_epi64(b, e),
                _mm512_unpackhi_epi64(b, e),
            ];
            for (j, row) in rows.into_iter().enumerate() {
                _mm512_store_si512(to.add((4 * c + j) * 64).cast(), row);
            }
        }
    }
}
