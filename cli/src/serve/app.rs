//! What every handler shares once the model is loaded.

use super::args::Args;
use super::errors::{ApiError, ApiResult};
use mneme_engine::chat::ChatTemplate;
use mneme_engine::embed::{Classifier, Pooling};
use mneme_engine::grammar::GrammarVocab;
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::scheduler::{Command, Handle, Reply};
use mneme_engine::{Model, Sequence, SequenceOptions};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// The running server.
pub struct App {
    /// The flags.
    pub args: Args,
    /// The model.
    pub model: Arc<Model>,
    /// Its chat template.
    pub template: ChatTemplate,
    /// Its template for conversations with tools, if it has a second one.
    pub tool_template: Option<ChatTemplate>,
    /// The way to the scheduler.
    pub handle: Handle,
    /// Number of slots.
    pub n_slots: usize,
    /// Tokens of one slot.
    pub n_ctx: usize,
    /// Memory of a request that names none.
    pub memory: MemorySpec,
    /// How hidden states become embeddings.
    pub pooling: Pooling,
    /// Head of a reranker.
    pub classifier: Option<Classifier>,
    /// The vocabulary as grammars need it, made when the first one comes.
    pub grammar_vocab: std::sync::OnceLock<Result<GrammarVocab, String>>,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    (SystemTime::now().duration_since(UNIX_EPOCH)).map_or(0, |d| d.as_secs())
}

/// A prefix and 32 random letters and digits.
pub fn new_id(prefix: &str) -> String {
    use rand::distr::{Alphanumeric, SampleString};
    prefix.to_owned() + &Alphanumeric.sample_string(&mut rand::rng(), 32)
}

impl App {
    /// The model's name for clients.
    pub fn model_name(&self) -> String {
        match self.args.aliases.first() {
            Some(alias) => alias.clone(),
            None => self.model.path.display().to_string(),
        }
    }

    /// What turns grammars into languages of this vocabulary.
    pub fn grammars(&self) -> ApiResult<&GrammarVocab> {
        let made = self
            .grammar_vocab
            .get_or_init(|| GrammarVocab::new(&self.model.tokenizer).map_err(|e| e.to_string()));
        made.as_ref().map_err(ApiError::unsupported)
    }

    /// Asks the scheduler something and waits for the answer.
    pub async fn ask<T: Send + 'static>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> ApiResult<T> {
        let (tx, rx) = oneshot::channel();
        let reply: Reply<T> = Box::new(move |answer| {
            // Whoever asked may have gone.
            let _ = tx.send(answer);
        });
        self.handle.send(command(reply))?;
        rx.await
            .map_err(|_| ApiError::unavailable("the server is shutting down"))
    }

    /// Token ids of `text`, with the model's BOS and EOS, special tokens recognised.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let ids = self.model.tokenizer.encode(text, true, true);
        if !ids.is_empty() {
            return ids;
        }
        // A model without BOS still needs something to start from.
        let vocab = &self.model.tokenizer;
        vocab.bos().or(vocab.eos()).into_iter().collect()
    }

    /// Text of `ids`, piece by piece: control tokens and the space in front included.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.model.tokenizer.piece(id));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The memory a request asks for, checked against the model.
    pub fn memory_of(&self, body: &Value) -> ApiResult<Option<MemorySpec>> {
        let Some(text) = super::fields::text(body, "memory")? else {
            return Ok(None);
        };
        let refuse = |e: mneme_engine::Error| ApiError::invalid(format!("Field 'memory': {e}"));
        let spec: MemorySpec = text.parse().map_err(refuse)?;
        Sequence::new(&self.model, &spec, self.sequence_options()).map_err(refuse)?;
        Ok(Some(spec))
    }

    /// Size and types of a slot's sequence.
    pub fn sequence_options(&self) -> SequenceOptions {
        SequenceOptions {
            n_ctx: self.n_ctx,
            ..self.args.sequence
        }
    }

    /// A token as replies about probabilities show it.
    pub fn token_json(&self, id: u32) -> (String, Value) {
        let piece = self.model.tokenizer.piece(id);
        (
            String::from_utf8_lossy(piece).into_owned(),
            json!(piece.to_vec()),
        )
    }
}
