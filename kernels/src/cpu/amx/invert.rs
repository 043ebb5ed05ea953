//! The inverse of a chunk's triangular matrix, in vectors.

use crate::recur::CHUNK;
use std::arch::x86_64::*;

/// Rows and columns of a block.
const BLOCK: usize = 16;

/// `t = (I + l)^-1` for strictly lower triangular `l`: blocks on the diagonal row by row, those
/// below from `T_ab = -T_aa sum_c L_ac T_cb`. What is above the diagonal stays zero.
///
/// # Safety
/// The instruction set must be there.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn invert(blocks: usize, l: &[f32; CHUNK * CHUNK], t: &mut [f32; CHUNK * CHUNK]) {
    let (l, t) = (l.as_ptr(), t.as_mut_ptr());
    // SAFETY: rows and blocks of 64 x 64 numbers.
    unsafe {
        for i in 0..BLOCK {
            // The diagonal blocks side by side: each row waits for the one before.
            for block in 0..blocks {
                let first = block * BLOCK * (CHUNK + 1);
                let (l, t) = (l.add(first + i * CHUNK), t.add(first));
                let mut sums = [_mm512_setzero_ps(); 2];
                for j in 0..i {
                    let row = _mm512_load_ps(t.add(j * CHUNK));
                    sums[j % 2] = _mm512_fnmadd_ps(_mm512_set1_ps(*l.add(j)), row, sums[j % 2]);
                }
                let one = _mm512_maskz_mov_ps(1 << i, _mm512_set1_ps(1.0));
                let sum = _mm512_add_ps(sums[0], _mm512_add_ps(sums[1], one));
                _mm512_store_ps(t.add(i * CHUNK), sum);
            }
        }
        let mut product = [0f32; BLOCK * BLOCK];
        for a in 1..blocks {
            for b in (0..a).rev() {
                let mut sum = [_mm512_setzero_ps(); BLOCK];
                for c in b..a {
                    let l = l.add(a * BLOCK * CHUNK + c * BLOCK);
                    let t = t.add(c * BLOCK * CHUNK + b * BLOCK);
                    add_product(&mut sum, l, CHUNK, t, CHUNK);
                }
                for (r, sum) in sum.iter().enumerate() {
                    let minus = _mm512_sub_ps(_mm512_setzero_ps(), *sum);
                    _mm512_storeu_ps(product.as_mut_ptr().add(r * BLOCK), minus);
                }
                let mut sum = [_mm512_setzero_ps(); BLOCK];
                let own = t.add(a * BLOCK * (CHUNK + 1));
                add_product(&mut sum, own, CHUNK, product.as_ptr(), BLOCK);
                for (r, sum) in sum.iter().enumerate() {
                    _mm512_store_ps(t.add((a * BLOCK + r) * CHUNK + b * BLOCK), *sum);
                }
            }
        }
    }
}

/// `sum += a b` for blocks of 16 x 16.
///
/// # Safety
/// The instruction set must be there; pointers must reach over their blocks.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_product(
    sum: &mut [__m512; BLOCK],
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
) {
    for k in 0..BLOCK {
        // SAFETY: row `k` of `b`, column `k` of `a`.
        unsafe {
            let b = _mm512_loadu_ps(b.add(k * ldb));
            for r in 0..BLOCK {
                sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(*a.add(r * lda + k)), b, sum[r]);
            }
        }
    }
}
