//! `rope` with AVX-512; see `cpu::lanes`.

use crate::cpu::lanes;
use crate::rope::RopeKind;

/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
pub(crate) unsafe fn rope(kind: RopeKind, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    lanes::rope::rope(kind, x, cos, sin);
}

/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
pub(crate) unsafe fn turns(
    pos: u32,
    inv_freq: &[f32],
    mscale: f32,
    cos: &mut [f32],
    sin: &mut [f32],
) {
    lanes::rope::turns(pos, inv_freq, mscale, cos, sin);
}
