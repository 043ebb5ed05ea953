//! Residual sums and biases on the device; see [`crate::add`].

use super::device::Shape;
use super::{Device, Error, View, ViewMut, blocks};

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    y: u64,
    n: u64,
    d: u64,
}

/// `x[i] += y[i]`.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths differ.
pub fn add(dev: &Device, x: ViewMut<'_, f32>, y: View<'_, f32>) -> Result<(), Error> {
    assert_eq!(x.len(), y.len(), "add: x and y differ in length");
    add_bias(dev, x, y)
}

/// `x[i, :] += b` for every row of `x`, which is `[n, b.len()]`.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If `x` is not whole rows.
pub fn add_bias(dev: &Device, x: ViewMut<'_, f32>, b: View<'_, f32>) -> Result<(), Error> {
    if x.is_empty() {
        return Ok(());
    }
    assert!(
        !b.is_empty() && x.len().is_multiple_of(b.len()),
        "add_bias: {} numbers are not rows of {}",
        x.len(),
        b.len()
    );
    let args = Args {
        x: dev.output(&x),
        y: dev.input(&b),
        n: x.len() as u64,
        d: b.len() as u64,
    };
    let shape = Shape::row(blocks(x.len(), 256, 1 << 16), 256);
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch("add", shape, &args) }
}
