//! `recur` with 8 lanes of value dimensions: the recurrent form in one pass over the state from
//! memory, and the matrix product of the chunked form.

use crate::recur::chunk::{self, Product};
use crate::recur::strips::{self, Factors, Part, Rows, Widths};
use crate::recur::{Inputs, Rule};
use std::arch::x86_64::*;

/// Vectors side by side in a strip of the state: as many as the sums of a token and of the next
/// leave registers for. With 128 key dimensions a strip is 8 KiB.
const STRIP: usize = 2;
/// The same for a few tokens: rows of two cache lines.
const WIDE_STRIP: usize = 4;

/// The recurrent form of one head. Each strip of the state goes through many tokens before the
/// next: in decode it comes from memory once a call. Sums of the delta rules are made in two parts,
/// over even and odd key dimensions, for any number of tokens.
///
/// # Safety
/// `state` must be a head's, `out` its first row; rows are `out_stride` apart.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn recurrent(x: &Inputs<'_>, head: usize, state: &mut [f32], out: *mut f32) {
    let widths = Widths {
        many: 8 * STRIP,
        many_large: 8 * STRIP,
        few: 8 * WIDE_STRIP,
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
#[target_feature(enable = "avx2,fma")]
unsafe fn columns(x: &Inputs<'_>, head: usize, part: &Part, start: usize, factors: &[Factors]) {
    let cut = !part.n.is_multiple_of(8);
    // SAFETY: passed on.
    unsafe {
        match (x.rule, part.n.div_ceil(8), cut) {
            (Rule::Ssd, 1, true) => add::<1, true>(x, head, part, start, factors),
            (Rule::Ssd, 1, false) => add::<1, false>(x, head, part, start, factors),
            (Rule::Ssd, 2, true) => add::<2, true>(x, head, part, start, factors),
            (Rule::Ssd, 2, false) => add::<2, false>(x, head, part, start, factors),
            (Rule::Ssd, WIDE_STRIP, false) => {
                add::<WIDE_STRIP, false>(x, head, part, start, factors);
            }
            (_, 1, true) => replace::<1, true>(x, head, part, start, factors),
            (_, 1, false) => replace::<1, false>(x, head, part, start, factors),
            (_, 2, true) => replace::<2, true>(x, head, part, start, factors),
            (_, 2, false) => replace::<2, false>(x, head, part, start, factors),
            (_, WIDE_STRIP, false) => {
                replace::<WIDE_STRIP, false>(x, head, part, start, factors);
            }
            _ => {
                // Fewer kernels: the first half is whole, the rest a strip of its own.
                let (left, right) = part.split(8 * STRIP);
                columns(x, head, &left, start, factors);
                columns(x, head, &right, start, factors);
            }
        }
    }
}

/// `N` vectors of a strip, side by side; with `CUT` the last one is partly beyond the strip.
struct Vectors<const N: usize, const CUT: bool> {
    /// The sign bit of each lane of the last vector that is there.
    last: __m256i,
}

impl<const N: usize, const CUT: bool> Vectors<N, CUT> {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(n: usize) -> Self {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let n = (n - 8 * (N - 1)) as i32;
        let last = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes);
        Vectors { last }
    }

    /// Vector `j` of a row; zeros beyond the strip.
    ///
    /// # Safety
    /// The strip's part of the row must be readable.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load(&self, row: *const f32, j: usize) -> __m256 {
        // SAFETY: lanes beyond the strip are not read.
        unsafe {
            if CUT && j == N - 1 {
                _mm256_maskload_ps(row.add(8 * j), self.last)
            } else {
                _mm256_loadu_ps(row.add(8 * j))
            }
        }
    }

    /// Writes vector `j` of a row, as far as it is the strip's.
    ///
    /// # Safety
    /// The strip's part of the row must be writable.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn store(&self, row: *mut f32, j: usize, x: __m256) {
        // SAFETY: lanes beyond the strip are not written.
        unsafe {
            if CUT && j == N - 1 {
                _mm256_maskstore_ps(row.add(8 * j), self.last, x);
            } else {
                _mm256_storeu_ps(row.add(8 * j), x);
            }
        }
    }

    /// Zeros, not a factor of zero: an old state may hold anything.
    ///
    /// # Safety
    /// The part must have `n_rows` rows.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn clear(&self, part: &Part, n_rows: usize) {
        for i in 0..n_rows {
            for j in 0..N {
                // SAFETY: rows of the strip.
                unsafe { self.store(part.state.add(i * part.ld), j, _mm256_setzero_ps()) }
            }
        }
    }

    /// `scale * sum` to a row of the output.
    ///
    /// # Safety
    /// The strip's part of the row must be writable.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn put(&self, row: *mut f32, sum: [__m256; N], scale: f32) {
        for j in 0..N {
            // SAFETY: a row of the strip's output.
            unsafe { self.store(row, j, _mm256_mul_ps(sum[j], _mm256_set1_ps(scale))) }
        }
    }
}

