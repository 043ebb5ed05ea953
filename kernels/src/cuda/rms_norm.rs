//! Root-mean-square normalisation on the device; see [`crate::rms_norm`].

use super::device::Shape;
use super::{Device, Error, View, ViewMut};

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    y: u64,
    w: u64,
    out: u64,
    n: i32,
    d: i32,
    eps: f32,
}

/// `out[i, :] = x[i, :] / sqrt(mean(x[i, :]^2) + eps) * w` for rows of `w.len()` numbers.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn rms_norm(
    dev: &Device,
    x: View<'_, f32>,
    w: View<'_, f32>,
    eps: f32,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    assert_eq!(x.len(), out.len(), "rms_norm: x and out differ in length");
    // `x` is only written when there is a `y`.
    run(dev, dev.input(&x), 0, x.len(), w, eps, dev.output(&out))
}

/// [`rms_norm`] over `x` itself.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If `x` is not whole rows.
pub fn rms_norm_in_place(
    dev: &Device,
    x: ViewMut<'_, f32>,
    w: View<'_, f32>,
    eps: f32,
) -> Result<(), Error> {
    let address = dev.output(&x);
    run(dev, address, 0, x.len(), w, eps, address)
}

/// `x += y`, then `out = rms_norm(x)`: the end of one block and the beginning of the next.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn add_rms_norm(
    dev: &Device,
    x: ViewMut<'_, f32>,
    y: View<'_, f32>,
    w: View<'_, f32>,
    eps: f32,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    assert_eq!(x.len(), y.len(), "add_rms_norm: x and y differ in length");
    assert_eq!(
        x.len(),
        out.len(),
        "add_rms_norm: x and out differ in length"
    );
    let (address, out) = (dev.output(&x), dev.output(&out));
    run(dev, address, dev.input(&y), x.len(), w, eps, out)
}

/// Rows up to this length get a warp each: heads.
const HEAD: usize = 512;
const THREADS: usize = 256;

fn run(
    dev: &Device,
    x: u64,
    y: u64,
    len: usize,
    w: View<'_, f32>,
    eps: f32,
    out: u64,
) -> Result<(), Error> {
    if len == 0 {
        return Ok(());
    }
    let d = w.len();
    assert!(
        d > 0 && len.is_multiple_of(d),
        "rms_norm: {len} numbers are not rows of {d}"
    );
    let n = len / d;
    let args = Args {
        x,
        y,
        w: dev.input(&w),
        out,
        n: i32::try_from(n).expect("rms_norm: fewer than 2^31 rows"),
        d: i32::try_from(d).expect("rms_norm: rows shorter than 2^31"),
        eps,
    };
    let (kernel, shape) = if d <= HEAD {
        let blocks = n.div_ceil(THREADS / 32) as u32;
        ("rms_norm_heads", Shape::row(blocks, THREADS as u32))
    } else {
        let threads = d.div_ceil(4).next_multiple_of(32).clamp(128, 1024);
        ("rms_norm_rows", Shape::row(n as u32, threads as u32))
    };
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch(kernel, shape, &args) }
}
