//! The largest numbers of a row.

/// Most numbers of a row that [`Ops::best`](super::Ops::best) gives.
pub const MOST_BEST: usize = 1024;

/// Largest first, of equals the lowest place.
fn order(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The `k` largest numbers of `row` with their places, largest first, of equals the lowest place,
/// into `out`. NaN and minus infinity do not count: there may be fewer.
pub fn best_of(row: &[f32], k: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    if k == 0 {
        return;
    }
    let room = 4 * k + 64;
    // Only numbers of this size and more can still be among the k. Equals are let in: zeros of
    // either sign are, and the greater one may come last.
    let mut least = f32::MIN;
    for (&x, at) in row.iter().zip(0u32..) {
        if x >= least {
            out.push((at, x));
            if out.len() >= room {
                out.select_nth_unstable_by(k - 1, order);
                out.truncate(k);
                least = out[k - 1].1;
            }
        }
    }
    out.sort_unstable_by(order);
    out.truncate(k);
}
