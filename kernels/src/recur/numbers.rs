//! Inputs of 16 bits: the rows of a few heads become F32 on their way in, so that every kernel is
//! written once, for F32.

use super::chunk::prefetch;
use super::{CHUNK, Inputs, Recur, Rule};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::cell::RefCell;
use std::ops::Range;

/// Tokens that are converted at a time: whole chunks, so that cuts between pieces change nothing,
/// and few enough that their rows stay in the L2 cache.
pub(super) const PIECE: usize = 2 * CHUNK;

/// Tokens whose rows, which may lie far apart, are asked for ahead.
const AHEAD: usize = 8;

/// Numbers as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// IEEE half.
    F16(&'a [f16]),
    /// The upper half of a single.
    BF16(&'a [bf16]),
}

impl<'a> Numbers<'a> {
    /// How many there are.
    pub fn len(self) -> usize {
        match self {
            Numbers::F32(x) => x.len(),
            Numbers::F16(x) => x.len(),
            Numbers::BF16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    fn as_f32(self) -> Option<&'a [f32]> {
        match self {
            Numbers::F32(x) => Some(x),
            Numbers::F16(_) | Numbers::BF16(_) => None,
        }
    }

    /// Asks for the cache lines of `n` of them from `first` on.
    fn fetch(self, first: usize, n: usize) {
        match self {
            Numbers::F32(x) => prefetch(x, first, n),
            Numbers::F16(x) => prefetch(x, first, n),
            Numbers::BF16(x) => prefetch(x, first, n),
        }
    }

    /// Appends some of them to `to`.
    fn append(self, range: Range<usize>, to: &mut Vec<f32>) {
        let first = to.len();
        to.resize(first + range.len(), 0.0);
        match self {
            Numbers::F32(x) => to[first..].copy_from_slice(&x[range]),
            Numbers::F16(x) => x[range].convert_to_f32_slice(&mut to[first..]),
            Numbers::BF16(x) => x[range].convert_to_f32_slice(&mut to[first..]),
        }
    }
}

/// A [`Recur`] without what is written, which threads share.
pub(super) struct Stored<'a> {
    rule: Rule,
    pub(super) n_tokens: usize,
    pub(super) n_head: usize,
    n_head_k: usize,
    pub(super) head_dim_k: usize,
    pub(super) head_dim_v: usize,
    q: Numbers<'a>,
    k: Numbers<'a>,
    v: Numbers<'a>,
    g: Numbers<'a>,
    beta: Numbers<'a>,
    resets: &'a [usize],
}

impl<'a> Stored<'a> {
    pub(super) fn new(seq: &Recur<'a>) -> Stored<'a> {
        Stored {
            rule: seq.rule,
            n_tokens: seq.n_tokens,
            n_head: seq.n_head,
            n_head_k: seq.n_head_k,
            head_dim_k: seq.head_dim_k,
            head_dim_v: seq.head_dim_v,
            q: seq.q,
            k: seq.k,
            v: seq.v,
            g: seq.g,
            beta: seq.beta,
            resets: seq.resets,
        }
    }

    /// The inputs as they are, if all are F32.
    pub(super) fn as_f32(&self) -> Option<Inputs<'a>> {
        Some(Inputs {
            rule: self.rule,
            n_tokens: self.n_tokens,
            n_head: self.n_head,
            n_head_k: self.n_head_k,
            head_dim_k: self.head_dim_k,
            head_dim_v: self.head_dim_v,
            q: self.q.as_f32()?,
            k: self.k.as_f32()?,
            v: self.v.as_f32()?,
            g: self.g.as_f32()?,
            beta: self.beta.as_f32()?,
            resets: self.resets,
            out_stride: self.n_head * self.head_dim_v,
            ahead: None,
        })
    }

    /// Asks for a token's rows of a head, for the L2 cache.
    pub(super) fn fetch(&self, head: usize, t: usize) {
        let (dim_k, dim_v) = (self.head_dim_k, self.head_dim_v);
        self.q.fetch((t * self.n_head + head) * dim_k, dim_k);
        let at = t * self.n_head_k + head / (self.n_head / self.n_head_k);
        self.k.fetch(at * dim_k, dim_k);
        self.v.fetch(at * dim_v, dim_v);
    }
}

/// Memory of a thread: some heads' tokens as F32, in the order of [`Inputs`].
#[derive(Default)]
pub(super) struct Widened {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    resets: Vec<usize>,
}

thread_local! {
    static WIDENED: RefCell<Widened> = RefCell::new(Widened::default());
}

impl Widened {
    /// Calls `f` with `tokens` of `heads` as a sequence of its own, each head with a key head.
    pub(super) fn with(
        x: &Stored<'_>,
        heads: Range<usize>,
        tokens: Range<usize>,
        f: impl FnOnce(&Inputs<'_>),
    ) {
        WIDENED.with_borrow_mut(|w| {
            for to in [&mut w.q, &mut w.k, &mut w.v, &mut w.g, &mut w.beta] {
                to.clear();
            }
            let group = x.n_head / x.n_head_k;
            let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
            for t in tokens.clone() {
                if t + AHEAD < tokens.end {
                    let own = (t + AHEAD) * x.n_head + heads.start;
                    x.q.fetch(own * dim_k, heads.len() * dim_k);
                    let at = (t + AHEAD) * x.n_head_k + heads.start / group;
                    let n = (heads.end - 1) / group + 1 - heads.start / group;
                    x.k.fetch(at * dim_k, n * dim_k);
                    x.v.fetch(at * dim_v, n * dim_v);
                }
                let own = t * x.n_head + heads.start..t * x.n_head + heads.end;
                x.q.append(own.start * dim_k..own.end * dim_k, &mut w.q);
                x.beta.append(own.clone(), &mut w.beta);
                if x.rule != Rule::Delta {
                    x.g.append(own, &mut w.g);
                }
                for head in heads.clone() {
                    let at = t * x.n_head_k + head / group;
                    x.k.append(at * dim_k..(at + 1) * dim_k, &mut w.k);
                    x.v.append(at * dim_v..(at + 1) * dim_v, &mut w.v);
                }
            }
            let resets = x.resets.iter().filter(|r| tokens.contains(r));
            w.resets.clear();
            w.resets.extend(resets.map(|r| r - tokens.start));
            f(&Inputs {
                rule: x.rule,
                n_tokens: tokens.len(),
                n_head: heads.len(),
                n_head_k: heads.len(),
                head_dim_k: dim_k,
                head_dim_v: dim_v,
                q: &w.q,
                k: &w.k,
                v: &w.v,
                g: &w.g,
                beta: &w.beta,
                resets: &w.resets,
                out_stride: x.n_head * dim_v,
                ahead: None,
            });
        });
    }
}
