//! `mul_mat` over dequantised weights with F64 sums, rows as the file stores them.

use crate::quant::{WeightType, dequantize_row};

/// `out[t] = sum_c w[c] * x[t, c]` for one row of weights; `row` has `n_cols` numbers of room.
pub(crate) fn row_dots(ty: WeightType, bytes: &[u8], row: &mut [f32], x: &[f32], out: &mut [f32]) {
    dequantize_row(ty, bytes, row);
    for (x, o) in x.chunks_exact(row.len()).zip(out) {
        let sum: f64 = row
            .iter()
            .zip(x)
            .map(|(&w, &x)| f64::from(w) * f64::from(x))
            .sum();
        *o = sum as f32;
    }
}
