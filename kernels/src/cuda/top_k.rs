//! The largest numbers of each row on the device: sampling without reading all logits back.

use super::device::Shape;
use super::{Device, Error, View, ViewMut};

/// Most numbers of a row that can be asked for.
pub const MOST: usize = 1024;
/// Keys that a block sorts.
const TILE: usize = 4096;
/// Threads of a block.
const THREADS: u32 = 1024;
/// What stands for a place where a row has fewer numbers than were asked for.
pub const NONE: u32 = u32::MAX;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    keys: u64,
    kept: u64,
    out: u64,
    n_in: i32,
    k: i32,
}

/// The `k` largest numbers of each row of `x` `[n, n_cols]` with their places, largest first in
/// the order of [`f32::total_cmp`], of equals the lowest place. NaN and minus infinity do not
/// count.
///
/// `out` is `[n, 2, k]`: places, then the bits of the numbers. Where a row has fewer than `k`
/// numbers the rest is [`NONE`] and minus infinity.
///
/// # Errors
/// If the driver refuses, or has no room for what the rounds keep.
///
/// # Panics
/// If the lengths do not fit together, `k` is not in `1..=`[`MOST`], or there are 65,536 rows.
pub fn top_k(
    dev: &Device,
    x: View<'_, f32>,
    n_cols: usize,
    k: usize,
    out: ViewMut<'_, u32>,
) -> Result<(), Error> {
    assert!((1..=MOST).contains(&k), "top_k: {k} of 1 to {MOST}");
    assert!(
        n_cols > 0 && x.len().is_multiple_of(n_cols),
        "top_k: {} numbers are not rows of {n_cols}",
        x.len()
    );
    let n = x.len() / n_cols;
    assert_eq!(out.len(), n * 2 * k, "top_k: out is not [{n}, 2, {k}]");
    assert!(n < 1 << 16, "top_k: {n} rows");
    let tiles = |n_in: usize| n_in.div_ceil(TILE);
    // Keys kept by one round and read by the next, in turn in two places.
    let first = n * tiles(n_cols) * k;
    let second = n * tiles(tiles(n_cols) * k) * k;
    let workspace = dev.workspace(8 * (first + second))?;
    let places = [workspace.address(), workspace.address() + 8 * first as u64];
    let mut n_in = n_cols;
    for round in 0.. {
        let is_last = tiles(n_in) == 1;
        let args = Args {
            x: if round == 0 { dev.input(&x) } else { 0 },
            keys: places[(round + 1) % 2],
            kept: if is_last { 0 } else { places[round % 2] },
            out: dev.output(&out),
            n_in: i32::try_from(n_in).expect("top_k: rows shorter than 2^31"),
            k: k as i32,
        };
        let shape = Shape {
            grid: [tiles(n_in) as u32, n as u32, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 8 * n_in.min(TILE).next_power_of_two() as u32,
        };
        // SAFETY: the struct is the kernel's, lengths are checked above, and the workspace has
        // room for the keys of two rounds, of which the later ones need less.
        unsafe { dev.launch("top_k", shape, &args)? };
        if is_last {
            break;
        }
        n_in = tiles(n_in) * k;
    }
    Ok(())
}
