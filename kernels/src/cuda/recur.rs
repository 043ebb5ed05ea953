//! Recurrent memories of fixed size on the device; see [`crate::recur`].

use super::device::Shape;
use super::{Device, Error, View, ViewMut};
pub use crate::recur::{Form, Rule};

/// Sequences of one launch.
const MAX_SEQUENCES: usize = 16;
/// Columns of the state that a block holds.
const COLUMNS: usize = 32;
/// Most dimensions of a key.
pub const MAX_DIM_K: usize = 256;

/// The tokens and the state of one sequence, as [`crate::recur::Recur`].
pub struct Recur<'a> {
    /// Update rule.
    pub rule: Rule,
    /// Tokens.
    pub n_tokens: usize,
    /// Query heads, and states.
    pub n_head: usize,
    /// Key and value heads; head `h` uses `h / (n_head / n_head_k)`.
    pub n_head_k: usize,
    /// Dimensions of a query and a key, at most [`MAX_DIM_K`].
    pub head_dim_k: usize,
    /// Dimensions of a value.
    pub head_dim_v: usize,
    /// Queries, not yet normalised: `[n_head, head_dim_k]` for each token.
    pub q: View<'a, f32>,
    /// Keys, not yet normalised: `[n_head_k, head_dim_k]` for each token.
    pub k: View<'a, f32>,
    /// Values: `[n_head_k, head_dim_v]` for each token.
    pub v: View<'a, f32>,
    /// Numbers from one token's queries to the next one's; 0: they lie side by side.
    pub q_stride: usize,
    /// The same of keys.
    pub k_stride: usize,
    /// The same of values.
    pub v_stride: usize,
    /// Log decay, at most 0, `[n_tokens, n_head]`; `None` for [`Rule::Delta`].
    pub g: Option<View<'a, f32>>,
    /// Write strength, `[n_tokens, n_head]`.
    pub beta: View<'a, f32>,
    /// `[n_tokens]`: where not zero, the state starts anew from zero before the token.
    pub resets: Option<View<'a, u32>>,
    /// State `[n_head, head_dim_k, head_dim_v]`; in: before the first token, out: after the last.
    pub state: ViewMut<'a, f32>,
    /// Result, `[n_tokens, n_head, head_dim_v]`; written whole.
    pub out: ViewMut<'a, f32>,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sequence {
    q: u64,
    k: u64,
    v: u64,
    g: u64,
    beta: u64,
    resets: u64,
    state: u64,
    out: u64,
    q_stride: u64,
    k_stride: u64,
    v_stride: u64,
    n_tokens: i32,
    n_head: i32,
    n_head_k: i32,
    dim_k: i32,
    dim_v: i32,
    rule: i32,
    first: i32,
    unused: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    sequences: [Sequence; MAX_SEQUENCES],
    n_sequences: i32,
}

/// Runs the recurrence of every sequence in `seqs`, all heads and columns side by side.
///
/// Normalisation is that of [`crate::recur::recur`]. The device has the form token by token only
/// and uses it whatever `form` says, so results have the same bits however tokens are split over
/// calls.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If shapes do not fit together.
pub fn recur(dev: &Device, _form: Form, seqs: &mut [Recur<'_>]) -> Result<(), Error> {
    seqs.iter().for_each(check);
    for dim in [64, 128, MAX_DIM_K] {
        let of_dim = |s: &&Recur<'_>| {
            let padded = s.head_dim_k.next_power_of_two().max(64);
            padded == dim && s.n_tokens > 0 && s.head_dim_v > 0
        };
        let mut all: Vec<Sequence> = seqs
            .iter()
            .filter(of_dim)
            .map(|s| describe(dev, s))
            .collect();
        for seqs in all.chunks_mut(MAX_SEQUENCES) {
            let mut args = Args {
                sequences: [Sequence::default(); MAX_SEQUENCES],
                n_sequences: seqs.len() as i32,
            };
            let mut n_blocks = 0;
            for (to, seq) in args.sequences.iter_mut().zip(seqs.iter_mut()) {
                seq.first = n_blocks;
                n_blocks += seq.n_head * (seq.dim_v as usize).div_ceil(COLUMNS) as i32;
                *to = *seq;
            }
            let kernel = match dim {
                64 => "recur_64",
                128 => "recur_128",
                _ => "recur_256",
            };
            // SAFETY: the struct is the kernel's, lengths are checked above.
            unsafe { dev.launch(kernel, Shape::row(n_blocks as u32, 256), &args)? };
        }
    }
    Ok(())
}

fn describe(dev: &Device, s: &Recur<'_>) -> Sequence {
    let dense = |stride: usize, dense: usize| (if stride == 0 { dense } else { stride }) as u64;
    Sequence {
        q: dev.input(&s.q),
        k: dev.input(&s.k),
        v: dev.input(&s.v),
        g: s.g.as_ref().map_or(0, |g| dev.input(g)),
        beta: dev.input(&s.beta),
        resets: s.resets.as_ref().map_or(0, |r| dev.input(r)),
        state: dev.output(&s.state),
        out: dev.output(&s.out),
        q_stride: dense(s.q_stride, s.n_head * s.head_dim_k),
        k_stride: dense(s.k_stride, s.n_head_k * s.head_dim_k),
        v_stride: dense(s.v_stride, s.n_head_k * s.head_dim_v),
        n_tokens: s.n_tokens as i32,
        n_head: s.n_head as i32,
        n_head_k: s.n_head_k as i32,
        dim_k: s.head_dim_k as i32,
        dim_v: s.head_dim_v as i32,
        rule: match s.rule {
            Rule::GatedDelta => 0,
            Rule::Delta => 1,
            Rule::Ssd => 2,
        },
        first: 0,
        unused: 0,
    }
}

fn check(s: &Recur<'_>) {
    let (n, heads, heads_k) = (s.n_tokens, s.n_head, s.n_head_k);
    assert!(
        heads_k > 0 && heads > 0 && heads.is_multiple_of(heads_k),
        "recur: {heads} heads on {heads_k} key heads"
    );
    let (dim_k, dim_v) = (s.head_dim_k, s.head_dim_v);
    assert!(
        (1..=MAX_DIM_K).contains(&dim_k),
        "recur: keys of {dim_k} dimensions; the device takes 1 to {MAX_DIM_K}"
    );
    let rows = |name: &str, len: usize, stride: usize, row: usize| {
        if stride == 0 {
            assert_eq!(len, n * row, "recur: numbers in {name}");
        } else {
            assert!(
                stride >= row && (n == 0 || len >= (n - 1) * stride + row),
                "recur: {len} numbers in {name} for {n} rows of {row}, {stride} apart"
            );
        }
    };
    rows("q", s.q.len(), s.q_stride, heads * dim_k);
    rows("k", s.k.len(), s.k_stride, heads_k * dim_k);
    rows("v", s.v.len(), s.v_stride, heads_k * dim_v);
    match (&s.g, s.rule) {
        (None, Rule::Delta) => {}
        (Some(g), Rule::GatedDelta | Rule::Ssd) => {
            assert_eq!(g.len(), n * heads, "recur: numbers in g");
        }
        _ => panic!("recur: g is for the rules that decay, and needed there"),
    }
    assert_eq!(s.beta.len(), n * heads, "recur: numbers in beta");
    if let Some(resets) = &s.resets {
        assert_eq!(resets.len(), n, "recur: numbers in resets");
    }
    assert_eq!(
        s.state.len(),
        heads * dim_k * dim_v,
        "recur: numbers in state"
    );
    assert_eq!(s.out.len(), n * heads * dim_v, "recur: numbers in out");
}
