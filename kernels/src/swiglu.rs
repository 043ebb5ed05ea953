//! The gated activation of Llama-like feed-forward blocks (Shazeer, 2020).

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
use crate::split::SplitMut;

/// Numbers that are worth a second thread.
const GRAIN: usize = 8 * 1024;

/// `out[i] = silu(gate[i]) * up[i]`, where `silu(z) = z / (1 + exp(-z))`.
///
/// The sigmoid is good to 4e-7 relative; gate at plus or minus infinity gives the limits, NaN
/// gives NaN.
///
/// # Panics
/// If the lengths differ.
pub fn swiglu(pool: &Pool, gate: &[f32], up: &[f32], out: &mut [f32]) {
    swiglu_with(dispatch::best(), pool, gate, up, out);
}

/// [`swiglu`] with a chosen instruction set, which must be [`dispatch::available`].
pub fn swiglu_with(isa: Isa, pool: &Pool, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert_eq!(gate.len(), up.len(), "swiglu: gate and up differ in length");
    assert_eq!(
        gate.len(),
        out.len(),
        "swiglu: gate and out differ in length"
    );
    let part = cpu::swiglu(isa);
    let out_parts = SplitMut::new(out);
    pool.for_each(gate.len(), GRAIN, |range| {
        // SAFETY: ranges are claimed once; the instruction set is available (`cpu::swiglu`).
        unsafe {
            part(
                &gate[range.clone()],
                &up[range.clone()],
                out_parts.part(range),
            )
        }
    });
}
