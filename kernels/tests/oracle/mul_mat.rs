//! `mul_mat`: against F64 within the error that 8-bit activations bring, and to the bit against
//! a plain model of the same quantised arithmetic.

use crate::{bits, normal, poisoned, rng, vector_isas};
use half::{bf16, f16};
use mneme_kernels::dispatch::Isa;
use mneme_kernels::mul_mat::{Error, Packed, WeightType, mul_mat};
use mneme_kernels::pool::Pool;
use mneme_kernels::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0,
    BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, IQ4_VALUES, dequantize_row,
};
use proptest::prelude::*;
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
        let d = f16::from_f32(scale * rng.random_range(-1.0f32..1.0)).to_le_bytes();
        match ty {
            WeightType::F32 => {
                let v = scale * rng.random_range(-1.0f32..1.0);
                block.copy_from_slice(&v.to_le_bytes());
            }
            WeightType::F16 => block.copy_from_slice(&d),
            WeightType::BF16 => {
                let v = bf16::from_f32(scale * rng.random_range(-1.0f32..1.0));
                block.copy_from_slice(&v.to_le_bytes());
            }
            WeightType::Q8_0
            | WeightType::Q4_0
            | WeightType::Q5_0
            | WeightType::IQ4_NL
            | WeightType::IQ4_XS => block[..2].copy_from_slice(&d),
            WeightType::Q4_1 | WeightType::Q5_1 | WeightType::Q4_K | WeightType::Q5_K => {
                block[..2].copy_from_slice(&d);
                let dmin = f16::from_f32(scale * rng.random_range(-1.0f32..1.0));
                block[2..4].copy_from_slice(&dmin.to_le_bytes());
            }
            WeightType::Q2_K => {
                block[80..82].copy_from_slice(&d);
                let dmin = f16::from_f32(scale * rng.random_range(-1.0f32..1.0));
                block[82..].copy_from_slice(&dmin.to_le_bytes());
            }
            WeightType::Q3_K => block[108..].copy_from_slice(&d),
            WeightType::Q6_K => block[208..].copy_from_slice(&d),
        }
        bytes.extend(block);
    }
    bytes
}

/// The activations of one block as every instruction set must quantise them.
fn quantize(x: &[f32]) -> (f32, Vec<i32>) {
    let max = x.iter().fold(0.0f32, |m, v| {
        if v.is_nan() || m.is_nan() {
            f32::NAN
        } else {
            m.max(v.abs())
        }
    });
    if !max.is_finite() {
        return (f32::NAN, vec![0; x.len()]);
    }
    if max < 1e-36 {
        return (0.0, vec![0; x.len()]);
    }
    let inverse = 127.0 / max;
    let q = x.iter().map(|v| (v * inverse).round_ties_even() as i32);
    (max / 127.0, q.collect())
}

fn dot(w: impl Iterator<Item = i32>, x: &[i32]) -> i32 {
    w.zip(x).map(|(w, x)| w * x).sum()
}

