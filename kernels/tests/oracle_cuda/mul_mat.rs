//! `mul_mat` and `get_rows`: against F64 sums over dequantised weights.
//!
//! Bound: activations are rounded to 2^-11 of each number (half of F16's last bit), weights at most
//! three times to the same (scale, product, sum with the minimum; F16 and BF16 not at all, types held as
//! F16 once, F32 in two parts to 2^-22), sums are F32.

use crate::{bits, device, get, normal, poisoned, put, rng};
use half::{bf16, f16};
use mneme_kernels::cuda::mul_mat::{Packed, mul_mat};
use mneme_kernels::cuda::{self, Device, Error};
use mneme_kernels::quant::{BlockQ4K, WeightType, dequantize_row};
use rand::{Rng, RngExt};

/// Random rows as a file stores them: arbitrary quants and sub-scales, scales near `scale`.
fn weights(
    rng: &mut impl Rng,
    ty: WeightType,
    n_rows: usize,
    n_cols: usize,
    scale: f32,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..n_rows * n_cols / ty.block_len() {
        let mut block = vec![0u8; ty.block_bytes()];
        rng.fill_bytes(&mut block);
        let mut number = || scale * rng.random_range(-1.0f32..1.0);
        let d = f16::from_f32(number()).to_le_bytes();
        match ty {
            WeightType::F32 => block.copy_from_slice(&number().to_le_bytes()),
            WeightType::F16 => block.copy_from_slice(&d),
            WeightType::BF16 => block.copy_from_slice(&bf16::from_f32(number()).to_le_bytes()),
            WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q5_0 | WeightType::IQ4_NL => {
                block[..2].copy_from_slice(&d);
            }
            WeightType::IQ4_XS => block[..2].copy_from_slice(&d),
            WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => {
                block[..2].copy_from_slice(&d);
                block[2..4].copy_from_slice(&f16::from_f32(number()).to_le_bytes());
            }
            WeightType::Q2_K => {
                block[80..82].copy_from_slice(&d);
                block[82..].copy_from_slice(&f16::from_f32(number()).to_le_bytes());
            }
            WeightType::Q3_K => block[108..].copy_from_slice(&d),
            WeightType::Q6_K => block[208..].copy_from_slice(&d),
        }
        bytes.extend(block);
    }
    bytes
}

fn run(dev: &Device, ty: WeightType, shape: (usize, usize), w: &[u8], x: &[f32]) -> Vec<f32> {
    let n_tokens = x.len() / shape.1;
    let packed = Packed::pack(dev, ty, shape.0, shape.1, w).expect("a valid matrix");
    let counted = Packed::bytes_of(ty, shape.0 as u64, shape.1 as u64);
    assert_eq!(packed.n_bytes() as u64, counted, "{ty:?}, {shape:?}");
    let mut out = poisoned(dev, n_tokens * shape.0);
    mul_mat(
        dev,
        put(dev, x).all(),
        n_tokens,
        &mut [(&packed, out.all_mut())],
    )
    .expect("mul_mat");
    get(dev, &out)
}

/// Held as F16 on the device.
fn is_f16(ty: WeightType) -> bool {
    matches!(
        ty,
        WeightType::F16
            | WeightType::BF16
            | WeightType::Q4_1
            | WeightType::Q5_1
            | WeightType::Q2_K
            | WeightType::Q5_K
            | WeightType::IQ4_XS
    )
}

/// Compares every number with its F64 sum.
fn check(ty: WeightType, shape: (usize, usize), w: &[u8], x: &[f32], got: &[f32], name: &str) {
    let (n_rows, n_cols) = shape;
    let row_bytes = w.len() / n_rows;
    let mut row = vec![0f32; n_cols];
    for r in 0..n_rows {
        let bytes = &w[r * row_bytes..(r + 1) * row_bytes];
        dequantize_row(ty, bytes, &mut row);
        // What a rounding of a weight is relative to: Q4_K takes a minimum away from a product.
        let size = |c: usize| {
            let w = f64::from(row[c].abs());
            if ty == WeightType::Q4_K {
                let b = BlockQ4K::read(&bytes[c / 256 * 144..]);
                let min = b.dmin.to_f64().abs() * f64::from(b.min[c % 256 / 32]);
                w + 2.0 * min
            } else {
                w
            }
        };
        let largest_w = (0..n_cols).map(size).fold(0.0, f64::max);
        for (t, x) in x.chunks_exact(n_cols).enumerate() {
            let exact: f64 = row
                .iter()
                .zip(x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum();
            let sum: f64 = (0..n_cols).map(|c| size(c) * f64::from(x[c].abs())).sum();
            let largest_x = x.iter().fold(0f32, |m, x| m.max(x.abs()));
            let relative = match ty {
                WeightType::F32 => 3.0 * 2f64.powi(-22) + n_cols as f64 * 2f64.powi(-24),
                WeightType::F16 | WeightType::BF16 => 1.05 * 2f64.powi(-11),
                ty if is_f16(ty) => 2.05 * 2f64.powi(-11),
                _ => 4.05 * 2f64.powi(-11),
            };
            // What lies 2^-37 below a row's or a token's largest number may be lost.
            let lost = 2f64.powi(-37) * n_cols as f64 * largest_w * f64::from(largest_x);
            let bound = relative * sum + 2.0 * lost + 1e-44;
            let got = f64::from(got[t * n_rows + r]);
            assert!(
                (got - exact).abs() <= bound,
                "{name}: row {r} token {t}: {got}, expected {exact}: off by {:e}, allowed {bound:e}",
                (got - exact).abs()
            );
        }
    }
}

/// Numbers of columns that are whole blocks, odd ones and half chunks among them.
fn columns(ty: WeightType) -> &'static [usize] {
    match ty.block_len() {
        1 => &[1, 2, 63, 64, 333, 1000],
        32 => &[32, 64, 96, 288, 896],
        _ => &[256, 512, 2048],
    }
}

