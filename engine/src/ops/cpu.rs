//! The verbs on the host: our kernels for the hot weight types, ggml's dot products for the rest.
//!
//! [`Cpu`]'s own methods take slices: the small parts of memories that always run on the host call
//! those. As [`Ops`] the same verbs take buffers.

use super::{
    Buffer, ConvSeq, Device, Fold, Ops, Page, Peak, Recurrence, RopeKind, Rows, Rule, best_of,
};
use crate::error::{Error, Result};
use crate::gguf::{GgmlType, Gguf, TensorInfo};
use crate::memory::store::{Region, Store};
use crate::model::{Forward, Pass};
use ggml_sys::RowDot;
use mneme_kernels::attend::{self, PAGE_CELLS, PageLayout};
use mneme_kernels::dispatch;
use mneme_kernels::mul_mat::{Packed, WeightType};
use mneme_kernels::pool::Pool;
use mneme_kernels::recur::{self, Form, Numbers, Recur};
use mneme_kernels::{add, quant, rms_norm, rope, swiglu};
use std::ops::Range;
use std::sync::Arc;

/// Rounds of each peak; the best counts.
const PEAK_ROUNDS: usize = 3;

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
    /// On a card.
    #[cfg(feature = "on-card")]
    Cuda(mneme_kernels::cuda::mul_mat::Packed),
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

    /// Name of the tensor.
    #[cfg(feature = "on-card")]
    pub(super) fn name(&self) -> &str {
        &self.info.name
    }

    /// Type of its values.
    #[cfg(feature = "on-card")]
    pub(super) fn ty(&self) -> GgmlType {
        self.info.ty
    }

    #[cfg(feature = "on-card")]
    pub(super) fn n_rows(&self) -> usize {
        self.n_rows
    }

    #[cfg(feature = "on-card")]
    pub(super) fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Lets the system have the file's pages back: a copy replaces them.
    pub(super) fn release(&self) {
        self.gguf.release(&self.info);
    }

    /// All rows, `n_rows` times [`Table::row_bytes`].
    pub(super) fn bytes(&self) -> &[u8] {
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
pub(super) fn weight_type(ty: GgmlType) -> Option<WeightType> {
    Some(match ty {
        GgmlType::F32 => WeightType::F32,
        GgmlType::F16 => WeightType::F16,
        GgmlType::BF16 => WeightType::BF16,
        GgmlType::Q8_0 => WeightType::Q8_0,
        GgmlType::Q4_0 => WeightType::Q4_0,
        GgmlType::Q4_1 => WeightType::Q4_1,
        GgmlType::Q5_0 => WeightType::Q5_0,
        GgmlType::Q5_1 => WeightType::Q5_1,
        GgmlType::IQ4_NL => WeightType::IQ4_NL,
        GgmlType::Q2_K => WeightType::Q2_K,
        GgmlType::Q3_K => WeightType::Q3_K,
        GgmlType::Q4_K => WeightType::Q4_K,
        GgmlType::Q5_K => WeightType::Q5_K,
        GgmlType::Q6_K => WeightType::Q6_K,
        GgmlType::IQ4_XS => WeightType::IQ4_XS,
        _ => return None,
    })
}

/// Bytes of the interleaved copy that a weight matrix is loaded as; `None` for types that stay
/// mapped.
pub fn copied_bytes(ty: GgmlType, n_rows: usize, n_cols: usize) -> Option<usize> {
    Packed::bytes_of(weight_type(ty)?, n_rows, n_cols)
}

impl Matrix {
    /// Output width.
    pub fn n_rows(&self) -> usize {
        match self {
            Matrix::Packed(p) => p.n_rows(),
            Matrix::Mapped(t, _) => t.n_rows,
            #[cfg(feature = "on-card")]
            Matrix::Cuda(p) => p.n_rows(),
        }
    }

    /// Input width.
    pub fn n_cols(&self) -> usize {
        match self {
            Matrix::Packed(p) => p.n_cols(),
            Matrix::Mapped(t, _) => t.n_cols,
            #[cfg(feature = "on-card")]
            Matrix::Cuda(p) => p.n_cols(),
        }
    }

    /// Bytes read when every row is used once.
    pub fn n_bytes(&self) -> usize {
        match self {
            Matrix::Packed(p) => p.n_bytes(),
            Matrix::Mapped(t, _) => t.bytes().len(),
            #[cfg(feature = "on-card")]
            Matrix::Cuda(p) => p.n_bytes(),
        }
    }

    /// Bytes held in memory of our own, beside the mapped file.
    pub fn owned_bytes(&self) -> usize {
        match self {
            Matrix::Packed(p) => p.n_bytes(),
            Matrix::Mapped(..) => 0,
            #[cfg(feature = "on-card")]
            Matrix::Cuda(_) => 0,
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
        let (n_rows, n_cols, bytes) = (table.n_rows, table.n_cols, table.bytes());
        let packed = weight_type(table.info.ty)
            .map(|ty| Packed::pack(&self.pool, ty, n_rows, n_cols, bytes));
        match packed {
            Some(packed) => {
                let packed = packed.map_err(|_| refuse("for rows of this length"))?;
                // The interleaved copy replaces the file's: let the system have those pages.
                table.release();
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
        self.mul_mats(
            x,
            n_tokens,
            mats.iter_mut().map(|(m, out)| (*m, &mut **out)),
        );
    }

    fn mul_mats<'a>(
        &self,
        x: &[f32],
        n_tokens: usize,
        mats: impl ExactSizeIterator<Item = (&'a Matrix, &'a mut [f32])>,
    ) {
        let mut packed: Vec<(&Packed, &mut [f32])> = Vec::with_capacity(mats.len());
        for (matrix, out) in mats {
            match matrix {
                Matrix::Packed(p) => packed.push((p, out)),
                Matrix::Mapped(table, dot) => self.mul_mat_ggml(x, n_tokens, table, dot, out),
                #[cfg(feature = "on-card")]
                Matrix::Cuda(_) => panic!("a matrix of a card on the host"),
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

    /// `silu(gate) * up`.
    pub fn swiglu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        swiglu::swiglu(&self.pool, gate, up, out);
    }

    /// `x += y`.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        add::add(&self.pool, x, y);
    }

    /// `x[t] += b` for every row.
    pub fn add_bias(&self, x: &mut [f32], b: &[f32]) {
        add::add_bias(&self.pool, x, b);
    }

    /// The gated delta rule and its relatives; see [`recur::recur`].
    pub fn recur(&self, form: Form, seqs: &mut [Recur<'_>]) {
        recur::recur(&self.pool, form, seqs);
    }
}

/// Some `rows` of `x` `[n, width]`.
fn rows_of<'a>(x: &'a [f32], width: usize, rows: &Range<usize>) -> &'a [f32] {
    &x[rows.start * width..rows.end * width]
}

/// `1 / (1 + e^-x)`.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`; the identity above 20, where the difference is below F32 rounding.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

impl Ops for Cpu {
    fn name(&self) -> String {
        format!(
            "cpu, {} threads, {}",
            self.n_threads(),
            dispatch::best().name()
        )
    }

    fn peak(&self) -> Result<Peak> {
        let peak = mneme_kernels::peak::Peak::measure(&self.pool, PEAK_ROUNDS);
        Ok(Peak {
            read: peak.read,
            matrix: peak.int8.max(peak.int8_amx),
            format: "int8",
            rates: vec![
                ("read", peak.read),
                ("int8", peak.int8),
                ("int8_amx", peak.int8_amx),
                ("fma", peak.fma),
            ],
        })
    }

    fn device(&self) -> &Device {
        &Device::Host
    }

    fn host(&self) -> &Cpu {
        self
    }

    fn first_layer(&self) -> usize {
        0
    }

    fn check_room(&self, _: u64) -> Result<()> {
        Ok(()) // the system pages
    }

    fn matrix(&self, table: Table) -> Result<Matrix> {
        Cpu::matrix(self, table)
    }

    fn begin(&self, _: &mut Rows, _: &[&Store]) -> Result<()> {
        Ok(()) // the rows are at hand
    }

    fn run(&self, pass: &mut Pass<'_>, forward: Forward) -> Result<()> {
        pass.run_here(forward);
        Ok(())
    }

    fn mul_mat(&self, x: &Buffer, rows: Range<usize>, mats: &mut [(&Matrix, &mut Buffer)]) {
        let n_cols = mats.first().map_or(0, |(m, _)| m.n_cols());
        let n = rows.len();
        let x = &x.host()[rows.start * n_cols..rows.end * n_cols];
        self.mul_mats(x, n, mats.iter_mut().map(|(m, out)| (*m, out.host_mut())));
    }

    fn rms_norm(&self, x: &Buffer, w: &Buffer, eps: f32, out: &mut Buffer) {
        Cpu::rms_norm(self, x.host(), w.host(), eps, out.host_mut());
    }

    fn rms_norm_in_place(&self, x: &mut Buffer, w: &Buffer, eps: f32) {
        Cpu::rms_norm_in_place(self, x.host_mut(), w.host(), eps);
    }

    fn rope(
        &self,
        kind: RopeKind,
        x: &mut Buffer,
        n_head: usize,
        head_dim: usize,
        rows: &Rows,
        inv_freq: &Buffer,
        mscale: f32,
    ) {
        let (x, pos, inv_freq) = (x.host_mut(), &rows.pos, inv_freq.host());
        let n_rot = 2 * inv_freq.len();
        rope::rope(
            &self.pool, kind, x, n_head, head_dim, n_rot, pos, inv_freq, mscale,
        );
    }

    fn swiglu(&self, gate: &Buffer, up: &Buffer, out: &mut Buffer) {
        Cpu::swiglu(self, gate.host(), up.host(), out.host_mut());
    }

    fn add(&self, x: &mut Buffer, y: &Buffer) {
        Cpu::add(self, x.host_mut(), y.host());
    }

    fn add_bias(&self, x: &mut Buffer, b: &Buffer) {
        Cpu::add_bias(self, x.host_mut(), b.host());
    }

    fn keep_rows(&self, x: &mut Buffer, width: usize, rows: &Rows) {
        for (to, &from) in rows.out.iter().enumerate() {
            let from = from * width..(from + 1) * width;
            x.host_mut().copy_within(from, to * width);
        }
        x.set_len(rows.out.len() * width);
    }

    fn take_rows(&self, x: &Buffer, width: usize, rows: &Rows, out: &mut Buffer) {
        let x = x.host();
        for (row, to) in rows
            .steps
            .iter()
            .zip(out.host_mut().chunks_exact_mut(width))
        {
            to.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
    }

    fn put_rows(&self, from: &Buffer, width: usize, rows: &Rows, x: &mut Buffer) {
        let x = x.host_mut();
        for (row, from) in rows.node_slots.iter().zip(from.host().chunks_exact(width)) {
            x[row * width..(row + 1) * width].copy_from_slice(from);
        }
    }

    fn best(
        &self,
        x: &Buffer,
        rows: &[usize],
        n_cols: usize,
        k: usize,
    ) -> Result<Vec<Vec<(u32, f32)>>> {
        let x = x.host();
        let best = rows.iter().map(|&row| {
            let mut best = Vec::new();
            best_of(&x[row * n_cols..(row + 1) * n_cols], k, &mut best);
            best
        });
        Ok(best.collect())
    }

    fn write_cells(
        &self,
        layer: usize,
        rows: &Rows,
        k: &Buffer,
        v: &Buffer,
        stores: &mut [&mut Store],
    ) {
        for (part, store) in rows.parts.iter().zip(stores) {
            let width = store.layout().n_head_kv * store.layout().head_dim_k;
            let kv = part.rows.start * width..part.rows.end * width;
            let (k, v) = (&k.host()[kv.clone()], &v.host()[kv]);
            store.write(layer, &part.cells, Region::Cells, k, v);
        }
    }

    fn attend(
        &self,
        layer: usize,
        rows: &Rows,
        n_head: usize,
        q: &Buffer,
        stores: &[&Store],
        out: &mut Buffer,
    ) {
        let layout = *stores[0].layout();
        let width = n_head * layout.head_dim_k;
        let views: Vec<_> = stores.iter().map(|store| store.view(layer)).collect();
        let mut out = out.host_mut();
        let mut sequences = Vec::with_capacity(views.len());
        for (part, view) in rows.parts.iter().zip(&views) {
            let (mine, rest) = out.split_at_mut(part.rows.len() * width);
            out = rest;
            sequences.push(attend::Sequence {
                q: &q.host()[part.rows.start * width..part.rows.end * width],
                visible: part.visible(layer),
                kept: &view.kept,
                n_always: part.n_always,
                top_k: part.top_k,
                raw: &view.raw,
                raw_base: view.raw_base,
                out: mine,
            });
        }
        let scale = 1.0 / (layout.head_dim_k as f32).sqrt();
        attend::attend(&self.pool, &layout, n_head, scale, &mut sequences);
    }

    fn gates(&self, rule: Rule, beta: &mut Buffer, g: &mut Buffer, a: &Buffer, dt_bias: &Buffer) {
        let n_head = a.len().max(1);
        let (a, dt_bias) = (a.host(), dt_bias.host());
        let gates = beta.host_mut().iter_mut().zip(g.host_mut());
        for (i, (beta, g)) in gates.enumerate() {
            let j = i % n_head;
            (*beta, *g) = match rule {
                Rule::GatedDelta => (sigmoid(*beta), a[j] * softplus(*g + dt_bias[j])),
                Rule::Delta => (sigmoid(*beta), 0.0),
                Rule::Ssd => {
                    let delta = softplus(*beta + dt_bias[j]);
                    (delta, a[j] * delta)
                }
            };
        }
    }

    fn write_gates(
        &self,
        layer: usize,
        rows: &Rows,
        part: usize,
        beta: &Buffer,
        g: &Buffer,
        store: &mut Store,
    ) {
        let cells = &rows.parts[part].cells;
        store.write(layer, cells, Region::Gates, beta.host(), g.host());
    }

    fn read_cells(
        &self,
        layer: usize,
        rows: &Rows,
        part: usize,
        store: &Store,
        k: &mut Buffer,
        v: &mut Buffer,
        beta: &mut Buffer,
        g: &mut Buffer,
    ) {
        let (k, v) = (k.host_mut(), v.host_mut());
        let (beta, g) = (beta.host_mut(), g.host_mut());
        let kv = store.layout().n_head_kv * store.layout().head_dim_k;
        let n_head = beta.len() / rows.parts[part].n_recalls();
        for (i, cell) in rows.parts[part].recalls.clone().enumerate() {
            let (kv, gates) = (i * kv..(i + 1) * kv, i * n_head..(i + 1) * n_head);
            let (k, v) = (&mut k[kv.clone()], &mut v[kv]);
            store.read_raw(layer, cell, Region::Cells, k, v);
            let (beta, g) = (&mut beta[gates.clone()], &mut g[gates]);
            store.read_raw(layer, cell, Region::Gates, beta, g);
        }
    }

    fn recur(&self, step: Recurrence<'_>) {
        let state = step.next.host_mut();
        state.copy_from_slice(step.state.host());
        let width = step.n_head * step.head_dim;
        let g = match step.rule {
            Rule::Delta => &[],
            _ => step.g.host(),
        };
        Cpu::recur(
            self,
            Form::Auto,
            &mut [Recur {
                rule: step.rule,
                n_tokens: step.rows.len(),
                n_head: step.n_head,
                n_head_k: step.n_head_kv,
                head_dim_k: step.head_dim,
                head_dim_v: step.head_dim,
                q: Numbers::F32(&step.q.host()[step.rows.start * width..step.rows.end * width]),
                k: Numbers::F32(step.k.host()),
                v: Numbers::F32(step.v.host()),
                g: Numbers::F32(g),
                beta: Numbers::F32(step.beta.host()),
                resets: &[],
                state,
                out: step.out.host_mut(),
            }],
        );
    }

    fn fold(&self, step: Fold<'_>) {
        let (n_head, c) = (step.n_head, step.n_head * step.head_dim);
        let third = |i: usize| -> Vec<f32> {
            let rows = step.qkv.host().chunks_exact(3 * c);
            rows.flat_map(|row| &row[i * c..(i + 1) * c])
                .copied()
                .collect()
        };
        let (q, k, v) = (third(0), third(1), third(2));
        let (beta, g) = (step.beta.host(), step.g.host());
        let (mut out, mut row) = (step.out.host_mut(), 0);
        let mut seqs = Vec::with_capacity(step.seqs.len());
        for seq in step.seqs {
            let state = seq.next.host_mut();
            state.copy_from_slice(seq.state.host());
            let (mine, rest) = out.split_at_mut(seq.n * c);
            out = rest;
            let rows = row..row + seq.n;
            row = rows.end;
            seqs.push(Recur {
                rule: Rule::GatedDelta,
                n_tokens: seq.n,
                n_head,
                n_head_k: n_head,
                head_dim_k: step.head_dim,
                head_dim_v: step.head_dim,
                q: Numbers::F32(rows_of(&q, c, &rows)),
                k: Numbers::F32(rows_of(&k, c, &rows)),
                v: Numbers::F32(rows_of(&v, c, &rows)),
                g: Numbers::F32(rows_of(g, n_head, &rows)),
                beta: Numbers::F32(rows_of(beta, n_head, &rows)),
                resets: seq.resets,
                state,
                out: mine,
            });
        }
        assert!(out.is_empty(), "rows of no sequence");
        Cpu::recur(self, Form::Recurrent, &mut seqs);
    }

    fn conv_silu(&self, x: &Buffer, taps: &Buffer, seqs: Vec<ConvSeq<'_>>, out: &mut Buffer) {
        let w = taps.len() / 4;
        let (mut x, mut out) = (x.host(), out.host_mut());
        for seq in seqs {
            let (mine, others) = x.split_at(seq.n * w);
            let (to, rest) = out.split_at_mut(seq.n * w);
            (x, out) = (others, rest);
            let mut inputs = seq.past.host().to_vec();
            inputs.extend_from_slice(mine);
            for (t, to) in to.chunks_exact_mut(w).enumerate() {
                let taps = taps.host().as_chunks::<4>().0;
                for (c, (to, taps)) in to.iter_mut().zip(taps).enumerate() {
                    let sum: f32 = (0..4).map(|i| taps[i] * inputs[(t + i) * w + c]).sum();
                    *to = sum * sigmoid(sum);
                }
            }
            seq.next.host_mut().copy_from_slice(&inputs[mine.len()..]);
        }
        assert!(out.is_empty(), "rows of no sequence");
    }

    fn gate_heads(&self, x: &mut Buffer, gate: &Buffer, head_dim: usize) {
        let heads = x.host_mut().chunks_exact_mut(head_dim);
        for (head, &gate) in heads.zip(gate.host()) {
            let by = gate * sigmoid(gate);
            head.iter_mut().for_each(|x| *x *= by);
        }
    }

    fn add_heads(
        &self,
        x: &Buffer,
        w: &Buffer,
        n_head: usize,
        head_dim: usize,
        out: &mut Buffer,
        first: usize,
    ) {
        let (x, w, d) = (x.host(), w.host(), head_dim);
        let n = x.len() / (n_head * d);
        let out = &mut out.host_mut()[first * n_head * d..];
        assert!(out.len() >= x.len(), "rows to add to");
        let base = out.as_mut_ptr() as usize;
        self.pool.for_each(n_head, 1, |range| {
            for head in range {
                let w = &w[head * d * d..(head + 1) * d * d];
                for t in 0..n {
                    let at = (t * n_head + head) * d;
                    // SAFETY: rows (t, head) of different heads do not overlap, and each head
                    // belongs to one thread.
                    let to =
                        unsafe { std::slice::from_raw_parts_mut((base as *mut f32).add(at), d) };
                    for (&x, w) in x[at..at + d].iter().zip(w.chunks_exact(d)) {
                        for (to, &w) in to.iter_mut().zip(w) {
                            *to += x * w;
                        }
                    }
                }
            }
        });
    }

    fn copy_cells(
        &self,
        layout: &PageLayout,
        from: &[&Page],
        to: &mut [Page],
        cells: &[(usize, usize)],
    ) {
        for &(old, new) in cells {
            layout.copy_cell(
                from[old / PAGE_CELLS].host(),
                old % PAGE_CELLS,
                to[new / PAGE_CELLS].host_mut(),
                new % PAGE_CELLS,
            );
        }
    }
}
