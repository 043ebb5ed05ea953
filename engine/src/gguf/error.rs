//! What can be wrong with a GGUF file.

use std::path::{Path, PathBuf};

/// A failure to read or write a GGUF file: which file, and what about it.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", file.display())]
pub struct Error {
    /// The file; `<bytes>` when reading from memory.
    pub file: PathBuf,
    /// What is wrong.
    pub kind: ErrorKind,
}

impl Error {
    pub(super) fn new(file: &Path, kind: ErrorKind) -> Error {
        Error {
            file: file.to_path_buf(),
            kind,
        }
    }
}

/// The kinds of failure of [`Error`]. Every message names the key or tensor, what was expected and what was found.
#[allow(missing_docs)]
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("not a GGUF file: expected magic \"GGUF\", got {got:?}")]
    Magic { got: String },
    #[error("GGUF version {got} is not supported: expected 2 or 3")]
    Version { got: u32 },
    #[error(
        "GGUF version 1 is not supported: convert the file again with a current converter (expected version 2 or 3)"
    )]
    VersionOne,
    #[error(
        "big-endian GGUF (version field {got:#010x}) is not supported: expected a little-endian file"
    )]
    BigEndian { got: u32 },
    #[error(
        "file ends inside {what}: needs {need} bytes at offset {offset}, but the file has {len} bytes"
    )]
    Truncated {
        what: String,
        offset: u64,
        need: u64,
        len: u64,
    },
    #[error("{what} has an absurd count {got}: {left} bytes are left in the file")]
    Count { what: String, got: u64, left: u64 },
    #[error("{what} is not valid UTF-8")]
    Utf8 { what: String },
    #[error("key {index} is empty")]
    EmptyKey { index: u64 },
    #[error("{what} is too long: {got} bytes, at most {max}")]
    NameTooLong {
        what: String,
        got: usize,
        max: usize,
    },
    #[error("key {key:?} appears twice")]
    DuplicateKey { key: String },
    #[error("key {key:?} has unknown value type {got}")]
    ValueType { key: String, got: u32 },
    #[error("key {key:?} is an array of arrays, which is not supported")]
    NestedArray { key: String },
    #[error("key {key:?} holds byte {got} where a bool must be 0 or 1")]
    Bool { key: String, got: u8 },
    #[error("key \"general.alignment\" must be a power of two of type u32, got {got}")]
    Alignment { got: String },
    #[error("key {key:?} is missing")]
    MissingKey { key: String },
    #[error("key {key:?}: expected {expected}, got {got}")]
    KeyType {
        key: String,
        expected: &'static str,
        got: String,
    },
    #[error("tensor {tensor:?} appears twice")]
    DuplicateTensor { tensor: String },
    #[error("tensor {tensor:?} has {got} dimensions, at most 4")]
    Dims { tensor: String, got: u32 },
    #[error("tensor {tensor:?} has unknown ggml type {got}")]
    TensorType { tensor: String, got: u32 },
    #[error(
        "tensor {tensor:?} of type {ty} has a row of {got} elements, expected a multiple of {expected}"
    )]
    Row {
        tensor: String,
        ty: &'static str,
        got: u64,
        expected: usize,
    },
    #[error("tensor {tensor:?} with dims {dims:?} of type {ty} is too large to address")]
    TensorSize {
        tensor: String,
        dims: Vec<u64>,
        ty: &'static str,
    },
    #[error(
        "tensor {tensor:?} starts at data offset {got}, which is no multiple of the alignment {alignment}"
    )]
    Misaligned {
        tensor: String,
        got: u64,
        alignment: u64,
    },
    #[error(
        "tensor {tensor:?} needs {need} bytes at data offset {offset}, but the file holds {len} bytes of tensor data"
    )]
    OutOfBounds {
        tensor: String,
        offset: u64,
        need: u64,
        len: u64,
    },
    #[error("tensors {first:?} and {second:?} overlap in the file")]
    Overlap { first: String, second: String },
    #[error("tensor {tensor:?} is missing")]
    MissingTensor { tensor: String },
    #[error("part {no} of {count} of a split model: open {first} instead")]
    NotFirstSplit { no: u64, count: u64, first: String },
    #[error(
        "split model: expected part {expected_no} of {expected_count}, the file says part {no} of {count}"
    )]
    Split {
        expected_no: u64,
        expected_count: u64,
        no: u64,
        count: u64,
    },
    #[error("split model of {count} parts must be named NAME-00001-of-{count:05}.gguf")]
    SplitName { count: u64 },
    #[error(
        "split model: key \"split.tensors.count\" says {expected} tensors, the parts hold {got}"
    )]
    SplitTensors { expected: u64, got: u64 },
    #[error("already exists; not overwritten")]
    Exists,
    #[error("tensor {tensor:?} must be written next, got {got:?}")]
    Order { tensor: String, got: String },
    #[error("tensor {tensor:?}: expected {expected} bytes of data, got {got}")]
    DataSize {
        tensor: String,
        expected: u64,
        got: u64,
    },
    #[error("all {count} tensors are written already, got {got:?}")]
    TooManyTensors { count: usize, got: String },
}
