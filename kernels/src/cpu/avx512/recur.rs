//! `recur` with 16 lanes of value dimensions: the recurrent form in one pass over the state from
//! memory, and the matrix product of the chunked form.

use crate::recur::chunk::{self, Product};
use crate::recur::strips::{self, Factors, Part, Rows, Widths};
use crate::recur::{Inputs, Rule};
use std::arch::x86_64::*;

/// Vectors side by side in a strip of the state: with 128 key dimensions a strip is 32 KiB, which
/// the L1 cache holds over all tokens of a call.
const STRIP: usize = 4;
/// The same for larger heads.
const NARROW_STRIP: usize = 2;
/// The same for a few tokens: most of the time goes into fetching the state, in whole rows.
const WIDE_STRIP: usize = 8;
/// The recurrent form of one head. Each strip of the state goes through many tokens before the
/// next: in decode it comes from memory once a call. `S^T k` is summed in two parts, over even and
/// odd key dimensions, so that sums are the same for any number of tokens.
///
/// # Safety
/// `state` must be a head's, `out` its first row; rows are `out_stride` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(crate) unsafe fn recurrent(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    let widths = Widths {
        many: 16 * STRIP,
        many_large: 16 * NARROW_STRIP,
        few: 16 * WIDE_STRIP,
    };
    // SAFETY: passed on.
    unsafe {
        strips::recurrent(x, head, state, out, &widths, |part, start, factors| {
            columns(x, head, part, start, factors);
        });
    }
}

/// One strip through the tokens from `start` on, one for each of the factors.
///
/// # Safety
/// The instruction set must be there; the strip must lie within the head's state and output.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn columns(x: &Inputs<'_>, head: usize, part: &Part, start: usize, factors: &[Factors]) {
    // SAFETY: passed on.
    unsafe {
        match part.n {
            1..16 => strip::<1, true>(x, head, part, start, factors),
            16 => strip::<1, false>(x, head, part, start, factors),
            17..32 => strip::<2, true>(x, head, part, start, factors),
            32 => strip::<2, false>(x, head, part, start, factors),
            33..48 => strip::<3, true>(x, head, part, start, factors),
            48 => strip::<3, false>(x, head, part, start, factors),
            49..64 => strip::<4, true>(x, head, part, start, factors),
            64 => strip::<4, false>(x, head, part, start, factors),
            65..128 => {
                // Fewer kernels: the first half is whole, the rest a strip of its own.
                let (left, right) = part.split(16 * STRIP);
                columns(x, head, &left, start, factors);
                columns(x, head, &right, start, factors);
            }
            _ => strip::<WIDE_STRIP, false>(x, head, part, start, factors),
        }
    }
}

