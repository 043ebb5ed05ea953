//! Restated types are the same numbers, by ggml's own account, before and after they are packed.

use mneme_kernels::mul_mat::{self, Packed};
use mneme_kernels::pool::Pool;
use mneme_kernels::quant::dequantize_row;
use mneme_kernels::quant::restate::Restated;

const N_ROWS: usize = 37;
const N_COLS: usize = 512;

fn check(name: &str, from: Restated) {
    let ty = ggml_sys::Type::from_name(name).expect("ggml knows the type");
    let values: Vec<f32> = (0..N_ROWS * N_COLS)
        .map(|i| ((i * 37) % 101) as f32 / 17.0 - 3.0)
        .collect();
    let bytes = ggml_sys::quantize_rows(ty, &values, N_ROWS, N_COLS, None).expect("quantised");
    let mut expected = vec![f32::NAN; values.len()];
    ggml_sys::dequantize(ty, &bytes, &mut expected).expect("whole blocks");

    let to = from.weight_type();
    let mut restated = vec![0xA5; bytes.len() / from.block_bytes() * to.block_bytes()];
    from.restate(&bytes, &mut restated);
    let mut got = vec![f32::NAN; values.len()];
    dequantize_row(to, &restated, &mut got);
    assert_eq!(got, expected, "{name}");

    let pool = Pool::new(2);
    let packed = Packed::pack_restated(&pool, from, N_ROWS, N_COLS, &bytes).expect("packed");
    let two_steps = Packed::pack(&pool, to, N_ROWS, N_COLS, &restated).expect("packed");
    let x: Vec<f32> = (0..N_COLS).map(|i| (i as f32 * 0.37).sin()).collect();
    let product = |w: &Packed| {
        let mut out = vec![f32::NAN; N_ROWS];
        mul_mat::mul_mat(&pool, &x, 1, &mut [(w, &mut out)]);
        out
    };
    assert_eq!(product(&packed), product(&two_steps), "{name}");
}

#[test]
fn restated_types_are_the_same_numbers() {
    check("q3_K", Restated::Q3_K);
}
