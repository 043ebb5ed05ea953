//! `attend` cell by cell, with F64 sums and the largest score known before the first weight.

use crate::attend::{PAGE_CELLS, PageLayout, Visible};

/// The cells of one sequence.
pub(crate) struct Cells<'a> {
    pub(crate) layout: &'a PageLayout,
    pub(crate) kept: &'a [&'a [u8]],
    pub(crate) raw: &'a [&'a [u8]],
    pub(crate) raw_base: u64,
    pub(crate) n_always: usize,
    pub(crate) top_k: usize,
}

/// One query and one kv head: `q` `[group, head_dim_k]`, `out` `[group, head_dim_v]`.
pub(crate) fn attend(
    cells: &Cells<'_>,
    head_kv: usize,
    scale: f32,
    visible: Visible,
    q: &[f32],
    out: &mut [f32],
) {
    let (dim_k, dim_v) = (cells.layout.head_dim_k, cells.layout.head_dim_v);
    let n_kept = visible.n_kept as usize;
    let raw = if visible.raw_begin < visible.raw_end {
        (visible.raw_begin - cells.raw_base) as usize..(visible.raw_end - cells.raw_base) as usize
    } else {
        0..0
    };
    let seen: Vec<(&[u8], usize)> = (0..n_kept)
        .map(|cell| (cells.kept[cell / PAGE_CELLS], cell % PAGE_CELLS))
        .chain(raw.map(|cell| (cells.raw[cell / PAGE_CELLS], cell % PAGE_CELLS)))
        .collect();
    let mut k = vec![0.0; seen.len() * dim_k];
    let mut v = vec![0.0; seen.len() * dim_v];
    for (i, &(page, cell)) in seen.iter().enumerate() {
        cells.layout.read_head(
            page,
            head_kv,
            cell,
            &mut k[i * dim_k..][..dim_k],
            &mut v[i * dim_v..][..dim_v],
        );
    }
    let mut scores: Vec<Vec<f64>> = q
        .chunks_exact(dim_k)
        .map(|q| {
            k.chunks_exact(dim_k)
                .map(|k| f64::from(scale) * dot(q, k))
                .collect()
        })
        .collect();
    if cells.top_k > 0 && n_kept > cells.n_always + cells.top_k {
        let rank = |cell: usize| scores.iter().map(|s| s[cell]).sum::<f64>();
        let mut ranked: Vec<(f64, usize)> = (cells.n_always..n_kept)
            .map(|cell| (rank(cell), cell))
            .collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for &(_, cell) in &ranked[cells.top_k..] {
            for scores in &mut scores {
                scores[cell] = f64::NEG_INFINITY;
            }
        }
    }
    for (scores, out) in scores.iter().zip(out.chunks_exact_mut(dim_v)) {
        let largest = scores.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
        let mut sum = vec![0f64; dim_v];
        let mut weights = 0f64;
        for (&score, v) in scores.iter().zip(v.chunks_exact(dim_v)) {
            if score == f64::NEG_INFINITY {
                continue; // ranked away: its value counts for nothing, even if not finite
            }
            let weight = (score - largest).exp();
            weights += weight;
            for (sum, &v) in sum.iter_mut().zip(v) {
                *sum += weight * f64::from(v);
            }
        }
        for (out, sum) in out.iter_mut().zip(sum) {
            *out = if weights > 0.0 {
                (sum / weights) as f32
            } else {
                0.0
            };
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| f64::from(a) * f64::from(b))
        .sum()
}
