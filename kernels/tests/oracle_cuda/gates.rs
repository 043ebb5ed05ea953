//! The gates of AHN and of the nodes trunk against F64: one or two F32 functions each, 2e-6.

use crate::{close, device, get, normal, poisoned, put, rng};
use mneme_kernels::cuda::gates;

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn sigmoid_and_decay() {
    let Some(dev) = device() else { return };
    let mut rng = rng(6);
    for (n, n_head) in [(1, 1), (7, 3), (40, 14)] {
        for size in [0.1, 5.0, 60.0] {
            let x = normal(&mut rng, n * n_head, size);
            let (a, bias) = (normal(&mut rng, n_head, 1.0), normal(&mut rng, n_head, 1.0));
            let mut out = put(dev, &x);
            gates::sigmoid(dev, out.all_mut()).expect("sigmoid");
            let expected: Vec<f32> = x
                .iter()
                .map(|&x| (1.0 / (1.0 + (-f64::from(x)).exp())) as f32)
                .collect();
            close(&expected, &get(dev, &out), 2e-6, "sigmoid");
            let mut out = put(dev, &x);
            gates::decay(
                dev,
                out.all_mut(),
                put(dev, &a).all(),
                put(dev, &bias).all(),
            )
            .expect("decay");
            let expected: Vec<f32> = x
                .iter()
                .enumerate()
                .map(|(i, &x)| {
                    let h = i % n_head;
                    let x = f64::from(x) + f64::from(bias[h]);
                    (f64::from(a[h]) * (x.max(0.0) + (-x.abs()).exp().ln_1p())) as f32
                })
                .collect();
            close(&expected, &get(dev, &out), 2e-6, "decay");
        }
    }
}

/// In one call, and token by token with the past carried: the same bits.
#[test]
fn convolution_carries_its_past() {
    let Some(dev) = device() else { return };
    let mut rng = rng(7);
    for (n, w) in [(1, 5), (2, 64), (9, 300), (16, 3), (17, 257), (50, 31)] {
        let (x, taps) = (normal(&mut rng, n * w, 1.0), normal(&mut rng, 4 * w, 0.5));
        let past = normal(&mut rng, 3 * w, 1.0);
        let inputs: Vec<f32> = past.iter().chain(&x).copied().collect();
        let expected: Vec<f32> = (0..n * w)
            .map(|i| {
                let (t, c) = (i / w, i % w);
                let sum = (0..4)
                    .map(|j| f64::from(taps[4 * c + j]) * f64::from(inputs[(t + j) * w + c]))
                    .sum();
                silu(sum) as f32
            })
            .collect();
        let (taps, x, past) = (put(dev, &taps), put(dev, &x), put(dev, &past));
        let (mut out, mut next) = (poisoned(dev, n * w), poisoned(dev, 3 * w));
        gates::conv_silu(
            dev,
            x.all(),
            taps.all(),
            past.all(),
            next.all_mut(),
            out.all_mut(),
        )
        .expect("conv");
        close(&expected, &get(dev, &out), 2e-6, "conv_silu");
        assert_eq!(get(dev, &next), inputs[n * w..]);
        let (mut steps, mut before) = (poisoned(dev, n * w), past);
        for t in 0..n {
            let row = t * w..(t + 1) * w;
            let mut next = poisoned(dev, 3 * w);
            gates::conv_silu(
                dev,
                x.slice(row.clone()),
                taps.all(),
                before.all(),
                next.all_mut(),
                steps.slice_mut(row),
            )
            .expect("conv");
            before = next;
        }
        assert_eq!(get(dev, &out), get(dev, &steps));
        let mut next = poisoned(dev, 3 * w);
        let (nothing, mut none) = (put::<f32>(dev, &[]), poisoned(dev, 0));
        gates::conv_silu(
            dev,
            nothing.all(),
            taps.all(),
            before.all(),
            next.all_mut(),
            none.all_mut(),
        )
        .expect("no tokens");
        assert_eq!(get(dev, &next), get(dev, &before));
    }
}

#[test]
fn heads_are_gated_and_projected() {
    let Some(dev) = device() else { return };
    let mut rng = rng(8);
    for (n, n_head, d) in [(1, 1, 3), (5, 2, 64), (9, 3, 130)] {
        let (x, gate) = (
            normal(&mut rng, n * n_head * d, 1.0),
            normal(&mut rng, n * n_head, 3.0),
        );
        let mut out = put(dev, &x);
        gates::gate_heads(dev, out.all_mut(), put(dev, &gate).all(), d).expect("gate_heads");
        let expected: Vec<f32> = (0..x.len())
            .map(|i| (f64::from(x[i]) * silu(f64::from(gate[i / d]))) as f32)
            .collect();
        close(&expected, &get(dev, &out), 2e-6, "gate_heads");
        let (w, y) = (
            normal(&mut rng, n_head * d * d, 0.1),
            normal(&mut rng, x.len(), 1.0),
        );
        let mut out = put(dev, &y);
        gates::project_heads(
            dev,
            put(dev, &x).all(),
            put(dev, &w).all(),
            d,
            out.all_mut(),
        )
        .expect("project_heads");
        let expected: Vec<f32> = (0..x.len())
            .map(|i| {
                let (row, to) = (i / d, i % d);
                let head = row % n_head;
                let sum: f64 = (0..d)
                    .map(|j| f64::from(x[row * d + j]) * f64::from(w[(head * d + j) * d + to]))
                    .sum();
                (f64::from(y[i]) + sum) as f32
            })
            .collect();
        close(&expected, &get(dev, &out), 5e-6, "project_heads");
    }
}
