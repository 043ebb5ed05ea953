//! `swiglu` with an exponential of our own.

use super::LANES;

#[inline(always)]
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gates, gate_rest) = gate.as_chunks::<LANES>();
    let (ups, up_rest) = up.as_chunks::<LANES>();
    let (outs, out_rest) = out.as_chunks_mut::<LANES>();
    for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
        for i in 0..LANES {
            out[i] = silu(gate[i]) * up[i];
        }
    }
    for ((gate, up), out) in gate_rest.iter().zip(up_rest).zip(out_rest) {
        *out = silu(*gate) * up;
    }
}

/// `z / (1 + exp(-z))` as `z * e / (1 + e)` below zero, `e = exp(-|z|)`: `e` never overflows.
/// Below -104 the result is zero (`e` underflows), at minus infinity too.
#[inline(always)]
fn silu(z: f32) -> f32 {
    let e = exp_negative(-z.abs());
    // Minus infinity times zero would be NaN; a NaN must stay one, which `max` would drop.
    let finite = if z < -1e30 { -1e30 } else { z };
    let top = if z < 0.0 { finite * e } else { z };
    top / (1.0 + e)
}

/// `exp(x)` for `x <= 0`, relative error at most 2e-7 down to -87 (where results are normal
/// numbers); zero below -104 (as F32 has it), NaN for NaN. As usual `x = n ln 2 + r`, `|r| <= ln 2 / 2`, and
/// `exp(x) = 2^n exp(r)` with a polynomial of degree seven for the latter.
#[inline(always)]
fn exp_negative(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, the first with zeros at its end: n times it is exact.
    const LN_2_HIGH: f32 = 0.693_145_75;
    const LN_2_LOW: f32 = 1.428_606_8e-6;
    // Rounds to an integer when added; the integer is then in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    // NaN passes neither comparison and stays.
    let clamped = if x < -110.0 { -110.0 } else { x };
    let shifted = clamped.mul_add(LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = (-n).mul_add(LN_2_HIGH, clamped);
    let r = (-n).mul_add(LN_2_LOW, r);
    // Taylor's coefficients: the first one left out, r^8 / 8!, is below 6e-9.
    let mut p: f32 = 1.0 / 5040.0;
    p = p.mul_add(r, 1.0 / 720.0);
    p = p.mul_add(r, 1.0 / 120.0);
    p = p.mul_add(r, 1.0 / 24.0);
    p = p.mul_add(r, 1.0 / 6.0);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    // 2^n as two factors, so that n down to -150 makes no exponent below that of a number.
    let n = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
    p * power(half) * power(n.wrapping_sub(half))
}
