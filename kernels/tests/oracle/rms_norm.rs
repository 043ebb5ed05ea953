//! `rms_norm`: every result within 4 ulp of F64 (a sum of squares in lanes, a square root, a
//! division and two products).

use crate::{bits, normal, poisoned, rng, vector_isas};
use mneme_kernels::dispatch::{Isa, available};
use mneme_kernels::pool::Pool;
use mneme_kernels::rms_norm::rms_norm_with;

const EPS: f32 = 1e-6;
const BOUND: f32 = 4.0 * f32::EPSILON;

#[test]
fn equals_f64_within_the_bound() {
    let pool = Pool::new(2);
    let mut rng = rng(10);
    for d in [1, 2, 15, 16, 17, 63, 64, 65, 128, 896, 2048, 5000] {
        for n in [1, 3, 40] {
            for scale in [1e-6, 1.0, 1e6] {
                let x = normal(&mut rng, n * d, scale);
                let w = normal(&mut rng, d, 1.0);
                let mut exact = poisoned(n * d);
                rms_norm_with(Isa::Scalar, &pool, &x, &w, EPS, &mut exact);
                for isa in vector_isas() {
                    let mut out = poisoned(n * d);
                    rms_norm_with(isa, &pool, &x, &w, EPS, &mut out);
                    for (got, exact) in out.iter().zip(&exact) {
                        let error = (got - exact).abs();
                        assert!(
                            error <= BOUND * exact.abs() + f32::MIN_POSITIVE,
                            "{} d {d} n {n} scale {scale}: {got} {exact}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn plain_rust_is_the_definition() {
    let mut out = poisoned(2);
    let pool = Pool::new(1);
    rms_norm_with(Isa::Scalar, &pool, &[3.0, 4.0], &[1.0, 2.0], 0.0, &mut out);
    let rms = 12.5f64.sqrt();
    assert_eq!(out, [(3.0 / rms) as f32, (8.0 / rms) as f32]);
}

#[test]
fn a_row_is_the_same_in_any_company_on_any_threads() {
    let mut rng = rng(11);
    let (n, d) = (50, 1000);
    let x = normal(&mut rng, n * d, 1.0);
    let w = normal(&mut rng, d, 1.0);
    for &isa in available() {
        let mut all = poisoned(n * d);
        rms_norm_with(isa, &Pool::new(3), &x, &w, EPS, &mut all);
        for (x, all) in x.chunks(d).zip(all.chunks(d)) {
            let mut one = poisoned(d);
            rms_norm_with(isa, &Pool::new(1), x, &w, EPS, &mut one);
            assert_eq!(bits(&one), bits(all));
        }
    }
}
