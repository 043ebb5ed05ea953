//! GGUF to GGUF in other types.

use std::path::{Path, PathBuf};

use ggml_sys::Type;
use mneme_engine::gguf::{GgmlType, Gguf, GgufWriter, TensorInfo};
use rayon::prelude::*;

use crate::mix::{
    FileType, MixOptions, MixTensor, ModelShape, needs_imatrix, sort_key, tensor_types,
};
use crate::output::{OnProgress, OutputOptions, OutputTensor, Written, write_gguf};
use crate::{Error, Imatrix, QUANTIZATION_VERSION};

/// What to quantize, and how.
#[derive(Clone, Debug)]
pub struct QuantizeOptions {
    /// The GGUF to read; the first part of a split one.
    pub input: PathBuf,
    /// Where to write.
    pub output: OutputOptions,
    /// The mixture.
    pub file_type: FileType,
    /// Departures from it. `has_imatrix` is set from `imatrix`.
    pub mix: MixOptions,
    /// Importances.
    pub imatrix: Option<Imatrix>,
    /// Quantize again what is quantized already: quality is lost twice.
    pub allow_requantize: bool,
}

/// Values per slab: what is held of a tensor as F32.
const SLAB_VALUES: usize = 1 << 24;

/// Quantizes a file.
pub fn quantize(
    options: &QuantizeOptions,
    progress: &mut OnProgress<'_>,
) -> Result<Written, Error> {
    let gguf = Gguf::open(&options.input)?;
    if same_file(&options.input, &options.output.path) {
        return Err(Error::Options(format!(
            "{}: input and output are the same file",
            options.input.display()
        )));
    }
    let mut sources: Vec<&TensorInfo> = gguf.tensors().iter().collect();
    sources.sort_by(|a, b| sort_key(&a.name).cmp(&sort_key(&b.name)));
    let types = types_of(&gguf, &sources, options)?;
    let mut tensors = Vec::with_capacity(sources.len());
    let mut jobs = Vec::with_capacity(sources.len());
    for (source, to) in sources.into_iter().zip(types) {
        let job = Job::new(&gguf, source, to, options)?;
        tensors.push(OutputTensor {
            name: source.name.clone(),
            dims: source.dims.clone(),
            ty: engine_type(to)?,
        });
        jobs.push(job);
    }
    let keys = keys_of(&gguf, options);
    write_gguf(&options.output, keys, &tensors, progress, |i, write| {
        jobs[i].produce(write)
    })
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn engine_type(ty: Type) -> Result<GgmlType, Error> {
    GgmlType::from_id(ty.id()).ok_or_else(|| Error::Options(format!("type {ty} cannot be written")))
}

fn ggml_type(ty: GgmlType) -> Result<Type, Error> {
    Type::from_id(ty.id()).ok_or_else(|| Error::Options(format!("type {ty} cannot be read")))
}

fn types_of(
    gguf: &Gguf,
    sources: &[&TensorInfo],
    options: &QuantizeOptions,
) -> Result<Vec<Type>, Error> {
    let arch = gguf.str("general.architecture")?.to_owned();
    let is_adapter = gguf.opt_str("general.type")? == Some("adapter");
    let key = |name: &str| format!("{arch}.{name}");
    let n_expert = gguf.opt_u32(&key("expert_count"))?.unwrap_or(0);
    let known = matches!(arch.as_str(), "qwen2" | "qwen3" | "llama") && n_expert == 0;
    if !known && !options.mix.pure && !is_adapter {
        return Err(Error::Options(format!(
            "{}: the mixtures are known for dense qwen2, qwen3 and llama models, this is {arch} with {n_expert} experts; \
             --pure gives every matrix the same type",
            options.input.display()
        )));
    }
    let size = |name: &str| Ok::<_, Error>(gguf.opt_u32(&key(name))?.unwrap_or(0) as usize);
    let n_head = size("attention.head_count")?;
    let shape = ModelShape {
        n_layer: size("block_count")?,
        n_head,
        n_head_kv: match size("attention.head_count_kv")? {
            0 => n_head,
            n => n,
        },
        arch,
    };
    let mut seen = Vec::with_capacity(sources.len());
    for source in sources {
        seen.push(MixTensor {
            name: &source.name,
            dims: &source.dims,
            ty: ggml_type(source.ty)?,
        });
    }
    let mix = MixOptions {
        has_imatrix: options.imatrix.is_some(),
        ..options.mix.clone()
    };
    tensor_types(&shape, &seen, options.file_type, &mix)
}

/// All keys of the input, with what quantizing changes.
fn keys_of(gguf: &Gguf, options: &QuantizeOptions) -> GgufWriter {
    let mut keys = GgufWriter::new();
    for (key, value) in gguf.keys() {
        if !key.starts_with("split.") {
            keys.set(key, value.clone());
        }
    }
    keys.set("general.quantization_version", QUANTIZATION_VERSION);
    keys.set("general.file_type", options.file_type.id());
    if let Some(imatrix) = &options.imatrix {
        keys.set(
            "quantize.imatrix.file",
            imatrix.path().display().to_string(),
        );
        if let Some(dataset) = imatrix.dataset() {
            keys.set("quantize.imatrix.dataset", dataset);
        }
        keys.set("quantize.imatrix.entries_count", imatrix.n_entries() as i32);
        if let Some(n_chunks) = imatrix.n_chunks() {
            keys.set("quantize.imatrix.chunks_count", n_chunks as i32);
        }
    }
    keys
}

/// One tensor: bytes in, type out.
struct Job<'a> {
    gguf: &'a Gguf,
    source: &'a TensorInfo,
    from: Type,
    to: Type,
    imatrix: Option<&'a [f32]>,
}

