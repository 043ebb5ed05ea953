//! The recurrent form strip by strip: some columns of a head's state go through many tokens while a
//! fast cache holds them, then the next columns. The arithmetic of a strip is the instruction set's.

use super::chunk::{self, prefetch, prefetch_to_write};
use super::{Inputs, Rule, further_scales, inverse_norm};
use crate::mul_mat::buffer::Buffer;
use std::cell::RefCell;
use std::ops::Range;

/// Tokens that a strip goes through before the next strip does: few enough that their keys and
/// queries, once read, stay in the L2 cache.
const PIECE: usize = 128;
/// Tokens whose rows, which lie far apart, are asked for ahead.
const AHEAD: usize = 8;
/// Tokens from which on copying a strip of the state pays.
const COMPACT_FROM: usize = 4;

/// Columns of a strip.
pub(crate) struct Widths {
    /// With up to 128 key dimensions.
    pub(crate) many: usize,
    /// With more.
    pub(crate) many_large: usize,
    /// For a few tokens: most of the time goes into fetching the state.
    pub(crate) few: usize,
}

/// What a token's numbers are multiplied by.
pub(crate) struct Factors {
    /// The key, and the query.
    pub(crate) k: f32,
    pub(crate) q: f32,
    /// Write strength.
    pub(crate) beta: f32,
    /// What is left of the state.
    pub(crate) decay: f32,
}

/// `n` columns of a head's state, from `first` on: rows are `ld` apart.
pub(crate) struct Part {
    pub(crate) first: usize,
    pub(crate) n: usize,
    pub(crate) state: *mut f32,
    pub(crate) ld: usize,
    /// The same columns of the output, the first of the tokens first: rows are `ld_out` apart.
    pub(crate) out: *mut f32,
    pub(crate) ld_out: usize,
}

impl Part {
    /// The first `at` columns and the others.
    pub(crate) fn split(&self, at: usize) -> (Part, Part) {
        let left = Part { n: at, ..*self };
        let right = Part {
            first: self.first + at,
            n: self.n - at,
            state: self.state.wrapping_add(at),
            out: self.out.wrapping_add(at),
            ..*self
        };
        (left, right)
    }
}

/// Where the rows of a head's tokens lie, and a strip's part of its values.
pub(crate) struct Rows<'a> {
    x: &'a Inputs<'a>,
    head: usize,
    head_k: usize,
    first: usize,
}

impl<'a> Rows<'a> {
    /// Of a head, and the strip from column `first` on.
    #[inline(always)]
    pub(crate) fn new(x: &'a Inputs<'a>, head: usize, first: usize) -> Self {
        let head_k = head / (x.n_head / x.n_head_k);
        Rows {
            x,
            head,
            head_k,
            first,
        }
    }

    /// Token `t`'s query.
    #[inline(always)]
    pub(crate) fn q(&self, t: usize) -> &'a [f32] {
        let dim = self.x.head_dim_k;
        &self.x.q[(t * self.x.n_head + self.head) * dim..][..dim]
    }

    /// Token `t`'s key.
    #[inline(always)]
    pub(crate) fn k(&self, t: usize) -> &'a [f32] {
        let dim = self.x.head_dim_k;
        &self.x.k[(t * self.x.n_head_k + self.head_k) * dim..][..dim]
    }

    /// The strip's columns of token `t`'s value.
    #[inline(always)]
    pub(crate) fn v(&self, t: usize) -> *const f32 {
        let dim = self.x.head_dim_v;
        self.x.v[(t * self.x.n_head_k + self.head_k) * dim..][self.first..dim].as_ptr()
    }
}

/// Memory of a thread.
struct Work {
    factors: Vec<Factors>,
    strip: Buffer,
    out: Buffer,
}

thread_local! {
    static WORK: RefCell<Option<Box<Work>>> = const { RefCell::new(None) };
}

impl Work {
    fn new() -> Work {
        Work {
            factors: Vec::new(),
            strip: Buffer::zeroed(0),
            out: Buffer::zeroed(0),
        }
    }
}