/// [`columns`] in `N` vectors; with `CUT` the last one is partly beyond the strip.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn strip<const N: usize, const CUT: bool>(
    x: &Inputs<'_>,
    head: usize,
    part: &Part,
    start: usize,
    factors: &[Factors],
) {
    let dim_k = x.head_dim_k;
    let &Part {
        first,
        n,
        state,
        ld,
        out,
        ld_out,
    } = part;
    let last = if CUT {
        (1u16 << (n % 16)) - 1
    } else {
        u16::MAX
    };
    let mask = |j: usize| if CUT && j == N - 1 { last } else { u16::MAX };
    let zero = _mm512_setzero_ps();
    let resets = &x.resets[x.resets.partition_point(|&r| r < start)..];
    let mut resets = resets.iter().copied().peekable();
    let rows = Rows::new(x, head, first);
    let q = |t: usize| rows.q(t).as_ptr();
    let k = |t: usize| rows.k(t).as_ptr();
    let end = start + factors.len();
    // `S^T k` of the next token, over even and odd key dimensions, where the last pass has made it.
    let mut held = None;
    let mut t = start;
    while t < end {
        x.ask();
        let fresh = resets.next_if_eq(&t).is_some();
        let token = &factors[t - start];
        let next = t + 1;
        let goes_on = N <= STRIP && next < end && resets.peek() != Some(&next);
        // SAFETY: `dim_k` rows of `dim_v` numbers of state, of which `16 N` from `first` on, the
        // last vector masked where it passes the end; likewise one row of `v` and `out`.
        unsafe {
            let row_of_v =
                |t: usize, j: usize| _mm512_maskz_loadu_ps(mask(j), rows.v(t).add(j * 16));
            if fresh {
                // Zeros, not a factor of zero: the old state may hold anything.
                for i in 0..dim_k {
                    for j in 0..N {
                        _mm512_mask_storeu_ps(state.add(i * ld + j * 16), mask(j), zero);
                    }
                }
            }
            let decay_t = if fresh { 0.0 } else { token.decay };
            let mut write = [zero; N];
            if x.rule == Rule::Ssd {
                for j in 0..N {
                    let strength = _mm512_set1_ps(token.beta * token.k);
                    write[j] = _mm512_mul_ps(row_of_v(t, j), strength);
                }
            } else {
                let held = held.take().unwrap_or_else(|| {
                    let mut held = [[zero; N]; 2];
                    let k = k(t);
                    for i in (0..dim_k).step_by(2) {
                        // Indices known here keep the sums in registers.
                        for (u, held) in held.iter_mut().enumerate() {
                            if i + u == dim_k {
                                break;
                            }
                            let row = state.add((i + u) * ld);
                            if t == start {
                                prefetch::<N>(row.wrapping_add(8 * ld));
                            }
                            let k = _mm512_set1_ps(*k.add(i + u));
                            for j in 0..N {
                                let s = _mm512_maskz_loadu_ps(mask(j), row.add(j * 16));
                                held[j] = _mm512_fmadd_ps(k, s, held[j]);
                            }
                        }
                    }
                    held
                });
                for j in 0..N {
                    let held = _mm512_add_ps(held[0][j], held[1][j]);
                    let held = _mm512_mul_ps(held, _mm512_set1_ps(decay_t * token.k));
                    let error = _mm512_sub_ps(row_of_v(t, j), held);
                    write[j] = _mm512_mul_ps(error, _mm512_set1_ps(token.beta * token.k));
                }
            }
            let put = |t: usize, sum: [__m512; N], scale: f32| {
                let row = out.add((t - start) * ld_out);
                for j in 0..N {
                    let o = _mm512_mul_ps(sum[j], _mm512_set1_ps(scale));
                    _mm512_mask_storeu_ps(row.add(j * 16), mask(j), o);
                }
            };
            // Every number of the state goes through the same operations in the same order,
            // however many of them its way from memory is shared by.
            let step = |s: __m512, decay: __m512, k: __m512, write: __m512| {
                _mm512_fmadd_ps(k, write, _mm512_mul_ps(s, decay))
            };
            let (k_t, q_t) = (k(t), q(t));
            let decay_t = _mm512_set1_ps(decay_t);
            let mut sum = [zero; N];
            if goes_on && x.rule == Rule::Ssd {
                let (k_next, q_next) = (k(next), q(next));
                let after = &factors[next - start];
                let strength = _mm512_set1_ps(after.beta * after.k);
                let decay_next = _mm512_set1_ps(after.decay);
                let mut write_next = [zero; N];
                for j in 0..N {
                    write_next[j] = _mm512_mul_ps(row_of_v(next, j), strength);
                }
                let mut sum_next = [zero; N];
                for i in 0..dim_k {
                    let row = state.add(i * ld);
                    let (k, q) = (_mm512_set1_ps(*k_t.add(i)), _mm512_set1_ps(*q_t.add(i)));
                    let k_next = _mm512_set1_ps(*k_next.add(i));
                    let q_next = _mm512_set1_ps(*q_next.add(i));
                    for j in 0..N {
                        let at = row.add(j * 16);
                        let s = _mm512_maskz_loadu_ps(mask(j), at);
                        let s = step(s, decay_t, k, write[j]);
                        sum[j] = _mm512_fmadd_ps(q, s, sum[j]);
                        let s = step(s, decay_next, k_next, write_next[j]);
                        _mm512_mask_storeu_ps(at, mask(j), s);
                        sum_next[j] = _mm512_fmadd_ps(q_next, s, sum_next[j]);
                    }
                }
                put(t, sum, token.q);
                put(next, sum_next, after.q);
                t += 2;
                continue;
            }
            if goes_on {
                let k_next = k(next);
                let mut held_next = [[zero; N]; 2];
                for i in (0..dim_k).step_by(2) {
                    for (u, held) in held_next.iter_mut().enumerate() {
                        let i = i + u;
                        if i == dim_k {
                            break;
                        }
                        let row = state.add(i * ld);
                        let (k, q) = (_mm512_set1_ps(*k_t.add(i)), _mm512_set1_ps(*q_t.add(i)));
                        let k_next = _mm512_set1_ps(*k_next.add(i));
                        for j in 0..N {
                            let at = row.add(j * 16);
                            let s = _mm512_maskz_loadu_ps(mask(j), at);
                            let s = step(s, decay_t, k, write[j]);
                            _mm512_mask_storeu_ps(at, mask(j), s);
                            sum[j] = _mm512_fmadd_ps(q, s, sum[j]);
                            held[j] = _mm512_fmadd_ps(k_next, s, held[j]);
                        }
                    }
                }
                held = Some(held_next);
            } else {
                for i in 0..dim_k {
                    let row = state.add(i * ld);
                    let (k, q) = (_mm512_set1_ps(*k_t.add(i)), _mm512_set1_ps(*q_t.add(i)));
                    for j in 0..N {
                        let at = row.add(j * 16);
                        let s = _mm512_maskz_loadu_ps(mask(j), at);
                        let s = step(s, decay_t, k, write[j]);
                        _mm512_mask_storeu_ps(at, mask(j), s);
                        sum[j] = _mm512_fmadd_ps(q, s, sum[j]);
                    }
                }
            }
            put(t, sum, token.q);
        }
        t = next;
    }
}

