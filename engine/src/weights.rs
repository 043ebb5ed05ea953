//! A model's tensors, each declared beside its GGUF name and checked against the
//! hyperparameters' shapes when loaded.

use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorInfo};
use crate::hparams::Hparams;
use crate::memory::ahn::AhnTensors;
use crate::memory::concepts::tensors::ConceptTensors;
use crate::memory::trunk::NodeTensors;
use crate::ops::{Buffer, Device, Matrix, Ops, Table};
use std::sync::Arc;

/// Tensors of one decoder layer.
pub struct Layer {
    /// Where they are, and with them the layer's cells and states of every sequence.
    pub device: Device,
    /// `attn_norm.weight` `[n_embd]`.
    pub attn_norm: Buffer,
    /// `attn_q.weight` `[n_head * head_dim, n_embd]`.
    pub attn_q: Matrix,
    /// `attn_k.weight` `[n_head_kv * head_dim, n_embd]`.
    pub attn_k: Matrix,
    /// `attn_v.weight` `[n_head_kv * head_dim, n_embd]`.
    pub attn_v: Matrix,
    /// `attn_q.bias` `[n_head * head_dim]`, where the file has one.
    pub attn_q_bias: Option<Buffer>,
    /// `attn_k.bias` `[n_head_kv * head_dim]`.
    pub attn_k_bias: Option<Buffer>,
    /// `attn_v.bias` `[n_head_kv * head_dim]`.
    pub attn_v_bias: Option<Buffer>,
    /// `attn_q_norm.weight` `[head_dim]`, Qwen3 only.
    pub attn_q_norm: Option<Buffer>,
    /// `attn_k_norm.weight` `[head_dim]`, Qwen3 only.
    pub attn_k_norm: Option<Buffer>,
    /// `attn_output.weight` `[n_embd, n_head * head_dim]`.
    pub attn_output: Matrix,
    /// `attn_output.bias` `[n_embd]`.
    pub attn_output_bias: Option<Buffer>,
    /// `ffn_norm.weight` `[n_embd]`.
    pub ffn_norm: Buffer,
    /// `ffn_gate.weight` `[n_ff, n_embd]`.
    pub ffn_gate: Matrix,
    /// `ffn_up.weight` `[n_ff, n_embd]`.
    pub ffn_up: Matrix,
    /// `ffn_down.weight` `[n_embd, n_ff]`.
    pub ffn_down: Matrix,
    /// Rotary frequencies `[n_rot / 2]`, scaling and `rope_freqs.weight` applied; shared by the
    /// layers of a device.
    pub rope_inv_freq: Arc<Buffer>,
    /// `ahn_*`, where the file or its adapter has them.
    pub ahn: Option<AhnTensors>,
}

/// Everything a forward pass reads.
pub struct Weights {
    /// The numbers all shapes follow from.
    pub hparams: Hparams,
    /// `token_embd.weight` `[n_vocab, n_embd]`, read row by row.
    pub token_embd: Table,
    /// Decoder layers.
    pub layers: Vec<Layer>,
    /// `output_norm.weight` `[n_embd]`.
    pub output_norm: Buffer,
    /// `output.weight` `[n_vocab, n_embd]`, or `token_embd.weight` again (tied).
    pub output: Matrix,
    /// Factor on the rotary cos and sin (YaRN).
    pub rope_mscale: f32,
    /// `mem.*`, where the file or its adapter has them.
    pub nodes: Option<NodeTensors>,
    /// The compressor of `concepts`, where the file or its adapter has one.
    pub concepts: Option<ConceptTensors>,
    /// The file, for memory keys read when a memory is built.
    pub gguf: Arc<Gguf>,
    /// The memory adapter laid over it.
    pub adapter: Option<Arc<Gguf>>,
}

impl Weights {
    /// The file that holds memory keys: the adapter when there is one.
    pub fn memory_file(&self) -> &Gguf {
        self.adapter.as_deref().unwrap_or(&self.gguf)
    }

    /// The file that holds the keys of the memory `kind`: the adapter, unless that is for another memory
    /// than the base, and `kind` is the base's.
    pub fn memory_file_of(&self, kind: &str) -> &Gguf {
        let key = self.memory_key("kind");
        let is = |file: &Gguf| file.opt_str(&key).ok().flatten() == Some(kind);
        match &self.adapter {
            Some(adapter) if is(adapter) || !is(&self.gguf) => adapter,
            _ => &self.gguf,
        }
    }

    /// The key `{arch}.memory.{suffix}` of [`Weights::memory_file`].
    pub fn memory_key(&self, suffix: &str) -> String {
        format!("{}.memory.{suffix}", self.hparams.arch)
    }

