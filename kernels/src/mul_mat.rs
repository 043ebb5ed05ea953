//! Activations times a weight matrix: nearly all the work of a model.
//!
//! Weights are interleaved once, when they are loaded ([`Packed`], `layout`). A call quantises
//! its activations once (`activations`) and splits its output into units of 16 rows times a run
//! of tokens; every unit belongs to one thread from beginning to end.

pub(crate) mod activations;
pub(crate) mod buffer;
pub(crate) mod layout;

use crate::cpu;
use crate::cpu::mul_mat::{Panel, Scratch, Tokens};
use crate::dispatch::{self, Isa};
use crate::pool::Pool;
pub use crate::quant::WeightType;
use crate::split::SplitMut;
use activations::{GROUP, QuantizeRow, Quants};
use buffer::Buffer;
use layout::ROWS;
use std::cell::RefCell;
use std::ops::Range;

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
    /// Panels as `layout` says; the file's rows for [`Isa::Scalar`].
    bytes: Buffer,
    panel_bytes: usize,
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
        pool: &Pool,
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
        let too_large = Error::TooLarge { ty, n_rows, n_cols };
        if cpu::mul_mat(isa).is_none() {
            let mut copy = Buffer::zeroed(expected);
            copy[..expected].copy_from_slice(bytes);
            return Ok(Packed {
                isa,
                ty,
                n_rows,
                n_cols,
                bytes: copy,
                panel_bytes: 0,
            });
        }
        let Some(panel_bytes) = layout::panel_bytes(ty, n_cols) else {
            return Err(too_large);
        };
        let n_panels = n_rows.div_ceil(ROWS);
        let Some(n_bytes) = n_panels.checked_mul(panel_bytes) else {
            return Err(too_large);
        };
        let mut packed = Buffer::in_slab(n_bytes);
        if n_bytes > 0 {
            let panels = SplitMut::new(&mut packed);
            pool.for_each(n_panels, 4, |range| {
                for i in range {
                    let rows = &bytes[i * ROWS * row..expected.min((i + 1) * ROWS * row)];
                    // SAFETY: panels are claimed once.
                    let panel = unsafe { panels.part(i * panel_bytes..(i + 1) * panel_bytes) };
                    layout::pack_panel(ty, n_cols, rows, panel);
                }
            });
        }
        Ok(Packed {
            isa,
            ty,
            n_rows,
            n_cols,
            bytes: packed,
            panel_bytes,
        })
    }

    /// Bytes that a matrix of this shape takes once packed for the best instruction set, padding
    /// included; `None` if it cannot be packed.
    pub fn bytes_of(ty: WeightType, n_rows: usize, n_cols: usize) -> Option<usize> {
        let row = ty.row_bytes(n_cols)?;
        match cpu::mul_mat(dispatch::best()) {
            None => n_rows.checked_mul(row),
            Some(_) => n_rows
                .div_ceil(ROWS)
                .checked_mul(layout::panel_bytes(ty, n_cols)?),
        }
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

    /// How its activations are quantised, if they are and in blocks of `block_len`.
    fn quantize(&self, block_len: usize) -> Option<QuantizeRow> {
        let kernels = cpu::mul_mat(self.isa)?;
        (self.ty.block_len() == block_len).then_some(kernels.quantize_row)
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
    if x.is_empty() {
        mats.iter_mut().for_each(|(_, out)| out.fill(0.0));
        return;
    }
    CALL.with_borrow_mut(|call| call.run(pool, x, n_tokens, mats));
}

/// Activations of a run of tokens that should stay in a core's second-level cache, in bytes. (Pairs of
/// panels read them half as often, and may take them from the third.)
const RUN_BYTES: usize = 1 << 20;
/// Most tokens of a run: their running sums should leave the first level to the weights.
const RUN_TOKENS: usize = 512;

thread_local! {
    /// What a caller of `mul_mat` keeps from call to call.
    static CALL: RefCell<Call> = RefCell::new(Call {
        blocks_of_32: Quants::new(32),
        blocks_of_256: Quants::new(256),
    });
    /// What each thread of the pool keeps.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
    /// Plain Rust: one dequantised row of weights, then one result per token.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Call {
    blocks_of_32: Quants,
    blocks_of_256: Quants,
}

impl Call {
    fn run(&mut self, pool: &Pool, x: &[f32], n_tokens: usize, mats: &mut [(&Packed, &mut [f32])]) {
        for quants in [&mut self.blocks_of_32, &mut self.blocks_of_256] {
            let row = mats
                .iter()
                .find_map(|(w, _)| w.quantize(quants.block_len()));
            if let Some(row) = row {
                quants.fill(pool, x, n_tokens, row);
            }
        }
        let in_pairs =
            |w: &Packed| cpu::mul_mat(w.isa).is_some_and(|kernels| n_tokens >= kernels.pairs_from);
        let run = if mats.iter().all(|(w, _)| in_pairs(w)) {
            RUN_TOKENS
        } else {
            let row_bytes = x.len() / n_tokens;
            (RUN_BYTES / row_bytes / GROUP * GROUP).clamp(GROUP, RUN_TOKENS)
        };
        let runs = n_tokens.div_ceil(run);
        let mut units = Vec::with_capacity(mats.len());
        let mut n_panels = 0;
        for (w, out) in mats.iter_mut() {
            if cpu::mul_mat(w.isa).is_none() {
                scalar(pool, x, n_tokens, w, out);
                continue;
            }
            let tokens = match w.ty.block_len() {
                32 => Tokens::Quants(&self.blocks_of_32),
                256 => Tokens::Quants(&self.blocks_of_256),
                _ => Tokens::F32(x),
            };
            let rows = if in_pairs(w) { 2 * ROWS } else { ROWS };
            let end = n_panels + w.n_rows.div_ceil(rows);
            units.push(Matrix {
                w,
                x: tokens,
                out: SplitMut::new(out),
                rows,
                panels: n_panels..end,
            });
            n_panels = end;
        }
        // Runs outermost: a thread goes on with the activations it has just read.
        let n = runs * n_panels;
        let grain = (n / (8 * pool.n_threads())).clamp(1, 16);
        pool.for_each_in_parts(n, grain, |range| {
            SCRATCH.with_borrow_mut(|scratch| {
                for i in range {
                    let (i, panel) = (i / n_panels, i % n_panels);
                    let tokens = i * run..n_tokens.min((i + 1) * run);
                    let m = units.iter().find(|m| m.panels.contains(&panel));
                    m.expect("panels are numbered without gaps")
                        .panel(panel, tokens, scratch);
                }
            });
        });
    }
}

/// A matrix of a call.
struct Matrix<'a> {
    w: &'a Packed,
    x: Tokens<'a>,
    out: SplitMut<'a, f32>,
    /// Rows that are worked on at once: those of a panel or of two.
    rows: usize,
    /// Numbers of its panels (or pairs) among those of all matrices.
    panels: Range<usize>,
}

