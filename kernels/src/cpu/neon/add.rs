//! `add` with NEON; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// The instruction set is available.

pub(crate) unsafe fn add(x: &mut [f32], y: &[f32]) {
    lanes::add::add(x, y);
}
