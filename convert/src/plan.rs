//! One tensor of the output: where its values come from, its shape and type, and how it is produced
//! in slabs of rows, so that no whole tensor is ever held.

use ggml_sys::Type;
use mneme_engine::gguf::GgmlType;
use rayon::prelude::*;

use crate::Error;
use crate::mix::fit_rows;
use crate::source::{Source, SourceTensor, SourceType};

/// How rows of the source become rows of the output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// The same.
    AsIs,
    /// Rows of q and k, `[n_head, 2, d/2]`, become `[n_head, d/2, 2]`: a rotated pair lies together.
    RopePairs {
        /// Heads that the rows are cut into.
        n_head: usize,
    },
    /// `[n, in, out]` becomes `[n, out, in]`.
    TransposeEach,
}

/// What a tensor is for; decides which type it may get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// Of the base model: one-dimensional ones stay F32, matrices get the chosen type.
    Base,
    /// A matrix of a memory: the source's precision is kept.
    MemoryMatrix,
    /// A small vector or scalar table of a memory: always F32.
    MemoryVector,
}

enum Values {
    Source(SourceTensor, Layout),
    Computed(Vec<f32>),
}

/// One tensor to write.
pub struct PlannedTensor {
    /// GGUF name.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Type to write; set by [`PlannedTensor::choose_type`].
    pub ty: Type,
    role: Role,
    values: Values,
}

/// Source values turned into output bytes at a time: what is held, twice.
const SLAB_VALUES: usize = 1 << 24;

impl PlannedTensor {
    /// A tensor read from the source.
    pub fn from_source(
        name: String,
        tensor: &SourceTensor,
        layout: Layout,
        role: Role,
    ) -> PlannedTensor {
        let mut shape = tensor.shape.clone();
        if layout == Layout::TransposeEach {
            let n = shape.len();
            shape.swap(n - 1, n - 2);
        }
        PlannedTensor {
            name,
            shape,
            ty: Type::F32,
            role,
            values: Values::Source(tensor.clone(), layout),
        }
    }

    /// A small F32 tensor of one dimension whose values are at hand.
    pub fn from_values(name: impl Into<String>, values: Vec<f32>) -> PlannedTensor {
        PlannedTensor {
            name: name.into(),
            shape: vec![values.len()],
            ty: Type::F32,
            role: Role::MemoryVector,
            values: Values::Computed(values),
        }
    }

    /// Number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn n_cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Dims in ggml's order, the row first.
    pub fn dims(&self) -> Vec<u64> {
        self.shape.iter().rev().map(|&n| n as u64).collect()
    }

    /// The type as the engine names it.
    pub fn ggml_type(&self) -> Result<GgmlType, Error> {
        GgmlType::from_id(self.ty.id())
            .ok_or_else(|| Error::Options(format!("type {} cannot be written", self.ty)))
    }

    /// Settles the type for an output type, `None` meaning the source's own.
    ///
    /// As llama.cpp's tools: tensors of one dimension and norms are F32; a matrix whose rows do not fit
    /// the blocks of a quantized type gets another type, F16 in the end.
    pub fn choose_type(&mut self, outtype: Option<Type>) -> Result<(), Error> {
        let Values::Source(tensor, _) = &self.values else {
            return Ok(());
        };
        let own = match tensor.ty {
            SourceType::F32 => Type::F32,
            SourceType::F16 => Type::F16,
            SourceType::BF16 => Type::BF16,
        };
        let small = self.shape.len() <= 1 || self.name.ends_with("_norm.weight");
        self.ty = match self.role {
            Role::MemoryVector => Type::F32,
            _ if small => Type::F32,
            Role::MemoryMatrix if outtype == Some(Type::F32) => Type::F32,
            Role::MemoryMatrix => own,
            Role::Base => fit_rows(outtype.unwrap_or(own), self.n_cols() as u64)?,
        };
        Ok(())
    }

    /// The element type of the source; F32 for computed values.
    pub fn source_type(&self) -> SourceType {
        match &self.values {
            Values::Source(tensor, _) => tensor.ty,
            Values::Computed(_) => SourceType::F32,
        }
    }