impl<'a> Job<'a> {
    fn new(
        gguf: &'a Gguf,
        source: &'a TensorInfo,
        to: Type,
        options: &'a QuantizeOptions,
    ) -> Result<Job<'a>, Error> {
        let from = ggml_type(source.ty)?;
        let fail = |source_error| Error::Type {
            tensor: source.name.clone(),
            source: source_error,
        };
        let mut job = Job {
            gguf,
            source,
            from,
            to,
            imatrix: None,
        };
        if from == to {
            return Ok(job);
        }
        if !to.can_quantize() {
            return Err(fail(ggml_sys::Error::NoQuantizer { ty: to }));
        }
        if !from.can_dequantize() {
            return Err(fail(ggml_sys::Error::NoDequantizer { ty: from }));
        }
        if from.is_quantized() && !options.allow_requantize {
            return Err(Error::Options(format!(
                "tensor {:?} is {from} already: quantizing again loses quality twice; start from the F16 or BF16 file, \
                 or give --allow-requantize",
                source.name
            )));
        }
        if let Some(imatrix) = &options.imatrix {
            job.imatrix = imatrix.get(&source.name);
            let expected = source.n_cols() * source.dims.get(2).copied().unwrap_or(1);
            if let Some(values) = job.imatrix.filter(|values| values.len() as u64 != expected) {
                if source.name != "token_embd.weight" {
                    return Err(imatrix.error(format!(
                        "entry {:?} has {} values, the tensor has {expected} columns",
                        source.name,
                        values.len()
                    )));
                }
                job.imatrix = None;
            }
        }
        if job.imatrix.is_none()
            && (needs_imatrix(&source.name, to, options.file_type) || to.requires_imatrix())
        {
            return Err(fail(ggml_sys::Error::NeedsImatrix { ty: to }));
        }
        Ok(job)
    }

    /// Produces the bytes in slabs of rows.
    fn produce(&self, write: &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
        let data = self.gguf.data(self.source);
        if self.from == self.to {
            for slab in data.chunks(64 << 20) {
                write(slab)?;
            }
        } else if !data.is_empty() {
            self.convert(data, write)?;
        }
        self.gguf.release(self.source);
        Ok(())
    }

    fn convert(
        &self,
        data: &[u8],
        write: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let fail = |source| Error::Type {
            tensor: self.source.name.clone(),
            source,
        };
        let n_cols = self.source.n_cols() as usize;
        let rows_per_matrix = self.source.dims.get(1).copied().unwrap_or(1) as usize;
        let ragged = |ty: Type| {
            fail(ggml_sys::Error::RaggedRow {
                ty,
                n_cols,
                block: ty.block_size(),
            })
        };
        let from_bytes = self
            .from
            .row_bytes(n_cols)
            .ok_or_else(|| ragged(self.from))?;
        let to_bytes = self.to.row_bytes(n_cols).ok_or_else(|| ragged(self.to))?;
        let slab_rows = (SLAB_VALUES / n_cols).max(1);
        let task_rows = ((1 << 16) / n_cols).max(1);
        let mut out = Vec::new();
        for (slab_index, slab) in data.chunks(slab_rows * from_bytes).enumerate() {
            out.resize(slab.len() / from_bytes * to_bytes, 0);
            let first = slab_index * slab_rows;
            out.par_chunks_mut(task_rows * to_bytes)
                .zip(slab.par_chunks(task_rows * from_bytes))
                .enumerate()
                .try_for_each_init(Vec::new, |values: &mut Vec<f32>, (task, (to, from))| {
                    values.resize(from.len() / from_bytes * n_cols, 0.0);
                    ggml_sys::dequantize(self.from, from, values)?;
                    let first = first + task * task_rows;
                    self.rows(first, rows_per_matrix, values, n_cols, to, to_bytes)
                })
                .map_err(fail)?;
            write(&out)?;
        }
        Ok(())
    }

    /// Rows from `first` on. Every matrix of a stack has its own importances.
    fn rows(
        &self,
        first: usize,
        rows_per_matrix: usize,
        values: &[f32],
        n_cols: usize,
        to: &mut [u8],
        to_bytes: usize,
    ) -> Result<(), ggml_sys::Error> {
        let n_rows = values.len() / n_cols;
        let mut row = 0;
        while row < n_rows {
            let matrix = (first + row) / rows_per_matrix;
            let end = ((matrix + 1) * rows_per_matrix - first).min(n_rows);
            let imatrix = self.imatrix.map(|all| &all[matrix * n_cols..][..n_cols]);
            ggml_sys::quantize_rows_into(
                self.to,
                &values[row * n_cols..end * n_cols],
                n_cols,
                imatrix,
                &mut to[row * to_bytes..end * to_bytes],
            )
            .map_err(|mut error| {
                if let ggml_sys::Error::Value { row: at, .. } = &mut error {
                    *at += first + row;
                }
                error
            })?;
            row = end;
        }
        Ok(())
    }
}