/// What becomes of every number of the state: the same operations in the same order, however many
/// tokens its way from memory is shared by.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn step(s: __m256, decay: __m256, k: __m256, write: __m256) -> __m256 {
    _mm256_fmadd_ps(k, write, _mm256_mul_ps(s, decay))
}

/// [`columns`] of the delta rules: what the state holds for the next token's key is summed in the pass
/// that writes this one's.
///
/// # Safety
/// As [`columns`], with at most `N` vectors.
#[target_feature(enable = "avx2,fma")]
unsafe fn replace<const N: usize, const CUT: bool>(
    x: &Inputs<'_>,
    head: usize,
    part: &Part,
    start: usize,
    factors: &[Factors],
) {
    let rows = Rows::new(x, head, part.first);
    let vectors = Vectors::<N, CUT>::new(part.n);
    let dim_k = x.head_dim_k;
    let zero = _mm256_setzero_ps();
    let resets = &x.resets[x.resets.partition_point(|&r| r < start)..];
    let mut resets = resets.iter().copied().peekable();
    let mut held: Option<Halves<N>> = None;
    for (i, token) in factors.iter().enumerate() {
        x.ask();
        let t = start + i;
        let fresh = resets.next_if_eq(&t).is_some();
        let goes_on = N <= STRIP && i + 1 < factors.len() && resets.peek() != Some(&(t + 1));
        let decay = if fresh { 0.0 } else { token.decay };
        let (k, q) = (rows.k(t).as_ptr(), rows.q(t).as_ptr());
        // SAFETY: `dim_k` rows of state, one of `v` and of `out`, all of the strip's width.
        unsafe {
            if fresh {
                vectors.clear(part, dim_k);
            }
            let held_now = match held.take() {
                Some(held) => held,
                None => sum_held(&vectors, part, k, dim_k, i == 0),
            };
            let mut write = [zero; N];
            for j in 0..N {
                let held = _mm256_add_ps(held_now[0][j], held_now[1][j]);
                let held = _mm256_mul_ps(held, _mm256_set1_ps(decay * token.k));
                let error = _mm256_sub_ps(vectors.load(rows.v(t), j), held);
                write[j] = _mm256_mul_ps(error, _mm256_set1_ps(token.beta * token.k));
            }
            let decay = _mm256_set1_ps(decay);
            let sum = if goes_on {
                let k_next = rows.k(t + 1).as_ptr();
                let (sum, held_next) =
                    pass::<N, CUT, true>(&vectors, part, dim_k, (k, q, k_next), decay, write);
                held = Some(held_next);
                sum
            } else {
                pass::<N, CUT, false>(&vectors, part, dim_k, (k, q, k), decay, write).0
            };
            let mut both = [zero; N];
            for j in 0..N {
                both[j] = _mm256_add_ps(sum[0][j], sum[1][j]);
            }
            vectors.put(part.out.add(i * part.ld_out), both, token.q);
        }
    }
}

/// Sums over even and over odd key dimensions.
type Halves<const N: usize> = [[__m256; N]; 2];

