//! `rms_norm` with AVX2; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    lanes::rms_norm::rms_norm(x, w, eps, out);
}
