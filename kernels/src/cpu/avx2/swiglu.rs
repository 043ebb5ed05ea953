//! `swiglu` with AVX2; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    lanes::swiglu::swiglu(gate, up, out);
}
