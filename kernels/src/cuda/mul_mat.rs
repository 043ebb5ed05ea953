//! Activations times weight matrices on the device; see [`crate::mul_mat`].
//!
//! Weights are packed once, into the order in which the matrix units take them (`pack`), and stay
//! quantised in device memory. Activations become F16 with a power of two for each token, weights
//! become F16 in registers, sums are F32. Up to [`VECTOR_TOKENS`] tokens take a form that is bound
//! by reading the weights, more take tiles; both do the same arithmetic in the same order.

mod pack;

use super::device::Shape;
use super::{Buffer, Device, Error, View, ViewMut};
pub use crate::quant::WeightType;
use pack::Kind;

/// Most tokens of the form that reads weights at full speed.
pub const VECTOR_TOKENS: usize = 8;
/// Matrices of one launch.
const MAX_MATRICES: usize = 8;

/// A weight matrix in device memory.
pub struct Packed {
    ty: WeightType,
    kind: Kind,
    n_rows: usize,
    n_cols: usize,
    n_chunks: usize,
    bytes: Buffer<u8>,
    row_scale: Buffer<f32>,
}

impl Packed {
    /// Packs a row-major matrix as a GGUF file stores it and copies it to the device.
    ///
    /// # Errors
    /// If a row is not whole blocks, `bytes` has the wrong length, or memory is exhausted.
    pub fn pack(
        dev: &Device,
        ty: WeightType,
        n_rows: usize,
        n_cols: usize,
        bytes: &[u8],
    ) -> Result<Packed, Error> {
        use crate::mul_mat::Error as Refused;
        let too_large = Refused::TooLarge { ty, n_rows, n_cols };
        let row = ty
            .row_bytes(n_cols)
            .ok_or(Refused::Columns { ty, n_cols })?;
        let expected = n_rows.checked_mul(row);
        if expected != Some(bytes.len()) {
            let Some(expected) = expected else {
                return Err(too_large.into());
            };
            return Err(Refused::Bytes {
                ty,
                n_rows,
                n_cols,
                expected,
                got: bytes.len(),
            }
            .into());
        }
        if n_rows > i32::MAX as usize || n_cols > i32::MAX as usize / 2 {
            return Err(too_large.into());
        }
        let kind = Kind::of(ty);
        let n_chunks = n_cols.div_ceil(pack::CHUNK);
        let (packed, row_scale) = pack::pack(ty, n_rows, n_cols, bytes);
        Ok(Packed {
            ty,
            kind,
            n_rows,
            n_cols,
            n_chunks,
            bytes: dev.upload(&packed)?,
            row_scale: dev.upload(&row_scale)?,
        })
    }

    /// Device memory that a matrix of this shape takes, padding included.
    pub fn bytes_of(ty: WeightType, n_rows: u64, n_cols: u64) -> u64 {
        let panel = Kind::of(ty).panel_bytes(n_cols.div_ceil(pack::CHUNK as u64));
        let n_panels = n_rows.div_ceil(pack::PANEL as u64);
        n_panels.saturating_mul(panel).saturating_add(4 * n_rows)
    }

    /// Rows: numbers of the result per token.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns: numbers of an activation.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Device memory held, padding included.
    pub fn n_bytes(&self) -> usize {
        self.bytes.len() + 4 * self.row_scale.len()
    }

    /// Type of the weights.
    pub fn weight_type(&self) -> WeightType {
        self.ty
    }

