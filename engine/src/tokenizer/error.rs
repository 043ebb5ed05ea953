//! What can be wrong with a vocabulary.

use crate::gguf;

/// A vocabulary that cannot be used. Messages name the GGUF key and what was found.
#[allow(missing_docs)]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error(
        "key \"tokenizer.ggml.model\": tokenizer {got:?} is not supported, expected \"gpt2\" or \"llama\""
    )]
    ModelName { got: String },
    #[error(
        "key \"tokenizer.ggml.pre\": pre-tokenizer {got:?} is not known, expected one of {known}"
    )]
    Pre { got: String, known: String },
    #[error("key \"tokenizer.ggml.tokens\" is empty")]
    NoTokens,
    #[error("key \"tokenizer.ggml.tokens\": {got} tokens do not fit 32-bit ids")]
    TooManyTokens { got: usize },
    #[error("key \"tokenizer.ggml.tokens\": token {text:?} appears twice, as {first} and {second}")]
    DuplicateToken {
        text: String,
        first: usize,
        second: usize,
    },
    #[error("key {key:?}: expected an entry for each of the {expected} tokens, got {got}")]
    Length {
        key: &'static str,
        expected: usize,
        got: usize,
    },
    #[error(
        "key \"tokenizer.ggml.merges\": merge {rank} is {got:?}, expected two tokens with a space between"
    )]
    MergeShape { rank: usize, got: String },
    #[error(
        "key \"tokenizer.ggml.merges\": merge {rank} ({merge:?}) needs {token:?}, which is not in the vocabulary"
    )]
    MergeToken {
        rank: usize,
        merge: String,
        token: String,
    },
    #[error("token {id} is {text:?}, but its type says byte: expected a text like \"<0x0A>\"")]
    ByteToken { id: usize, text: String },
    #[error("the vocabulary was refused: {0}")]
    Model(String),
}
