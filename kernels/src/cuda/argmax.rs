//! The largest number of each row on the device: greedy sampling without reading logits back.

use super::device::Shape;
use super::{Device, Error, View, ViewMut};

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    out: u64,
    n_cols: i32,
}

/// `out[i]` is the index of the largest number of row `i` of `x`, `[out.len(), n_cols]`; of
/// equals the lowest. NaN never wins; a row of nothing else gives 0.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together or rows are empty.
pub fn argmax(
    dev: &Device,
    x: View<'_, f32>,
    n_cols: usize,
    out: ViewMut<'_, u32>,
) -> Result<(), Error> {
    assert!(n_cols > 0, "argmax: rows of no numbers");
    assert_eq!(
        x.len(),
        out.len() * n_cols,
        "argmax: x is not [{}, {n_cols}]",
        out.len()
    );
    let args = Args {
        x: dev.input(&x),
        out: dev.output(&out),
        n_cols: i32::try_from(n_cols).expect("argmax: rows shorter than 2^31"),
    };
    let shape = Shape::row(out.len() as u32, 1024);
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch("argmax", shape, &args) }
}
