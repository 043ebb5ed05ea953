//! `rope` with NEON; see `cpu::lanes`.

use crate::cpu::lanes;
use crate::rope::RopeKind;

/// # Safety
/// None beyond those of the processor: NEON is part of every AArch64.
pub(crate) unsafe fn rope(kind: RopeKind, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    lanes::rope::rope(kind, x, cos, sin);
}

/// # Safety
/// None beyond those of the processor: NEON is part of every AArch64.
pub(crate) unsafe fn turns(
    pos: u32,
    inv_freq: &[f32],
    mscale: f32,
    cos: &mut [f32],
    sin: &mut [f32],
) {
    lanes::rope::turns(pos, inv_freq, mscale, cos, sin);
}