#[test]
fn every_type_and_shape_within_the_bound() {
    let Some(dev) = device() else { return };
    let mut rng = rng(20);
    for ty in WeightType::ALL {
        for &n_cols in columns(ty) {
            for (n_rows, n_tokens) in [(1, 1), (15, 2), (16, 8), (17, 3), (33, 9), (70, 33)] {
                let w = weights(&mut rng, ty, n_rows, n_cols, 0.01);
                let x = normal(&mut rng, n_tokens * n_cols, 1.0);
                let got = run(dev, ty, (n_rows, n_cols), &w, &x);
                let name = format!("{} {n_rows} x {n_cols}, {n_tokens} tokens", ty.name());
                check(ty, (n_rows, n_cols), &w, &x, &got, &name);
            }
        }
    }
}

#[test]
fn scales_from_tiny_to_large_stay_within_the_bound() {
    let Some(dev) = device() else { return };
    let mut rng = rng(21);
    let (n_rows, n_cols) = (17, 512);
    for ty in WeightType::ALL {
        for (w_scale, x_scale) in [(1e-4, 1e-30), (30.0, 1e20), (1.0, 1e-38), (1e-3, 1e4)] {
            let w = weights(&mut rng, ty, n_rows, n_cols, w_scale);
            let mut x = normal(&mut rng, 5 * n_cols, x_scale);
            // One token with an outlier: the rest of it must not drown.
            x[7] *= 1000.0;
            let got = run(dev, ty, (n_rows, n_cols), &w, &x);
            let name = format!("{} at {w_scale} {x_scale}", ty.name());
            check(ty, (n_rows, n_cols), &w, &x, &got, &name);
        }
    }
}

/// Vector form, small and large tiles: the same bits for a token, whatever the company.
#[test]
fn a_token_is_the_same_in_any_company() {
    let Some(dev) = device() else { return };
    let mut rng = rng(22);
    for ty in WeightType::ALL {
        for (n_rows, n_cols) in [(150, 256), (40, 768)] {
            let w = weights(&mut rng, ty, n_rows, n_cols, 0.02);
            let n_tokens = 300;
            let x = normal(&mut rng, n_tokens * n_cols, 3.0);
            let all = run(dev, ty, (n_rows, n_cols), &w, &x);
            for (first, n) in [(0, 1), (3, 8), (100, 9), (40, 32), (200, 100)] {
                let part = &x[first * n_cols..(first + n) * n_cols];
                let part = run(dev, ty, (n_rows, n_cols), &w, part);
                let expected = &all[first * n_rows..(first + n) * n_rows];
                let name = format!("{} {n} tokens from {first}", ty.name());
                assert_eq!(bits(expected), bits(&part), "{name}");
            }
        }
    }
}

#[test]
fn matrices_of_several_types_share_a_call() {
    let Some(dev) = device() else { return };
    let mut rng = rng(23);
    let n_cols = 512;
    for n_tokens in [1, 20] {
        let x = normal(&mut rng, n_tokens * n_cols, 1.0);
        let x_dev = put(dev, &x);
        let mut packed = Vec::new();
        let mut alone = Vec::new();
        // More of one type than fit a launch, and an empty one.
        let types = WeightType::ALL.iter().chain([&WeightType::Q4_0; 9]);
        for (i, &ty) in types.enumerate() {
            let n_rows = if i == 9 { 0 } else { 10 + 16 * (i % 5) };
            let w = weights(&mut rng, ty, n_rows, n_cols, 0.1);
            alone.push(if n_rows == 0 {
                vec![]
            } else {
                run(dev, ty, (n_rows, n_cols), &w, &x)
            });
            packed.push(Packed::pack(dev, ty, n_rows, n_cols, &w).expect("valid"));
        }
        let mut outs: Vec<_> = alone.iter().map(|a| poisoned(dev, a.len())).collect();
        let mut call: Vec<_> = packed
            .iter()
            .zip(&mut outs)
            .map(|(w, out)| (w, out.all_mut()))
            .collect();
        mul_mat(dev, x_dev.all(), n_tokens, &mut call).expect("mul_mat");
        for (alone, out) in alone.iter().zip(&outs) {
            assert_eq!(bits(alone), bits(&get(dev, out)));
        }
    }
}

