//! Rotary position embedding (Su et al., 2021).

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
use crate::split::SplitMut;

/// Numbers that are worth a second thread.
const GRAIN: usize = 8 * 1024;

/// Which two numbers of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeKind {
    /// Neighbours `(2i, 2i + 1)`, as Llama's GGUF files expect.
    Norm,
    /// `(i, i + n_rot / 2)`, as Qwen's GGUF files expect.
    Neox,
}

/// Rotates the first `n_rot` numbers of every head by angles `pos[t] * inv_freq[i]`, in place.
///
/// `x` is `[n_tokens, n_head, head_dim]` with `n_tokens = pos.len()`; `inv_freq` is
/// `[n_rot / 2]`; the rotated numbers are scaled by `mscale` (YaRN's attention factor, else 1).
/// Angles are formed in F64, so cosine and sine are good to 1e-7 at position one million.
///
/// # Panics
/// If the lengths do not fit together, or `n_rot` is odd or above `head_dim`.
pub fn rope(
    pool: &Pool,
    kind: RopeKind,
    x: &mut [f32],
    n_head: usize,
    head_dim: usize,
    n_rot: usize,
    pos: &[u32],
    inv_freq: &[f32],
    mscale: f32,
) {
    rope_with(
        dispatch::best(),
        pool,
        kind,
        x,
        n_head,
        head_dim,
        n_rot,
        pos,
        inv_freq,
        mscale,
    );
}

/// [`rope`] with a chosen instruction set, which must be [`dispatch::available`].
pub fn rope_with(
    isa: Isa,
    pool: &Pool,
    kind: RopeKind,
    x: &mut [f32],
    n_head: usize,
    head_dim: usize,
    n_rot: usize,
    pos: &[u32],
    inv_freq: &[f32],
    mscale: f32,
) {
    let token_len = n_head * head_dim;
    assert_eq!(
        x.len(),
        pos.len() * token_len,
        "rope: x is not [{}, {n_head}, {head_dim}]",
        pos.len()
    );
    assert!(
        n_rot.is_multiple_of(2) && n_rot <= head_dim,
        "rope: n_rot {n_rot} must be even and at most head_dim {head_dim}"
    );
    assert_eq!(inv_freq.len(), n_rot / 2, "rope: inv_freq is not n_rot / 2");
    if x.is_empty() || n_rot == 0 {
        return;
    }
    let (turns_of, rotate) = cpu::rope(isa);
    let x = SplitMut::new(x);
    pool.for_each(pos.len(), (GRAIN / token_len).max(1), |tokens| {
        // Cosines then sines of one position, shared by all its heads.
        let mut turns = vec![0.0; n_rot];
        for t in tokens {
            let (cos, sin) = turns.split_at_mut(n_rot / 2);
            // SAFETY: the instruction set is available (`cpu::rope`).
            unsafe { turns_of(pos[t], inv_freq, mscale, cos, sin) };
            // SAFETY: tokens are claimed once.
            let heads = unsafe { x.part(t * token_len..(t + 1) * token_len) };
            for head in heads.chunks_exact_mut(head_dim) {
                // SAFETY: the instruction set is available (`cpu::rope`).
                unsafe { rotate(kind, &mut head[..n_rot], cos, sin) }
            }
        }
    });
}
