//! `top_k`: exact, in the total order of numbers, ties to the lowest place.

use crate::{device, get, normal, put, rng};
use mneme_kernels::cuda::top_k::{MOST, NONE, top_k};

/// Places and numbers by a sort of the whole row.
fn expected(row: &[f32], k: usize) -> Vec<(u32, f32)> {
    let possible = row
        .iter()
        .zip(0u32..)
        .filter(|(x, _)| **x > f32::NEG_INFINITY);
    let mut all: Vec<(u32, f32)> = possible.map(|(&x, i)| (i, x)).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.resize(all.len().max(k), (NONE, f32::NEG_INFINITY));
    all.truncate(k);
    all
}

fn compare(x: &[f32], n_cols: usize, k: usize) {
    let Some(dev) = device() else { return };
    let n = x.len() / n_cols;
    let mut out = put(dev, &vec![0x7fc0_0000u32; n * 2 * k]);
    top_k(dev, put(dev, x).all(), n_cols, k, out.all_mut()).expect("top_k");
    let out = get(dev, &out);
    for (row, got) in x.chunks(n_cols).zip(out.chunks(2 * k)) {
        for (i, (place, number)) in expected(row, k).into_iter().enumerate() {
            let got = (got[i], got[k + i]);
            assert_eq!(got, (place, number.to_bits()), "{i} of {k} of {n_cols}");
        }
    }
}

#[test]
fn finds_the_largest_in_order() {
    let mut rng = rng(2);
    for (n, n_cols, k) in [
        (1, 1, 1),
        (3, 33, 5),
        (2, 4096, 40),
        (2, 4097, 40),
        (1, 9000, 1),
        (2, 20_001, MOST),
        (1, 151_936, 40),
    ] {
        compare(&normal(&mut rng, n * n_cols, 4.0), n_cols, k);
    }
}

#[test]
fn equals_come_in_the_order_of_their_places() {
    let mut rng = rng(3);
    for (n_cols, k) in [(500, 77), (9001, 1024), (5000, 3)] {
        // Few different numbers, zeros of both signs among them.
        let x: Vec<f32> = normal(&mut rng, n_cols, 1.0)
            .iter()
            .map(|x| x.round() / 2.0)
            .collect();
        compare(&x, n_cols, k);
        compare(&vec![-1.5; n_cols], n_cols, k);
    }
}

#[test]
fn what_is_no_number_is_left_out() {
    let mut rng = rng(4);
    let mut x = normal(&mut rng, 3 * 4500, 1.0);
    for (i, x) in x.iter_mut().enumerate() {
        match i % 7 {
            0 => *x = f32::NAN,
            1 => *x = -f32::NAN,
            2 => *x = f32::NEG_INFINITY,
            3 if i % 5 == 0 => *x = f32::INFINITY,
            _ => {}
        }
    }
    x[..4500].fill(f32::NAN);
    x[17] = f32::MIN;
    compare(&x, 4500, 200);
    // Fewer numbers than are asked for.
    compare(&[1.0, f32::NAN, -0.0, 0.0, f32::NEG_INFINITY], 5, 9);
    compare(&[f32::NEG_INFINITY; 3], 3, 4);
}
