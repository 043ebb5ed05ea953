//! `recur` with 16 lanes of value dimensions: the recurrent form in one pass over the state from
//! memory, and the matrix product of the chunked form.

use crate::mul_mat::buffer::Buffer;
use crate::recur::chunk::{self, Product};
use crate::recur::{Inputs, Rule, further_scales, inverse_norm};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Vectors side by side in a strip of the state: with 128 key dimensions a strip is 32 KiB, which
/// the L1 cache holds over all tokens of a call.
const STRIP: usize = 4;
/// The same for larger heads.
const NARROW_STRIP: usize = 2;
/// The same for a few tokens: most of the time goes into fetching the state, in whole rows.
const WIDE_STRIP: usize = 8;
/// Tokens that a strip goes through before the next strip does: few enough that their keys and
/// queries, once read, stay in the L2 cache.
const PIECE: usize = 128;
/// Tokens whose rows, which lie far apart, are asked for ahead.
const AHEAD: usize = 8;

/// The recurrent form of one head. Each strip of the state goes through many tokens before the
/// next: in decode it comes from memory once a call. `S^T k` is summed in two parts, over even and
/// odd key dimensions, so that sums are the same for any number of tokens.
///
/// # Safety
/// `state` must be a head's, `out` its first row; rows are `out_stride` apart.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(crate) unsafe fn recurrent(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    let mut work = WORK.take().unwrap_or_else(|| Box::new(Work::new()));
    for start in (0..x.n_tokens).step_by(PIECE) {
        let tokens = start..x.n_tokens.min(start + PIECE);
        // SAFETY: passed on.
        unsafe { piece(x, head, tokens, state, out, &mut work) }
    }
    WORK.set(Some(work));
}

/// Some tokens of [`recurrent`].
///
/// # Safety
/// The instruction set must be there; shapes must be those of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn piece(
    x: &Inputs<'_>,
    head: usize,
    tokens: Range<usize>,
    state: &mut [f32],
    out: *mut f32,
    work: &mut Work,
) {
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let head_k = head / (x.n_head / x.n_head_k);
    let (further_k, further_q) = further_scales(x);
    work.scales.clear();
    for t in tokens.clone() {
        if t + AHEAD < x.n_tokens {
            let at = (t + AHEAD) * x.n_head_k + head_k;
            fetch_row(&x.k[at * dim_k..][..dim_k]);
            fetch_row(&x.v[at * dim_v..][..dim_v]);
            fetch_row(&x.q[((t + AHEAD) * x.n_head + head) * dim_k..][..dim_k]);
        }
        let k = &x.k[(t * x.n_head_k + head_k) * dim_k..][..dim_k];
        let q = &x.q[(t * x.n_head + head) * dim_k..][..dim_k];
        work.scales.push((
            inverse_norm(x.rule, k) * further_k,
            inverse_norm(x.rule, q) * further_q,
        ));
    }
    let many = tokens.len() >= COMPACT_FROM;
    let vectors = match dim_k {
        _ if !many => WIDE_STRIP,
        129.. => NARROW_STRIP,
        _ => STRIP,
    };
    // Over many tokens a strip is worked on in one piece: with its rows a power of two apart it
    // would use half of the L1 cache's sets and be thrown out of the other half.
    let compact = many && dim_v > 16 * vectors;
    for first in (0..dim_v).step_by(16 * vectors) {
        let n = (dim_v - first).min(16 * vectors);
        if compact {
            work.strip.reserve(dim_k * 16 * STRIP * 4);
            let strip = work.strip.as_mut_ptr().cast::<f32>();
            for i in 0..dim_k {
                // SAFETY: `n` numbers of row `i`; the strip has `dim_k` rows of `16 vectors`.
                unsafe {
                    let row = state[i * dim_v + first..][..n].as_ptr();
                    strip.add(i * 16 * vectors).copy_from_nonoverlapping(row, n);
                }
            }
            // SAFETY: columns `first..` of the copy and of `out`.
            unsafe {
                let part = Part {
                    first,
                    n,
                    state: strip,
                    ld: 16 * vectors,
                    out: out.add(first),
                };
                columns(x, head, &part, tokens.start, &work.scales);
            }
            for i in 0..dim_k {
                // SAFETY: as above.
                unsafe {
                    let row = state[i * dim_v + first..][..n].as_mut_ptr();
                    row.copy_from_nonoverlapping(strip.add(i * 16 * vectors), n);
                }
            }
        } else {
            // SAFETY: columns `first..` of the state and of `out`.
            unsafe {
                let state = state.as_mut_ptr().add(first);
                let part = Part {
                    first,
                    n,
                    state,
                    ld: dim_v,
                    out: out.add(first),
                };
                columns(x, head, &part, tokens.start, &work.scales);
            }
        }
    }
}

/// Asks for a row of a later token.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch_row(row: &[f32]) {
    for line in row.chunks(16) {
        _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
    }
}

/// Tokens from which on copying a strip of the state pays.
const COMPACT_FROM: usize = 4;

/// Memory of a thread.
struct Work {
    /// What each token's key and query are multiplied by.
    scales: Vec<(f32, f32)>,
    strip: Buffer,
}

