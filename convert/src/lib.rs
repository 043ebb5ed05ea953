//! Brings models into GGUF: Hugging Face folders ([`convert`]), and GGUF files into other types
//! ([`quantize`]).
//!
//! Tensors are streamed in slabs of rows, so that memory stays at some hundred megabytes whatever the
//! model's size. Outputs are written beside their final name and renamed at the end: a full disk or an
//! interruption leaves nothing behind.

mod config;
mod error;
mod imatrix;
mod memory;
mod mix;
mod names;
mod output;
mod plan;
mod quantize;
mod source;
mod spm;
mod tokenizer;

use std::path::{Path, PathBuf};

use mneme_engine::gguf::GgufWriter;

pub use ggml_sys::Type;
pub use regex::Regex;

pub use config::{Arch, Config, RopeScaling};
pub use error::Error;
pub use imatrix::Imatrix;
pub use memory::{AHN_SINKS, AHN_WINDOW};
pub use mix::{FileType, MixOptions, MixTensor, ModelShape, fit_rows, sort_key, tensor_types};
pub use output::{OnProgress, OutputOptions, Progress, Written};
pub use quantize::{QuantizeOptions, quantize};

use memory::{Memory, memory_of};
use names::base_tensors;
use output::{OutputTensor, write_gguf};
use plan::PlannedTensor;
use source::{Source, SourceType};
use tokenizer::Vocabulary;

/// Version of ggml's block formats, in `general.quantization_version`.
pub(crate) const QUANTIZATION_VERSION: u32 = 2;

/// What to convert, and how.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The folder with `config.json`, the tokenizer and the safetensors files.
    pub model: PathBuf,
    /// A second folder whose memory tensors are merged into the model.
    pub memory: Option<PathBuf>,
    /// Write the memory alone, as an adapter for any GGUF of the base model.
    pub adapter: bool,
    /// Where to write.
    pub output: OutputOptions,
    /// Type of the matrices; `None` keeps each one's own.
    pub outtype: Option<Type>,
    /// Name of the pre-tokenizer, if it is not to be recognised.
    pub pre: Option<String>,
    /// `general.name`, if not the folder's.
    pub name: Option<String>,
    /// Window of the memory, above everything that the checkpoint says.
    pub window: Option<u32>,
    /// Sinks of the memory, above everything that the checkpoint says.
    pub sinks: Option<u32>,
}

impl ConvertOptions {
    /// The defaults: a whole model in its own types.
    pub fn new(model: impl Into<PathBuf>, output: impl Into<PathBuf>) -> ConvertOptions {
        ConvertOptions {
            model: model.into(),
            memory: None,
            adapter: false,
            output: OutputOptions {
                path: output.into(),
                overwrite: false,
                split_max_bytes: None,
            },
            outtype: None,
            pre: None,
            name: None,
            window: None,
            sinks: None,
        }
    }
}

/// What a conversion did.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The files.
    pub written: Written,
    /// The architecture.
    pub arch: &'static str,
    /// The memory's kind, if there is one.
    pub memory: Option<String>,
    /// Things that the user should know.
    pub notes: Vec<String>,
}

