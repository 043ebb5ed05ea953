//! What slots held before they went on to something else, so that it need not be read again.
//!
//! On the host a kept sequence is the sequence itself: its pages are shared with whoever still has
//! them, and its remembered states come along. From a card it is written to host memory as into a
//! session file, so that the card's memory is free for others.

use crate::engine::Model;
use crate::memory::rewinds;
use crate::ops::Ops;
use crate::sequence::Sequence;
use std::sync::Arc;

/// A text below this many tokens is read again as fast as it is found.
pub(super) const MIN_KEPT: usize = 16;

/// How a sequence is kept.
enum Form {
    Live(Box<Sequence>),
    Packed(Vec<u8>),
}

struct Entry {
    spec: String,
    tokens: Vec<u32>,
    form: Form,
    n_bytes: usize,
}

/// Numbers about the cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheStats {
    /// Most bytes it may hold; `None` for no limit.
    pub limit: Option<usize>,
    /// Bytes it holds, counted as if nothing were shared.
    pub n_bytes: usize,
    /// Texts it holds.
    pub n_entries: usize,
    /// Tokens of these texts.
    pub n_tokens: usize,
    /// Texts that were kept.
    pub n_kept: u64,
    /// Texts that went to make room.
    pub n_evicted: u64,
    /// Requests whose prompt it knew more of than any slot.
    pub n_hits: u64,
}

/// Sequences that left their slots, least recently used first.
pub(super) struct PromptCache {
    entries: Vec<Entry>,
    is_host: bool,
    n_ctx: usize,
    stats: CacheStats,
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl PromptCache {
    /// A cache of at most `limit` bytes, 0 for none at all, for sequences of `n_ctx` cells;
    /// `is_host` says where they live.
    pub fn new(
        limit: Option<usize>,
        is_host: bool,
        n_ctx: usize,
        totals: CacheStats,
    ) -> PromptCache {
        PromptCache {
            entries: Vec::new(),
            is_host,
            n_ctx,
            stats: CacheStats {
                limit,
                n_bytes: 0,
                n_entries: 0,
                n_tokens: 0,
                ..totals
            },
        }
    }

    pub fn is_on(&self) -> bool {
        self.stats.limit != Some(0)
    }

    /// Whether keeping a sequence takes neither time nor, at first, memory.
    pub fn is_cheap(&self) -> bool {
        self.is_host
    }

    pub fn stats(&self) -> CacheStats {
        CacheStats {
            n_entries: self.entries.len(),
            n_tokens: self.entries.iter().map(|e| e.tokens.len()).sum(),
            n_bytes: self.entries.iter().map(|e| e.n_bytes).sum(),
            ..self.stats
        }
    }

    /// Whether `seq` is in the cache as it is. A text of a memory that can go back to any of its
    /// tokens is also in every longer one.
    pub fn knows(&self, seq: &Sequence) -> bool {
        self.entries.iter().any(|e| Self::covers(e, seq))
    }

    fn covers(entry: &Entry, seq: &Sequence) -> bool {
        let spec = seq.spec();
        entry.spec == spec.text
            && match rewinds(&spec.name) {
                true => entry.tokens.starts_with(seq.tokens()),
                false => entry.tokens == seq.tokens(),
            }
    }

    /// Keeps `seq`, unless it is short, known, or its dials were turned by hand. Texts it goes on
    /// from are in it and go; the ones not used for longest make room. Says whether it was kept anew.
    pub fn keep(&mut self, seq: Sequence) -> bool {
        if !self.is_on() || seq.n_past() < MIN_KEPT || seq.is_altered() {
            return false;
        }
        if let Some(at) = (self.entries.iter()).position(|e| Self::covers(e, &seq)) {
            let entry = self.entries.remove(at);
            self.entries.push(entry);
            return false;
        }
        let spec = seq.spec().text.clone();
        let tokens = seq.tokens().to_vec();
        let (form, n_bytes) = match self.is_host {
            true => {
                let n = seq.n_bytes();
                (Form::Live(Box::new(seq)), n)
            }
            false => match seq.pack() {
                Ok(bytes) => {
                    let n = bytes.len();
                    (Form::Packed(bytes), n)
                }
                Err(e) => {
                    tracing::warn!("a prompt of {} tokens is not kept: {e}", tokens.len());
                    return false;
                }
            },
        };
        let n_bytes = n_bytes + tokens.len() * size_of::<u32>();
        let most = self.stats.limit.unwrap_or(usize::MAX);
        if n_bytes > most {
            return false;
        }
        (self.entries).retain(|e| e.spec != spec || !tokens.starts_with(&e.tokens));
        let mut held: usize = self.entries.iter().map(|e| e.n_bytes).sum();
        while held.saturating_add(n_bytes) > most {
            held -= self.entries.remove(0).n_bytes;
            self.stats.n_evicted += 1;
        }
        self.stats.n_kept += 1;
        self.entries.push(Entry {
            spec,
            tokens,
            form,
            n_bytes,
        });
        true
    }

    /// A sequence that begins as `prompt` does, for more than `above` tokens and at most `most`,
    /// cut where they part. What is all in the prompt leaves the cache with it; a text that goes
    /// on differently stays.
    pub fn find(
        &mut self,
        model: &Arc<Model>,
        ops: &dyn Ops,
        spec: &str,
        prompt: &[u32],
        above: usize,
        most: usize,
    ) -> Option<Sequence> {
        let mut alike: Vec<(usize, usize)> = (self.entries.iter().enumerate())
            .filter(|(_, e)| e.spec == spec)
            .map(|(at, e)| (common(&e.tokens, prompt).min(most), at))
            .filter(|(n, _)| *n > above)
            .collect();
        alike.sort_unstable();
        let mut best: Option<(usize, Sequence, usize)> = None;
        while let Some((n, at)) = alike.pop() {
            // How far a memory can go back shows only when it does.
            let known = best.as_ref().map_or(above, |(held, ..)| *held);
            if n <= known {
                break;
            }
            let Some(mut seq) = self.unpack(at, model) else {
                continue;
            };
            let held = seq.truncate(ops, n);
            if held > known {
                best = Some((held, seq, at));
            }
        }
        let (held, seq, at) = best?;
        self.stats.n_hits += 1;
        let entry = self.entries.remove(at);
        if entry.tokens.len() > held {
            self.entries.push(entry);
        }
        Some(seq)
    }

    fn unpack(&self, at: usize, model: &Arc<Model>) -> Option<Sequence> {
        match &self.entries[at].form {
            Form::Live(seq) => Some(seq.twin()),
            Form::Packed(bytes) => match Sequence::unpack(model, bytes, self.n_ctx) {
                Ok(seq) => Some(seq),
                Err(e) => {
                    tracing::warn!("a kept prompt cannot be taken up: {e}");
                    None
                }
            },
        }
    }

    /// Drops `seq` and all it goes on from.
    pub fn forget(&mut self, seq: &Sequence) {
        let (spec, tokens) = (&seq.spec().text, seq.tokens());
        (self.entries).retain(|e| e.spec != *spec || !tokens.starts_with(&e.tokens));
    }
}
