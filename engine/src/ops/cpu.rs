//! The verbs on the host: our kernels for the hot weight types, ggml's dot products for the rest.

use crate::error::{Error, Result};
use crate::gguf::{GgmlType, Gguf, TensorInfo};
use ggml_sys::RowDot;
use mneme_kernels::attend::{self, PageLayout};
use mneme_kernels::mul_mat::{Packed, WeightType};
use mneme_kernels::pool::Pool;
use mneme_kernels::quant::restate;
use mneme_kernels::recur::{self, Form, Recur};
use mneme_kernels::rope::RopeKind;
use mneme_kernels::{add, quant, rms_norm, rope, swiglu};
use std::sync::Arc;

/// The host's threads and the verbs that run on them.
pub struct Cpu {
    pool: Pool,
}

/// A weight matrix `[n_rows, n_cols]`, ready for `mul_mat`.
pub enum Matrix {
    /// Rows interleaved for our kernels; the file's copy is no longer needed.
    Packed(Packed),
    /// As it lies in the file, multiplied through ggml's `vec_dot`.
    Mapped(Table, RowDot),
}

/// Rows of a tensor as they lie in the file, to be read one at a time.
#[derive(Clone)]
pub struct Table {
    gguf: Arc<Gguf>,
    info: TensorInfo,
    n_rows: usize,
    n_cols: usize,
}

impl Table {
    /// The tensor `name` of `gguf` as rows; its shape has been checked by the caller.
    pub fn new(gguf: &Arc<Gguf>, info: &TensorInfo, n_rows: usize, n_cols: usize) -> Table {
        Table {
            gguf: Arc::clone(gguf),
            info: info.clone(),
            n_rows,
            n_cols,
        }
    }

    /// All rows, `n_rows` times [`Table::row_bytes`].
    fn bytes(&self) -> &[u8] {
        self.gguf.data(&self.info)
    }

    fn row_bytes(&self) -> usize {
        self.bytes().len() / self.n_rows
    }

    /// Row `row` as F32, `n_cols` values.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let bytes = self.row_bytes();
        let bytes = &self.bytes()[row * bytes..(row + 1) * bytes];
        match weight_type(self.info.ty) {
            Some(ty) => quant::dequantize_row(ty, bytes, out),
            None => {
                let ty = ggml_sys::Type::from_id(self.info.ty.id());
                let ty = ty.expect("the type was checked when the table was made");
                ggml_sys::dequantize(ty, bytes, out).expect("a row is whole blocks");
            }
        }
    }
}

/// The kernels' name for a ggml type, if they have code for it.
fn weight_type(ty: GgmlType) -> Option<WeightType> {
    Some(match ty {
        GgmlType::F32 => WeightType::F32,
        GgmlType::F16 => WeightType::F16,
        GgmlType::BF16 => WeightType::BF16,
        GgmlType::Q8_0 => WeightType::Q8_0,
        GgmlType::Q4_0 => WeightType::Q4_0,
        GgmlType::Q4_K => WeightType::Q4_K,
        GgmlType::Q6_K => WeightType::Q6_K,
        _ => return None,
    })
}

impl Matrix {
    /// Output width.
    pub fn n_rows(&self) -> usize {
        match self {
            Matrix::Packed(p) => p.n_rows(),
            Matrix::Mapped(t, _) => t.n_rows,
        }
    }

    /// Bytes read when every row is used once.
    pub fn n_bytes(&self) -> usize {
        match self {
            Matrix::Packed(p) => p.n_bytes(),
            Matrix::Mapped(t, _) => t.bytes().len(),
        }
    }

    /// Bytes held in memory of our own, beside the mapped file.
    pub fn owned_bytes(&self) -> usize {
        match self {
            Matrix::Packed(p) => p.n_bytes(),
            Matrix::Mapped(..) => 0,
        }
    }
}

impl Cpu {
    /// The verbs on `n_threads` threads.
    pub fn new(n_threads: usize) -> Cpu {
        Cpu {
            pool: Pool::new(n_threads),
        }
    }

    /// Threads in use.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// The threads themselves, for benches and loading.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Makes `table` ready for [`Cpu::mul_mat`].
    pub fn matrix(&self, table: Table) -> Result<Matrix> {
        let refuse = |role| Error::TensorType {
            name: table.info.name.clone(),
            ty: table.info.ty.name().into(),
            role,
        };
        let restated = match table.info.ty {
            GgmlType::Q5_0 => Some(restate::q5_0_to_q8_0(table.bytes())),
            GgmlType::IQ4_NL => Some(restate::iq4_nl_to_q8_0(table.bytes())),
            _ => None,
        };
        let (ty, bytes) = match &restated {
            Some(bytes) => (Some(WeightType::Q8_0), &bytes[..]),
            None => (weight_type(table.info.ty), table.bytes()),
        };
        match ty {
            Some(ty) => {
                let packed = Packed::pack(&self.pool, ty, table.n_rows, table.n_cols, bytes)
                    .map_err(|_| refuse("for rows of this length"))?;
                // The interleaved copy replaces the file's: let the system have those pages.
                table.gguf.release(&table.info);
                Ok(Matrix::Packed(packed))
            }
            None => match ggml_sys::Type::from_id(table.info.ty.id()).and_then(RowDot::new) {
                Some(dot) => Ok(Matrix::Mapped(table, dot)),
                None => Err(refuse("as a weight matrix")),
            },
        }
    }

