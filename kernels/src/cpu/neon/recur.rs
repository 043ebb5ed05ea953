//! `recur` with 4 lanes of value dimensions: the recurrent form in one pass over the state from memory,
//! and the matrix product of the chunked form.

use crate::recur::chunk::{self, Product};
use crate::recur::strips::{self, Factors, Part, Rows, Widths};
use crate::recur::{Inputs, Rule};
use std::arch::aarch64::*;

/// Vectors side by side in a strip of the state: as many as leave registers for the sums of a token and of
/// the next, and enough for four of them a cycle. With 128 key dimensions a strip is 8 KiB.
const STRIP: usize = 4;
/// The same for a few tokens: rows of two cache lines.
const WIDE_STRIP: usize = 8;

/// The recurrent form of one head. Each strip of the state goes through many tokens before the next: in
/// decode it comes from memory once a call. Sums go over the key dimensions in order, for any number of
/// tokens.
///
/// # Safety
/// `state` must be a head's, `out` its first row; rows are `out_stride` apart.
pub(crate) unsafe fn recurrent(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    let widths = Widths {
        many: 4 * STRIP,
        many_large: 4 * STRIP,
        few: 4 * WIDE_STRIP,
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
/// The strip must lie within the head's state and output.
unsafe fn columns(x: &Inputs<'_>, head: usize, part: &Part, start: usize, factors: &[Factors]) {
    macro_rules! strip {
        ($f:ident, $($n:literal)*) => {
            match (part.n.div_ceil(4), part.n.is_multiple_of(4)) {
                $(($n, true) => return $f::<$n, false>(x, head, part, start, factors),
                ($n, false) => return $f::<$n, true>(x, head, part, start, factors),)*
                (WIDE_STRIP, true) => return $f::<WIDE_STRIP, false>(x, head, part, start, factors),
                _ => {}
            }
        };
    }
    // SAFETY: passed on.
    unsafe {
        if x.rule == Rule::Ssd {
            strip!(add, 1 2 3 4);
        } else {
            strip!(replace, 1 2 3 4);
        }
        // Fewer kernels: the first half is whole, the rest a strip of its own.
        let (left, right) = part.split(4 * STRIP);
        columns(x, head, &left, start, factors);
        columns(x, head, &right, start, factors);
    }
}

/// `N` vectors of a strip, side by side; with `CUT` only the first `n_last` lanes of the last one are the
/// strip's.
struct Vectors<const N: usize, const CUT: bool> {
    n_last: usize,
}

impl<const N: usize, const CUT: bool> Vectors<N, CUT> {
    fn new(n: usize) -> Self {
        Vectors {
            n_last: n - 4 * (N - 1),
        }
    }

    /// Vector `j` of a row; zeros beyond the strip.
    ///
    /// # Safety
    /// The strip's part of the row must be readable.
    #[inline(always)]
    unsafe fn load(&self, row: *const f32, j: usize) -> float32x4_t {
        // SAFETY: numbers beyond the strip are not read.
        unsafe {
            if CUT && j == N - 1 {
                let mut lanes = [0f32; 4];
                let from = row.add(4 * j);
                lanes
                    .as_mut_ptr()
                    .copy_from_nonoverlapping(from, self.n_last);
                vld1q_f32(lanes.as_ptr())
            } else {
                vld1q_f32(row.add(4 * j))
            }
        }
    }

    /// Writes vector `j` of a row, as far as it is the strip's.
    ///
    /// # Safety
    /// The strip's part of the row must be writable.
    #[inline(always)]
    unsafe fn store(&self, row: *mut f32, j: usize, x: float32x4_t) {
        // SAFETY: numbers beyond the strip are not written.
        unsafe {
            if CUT && j == N - 1 {
                let mut lanes = [0f32; 4];
                vst1q_f32(lanes.as_mut_ptr(), x);
                let to = row.add(4 * j);
                to.copy_from_nonoverlapping(lanes.as_ptr(), self.n_last);
            } else {
                vst1q_f32(row.add(4 * j), x);
            }
        }
    }

    /// Zeros, not a factor of zero: an old state may hold anything.
    ///
    /// # Safety
    /// The part must have `n_rows` rows.
    unsafe fn clear(&self, part: &Part, n_rows: usize) {
        for i in 0..n_rows {
            for j in 0..N {
                // SAFETY: rows of the strip.
                unsafe { self.store(part.state.add(i * part.ld), j, vdupq_n_f32(0.0)) }
            }
        }
    }

    /// What a token writes for a key of 1: its value times a number.
    ///
    /// # Safety
    /// The strip's part of the value must be readable.
    #[inline(always)]
    unsafe fn scaled(&self, value: *const f32, scale: f32) -> [float32x4_t; N] {
        // SAFETY: passed on.
        unsafe {
            let mut scaled = [vdupq_n_f32(0.0); N];
            for (j, scaled) in scaled.iter_mut().enumerate() {
                *scaled = vmulq_n_f32(self.load(value, j), scale);
            }
            scaled
        }
    }

    /// `scale * sum` to a row of the output.
    ///
    /// # Safety
    /// The strip's part of the row must be writable.
    #[inline(always)]
    unsafe fn put(&self, row: *mut f32, sum: [float32x4_t; N], scale: f32) {
        for (j, sum) in sum.into_iter().enumerate() {
            // SAFETY: a row of the strip's output.
            unsafe { self.store(row, j, vmulq_n_f32(sum, scale)) }
        }
    }
}

/// `$row!(i, u, k)` for every key dimension `i`: `k` are vectors of the numbers of `$x` at four dimensions,
/// of which lane `u` is this one's.
macro_rules! rows {
    ($dim:expr, [$($x:ident)*], |$i:ident, $u:ident| $row:expr) => {
        for first in (0..$dim & !3).step_by(4) {
            $(let $x = vld1q_f32($x.as_ptr().add(first));)*
            { const $u: i32 = 0; let $i = first; $row }
            { const $u: i32 = 1; let $i = first + 1; $row }
            { const $u: i32 = 2; let $i = first + 2; $row }
            { const $u: i32 = 3; let $i = first + 3; $row }
        }
        for $i in $dim & !3..$dim {
            const $u: i32 = 0;
            $(let $x = vdupq_n_f32($x[$i]);)*
            $row
        }
    };
}

/// [`columns`] of the delta rules: what the state holds for the next token's key is summed in the pass that
/// writes this one's.
///
/// # Safety
/// As [`columns`], with at most `N` vectors.
#[target_feature(enable = "neon")]
unsafe fn replace<const N: usize, const CUT: bool>(
    x: &Inputs<'_>,
    head: usize,
    part: &Part,
    start: usize,
    factors: &[Factors],
) {
    let rows = Rows::new(x, head, part.first);
    let vectors = Vectors::<N, CUT>::new(part.n);
    let resets = &x.resets[x.resets.partition_point(|&r| r < start)..];
    let mut resets = resets.iter().copied().peekable();
    let mut held = None;
    for (i, token) in factors.iter().enumerate() {
        x.ask();
        let t = start + i;
        let fresh = resets.next_if_eq(&t).is_some();
        let goes_on = N <= STRIP && i + 1 < factors.len() && resets.peek() != Some(&(t + 1));
        let decay = if fresh { 0.0 } else { token.decay };
        let (k, q) = (rows.k(t), rows.q(t));
        // SAFETY: `dim_k` rows of state, one of `v` and of `out`, all of the strip's width.
        unsafe {
            if fresh {
                vectors.clear(part, k.len());
            }
            let held_now = match held.take() {
                Some(held) => held,
                None => sum_held(&vectors, part, k),
            };
            let mut write = [vdupq_n_f32(0.0); N];
            for j in 0..N {
                let held = vmulq_n_f32(held_now[j], decay * token.k);
                let error = vsubq_f32(vectors.load(rows.v(t), j), held);
                write[j] = vmulq_n_f32(error, token.beta * token.k);
            }
            let sum = if goes_on {
                let rows = (k, q, rows.k(t + 1));
                let (sum, next) = pass::<N, CUT, true>(&vectors, part, rows, decay, write);
                held = Some(next);
                sum
            } else {
                pass::<N, CUT, false>(&vectors, part, (k, q, k), decay, write).0
            };
            vectors.put(part.out.add(i * part.ld_out), sum, token.q);
        }
    }
}

/// Writes a token to a strip: `S = decay S + k write^T`. Returns `S^T q` and, for `NEXT`, `S^T k_next`.
///
/// # Safety
/// The strip must have as many rows as `k`, `q` and `k_next` have numbers.
#[target_feature(enable = "neon")]
unsafe fn pass<const N: usize, const CUT: bool, const NEXT: bool>(
    vectors: &Vectors<N, CUT>,
    part: &Part,
    (k, q, k_next): (&[f32], &[f32], &[f32]),
    decay: f32,
    write: [float32x4_t; N],
) -> ([float32x4_t; N], [float32x4_t; N]) {
    let mut sum = [vdupq_n_f32(0.0); N];
    let mut held = sum;
    // SAFETY: by the caller's promise.
    unsafe {
        rows!(k.len(), [k q k_next], |i, U| {
            let row = part.state.add(i * part.ld);
            for j in 0..N {
                let s = vmulq_n_f32(vectors.load(row, j), decay);
                let s = vfmaq_laneq_f32::<U>(s, write[j], k);
                vectors.store(row, j, s);
                sum[j] = vfmaq_laneq_f32::<U>(sum[j], s, q);
                if NEXT {
                    held[j] = vfmaq_laneq_f32::<U>(held[j], s, k_next);
                }
            }
        });
    }
    (sum, held)
}

/// `S^T k` of a strip.
///
/// # Safety
/// The strip must have as many rows as `k` has numbers.
#[target_feature(enable = "neon")]
unsafe fn sum_held<const N: usize, const CUT: bool>(
    vectors: &Vectors<N, CUT>,
    part: &Part,
    k: &[f32],
) -> [float32x4_t; N] {
    let mut held = [vdupq_n_f32(0.0); N];
    // SAFETY: by the caller's promise.
    unsafe {
        rows!(k.len(), [k], |i, U| {
            let row = part.state.add(i * part.ld);
            for j in 0..N {
                held[j] = vfmaq_laneq_f32::<U>(held[j], vectors.load(row, j), k);
            }
        });
    }
    held
}

/// [`columns`] of Ssd: two tokens in a pass.
///
/// # Safety
/// As [`columns`], with at most `N` vectors.
#[target_feature(enable = "neon")]
unsafe fn add<const N: usize, const CUT: bool>(
    x: &Inputs<'_>,
    head: usize,
    part: &Part,
    start: usize,
    factors: &[Factors],
) {
    let rows = Rows::new(x, head, part.first);
    let vectors = Vectors::<N, CUT>::new(part.n);
    let resets = &x.resets[x.resets.partition_point(|&r| r < start)..];
    let mut resets = resets.iter().copied().peekable();
    let mut done = 0;
    while done < factors.len() {
        x.ask();
        let t = start + done;
        let token = &factors[done];
        let fresh = resets.next_if_eq(&t).is_some();
        let next = factors.get(done + 1);
        let next = next.filter(|_| N <= STRIP && resets.peek() != Some(&(t + 1)));
        let decay = if fresh { 0.0 } else { token.decay };
        let (k, q) = (rows.k(t), rows.q(t));
        // SAFETY: `dim_k` rows of state, one of `v` and of `out`, all of the strip's width.
        unsafe {
            if fresh {
                vectors.clear(part, k.len());
            }
            let to = part.out.add(done * part.ld_out);
            let write = vectors.scaled(rows.v(t), token.beta * token.k);
            let Some(next) = next else {
                let (sum, _) = pass::<N, CUT, false>(&vectors, part, (k, q, k), decay, write);
                vectors.put(to, sum, token.q);
                done += 1;
                continue;
            };
            let (k_next, q_next) = (rows.k(t + 1), rows.q(t + 1));
            let write_next = vectors.scaled(rows.v(t + 1), next.beta * next.k);
            let mut sum = [vdupq_n_f32(0.0); N];
            let mut sum_next = sum;
            rows!(k.len(), [k q k_next q_next], |i, U| {
                let row = part.state.add(i * part.ld);
                for j in 0..N {
                    let s = vmulq_n_f32(vectors.load(row, j), decay);
                    let s = vfmaq_laneq_f32::<U>(s, write[j], k);
                    sum[j] = vfmaq_laneq_f32::<U>(sum[j], s, q);
                    let s = vmulq_n_f32(s, next.decay);
                    let s = vfmaq_laneq_f32::<U>(s, write_next[j], k_next);
                    vectors.store(row, j, s);
                    sum_next[j] = vfmaq_laneq_f32::<U>(sum_next[j], s, q_next);
                }
            });
            vectors.put(to, sum, token.q);
            vectors.put(to.add(part.ld_out), sum_next, next.q);
            done += 2;
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

/// See [`Product`]: 4 rows by 16 columns at a time in registers.
///
/// # Safety
/// `a`, `b` and `c` must have the shapes it states.
#[target_feature(enable = "neon")]
unsafe fn product(shape: &Product, a: *const f32, b: *const f32, c: *mut f32) {
    for col in (0..shape.n).step_by(16) {
        for row in (0..shape.m).step_by(4) {
            let mut sum = [[vdupq_n_f32(0.0); 4]; 4];
            // SAFETY: blocks within the matrices; `k` and the rows are multiples of four.
            unsafe {
                let (a, b) = (a.add(row * shape.lda), b.add(col));
                let c = c.add(row * shape.ldc + col);
                if shape.keep != 0.0 {
                    for r in 0..4 {
                        for j in 0..4 {
                            let c = vld1q_f32(c.add(r * shape.ldc + 4 * j));
                            sum[r][j] = vmulq_n_f32(c, shape.keep);
                        }
                    }
                }
                macro_rules! column {
                    ($a:ident, $i:expr, $u:literal) => {
                        for j in 0..4 {
                            let b = vld1q_f32(b.add(($i + $u) * shape.ldb + 4 * j));
                            for r in 0..4 {
                                sum[r][j] = vfmaq_laneq_f32::<$u>(sum[r][j], b, $a[r]);
                            }
                        }
                    };
                }
                for i in (0..shape.depth(row + 4)).step_by(4) {
                    let mut four = [vdupq_n_f32(0.0); 4];
                    for r in 0..4 {
                        four[r] = vld1q_f32(a.add(r * shape.lda + i));
                    }
                    column!(four, i, 0);
                    column!(four, i, 1);
                    column!(four, i, 2);
                    column!(four, i, 3);
                }
                for r in 0..4 {
                    for j in 0..4 {
                        vst1q_f32(c.add(r * shape.ldc + 4 * j), sum[r][j]);
                    }
                }
            }
        }
    }
}