/// Writes a token to a strip: `S = decay S + k write^T`. Returns `S^T q` and, for `NEXT`, `S^T k_next`.
///
/// # Safety
/// The strip must have `dim_k` rows, `k`, `q` and `k_next` as many numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn pass<const N: usize, const CUT: bool, const NEXT: bool>(
    vectors: &Vectors<N, CUT>,
    part: &Part,
    dim_k: usize,
    (k, q, k_next): (*const f32, *const f32, *const f32),
    decay: __m256,
    write: [__m256; N],
) -> (Halves<N>, Halves<N>) {
    let mut sum = [[_mm256_setzero_ps(); N]; 2];
    let mut held = sum;
    macro_rules! row {
        ($i:expr, $half:expr) => {
            let row = part.state.add($i * part.ld);
            let (k, q) = (_mm256_set1_ps(*k.add($i)), _mm256_set1_ps(*q.add($i)));
            let k_next = _mm256_set1_ps(*k_next.add($i));
            for j in 0..N {
                let s = step(vectors.load(row, j), decay, k, write[j]);
                vectors.store(row, j, s);
                sum[$half][j] = _mm256_fmadd_ps(q, s, sum[$half][j]);
                if NEXT {
                    held[$half][j] = _mm256_fmadd_ps(k_next, s, held[$half][j]);
                }
            }
        };
    }
    // SAFETY: by the caller's promise.
    unsafe {
        for i in (0..dim_k & !1).step_by(2) {
            row!(i, 0);
            row!(i + 1, 1);
        }
        if dim_k % 2 == 1 {
            row!(dim_k - 1, 0);
        }
    }
    (sum, held)
}

/// `S^T k` of a strip, over even and odd key dimensions. `cold`: later rows are asked for.
///
/// # Safety
/// The strip must have `dim_k` rows, `k` as many numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn sum_held<const N: usize, const CUT: bool>(
    vectors: &Vectors<N, CUT>,
    part: &Part,
    k: *const f32,
    dim_k: usize,
    cold: bool,
) -> Halves<N> {
    let mut held = [[_mm256_setzero_ps(); N]; 2];
    macro_rules! row {
        ($i:expr, $u:expr) => {
            let row = part.state.add($i * part.ld);
            if cold {
                prefetch::<N>(row.wrapping_add(PREFETCH_ROWS * part.ld));
            }
            let k = _mm256_set1_ps(*k.add($i));
            for j in 0..N {
                held[$u][j] = _mm256_fmadd_ps(k, vectors.load(row, j), held[$u][j]);
            }
        };
    }
    // SAFETY: by the caller's promise; a prefetch may be of any address.
    unsafe {
        for i in (0..dim_k & !1).step_by(2) {
            row!(i, 0);
            row!(i + 1, 1);
        }
        if dim_k % 2 == 1 {
            row!(dim_k - 1, 0);
        }
    }
    held
}

