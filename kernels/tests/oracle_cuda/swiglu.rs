//! `swiglu`: the exponential and the quotient, 1e-6 of each number.

use crate::{device, get, normal, poisoned, put, rng};
use mneme_kernels::cuda;
use mneme_kernels::dispatch::Isa;
use mneme_kernels::pool::Pool;
use mneme_kernels::swiglu::swiglu_with;

#[test]
fn as_the_host_and_at_its_limits() {
    let Some(dev) = device() else { return };
    let mut rng = rng(5);
    for n in [0, 1, 255, 1000] {
        for size in [1e-3, 1.0, 30.0, 1e4] {
            let (gate, up) = (normal(&mut rng, n, size), normal(&mut rng, n, 1.0));
            let mut expected = vec![f32::NAN; n];
            swiglu_with(Isa::Scalar, &Pool::new(1), &gate, &up, &mut expected);
            let (gate, mut up) = (put(dev, &gate), put(dev, &up));
            let mut out = poisoned(dev, n);
            cuda::swiglu::swiglu(dev, gate.all(), up.all(), out.all_mut()).expect("swiglu");
            cuda::swiglu::swiglu_in_place(dev, gate.all(), up.all_mut()).expect("in place");
            assert_eq!(get(dev, &out), get(dev, &up));
            for (e, g) in expected.iter().zip(get(dev, &out)) {
                // Below 1e-34 the device may flush to zero.
                assert!((e - g).abs() <= 1e-6 * e.abs() + 1e-34, "{g}, expected {e}");
            }
        }
    }
    let gate = put(
        dev,
        &[f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 0.0, -200.0],
    );
    let up = put(dev, &[2.0f32; 5]);
    let mut out = poisoned(dev, 5);
    cuda::swiglu::swiglu(dev, gate.all(), up.all(), out.all_mut()).expect("swiglu");
    let got = get(dev, &out);
    assert_eq!(
        (got[0], got[1], got[3], got[4]),
        (0.0, f32::INFINITY, 0.0, 0.0)
    );
    assert!(got[2].is_nan());
}
