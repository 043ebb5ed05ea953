//! `rope`: within 4e-7 of the pair's length of a rotation in F64, at any position.

use crate::{bits, normal, rng};
use mneme_kernels::dispatch::available;
use mneme_kernels::pool::Pool;
use mneme_kernels::rope::{RopeKind, rope_with};

fn inv_freq(n_rot: usize, theta: f64) -> Vec<f32> {
    (0..n_rot / 2)
        .map(|i| theta.powf(-2.0 * i as f64 / n_rot as f64) as f32)
        .collect()
}

#[test]
fn equals_a_rotation_in_f64_within_the_bound() {
    let mut rng = rng(40);
    let pos = [0, 1, 2, 511, 32_767, 131_071, 1_000_000, u32::MAX];
    for (n_head, head_dim, n_rot) in [
        (1, 2, 2),
        (3, 64, 64),
        (2, 128, 128),
        (2, 80, 32),
        (1, 6, 0),
    ] {
        let freq = inv_freq(n_rot, 1e6);
        for mscale in [1.0f32, 1.37] {
            for kind in [RopeKind::Norm, RopeKind::Neox] {
                let x = normal(&mut rng, pos.len() * n_head * head_dim, 2.0);
                for &isa in available() {
                    let mut out = x.clone();
                    let pool = Pool::new(2);
                    rope_with(
                        isa, &pool, kind, &mut out, n_head, head_dim, n_rot, &pos, &freq, mscale,
                    );
                    for (h, (x, out)) in x.chunks(head_dim).zip(out.chunks(head_dim)).enumerate() {
                        assert_eq!(x[n_rot..], out[n_rot..], "the rest is left alone");
                        for (i, &freq) in freq.iter().enumerate() {
                            let (a, b) = match kind {
                                RopeKind::Norm => (2 * i, 2 * i + 1),
                                RopeKind::Neox => (i, i + n_rot / 2),
                            };
                            let angle = f64::from(pos[h / n_head]) * f64::from(freq);
                            let (u, v) = (f64::from(x[a]), f64::from(x[b]));
                            let m = f64::from(mscale);
                            let exact_a = m * (u * angle.cos() - v * angle.sin());
                            let exact_b = m * (u * angle.sin() + v * angle.cos());
                            let bound = 4e-7 * m * u.hypot(v);
                            assert!((f64::from(out[a]) - exact_a).abs() <= bound);
                            assert!((f64::from(out[b]) - exact_b).abs() <= bound);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_is_the_same_in_any_company_on_any_threads() {
    let mut rng = rng(41);
    let (n_head, head_dim, n) = (4, 64, 200);
    let pos: Vec<u32> = (0..n as u32).map(|t| 1000 + 7 * t).collect();
    let freq = inv_freq(head_dim, 1e4);
    let x = normal(&mut rng, n * n_head * head_dim, 1.0);
    for &isa in available() {
        let rotate = |n_threads, x: &[f32], pos: &[u32]| {
            let mut out = x.to_vec();
            let pool = Pool::new(n_threads);
            let kind = RopeKind::Neox;
            rope_with(
                isa, &pool, kind, &mut out, n_head, head_dim, head_dim, pos, &freq, 1.0,
            );
            out
        };
        let all = rotate(3, &x, &pos);
        for (t, all) in all.chunks(n_head * head_dim).enumerate() {
            let x = &x[t * n_head * head_dim..(t + 1) * n_head * head_dim];
            assert_eq!(bits(&rotate(1, x, &pos[t..=t])), bits(all));
        }
    }
}
