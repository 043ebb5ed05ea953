//! Every op on the device against the scalar instruction set of the host (F64 sums).
//!
//! With `--features cuda-host` the device is the host emulation of the same kernel sources; with
//! `--features cuda` it is the first GPU, and without one every test says so and passes. Outputs
//! are poisoned with NaN first, shapes are ragged on purpose, and each test states its bound.
#![cfg(any(feature = "cuda", feature = "cuda-host"))]

mod add;
mod attend;
mod device;
mod gates;
mod graph;
mod mul_mat;
mod recur;
mod rms_norm;
mod rope;
mod swiglu;
mod top_k;

use mneme_kernels::cuda::{Buffer, Device, Plain};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use std::sync::OnceLock;

/// The device, opened once; `None`, said aloud, where there is none.
fn device() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    DEVICE
        .get_or_init(|| match Device::open(0) {
            Ok(device) => {
                eprintln!("device: {}", device.name());
                Some(device)
            }
            Err(e) => {
                eprintln!("skipped, nothing was compared: {e}");
                None
            }
        })
        .as_ref()
}

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Roughly normal numbers of size `scale`.
fn normal(rng: &mut impl Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n)
        .map(|_| {
            let sum: f32 = (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum();
            sum * 0.7 * scale
        })
        .collect()
}

fn put<T: Plain>(dev: &Device, x: &[T]) -> Buffer<T> {
    dev.upload(x).expect("room on the device")
}

/// A buffer of NaN.
fn poisoned(dev: &Device, n: usize) -> Buffer<f32> {
    put(dev, &vec![f32::NAN; n])
}

fn get<T: Plain + Default>(dev: &Device, x: &Buffer<T>) -> Vec<T> {
    let mut out = vec![T::default(); x.len()];
    dev.read(x.all(), &mut out).expect("work on the device");
    out
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

/// Every number within `bound` of the largest expected one.
fn close(expected: &[f32], got: &[f32], bound: f32, name: &str) {
    assert_eq!(expected.len(), got.len(), "{name}: lengths");
    let largest = expected.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    for (i, (e, g)) in expected.iter().zip(got).enumerate() {
        assert!(
            (e - g).abs() <= bound * largest,
            "{name}[{i}] is {g}, expected {e}: off by {:e} of the largest, allowed {bound:e}",
            (e - g).abs() / largest
        );
    }
}
