//! What can go wrong while converting or quantizing, each message naming the file, key or tensor.

use std::path::{Path, PathBuf};

use mneme_engine::gguf;

/// A failure to convert or quantize. No output file is left behind.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A JSON file does not parse.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A JSON key has the wrong type or an unusable value.
    #[error("{}: key {key:?}: expected {expected}, got {got}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it should hold.
        expected: String,
        /// What it holds.
        got: String,
    },
    /// The model is of a kind that is not supported.
    #[error("{}: architecture {got:?} is not supported (supported: {supported})", path.display())]
    Architecture {
        /// The config file.
        path: PathBuf,
        /// What it says.
        got: String,
        /// What would do.
        supported: String,
    },
    /// A safetensors file is damaged.
    #[error("{}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong in its header.
        source: safetensors::SafeTensorError,
    },
    /// The folder has no weights, or the index names a file that is missing.
    #[error("{}: {message}", path.display())]
    Files {
        /// The folder or index file.
        path: PathBuf,
        /// What is missing.
        message: String,
    },
    /// A tensor that the model needs is not there.
    #[error("tensor {tensor:?} is missing in {}", path.display())]
    MissingTensor {
        /// Its Hugging Face name.
        tensor: String,
        /// The model folder.
        path: PathBuf,
    },
    /// A tensor that no part of the model has.
    #[error("tensor {tensor:?} does not belong to a {arch} model of {n_layer} layers")]
    UnknownTensor {
        /// Its name.
        tensor: String,
        /// The architecture.
        arch: &'static str,
        /// Number of layers of the config.
        n_layer: usize,
    },
    /// A tensor's shape contradicts the config.
    #[error("tensor {tensor:?}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// Its name.
        tensor: String,
        /// The shape that the config asks for, outermost first.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A tensor has a type that is not F32, F16 or BF16.
    #[error("tensor {tensor:?} has type {got}: expected F32, F16 or BF16")]
    Dtype {
        /// Its name.
        tensor: String,
        /// Its type.
        got: String,
    },
    /// The tokenizer cannot be brought into GGUF.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What about it.
        message: String,
    },
    /// Memory tensors or keys that cannot be converted.
    #[error("memory of {}: {message}", path.display())]
    Memory {
        /// The model folder.
        path: PathBuf,
        /// What about it.
        message: String,
    },
    /// An importance matrix file cannot be used.
    #[error("importance matrix {}: {message}", path.display())]
    Imatrix {
        /// The file.
        path: PathBuf,
        /// What about it.
        message: String,
    },
    /// A tensor cannot be brought into a type.
    #[error("tensor {tensor:?}: {source}")]
    Type {
        /// Its GGUF name.
        tensor: String,
        /// ggml's precondition that it breaks.
        source: ggml_sys::Error,
    },
    /// Options that cannot be met.
    #[error("{0}")]
    Options(String),
    /// A GGUF file cannot be read or written.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// The progress callback asked to stop.
    #[error("stopped before the end; no output was written")]
    Stopped,
}

impl Error {
    /// Attaches a path to an error of the operating system.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| Error::Io {
            path: path.to_path_buf(),
            source,
        }
    }
}
