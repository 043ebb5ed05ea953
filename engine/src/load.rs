//! Loading of a model: its file, an adapter over it, and what tells it from others.

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::hparams::Hparams;
use crate::memory;
use crate::memory::spec::MemorySpec;
use crate::model::{ARCHS, Arch};
use crate::ops::Ops;
use crate::tokenizer::Tokenizer;
use crate::weights::{Loader, Weights, layer_of};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a model is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// A memory adapter to lay over the model.
    pub memory_adapter: Option<PathBuf>,
}

/// A loaded model: immutable, shared by everything that uses it.
pub struct Model {
    /// The file it came from.
    pub path: PathBuf,
    /// Its vocabulary.
    pub tokenizer: Arc<Tokenizer>,
    /// Its tensors.
    pub weights: Arc<Weights>,
    pub(crate) arch: &'static Arch,
    identity: u64,
}

impl Model {
    /// Loads `path` for the verbs of `ops`. `progress` is told bytes done and bytes in all after each
    /// tensor.
    pub fn load(
        path: &Path,
        options: &LoadOptions,
        ops: &dyn Ops,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Arc<Model>> {
        let gguf = Arc::new(Gguf::open(path)?);
        let adapter = options
            .memory_adapter
            .as_ref()
            .map(|p| open_adapter(p, &gguf))
            .transpose()?;
        let known: Vec<_> = ARCHS.iter().map(|a| a.name).collect();
        let hparams = Hparams::from_gguf(&gguf, path, &known)?;
        let arch = ARCHS.iter().find(|a| a.name == hparams.arch);
        let arch = arch.expect("hyperparameters are read for known architectures only");
        let total: u64 = gguf.tensors().iter().map(|t| t.n_bytes).sum();
        let (first, n_layer) = (ops.first_layer(), hparams.n_layer);
        if first >= n_layer {
            return Err(Error::Split {
                device: ops.name(),
                n_layer,
                first,
            });
        }
        ops.check_room(bytes_on_device(&gguf, first))?;
        let mut done = 0;
        let loader = Loader {
            ops,
            gguf: &gguf,
            adapter: adapter.as_ref(),
            progress: &mut |bytes| {
                done = (done + bytes as u64).min(total);
                progress(done, total);
            },
        };
        let weights = Arc::new(loader.load(hparams)?);
        let tokenizer = Arc::new(Tokenizer::from_gguf(&gguf)?);
        Ok(Arc::new(Model {
            path: path.to_owned(),
            identity: identity(&gguf, adapter.as_deref()),
            tokenizer,
            weights,
            arch,
        }))
    }

    /// The hyperparameters.
    pub fn hparams(&self) -> &Hparams {
        &self.weights.hparams
    }

    /// The file's metadata.
    pub fn gguf(&self) -> &Gguf {
        &self.weights.gguf
    }

    /// A number that tells models apart: of names, shapes, types and a sample of every tensor.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// The text that stands for a context under `memory`: between the context tokens of the file where
    /// that is `concepts`, else `text` itself. Those tokens' own text is taken out of it, so that a document
    /// ends where it ends.
    pub fn context<'a>(&self, memory: &MemorySpec, text: &'a str) -> Cow<'a, str> {
        let Some(concepts) = self.weights.concepts.as_ref() else {
            return text.into();
        };
        if memory.name != "concepts" {
            return text.into();
        }
        let [begin, end] = concepts
            .tokens
            .map(|id| self.tokenizer.decode(&[id], false));
        let text = text.replace(&begin, "").replace(&end, "");
        format!("{begin}{text}{end}").into()
    }

    /// The tokens of [`Model::context`]; control tokens written in `text` are text.
    pub fn context_ids(&self, memory: &MemorySpec, text: &str) -> Vec<u32> {
        let ids = self.tokenizer.encode(text, false, false);
        match &self.weights.concepts {
            Some(concepts) if memory.name == "concepts" => {
                let [begin, end] = concepts.tokens;
                [&[begin], &ids[..], &[end]].concat()
            }
            _ => ids,
        }
    }

    /// The memory that suits the file: its own kind when it has one, else `full`.
    pub fn default_memory(&self) -> MemorySpec {
        let w = &self.weights;
        let kind = w
            .memory_file()
            .opt_str(&w.memory_key("kind"))
            .ok()
            .flatten();
        let text = match kind {
            Some(kind) if memory::MEMORIES.iter().any(|row| row.name == kind) => kind,
            _ => "full",
        };
        MemorySpec {
            name: text.into(),
            options: Vec::new(),
            text: text.into(),
        }
    }
}

/// Bytes of the tensors that lie where the layers from `first` on run: not the decider of a
/// compressor, nor embeddings that are not the head as well.
fn bytes_on_device(gguf: &Gguf, first: usize) -> u64 {
    let untied = gguf.tensor("output.weight").is_some();
    let there = |name: &str| match layer_of(name) {
        Some(il) => il >= first,
        // Learned queries are read on the host; the map of `concepts` is where the head is.
        None if name == "mem.query.weight" => false,
        None if name.starts_with("mem.ce_proj.") => true,
        None if name.starts_with("mem.") => first == 0 && !name.starts_with("mem.decider."),
        None => !(untied && name == "token_embd.weight"),
    };
    let tensors = gguf.tensors().iter().filter(|t| there(&t.name));
    tensors.map(|t| t.n_bytes).sum()
}

/// Opens a memory adapter and checks that it was made for this base.
fn open_adapter(path: &Path, base: &Gguf) -> Result<Arc<Gguf>> {
    let adapter = Gguf::open(path)?;
    let refuse = |what: String| Error::Adapter {
        adapter: path.to_owned(),
        what,
    };
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "memory")] {
        let got = adapter.opt_str(key)?;
        if got != Some(expected) {
            return Err(refuse(format!(
                "`{key}` is {}, expected `{expected}`",
                got.map_or("absent".into(), |s| format!("`{s}`")),
            )));
        }
    }
    let arch = base.str("general.architecture")?;
    let made_for = adapter.str("general.architecture")?;
    if made_for != arch {
        return Err(refuse(format!(
            "made for architecture `{made_for}`, the model is `{arch}`"
        )));
    }
    for suffix in [
        "embedding_length",
        "block_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
    ] {
        let key = format!("{arch}.{suffix}");
        if let (Some(mine), Some(theirs)) = (adapter.opt_u32(&key)?, base.opt_u32(&key)?)
            && mine != theirs
        {
            return Err(refuse(format!(
                "made for {key} = {mine}, the model has {theirs}"
            )));
        }
    }
    Ok(Arc::new(adapter))
}

/// FNV-1a over what tells two model files apart.
fn identity(gguf: &Gguf, adapter: Option<&Gguf>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut eat = |bytes: &[u8]| {
        for &b in bytes {
            hash = (hash ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for file in std::iter::once(gguf).chain(adapter) {
        for tensor in file.tensors() {
            eat(tensor.name.as_bytes());
            eat(tensor.ty.name().as_bytes());
            tensor.dims.iter().for_each(|d| eat(&d.to_le_bytes()));
            let data = file.data(tensor);
            eat(&data[..data.len().min(64)]);
        }
    }
    hash
}
