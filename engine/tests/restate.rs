//! Types restated as Q8_0 are the same numbers, by ggml's own account.

use mneme_kernels::quant::{WeightType, dequantize_row, restate};

fn check(name: &str, restated: impl Fn(&[u8]) -> Vec<u8>) {
    let ty = ggml_sys::Type::from_name(name).expect("ggml knows the type");
    let n = 32 * 64;
    let values: Vec<f32> = (0..n)
        .map(|i| ((i * 37) % 101) as f32 / 17.0 - 3.0)
        .collect();
    let bytes = ggml_sys::quantize_rows(ty, &values, 1, n, None).expect("quantised");
    let mut expected = vec![f32::NAN; n];
    ggml_sys::dequantize(ty, &bytes, &mut expected).expect("whole blocks");
    let mut got = vec![f32::NAN; n];
    dequantize_row(WeightType::Q8_0, &restated(&bytes), &mut got);
    assert_eq!(got, expected, "{name}");
}

#[test]
fn restated_types_are_the_same_numbers() {
    check("q5_0", restate::q5_0_to_q8_0);
    check("iq4_nl", restate::iq4_nl_to_q8_0);
}
