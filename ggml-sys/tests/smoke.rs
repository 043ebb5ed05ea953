//! ggml is compiled, bound and guarded: every type's table row is sound, every quantizer round-trips,
//! every compiled row set gives the same dot products, and misuse is refused instead of aborting.

use ggml_sys::{Error, RowDot, Type, dequantize, quantize_rows, raw};

/// Reproducible values in -1..1 with some spread.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0;
            uniform * uniform * uniform
        })
        .collect()
}

#[test]
fn table_matches_the_format() {
    // id, name, values per block, bytes per block: from the GGUF specification and block structs.
    let expected = [
        (0, "f32", 1, 4),
        (1, "f16", 1, 2),
        (2, "q4_0", 32, 18),
        (3, "q4_1", 32, 20),
        (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24),
        (8, "q8_0", 32, 34),
        (9, "q8_1", 32, 36),
        (10, "q2_K", 256, 84),
        (11, "q3_K", 256, 110),
        (12, "q4_K", 256, 144),
        (13, "q5_K", 256, 176),
        (14, "q6_K", 256, 210),
        (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66),
        (17, "iq2_xs", 256, 74),
        (18, "iq3_xxs", 256, 98),
        (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18),
        (21, "iq3_s", 256, 110),
        (22, "iq2_s", 256, 82),
        (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1),
        (25, "i16", 1, 2),
        (26, "i32", 1, 4),
        (27, "i64", 1, 8),
        (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56),
        (30, "bf16", 1, 2),
        (34, "tq1_0", 256, 54),
        (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17),
        (40, "nvfp4", 64, 36),
    ];
    for (id, name, block, size) in expected {
        let ty = Type::from_id(id).unwrap_or_else(|| panic!("type {id} is missing"));
        assert_eq!((ty.id(), ty.name()), (id, name));
        assert_eq!((ty.block_size(), ty.type_size()), (block, size), "{name}");
        assert_eq!(Type::from_name(&name.to_uppercase()), Some(ty));
        assert_eq!(ty.row_bytes(block * 3), Some(size * 3));
        assert_eq!(
            ty.row_bytes(usize::MAX / block * block),
            usize::MAX
                .checked_div(block)
                .and_then(|n| n.checked_mul(size))
        );
    }
    for removed in [4, 5, 31, 32, 33, 36, 37, 38, raw::GGML_TYPE_COUNT, u32::MAX] {
        assert_eq!(Type::from_id(removed), None, "type {removed} was removed");
    }
}

#[test]
fn every_quantizer_round_trips() {
    let (n_rows, n_cols) = (3, 512);
    let src = values(n_rows * n_cols, 1);
    let imatrix: Vec<f32> = values(n_cols, 2).iter().map(|v| v * v + 0.01).collect();
    let energy: f64 = src.iter().map(|v| f64::from(*v).powi(2)).sum();
    let mut quantizers = 0;
    for ty in Type::all().filter(|ty| ty.can_quantize()) {
        quantizers += 1;
        let bytes = quantize_rows(ty, &src, n_rows, n_cols, Some(&imatrix)).unwrap();
        let mut back = vec![f32::NAN; src.len()];
        dequantize(ty, &bytes, &mut back).unwrap();
        let error: f64 = src
            .iter()
            .zip(&back)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum();
        // Bounds on the relative squared error by bits per weight; ternary and binary types keep little.
        let bits = 8.0 * ty.type_size() as f64 / ty.block_size() as f64;
        let bound = match bits {
            bits if bits >= 16.0 => 1e-5,
            bits if bits >= 8.0 => 1e-4,
            bits if bits >= 5.0 => 0.01,
            bits if bits >= 4.0 => 0.04,
            bits if bits >= 3.0 => 0.15,
            _ => 1.0,
        };
        let relative = error / energy;
        assert!(
            relative < bound,
            "{ty}: {relative} of the energy lost, bound {bound}"
        );

        // Row by row gives the same bytes: converters cut tensors into runs of rows.
        for (row, chunk) in src.chunks(n_cols).enumerate() {
            let alone = quantize_rows(ty, chunk, 1, n_cols, Some(&imatrix)).unwrap();
            let row_bytes = ty.row_bytes(n_cols).unwrap();
            assert_eq!(
                alone,
                bytes[row * row_bytes..][..row_bytes],
                "{ty} row {row}"
            );
        }
        // At an odd address too.
        let mut shifted = vec![0; bytes.len() + 1];
        shifted[1..].copy_from_slice(&bytes);
        let mut again = vec![f32::NAN; src.len()];
        dequantize(ty, &shifted[1..], &mut again).unwrap();
        assert_eq!(back, again, "{ty} unaligned");
    }
    assert!(quantizers >= 28, "only {quantizers} types can be written");
}

