//! `rope`: the angles of a position, and their application one pair at a time.

use crate::rope::RopeKind;

/// Cosine and sine of `pos * inv_freq[i]`, both times `mscale`. The product is formed in F64:
/// at position one million an F32 angle would be off by up to 0.03.
pub(crate) fn turns(pos: u32, inv_freq: &[f32], mscale: f32, cos: &mut [f32], sin: &mut [f32]) {
    for ((&f, c), s) in inv_freq.iter().zip(cos).zip(sin) {
        let (sin, cos) = (f64::from(pos) * f64::from(f)).sin_cos();
        *c = cos as f32 * mscale;
        *s = sin as f32 * mscale;
    }
}

pub(crate) fn rope(kind: RopeKind, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = match kind {
            RopeKind::Norm => (2 * i, 2 * i + 1),
            RopeKind::Neox => (i, i + half),
        };
        let (u, v) = (x[a], x[b]);
        x[a] = u * cos[i] - v * sin[i];
        x[b] = u * sin[i] + v * cos[i];
    }
}