/// One head through all tokens. `columns` takes a part of the state through the tokens from the given
/// one on, one for each of the factors.
///
/// # Safety
/// `state` must be a head's, `out` its first row; rows are `out_stride` apart. `columns` must stay
/// within the part.
#[inline(always)]
pub(crate) unsafe fn recurrent(
    x: &Inputs<'_>,
    head: usize,
    state: &mut [f32],
    out: *mut f32,
    widths: &Widths,
    mut columns: impl FnMut(&Part, usize, &[Factors]),
) {
    // Taken out, not borrowed: code in a closure would not be compiled for this caller's vectors.
    let mut work = WORK.take().unwrap_or_else(|| Box::new(Work::new()));
    for start in (0..x.n_tokens).step_by(PIECE) {
        let tokens = start..x.n_tokens.min(start + PIECE);
        factors(x, head, tokens.clone(), &mut work.factors);
        // SAFETY: passed on.
        unsafe {
            piece(x, tokens, state, out, widths, &mut work, &mut columns);
        }
    }
    WORK.set(Some(work));
}

/// The factors of some tokens; rows of those after them are asked for.
#[inline(always)]
fn factors(x: &Inputs<'_>, head: usize, tokens: Range<usize>, factors: &mut Vec<Factors>) {
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let head_k = head / (x.n_head / x.n_head_k);
    let (further_k, further_q) = further_scales(x);
    factors.clear();
    for t in tokens {
        if t + AHEAD < x.n_tokens {
            let at = (t + AHEAD) * x.n_head_k + head_k;
            prefetch(x.k, at * dim_k, dim_k);
            prefetch(x.v, at * dim_v, dim_v);
            prefetch(x.q, ((t + AHEAD) * x.n_head + head) * dim_k, dim_k);
        }
        let k = &x.k[(t * x.n_head_k + head_k) * dim_k..][..dim_k];
        let q = &x.q[(t * x.n_head + head) * dim_k..][..dim_k];
        factors.push(Factors {
            k: inverse_norm(x.rule, k) * further_k,
            q: inverse_norm(x.rule, q) * further_q,
            beta: x.beta[t * x.n_head + head],
            decay: match x.rule {
                Rule::Delta => 1.0,
                _ => chunk::exp(x.g[t * x.n_head + head]),
            },
        });
    }
}

/// Some tokens of [`recurrent`], whose factors are in `work`.
///
/// # Safety
/// As [`recurrent`].
#[inline(always)]
unsafe fn piece(
    x: &Inputs<'_>,
    tokens: Range<usize>,
    state: &mut [f32],
    out: *mut f32,
    widths: &Widths,
    work: &mut Work,
    columns: &mut impl FnMut(&Part, usize, &[Factors]),
) {
    let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
    let many = tokens.len() >= COMPACT_FROM;
    let width = match dim_k {
        _ if !many => widths.few,
        129.. => widths.many_large,
        _ => widths.many,
    };
    // Over many tokens a strip is worked on in one piece: with its rows a power of two apart it
    // would use half of the L1 cache's sets and be thrown out of the other half. So is the output: a
    // store that misses the caches holds up all stores after it.
    let compact = many && dim_v > width;
    let ld_out = if many { dim_v } else { x.out_stride };
    let first_out = if many {
        work.out.reserve(tokens.len() * dim_v * size_of::<f32>());
        work.out.as_mut_ptr().cast()
    } else {
        // Within the head's own rows, by the caller's promise.
        out.wrapping_add(tokens.start * x.out_stride)
    };
    for first in (0..dim_v).step_by(width) {
        let n = (dim_v - first).min(width);
        let mut part = Part {
            first,
            n,
            state: state[first..].as_mut_ptr(),
            ld: dim_v,
            out: first_out.wrapping_add(first),
            ld_out,
        };
        if !compact {
            columns(&part, tokens.start, &work.factors);
            continue;
        }
        work.strip.reserve(dim_k * width * size_of::<f32>());
        let strip = work.strip.as_mut_ptr().cast::<f32>();
        for i in 0..dim_k {
            let row = state[i * dim_v + first..][..n].as_ptr();
            // SAFETY: the strip has `dim_k` rows of `width` numbers.
            unsafe { strip.add(i * width).copy_from_nonoverlapping(row, n) }
        }
        part.state = strip;
        part.ld = width;
        columns(&part, tokens.start, &work.factors);
        for i in 0..dim_k {
            let row = state[i * dim_v + first..][..n].as_mut_ptr();
            // SAFETY: as above.
            unsafe { row.copy_from_nonoverlapping(strip.add(i * width), n) }
        }
    }
    if many {
        for t in 0..tokens.len() {
            let to = out.wrapping_add((tokens.start + t) * x.out_stride);
            prefetch_to_write(to.wrapping_add(AHEAD * x.out_stride), dim_v);
            // SAFETY: a row of `out`, by the caller's promise.
            unsafe { to.copy_from_nonoverlapping(first_out.add(t * dim_v), dim_v) }
        }
    }
}