#[test]
fn row_sets_agree_with_dequantized_products() {
    let n = 1024;
    let imatrix = vec![1.0; n];
    let (w, x) = (values(n, 3), values(n, 4));
    for ty in Type::all() {
        let sets = RowDot::all(ty);
        assert_eq!(sets.is_empty(), RowDot::new(ty).is_none());
        if sets.is_empty() {
            continue;
        }
        let weight = quantize_rows(ty, &w, 1, n, Some(&imatrix)).unwrap();
        let mut weight_back = vec![f32::NAN; n];
        dequantize(ty, &weight, &mut weight_back).unwrap();
        for (set, row_dot) in sets {
            let activation_type = row_dot.activation_type();
            let bytes = activation_type.row_bytes(n).unwrap();
            let mut words = vec![u64::MAX; bytes.div_ceil(8)];
            // SAFETY: the words hold at least that many initialised bytes.
            let activation =
                unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), bytes) };
            row_dot.quantize_activation(&x, activation).unwrap();
            let got = f64::from(row_dot.dot(n, &weight, activation).unwrap());
            let exact: f64 = weight_back
                .iter()
                .zip(&x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum();
            // Activations round to 8 bits (relative 1/254 of the block's largest) in most types: the
            // bound is that rounding against every weight, uncorrelated.
            let norm: f64 = weight_back
                .iter()
                .map(|w| f64::from(*w).powi(2))
                .sum::<f64>()
                .sqrt();
            let bound = 4.0 * norm / 254.0 + 1e-6;
            assert!(
                (got - exact).abs() < bound,
                "{ty} in set {set}: {got} against {exact}, bound {bound}"
            );
        }
    }
}

#[test]
fn misuse_is_refused() {
    let q4_k = Type::from_name("q4_k").unwrap();
    let iq2_xxs = Type::from_name("iq2_xxs").unwrap();
    let q8_1 = Type::from_name("q8_1").unwrap();
    let i32_ = Type::from_name("i32").unwrap();
    assert_eq!(
        quantize_rows(q4_k, &[0.0; 100], 1, 100, None),
        Err(Error::RaggedRow {
            ty: q4_k,
            n_cols: 100,
            block: 256
        })
    );
    assert_eq!(
        quantize_rows(iq2_xxs, &[0.5; 256], 1, 256, None),
        Err(Error::NeedsImatrix { ty: iq2_xxs })
    );
    assert!(matches!(
        quantize_rows(iq2_xxs, &[0.5; 256], 1, 256, Some(&[0.0; 256])),
        Err(Error::Imatrix { col: 0, .. })
    ));
    assert_eq!(
        quantize_rows(q8_1, &[0.0; 32], 1, 32, None),
        Err(Error::NoQuantizer { ty: q8_1 })
    );
    assert_eq!(
        dequantize(i32_, &[0; 4], &mut [0.0]),
        Err(Error::NoDequantizer { ty: i32_ })
    );
    assert!(matches!(
        dequantize(q4_k, &[0; 143], &mut [0.0; 256]),
        Err(Error::Length {
            expected: 144,
            got: 143,
            ..
        })
    ));
    let mut bad = [0.25; 512];
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e7] {
        bad[300] = value;
        let refused = quantize_rows(q4_k, &bad, 2, 256, None);
        assert!(
            matches!(
                refused,
                Err(Error::Value {
                    row: 1,
                    col: 44,
                    ..
                })
            ),
            "{refused:?}"
        );
    }
    assert!(quantize_rows(Type::F16, &[70000.0], 1, 1, None).is_err());
    assert!(quantize_rows(Type::F32, &[f32::NAN], 1, 1, None).is_ok());
    assert!(matches!(
        quantize_rows(q4_k, &[0.0; 256], 2, 256, None),
        Err(Error::Length {
            expected: 512,
            got: 256,
            ..
        })
    ));
}

