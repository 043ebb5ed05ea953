//! Root-mean-square normalisation (Zhang and Sennrich, 2019).

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
use crate::split::SplitMut;

/// Rows that are worth a second thread, in numbers.
const GRAIN: usize = 16 * 1024;

/// `out[i, :] = x[i, :] / sqrt(mean(x[i, :]^2) + eps) * w` for rows of `w.len()` numbers.
///
/// `x` and `out` are `[n, d]`, `w` is `[d]`. Norms per head are rows of `head_dim` numbers.
///
/// # Panics
/// If the lengths do not fit together.
pub fn rms_norm(pool: &Pool, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm_with(dispatch::best(), pool, x, w, eps, out);
}

/// [`rms_norm`] with a chosen instruction set, which must be [`dispatch::available`].
pub fn rms_norm_with(isa: Isa, pool: &Pool, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "rms_norm: x and out differ in length");
    if x.is_empty() {
        return;
    }
    let d = w.len();
    assert!(
        d > 0 && x.len().is_multiple_of(d),
        "rms_norm: {} numbers are not rows of {d}",
        x.len()
    );
    let row = cpu::rms_norm(isa);
    let out = SplitMut::new(out);
    pool.for_each(x.len() / d, (GRAIN / d).max(1), |rows| {
        for i in rows {
            let range = i * d..(i + 1) * d;
            // SAFETY: rows are claimed once; the instruction set is available (`cpu::rms_norm`).
            unsafe { row(&x[range.clone()], w, eps, out.part(range)) }
        }
    });
}