    /// A table whose rows can be read as F32.
    pub fn table(&self, table: Table) -> Result<Table> {
        let ggml = ggml_sys::Type::from_id(table.info.ty.id());
        if weight_type(table.info.ty).is_some() || ggml.is_some_and(|ty| ty.can_dequantize()) {
            Ok(table)
        } else {
            Err(Error::TensorType {
                name: table.info.name.clone(),
                ty: table.info.ty.name().into(),
                role: "as a table of rows",
            })
        }
    }

    /// `out_m[t, r] = sum_c w_m[r, c] x[t, c]` for several matrices over the same `x`
    /// `[n_tokens, n_cols]`.
    pub fn mul_mat(&self, x: &[f32], n_tokens: usize, mats: &mut [(&Matrix, &mut [f32])]) {
        let mut packed: Vec<(&Packed, &mut [f32])> = Vec::with_capacity(mats.len());
        for (matrix, out) in mats.iter_mut() {
            match matrix {
                Matrix::Packed(p) => packed.push((p, out)),
                Matrix::Mapped(table, dot) => self.mul_mat_ggml(x, n_tokens, table, dot, out),
            }
        }
        if !packed.is_empty() {
            mneme_kernels::mul_mat::mul_mat(&self.pool, x, n_tokens, &mut packed);
        }
    }

    /// One row dot product after the other through ggml, rows split over the threads. Slow in
    /// prefill, right for every type ggml knows.
    fn mul_mat_ggml(
        &self,
        x: &[f32],
        n_tokens: usize,
        table: &Table,
        dot: &RowDot,
        out: &mut [f32],
    ) {
        let (n_rows, n_cols) = (table.n_rows, table.n_cols);
        assert_eq!(out.len(), n_rows * n_tokens);
        let act_bytes = dot.activation_type().row_bytes(n_cols);
        let act_bytes = act_bytes.expect("rows are whole blocks");
        // Activation blocks hold F32 scales: keep every row at a multiple of four.
        let stride = act_bytes.next_multiple_of(4);
        let mut acts = vec![0u32; n_tokens * stride / 4];
        let acts: &mut [u8] = bytemuck::cast_slice_mut(&mut acts);
        for (x, act) in x.chunks_exact(n_cols).zip(acts.chunks_exact_mut(stride)) {
            dot.quantize_activation(x, &mut act[..act_bytes])
                .expect("sized for this row");
        }
        let (row_bytes, bytes) = (table.row_bytes(), table.bytes());
        let (acts, base) = (&*acts, out.as_mut_ptr() as usize);
        self.pool.for_each(n_rows, 16, |rows| {
            for r in rows {
                let row = &bytes[r * row_bytes..(r + 1) * row_bytes];
                for (t, act) in acts.chunks_exact(stride).enumerate() {
                    let dot = dot.dot(n_cols, row, &act[..act_bytes]);
                    let dot = dot.expect("sized for this row");
                    // SAFETY: (t, r) is inside out, and each r belongs to one thread.
                    unsafe { *(base as *mut f32).add(t * n_rows + r) = dot };
                }
            }
        });
    }

    /// Rows `ids` of `table` as F32, `[ids, n_cols]`.
    pub fn get_rows(&self, table: &Table, ids: &[u32], out: &mut [f32]) {
        let n_cols = table.n_cols;
        for (row, &id) in out.chunks_exact_mut(n_cols).zip(ids) {
            table.read_row(id as usize, row);
        }
    }

    /// `x / rms(x) * w` per row of `w.len()` values.
    pub fn rms_norm(&self, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        rms_norm::rms_norm(&self.pool, x, w, eps, out);
    }

    /// [`Cpu::rms_norm`] over `x` itself.
    pub fn rms_norm_in_place(&self, x: &mut [f32], w: &[f32], eps: f32) {
        let y = x.to_vec();
        rms_norm::rms_norm(&self.pool, &y, w, eps, x);
    }

    /// Rotates the first `2 * inv_freq.len()` values of each head of `x` `[n, n_head, head_dim]`.
    pub fn rope(
        &self,
        kind: RopeKind,
        x: &mut [f32],
        n_head: usize,
        head_dim: usize,
        pos: &[u32],
        inv_freq: &[f32],
        mscale: f32,
    ) {
        let n_rot = 2 * inv_freq.len();
        rope::rope(
            &self.pool, kind, x, n_head, head_dim, n_rot, pos, inv_freq, mscale,
        );
    }

    /// `silu(gate) * up`.
    pub fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        swiglu::swiglu(&self.pool, gate, up, out);
    }

    /// `x *= silu(gate)`.
    pub fn swiglu_gate(&self, x: &mut [f32], gate: &[f32]) {
        let up = x.to_vec();
        swiglu::swiglu(&self.pool, gate, &up, x);
    }

    /// `x += y`.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        add::add(&self.pool, x, y);
    }

    /// `x[t] += b` for every row.
    pub fn add_bias(&self, x: &mut [f32], b: &[f32]) {
        add::add_bias(&self.pool, x, b);
    }

    /// Soft-max attention over two regions; see [`attend::attend`].
    pub fn attend(
        &self,
        layout: &PageLayout,
        n_head: usize,
        scale: f32,
        seqs: &mut [attend::Sequence<'_>],
    ) {
        attend::attend(&self.pool, layout, n_head, scale, seqs);
    }

    /// The gated delta rule and its relatives; see [`recur::recur`].
    pub fn recur(&self, form: Form, seqs: &mut [Recur<'_>]) {
        recur::recur(&self.pool, form, seqs);
    }
}
