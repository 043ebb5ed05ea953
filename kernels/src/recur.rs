//! Recurrent memories of fixed size: the gated delta rule and its siblings.
//!
//! One state `S` of `[head_dim_k, head_dim_v]` per head. With `k`, `q` normalised, `a = exp(g)`:
//!
//! - gated delta (Yang et al., arXiv 2412.06464): `S = a S`; `S += beta k (v - S^T k)^T`;
//! - delta (arXiv 2406.06484): the same with `a = 1`;
//! - Ssd (Mamba2, arXiv 2405.21060): `S = a S + beta k v^T`;
//!
//! then `out = S^T q`, after the write. Two forms: token by token, and in chunks of
//! [`CHUNK`] tokens whose inside is matrix products.

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
use crate::split::SplitMut;

/// Tokens in a chunk of the chunked form.
pub const CHUNK: usize = 64;

/// How a token changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Decay, then replace what the state holds for this key.
    GatedDelta,
    /// Replace without decay.
    Delta,
    /// Decay, then add (Mamba2).
    Ssd,
}

/// The tokens and the state of one sequence.
pub struct Recur<'a> {
    /// Update rule.
    pub rule: Rule,
    /// Tokens.
    pub n_tokens: usize,
    /// Query heads, and states.
    pub n_head: usize,
    /// Key and value heads; head `h` uses `h / (n_head / n_head_k)`.
    pub n_head_k: usize,
    /// Dimensions of a query and a key.
    pub head_dim_k: usize,
    /// Dimensions of a value.
    pub head_dim_v: usize,
    /// Queries, `[n_tokens, n_head, head_dim_k]`, not yet normalised.
    pub q: &'a [f32],
    /// Keys, `[n_tokens, n_head_k, head_dim_k]`, not yet normalised.
    pub k: &'a [f32],
    /// Values, `[n_tokens, n_head_k, head_dim_v]`.
    pub v: &'a [f32],
    /// Log decay, at most 0, `[n_tokens, n_head]`; empty for [`Rule::Delta`].
    pub g: &'a [f32],
    /// Write strength, `[n_tokens, n_head]`; Mamba2's delta for [`Rule::Ssd`].
    pub beta: &'a [f32],
    /// Ascending token positions before which the state starts anew from zero.
    pub resets: &'a [usize],
    /// State `S[k index, v index]`, `[n_head, head_dim_k, head_dim_v]`; in: before the first
    /// token, out: after the last.
    pub state: &'a mut [f32],
    /// Result, `[n_tokens, n_head, head_dim_v]`; written whole.
    pub out: &'a mut [f32],
}

/// How the recurrence is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Token by token. Invariant to how the tokens are split over calls, to the last bit.
    Recurrent,
    /// Chunks of [`CHUNK`] tokens; differs from the recurrent form by rounding.
    Chunked,
    /// The faster one for the number of tokens.
    Auto,
}

/// Runs the recurrence of every sequence in `seqs`, all heads side by side.
///
/// `q` and `k` are normalised inside. Gated delta and delta: `z / sqrt(sum z^2 + 1e-6)`, and `q`
/// also divided by `sqrt(head_dim_k)`. Ssd: `z / max(|z|, 1e-12)`, no further scale.
///
/// # Panics
/// If shapes do not fit together or `resets` does not ascend.
pub fn recur(pool: &Pool, form: Form, seqs: &mut [Recur<'_>]) {
    recur_with(dispatch::best(), pool, form, seqs);
}

/// [`recur`] with a chosen instruction set, which must be [`dispatch::available`]. The scalar set
/// has the recurrent form only and uses it for [`Form::Chunked`] too.
pub fn recur_with(isa: Isa, pool: &Pool, form: Form, seqs: &mut [Recur<'_>]) {
    cpu::check(isa);
    let _ = form;
    for seq in seqs {
        check(seq);
        let state_len = seq.head_dim_k * seq.head_dim_v;
        let state = SplitMut::new(&mut *seq.state);
        let out = SplitMut::new(&mut *seq.out);
        let (n_tokens, n_head, dim_v) = (seq.n_tokens, seq.n_head, seq.head_dim_v);
        let inputs = Inputs {
            rule: seq.rule,
            n_tokens,
            n_head,
            n_head_k: seq.n_head_k,
            head_dim_k: seq.head_dim_k,
            head_dim_v: dim_v,
            q: seq.q,
            k: seq.k,
            v: seq.v,
            g: seq.g,
            beta: seq.beta,
            resets: seq.resets,
        };
        pool.for_each(n_head, 1, |heads| {
            for head in heads {
                // SAFETY: a head is claimed once; its state and its rows of `out` are its own.
                unsafe {
                    let state = state.part(head * state_len..(head + 1) * state_len);
                    cpu::scalar::recur::recur(&inputs, head, state, |t| {
                        let first = (t * n_head + head) * dim_v;
                        out.part(first..first + dim_v)
                    });
                }
            }
        });
    }
}

/// The read-only part of [`Recur`], which threads share.
pub(crate) struct Inputs<'a> {
    pub(crate) rule: Rule,
    pub(crate) n_tokens: usize,
    pub(crate) n_head: usize,
    pub(crate) n_head_k: usize,
    pub(crate) head_dim_k: usize,
    pub(crate) head_dim_v: usize,
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    pub(crate) g: &'a [f32],
    pub(crate) beta: &'a [f32],
    pub(crate) resets: &'a [usize],
}

fn check(seq: &Recur<'_>) {
    let (n, heads, heads_k) = (seq.n_tokens, seq.n_head, seq.n_head_k);
    assert!(
        heads_k > 0 && heads > 0 && heads.is_multiple_of(heads_k),
        "recur: {heads} heads on {heads_k} key heads"
    );
    let (dim_k, dim_v) = (seq.head_dim_k, seq.head_dim_v);
    assert_eq!(seq.q.len(), n * heads * dim_k, "recur: numbers in q");
    assert_eq!(seq.k.len(), n * heads_k * dim_k, "recur: numbers in k");
    assert_eq!(seq.v.len(), n * heads_k * dim_v, "recur: numbers in v");
    let n_g = if seq.rule == Rule::Delta {
        0
    } else {
        n * heads
    };
    assert_eq!(seq.g.len(), n_g, "recur: numbers in g");
    assert_eq!(seq.beta.len(), n * heads, "recur: numbers in beta");
    assert_eq!(
        seq.state.len(),
        heads * dim_k * dim_v,
        "recur: numbers in state"
    );
    assert_eq!(seq.out.len(), n * heads * dim_v, "recur: numbers in out");
    assert!(
        seq.resets.windows(2).all(|w| w[0] < w[1]),
        "recur: resets do not ascend"
    );
}
