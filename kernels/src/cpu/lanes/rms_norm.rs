//! `rms_norm`: squares summed in four sets of lanes, then those in pairs.

use super::LANES;

/// Sets of lanes: enough independent sums to hide the latency of an FMA.
const SETS: usize = 4;

#[inline(always)]
pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let scale = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for ((o, &x), &w) in out.iter_mut().zip(x).zip(w) {
        *o = x * scale * w;
    }
}

#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [[0.0f32; LANES]; SETS];
    let (runs, rest) = x.as_chunks::<{ LANES * SETS }>();
    for run in runs {
        for (sum, run) in sums.iter_mut().zip(run.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                sum[i] = run[i].mul_add(run[i], sum[i]);
            }
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        let sum = &mut sums[i / LANES][i % LANES];
        *sum = x.mul_add(x, *sum);
    }
    let [a, b, c, d] = sums;
    let mut lanes: [f32; LANES] = std::array::from_fn(|i| (a[i] + b[i]) + (c[i] + d[i]));
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}
