//! `add` with NEON; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// None beyond those of the processor: NEON is part of every AArch64.
pub(crate) unsafe fn add(x: &mut [f32], y: &[f32]) {
    lanes::add::add(x, y);
}
