//! `swiglu` with AVX-512; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
pub(crate) unsafe fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    lanes::swiglu::swiglu(gate, up, out);
}
