//! Activations times a weight matrix: nearly all the work of a model.

use crate::cpu;
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
pub use crate::quant::WeightType;
use crate::split::SplitMut;
use std::cell::RefCell;

/// Why a matrix could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A row would end inside a block.
    #[error(
        "{} rows of {n_cols} numbers are not whole blocks of {}",
        .ty.name(), .ty.block_len()
    )]
    Columns {
        /// Type of the matrix.
        ty: WeightType,
        /// Numbers per row.
        n_cols: usize,
    },
    /// The bytes are not those of the stated shape.
    #[error("{n_rows} x {n_cols} {}: expected {expected} bytes, got {got}", .ty.name())]
    Bytes {
        /// Type of the matrix.
        ty: WeightType,
        /// Rows.
        n_rows: usize,
        /// Numbers per row.
        n_cols: usize,
        /// What the shape takes.
        expected: usize,
        /// What was given.
        got: usize,
    },
    /// The shape is larger than memory can be.
    #[error("{n_rows} x {n_cols} {}: too large to address", .ty.name())]
    TooLarge {
        /// Type of the matrix.
        ty: WeightType,
        /// Rows.
        n_rows: usize,
        /// Numbers per row.
        n_cols: usize,
    },
}

/// A weight matrix in the order in which this machine's kernels read it.
#[derive(Clone)]
pub struct Packed {
    isa: Isa,
    ty: WeightType,
    n_rows: usize,
    n_cols: usize,
    bytes: Vec<u8>,
}

impl Packed {
    /// Packs a row-major matrix as a GGUF file stores it, for the best instruction set.
    ///
    /// # Errors
    /// If a row is not whole blocks or `bytes` has the wrong length.
    pub fn pack(
        pool: &Pool,
        ty: WeightType,
        n_rows: usize,
        n_cols: usize,
        bytes: &[u8],
    ) -> Result<Packed, Error> {
        Packed::pack_for(dispatch::best(), pool, ty, n_rows, n_cols, bytes)
    }

    /// [`Packed::pack`] for a chosen instruction set; `mul_mat` then uses that set.
    ///
    /// # Errors
    /// As [`Packed::pack`].
    ///
    /// # Panics
    /// If this machine lacks `isa`.
    pub fn pack_for(
        isa: Isa,
        _pool: &Pool,
        ty: WeightType,
        n_rows: usize,
        n_cols: usize,
        bytes: &[u8],
    ) -> Result<Packed, Error> {
        cpu::check(isa);
        let row = ty.row_bytes(n_cols).ok_or(Error::Columns { ty, n_cols })?;
        let expected = n_rows
            .checked_mul(row)
            .ok_or(Error::TooLarge { ty, n_rows, n_cols })?;
        if bytes.len() != expected {
            return Err(Error::Bytes {
                ty,
                n_rows,
                n_cols,
                expected,
                got: bytes.len(),
            });
        }
        Ok(Packed {
            isa,
            ty,
            n_rows,
            n_cols,
            bytes: bytes.to_vec(),
        })
    }

    /// Rows: numbers of the result per token.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns: numbers of an activation.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Memory held, padding included.
    pub fn n_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Type of the weights.
    pub fn weight_type(&self) -> WeightType {
        self.ty
    }

    /// Instruction set it was packed for.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// `out[m][t, r] = sum_c w_m[r, c] * x[t, c]` for every matrix `m`.
///
/// `x` is `[n_tokens, n_cols]`, each `out` is `[n_tokens, n_rows_m]`. All matrices take the same
/// activations (q, k and v; gate and up), which are quantised once where the type calls for it.
///
/// # Panics
/// If shapes differ.
pub fn mul_mat(pool: &Pool, x: &[f32], n_tokens: usize, mats: &mut [(&Packed, &mut [f32])]) {
    for (w, out) in mats.iter_mut() {
        assert_eq!(
            x.len(),
            n_tokens * w.n_cols,
            "mul_mat: x is not [{n_tokens}, {}]",
            w.n_cols
        );
        assert_eq!(
            out.len(),
            n_tokens * w.n_rows,
            "mul_mat: out is not [{n_tokens}, {}]",
            w.n_rows
        );
        scalar(pool, x, n_tokens, w, out);
    }
}

thread_local! {
    /// One dequantised row of weights, then one result per token.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn scalar(pool: &Pool, x: &[f32], n_tokens: usize, w: &Packed, out: &mut [f32]) {
    if n_tokens == 0 || w.n_cols == 0 {
        return out.fill(0.0);
    }
    let row_bytes = w.bytes.len() / w.n_rows.max(1);
    let out = SplitMut::new(out);
    pool.for_each(w.n_rows, 16, |rows| {
        ROW.with_borrow_mut(|row| {
            row.resize(w.n_cols + n_tokens, 0.0);
            let (row, dots) = row.split_at_mut(w.n_cols);
            for r in rows {
                let bytes = &w.bytes[r * row_bytes..(r + 1) * row_bytes];
                cpu::scalar::mul_mat::row_dots(w.ty, bytes, row, x, dots);
                for (t, &dot) in dots.iter().enumerate() {
                    let i = t * w.n_rows + r;
                    // SAFETY: each row is claimed once and each number belongs to one row.
                    unsafe { out.part(i..i + 1)[0] = dot }
                }
            }
        });
    });
}