thread_local! {
    static WORK: RefCell<Option<Box<Work>>> = const { RefCell::new(None) };
}

impl Work {
    fn new() -> Work {
        Work {
            scales: Vec::new(),
            strip: Buffer::zeroed(0),
        }
    }
}

/// `n` columns of a head's state, from `first` on: rows are `ld` apart.
struct Part {
    first: usize,
    n: usize,
    state: *mut f32,
    ld: usize,
    /// The same columns of the first token's output.
    out: *mut f32,
}

impl Part {
    /// The first 64 columns and the others.
    fn halves(&self) -> (Part, Part) {
        let at = 16 * STRIP;
        let left = Part { n: at, ..*self };
        let right = Part {
            first: self.first + at,
            n: self.n - at,
            state: self.state.wrapping_add(at),
            ld: self.ld,
            out: self.out.wrapping_add(at),
        };
        (left, right)
    }
}

/// One strip through the tokens from `start` on, one for each pair of scales.
///
/// # Safety
/// The instruction set must be there; the strip must lie within the head's state and output.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn columns(x: &Inputs<'_>, head: usize, part: &Part, start: usize, scales: &[(f32, f32)]) {
    // SAFETY: passed on.
    unsafe {
        match part.n {
            1..16 => strip::<1, true>(x, head, part, start, scales),
            16 => strip::<1, false>(x, head, part, start, scales),
            17..32 => strip::<2, true>(x, head, part, start, scales),
            32 => strip::<2, false>(x, head, part, start, scales),
            33..48 => strip::<3, true>(x, head, part, start, scales),
            48 => strip::<3, false>(x, head, part, start, scales),
            49..64 => strip::<4, true>(x, head, part, start, scales),
            64 => strip::<4, false>(x, head, part, start, scales),
            65..128 => {
                // Fewer kernels: the first half is whole, the rest a strip of its own.
                let (left, right) = part.halves();
                columns(x, head, &left, start, scales);
                columns(x, head, &right, start, scales);
            }
            _ => strip::<WIDE_STRIP, false>(x, head, part, start, scales),
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
    scales: &[(f32, f32)],
) {
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let &Part {
        first,
        n,
        state,
        ld,
        out,
    } = part;
    let head_k = head / (x.n_head / x.n_head_k);
    let last = if CUT {
        (1u16 << (n % 16)) - 1
    } else {
        u16::MAX
    };
    let mask = |j: usize| if CUT && j == N - 1 { last } else { u16::MAX };
    let zero = _mm512_setzero_ps();
    let resets = &x.resets[x.resets.partition_point(|&r| r < start)..];
    let mut resets = resets.iter().copied().peekable();
    let q = |t: usize| x.q[(t * x.n_head + head) * dim_k..][..dim_k].as_ptr();
    let k = |t: usize| x.k[(t * x.n_head_k + head_k) * dim_k..][..dim_k].as_ptr();
    let v = |t: usize| x.v[(t * x.n_head_k + head_k) * dim_v..][first..dim_v].as_ptr();
    let beta = |t: usize| x.beta[t * x.n_head + head];
    let decay = |t: usize| match x.rule {
        Rule::Delta => 1.0,
        _ => chunk::exp(x.g[t * x.n_head + head]),
    };
    let end = start + scales.len();
    // `S^T k` of the next token, over even and odd key dimensions, where the last pass has made it.
    let mut held = None;
    let mut t = start;
    while t < end {
        let fresh = resets.next_if_eq(&t).is_some();
        let (scale_k, scale_q) = scales[t - start];
        let next = t + 1;
        let goes_on = N <= STRIP && next < end && resets.peek() != Some(&next);
        // SAFETY: `dim_k` rows of `dim_v` numbers of state, of which `16 N` from `first` on, the
        // last vector masked where it passes the end; likewise one row of `v` and `out`.
        unsafe {
            let row_of_v = |t: usize, j: usize| _mm512_maskz_loadu_ps(mask(j), v(t).add(j * 16));
            if fresh {
                // Zeros, not a factor of zero: the old state may hold anything.
                for i in 0..dim_k {
                    for j in 0..N {
                        _mm512_mask_storeu_ps(state.add(i * ld + j * 16), mask(j), zero);
                    }
                }
            }
            let decay_t = if fresh { 0.0 } else { decay(t) };
            let mut write = [zero; N];
            if x.rule == Rule::Ssd {
                for j in 0..N {
                    let strength = _mm512_set1_ps(beta(t) * scale_k);
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
                    let held = _mm512_mul_ps(held, _mm512_set1_ps(decay_t * scale_k));
                    let error = _mm512_sub_ps(row_of_v(t, j), held);
                    write[j] = _mm512_mul_ps(error, _mm512_set1_ps(beta(t) * scale_k));
                }
            }
            let put = |t: usize, sum: [__m512; N], scale: f32| {
                let row = out.add(t * x.out_stride);
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
                let (scale_k_next, scale_q_next) = scales[next - start];
                let strength = _mm512_set1_ps(beta(next) * scale_k_next);
                let decay_next = _mm512_set1_ps(decay(next));
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
                put(t, sum, scale_q);
                put(next, sum_next, scale_q_next);
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
            put(t, sum, scale_q);
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