impl Matrix<'_> {
    fn panel(&self, panel: usize, tokens: Range<usize>, scratch: &mut Scratch) {
        let w = self.w;
        let first = (panel - self.panels.start) * self.rows;
        let rows = self.rows.min(w.n_rows - first);
        let bytes = &w.bytes[first / ROWS * w.panel_bytes..];
        let bytes = &bytes[..rows.div_ceil(ROWS) * w.panel_bytes];
        let panel = Panel {
            ty: w.ty,
            n_cols: w.n_cols,
            bytes: bytes.as_ptr(),
            x: self.x,
            tokens,
            out: self.out.at(first),
            stride: w.n_rows,
            rows,
        };
        let kernels = cpu::mul_mat(w.isa).expect("checked by run");
        // SAFETY: the instruction set is available (`cpu::mul_mat`), the bytes are one panel or two
        // of this type, and each run of a panel is claimed by one thread.
        unsafe { (kernels.panel)(&panel, scratch) }
    }
}

fn scalar(pool: &Pool, x: &[f32], n_tokens: usize, w: &Packed, out: &mut [f32]) {
    if n_tokens == 0 || w.n_cols == 0 {
        return out.fill(0.0);
    }
    let row_bytes = w.ty.row_bytes(w.n_cols).expect("checked by pack");
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
