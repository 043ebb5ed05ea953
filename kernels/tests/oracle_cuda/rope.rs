//! `rope`: cosines and sines of reduced F64 angles, so 5e-7 of a pair's length.

use crate::{device, get, normal, put, rng};
use mneme_kernels::cuda;
use mneme_kernels::dispatch::Isa;
use mneme_kernels::pool::Pool;
use mneme_kernels::rope::{RopeKind, rope_with};

#[test]
fn turns_as_the_host_does_up_to_a_million() {
    let Some(dev) = device() else { return };
    let mut rng = rng(4);
    let pos = [0u32, 1, 17, 4095, 65_537, 1_000_000];
    for kind in [RopeKind::Norm, RopeKind::Neox] {
        for (n_head, head_dim, n_rot) in [(1, 2, 2), (3, 64, 64), (2, 80, 32), (14, 128, 128)] {
            let freq: Vec<f32> = (0..n_rot / 2)
                .map(|i| 1e4f32.powf(-2.0 * i as f32 / n_rot as f32))
                .collect();
            for mscale in [1.0, 1.3] {
                let x = normal(&mut rng, pos.len() * n_head * head_dim, 1.0);
                let mut expected = x.clone();
                rope_with(
                    Isa::Scalar,
                    &Pool::new(1),
                    kind,
                    &mut expected,
                    n_head,
                    head_dim,
                    n_rot,
                    &pos,
                    &freq,
                    mscale,
                );
                let mut out = put(dev, &x);
                cuda::rope::rope(
                    dev,
                    kind,
                    out.all_mut(),
                    n_head,
                    head_dim,
                    n_rot,
                    put(dev, &pos).all(),
                    put(dev, &freq).all(),
                    mscale,
                )
                .expect("rope");
                for (e, g) in expected.iter().zip(get(dev, &out)) {
                    assert!(
                        (e - g).abs() <= 2e-6,
                        "{kind:?} {n_head} {head_dim}: {g}, expected {e}"
                    );
                }
            }
        }
    }
}
