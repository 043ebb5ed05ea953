//! Residual sums and biases.

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
use crate::split::SplitMut;

/// Numbers that are worth a second thread.
const GRAIN: usize = 32 * 1024;

/// `x[i] += y[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn add(pool: &Pool, x: &mut [f32], y: &[f32]) {
    add_with(dispatch::best(), pool, x, y);
}

/// [`add`] with a chosen instruction set, which must be [`dispatch::available`].
pub fn add_with(isa: Isa, pool: &Pool, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "add: x and y differ in length");
    let part = cpu::add(isa);
    let n = x.len();
    let x = SplitMut::new(x);
    pool.for_each(n, GRAIN, |range| {
        // SAFETY: ranges are claimed once; the instruction set is available (`cpu::add`).
        unsafe { part(x.part(range.clone()), &y[range]) }
    });
}

/// `x[i, :] += b` for every row of `x`, which is `[n, b.len()]`.
///
/// # Panics
/// If `x` is not whole rows.
pub fn add_bias(pool: &Pool, x: &mut [f32], b: &[f32]) {
    add_bias_with(dispatch::best(), pool, x, b);
}

/// [`add_bias`] with a chosen instruction set, which must be [`dispatch::available`].
pub fn add_bias_with(isa: Isa, pool: &Pool, x: &mut [f32], b: &[f32]) {
    if x.is_empty() {
        return;
    }
    let d = b.len();
    assert!(
        d > 0 && x.len().is_multiple_of(d),
        "add_bias: {} numbers are not rows of {d}",
        x.len()
    );
    let part = cpu::add(isa);
    let n = x.len() / d;
    let x = SplitMut::new(x);
    pool.for_each(n, (GRAIN / d).max(1), |rows| {
        for i in rows {
            // SAFETY: rows are claimed once; the instruction set is available (`cpu::add`).
            unsafe { part(x.part(i * d..(i + 1) * d), b) }
        }
    });
}
