//! The gates of AHN and of the nodes trunk against F64: one or two F32 functions each, 2e-6.

use crate::{close, device, get, normal, poisoned, put, rng};
use mneme_kernels::cuda::gates::{self, Conv};
use mneme_kernels::cuda::{Buffer, Device, View};

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

/// The convolution of one sequence: its rows, and the inputs that are carried on.
fn conv(
    dev: &Device,
    x: View<'_, f32>,
    taps: &Buffer<f32>,
    past: &Buffer<f32>,
) -> (Vec<f32>, Buffer<f32>) {
    let (mut out, mut next) = (poisoned(dev, x.len()), poisoned(dev, past.len()));
    let seq = Conv {
        n: x.len() * 3 / past.len(),
        past: past.all(),
        next: next.all_mut(),
    };
    gates::conv_silu(dev, x, taps.all(), &mut [seq], out.all_mut()).expect("conv");
    (get(dev, &out), next)
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
        let (out, next) = conv(dev, x.all(), &taps, &past);
        close(&expected, &out, 2e-6, "conv_silu");
        assert_eq!(get(dev, &next), inputs[n * w..]);
        let (mut steps, mut before) = (Vec::new(), past);
        for t in 0..n {
            let (row, next) = conv(dev, x.slice(t * w..(t + 1) * w), &taps, &before);
            steps.extend(row);
            before = next;
        }
        assert_eq!(out, steps);
        let (none, next) = conv(dev, x.slice(0..0), &taps, &before);
        assert!(none.is_empty());
        assert_eq!(get(dev, &next), get(dev, &before));
    }
}

/// Sequences stacked, more than one launch takes: the bits they have alone.
#[test]
fn convolutions_of_several_sequences_do_not_mix() {
    let Some(dev) = device() else { return };
    let mut rng = rng(9);
    let w = 37;
    for counts in [vec![1; 70], vec![5, 0, 1, 40, 2]] {
        let rows: usize = counts.iter().sum();
        let taps = put(dev, &normal(&mut rng, 4 * w, 0.5));
        let x = put(dev, &normal(&mut rng, rows * w, 1.0));
        let pasts: Vec<Buffer<f32>> = counts
            .iter()
            .map(|_| put(dev, &normal(&mut rng, 3 * w, 1.0)))
            .collect();
        let mut nexts: Vec<_> = counts.iter().map(|_| poisoned(dev, 3 * w)).collect();
        let mut out = poisoned(dev, rows * w);
        let mut seqs: Vec<Conv<'_>> = (counts.iter().zip(&pasts).zip(&mut nexts))
            .map(|((&n, past), next)| Conv {
                n,
                past: past.all(),
                next: next.all_mut(),
            })
            .collect();
        gates::conv_silu(dev, x.all(), taps.all(), &mut seqs, out.all_mut()).expect("conv");
        let (got, mut row) = (get(dev, &out), 0);
        for ((n, past), next) in counts.into_iter().zip(&pasts).zip(&nexts) {
            let mine = row * w..(row + n) * w;
            let (alone, after) = conv(dev, x.slice(mine.clone()), &taps, past);
            assert_eq!(got[mine], alone);
            assert_eq!(get(dev, next), get(dev, &after));
            row += n;
        }
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
