//! `swiglu` with NEON; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// None beyond those of the processor: NEON is part of every AArch64.
pub(crate) unsafe fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    lanes::swiglu::swiglu(gate, up, out);
}
