//! The chunked form: 32 tokens at a time, as matrix products (arXiv 2406.06484, 2412.06464).
//!
//! With `G_i` the sum of log decays up to token `i` of the chunk and `D_ij = exp(G_i - G_j)`, the
//! recurrence inside a chunk that starts from the state `S` is
//!
//! ```text
//!     (I + L) E = beta (V - exp(G) K S)        L_ij = beta_i D_ij k_i·k_j   for j < i
//!     out       = exp(G) Q S + M E             M_ij =        D_ij q_i·k_j   for j <= i
//!     S'        = K^T (D_nj-weighted E) + exp(G_n) S
//! ```
//!
//! Ssd has `E = beta V`. Only differences `G_i - G_j <= 0` are ever raised, so no decay, however
//! strong, overflows. A reset between `j` and `i` makes `D_ij` zero, and so it does for `S`.
//!
//! All that has to do with values goes through 32 value dimensions at a time: their part of the
//! state and of the other matrices stays in an L1 cache of 32 KiB.
//!
//! These functions are compiled into each instruction set's own caller, which lends its vectors
//! and its matrix product.

use super::{Inputs, Rule, further_scales, inverse_norm};
use crate::mul_mat::buffer::Buffer;
use std::array::from_fn;
use std::cell::RefCell;

/// Tokens that go through together: with more the triangles cost more, with fewer the walks over
/// the state.
const STEP: usize = 32;
/// Value dimensions that go through a chunk together.
const SLICE: usize = 32;
/// Rows and columns of the blocks in which matrices are transposed and inverted.
const BLOCK: usize = 16;

/// Log decay below which nothing is left; [`exp`] is zero there.
pub(crate) const LEAST: f32 = -87.0;

/// A matrix product on F32 buffers, `c = keep c + a b`; `c` is not read if `keep` is 0. `m` and `k`
/// are multiples of 16, `n` of 32; `a` is `[m, lda]`, `b` `[k, ldb]`, `c` `[m, ldc]`.
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) lda: usize,
    pub(crate) ldb: usize,
    pub(crate) ldc: usize,
    pub(crate) keep: f32,
    /// `a` is zero where the column is larger than the row.
    pub(crate) lower: bool,
}

impl Product {
    /// Columns of `a` that rows below `end` need.
    #[inline(always)]
    pub(crate) fn depth(&self, end: usize) -> usize {
        if self.lower { self.k.min(end) } else { self.k }
    }
}

/// F32 numbers on cache-line bounds.
struct Numbers(Buffer);

