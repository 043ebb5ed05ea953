//! `add` and `add_bias`: one rounding, so equal to the bit.

use crate::{bits, normal, rng};
use mneme_kernels::add::{add_bias_with, add_with};
use mneme_kernels::dispatch::available;
use mneme_kernels::pool::Pool;

#[test]
fn equals_the_sum_to_the_bit() {
    let mut rng = rng(30);
    for n in [0, 1, 15, 16, 17, 100_001] {
        let x = normal(&mut rng, n, 1.0);
        let y = normal(&mut rng, n, 1.0);
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        for &isa in available() {
            for n_threads in [1, 3] {
                let mut out = x.clone();
                add_with(isa, &Pool::new(n_threads), &mut out, &y);
                assert_eq!(bits(&out), bits(&sum), "{} {n}", isa.name());
            }
        }
    }
}

#[test]
fn the_bias_goes_to_every_row() {
    let mut rng = rng(31);
    for d in [1, 16, 37, 4864] {
        for n in [0, 1, 2, 30] {
            let x = normal(&mut rng, n * d, 1.0);
            let b = normal(&mut rng, d, 1.0);
            let sum: Vec<f32> = (0..n * d).map(|i| x[i] + b[i % d]).collect();
            for &isa in available() {
                let mut out = x.clone();
                add_bias_with(isa, &Pool::new(2), &mut out, &b);
                assert_eq!(bits(&out), bits(&sum), "{} {n} x {d}", isa.name());
            }
        }
    }
}
