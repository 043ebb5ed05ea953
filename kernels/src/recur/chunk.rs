//! The chunked form: 64 tokens at a time, as matrix products (arXiv 2406.06484, 2412.06464).
//!
//! With `G_i` the sum of log decays up to token `i` of the chunk and `D_ij = exp(G_i - G_j)`, the
//! recurrence inside a chunk that starts from the state `S` is
//!
//! ```text
//!     (I + L) E = beta (V - exp(G) K S)        L_ij = beta_i D_ij k_i·k_j   for j < i
//!     out       = exp(G) Q S + M E             M_ij =        D_ij q_i·k_j   for j <= i
//!     S'        = D_nj-weighted K^T E + exp(G_n) S
//! ```
//!
//! Ssd has `E = beta V`. Only differences `G_i - G_j <= 0` are ever raised, so no decay, however
//! strong, overflows. A reset between `j` and `i` makes `D_ij` zero, and so it does for `S`.
//!
//! These functions are compiled into each instruction set's own caller, which lends its vectors
//! and its matrix product.

use super::{CHUNK, Inputs, Rule, further_scales, inverse_norm};
use crate::mul_mat::buffer::Buffer;
use std::cell::RefCell;

/// Rows and columns of the blocks in which triangular matrices are inverted.
const BLOCK: usize = 16;

/// Log decay below which nothing is left; [`exp`] is zero there.
pub(crate) const LEAST: f32 = -87.0;

/// A matrix product on F32 buffers: `c = a b`, or `c += a b`. `m`, `n` and `k` are multiples of
/// 16, `k` of 32 where the operands allow; `a` is `[m, lda]`, `b` `[k, ldb]`, `c` `[m, ldc]`.
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) lda: usize,
    pub(crate) ldb: usize,
    pub(crate) ldc: usize,
    pub(crate) add: bool,
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
    sk: Numbers,
    kq: Numbers,
    x: Numbers,
    r: Numbers,
    e: Numbers,
    l: Numbers,
    t: Numbers,
    m: Numbers,
    kt: Numbers,
    out: Numbers,
    operands: Buffer,
}

/// One head's chunk.
struct Chunk<'w> {
    dim_k: usize,
    dim_v: usize,
    /// `[S | K^T]`, `[dim_k, dim_v + CHUNK]`.
    sk: &'w mut [f32],
    /// Keys, then queries, normalised, `[2 CHUNK, dim_k]`.
    kq: &'w mut [f32],
    /// `[K; Q] [S | K^T]`, `[2 CHUNK, dim_v + CHUNK]`.
    x: &'w mut [f32],
    /// Values, then the right side of the triangular system, `[CHUNK, dim_v]`.
    r: &'w mut [f32],
    /// What is written for each key, `[CHUNK, dim_v]`.
    e: &'w mut [f32],
    /// `L`, its inverse with the unit diagonal, and `M`; `[CHUNK, CHUNK]` each.
    l: &'w mut [f32],
    t: &'w mut [f32],
    m: &'w mut [f32],
    /// `K^T` weighted by the decay to the end of the chunk, `[dim_k, CHUNK]`.
    kt: &'w mut [f32],
    /// `[CHUNK, dim_v]`.
    out: &'w mut [f32],
    /// Room in which a product may rearrange its operands.
    operands: &'w mut Buffer,
    /// Sums of log decays.
    g: [f32; CHUNK],
    /// Resets before or at the token, counted from the chunk's start; a decay to nothing is one.
    segment: [u32; CHUNK],
    beta: [f32; CHUNK],
}

thread_local! {
    static WORK: RefCell<Option<Box<Work>>> = const { RefCell::new(None) };
}