impl Numbers {
    /// `len` numbers that hold anything; those beyond any length used before are zero.
    fn room(&mut self, len: usize) -> &mut [f32] {
        self.0.reserve(len * 4);
        // SAFETY: the buffer is aligned, initialised and has that many bytes.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// Memory of a thread, reused over heads and calls.
struct Work {
    s: Numbers,
    kq: Numbers,
    kt: Numbers,
    small: Box<Small>,
}

/// What does not depend on the head's dimensions.
#[repr(C, align(64))]
struct Small {
    /// `K K^T`, then `Q K^T`, `[2 STEP][STEP]`.
    x: [f32; 2 * STEP * STEP],
    /// `L`, its inverse with the unit diagonal, and `M`.
    l: [f32; STEP * STEP],
    t: [f32; STEP * STEP],
    m: [f32; STEP * STEP],
    /// A slice of `K S`, then of `Q S`, which becomes the output, `[2 STEP][SLICE]`.
    held: [f32; 2 * STEP * SLICE],
    /// A slice of the right side of the triangular system, and of `E`: what is written for each
    /// key.
    r: [f32; STEP * SLICE],
    e: [f32; STEP * SLICE],
    /// Sums of log decays.
    g: [f32; STEP],
    /// Decay from the state before the chunk to the token, and from the token to the end.
    from_state: [f32; STEP],
    to_end: [f32; STEP],
    /// Resets before or at the token, counted from the chunk's start; a decay to nothing is one.
    segment: [u32; STEP],
    beta: [f32; STEP],
}

/// One head's chunk: dimensions padded to whole blocks, and where its matrices lie.
struct Chunk<'w> {
    dim_k: usize,
    /// The state, `[dim_v / SLICE][dim_k][SLICE]`.
    s: &'w mut [f32],
    /// Keys, then queries, normalised, `[2 STEP, dim_k]`.
    kq: &'w mut [f32],
    /// `K^T`, `[dim_k, STEP]`.
    kt: &'w mut [f32],
    w: &'w mut Small,
}

thread_local! {
    static WORK: RefCell<Option<Box<Work>>> = const { RefCell::new(None) };
}

impl Work {
    fn new() -> Work {
        let empty = || Numbers(Buffer::zeroed(0));
        Work {
            s: empty(),
            kq: empty(),
            kt: empty(),
            small: Box::new(Small {
                x: [0.0; 2 * STEP * STEP],
                l: [0.0; STEP * STEP],
                t: [0.0; STEP * STEP],
                m: [0.0; STEP * STEP],
                held: [0.0; 2 * STEP * SLICE],
                r: [0.0; STEP * SLICE],
                e: [0.0; STEP * SLICE],
                g: [0.0; STEP],
                from_state: [0.0; STEP],
                to_end: [0.0; STEP],
                segment: [0; STEP],
                beta: [0.0; STEP],
            }),
        }
    }
}

/// One head from first to last token. `state` is `[head_dim_k, head_dim_v]`, row `t` of `out`
/// starts at `t * out_stride`.
///
/// # Safety
/// `out` must hold the head's rows, and nothing else may use them meanwhile.
#[inline(always)]
pub(crate) unsafe fn chunked(
    x: &Inputs<'_>,
    head: usize,
    state: &mut [f32],
    out: *mut f32,
    mut product: impl FnMut(&Product, *const f32, *const f32, *mut f32),
) {
    // Taken out, not borrowed: code in a closure would not be compiled for this caller's vectors.
    let mut work = WORK.take().unwrap_or_else(|| Box::new(Work::new()));
    let dim_k = x.head_dim_k.next_multiple_of(BLOCK);
    let dim_v = x.head_dim_v.next_multiple_of(SLICE);
    let mut c = Chunk {
        dim_k,
        s: work.s.room(dim_k * dim_v),
        kq: work.kq.room(2 * STEP * dim_k),
        kt: work.kt.room(dim_k * STEP),
        w: &mut work.small,
    };
    // What pads dimensions to whole vectors must be zero.
    if dim_k > x.head_dim_k || dim_v > x.head_dim_v {
        c.s.fill(0.0);
        c.kq.fill(0.0);
    }
    for (i, from) in state.chunks_exact(x.head_dim_v).enumerate() {
        for (slice, from) in from.chunks(SLICE).enumerate() {
            c.s[(slice * dim_k + i) * SLICE..][..from.len()].copy_from_slice(from);
        }
    }
    for start in (0..x.n_tokens).step_by(STEP) {
        let n = STEP.min(x.n_tokens - start);
        gather(&mut c, x, head, start, n);
        // SAFETY: rows from `start` on of this head, by the caller's promise.
        unsafe {
            let out = out.wrapping_add(start * x.out_stride);
            step(&mut c, x, head, start, n, out, &mut product);
        }
    }
    for (i, to) in state.chunks_exact_mut(x.head_dim_v).enumerate() {
        for (slice, to) in to.chunks_mut(SLICE).enumerate() {
            to.copy_from_slice(&c.s[(slice * dim_k + i) * SLICE..][..to.len()]);
        }
    }
    WORK.set(Some(work));
}

/// Takes in the tokens `start..start + n`; the rest of the chunk becomes tokens that write
/// nothing.
#[inline(always)]
fn gather(c: &mut Chunk<'_>, x: &Inputs<'_>, head: usize, start: usize, n: usize) {
    let head_k = head / (x.n_head / x.n_head_k);
    let (dk, dim_k) = (x.head_dim_k, c.dim_k);
    let (further_k, further_q) = further_scales(x);
    let w = &mut *c.w;
    let mut sum = 0.0;
    let mut segment = 0;
    let mut resets = x.resets.partition_point(|&r| r < start);
    let (keys, queries) = c.kq.split_at_mut(STEP * dim_k);
    for i in 0..n {
        let t = start + i;
        let k = &x.k[(t * x.n_head_k + head_k) * dk..][..dk];
        let q = &x.q[(t * x.n_head + head) * dk..][..dk];
        let scale = inverse_norm(x.rule, k) * further_k;
        for (to, from) in keys[i * dim_k..][..dk].iter_mut().zip(k) {
            *to = from * scale;
        }
        let scale = inverse_norm(x.rule, q) * further_q;
        for (to, from) in queries[i * dim_k..][..dk].iter_mut().zip(q) {
            *to = from * scale;
        }
        w.beta[i] = x.beta[t * x.n_head + head];
        let g = if x.rule == Rule::Delta {
            0.0
        } else {
            x.g[t * x.n_head + head]
        };
        let reset = x.resets.get(resets) == Some(&t);
        resets += usize::from(reset);
        // A decay to nothing is a reset too. Summing on from such a step would round away all
        // smaller ones after it.
        if reset || g < LEAST {
            segment += 1;
            sum = 0.0;
        } else {
            sum += g;
        }
        w.g[i] = sum;
        w.segment[i] = segment;
    }
    if n < STEP {
        keys[n * dim_k..].fill(0.0);
        queries[n * dim_k..].fill(0.0);
        w.beta[n..].fill(0.0);
        w.g[n..].fill(sum);
        w.segment[n..].fill(segment);
    }
    for i in 0..STEP {
        let sees_state = w.segment[i] == 0;
        w.from_state[i] = if sees_state { exp(w.g[i]) } else { 0.0 };
        let seen = w.segment[i] == segment;
        w.to_end[i] = if seen { exp(sum - w.g[i]) } else { 0.0 };
    }
    for (block, rows) in keys.chunks_exact(BLOCK * dim_k).enumerate() {
        for i in (0..dim_k).step_by(BLOCK) {
            let to = &mut c.kt[i * STEP + block * BLOCK..];
            transpose(&rows[i..], dim_k, to, STEP);
        }
    }
}

/// `to[j][i] = from[i][j]` for 16 x 16 numbers, by swapping ever smaller halves.
#[inline(always)]
fn transpose(from: &[f32], ld_from: usize, to: &mut [f32], ld_to: usize) {
    let mut a = [[0f32; BLOCK]; BLOCK];
    for (i, a) in a.iter_mut().enumerate() {
        a.copy_from_slice(&from[i * ld_from..][..BLOCK]);
    }
    swap::<8>(&mut a);
    swap::<4>(&mut a);
    swap::<2>(&mut a);
    swap::<1>(&mut a);
    for (i, a) in a.iter().enumerate() {
        to[i * ld_to..][..BLOCK].copy_from_slice(a);
    }
}

/// Swaps the upper right with the lower left in every block of `2 HALF` by `2 HALF`.
#[inline(always)]
fn swap<const HALF: usize>(a: &mut [[f32; BLOCK]; BLOCK]) {
    for i in 0..BLOCK {
        if i & HALF == 0 {
            let (low, high) = (a[i], a[i + HALF]);
            // With `HALF` known these become shuffles of whole rows.
            a[i] = from_fn(|j| {
                if j & HALF == 0 {
                    low[j]
                } else {
                    high[j - HALF]
                }
            });
            a[i + HALF] = from_fn(|j| {
                if j & HALF == 0 {
                    low[j + HALF]
                } else {
                    high[j]
                }
            });
        }
    }
}

/// Asks for the cache lines of `n` numbers of `x` from `first` on, which may be past its end.
#[inline(always)]
pub(crate) fn prefetch<T>(x: &[T], first: usize, n: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..n).step_by(64 / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has it; a prefetch never faults and changes no value.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().wrapping_add(first + i).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, first, n);
}

