//! mneme's engine: from a GGUF file and tokens to logits, with a choice of memories.
//!
//! The walk of a token: [`engine::Engine::step`] asks each sequence's memory for a plan, stacks the
//! rows into a [`model::Pass`], runs the architecture's forward pass over the verbs of [`ops`], and
//! lets each memory commit. The engine knows no HTTP and no terminal.

pub mod chat;
mod compress;
pub mod embed;
pub mod engine;
pub mod error;
pub mod gguf;
pub mod grammar;
pub mod hparams;
mod load;
pub mod memory;
pub mod model;
pub mod ops;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod session;
pub mod tokenizer;
pub mod weights;

pub use engine::{Engine, Feed, LoadOptions, Model, Output, Want};
pub use error::{Error, FeedError, Result};
pub use sequence::{Sequence, SequenceOptions};
