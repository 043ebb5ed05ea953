//! The gated activation on the device; see [`crate::swiglu`].

use super::device::Shape;
use super::{Device, Error, View, ViewMut, blocks};

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    gate: u64,
    up: u64,
    out: u64,
    n: u64,
}

/// `out[i] = silu(gate[i]) * up[i]`.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths differ.
pub fn swiglu(
    dev: &Device,
    gate: View<'_, f32>,
    up: View<'_, f32>,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    assert_eq!(up.len(), out.len(), "swiglu: up and out differ in length");
    run(dev, gate, dev.input(&up), dev.output(&out), out.len())
}

/// `x[i] *= silu(gate[i])`.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths differ.
pub fn swiglu_in_place(
    dev: &Device,
    gate: View<'_, f32>,
    x: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let address = dev.output(&x);
    run(dev, gate, address, address, x.len())
}

fn run(dev: &Device, gate: View<'_, f32>, up: u64, out: u64, n: usize) -> Result<(), Error> {
    assert_eq!(gate.len(), n, "swiglu: gate and out differ in length");
    if n == 0 {
        return Ok(());
    }
    let args = Args {
        gate: dev.input(&gate),
        up,
        out,
        n: n as u64,
    };
    let shape = Shape::row(blocks(n, 256, 1 << 16), 256);
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch("swiglu", shape, &args) }
}