/// Asks for the cache lines of a row that will be written, which may lie anywhere.
#[inline(always)]
pub(crate) fn prefetch_to_write(row: *mut f32, n: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..n).step_by(16) {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: every x86-64 has it; a prefetch never faults and changes no value.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(row.wrapping_add(i).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (row, n);
}

/// `M`, and `(I + L)^-1` where the rule has one, from `K K^T` and `Q K^T`.
#[inline(always)]
fn triangles(w: &mut Small, rule: Rule) {
    for i in 0..STEP {
        // One vector loop over a whole row costs less than stopping at the diagonal; and reading every
        // number, wanted or not, less than reading some.
        let mut decay = [0f32; STEP];
        for j in 0..STEP {
            let past = (j <= i) & (w.segment[j] == w.segment[i]);
            let factor = exp(w.g[i] - w.g[j]);
            decay[j] = if past { factor } else { 0.0 };
        }
        let qk = &w.x[(STEP + i) * STEP..][..STEP];
        let m = &mut w.m[i * STEP..][..STEP];
        for j in 0..STEP {
            m[j] = decay[j] * qk[j];
        }
        if rule == Rule::Ssd {
            continue;
        }
        let kk = &w.x[i * STEP..][..STEP];
        let l = &mut w.l[i * STEP..][..STEP];
        let beta = w.beta[i];
        for j in 0..STEP {
            l[j] = if j < i { beta * decay[j] * kk[j] } else { 0.0 };
        }
    }
    if rule != Rule::Ssd {
        invert(&w.l, &mut w.t);
    }
}

/// The chunk of tokens `start..start + n`, gathered; `out` is the first one's row.
///
/// # Safety
/// `out` must hold the rows of `n` tokens.
#[inline(always)]
unsafe fn step(
    c: &mut Chunk<'_>,
    x: &Inputs<'_>,
    head: usize,
    start: usize,
    n: usize,
    out: *mut f32,
    product: &mut impl FnMut(&Product, *const f32, *const f32, *mut f32),
) {
    let (dim_k, rule, w) = (c.dim_k, x.rule, &mut *c.w);
    let head_k = head / (x.n_head / x.n_head_k);
    // Ssd never asks what the state holds for a key.
    let skip = if rule == Rule::Ssd { STEP } else { 0 };
    let rows = Product {
        m: 2 * STEP - skip,
        n: SLICE,
        k: dim_k,
        lda: dim_k,
        ldb: SLICE,
        ldc: SLICE,
        keep: 0.0,
        lower: false,
    };
    const {
        assert!(
            SLICE == STEP,
            "one shape for K^T and for a slice of the state"
        )
    };
    let kq = c.kq[skip * dim_k..].as_ptr();
    product(&rows, kq, c.kt.as_ptr(), w.x[skip * STEP..].as_mut_ptr());
    for t in (start + STEP..x.n_tokens).take(STEP) {
        // Rows of a head lie far apart: ask for the next chunk's while there is other work.
        prefetch(x.k, (t * x.n_head_k + head_k) * x.head_dim_k, x.head_dim_k);
        prefetch(x.q, (t * x.n_head + head) * x.head_dim_k, x.head_dim_k);
        prefetch(x.v, (t * x.n_head_k + head_k) * x.head_dim_v, x.head_dim_v);
    }
    triangles(w, rule);
    let lower = Product {
        m: STEP,
        k: STEP,
        lda: STEP,
        lower: true,
        ..rows
    };
    for (slice, s) in c.s.chunks_exact_mut(dim_k * SLICE).enumerate() {
        let first = slice * SLICE;
        let width = SLICE.min(x.head_dim_v - first);
        product(&rows, kq, s.as_ptr(), w.held[skip * SLICE..].as_mut_ptr());
        let (ks, o) = w.held.split_at_mut(STEP * SLICE);
        // Ssd writes its right side as it is.
        let r = if rule == Rule::Ssd {
            &mut w.e
        } else {
            &mut w.r
        };
        for i in 0..n {
            x.ask();
            let at = ((start + i) * x.n_head_k + head_k) * x.head_dim_v + first;
            let v = &x.v[at..at + width];
            let (r, rest) = r[i * SLICE..][..SLICE].split_at_mut(width);
            let (beta, decay) = (w.beta[i], w.from_state[i]);
            // `width` is not known to the compiler, which is as well: it makes vectors of such a loop,
            // and 32 single numbers of one over a whole row.
            if rule == Rule::Ssd {
                for j in 0..width {
                    r[j] = beta * v[j];
                }
            } else {
                let ks = &ks[i * SLICE..][..width];
                for j in 0..width {
                    r[j] = beta * (v[j] - decay * ks[j]);
                }
            }
            if !rest.is_empty() {
                rest.fill(0.0);
            }
        }
        r[n * SLICE..].fill(0.0);
        if rule != Rule::Ssd {
            product(&lower, w.t.as_ptr(), w.r.as_ptr(), w.e.as_mut_ptr());
        }
        for (o, factor) in o.chunks_exact_mut(SLICE).zip(&w.from_state[..n]) {
            scale(o, *factor);
        }
        let add = Product { keep: 1.0, ..lower };
        product(&add, w.m.as_ptr(), w.e.as_ptr(), o.as_mut_ptr());
        for i in 0..n {
            // SAFETY: row `i`, columns of this slice, by the caller's promise.
            unsafe {
                let to = out.add(i * x.out_stride + first);
                to.copy_from_nonoverlapping(o[i * SLICE..][..width].as_ptr(), width);
            }
        }
        for (e, factor) in w.e.chunks_exact_mut(SLICE).zip(&w.to_end) {
            scale(e, *factor);
        }
        let update = Product {
            m: dim_k,
            k: STEP,
            lda: STEP,
            keep: w.from_state[STEP - 1],
            ..rows
        };
        product(&update, c.kt.as_ptr(), w.e.as_ptr(), s.as_mut_ptr());
    }
}

/// A row times a number.
#[inline(always)]
fn scale(row: &mut [f32], factor: f32) {
    // Unknown to the compiler, or it unrolls the row and goes down the columns with gathers and scatters.
    let len = std::hint::black_box(row.len());
    for x in &mut row[..len] {
        *x *= factor;
    }
}

/// `t = (I + l)^-1` for strictly lower triangular `l`, row by row: `t_i = e_i - sum_(j<i) l_ij t_j`.
#[inline(always)]
fn invert(l: &[f32], t: &mut [f32]) {
    t[..STEP * STEP].fill(0.0);
    for first in (0..STEP).step_by(BLOCK) {
        for i in first..STEP {
            // Four sums side by side; past the diagonal `l` is zero, and so is `t` so far.
            let mut sums = [[0f32; BLOCK]; 4];
            for j in (first..i).step_by(4) {
                for (u, sum) in sums.iter_mut().enumerate() {
                    let factor = l[i * STEP + j + u];
                    let from = &t[(j + u) * STEP + first..][..BLOCK];
                    for c in 0..BLOCK {
                        sum[c] = factor.mul_add(from[c], sum[c]);
                    }
                }
            }
            let row = &mut t[i * STEP + first..][..BLOCK];
            for c in 0..BLOCK {
                row[c] = -((sums[0][c] + sums[1][c]) + (sums[2][c] + sums[3][c]));
            }
            if i < first + BLOCK {
                row[i - first] = 1.0;
            }
        }
    }
}

/// e^x for x <= 0, to 3e-7 relative plus the rounding of `x log2(e)`; exactly 1 at 0, and 0 below
/// -87. Plain arithmetic, so that loops over it become vector code.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let y = x.max(-87.5) * std::f32::consts::LOG2_E;
    let shifted = y + MAGIC;
    let whole = shifted - MAGIC;
    // ln 2 in two parts: `x - whole ln 2` without the rounding of `y`.
    let f = (x.max(-87.5) - whole * 0.693_359_4) + whole * 2.121_944_4e-4;
    let p = 1.0 / 720.0;
    let p = p * f + 1.0 / 120.0;
    let p = p * f + 1.0 / 24.0;
    let p = p * f + 1.0 / 6.0;
    let p = p * f + 0.5;
    let p = p * f + 1.0;
    let p = p * f + 1.0;
    let power = (shifted
        .to_bits()
        .wrapping_sub(MAGIC.to_bits())
        .wrapping_add(127))
        << 23;
    let e = p * f32::from_bits(power);
    if x < LEAST { 0.0 } else { e }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere_and_exact_at_zero() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e9), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        for i in 0..100_000 {
            let x = -87.0 * i as f32 / 100_000.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) / expected - 1.0).abs();
            assert!(error < 5e-7, "exp({x}) is off by {error}");
        }
    }

    #[test]
    fn inverse_times_matrix_is_one() {
        let mut l = vec![0f32; STEP * STEP];
        for i in 0..STEP {
            for j in 0..i {
                l[i * STEP + j] = ((i * 31 + j * 17) % 13) as f32 / 60.0 - 0.1;
            }
        }
        let mut t = vec![f32::NAN; STEP * STEP];
        invert(&l, &mut t);
        for i in 0..STEP {
            for j in 0..STEP {
                let mut sum = t[i * STEP + j];
                for k in 0..i {
                    sum += l[i * STEP + k] * t[k * STEP + j];
                }
                let expected = f32::from(u8::from(i == j));
                assert!((sum - expected).abs() < 1e-5, "({i}, {j}): {sum}");
            }
        }
    }
}
