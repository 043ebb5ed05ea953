//! `rms_norm`: F32 sums of squares in a tree, so 2e-6 of each number.

use crate::{device, get, normal, poisoned, put, rng};
use mneme_kernels::cuda;
use mneme_kernels::dispatch::Isa;
use mneme_kernels::pool::Pool;
use mneme_kernels::rms_norm::rms_norm_with;

#[test]
fn every_width_and_size() {
    let Some(dev) = device() else { return };
    let mut rng = rng(3);
    let pool = Pool::new(1);
    for (n, d) in [
        (1, 1),
        (3, 7),
        (9, 64),
        (20, 128),
        (2, 512),
        (2, 513),
        (3, 896),
        (1, 5000),
    ] {
        for size in [1e-6, 1.0, 1e6] {
            let (x, w) = (normal(&mut rng, n * d, size), normal(&mut rng, d, 1.0));
            let y = normal(&mut rng, n * d, size);
            let mut expected = vec![f32::NAN; n * d];
            rms_norm_with(Isa::Scalar, &pool, &x, &w, 1e-6, &mut expected);
            let check = |expected: &[f32], got: &[f32]| {
                for (e, g) in expected.iter().zip(got) {
                    assert!(
                        (e - g).abs() <= 2e-6 * e.abs(),
                        "{n} x {d}: {g}, expected {e}"
                    );
                }
            };
            let (mut buffer, w) = (put(dev, &x), put(dev, &w));
            let mut out = poisoned(dev, n * d);
            cuda::rms_norm::rms_norm(dev, buffer.all(), w.all(), 1e-6, out.all_mut())
                .expect("rms_norm");
            check(&expected, &get(dev, &out));
            cuda::rms_norm::rms_norm_in_place(dev, buffer.all_mut(), w.all(), 1e-6)
                .expect("rms_norm_in_place");
            check(&expected, &get(dev, &buffer));

            let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            rms_norm_with(Isa::Scalar, &pool, &sum, &get(dev, &w), 1e-6, &mut expected);
            let (mut x, y) = (put(dev, &x), put(dev, &y));
            let mut out = poisoned(dev, n * d);
            cuda::rms_norm::add_rms_norm(dev, x.all_mut(), y.all(), w.all(), 1e-6, out.all_mut())
                .expect("add_rms_norm");
            assert_eq!(get(dev, &x), sum);
            check(&expected, &get(dev, &out));
        }
    }
}