    /// Bytes every decoded token reads of the weights.
    pub fn bytes_per_token(&self) -> usize {
        let layer = |l: &Layer| {
            [
                &l.attn_q,
                &l.attn_k,
                &l.attn_v,
                &l.attn_output,
                &l.ffn_gate,
                &l.ffn_up,
                &l.ffn_down,
            ]
            .iter()
            .map(|m| m.n_bytes())
            .sum::<usize>()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.output.n_bytes()
    }

    /// Multiply-adds one token costs in the matrices, the head excluded.
    pub fn macs_per_token(&self) -> usize {
        let hp = &self.hparams;
        let attn = hp.n_embd * hp.head_dim * (2 * hp.n_head + 2 * hp.n_head_kv);
        hp.n_layer * (attn + 3 * hp.n_embd * hp.n_ff)
    }
}

/// The layer that a tensor belongs to, by its name.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    let own = name.strip_prefix("blk.");
    let rest = own.or_else(|| name.strip_prefix("mem.lora."))?;
    rest.split('.').next()?.parse().ok()
}

/// Reads tensors by name from a model file and, for memory tensors, its adapter.
pub struct Loader<'a> {
    /// The verbs that will use the tensors: of the layer they belong to.
    pub ops: &'a dyn Ops,
    /// The model file.
    pub gguf: &'a Arc<Gguf>,
    /// The memory adapter, looked into first.
    pub adapter: Option<&'a Arc<Gguf>>,
    /// Told the bytes of each tensor once it is ready.
    pub progress: &'a mut dyn FnMut(usize),
}

