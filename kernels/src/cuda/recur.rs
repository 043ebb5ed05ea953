//! Recurrent memories of fixed size on the device; see [`crate::recur`].

use super::device::Shape;
use super::{Device, Error, View, ViewMut};
use crate::recur::CHUNK;
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
    /// State before the first token `[n_head, head_dim_k, head_dim_v]`; `None`: it is in `state`.
    pub from: Option<View<'a, f32>>,
    /// State after the last token `[n_head, head_dim_k, head_dim_v]`.
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
    from: u64,
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

#[repr(C)]
#[derive(Clone, Copy)]
struct ChunkArgs {
    sequence: Sequence,
    operands: u64,
    factors: u64,
    first_chunk: i32,
    n_chunks: i32,
}

/// Most room for the operands of the chunked form; longer calls take several rounds.
const OPERAND_BYTES: usize = 64 << 20;
/// Numbers of a chunk of a head beside its operands.
const FACTORS: usize = 2 * CHUNK + 4;
/// Tokens from which on [`Form::Auto`] takes chunks. By count of operations; not measured.
const CHUNKED_FROM: usize = 2 * CHUNK;

/// Runs the recurrence of every sequence in `seqs`, all heads and columns side by side.
///
/// Normalisation is that of [`crate::recur::recur`]. [`Form::Recurrent`] gives the same bits
/// however tokens are split over calls; [`Form::Chunked`] differs from it by rounding, in products
/// to 2^-16.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If shapes do not fit together.
pub fn recur(dev: &Device, form: Form, seqs: &mut [Recur<'_>]) -> Result<(), Error> {
    seqs.iter().for_each(check);
    for s in seqs.iter_mut().filter(|s| s.n_tokens == 0) {
        if let Some(from) = s.from {
            dev.copy(from, s.state.reborrow())?;
        }
    }
    let chunked = |s: &Recur<'_>| match form {
        Form::Recurrent => false,
        Form::Chunked => true,
        Form::Auto => s.n_tokens >= CHUNKED_FROM,
    };
    let work = |s: &&Recur<'_>| s.n_tokens > 0 && s.head_dim_v > 0;
    for s in seqs.iter().filter(work).filter(|s| chunked(s)) {
        walk_chunks(dev, s)?;
    }
    for dim in [64, 128, MAX_DIM_K] {
        let of_dim = |s: &&Recur<'_>| padded(s) == dim && !chunked(s);
        let mut all: Vec<Sequence> = seqs
            .iter()
            .filter(work)
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

/// Dimensions of a key that the kernels' registers are laid out for.
fn padded(s: &Recur<'_>) -> usize {
    s.head_dim_k.next_power_of_two().max(64)
}

/// One sequence in chunks: operands of as many chunks as there is room for, then the walk over
/// them, and so on.
fn walk_chunks(dev: &Device, s: &Recur<'_>) -> Result<(), Error> {
    let dim = padded(s);
    let operand_bytes = 4 * (192 * dim + 2 * CHUNK * CHUNK);
    let bytes = s.n_head * (operand_bytes + 4 * FACTORS);
    let n_chunks = s.n_tokens.div_ceil(CHUNK);
    let together = (OPERAND_BYTES / bytes).clamp(1, n_chunks);
    let workspace = dev.workspace(together * bytes)?;
    let operands = workspace.address();
    let sequence = describe(dev, s);
    let (prepare, walk) = match dim {
        64 => ("recur_prepare_64", "recur_walk_64"),
        128 => ("recur_prepare_128", "recur_walk_128"),
        _ => ("recur_prepare_256", "recur_walk_256"),
    };
    let shape = |x: usize, shared_words: usize| Shape {
        grid: [x as u32, s.n_head as u32, 1],
        block: [256, 1, 1],
        shared_bytes: 4 * shared_words as u32,
    };
    let row = dim / 2 + 4;
    for first in (0..n_chunks).step_by(together) {
        let n = together.min(n_chunks - first);
        let args = ChunkArgs {
            sequence,
            operands,
            factors: operands + (together * s.n_head * operand_bytes) as u64,
            first_chunk: first as i32,
            n_chunks: n as i32,
        };
        let prepare_shape = shape(n, 4 * CHUNK * row + CHUNK * (CHUNK + 4) + 4 * CHUNK);
        let slices = s.head_dim_v.div_ceil(COLUMNS);
        let walk_shape = shape(slices, 2 * COLUMNS * (row + 2 * (CHUNK / 2 + 4)));
        // SAFETY: the struct is the kernels', lengths are checked by the caller, and the workspace
        // has room for `together` chunks.
        unsafe {
            dev.launch(prepare, prepare_shape, &args)?;
            dev.launch(walk, walk_shape, &args)?;
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
        from: match &s.from {
            Some(from) => dev.input(from),
            None => dev.output(&s.state),
        },
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
    if let Some(from) = &s.from {
        assert_eq!(from.len(), s.state.len(), "recur: numbers in from");
    }
    assert_eq!(s.out.len(), n * heads * dim_v, "recur: numbers in out");
}