    pub(super) fn get_rows_kernel(&self) -> &'static str {
        self.kind.kernels().get_rows
    }

    /// Addresses of the panels and of the rows' scales.
    pub(super) fn addresses(&self, dev: &Device) -> (u64, u64) {
        (
            dev.input(&self.bytes.all()),
            dev.input(&self.row_scale.all()),
        )
    }

    pub(super) fn n_chunks(&self) -> usize {
        self.n_chunks
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PrepareArgs {
    x: u64,
    high: u64,
    low: u64,
    scale: u64,
    n_cols: i32,
    n_chunks: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Matrix {
    bytes: u64,
    row_scale: u64,
    out: u64,
    n_rows: i32,
    first: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    high: u64,
    low: u64,
    scale: u64,
    n_tokens: i32,
    n_chunks: i32,
    n_matrices: i32,
    unused: i32,
    matrices: [Matrix; MAX_MATRICES],
}

/// `out[m][t, r] = sum_c w_m[r, c] * x[t, c]` for every matrix `m`.
///
/// `x` is `[n_tokens, n_cols]`, each `out` is `[n_tokens, n_rows_m]`. Matrices that share their
/// activations (q, k and v; gate and up) belong in one call: they are prepared once, and matrices
/// of one type share a launch. The error of a number is at most 2^-9 of the sum of its products'
/// sizes (2^-11 with F16 and BF16 weights, 2^-20 with F32).
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If shapes differ.
pub fn mul_mat(
    dev: &Device,
    x: View<'_, f32>,
    n_tokens: usize,
    mats: &mut [(&Packed, ViewMut<'_, f32>)],
) -> Result<(), Error> {
    for (w, out) in mats.iter() {
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
    }
    let Some((first, _)) = mats.first() else {
        return Ok(());
    };
    let (n_cols, n_chunks) = (first.n_cols, first.n_chunks);
    if x.is_empty() {
        return mats
            .iter_mut()
            .try_for_each(|(_, out)| dev.zero(out.reborrow()));
    }
    assert!(
        n_tokens <= i32::MAX as usize / 2,
        "mul_mat: too many tokens"
    );
    // Halves of all tokens, twice if a matrix is F32, then a scale for each token.
    let terms = if mats.iter().any(|(w, _)| w.kind == Kind::F32) {
        2
    } else {
        1
    };
    let plane = n_tokens * n_chunks * pack::CHUNK * 2;
    let workspace = dev.workspace(terms * plane + 4 * n_tokens)?;
    let high = workspace.address();
    let prepare = PrepareArgs {
        x: dev.input(&x),
        high,
        low: if terms == 2 { high + plane as u64 } else { 0 },
        scale: high + (terms * plane) as u64,
        n_cols: n_cols as i32,
        n_chunks: n_chunks as i32,
    };
    // SAFETY: the struct is the kernel's; the workspace has room for what it writes.
    unsafe {
        dev.launch(
            "mul_mat_prepare",
            Shape::row(n_tokens as u32, 256),
            &prepare,
        )?
    };
    for kind in Kind::ALL {
        let kernels = kind.kernels();
        let mut of_kind: Vec<(&Packed, u64)> = Vec::with_capacity(mats.len());
        for (w, out) in mats.iter().filter(|(w, _)| w.kind == kind && w.n_rows > 0) {
            of_kind.push((w, dev.output(out)));
        }
        for mats in of_kind.chunks(MAX_MATRICES) {
            let form = Form::choose(dev, kind, n_tokens, mats);
            let mut args = Args {
                high,
                low: prepare.low,
                scale: prepare.scale,
                n_tokens: n_tokens as i32,
                n_chunks: n_chunks as i32,
                n_matrices: mats.len() as i32,
                unused: 0,
                matrices: [Matrix::default(); MAX_MATRICES],
            };
            let mut n_blocks = 0;
            for (to, (w, out)) in args.matrices.iter_mut().zip(mats) {
                let (bytes, row_scale) = w.addresses(dev);
                *to = Matrix {
                    bytes,
                    row_scale,
                    out: *out,
                    n_rows: w.n_rows as i32,
                    first: n_blocks as i32,
                };
                n_blocks += w.n_rows.div_ceil(form.rows);
            }
            let (kernel, shape) = form.shape(&kernels, n_tokens, n_blocks);
            // SAFETY: the struct is the kernel's; shapes are checked above, activations and
            // weights are padded to whole chunks and panels.
            unsafe { dev.launch(kernel, shape, &args)? };
        }
    }
    Ok(())
}

/// Rows and tokens of a block.
struct Form {
    rows: usize,
    tokens: usize,
    shared_bytes: usize,
    large: bool,
}

impl Form {
    fn choose(dev: &Device, kind: Kind, n_tokens: usize, mats: &[(&Packed, u64)]) -> Form {
        if n_tokens <= VECTOR_TOKENS {
            return Form {
                rows: pack::PANEL,
                tokens: 0,
                shared_bytes: 0,
                large: false,
            };
        }
        let terms = if kind == Kind::F32 { 2 } else { 1 };
        // Three stages of 64 columns.
        let tile = |rows: usize, tokens: usize, large| Form {
            rows,
            tokens,
            shared_bytes: 3 * terms * tokens * pack::CHUNK * 2,
            large,
        };
        let large = tile(128, if kind == Kind::F32 { 64 } else { 128 }, true);
        let blocks: usize = mats
            .iter()
            .map(|(w, _)| w.n_rows.div_ceil(large.rows))
            .sum();
        // Large tiles do twice the products for each byte from shared memory, but only if there
        // are enough of them for every multiprocessor.
        if n_tokens > 32 && blocks * n_tokens.div_ceil(large.tokens) >= dev.n_multiprocessors() {
            large
        } else {
            tile(64, 32, false)
        }
    }

    fn shape(
        &self,
        kernels: &pack::Kernels,
        n_tokens: usize,
        n_blocks: usize,
    ) -> (&'static str, Shape) {
        if self.tokens == 0 {
            return (kernels.vector, Shape::row(n_blocks as u32, 256));
        }
        let shape = Shape {
            grid: [n_tokens.div_ceil(self.tokens) as u32, n_blocks as u32, 1],
            block: [256, 1, 1],
            shared_bytes: self.shared_bytes as u32,
        };
        (
            if self.large {
                kernels.large
            } else {
                kernels.small
            },
            shape,
        )
    }
}
