//! Rows picked by number, on the device: of packed matrices (embeddings) and of activations.

use super::device::Shape;
use super::mul_mat::Packed;
use super::{Device, Error, View, ViewMut};

#[repr(C)]
#[derive(Clone, Copy)]
struct GetArgs {
    bytes: u64,
    row_scale: u64,
    ids: u64,
    out: u64,
    n_rows: u32,
    n_cols: i32,
    n_chunks: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CopyArgs {
    x: u64,
    ids: u64,
    out: u64,
    n_rows: u32,
    n_cols: i32,
}

/// A thread for each number; rows along the second dimension of the grid, in launches that fit.
fn shape(n: usize, n_cols: usize) -> Shape {
    Shape {
        grid: [n_cols.div_ceil(256) as u32, n as u32, 1],
        block: [256, 1, 1],
        shared_bytes: 0,
    }
}

/// Most rows of one launch: the second dimension of a grid ends at 65535.
const ROWS: usize = 32768;

/// `out[i, :]` is row `ids[i]` of `table` as F32, `[ids.len(), n_cols]`: what the file's numbers
/// are, to F32 rounding (F32 tables: to 2^-21 of the row's largest). A number that is no row
/// gives NaN.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If `out` has another length.
pub fn get_rows(
    dev: &Device,
    table: &Packed,
    ids: View<'_, u32>,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let n_cols = table.n_cols();
    assert_eq!(
        out.len(),
        ids.len() * n_cols,
        "get_rows: out is not [{}, {n_cols}]",
        ids.len()
    );
    let (bytes, row_scale) = table.addresses(dev);
    let (from, to) = (dev.input(&ids), dev.output(&out));
    for first in (0..ids.len()).step_by(ROWS) {
        let args = GetArgs {
            bytes,
            row_scale,
            ids: from + 4 * first as u64,
            out: to + (4 * first * n_cols) as u64,
            n_rows: table.n_rows() as u32,
            n_cols: n_cols as i32,
            n_chunks: table.n_chunks() as i32,
        };
        let shape = shape(ROWS.min(ids.len() - first), n_cols);
        // SAFETY: the struct is the kernel's, lengths are checked above, ids by the kernel.
        unsafe { dev.launch(table.get_rows_kernel(), shape, &args)? };
    }
    Ok(())
}

/// `out[i, :] = x[rows[i], :]` for rows of `n_cols` numbers. A number that is no row gives NaN.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn copy_rows(
    dev: &Device,
    x: View<'_, f32>,
    n_cols: usize,
    rows: View<'_, u32>,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    assert!(
        n_cols > 0 && x.len().is_multiple_of(n_cols),
        "copy_rows: {} numbers are not rows of {n_cols}",
        x.len()
    );
    assert_eq!(
        out.len(),
        rows.len() * n_cols,
        "copy_rows: out is not [{}, {n_cols}]",
        rows.len()
    );
    let (from, ids, to) = (dev.input(&x), dev.input(&rows), dev.output(&out));
    for first in (0..rows.len()).step_by(ROWS) {
        let args = CopyArgs {
            x: from,
            ids: ids + 4 * first as u64,
            out: to + (4 * first * n_cols) as u64,
            n_rows: (x.len() / n_cols) as u32,
            n_cols: n_cols as i32,
        };
        let shape = shape(ROWS.min(rows.len() - first), n_cols);
        // SAFETY: the struct is the kernel's, lengths are checked above, ids by the kernel.
        unsafe { dev.launch("copy_rows", shape, &args)? };
    }
    Ok(())
}

/// `out[rows[i], :] = x[i, :]` for rows of `n_cols` numbers, no row twice. A number that is no row of
/// `out` is passed over.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn put_rows(
    dev: &Device,
    x: View<'_, f32>,
    n_cols: usize,
    rows: View<'_, u32>,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    assert!(
        n_cols > 0 && out.len().is_multiple_of(n_cols),
        "put_rows: {} numbers are not rows of {n_cols}",
        out.len()
    );
    assert_eq!(
        x.len(),
        rows.len() * n_cols,
        "put_rows: x is not [{}, {n_cols}]",
        rows.len()
    );
    let (from, ids, to) = (dev.input(&x), dev.input(&rows), dev.output(&out));
    for first in (0..rows.len()).step_by(ROWS) {
        let args = CopyArgs {
            x: from + (4 * first * n_cols) as u64,
            ids: ids + 4 * first as u64,
            out: to,
            n_rows: (out.len() / n_cols) as u32,
            n_cols: n_cols as i32,
        };
        let shape = shape(ROWS.min(rows.len() - first), n_cols);
        // SAFETY: the struct is the kernel's, lengths are checked above, ids by the kernel.
        unsafe { dev.launch("put_rows", shape, &args)? };
    }
    Ok(())
}
