//! `add` with AVX2; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn add(x: &mut [f32], y: &[f32]) {
    lanes::add::add(x, y);
}
