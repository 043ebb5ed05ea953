//! `rope` with NEON; see `cpu::lanes`.

use crate::cpu::lanes;
use crate::rope::RopeKind;

/// # Safety
/// None beyond those of the processor: NEON is part of every AArch64.
pub(crate) unsafe fn rope(kind: RopeKind, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    lanes::rope::rope(kind, x, cos, sin);
}