/// The quantised arithmetic, one row times one token.
fn model(ty: WeightType, row: &[u8], x: &[f32]) -> f32 {
    let blocks = row.chunks_exact(ty.block_bytes());
    let blocks = blocks.zip(x.chunks_exact(ty.block_len()));
    let mut acc = 0.0f32;
    match ty {
        WeightType::F32 | WeightType::F16 | WeightType::BF16 => {
            let mut sums = [0.0f32; 2];
            let mut w = vec![0.0; x.len()];
            dequantize_row(ty, row, &mut w);
            for (k, (w, x)) in w.iter().zip(x).enumerate() {
                sums[k % 2] = w.mul_add(*x, sums[k % 2]);
            }
            acc = sums[0] + sums[1];
        }
        WeightType::Q8_0 => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockQ8_0::read(b), quantize(x));
                let sum = dot(b.q.iter().map(|&w| w as i32), &q);
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
            }
        }
        WeightType::Q4_0 => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockQ4_0::read(b), quantize(x));
                let sum = dot(b.q.iter().map(|&w| w as i32 - 8), &q);
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
            }
        }
        WeightType::Q5_0 => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockQ5_0::read(b), quantize(x));
                let sum = dot(b.q.iter().map(|&w| w as i32 - 16), &q);
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
            }
        }
        WeightType::IQ4_NL => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockIQ4NL::read(b), quantize(x));
                let sum = dot(b.q.iter().map(|&w| IQ4_VALUES[w as usize] as i32), &q);
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
            }
        }
        WeightType::Q4_1 | WeightType::Q5_1 => {
            for (b, x) in blocks {
                let (dx, q) = quantize(x);
                let (d, m, w) = if ty == WeightType::Q4_1 {
                    let b = BlockQ4_1::read(b);
                    (b.d, b.m, b.q)
                } else {
                    let b = BlockQ5_1::read(b);
                    (b.d, b.m, b.q)
                };
                let sum = dot(w.iter().map(|&w| w as i32), &q);
                acc = (sum as f32).mul_add(d.to_f32() * dx, acc);
                acc = m.to_f32().mul_add(dx * q.iter().sum::<i32>() as f32, acc);
            }
        }
        WeightType::IQ4_XS => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockIQ4XS::read(b), quantize(x));
                let mut sum = 0;
                for (s, q) in q.chunks_exact(32).enumerate() {
                    let w = b.q[32 * s..].iter();
                    let w = w.map(|&w| IQ4_VALUES[w as usize] as i32);
                    sum += b.scale[s] as i32 * dot(w, q);
                }
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
            }
        }
        WeightType::Q4_K | WeightType::Q5_K => {
            for (b, x) in blocks {
                let (dx, q) = quantize(x);
                let (d, dmin, scale, mins, w) = if ty == WeightType::Q4_K {
                    let b = BlockQ4K::read(b);
                    (b.d, b.dmin, b.scale, b.min, b.q)
                } else {
                    let b = BlockQ5K::read(b);
                    (b.d, b.dmin, b.scale, b.min, b.q)
                };
                let (mut sum, mut min) = (0, 0);
                for (s, q) in q.chunks_exact(32).enumerate() {
                    let w = w[32 * s..].iter().map(|&w| w as i32);
                    sum += scale[s] as i32 * dot(w, q);
                    min += mins[s] as i32 * q.iter().sum::<i32>();
                }
                acc = (sum as f32).mul_add(d.to_f32() * dx, acc);
                acc = (-(min as f32)).mul_add(dmin.to_f32() * dx, acc);
            }
        }
        WeightType::Q2_K => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockQ2K::read(b), quantize(x));
                let (mut sum, mut min) = (0, 0);
                for (s, q) in q.chunks_exact(16).enumerate() {
                    let w = b.q[16 * s..].iter().map(|&w| w as i32);
                    sum += b.scale[s] as i32 * dot(w, q);
                    min += b.min[s] as i32 * q.iter().sum::<i32>();
                }
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
                acc = (-(min as f32)).mul_add(b.dmin.to_f32() * dx, acc);
            }
        }
        WeightType::Q3_K => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockQ3K::read(b), quantize(x));
                let mut sum = 0;
                for (s, q) in q.chunks_exact(16).enumerate() {
                    let w = b.q[16 * s..].iter().map(|&w| w as i32 - 4);
                    sum += b.scale[s] as i32 * dot(w, q);
                }
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
            }
        }
        WeightType::Q6_K => {
            for (b, x) in blocks {
                let (b, (dx, q)) = (BlockQ6K::read(b), quantize(x));
                let mut sum = 0;
                for (s, q) in q.chunks_exact(16).enumerate() {
                    let w = b.q[16 * s..].iter().map(|&w| w as i32 - 32);
                    sum += b.scale[s] as i32 * dot(w, q);
                }
                acc = (sum as f32).mul_add(b.d.to_f32() * dx, acc);
            }
        }
    }
    acc
}

