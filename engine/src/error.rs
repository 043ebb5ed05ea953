//! Everything that can go wrong between a file and its logits, each naming the thing at fault.

use std::path::PathBuf;

/// An error of the engine. Messages are lower case and say what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The GGUF container itself is broken or unreadable.
    #[error(transparent)]
    Gguf(#[from] crate::gguf::Error),
    /// The vocabulary in the file cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::Error),
    /// The file's architecture has no forward pass here.
    #[error("{path}: architecture `{arch}` is not supported; supported: {known}")]
    Architecture {
        /// The model file.
        path: PathBuf,
        /// `general.architecture` as found.
        arch: String,
        /// The supported ones, comma separated.
        known: String,
    },
    /// A metadata key is absent or has a value no model can have.
    #[error("key `{key}`: {what}")]
    Key {
        /// The full GGUF key.
        key: String,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor the architecture needs is not in the file.
    #[error("tensor `{0}` not found")]
    TensorMissing(String),
    /// A tensor has another shape than the hyperparameters say.
    #[error("tensor `{name}`: expected shape {expected:?}, got {got:?} (ggml order)")]
    TensorShape {
        /// Tensor name.
        name: String,
        /// Shape that follows from the hyperparameters, fastest dimension first.
        expected: Vec<u64>,
        /// Shape in the file.
        got: Vec<u64>,
    },
    /// A tensor is stored in a type that cannot be used for it.
    #[error("tensor `{name}`: type {ty} cannot be used {role}")]
    TensorType {
        /// Tensor name.
        name: String,
        /// Type in the file.
        ty: String,
        /// What the tensor is for.
        role: &'static str,
    },
    /// A memory adapter was made for another base model.
    #[error("memory adapter {adapter}: {what}")]
    Adapter {
        /// The adapter's file.
        adapter: PathBuf,
        /// What does not match.
        what: String,
    },
    /// A `--memory` description that cannot be used with this model.
    #[error("memory `{spec}`: {what}")]
    Memory {
        /// The description as given.
        spec: String,
        /// Why it is refused.
        what: String,
    },
    /// The tokens do not fit; nothing was changed.
    #[error("the context holds {n_ctx} cells and {held} are taken; {wanted} more do not fit")]
    ContextFull {
        /// Capacity in cells.
        n_ctx: usize,
        /// Cells held now.
        held: usize,
        /// Cells the tokens would add.
        wanted: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {n_vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// Vocabulary size.
        n_vocab: usize,
    },
    /// A session file that is broken or belongs to something else.
    #[error("session {path}: {what}")]
    Session {
        /// The session file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A device that has no name here.
    #[error("device `{0}`: expected auto, cpu, cuda or cuda:N")]
    DeviceName(String),
    /// A card was asked for and this build cannot drive one.
    #[error("device cuda:{0}: this mneme was built without the feature `cuda`")]
    NoCuda(usize),
    /// A card did not do what it was asked.
    #[cfg(feature = "on-card")]
    #[error("{what}: {source}")]
    Device {
        /// The card and what was being done.
        what: String,
        /// Why it failed.
        source: mneme_kernels::cuda::Error,
    },
    /// More than a card has room for.
    #[error("{device}: {what} take {needed} bytes and {free} are free")]
    DeviceFull {
        /// The card.
        device: String,
        /// What it would hold, with the bytes of its parts where there are several.
        what: String,
        /// Bytes of it.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A model would be split behind its last layer.
    #[error(
        "{device}: the model has {n_layer} layers, expected a split before the last, got {first}"
    )]
    Split {
        /// The card.
        device: String,
        /// Layers of the model.
        n_layer: usize,
        /// First layer that would run on the card.
        first: usize,
    },
    /// Sequences of one pass keep their cells in different types.
    #[error("sequences of one pass must have the same types of keys and values")]
    MixedCells,
    /// A place that compressed segments cannot be kept in.
    #[error("concept cache {place}: {what}")]
    ConceptCache {
        /// The place, without a password.
        place: String,
        /// Why not.
        what: String,
    },
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Why a pass was refused, and over which of the feeds.
#[derive(Debug, thiserror::Error)]
#[error("{}{source}", .feed.map_or(String::new(), |i| format!("feed {i}: ")))]
pub struct FeedError {
    /// Index of the feed at fault; `None` when it is not one feed's fault.
    pub feed: Option<usize>,
    /// What went wrong.
    pub source: Error,
}

impl From<Error> for FeedError {
    fn from(source: Error) -> FeedError {
        FeedError { feed: None, source }
    }
}

impl From<FeedError> for Error {
    fn from(e: FeedError) -> Error {
        e.source
    }
}

/// Result of the engine's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;
