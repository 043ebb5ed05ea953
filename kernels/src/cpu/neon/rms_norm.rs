//! `rms_norm` with NEON; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// None beyond those of the processor: NEON is part of every AArch64.
pub(crate) unsafe fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    lanes::rms_norm::rms_norm(x, w, eps, out);
}