#[test]
fn a_graph_computes() {
    ggml_sys::init();
    let (n_cols, n_rows, n_tokens) = (64usize, 5usize, 3usize);
    let (w, x) = (values(n_rows * n_cols, 5), values(n_tokens * n_cols, 6));
    // SAFETY: shapes are those of the slices that are copied in and out; one context owns everything.
    let got = unsafe {
        let ctx = raw::ggml_init(raw::ggml_init_params {
            mem_size: 16 << 20,
            mem_buffer: std::ptr::null_mut(),
            no_alloc: false,
        });
        let a = raw::ggml_new_tensor_2d(ctx, raw::GGML_TYPE_F32, n_cols as i64, n_rows as i64);
        let b = raw::ggml_new_tensor_2d(ctx, raw::GGML_TYPE_F32, n_cols as i64, n_tokens as i64);
        let to = raw::ggml_get_data_f32(a);
        to.copy_from_nonoverlapping(w.as_ptr(), w.len());
        let to = raw::ggml_get_data_f32(b);
        to.copy_from_nonoverlapping(x.as_ptr(), x.len());
        let product = raw::ggml_mul_mat(ctx, a, b);
        let graph = raw::ggml_new_graph(ctx);
        raw::ggml_build_forward_expand(graph, product);
        let status = raw::ggml_graph_compute_with_ctx(ctx, graph, 2);
        assert_eq!(status, raw::GGML_STATUS_SUCCESS);
        let out = raw::ggml_get_data_f32(product);
        let got = std::slice::from_raw_parts(out, n_rows * n_tokens).to_vec();
        raw::ggml_free(ctx);
        got
    };
    for t in 0..n_tokens {
        for r in 0..n_rows {
            let exact: f32 = (0..n_cols)
                .map(|c| w[r * n_cols + c] * x[t * n_cols + c])
                .sum();
            assert!((got[t * n_rows + r] - exact).abs() < 1e-4);
        }
    }
}

/// The kernels read GGUF bytes without ggml: for arbitrary bytes of every type that they know, each
/// value must be the one that ggml reads.
#[test]
fn block_layouts_are_those_of_the_kernels() {
    use mneme_kernels::quant::{WeightType, dequantize_row};
    for weight in WeightType::ALL {
        let ty = Type::from_name(weight.name()).unwrap();
        assert_eq!(
            (weight.block_len(), weight.block_bytes()),
            (ty.block_size(), ty.type_size())
        );
        let n = 256 * 64;
        assert_eq!(weight.row_bytes(n), ty.row_bytes(n));
        let mut state = 9u64;
        let bytes: Vec<u8> = (0..ty.row_bytes(n).unwrap())
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        let (mut ours, mut theirs) = (vec![f32::NAN; n], vec![f32::INFINITY; n]);
        dequantize_row(weight, &bytes, &mut ours);
        dequantize(ty, &bytes, &mut theirs).unwrap();
        let mut n_finite = 0;
        for (i, (a, b)) in ours.iter().zip(&theirs).enumerate() {
            if a.is_nan() && b.is_nan() {
                continue; // scales of random bytes are NaN now and then
            }
            n_finite += usize::from(a.is_finite());
            // Products may be grouped differently: two roundings of F32. Sums cancel against a minimum
            // of up to 63 times the scale, hence the bound relative to the larger of neighbours.
            let scale = theirs[i / 32 * 32..][..32]
                .iter()
                .filter(|v| v.is_finite())
                .fold(0f32, |m, v| m.max(v.abs()));
            let bound = if ty.is_quantized() { 1e-5 * scale } else { 0.0 };
            assert!(
                a == b || (a - b).abs() <= bound,
                "{ty}[{i}]: {a} against {b}"
            );
        }
        assert!(n_finite > n / 2, "{ty}: {n_finite} of {n}");
    }
}
