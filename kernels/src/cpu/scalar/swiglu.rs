//! `swiglu` in F64.

pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        let g = f64::from(g);
        // Far below zero the exponential overflows and g / inf is the right limit, zero; for
        // minus infinity itself that quotient would be NaN.
        let silu = if g == f64::NEG_INFINITY {
            -0.0
        } else {
            g / (1.0 + (-g).exp())
        };
        *o = (silu * f64::from(u)) as f32;
    }
}
