//! `add`, `add_bias`: the same single sum as on the host, to the bit.

use crate::{bits, device, get, normal, put, rng};
use mneme_kernels::cuda;

#[test]
fn sums_are_exact() {
    let Some(dev) = device() else { return };
    let mut rng = rng(1);
    for n in [0, 1, 31, 256, 257, 5000] {
        let (x, y) = (normal(&mut rng, n, 1.0), normal(&mut rng, n, 1e3));
        let mut out = put(dev, &x);
        cuda::add::add(dev, out.all_mut(), put(dev, &y).all()).expect("add");
        let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert_eq!(bits(&get(dev, &out)), bits(&expected), "{n}");
    }
    for (n, d) in [(1, 1), (3, 7), (50, 96), (0, 5)] {
        let (x, b) = (normal(&mut rng, n * d, 1.0), normal(&mut rng, d, 1.0));
        let mut out = put(dev, &x);
        cuda::add::add_bias(dev, out.all_mut(), put(dev, &b).all()).expect("add_bias");
        let expected: Vec<f32> = (0..n * d).map(|i| x[i] + b[i % d]).collect();
        assert_eq!(bits(&get(dev, &out)), bits(&expected), "{n} x {d}");
    }
}

#[test]
fn slices_touch_nothing_else() {
    let Some(dev) = device() else { return };
    let mut x = put(dev, &[1.0f32; 100]);
    let y = put(dev, &[2.0f32; 100]);
    cuda::add::add(dev, x.slice_mut(13..44), y.slice(50..81)).expect("add");
    let got = get(dev, &x);
    for (i, x) in got.iter().enumerate() {
        assert_eq!(*x, if (13..44).contains(&i) { 3.0 } else { 1.0 }, "{i}");
    }
}