/// Converts a Hugging Face folder.
pub fn convert(
    options: &ConvertOptions,
    progress: &mut OnProgress<'_>,
) -> Result<Converted, Error> {
    check_outtype(options.outtype)?;
    let config = Config::open(&options.model)?;
    let source = Source::open(&options.model)?;
    let (memory_config, memory_source) = match &options.memory {
        None => (None, None),
        Some(folder) => {
            let memory_config = Config::open(folder)?;
            check_same_base(&config, &memory_config)?;
            (Some(memory_config), Some(Source::open(folder)?))
        }
    };
    let memory = memory_of(
        memory_config.as_ref().unwrap_or(&config),
        memory_source.as_ref().unwrap_or(&source),
        options.window,
        options.sinks,
    )?;
    if memory.is_none() && (options.adapter || options.memory.is_some()) {
        return Err(Error::Memory {
            path: options.memory.as_ref().unwrap_or(&options.model).clone(),
            message: "the checkpoint has no memory tensors and no memory keys".into(),
        });
    }
    let mut keys = GgufWriter::new();
    let mut planned: Vec<(&Source, PlannedTensor)> = Vec::new();
    keys.set("general.architecture", config.arch.name());
    let (memory, memory_tensors) = match memory {
        None => (None, Vec::new()),
        Some((memory, tensors)) => (Some(memory), tensors),
    };
    if options.adapter {
        adapter_keys(&mut keys, &config, options, memory.as_ref())?;
    } else {
        let base =
            base_tensors(&config, &source).map_err(|error| explain_ahn_only(error, &source))?;
        planned.extend(base.into_iter().map(|tensor| (&source, tensor)));
        model_keys(&mut keys, &config, options, &planned)?;
    }
    if let Some(memory) = &memory {
        memory.write_keys(&mut keys);
    }
    let memory_source = memory_source.as_ref().unwrap_or(&source);
    planned.extend(
        memory_tensors
            .into_iter()
            .map(|tensor| (memory_source, tensor)),
    );
    let mut tensors = Vec::with_capacity(planned.len());
    for (_, tensor) in &mut planned {
        tensor.choose_type(options.outtype)?;
        tensors.push(OutputTensor {
            name: tensor.name.clone(),
            dims: tensor.dims(),
            ty: tensor.ggml_type()?,
        });
    }
    let written = write_gguf(&options.output, keys, &tensors, progress, |i, write| {
        let (source, tensor) = &planned[i];
        tensor.produce(source, write)
    })?;
    Ok(Converted {
        written,
        arch: config.arch.name(),
        notes: memory
            .as_ref()
            .map_or(Vec::new(), |memory| memory.notes.clone()),
        memory: memory.map(|memory| memory.kind),
    })
}

fn check_outtype(outtype: Option<Type>) -> Result<(), Error> {
    let Some(ty) = outtype else { return Ok(()) };
    if !ty.can_quantize() {
        return Err(Error::Options(format!(
            "output type {ty} cannot be written"
        )));
    }
    if ty.requires_imatrix() {
        return Err(Error::Options(format!(
            "output type {ty} needs an importance matrix: convert to f16 or bf16, then quantize with --imatrix"
        )));
    }
    Ok(())
}

/// The keys of a whole model.
fn model_keys(
    keys: &mut GgufWriter,
    config: &Config,
    options: &ConvertOptions,
    planned: &[(&Source, PlannedTensor)],
) -> Result<(), Error> {
    keys.set("general.type", "model");
    keys.set("general.name", model_name(options));
    let n_params: usize = planned.iter().map(|(_, tensor)| tensor.n_elements()).sum();
    keys.set("general.size_label", size_label(n_params));
    // The embedding's type stands for the file where every matrix keeps its own.
    let own = planned.first().map(|(_, tensor)| tensor.source_type());
    let ty = options.outtype.unwrap_or(match own {
        Some(SourceType::F16) => Type::F16,
        Some(SourceType::BF16) => Type::BF16,
        _ => Type::F32,
    });
    if let Some(file_type) = FileType::of_type(ty) {
        keys.set("general.file_type", file_type.id());
    }
    keys.set("general.quantization_version", QUANTIZATION_VERSION);
    sampling_keys(keys, &options.model)?;
    config.write_keys(keys);
    let vocabulary = Vocabulary::open(&options.model, config.n_vocab, options.pre.as_deref())?;
    vocabulary.write_keys(keys);
    Ok(())
}