/// How far one row times one token may be from the F64 sum: half a step of each block's
/// activation scale times the row's magnitudes, and one F32 rounding per accumulation.
fn bound(ty: WeightType, row: &[u8], x: &[f32]) -> f64 {
    let mut w = vec![0.0; x.len()];
    dequantize_row(ty, row, &mut w);
    let block_len = ty.block_len().max(32).min(x.len());
    let quantised = ty.block_len() > 1;
    let mut rounding = 0.0;
    let mut magnitude = 0.0;
    for (i, (w, x)) in w.chunks(block_len).zip(x.chunks(block_len)).enumerate() {
        let max = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let sum: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
        if quantised {
            rounding += 0.501 * f64::from(max) / 127.0 * sum;
        }
        // These add the scaled quants and take the minima away, each larger than the weights.
        let largest = |min: &[u8]| min.iter().copied().max().unwrap_or(0);
        let minima = match ty {
            WeightType::Q4_1 => Some(BlockQ4_1::read(&row[20 * i..])).map(|b| (b.m, 1)),
            WeightType::Q5_1 => Some(BlockQ5_1::read(&row[24 * i..])).map(|b| (b.m, 1)),
            WeightType::Q2_K => {
                Some(BlockQ2K::read(&row[84 * i..])).map(|b| (b.dmin, largest(&b.min)))
            }
            WeightType::Q4_K => {
                Some(BlockQ4K::read(&row[144 * i..])).map(|b| (b.dmin, largest(&b.min)))
            }
            WeightType::Q5_K => {
                Some(BlockQ5K::read(&row[176 * i..])).map(|b| (b.dmin, largest(&b.min)))
            }
            _ => None,
        };
        let largest = minima.map_or(0.0, |(dmin, min)| {
            block_len as f64 * 2.0 * f64::from(dmin.to_f32().abs()) * f64::from(min)
        });
        magnitude += f64::from(max) * (sum + largest);
    }
    let n = (x.len() / ty.block_len()) as f64 + 4.0;
    // Weights are dequantised with up to three roundings where the kernels have none.
    rounding + magnitude * (n + 4.0) * 2f64.powi(-24) + 1e-36
}

fn run(
    isa: Isa,
    pool: &Pool,
    ty: WeightType,
    shape: (usize, usize),
    w: &[u8],
    x: &[f32],
) -> Vec<f32> {
    let (n_rows, n_cols) = shape;
    let n_tokens = x.len() / n_cols;
    let packed = Packed::pack_for(isa, pool, ty, n_rows, n_cols, w).expect("valid matrix");
    let mut out = poisoned(n_tokens * n_rows);
    mul_mat(pool, x, n_tokens, &mut [(&packed, &mut out)]);
    out
}

/// Numbers of columns that are whole blocks, odd ones and half tiles among them.
fn columns(ty: WeightType) -> &'static [usize] {
    match ty.block_len() {
        1 => &[1, 2, 7, 64, 333],
        32 => &[32, 64, 96, 256, 288, 512, 896],
        _ => &[256, 512, 768, 2048],
    }
}

