//! `rope`.

use crate::rope::RopeKind;

#[inline(always)]
pub(crate) fn rope(kind: RopeKind, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let sin = &sin[..half];
    match kind {
        RopeKind::Norm => {
            let pairs = &mut x.as_chunks_mut::<2>().0[..half];
            for i in 0..half {
                let [u, v] = pairs[i];
                pairs[i] = [u * cos[i] - v * sin[i], u * sin[i] + v * cos[i]];
            }
        }
        RopeKind::Neox => {
            let (a, b) = x.split_at_mut(half);
            let b = &mut b[..half];
            for i in 0..half {
                let (u, v) = (a[i], b[i]);
                a[i] = u * cos[i] - v * sin[i];
                b[i] = u * sin[i] + v * cos[i];
            }
        }
    }
}
