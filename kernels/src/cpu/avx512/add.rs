//! `add` with AVX-512; see `cpu::lanes`.

use crate::cpu::lanes;

/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
pub(crate) unsafe fn add(x: &mut [f32], y: &[f32]) {
    lanes::add::add(x, y);
}