#[test]
fn equals_the_model_to_the_bit_and_f64_within_the_bound() {
    let pool = Pool::new(2);
    let mut rng = rng(1);
    let token_counts = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64];
    for ty in WeightType::ALL {
        for &n_cols in columns(ty) {
            for (i, n_rows) in [1, 15, 16, 17, 33].into_iter().enumerate() {
                let w = weights(&mut rng, ty, n_rows, n_cols, 0.01);
                let row_bytes = w.len() / n_rows;
                for &n_tokens in token_counts.iter().skip(i % 2).step_by(2) {
                    let x = normal(&mut rng, n_tokens * n_cols, 1.0);
                    let exact = run(Isa::Scalar, &pool, ty, (n_rows, n_cols), &w, &x);
                    for isa in vector_isas() {
                        let got = run(isa, &pool, ty, (n_rows, n_cols), &w, &x);
                        for (j, (&got, &exact)) in got.iter().zip(&exact).enumerate() {
                            let (t, r) = (j / n_rows, j % n_rows);
                            let row = &w[r * row_bytes..(r + 1) * row_bytes];
                            let x = &x[t * n_cols..(t + 1) * n_cols];
                            let place = format!(
                                "{} {} {n_rows} x {n_cols}, {n_tokens} tokens: row {r} token {t}",
                                isa.name(),
                                ty.name()
                            );
                            let model = model(ty, row, x);
                            assert_eq!(got.to_bits(), model.to_bits(), "{place}: {got} {model}");
                            let error = (f64::from(got) - f64::from(exact)).abs();
                            let bound = bound(ty, row, x);
                            assert!(error <= bound, "{place}: {got} {exact}, bound {bound}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn scales_from_tiny_to_large_stay_within_the_bound() {
    let pool = Pool::new(1);
    let mut rng = rng(2);
    let (n_rows, n_cols, n_tokens) = (17, 512, 5);
    for ty in WeightType::ALL {
        for (w_scale, x_scale) in [(1e-4, 1e-30), (30.0, 1e20), (1.0, 1e-38), (1e-3, 1e4)] {
            let w = weights(&mut rng, ty, n_rows, n_cols, w_scale);
            let row_bytes = w.len() / n_rows;
            let x = normal(&mut rng, n_tokens * n_cols, x_scale);
            let exact = run(Isa::Scalar, &pool, ty, (n_rows, n_cols), &w, &x);
            for isa in vector_isas() {
                let got = run(isa, &pool, ty, (n_rows, n_cols), &w, &x);
                for (j, (&got, &exact)) in got.iter().zip(&exact).enumerate() {
                    let (t, r) = (j / n_rows, j % n_rows);
                    let row = &w[r * row_bytes..(r + 1) * row_bytes];
                    let x = &x[t * n_cols..(t + 1) * n_cols];
                    // Blocks below 1e-36 count as zero.
                    let dropped = 512.0 * 2000.0 * 1e-36 * f64::from(w_scale);
                    let bound = bound(ty, row, x) + dropped;
                    let error = (f64::from(got) - f64::from(exact)).abs();
                    assert!(
                        error <= bound,
                        "{} {} scales {w_scale} {x_scale}: {got} {exact}, bound {bound}",
                        isa.name(),
                        ty.name()
                    );
                }
            }
        }
    }
}

#[test]
fn a_token_is_the_same_in_any_company_on_any_threads() {
    let mut rng = rng(3);
    let (n_rows, n_tokens) = (50, 67);
    for ty in WeightType::ALL {
        let n_cols = 768;
        let w = weights(&mut rng, ty, n_rows, n_cols, 0.02);
        let x = normal(&mut rng, n_tokens * n_cols, 3.0);
        for isa in vector_isas() {
            let all = run(isa, &Pool::new(1), ty, (n_rows, n_cols), &w, &x);
            for n_threads in [2, 3] {
                let other = run(isa, &Pool::new(n_threads), ty, (n_rows, n_cols), &w, &x);
                assert_eq!(bits(&all), bits(&other), "{} threads", ty.name());
            }
            let pool = Pool::new(2);
            for chunk in [1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 40] {
                let mut pieces = Vec::new();
                for x in x.chunks(chunk * n_cols) {
                    pieces.extend(run(isa, &pool, ty, (n_rows, n_cols), &w, x));
                }
                assert_eq!(
                    bits(&all),
                    bits(&pieces),
                    "{} {} in chunks of {chunk}",
                    isa.name(),
                    ty.name()
                );
            }
        }
    }
}

#[test]
fn many_tokens_are_split_into_runs_without_a_trace() {
    let mut rng = rng(4);
    let (n_rows, n_cols, n_tokens) = (19, 256, 1100);
    for ty in WeightType::ALL {
        let w = weights(&mut rng, ty, n_rows, n_cols, 0.02);
        let x = normal(&mut rng, n_tokens * n_cols, 1.0);
        for isa in vector_isas() {
            let pool = Pool::new(2);
            let all = run(isa, &pool, ty, (n_rows, n_cols), &w, &x);
            let (a, b) = x.split_at(600 * n_cols);
            let mut halves = run(isa, &pool, ty, (n_rows, n_cols), &w, a);
            halves.extend(run(isa, &pool, ty, (n_rows, n_cols), &w, b));
            assert_eq!(bits(&all), bits(&halves), "{} {}", isa.name(), ty.name());
        }
    }
}

#[test]
fn matrices_of_several_types_share_a_call() {
    let pool = Pool::new(2);
    let mut rng = rng(5);
    let n_cols = 512;
    for n_tokens in [1, 20] {
        let x = normal(&mut rng, n_tokens * n_cols, 1.0);
        for isa in vector_isas() {
            let mats: Vec<(Packed, Vec<f32>)> = WeightType::ALL
                .iter()
                .enumerate()
                .map(|(i, &ty)| {
                    let n_rows = 10 + 16 * i;
                    let w = weights(&mut rng, ty, n_rows, n_cols, 0.1);
                    let alone = run(isa, &pool, ty, (n_rows, n_cols), &w, &x);
                    let packed = Packed::pack_for(isa, &pool, ty, n_rows, n_cols, &w);
                    (packed.expect("valid matrix"), alone)
                })
                .collect();
            let mut outs: Vec<Vec<f32>> = mats.iter().map(|(_, a)| poisoned(a.len())).collect();
            let mut call: Vec<(&Packed, &mut [f32])> = mats
                .iter()
                .zip(&mut outs)
                .map(|((w, _), out)| (w, &mut out[..]))
                .collect();
            mul_mat(&pool, &x, n_tokens, &mut call);
            for ((_, alone), out) in mats.iter().zip(&outs) {
                assert_eq!(bits(alone), bits(out));
            }
        }
    }
}

#[test]
fn infinity_and_nan_reach_the_result_of_their_token_only() {
    let pool = Pool::new(1);
    let mut rng = rng(6);
    let (n_rows, n_cols) = (16, 256);
    for ty in WeightType::ALL {
        let w = weights(&mut rng, ty, n_rows, n_cols, 0.1);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = normal(&mut rng, 3 * n_cols, 1.0);
            x[n_cols + 70] = bad;
            for isa in vector_isas() {
                let out = run(isa, &pool, ty, (n_rows, n_cols), &w, &x);
                assert!(out[..n_rows].iter().all(|v| v.is_finite()));
                assert!(out[n_rows..2 * n_rows].iter().all(|v| !v.is_finite()));
                assert!(out[2 * n_rows..].iter().all(|v| v.is_finite()));
            }
        }
    }
}

#[test]
fn no_rows_and_no_tokens_are_nothing_to_do() {
    let pool = Pool::new(2);
    for isa in mneme_kernels::dispatch::available() {
        let none = Packed::pack_for(*isa, &pool, WeightType::Q8_0, 0, 64, &[]).expect("empty");
        mul_mat(&pool, &[1.0; 64], 1, &mut [(&none, &mut [])]);
        let w = [0u8; 34];
        let one = Packed::pack_for(*isa, &pool, WeightType::Q8_0, 1, 32, &w).expect("one row");
        mul_mat(&pool, &[], 0, &mut [(&one, &mut [])]);
    }
}

#[test]
fn a_wrong_shape_is_refused() {
    let pool = Pool::new(1);
    let pack = |ty, n_rows, n_cols, bytes: &[u8]| {
        Packed::pack(&pool, ty, n_rows, n_cols, bytes).map(|_| ())
    };
    let error = pack(WeightType::Q4_K, 1, 128, &[0; 72]).expect_err("half a block");
    assert!(matches!(error, Error::Columns { n_cols: 128, .. }));
    let error = pack(WeightType::Q8_0, 2, 32, &[0; 67]).expect_err("a byte short");
    assert_eq!(error.to_string(), "2 x 32 Q8_0: expected 68 bytes, got 67");
    let error = pack(WeightType::F32, usize::MAX, 8, &[]).expect_err("too large");
    assert!(matches!(error, Error::TooLarge { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any shape, any type: the vector forms agree with the model to the bit.
    #[test]
    fn any_shape_equals_the_model(
        ty in prop::sample::select(&WeightType::ALL[..]),
        n_rows in 1usize..70,
        n_blocks in 1usize..12,
        n_tokens in 1usize..40,
        seed: u64,
    ) {
        let mut rng = rng(seed);
        let n_cols = n_blocks * ty.block_len();
        let w = weights(&mut rng, ty, n_rows, n_cols, 0.05);
        let row_bytes = w.len() / n_rows;
        let x = normal(&mut rng, n_tokens * n_cols, 1.0);
        let pool = Pool::new(2);
        for isa in vector_isas() {
            let got = run(isa, &pool, ty, (n_rows, n_cols), &w, &x);
            for (j, &got) in got.iter().enumerate() {
                let (t, r) = (j / n_rows, j % n_rows);
                let row = &w[r * row_bytes..(r + 1) * row_bytes];
                let model = model(ty, row, &x[t * n_cols..(t + 1) * n_cols]);
                prop_assert_eq!(got.to_bits(), model.to_bits());
            }
        }
    }
}
