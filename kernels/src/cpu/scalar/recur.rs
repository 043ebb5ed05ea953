//! `recur` token by token, with F64 sums; the state is rounded to F32 after each token, so that
//! carrying it from call to call changes nothing.

use crate::recur::{Inputs, Rule};

/// One head. `state` is `[head_dim_k, head_dim_v]`.
///
/// # Safety
/// Row `t` of the head's output must be at `t * out_stride` after `out`.
pub(crate) unsafe fn recur(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let head_k = head / (x.n_head / x.n_head_k);
    let mut error = vec![0f64; dim_v];
    for t in 0..x.n_tokens {
        if x.resets.binary_search(&t).is_ok() {
            state.fill(0.0);
        }
        let q = &x.q[(t * x.n_head + head) * dim_k..][..dim_k];
        let k = &x.k[(t * x.n_head_k + head_k) * dim_k..][..dim_k];
        let v = &x.v[(t * x.n_head_k + head_k) * dim_v..][..dim_v];
        let beta = f64::from(x.beta[t * x.n_head + head]);
        let decay = match x.rule {
            Rule::Delta => 1.0,
            Rule::GatedDelta | Rule::Ssd => f64::from(x.g[t * x.n_head + head]).exp(),
        };
        let scale_k = inverse_norm(x.rule, k);
        let scale_q = match x.rule {
            Rule::Ssd => inverse_norm(x.rule, q),
            Rule::GatedDelta | Rule::Delta => inverse_norm(x.rule, q) / (dim_k as f64).sqrt(),
        };
        error.fill(0.0);
        if x.rule != Rule::Ssd {
            for (row, &k) in state.chunks_exact(dim_v).zip(k) {
                for (error, &s) in error.iter_mut().zip(row) {
                    *error -= decay * f64::from(s) * (f64::from(k) * scale_k);
                }
            }
        }
        for (error, &v) in error.iter_mut().zip(v) {
            *error = beta * (f64::from(v) + *error);
        }
        for (row, &k) in state.chunks_exact_mut(dim_v).zip(k) {
            for (s, &error) in row.iter_mut().zip(&error) {
                *s = (decay * f64::from(*s) + f64::from(k) * scale_k * error) as f32;
            }
        }
        let mut sum = vec![0f64; dim_v];
        for (row, &q) in state.chunks_exact(dim_v).zip(q) {
            for (sum, &s) in sum.iter_mut().zip(row) {
                *sum += f64::from(s) * (f64::from(q) * scale_q);
            }
        }
        for (i, sum) in sum.into_iter().enumerate() {
            // SAFETY: within row `t`, by the caller's promise.
            unsafe { *out.add(t * x.out_stride + i) = sum as f32 }
        }
    }
}

fn inverse_norm(rule: Rule, z: &[f32]) -> f64 {
    let squares: f64 = z.iter().map(|&z| f64::from(z) * f64::from(z)).sum();
    match rule {
        Rule::Ssd => 1.0 / squares.sqrt().max(1e-12),
        Rule::GatedDelta | Rule::Delta => 1.0 / (squares + 1e-6).sqrt(),
    }
}
