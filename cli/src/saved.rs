//! What the command line adds to a session file: everything beside tokens and memory that is
//! needed to go on exactly.

use anyhow::{Context, Result, bail};
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::sampler::Sampler;
use mneme_engine::{Model, Sequence};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

/// A moment before a message of the user, to go back to.
#[derive(Clone, Serialize, Deserialize)]
pub struct Turn {
    /// Tokens read by then.
    pub n_past: usize,
    /// Messages said by then.
    pub n_messages: usize,
    /// What had been read or was pending: so many bytes of [`Saved::rendered`] ...
    pub n_rendered: usize,
    /// ... and where the template has come to write it otherwise since, this.
    #[serde(default)]
    pub rest: String,
    /// Tokens said and not yet read.
    pub pending: Vec<u32>,
}

/// The caller's part of a session file, as JSON.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Saved {
    /// Tokens said and not yet read.
    pub pending: Vec<u32>,
    /// [`Sampler::save`].
    pub sampler: Vec<u8>,
    /// The conversation, of `chat`.
    pub messages: Vec<serde_json::Value>,
    /// The text that has been read, of `chat`.
    pub rendered: String,
    /// The moments to go back to, of `chat`, oldest first.
    pub turns: Vec<Turn>,
}

impl Saved {
    /// Reads a session of `model`. `spec` is the memory asked for, if any: another one in the file
    /// is refused.
    pub fn load(
        model: &Arc<Model>,
        path: &Path,
        n_ctx: usize,
        spec: Option<&MemorySpec>,
    ) -> Result<(Sequence, Saved)> {
        let (seq, extra) = Sequence::load(model, path, n_ctx)?;
        if let Some(spec) = spec
            && spec.text != seq.spec().text
        {
            bail!(
                "session {}: made with --memory {}, not {spec}",
                path.display(),
                seq.spec()
            );
        }
        let saved: Saved = match extra.is_empty() {
            true => Saved::default(),
            false => serde_json::from_slice(&extra)
                .with_context(|| format!("session {}", path.display()))?,
        };
        let n_vocab = model.hparams().n_vocab;
        let pending = saved.turns.iter().flat_map(|turn| &turn.pending);
        let mut pending = pending.chain(&saved.pending);
        if let Some(id) = pending.find(|id| **id as usize >= n_vocab) {
            bail!(
                "session {}: token id {id} is outside the vocabulary of {n_vocab}",
                path.display()
            );
        }
        let sound = |turn: &Turn| {
            turn.n_past <= seq.n_past()
                && turn.n_messages <= saved.messages.len()
                && saved.rendered.is_char_boundary(turn.n_rendered)
        };
        if let Some(nth) = saved.turns.iter().position(|turn| !sound(turn)) {
            bail!(
                "session {}: turn {} of {} lies outside the conversation",
                path.display(),
                nth + 1,
                saved.turns.len()
            );
        }
        Ok((seq, saved))
    }

    /// Refuses a path where no session could be written, before any work is done.
    pub fn check(path: &Path) -> Result<()> {
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let writable = tempfile::tempfile_in(dir).map(drop);
        writable.with_context(|| format!("session {}", path.display()))
    }

    /// Writes the session.
    pub fn save(&self, seq: &Sequence, path: &Path) -> Result<u64> {
        let extra = serde_json::to_vec(self).context("session")?;
        Ok(seq.save(path, &extra)?)
    }

    /// Gives a sampler its state back. One with other settings starts afresh, but knows what was
    /// said.
    pub fn restore_sampler(&self, sampler: &mut Sampler, seq: &Sequence) {
        if self.sampler.is_empty() || sampler.restore(&self.sampler).is_err() {
            for &id in seq.tokens().iter().chain(&self.pending) {
                sampler.accept(id);
            }
        }
    }
}