/// The keys of an adapter: what it fits.
fn adapter_keys(
    keys: &mut GgufWriter,
    config: &Config,
    options: &ConvertOptions,
    memory: Option<&Memory>,
) -> Result<(), Error> {
    if memory.is_some_and(|memory| memory.kind == "gist") {
        return Err(Error::Memory {
            path: options.model.clone(),
            message: "a gist memory is rows of the token embedding and cannot be an adapter: convert the whole \
                      model, without --memory-adapter"
                .into(),
        });
    }
    let arch = config.arch.name();
    keys.set("general.type", "adapter");
    keys.set("adapter.type", "memory");
    keys.set("general.name", model_name(options));
    for (key, n) in [
        ("block_count", config.n_layer),
        ("embedding_length", config.n_embd),
        ("attention.head_count", config.n_head),
        ("attention.head_count_kv", config.n_head_kv),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("vocab_size", config.n_vocab),
    ] {
        keys.set(&format!("{arch}.{key}"), n as u32);
    }
    Ok(())
}

fn model_name(options: &ConvertOptions) -> String {
    let folder = || {
        let folder = options
            .model
            .canonicalize()
            .unwrap_or_else(|_| options.model.clone());
        folder.file_name().map_or_else(
            || "model".into(),
            |name| name.to_string_lossy().into_owned(),
        )
    };
    options.name.clone().unwrap_or_else(folder)
}

/// `494M`, `3.1B`: the number of parameters as llama.cpp labels it.
fn size_label(n: usize) -> String {
    match n as f64 {
        n if n >= 9.95e9 => format!("{:.0}B", n / 1e9),
        n if n >= 9.995e8 => format!("{:.1}B", n / 1e9),
        n if n >= 1e6 => format!("{:.0}M", n / 1e6),
        n => format!("{:.0}K", (n / 1e3).ceil()),
    }
}

/// Recommended sampling from `generation_config.json`, where it samples at all.
fn sampling_keys(keys: &mut GgufWriter, folder: &Path) -> Result<(), Error> {
    let path = folder.join("generation_config.json");
    let json = source::read_json(&path)?.unwrap_or_default();
    if json["do_sample"].as_bool() == Some(false) {
        return Ok(());
    }
    if let Some(k) = json["top_k"].as_u64().and_then(|k| i32::try_from(k).ok()) {
        keys.set("general.sampling.top_k", k);
    }
    for (from, to) in [
        ("temperature", "general.sampling.temp"),
        ("top_p", "general.sampling.top_p"),
        ("min_p", "general.sampling.min_p"),
        ("repetition_penalty", "general.sampling.penalty_repeat"),
    ] {
        if let Some(value) = json[from].as_f64().filter(|value| value.is_finite()) {
            keys.set(to, value as f32);
        }
    }
    Ok(())
}

/// A memory fits a base of the same shape only.
fn check_same_base(base: &Config, memory: &Config) -> Result<(), Error> {
    let differ =
        |key: &str, base: &dyn std::fmt::Display, got: &dyn std::fmt::Display| Error::Key {
            path: memory.path().to_path_buf(),
            key: key.into(),
            expected: format!("{base}, as the base model has"),
            got: got.to_string(),
        };
    if base.arch != memory.arch {
        return Err(differ(
            "architectures",
            &base.arch.name(),
            &memory.arch.name(),
        ));
    }
    for (key, base, memory) in [
        ("hidden_size", base.n_embd, memory.n_embd),
        ("num_hidden_layers", base.n_layer, memory.n_layer),
        ("num_attention_heads", base.n_head, memory.n_head),
        ("num_key_value_heads", base.n_head_kv, memory.n_head_kv),
        ("head_dim", base.head_dim, memory.head_dim),
    ] {
        if base != memory {
            return Err(differ(key, &base, &memory));
        }
    }
    Ok(())
}

/// A folder with memory tensors only cannot become a whole model: say what can be done.
fn explain_ahn_only(error: Error, source: &Source) -> Error {
    let only_memory = source.tensors().keys().all(|name| names::is_memory(name));
    match error {
        Error::MissingTensor { path, .. } if only_memory && !source.tensors().is_empty() => Error::Memory {
            path,
            message: "the folder holds memory tensors only: write an adapter with --memory-adapter, or give the base \
                      model's folder and this one by --memory"
                .into(),
        },
        other => other,
    }
}