#[test]
fn infinity_and_nan_reach_the_result_of_their_token_only() {
    let Some(dev) = device() else { return };
    let mut rng = rng(24);
    let (n_rows, n_cols) = (16, 256);
    for ty in WeightType::ALL {
        let w = weights(&mut rng, ty, n_rows, n_cols, 0.1);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for n_tokens in [3, 12] {
                let mut x = normal(&mut rng, n_tokens * n_cols, 1.0);
                let clean = run(dev, ty, (n_rows, n_cols), &w, &x);
                x[n_cols + 5] = bad;
                let got = run(dev, ty, (n_rows, n_cols), &w, &x);
                for (i, (clean, got)) in clean.iter().zip(&got).enumerate() {
                    if i / n_rows == 1 {
                        assert!(!got.is_finite(), "{} {bad}: {got}", ty.name());
                    } else {
                        assert_eq!(clean.to_bits(), got.to_bits());
                    }
                }
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused_by_name() {
    let Some(dev) = device() else { return };
    let refused =
        |ty, n_rows, n_cols, bytes: &[u8]| match Packed::pack(dev, ty, n_rows, n_cols, bytes) {
            Err(Error::Matrix(e)) => e.to_string(),
            _ => panic!("not refused"),
        };
    assert!(refused(WeightType::Q4_K, 1, 100, &[]).contains("Q4_K"));
    assert!(refused(WeightType::Q8_0, 2, 32, &[0; 34]).contains("68"));
    assert!(refused(WeightType::F32, usize::MAX / 2, 64, &[]).contains("too large"));
}

#[test]
fn rows_are_what_the_file_says() {
    let Some(dev) = device() else { return };
    let mut rng = rng(25);
    for ty in WeightType::ALL {
        for &n_cols in columns(ty) {
            let n_rows = 37;
            let w = weights(&mut rng, ty, n_rows, n_cols, 0.3);
            let packed = Packed::pack(dev, ty, n_rows, n_cols, &w).expect("valid");
            let ids = [0u32, 36, 7, 8, 16, 15, 7, 37, u32::MAX];
            let mut out = poisoned(dev, ids.len() * n_cols);
            cuda::get_rows::get_rows(dev, &packed, put(dev, &ids).all(), out.all_mut())
                .expect("get_rows");
            let got = get(dev, &out);
            let row_bytes = w.len() / n_rows;
            let mut expected = vec![0f32; n_cols];
            for (&id, got) in ids.iter().zip(got.chunks(n_cols)) {
                if id as usize >= n_rows {
                    assert!(got.iter().all(|x| x.is_nan()));
                    continue;
                }
                let bytes = &w[id as usize * row_bytes..][..row_bytes];
                dequantize_row(ty, bytes, &mut expected);
                let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
                // F32 rounding of the same products in the same order; F32 tables keep 22 bits, and
                // those without a kernel are held as F16, whose rounding is 2^-11 of a number.
                let bound = match ty {
                    WeightType::F32 => 2e-7,
                    WeightType::F16 | WeightType::BF16 => 1e-7,
                    ty if is_f16(ty) => 2f32.powi(-11),
                    _ => 1e-7,
                };
                for (c, (e, g)) in expected.iter().zip(got).enumerate() {
                    assert!(
                        (e - g).abs() <= bound * largest,
                        "{} row {id} column {c}: {g}, expected {e}",
                        ty.name()
                    );
                }
            }
        }
    }
    let x = normal(&mut rng, 10 * 300, 1.0);
    let mut out = poisoned(dev, 3 * 300);
    let rows = put(dev, &[9u32, 0, 10]);
    cuda::get_rows::copy_rows(dev, put(dev, &x).all(), 300, rows.all(), out.all_mut())
        .expect("copy_rows");
    let got = get(dev, &out);
    assert_eq!(got[..300], x[2700..]);
    assert_eq!(got[300..600], x[..300]);
    assert!(got[600..].iter().all(|x| x.is_nan()));

    // The other way: two rows find their places, the third has none.
    let mut out = put(dev, &x);
    let back = put(dev, &got);
    let rows = put(dev, &[4u32, 9, 10]);
    cuda::get_rows::put_rows(dev, back.all(), 300, rows.all(), out.all_mut()).expect("put_rows");
    let mut expected = x.clone();
    expected[1200..1500].copy_from_slice(&got[..300]);
    expected[2700..].copy_from_slice(&got[300..600]);
    assert_eq!(get(dev, &out), expected);
}