    /// Produces the bytes in slabs, in order, for `write`.
    pub fn produce(
        &self,
        source: &Source,
        mut write: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let n_cols = self.n_cols();
        let n_values = self.n_elements();
        if n_values == 0 {
            return Ok(());
        }
        let n_rows = n_values / n_cols;
        // A vector is one row, however long; its elements are converted independently in F32.
        let slab_rows = (SLAB_VALUES / n_cols).clamp(1, n_rows);
        let row_bytes = self.ty.row_bytes(n_cols).ok_or_else(|| Error::Type {
            tensor: self.name.clone(),
            source: ggml_sys::Error::RaggedRow {
                ty: self.ty,
                n_cols,
                block: self.ty.block_size(),
            },
        })?;
        let mut bytes = vec![0u8; slab_rows * row_bytes];
        let mut row = 0;
        while row < n_rows {
            let rows = slab_rows.min(n_rows - row);
            let slab = &mut bytes[..rows * row_bytes];
            // Some 64 Ki values per task: enough work to share, little to hold.
            let task_rows = ((1 << 16) / n_cols).max(1);
            slab.par_chunks_mut(task_rows * row_bytes)
                .enumerate()
                .try_for_each_init(Vec::new, |values, (task, out)| {
                    let first = row + task * task_rows;
                    values.resize(out.len() / row_bytes * n_cols, 0.0);
                    self.rows(source, first, values);
                    ggml_sys::quantize_rows_into(self.ty, values, n_cols, None, out).map_err(
                        |source| Error::Type {
                            tensor: self.name.clone(),
                            source: shift_row(source, first),
                        },
                    )
                })?;
            write(slab)?;
            row += rows;
        }
        Ok(())
    }

    /// Output rows from `first` on as F32; `out` holds whole rows.
    fn rows(&self, source: &Source, first: usize, out: &mut [f32]) {
        let n_cols = self.n_cols();
        let (tensor, layout) = match &self.values {
            Values::Source(tensor, layout) => (tensor, *layout),
            Values::Computed(values) => {
                out.copy_from_slice(&values[first * n_cols..][..out.len()]);
                return;
            }
        };
        match layout {
            Layout::AsIs => source.read(tensor, first * n_cols, out),
            Layout::RopePairs { n_head } if self.shape.len() == 1 => {
                // A bias: one row whose elements move as the rows of its matrix do.
                let whole = source.read_all(tensor);
                for (i, value) in out.iter_mut().enumerate() {
                    *value = whole[rope_pairs(i, whole.len() / n_head)];
                }
            }
            Layout::RopePairs { n_head } => {
                let head_dim = self.shape[0] / n_head;
                for (i, row) in out.chunks_mut(n_cols).enumerate() {
                    source.read(tensor, rope_pairs(first + i, head_dim) * n_cols, row);
                }
            }
            Layout::TransposeEach => {
                let (n_out, n_in) = (self.shape[self.shape.len() - 2], n_cols);
                let mut matrix = vec![0.0; n_in * n_out];
                let mut held = usize::MAX;
                for (i, row) in out.chunks_mut(n_cols).enumerate() {
                    let (index, o) = ((first + i) / n_out, (first + i) % n_out);
                    if held != index {
                        source.read(tensor, index * n_in * n_out, &mut matrix);
                        held = index;
                    }
                    for (j, value) in row.iter_mut().enumerate() {
                        *value = matrix[j * n_out + o];
                    }
                }
            }
        }
    }
}

/// The source row of output row `row`: within its head, `2i + half` comes from `half * d/2 + i`.
fn rope_pairs(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    head * head_dim + within % 2 * (head_dim / 2) + within / 2
}

/// An error's row, counted from the start of the tensor instead of the task.
fn shift_row(mut error: ggml_sys::Error, first: usize) -> ggml_sys::Error {
    if let ggml_sys::Error::Value { row, .. } = &mut error {
        *row += first;
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rope_pairs_is_the_transpose_of_halves() {
        // One head of 6: [0 1 2 | 3 4 5] -> 0 3 1 4 2 5; the next head the same, 6 on.
        let order: Vec<usize> = (0..12).map(|row| rope_pairs(row, 6)).collect();
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }
}
