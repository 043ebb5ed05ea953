//! Rotary position embedding on the device; see [`crate::rope`].

use super::device::Shape;
use super::{Device, Error, View, ViewMut};
use crate::rope::RopeKind;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    pos: u64,
    inv_freq: u64,
    n_head: i32,
    head_dim: i32,
    n_rot: i32,
    neox: i32,
    mscale: f32,
}

/// Rotates the first `n_rot` numbers of every head of `x`, `[n_tokens, n_head, head_dim]`, by
/// `pos[t] * inv_freq[i]`, in place. Angles are formed in F64.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together, or `n_rot` is odd or above `head_dim`.
pub fn rope(
    dev: &Device,
    kind: RopeKind,
    x: ViewMut<'_, f32>,
    n_head: usize,
    head_dim: usize,
    n_rot: usize,
    pos: View<'_, u32>,
    inv_freq: View<'_, f32>,
    mscale: f32,
) -> Result<(), Error> {
    assert_eq!(
        x.len(),
        pos.len() * n_head * head_dim,
        "rope: x is not [{}, {n_head}, {head_dim}]",
        pos.len()
    );
    assert!(
        n_rot.is_multiple_of(2) && n_rot <= head_dim,
        "rope: n_rot {n_rot} must be even and at most head_dim {head_dim}"
    );
    assert_eq!(inv_freq.len(), n_rot / 2, "rope: inv_freq is not n_rot / 2");
    if x.is_empty() || n_rot == 0 {
        return Ok(());
    }
    let args = Args {
        x: dev.output(&x),
        pos: dev.input(&pos),
        inv_freq: dev.input(&inv_freq),
        n_head: n_head as i32,
        head_dim: head_dim as i32,
        n_rot: n_rot as i32,
        neox: i32::from(kind == RopeKind::Neox),
        mscale,
    };
    let pairs = (n_rot / 2).next_power_of_two().clamp(8, 64) as u32;
    let shape = Shape {
        grid: [pos.len() as u32, 1, 1],
        block: [pairs, 256 / pairs, 1],
        shared_bytes: 0,
    };
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch("rope", shape, &args) }
}
