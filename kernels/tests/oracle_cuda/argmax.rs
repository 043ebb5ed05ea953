//! `argmax`: exact, ties to the lowest index.

use crate::{device, get, normal, put, rng};
use mneme_kernels::cuda;

#[test]
fn finds_the_first_of_the_largest() {
    let Some(dev) = device() else { return };
    let mut rng = rng(2);
    for (n, n_cols) in [(1, 1), (3, 33), (2, 1024), (1, 5000), (4, 1023)] {
        let mut x = normal(&mut rng, n * n_cols, 1.0);
        for (i, row) in x.chunks_mut(n_cols).enumerate() {
            // Equals at both ends, NaN among them.
            let at = (7 * i + 3) % n_cols;
            row[at] = 9.0;
            row[n_cols - 1] = 9.0;
            row[(at + 1) % n_cols.max(2) % n_cols] = if n_cols > 2 { f32::NAN } else { 9.0 };
        }
        let mut out = put(dev, &vec![u32::MAX; n]);
        cuda::argmax::argmax(dev, put(dev, &x).all(), n_cols, out.all_mut()).expect("argmax");
        for (row, got) in x.chunks(n_cols).zip(get(dev, &out)) {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected = row.iter().position(|&x| x == largest).expect("one is");
            assert_eq!(got as usize, expected, "{n} x {n_cols}");
        }
    }
    let mut out = put(dev, &[7u32; 2]);
    let x = put(dev, &[f32::NAN, f32::NAN, f32::NEG_INFINITY, f32::NAN]);
    cuda::argmax::argmax(dev, x.all(), 2, out.all_mut()).expect("argmax");
    assert_eq!(get(dev, &out), [0, 0]);
}
