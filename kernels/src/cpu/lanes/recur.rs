//! `recur` in sixteen lanes of value dimensions: the recurrent form, and the matrix product of
//! the chunked form. Compiled for sets without a `recur` of their own, and for its test.

use super::LANES;
use crate::recur::chunk::{self, Product};
use crate::recur::{Inputs, Rule, further_scales, inverse_norm};

type Lanes = [f32; LANES];

/// The recurrent form of one head: sixteen columns of the state through all tokens, then the next.
///
/// # Safety
/// `state` must be a head's, `out` its first row; rows are `out_stride` apart.
pub(crate) unsafe fn recurrent(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let mut strip = vec![[0f32; LANES]; dim_k];
    for first in (0..dim_v).step_by(LANES) {
        let n = LANES.min(dim_v - first);
        for (to, from) in strip.iter_mut().zip(state.chunks_exact(dim_v)) {
            to[..n].copy_from_slice(&from[first..][..n]);
            to[n..].fill(0.0);
        }
        // SAFETY: passed on.
        unsafe { columns(x, head, first, n, &mut strip, out) }
        for (from, to) in strip.iter().zip(state.chunks_exact_mut(dim_v)) {
            to[first..][..n].copy_from_slice(&from[..n]);
        }
    }
}

/// Columns `first..first + n` through all tokens.
unsafe fn columns(
    x: &Inputs<'_>,
    head: usize,
    first: usize,
    n: usize,
    strip: &mut [Lanes],
    out: *mut f32,
) {
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let head_k = head / (x.n_head / x.n_head_k);
    let (further_k, further_q) = further_scales(x);
    let mut resets = x.resets;
    for t in 0..x.n_tokens {
        let q = &x.q[(t * x.n_head + head) * dim_k..][..dim_k];
        let k = &x.k[(t * x.n_head_k + head_k) * dim_k..][..dim_k];
        let mut write = [0f32; LANES];
        write[..n].copy_from_slice(&x.v[(t * x.n_head_k + head_k) * dim_v + first..][..n]);
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
            strip.fill([0.0; LANES]);
        }
        if x.rule != Rule::Ssd {
            let mut held = [[0f32; LANES]; 2];
            for (s, k) in strip.chunks(2).zip(k.chunks(2)) {
                for (held, (s, &k)) in held.iter_mut().zip(s.iter().zip(k)) {
                    for c in 0..LANES {
                        held[c] = k.mul_add(s[c], held[c]);
                    }
                }
            }
            for c in 0..LANES {
                write[c] -= (held[0][c] + held[1][c]) * (decay * scale_k);
            }
        }
        write = write.map(|w| w * (beta * scale_k));
        let mut sum = [0f32; LANES];
        for ((s, &k), &q) in strip.iter_mut().zip(k).zip(q) {
            for c in 0..LANES {
                s[c] = k.mul_add(write[c], s[c] * decay);
                sum[c] = q.mul_add(s[c], sum[c]);
            }
        }
        let sum = sum.map(|o| o * scale_q);
        // SAFETY: row `t` of this head's output, by the caller's promise.
        unsafe {
            let to = out.add(t * x.out_stride + first);
            to.copy_from_nonoverlapping(sum.as_ptr(), n);
        }
    }
}

/// The chunked form of one head; see [`chunk::chunked`].
///
/// # Safety
/// As [`recurrent`].
pub(crate) unsafe fn chunked(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    // SAFETY: passed on; the buffers have the shapes that `Product` states.
    unsafe {
        chunk::chunked(x, head, state, out, |shape, a, b, c| {
            product(shape, a, b, c);
        });
    }
}

/// See [`Product`]: 4 rows by 16 columns at a time.
///
/// # Safety
/// `a`, `b` and `c` must have the shapes it states.
unsafe fn product(shape: &Product, a: *const f32, b: *const f32, c: *mut f32) {
    for col in (0..shape.n).step_by(LANES) {
        for row in (0..shape.m).step_by(4) {
            let mut sum = [[0f32; LANES]; 4];
            // SAFETY: blocks within the matrices.
            unsafe {
                let (a, b) = (a.add(row * shape.lda), b.add(col));
                let c = c.add(row * shape.ldc + col);
                if shape.keep != 0.0 {
                    for (r, sum) in sum.iter_mut().enumerate() {
                        let c = *c.add(r * shape.ldc).cast::<Lanes>();
                        *sum = c.map(|c| c * shape.keep);
                    }
                }
                for i in 0..shape.depth(row + 4) {
                    let b = *b.add(i * shape.ldb).cast::<Lanes>();
                    for (r, sum) in sum.iter_mut().enumerate() {
                        let a = *a.add(r * shape.lda + i);
                        for j in 0..LANES {
                            sum[j] = a.mul_add(b[j], sum[j]);
                        }
                    }
                }
                for (r, sum) in sum.into_iter().enumerate() {
                    *c.add(r * shape.ldc).cast::<Lanes>() = sum;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::scalar;

    /// On x86-64 no instruction set uses these kernels; this is where they meet the oracle.
    #[test]
    fn agrees_with_scalar() {
        let noise = |n: usize, seed: usize| -> Vec<f32> {
            (0..n)
                .map(|i| ((i + seed) * 7919 % 2003) as f32 / 1001.0 - 1.0)
                .collect()
        };
        let (n_tokens, dim_k, dim_v) = (100, 40, 56);
        let (q, k) = (noise(n_tokens * 2 * dim_k, 1), noise(n_tokens * dim_k, 2));
        let v = noise(n_tokens * dim_v, 3);
        let g: Vec<f32> = noise(n_tokens * 2, 4)
            .iter()
            .map(|x| 0.1 * (x - 1.0))
            .collect();
        let beta: Vec<f32> = noise(n_tokens * 2, 5)
            .iter()
            .map(|x| 0.5 + 0.4 * x)
            .collect();
        for rule in [Rule::GatedDelta, Rule::Delta, Rule::Ssd] {
            let x = Inputs {
                rule,
                n_tokens,
                n_head: 2,
                n_head_k: 1,
                head_dim_k: dim_k,
                head_dim_v: dim_v,
                q: &q,
                k: &k,
                v: &v,
                g: &g,
                beta: &beta,
                resets: &[33, 64],
                out_stride: 2 * dim_v,
                ahead: None,
            };
            let run = |f: crate::recur::RunHead| {
                let mut state = noise(dim_k * dim_v, 6);
                let mut out = vec![0f32; n_tokens * 2 * dim_v];
                // SAFETY: head 1 of two; its rows end with the buffer.
                unsafe { f(&x, 1, &mut state, out[dim_v..].as_mut_ptr()) }
                (state, out)
            };
            let expected = run(scalar::recur::recur);
            for got in [run(recurrent), run(chunked)] {
                let all = expected.0.iter().chain(&expected.1);
                for (e, g) in all.zip(got.0.iter().chain(&got.1)) {
                    assert!((e - g).abs() < 1e-5, "{rule:?}: {g}, expected {e}");
                }
            }
        }
    }
}