impl Loader<'_> {
    fn find(&self, name: &str) -> Option<(&Arc<Gguf>, &TensorInfo)> {
        self.adapter
            .into_iter()
            .chain([self.gguf])
            .find_map(|file| file.tensor(name).map(|info| (file, info)))
    }

    /// Whether a tensor of this name exists.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The file that has the tensor `name`, where one does, and with it the keys of its memory: an adapter may
    /// lie over a base with another memory of its own.
    pub fn file_of(&self, name: &str) -> Option<&Arc<Gguf>> {
        self.find(name).map(|(file, _)| file)
    }

    /// Rows of the tensor `name`, where it exists: for shapes that the file decides.
    pub fn n_rows(&self, name: &str) -> Option<usize> {
        let (_, info) = self.find(name)?;
        usize::try_from(info.dims.get(1).copied().unwrap_or(1)).ok()
    }

    /// The tensor `name` as rows, after a check of its shape.
    fn raw(&self, name: &str, n_rows: usize, n_cols: usize) -> Result<Table> {
        let (file, info) = self
            .find(name)
            .ok_or_else(|| Error::TensorMissing(name.into()))?;
        // A vector may be written with one dimension, a stack of matrices with three.
        let cols = info.dims.first().copied().unwrap_or(1);
        let rows = info
            .dims
            .iter()
            .skip(1)
            .try_fold(1u64, |a, &d| a.checked_mul(d));
        if cols != n_cols as u64 || rows != Some(n_rows as u64) {
            return Err(Error::TensorShape {
                name: name.into(),
                expected: vec![n_cols as u64, n_rows as u64],
                got: info.dims.clone(),
            });
        }
        Ok(Table::new(file, info, n_rows, n_cols))
    }

    fn done(&mut self, name: &str) {
        let bytes = self.find(name).map_or(0, |(_, info)| info.n_bytes);
        (self.progress)(bytes as usize);
    }

    /// A weight matrix.
    pub fn matrix(&mut self, name: &str, n_rows: usize, n_cols: usize) -> Result<Matrix> {
        let matrix = self.ops.matrix(self.raw(name, n_rows, n_cols)?)?;
        self.done(name);
        Ok(matrix)
    }

    /// A weight matrix for the host's own verbs, wherever the model runs: of a decider.
    pub fn host_matrix(&mut self, name: &str, n_rows: usize, n_cols: usize) -> Result<Matrix> {
        let raw = self.raw(name, n_rows, n_cols)?;
        let matrix = self.ops.host().matrix(raw)?;
        self.done(name);
        Ok(matrix)
    }

    /// A table of rows, read on the host.
    pub fn table(&mut self, name: &str, n_rows: usize, n_cols: usize) -> Result<Table> {
        let table = self.ops.host().table(self.raw(name, n_rows, n_cols)?)?;
        self.done(name);
        Ok(table)
    }

    /// A tensor's values as F32, row by row.
    pub fn values(&mut self, name: &str, n_rows: usize, n_cols: usize) -> Result<Vec<f32>> {
        let table = self.table(name, n_rows, n_cols)?;
        let mut out = vec![0.0; n_rows * n_cols];
        for (row, out) in out.chunks_exact_mut(n_cols).enumerate() {
            table.read_row(row, out);
        }
        Ok(out)
    }

    /// A vector.
    pub fn vector(&mut self, name: &str, n: usize) -> Result<Vec<f32>> {
        self.values(name, 1, n)
    }

    /// A vector for the verbs.
    pub fn buffer(&mut self, name: &str, n: usize) -> Result<Buffer> {
        let values = self.vector(name, n)?;
        self.ops.device().upload(values)
    }

    /// A vector for the verbs if the file has it.
    pub fn buffer_if(&mut self, name: &str, n: usize) -> Result<Option<Buffer>> {
        self.has(name).then(|| self.buffer(name, n)).transpose()
    }

    /// A vector if the file has it.
    pub fn vector_if(&mut self, name: &str, n: usize) -> Result<Option<Vec<f32>>> {
        self.has(name).then(|| self.vector(name, n)).transpose()
    }

    fn layer(&mut self, il: usize, hp: &Hparams, inv_freq: Arc<Buffer>) -> Result<Layer> {
        let name = |suffix: &str| format!("blk.{il}.{suffix}");
        let (e, d) = (hp.n_embd, hp.head_dim);
        let (n_q, n_kv) = (hp.n_head * d, hp.n_head_kv * d);
        Ok(Layer {
            device: self.ops.device().clone(),
            attn_norm: self.buffer(&name("attn_norm.weight"), e)?,
            attn_q: self.matrix(&name("attn_q.weight"), n_q, e)?,
            attn_k: self.matrix(&name("attn_k.weight"), n_kv, e)?,
            attn_v: self.matrix(&name("attn_v.weight"), n_kv, e)?,
            attn_q_bias: self.buffer_if(&name("attn_q.bias"), n_q)?,
            attn_k_bias: self.buffer_if(&name("attn_k.bias"), n_kv)?,
            attn_v_bias: self.buffer_if(&name("attn_v.bias"), n_kv)?,
            attn_q_norm: self.buffer_if(&name("attn_q_norm.weight"), d)?,
            attn_k_norm: self.buffer_if(&name("attn_k_norm.weight"), d)?,
            attn_output: self.matrix(&name("attn_output.weight"), e, n_q)?,
            attn_output_bias: self.buffer_if(&name("attn_output.bias"), e)?,
            ffn_norm: self.buffer(&name("ffn_norm.weight"), e)?,
            ffn_gate: self.matrix(&name("ffn_gate.weight"), hp.n_ff, e)?,
            ffn_up: self.matrix(&name("ffn_up.weight"), hp.n_ff, e)?,
            ffn_down: self.matrix(&name("ffn_down.weight"), e, hp.n_ff)?,
            rope_inv_freq: inv_freq,
            ahn: AhnTensors::load(self, il, hp)?,
        })
    }

    /// Loads everything `hparams` calls for.
    pub fn load(mut self, hparams: Hparams) -> Result<Weights> {
        let hp = &hparams;
        // A handful of tensors name the feature that we would otherwise get silently wrong.
        for odd in ["blk.0.ffn_gate_inp.weight", "blk.0.attn_sinks.weight"] {
            if self.has(odd) {
                return Err(Error::TensorType {
                    name: odd.into(),
                    ty: "of a model variant".into(),
                    role: "here: mixtures of experts and learned sinks are not supported",
                });
            }
        }
        let token_embd = self.table("token_embd.weight", hp.n_vocab, hp.n_embd)?;
        let freq_factors = self.vector_if("rope_freqs.weight", hp.n_rot / 2)?;
        let divides = |f: &f32| f.is_finite() && *f > 0.0;
        if let Some(bad) = freq_factors.iter().flatten().find(|f| !divides(f)) {
            return Err(Error::TensorType {
                name: "rope_freqs.weight".into(),
                ty: format!("value {bad}"),
                role: "as a divisor of frequencies",
            });
        }
        let (rope_inv_freq, rope_mscale) = hp.rope_frequencies(freq_factors.as_deref());
        let ops = self.ops;
        let mut layers: Vec<Layer> = Vec::with_capacity(hp.n_layer);
        for il in 0..hp.n_layer {
            self.ops = ops.of_layer(il);
            let device = self.ops.device();
            let before = layers.last().filter(|layer| layer.device == *device);
            let inv_freq = match before {
                Some(layer) => Arc::clone(&layer.rope_inv_freq),
                None => Arc::new(device.upload(rope_inv_freq.clone())?),
            };
            layers.push(self.layer(il, hp, inv_freq)?);
        }
        self.ops = ops;
        let output_norm = self.buffer("output_norm.weight", hp.n_embd)?;
        let head = if self.has("output.weight") {
            "output.weight"
        } else {
            "token_embd.weight"
        };
        let output = self.matrix(head, hp.n_vocab, hp.n_embd)?;
        let concepts = ConceptTensors::load(&mut self, hp)?;
        // It reads embeddings, and its slots enter the first layer.
        self.ops = ops.of_layer(0);
        let nodes = NodeTensors::load(&mut self, hp)?;
        Ok(Weights {
            token_embd,
            layers,
            output_norm,
            output,
            rope_mscale,
            nodes,
            concepts,
            gguf: Arc::clone(self.gguf),
            adapter: self.adapter.map(Arc::clone),
            hparams,
        })
    }
}
