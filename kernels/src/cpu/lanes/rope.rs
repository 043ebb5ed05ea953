//! `rope`: the angles of a position eight at a time in F64, and their application.

use crate::rope::RopeKind;

/// Angles handled at a time.
const ANGLES: usize = 8;

/// Cosine and sine of `pos * inv_freq[i]`, both times `mscale`.
#[inline(always)]
pub(crate) fn turns(pos: u32, inv_freq: &[f32], mscale: f32, cos: &mut [f32], sin: &mut [f32]) {
    let (freqs, freq_rest) = inv_freq.as_chunks::<ANGLES>();
    let (coss, cos_rest) = cos.as_chunks_mut::<ANGLES>();
    let (sins, sin_rest) = sin.as_chunks_mut::<ANGLES>();
    for ((freq, cos), sin) in freqs.iter().zip(coss).zip(sins) {
        for i in 0..ANGLES {
            (cos[i], sin[i]) = turn(pos, freq[i], mscale);
        }
    }
    for ((freq, cos), sin) in freq_rest.iter().zip(cos_rest).zip(sin_rest) {
        (*cos, *sin) = turn(pos, *freq, mscale);
    }
}

/// One angle: reduced to a quarter turn around zero in F64, where Taylor's series to the 13th
/// power are good to 1e-12; the angle itself to 1e-9 at position one million.
#[inline(always)]
fn turn(pos: u32, freq: f32, mscale: f32) -> (f32, f32) {
    use std::f64::consts::{FRAC_2_PI, FRAC_PI_2};
    // What FRAC_PI_2 lacks of pi / 2.
    const FRAC_PI_2_LOW: f64 = 6.123_233_995_736_766e-17;
    // Rounds to an integer when added; the integer is then in the low bits.
    const MAGIC: f64 = 6_755_399_441_055_744.0;
    let angle = f64::from(pos) * f64::from(freq);
    let shifted = angle.mul_add(FRAC_2_PI, MAGIC);
    let n = shifted - MAGIC;
    let r = (-n).mul_add(FRAC_PI_2, angle);
    let r = (-n).mul_add(FRAC_PI_2_LOW, r);
    let rr = r * r;
    let mut s = 1.0 / 6_227_020_800.0;
    s = rr.mul_add(s, -1.0 / 39_916_800.0);
    s = rr.mul_add(s, 1.0 / 362_880.0);
    s = rr.mul_add(s, -1.0 / 5_040.0);
    s = rr.mul_add(s, 1.0 / 120.0);
    s = rr.mul_add(s, -1.0 / 6.0);
    let s = (rr * s).mul_add(r, r);
    let mut c = 1.0 / 479_001_600.0;
    c = rr.mul_add(c, -1.0 / 3_628_800.0);
    c = rr.mul_add(c, 1.0 / 40_320.0);
    c = rr.mul_add(c, -1.0 / 720.0);
    c = rr.mul_add(c, 1.0 / 24.0);
    c = rr.mul_add(c, -0.5);
    let c = rr.mul_add(c, 1.0);
    let quarter = shifted.to_bits();
    let odd = quarter & 1 == 1;
    let (cos, sin) = if odd { (s, c) } else { (c, s) };
    let cos = if (quarter.wrapping_add(1)) & 2 == 2 {
        -cos
    } else {
        cos
    };
    let sin = if quarter & 2 == 2 { -sin } else { sin };
    (cos as f32 * mscale, sin as f32 * mscale)
}

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
