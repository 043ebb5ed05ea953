//! `rms_norm`, summed in F64.

pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let sum: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    let scale = 1.0 / (sum / x.len() as f64 + f64::from(eps)).sqrt();
    for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
        *o = (f64::from(x) * scale * f64::from(w)) as f32;
    }
}