/// Asks for the strip's part of a later row, which may lie anywhere.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const N: usize>(row: *const f32) {
    for line in 0..N {
        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(16 * line).cast());
    }
}

/// The chunked form of one head; see [`chunk::chunked`].
///
/// # Safety
/// As [`recurrent`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(crate) unsafe fn chunked(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    // SAFETY: passed on; the buffers have the shapes that `Product` states.
    unsafe {
        chunk::chunked(x, head, state, out, |shape, a, b, c| {
            product(shape, a, b, c);
        });
    }
}

/// See [`Product`]: 8 rows by 32 columns at a time in registers.
///
/// # Safety
/// `a`, `b` and `c` must have the shapes it states.
#[target_feature(enable = "avx512f")]
unsafe fn product(shape: &Product, a: *const f32, b: *const f32, c: *mut f32) {
    const ROWS: usize = 8;
    for col in (0..shape.n).step_by(32) {
        for row in (0..shape.m).step_by(ROWS) {
            let mut sum = [[_mm512_setzero_ps(); 2]; ROWS];
            // SAFETY: blocks within the matrices.
            unsafe {
                let (a, b) = (a.add(row * shape.lda), b.add(col));
                let c = c.add(row * shape.ldc + col);
                if shape.keep != 0.0 {
                    let keep = _mm512_set1_ps(shape.keep);
                    for r in 0..ROWS {
                        for j in 0..2 {
                            let c = _mm512_loadu_ps(c.add(r * shape.ldc + j * 16));
                            sum[r][j] = _mm512_mul_ps(c, keep);
                        }
                    }
                }
                for i in 0..shape.depth(row + ROWS) {
                    let b = b.add(i * shape.ldb);
                    let b = [_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16))];
                    for r in 0..ROWS {
                        let a = _mm512_set1_ps(*a.add(r * shape.lda + i));
                        sum[r][0] = _mm512_fmadd_ps(a, b[0], sum[r][0]);
                        sum[r][1] = _mm512_fmadd_ps(a, b[1], sum[r][1]);
                    }
                }
                for r in 0..ROWS {
                    for j in 0..2 {
                        _mm512_storeu_ps(c.add(r * shape.ldc + j * 16), sum[r][j]);
                    }
                }
            }
        }
    }
}
