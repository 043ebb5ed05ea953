//! `recur` with 8 lanes of value dimensions: the recurrent form, and the matrix product of the
//! chunked form.

use crate::recur::chunk::{self, Product};
use crate::recur::{Inputs, Rule, further_scales, inverse_norm};
use std::arch::x86_64::*;

/// Vectors side by side in a strip of the state; with 128 key dimensions it is 8 KiB.
const STRIP: usize = 2;

/// The recurrent form of one head, strip by strip through all tokens. Columns that fill no strip
/// go through a copy padded with zeros.
///
/// # Safety
/// `state` must be a head's, `out` its first row; rows are `out_stride` apart.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn recurrent(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    const WIDTH: usize = 8 * STRIP;
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let mut strip = vec![0f32; dim_k * WIDTH];
    for first in (0..dim_v).step_by(WIDTH) {
        let n = WIDTH.min(dim_v - first);
        for (to, from) in strip.chunks_exact_mut(WIDTH).zip(state.chunks_exact(dim_v)) {
            to[..n].copy_from_slice(&from[first..][..n]);
            to[n..].fill(0.0);
        }
        // SAFETY: passed on.
        unsafe { columns(x, head, first, n, &mut strip, out) }
        for (from, to) in strip.chunks_exact(WIDTH).zip(state.chunks_exact_mut(dim_v)) {
            to[first..][..n].copy_from_slice(&from[..n]);
        }
    }
}

/// Columns `first..first + n` through all tokens; `strip` is `[dim_k][8 STRIP]`.
#[target_feature(enable = "avx2,fma")]
unsafe fn columns(
    x: &Inputs<'_>,
    head: usize,
    first: usize,
    n: usize,
    strip: &mut [f32],
    out: *mut f32,
) {
    const WIDTH: usize = 8 * STRIP;
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let head_k = head / (x.n_head / x.n_head_k);
    let (further_k, further_q) = further_scales(x);
    let zero = _mm256_setzero_ps();
    let mut resets = x.resets;
    for t in 0..x.n_tokens {
        let q = &x.q[(t * x.n_head + head) * dim_k..][..dim_k];
        let k = &x.k[(t * x.n_head_k + head_k) * dim_k..][..dim_k];
        let mut v = [0f32; WIDTH];
        v[..n].copy_from_slice(&x.v[(t * x.n_head_k + head_k) * dim_v + first..][..n]);
        let scale_k = inverse_norm(x.rule, k) * further_k;
        let scale_q = inverse_norm(x.rule, q) * further_q;
        let beta = x.beta[t * x.n_head + head];
        let decay = if x.rule == Rule::Delta {
            1.0
        } else {
            chunk::exp(x.g[t * x.n_head + head])
        };
        if resets.first() == Some(&t) {
            resets = &resets[1..];
            strip.fill(0.0);
        }
        let mut write = [zero; STRIP];
        // SAFETY: `strip` has `dim_k` rows of `WIDTH`, `v` one.
        unsafe {
            for j in 0..STRIP {
                write[j] = _mm256_loadu_ps(v.as_ptr().add(8 * j));
            }
            if x.rule != Rule::Ssd {
                let mut held = [[zero; STRIP]; 4];
                for i in (0..dim_k).step_by(4) {
                    for (u, held) in held.iter_mut().enumerate() {
                        if i + u >= dim_k {
                            break;
                        }
                        let k = _mm256_set1_ps(k[i + u]);
                        for j in 0..STRIP {
                            let s = _mm256_loadu_ps(strip.as_ptr().add((i + u) * WIDTH + 8 * j));
                            held[j] = _mm256_fmadd_ps(k, s, held[j]);
                        }
                    }
                }
                for j in 0..STRIP {
                    let a = _mm256_add_ps(held[0][j], held[1][j]);
                    let held = _mm256_add_ps(a, _mm256_add_ps(held[2][j], held[3][j]));
                    let factor = _mm256_set1_ps(decay * scale_k);
                    write[j] = _mm256_fnmadd_ps(held, factor, write[j]);
                }
            }
            let mut sum = [zero; STRIP];
            for j in 0..STRIP {
                write[j] = _mm256_mul_ps(write[j], _mm256_set1_ps(beta * scale_k));
            }
            let decay = _mm256_set1_ps(decay);
            for i in 0..dim_k {
                let (k, q) = (_mm256_set1_ps(k[i]), _mm256_set1_ps(q[i]));
                for j in 0..STRIP {
                    let at = strip.as_mut_ptr().add(i * WIDTH + 8 * j);
                    let s = _mm256_mul_ps(_mm256_loadu_ps(at), decay);
                    let s = _mm256_fmadd_ps(k, write[j], s);
                    _mm256_storeu_ps(at, s);
                    sum[j] = _mm256_fmadd_ps(q, s, sum[j]);
                }
            }
            for j in 0..STRIP {
                let o = _mm256_mul_ps(sum[j], _mm256_set1_ps(scale_q));
                _mm256_storeu_ps(v.as_mut_ptr().add(8 * j), o);
            }
            // Row `t` of this head's output, by the caller's promise.
            let to = out.add(t * x.out_stride + first);
            to.copy_from_nonoverlapping(v.as_ptr(), n);
        }
    }
}

/// The chunked form of one head; see [`chunk::chunked`].
///
/// # Safety
/// As [`recurrent`].
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn chunked(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    // SAFETY: passed on; the buffers have the shapes that `Product` states.
    unsafe {
        chunk::chunked(x, head, state, out, |shape, a, b, c| {
            product(shape, a, b, c);
        });
    }
}

/// See [`Product`]: 4 rows by 16 columns at a time in registers.
///
/// # Safety
/// `a`, `b` and `c` must have the shapes it states.
#[target_feature(enable = "avx2,fma")]
unsafe fn product(shape: &Product, a: *const f32, b: *const f32, c: *mut f32) {
    for col in (0..shape.n).step_by(16) {
        for row in (0..shape.m).step_by(4) {
            let mut sum = [[_mm256_setzero_ps(); 2]; 4];
            // SAFETY: blocks within the matrices.
            unsafe {
                let (a, b) = (a.add(row * shape.lda), b.add(col));
                let c = c.add(row * shape.ldc + col);
                if shape.keep != 0.0 {
                    let keep = _mm256_set1_ps(shape.keep);
                    for r in 0..4 {
                        for j in 0..2 {
                            let c = _mm256_loadu_ps(c.add(r * shape.ldc + 8 * j));
                            sum[r][j] = _mm256_mul_ps(c, keep);
                        }
                    }
                }
                for i in 0..shape.depth(row + 4) {
                    let b = b.add(i * shape.ldb);
                    let b = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
                    for r in 0..4 {
                        let a = _mm256_set1_ps(*a.add(r * shape.lda + i));
                        sum[r][0] = _mm256_fmadd_ps(a, b[0], sum[r][0]);
                        sum[r][1] = _mm256_fmadd_ps(a, b[1], sum[r][1]);
                    }
                }
                for r in 0..4 {
                    for j in 0..2 {
                        _mm256_storeu_ps(c.add(r * shape.ldc + 8 * j), sum[r][j]);
                    }
                }
            }
        }
    }
}
