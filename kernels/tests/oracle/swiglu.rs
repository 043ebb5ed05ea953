//! `swiglu`: relative error of 5e-7 (an exponential good to 2e-7, a sum, a quotient and two
//! products), and sane limits.

use crate::{normal, poisoned, rng, vector_isas};
use mneme_kernels::dispatch::{Isa, available};
use mneme_kernels::pool::Pool;
use mneme_kernels::swiglu::swiglu_with;

const BOUND: f64 = 5e-7;

fn check(gate: &[f32], up: &[f32]) {
    let pool = Pool::new(2);
    let mut exact = poisoned(gate.len());
    swiglu_with(Isa::Scalar, &pool, gate, up, &mut exact);
    for isa in vector_isas() {
        let mut out = poisoned(gate.len());
        swiglu_with(isa, &pool, gate, up, &mut out);
        for i in 0..out.len() {
            let (got, exact) = (f64::from(out[i]), f64::from(exact[i]));
            // Below -87 the exponential loses bits as a subnormal number.
            let subnormal = f64::from(gate[i]).abs() * f64::from(up[i]).abs() * 3e-45;
            assert!(
                (got - exact).abs() <= BOUND * exact.abs() + subnormal + 3e-45,
                "{} gate {} up {}: {got} {exact}",
                isa.name(),
                gate[i],
                up[i]
            );
        }
    }
}

#[test]
fn equals_f64_within_the_bound() {
    let mut rng = rng(20);
    for n in [0, 1, 15, 16, 17, 31, 33, 20_000] {
        for scale in [1e-3, 1.0, 8.0, 60.0] {
            check(&normal(&mut rng, n, scale), &normal(&mut rng, n, 1.0));
        }
    }
}

#[test]
fn every_gate_from_minus_120_to_120() {
    let gate: Vec<f32> = (-120_000..=120_000).map(|i| i as f32 / 1000.0).collect();
    check(&gate, &vec![1.0; gate.len()]);
}

#[test]
fn limits_are_limits_and_nan_is_nan() {
    let pool = Pool::new(1);
    // Both in a whole vector and in the rest after it.
    let gate = [
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN,
        0.0,
        f32::MIN_POSITIVE,
    ]
    .repeat(5);
    for &isa in available() {
        let mut out = poisoned(gate.len());
        swiglu_with(isa, &pool, &gate, &[2.0; 35], &mut out);
        for out in out.chunks(7) {
            let name = isa.name();
            assert_eq!(out[0], f32::INFINITY, "{name}");
            assert_eq!(out[1], 0.0, "{name}");
            assert!(out[2].is_nan(), "{name}");
            assert_eq!(out[3], f32::INFINITY, "{name}");
            assert_eq!(out[4], 0.0, "{name}");
            assert_eq!(out[5], 0.0, "{name}");
            assert_eq!(out[6], f32::MIN_POSITIVE, "{name}");
        }
    }
}