/// [`columns`] of Ssd: two tokens in a pass.
///
/// # Safety
/// As [`columns`], with at most `N` vectors.
#[target_feature(enable = "avx2,fma")]
unsafe fn add<const N: usize, const CUT: bool>(
    x: &Inputs<'_>,
    head: usize,
    part: &Part,
    start: usize,
    factors: &[Factors],
) {
    let rows = Rows::new(x, head, part.first);
    let vectors = Vectors::<N, CUT>::new(part.n);
    let (dim_k, state, ld) = (x.head_dim_k, part.state, part.ld);
    let zero = _mm256_setzero_ps();
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
        let (k, q) = (rows.k(t).as_ptr(), rows.q(t).as_ptr());
        // SAFETY: `dim_k` rows of state, one of `v` and of `out`, all of the strip's width.
        unsafe {
            if fresh {
                vectors.clear(part, dim_k);
            }
            let write = |t: usize, token: &Factors| {
                let strength = _mm256_set1_ps(token.beta * token.k);
                let mut write = [zero; N];
                for j in 0..N {
                    write[j] = _mm256_mul_ps(vectors.load(rows.v(t), j), strength);
                }
                write
            };
            let decay = _mm256_set1_ps(if fresh { 0.0 } else { token.decay });
            let written = write(t, token);
            let mut sum = [zero; N];
            let to = part.out.add(done * part.ld_out);
            if let Some(next) = next {
                let (k_next, q_next) = (rows.k(t + 1).as_ptr(), rows.q(t + 1).as_ptr());
                let decay_next = _mm256_set1_ps(next.decay);
                let written_next = write(t + 1, next);
                let mut sum_next = [zero; N];
                for i in 0..dim_k {
                    let row = state.add(i * ld);
                    let (k, q) = (_mm256_set1_ps(*k.add(i)), _mm256_set1_ps(*q.add(i)));
                    let k_next = _mm256_set1_ps(*k_next.add(i));
                    let q_next = _mm256_set1_ps(*q_next.add(i));
                    for j in 0..N {
                        let s = step(vectors.load(row, j), decay, k, written[j]);
                        sum[j] = _mm256_fmadd_ps(q, s, sum[j]);
                        let s = step(s, decay_next, k_next, written_next[j]);
                        vectors.store(row, j, s);
                        sum_next[j] = _mm256_fmadd_ps(q_next, s, sum_next[j]);
                    }
                }
                vectors.put(to, sum, token.q);
                vectors.put(to.add(part.ld_out), sum_next, next.q);
                done += 2;
                continue;
            }
            for i in 0..dim_k {
                let row = state.add(i * ld);
                if done == 0 {
                    prefetch::<N>(row.wrapping_add(PREFETCH_ROWS * ld));
                }
                let (k, q) = (_mm256_set1_ps(*k.add(i)), _mm256_set1_ps(*q.add(i)));
                for j in 0..N {
                    let s = step(vectors.load(row, j), decay, k, written[j]);
                    vectors.store(row, j, s);
                    sum[j] = _mm256_fmadd_ps(q, s, sum[j]);
                }
            }
            vectors.put(to, sum, token.q);
        }
        done += 1;
    }
}

/// Rows that are asked for ahead when the state comes from memory.
const PREFETCH_ROWS: usize = 16;

/// Asks for the strip's part of a later row, which may lie anywhere.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch<const N: usize>(row: *const f32) {
    for line in (0..8 * N).step_by(16) {
        _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(line).cast());
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

/// See [`Product`]: 6 rows by 16 columns at a time in registers.
///
/// # Safety
/// `a`, `b` and `c` must have the shapes it states.
#[target_feature(enable = "avx2,fma")]
unsafe fn product(shape: &Product, a: *const f32, b: *const f32, c: *mut f32) {
    for col in (0..shape.n).step_by(16) {
        let mut row = 0;
        while row < shape.m {
            // SAFETY: blocks within the matrices; `m` is even.
            unsafe {
                let (b, c) = (b.add(col), c.add(row * shape.ldc + col));
                row += match shape.m - row {
                    6.. => block::<6>(shape, row, a, b, c),
                    4.. => block::<4>(shape, row, a, b, c),
                    _ => block::<2>(shape, row, a, b, c),
                };
            }
        }
    }
}

/// `R` rows of a product from `row` on, 16 columns. `c` is theirs. Returns `R`.
///
/// # Safety
/// As [`product`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn block<const R: usize>(
    shape: &Product,
    row: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) -> usize {
    let mut sum = [[_mm256_setzero_ps(); 2]; R];
    // SAFETY: blocks within the matrices.
    unsafe {
        let a = a.add(row * shape.lda);
        if shape.keep != 0.0 {
            let keep = _mm256_set1_ps(shape.keep);
            for r in 0..R {
                for j in 0..2 {
                    let c = _mm256_loadu_ps(c.add(r * shape.ldc + 8 * j));
                    sum[r][j] = _mm256_mul_ps(c, keep);
                }
            }
        }
        for i in 0..shape.depth(row + R) {
            let b = b.add(i * shape.ldb);
            let b = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
            for r in 0..R {
                let a = _mm256_set1_ps(*a.add(r * shape.lda + i));
                sum[r][0] = _mm256_fmadd_ps(a, b[0], sum[r][0]);
                sum[r][1] = _mm256_fmadd_ps(a, b[1], sum[r][1]);
            }
        }
        for r in 0..R {
            for j in 0..2 {
                _mm256_storeu_ps(c.add(r * shape.ldc + 8 * j), sum[r][j]);
            }
        }
    }
    R
}
