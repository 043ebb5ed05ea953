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

mod ahead;
pub(crate) mod chunk;
mod numbers;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) mod strips;

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
use crate::split::SplitMut;
use ahead::Ahead;
pub use numbers::Numbers;
use numbers::{PIECE, Stored, Widened};
use std::cell::Cell;
use std::ops::Range;

/// Most tokens in a chunk of the chunked form.
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
    pub q: Numbers<'a>,
    /// Keys, `[n_tokens, n_head_k, head_dim_k]`, not yet normalised.
    pub k: Numbers<'a>,
    /// Values, `[n_tokens, n_head_k, head_dim_v]`.
    pub v: Numbers<'a>,
    /// Log decay, at most 0, `[n_tokens, n_head]`; empty for [`Rule::Delta`].
    pub g: Numbers<'a>,
    /// Write strength, `[n_tokens, n_head]`; Mamba2's delta for [`Rule::Ssd`].
    pub beta: Numbers<'a>,
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
/// also divided by `sqrt(head_dim_k)`. Ssd: `z / max(|z|, 1e-12)`, no further scale. Inputs of 16
/// bits give the same bits as the same numbers in F32.
///
/// # Panics
/// If shapes do not fit together or `resets` does not ascend.
pub fn recur(pool: &Pool, form: Form, seqs: &mut [Recur<'_>]) {
    recur_with(dispatch::best(), pool, form, seqs);
}

/// [`recur`] with a chosen instruction set, which must be [`dispatch::available`]. The scalar set
/// has the recurrent form only and uses it for [`Form::Chunked`] too.
pub fn recur_with(isa: Isa, pool: &Pool, form: Form, seqs: &mut [Recur<'_>]) {
    let kernels = cpu::recur(isa);
    let chunked = |n_tokens: usize| match form {
        Form::Recurrent => false,
        Form::Chunked => true,
        Form::Auto => n_tokens >= kernels.chunked_from,
    };
    let together = |n_tokens: usize| match kernels.chunked {
        Chunked::Heads(_, most) if chunked(n_tokens) => most,
        _ if n_tokens >= GATHER_FROM => GATHER_HEADS,
        _ => 1,
    };
    let all: usize = seqs.iter().map(|seq| seq.n_head).sum();
    let mut heads = Vec::new();
    let inputs: Vec<(Stored<'_>, SplitMut<'_, f32>, SplitMut<'_, f32>)> = seqs
        .iter_mut()
        .enumerate()
        .map(|(i, seq)| {
            check(seq);
            // Together, but with some pieces for every thread.
            let together = together(seq.n_tokens)
                .min(all / (2 * pool.n_threads()))
                .max(1);
            for first in (0..seq.n_head).step_by(together) {
                heads.push((i, first..seq.n_head.min(first + together)));
            }
            (
                Stored::new(seq),
                SplitMut::new(&mut *seq.state),
                SplitMut::new(&mut *seq.out),
            )
        })
        .collect();
    // Each thread goes through states that lie beside each other, and finds those of the last call in its cache.
    pool.for_each_in_parts(heads.len(), 1, |range| {
        for (seq, heads) in &heads[range] {
            let (stored, state, out) = &inputs[*seq];
            if stored.n_tokens == 0 || stored.head_dim_v == 0 {
                continue;
            }
            let len = stored.head_dim_k * stored.head_dim_v;
            let first = heads.start * stored.head_dim_v;
            // SAFETY: a head is claimed once; its state and its rows of `out`, one in `n_head`
            // from its own first row on, are its own. The instruction set is available.
            let (state, out) = unsafe {
                let state = state.part(heads.start * len..heads.end * len);
                (state, out.part(first..first).as_mut_ptr())
            };
            let run = |x: &Inputs<'_>, heads: Range<usize>, state: &mut [f32], out: *mut f32| {
                // SAFETY: as above; pieces of a sequence follow each other.
                unsafe {
                    match kernels.chunked {
                        Chunked::Heads(run, _) if chunked(stored.n_tokens) => {
                            run(x, heads, state, out);
                        }
                        Chunked::Head(run) if chunked(stored.n_tokens) => {
                            run(x, heads.start, state, out);
                        }
                        _ => (kernels.recurrent)(x, heads.start, state, out),
                    }
                }
            };
            // A form that takes several heads sees to that itself.
            let heads_at_once =
                matches!(kernels.chunked, Chunked::Heads(..)) && chunked(stored.n_tokens);
            let gathered = !heads_at_once && stored.n_tokens >= GATHER_FROM;
            if let Some(x) = stored.as_f32().filter(|_| !gathered) {
                run(&x, heads.clone(), state, out);
                continue;
            }
            for start in (0..stored.n_tokens).step_by(PIECE) {
                let tokens = start..stored.n_tokens.min(start + PIECE);
                let out = out.wrapping_add(start * stored.n_head * stored.head_dim_v);
                let together = if gathered { 1 } else { heads.len() };
                for first in (0..heads.len()).step_by(together) {
                    let some = heads.start + first..heads.start + first + together;
                    let out = out.wrapping_add(first * stored.head_dim_v);
                    // The next head's rows of these tokens, or the first head's of the next.
                    let (next, then) = if first + together < heads.len() {
                        (some.end, tokens.clone())
                    } else {
                        let end = stored.n_tokens.min(tokens.end + PIECE);
                        (heads.start, tokens.end..end)
                    };
                    let ahead = gathered.then(|| Ahead {
                        stored,
                        head: next,
                        tokens: then,
                        out,
                        n_rows: tokens.len(),
                        asked: Cell::new(0),
                    });
                    Widened::with(stored, some, tokens.clone(), |x| {
                        let x = &Inputs {
                            ahead: ahead.as_ref(),
                            ..*x
                        };
                        let state = &mut state[first * len..][..together * len];
                        run(x, 0..together, state, out);
                    });
                }
            }
        }
    });
}

/// Tokens from which on forms that work on a head at a time take [`GATHER_HEADS`] heads through a piece of
/// the tokens before the next piece, and each from a copy of its rows: where they lie, a page apart,
/// translating their addresses for every head anew costs as much as the arithmetic, and they all share
/// a few sets of every cache.
const GATHER_FROM: usize = 16;
/// Heads that share the pages of their rows.
const GATHER_HEADS: usize = 8;

/// One head over all tokens: inputs, head, its state, its row of the first token's output. Rows
/// are `out_stride` numbers apart.
pub(crate) type RunHead = unsafe fn(&Inputs<'_>, usize, &mut [f32], *mut f32);

/// Some heads over all tokens: [`RunHead`] with a range of heads and all their states; the row is
/// the first one's.
pub(crate) type RunHeads = unsafe fn(&Inputs<'_>, Range<usize>, &mut [f32], *mut f32);

/// The chunked form, by the heads a call takes.
#[derive(Clone, Copy)]
pub(crate) enum Chunked {
    Head(RunHead),
    /// Up to so many heads go faster together.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(
            dead_code,
            reason = "only the form on AMX is so fast that pages matter"
        )
    )]
    Heads(RunHeads, usize),
}

/// The two forms of an instruction set.
pub(crate) struct HeadKernels {
    pub(crate) recurrent: RunHead,
    pub(crate) chunked: Chunked,
    /// Tokens from which on the chunked form is the faster one.
    pub(crate) chunked_from: usize,
}

/// `1 / |z|` as the rule defines it. In 16 sums, so that it becomes vector code in each
/// instruction set's caller.
#[inline(always)]
pub(crate) fn inverse_norm(rule: Rule, z: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (whole, rest) = z.as_chunks::<16>();
    for z in whole {
        for i in 0..16 {
            sums[i] += z[i] * z[i];
        }
    }
    let mut squares = 0.0;
    for z in rest {
        squares += z * z;
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    squares += sums[0];
    match rule {
        Rule::Ssd => 1.0 / squares.sqrt().max(1e-12),
        Rule::GatedDelta | Rule::Delta => 1.0 / (squares + 1e-6).sqrt(),
    }
}

/// What a key and a query are multiplied by besides [`inverse_norm`].
#[inline(always)]
pub(crate) fn further_scales(x: &Inputs<'_>) -> (f32, f32) {
    match x.rule {
        Rule::Ssd => (1.0, 1.0),
        Rule::GatedDelta | Rule::Delta => (1.0, 1.0 / (x.head_dim_k as f32).sqrt()),
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
    /// Numbers from a token's row of the output to the next token's.
    pub(crate) out_stride: usize,
    /// What to ask for meanwhile.
    pub(crate) ahead: Option<&'a Ahead<'a>>,
}

impl Inputs<'_> {
    /// [`Ahead::ask`], if there is anything to ask for.
    #[inline(always)]
    pub(crate) fn ask(&self) {
        if let Some(ahead) = self.ahead {
            ahead.ask();
        }
    }
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