impl Work {
    fn new() -> Work {
        let empty = || Numbers(Buffer::zeroed(0));
        Work {
            sk: empty(),
            kq: empty(),
            x: empty(),
            r: empty(),
            e: empty(),
            l: empty(),
            t: empty(),
            m: empty(),
            kt: empty(),
            out: empty(),
            operands: Buffer::zeroed(0),
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
    mut product: impl FnMut(&Product, *const f32, *const f32, *mut f32, &mut Buffer),
) {
    // Taken out, not borrowed: code in a closure would not be compiled for this caller's vectors.
    let mut work = WORK.take().unwrap_or_else(|| Box::new(Work::new()));
    let (dim_k, dim_v) = (
        x.head_dim_k.next_multiple_of(32),
        x.head_dim_v.next_multiple_of(16),
    );
    let width = dim_v + CHUNK;
    let mut w = Chunk {
        dim_k,
        dim_v,
        sk: work.sk.room(dim_k * width),
        kq: work.kq.room(2 * CHUNK * dim_k),
        x: work.x.room(2 * CHUNK * width),
        r: work.r.room(CHUNK * dim_v),
        e: work.e.room(CHUNK * dim_v),
        l: work.l.room(CHUNK * CHUNK),
        t: work.t.room(CHUNK * CHUNK),
        m: work.m.room(CHUNK * CHUNK),
        kt: work.kt.room(dim_k * CHUNK),
        out: work.out.room(CHUNK * dim_v),
        operands: &mut work.operands,
        g: [0.0; CHUNK],
        segment: [0; CHUNK],
        beta: [0.0; CHUNK],
    };
    // What pads dimensions to whole vectors must be zero.
    if dim_k > x.head_dim_k || dim_v > x.head_dim_v {
        w.sk.fill(0.0);
        w.kq.fill(0.0);
    }
    let rows = w.sk.chunks_exact_mut(width);
    for (row, s) in rows.zip(state.chunks_exact(x.head_dim_v)) {
        row[..x.head_dim_v].copy_from_slice(s);
    }
    for start in (0..x.n_tokens).step_by(CHUNK) {
        let n = CHUNK.min(x.n_tokens - start);
        gather(&mut w, x, head, start, n);
        step(&mut w, x, head, start, n, &mut product);
        for i in 0..n {
            let from = &w.out[i * dim_v..][..x.head_dim_v];
            // SAFETY: row `start + i` of this head, by the caller's promise.
            let to = unsafe {
                let first = (start + i) * x.out_stride;
                std::slice::from_raw_parts_mut(out.add(first), x.head_dim_v)
            };
            to.copy_from_slice(from);
        }
    }
    let rows = w.sk.chunks_exact(width);
    for (row, s) in rows.zip(state.chunks_exact_mut(x.head_dim_v)) {
        s.copy_from_slice(&row[..x.head_dim_v]);
    }
    WORK.set(Some(work));
}

/// Takes in the tokens `start..start + n`; the rest of the chunk becomes tokens that write
/// nothing.
#[inline(always)]
fn gather(w: &mut Chunk<'_>, x: &Inputs<'_>, head: usize, start: usize, n: usize) {
    let head_k = head / (x.n_head / x.n_head_k);
    let (dk, dv) = (x.head_dim_k, x.head_dim_v);
    let (further_k, further_q) = further_scales(x);
    let mut sum = 0.0;
    let mut segment = 0;
    let mut resets = x.resets.partition_point(|&r| r < start);
    let (keys, queries) = w.kq.split_at_mut(CHUNK * w.dim_k);
    for i in 0..n {
        let t = start + i;
        let k = &x.k[(t * x.n_head_k + head_k) * dk..][..dk];
        let q = &x.q[(t * x.n_head + head) * dk..][..dk];
        let v = &x.v[(t * x.n_head_k + head_k) * dv..][..dv];
        let scale = inverse_norm(x.rule, k) * further_k;
        for (to, from) in keys[i * w.dim_k..][..dk].iter_mut().zip(k) {
            *to = from * scale;
        }
        let scale = inverse_norm(x.rule, q) * further_q;
        for (to, from) in queries[i * w.dim_k..][..dk].iter_mut().zip(q) {
            *to = from * scale;
        }
        let values = &mut w.r[i * w.dim_v..][..w.dim_v];
        values[..dv].copy_from_slice(v);
        values[dv..].fill(0.0);
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
    if n < CHUNK {
        keys[n * w.dim_k..].fill(0.0);
        queries[n * w.dim_k..].fill(0.0);
        w.r[n * w.dim_v..].fill(0.0);
        w.beta[n..].fill(0.0);
        w.g[n..].fill(sum);
        w.segment[n..].fill(segment);
    }
    let width = w.dim_v + CHUNK;
    for (block, rows) in keys.chunks_exact(BLOCK * w.dim_k).enumerate() {
        for i in (0..w.dim_k).step_by(BLOCK) {
            let first = i * width + w.dim_v + block * BLOCK;
            transpose(&rows[i..], w.dim_k, &mut w.sk[first..], width);
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
    for half in [8, 4, 2, 1] {
        for i in (0..BLOCK).filter(|i| i & half == 0) {
            let (mut low, mut high) = (a[i], a[i + half]);
            for j in (0..BLOCK).filter(|j| j & half == 0) {
                std::mem::swap(&mut low[j + half], &mut high[j]);
            }
            (a[i], a[i + half]) = (low, high);
        }
    }
    for (i, a) in a.iter().enumerate() {
        to[i * ld_to..][..BLOCK].copy_from_slice(a);
    }
}

/// Asks for the cache lines of `n` numbers of `x` from `first` on, which may be past its end.
#[inline(always)]
fn prefetch(x: &[f32], first: usize, n: usize) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..n).step_by(16) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has it; a prefetch never faults and changes no value.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().wrapping_add(first + i).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, first, n);
}

/// The chunk of tokens `start..start + n`, gathered.
#[inline(always)]
fn step(
    w: &mut Chunk<'_>,
    x: &Inputs<'_>,
    head: usize,
    start: usize,
    n: usize,
    product: &mut impl FnMut(&Product, *const f32, *const f32, *mut f32, &mut Buffer),
) {
    let (dim_k, dim_v, rule) = (w.dim_k, w.dim_v, x.rule);
    let width = dim_v + CHUNK;
    let head_k = head / (x.n_head / x.n_head_k);
    // Ssd never asks what the state holds for a key.
    let skip = if rule == Rule::Ssd { CHUNK } else { 0 };
    let shape = Product {
        m: 2 * CHUNK - skip,
        n: width,
        k: dim_k,
        lda: dim_k,
        ldb: width,
        ldc: width,
        add: false,
    };
    product(
        &shape,
        w.kq[skip * dim_k..].as_ptr(),
        w.sk.as_ptr(),
        w.x[skip * width..].as_mut_ptr(),
        w.operands,
    );
    let mut from_state = [0f32; CHUNK];
    for i in 0..CHUNK {
        from_state[i] = if w.segment[i] == 0 { exp(w.g[i]) } else { 0.0 };
    }
    for i in 0..CHUNK {
        // Rows of a head lie far apart: ask for the next chunk's while there is other work.
        let t = start + CHUNK + i;
        prefetch(x.k, (t * x.n_head_k + head_k) * x.head_dim_k, x.head_dim_k);
        prefetch(x.q, (t * x.n_head + head) * x.head_dim_k, x.head_dim_k);
        prefetch(x.v, (t * x.n_head_k + head_k) * x.head_dim_v, x.head_dim_v);
        // One vector loop over a whole row costs less than stopping at the diagonal.
        let mut decay = [0f32; CHUNK];
        for j in 0..CHUNK {
            let past = j <= i && w.segment[j] == w.segment[i];
            decay[j] = if past { exp(w.g[i] - w.g[j]) } else { 0.0 };
        }
        let qk = &w.x[(CHUNK + i) * width + dim_v..][..CHUNK];
        let m = &mut w.m[i * CHUNK..][..CHUNK];
        for j in 0..CHUNK {
            m[j] = decay[j] * qk[j];
        }
        let beta = w.beta[i];
        let r = &mut w.r[i * dim_v..][..dim_v];
        if rule == Rule::Ssd {
            for r in r {
                *r *= beta;
            }
            continue;
        }
        let kk = &w.x[i * width + dim_v..][..CHUNK];
        let l = &mut w.l[i * CHUNK..][..CHUNK];
        for j in 0..CHUNK {
            l[j] = if j < i { beta * decay[j] * kk[j] } else { 0.0 };
        }
        let ks = &w.x[i * width..][..dim_v];
        for (r, ks) in r.iter_mut().zip(ks) {
            *r = beta * (*r - from_state[i] * ks);
        }
    }
    if rule == Rule::Ssd {
        w.e.copy_from_slice(w.r);
    } else {
        invert(w.l, w.t);
        let shape = Product {
            m: CHUNK,
            n: dim_v,
            k: CHUNK,
            lda: CHUNK,
            ldb: dim_v,
            ldc: dim_v,
            add: false,
        };
        product(
            &shape,
            w.t.as_ptr(),
            w.r.as_ptr(),
            w.e.as_mut_ptr(),
            w.operands,
        );
    }
    for i in 0..CHUNK {
        let qs = &w.x[(CHUNK + i) * width..][..dim_v];
        for (out, qs) in w.out[i * dim_v..][..dim_v].iter_mut().zip(qs) {
            *out = from_state[i] * qs;
        }
    }
    let shape = Product {
        m: CHUNK,
        n: dim_v,
        k: CHUNK,
        lda: CHUNK,
        ldb: dim_v,
        ldc: dim_v,
        add: true,
    };
    product(
        &shape,
        w.m.as_ptr(),
        w.e.as_ptr(),
        w.out.as_mut_ptr(),
        w.operands,
    );
    let last = n - 1;
    let mut to_end = [0f32; CHUNK];
    for j in 0..n {
        if w.segment[j] == w.segment[last] {
            to_end[j] = exp(w.g[last] - w.g[j]);
        }
    }
    for i in 0..dim_k {
        let row = &mut w.sk[i * width..][..width];
        let (s, k) = row.split_at_mut(dim_v);
        for s in s {
            *s *= from_state[last];
        }
        let kt = &mut w.kt[i * CHUNK..][..CHUNK];
        for j in 0..CHUNK {
            kt[j] = k[j] * to_end[j];
        }
    }
    let shape = Product {
        m: dim_k,
        n: dim_v,
        k: CHUNK,
        lda: CHUNK,
        ldb: dim_v,
        ldc: width,
        add: true,
    };
    product(
        &shape,
        w.kt.as_ptr(),
        w.e.as_ptr(),
        w.sk.as_mut_ptr(),
        w.operands,
    );
}

/// `t = (I + l)^-1` for strictly lower triangular `l`, row by row: `t_i = e_i - sum_(j<i) l_ij t_j`.
#[inline(always)]
fn invert(l: &[f32], t: &mut [f32]) {
    t[..CHUNK * CHUNK].fill(0.0);
    for first in (0..CHUNK).step_by(BLOCK) {
        for i in first..CHUNK {
            // Four sums side by side; past the diagonal `l` is zero, and so is `t` so far.
            let mut sums = [[0f32; BLOCK]; 4];
            for j in (first..i).step_by(4) {
                for (u, sum) in sums.iter_mut().enumerate() {
                    let factor = l[i * CHUNK + j + u];
                    let from = &t[(j + u) * CHUNK + first..][..BLOCK];
                    for c in 0..BLOCK {
                        sum[c] = factor.mul_add(from[c], sum[c]);
                    }
                }
            }
            let row = &mut t[i * CHUNK + first..][..BLOCK];
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
        let mut l = vec![0f32; CHUNK * CHUNK];
        for i in 0..CHUNK {
            for j in 0..i {
                l[i * CHUNK + j] = ((i * 31 + j * 17) % 13) as f32 / 60.0 - 0.1;
            }
        }
        let mut t = vec![f32::NAN; CHUNK * CHUNK];
        invert(&l, &mut t);
        for i in 0..CHUNK {
            for j in 0..CHUNK {
                let mut sum = t[i * CHUNK + j];
                for k in 0..i {
                    sum += l[i * CHUNK + k] * t[k * CHUNK + j];
                }
                let expected = f32::from(u8::from(i == j));
                assert!((sum - expected).abs() < 1e-5, "({i}, {j}): {sum}");
            }
        }
    }
}
