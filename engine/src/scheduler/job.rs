//! What goes into the scheduler and what comes out.

use crate::embed::Pooling;
use crate::grammar::Grammar;
use crate::memory::Stats;
use crate::memory::spec::MemorySpec;
use crate::sampler::SamplerParams;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How an answer is to be written.
#[derive(Clone)]
pub struct Params {
    /// Sampling, seed and biases included.
    pub sampler: SamplerParams,
    /// Most tokens to write; -1 for as many as fit.
    pub n_predict: i64,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Prompt tokens that survive a context shift; -1 for all.
    pub n_keep: i64,
    /// Tokens a context shift drops; 0 for half of what it may drop.
    pub n_discard: usize,
    /// The answer ends at a line that is indented less; 0 for no such rule.
    pub n_indent: usize,
    /// The answer ends at the first line break after this time.
    pub t_max_predict: Option<Duration>,
    /// Alternatives to report per token.
    pub n_probs: usize,
    /// Whether reported probabilities are those after sampling's filters.
    pub post_sampling_probs: bool,
    /// Whether tokens already in the slot are used again.
    pub cache_prompt: bool,
    /// Language of the answer.
    pub grammar: Option<Grammar>,
    /// Control tokens that are shown as text.
    pub preserved: Vec<u32>,
    /// Whether reading the prompt is reported.
    pub progress: bool,
}

/// A request.
pub struct Job {
    /// Number of the request; the scheduler sets it.
    pub id: u64,
    /// Tokens of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// How to answer.
    pub params: Params,
    /// Memory it wants; `None` for the scheduler's own.
    pub memory: Option<MemorySpec>,
    /// The slot it wants.
    pub id_slot: Option<usize>,
    /// Shown again with the slot; the scheduler does not look at it.
    pub echo: Arc<serde_json::Value>,
    /// Set by whoever waits when they no longer do.
    pub cancelled: Arc<AtomicBool>,
    /// Where events go.
    pub events: Box<dyn FnMut(Event) + Send>,
    /// The prompt's embedding is wanted, not an answer.
    pub embed: Option<Pooling>,
    /// Requests with the same prompt that are answered beside this one; the prompt is read once.
    pub children: Vec<Job>,
}

impl Job {
    /// Whether nobody waits any more.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// How many requests this is.
    pub fn weight(&self) -> usize {
        1 + self.children.len()
    }

    /// Tells everybody who waits that nothing will come.
    pub fn refuse(mut self, failure: Failure) {
        for child in self.children.drain(..) {
            child.refuse(failure.clone());
        }
        (self.events)(Event::Failed(failure));
    }
}

/// Where a request got to.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// The slot it runs on.
    pub id_slot: usize,
    /// Prompt tokens.
    pub n_prompt: usize,
    /// Prompt tokens that were already known.
    pub n_cached: usize,
    /// Prompt tokens read, those already known included.
    pub n_processed: usize,
    /// Time since it started.
    pub elapsed: Duration,
}

/// What happens to a request, in order.
#[derive(Debug)]
pub enum Event {
    /// The prompt was read up to here; only when asked for.
    Progress(Head),
    /// More of the answer.
    Piece(Piece),
    /// The answer is complete.
    Finished(Box<Finished>),
    /// The embedding is complete.
    Embedded(Embedded),
    /// There will be no (more) answer.
    Failed(Failure),
}

/// A part of an answer.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Text that may be shown now.
    pub text: String,
    /// Tokens since the last part.
    pub tokens: Vec<u32>,
    /// Their probabilities, when asked for.
    pub probs: Vec<TokenProbs>,
    /// Prompt tokens.
    pub n_prompt: usize,
    /// Tokens written so far.
    pub n_decoded: usize,
    /// Times so far.
    pub timings: Timings,
}

/// A token and its alternatives.
#[derive(Clone, Debug)]
pub struct TokenProbs {
    /// The token.
    pub id: u32,
    /// Log-probability, or probability after sampling's filters when that was asked for.
    pub value: f32,
    /// The likeliest tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The model ended it.
    Eos,
    /// A limit was reached.
    Limit,
    /// A stop string was met.
    Word(String),
}

/// Counts and times of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Prompt tokens that were already known.
    pub n_cached: usize,
    /// Prompt tokens that were read.
    pub n_prompt: usize,
    /// Time from the start to the first token.
    pub prompt: Duration,
    /// Tokens written.
    pub n_predicted: usize,
    /// Time from the first token to the last.
    pub predicted: Duration,
}

/// A complete answer.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The slot it ran on.
    pub id_slot: usize,
    /// Number of the request.
    pub id_task: u64,
    /// All text.
    pub text: String,
    /// All tokens, an end token included.
    pub tokens: Vec<u32>,
    /// Probabilities of the tokens whose text is in `text`, when asked for.
    pub probs: Vec<TokenProbs>,
    /// Why it ended.
    pub stop: Stop,
    /// Whether the context was too short for prompt or answer.
    pub truncated: bool,
    /// Whether the text holds a line break.
    pub has_new_line: bool,
    /// Prompt tokens.
    pub n_prompt: usize,
    /// Tokens now in the slot.
    pub n_past: usize,
    /// Times.
    pub timings: Timings,
    /// The slot's memory.
    pub memory: Stats,
}

/// An embedding, neither scaled nor scored.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// One vector of `n_embd`, or one per token when they are not pooled.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of the text.
    pub n_prompt: usize,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Failure {
    /// The prompt does not fit the slot.
    #[error(
        "request ({n_prompt} tokens) exceeds the available context size ({n_ctx} tokens), try increasing it"
    )]
    Context {
        /// Prompt tokens.
        n_prompt: usize,
        /// What fits.
        n_ctx: usize,
    },
    /// The cells all slots share are used up.
    #[error("Context size has been exceeded.")]
    PoolExhausted,
    /// The request cannot be carried out.
    #[error("{0}")]
    Invalid(String),
    /// The engine failed.
    #[error("{0}")]
    Engine(String),
    /// The scheduler ended.
    #[error("the server is shutting down")]
    Stopped,
}
