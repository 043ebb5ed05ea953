//! Compression of contexts: segments of all feeds go through the model together, each alone, with the
//! compressor's low-rank additions (`concepts`, CompLLM, arXiv 2509.19228).

use crate::engine::{Engine, Feed};
use crate::error::{FeedError, Result};
use crate::memory::concepts::cache::Key;
use crate::memory::spec::MemorySpec;
use crate::memory::store::Cell;
use crate::memory::{Entry, Plan, Source};
use crate::model::Pass;
use crate::sequence::{Sequence, SequenceOptions};
use mneme_kernels::attend::{KvType, Visible};
use std::collections::HashMap;
use std::sync::Arc;

/// A segment that nobody has compressed yet.
struct Missing {
    key: Key,
    tokens: Vec<u32>,
    n_slots: usize,
}

impl Engine {
    /// Gives the memories the embeddings that a plan over the next `shares` tokens of each feed needs:
    /// from the cache, or made now.
    pub(crate) fn compress(
        &mut self,
        feeds: &mut [Feed<'_>],
        shares: &[usize],
        read: &[usize],
    ) -> std::result::Result<(), FeedError> {
        if self.model.weights.concepts.is_none() {
            return Ok(());
        }
        let n_embd = self.model.hparams().n_embd;
        let identity = self.model.identity();
        let mut found: HashMap<Key, Option<Arc<[f32]>>> = HashMap::new();
        let mut missing = Vec::new();
        let mut wanted = Vec::with_capacity(feeds.len());
        for (i, feed) in feeds.iter().enumerate() {
            let tokens = &feed.tokens[read[i]..read[i] + shares[i]];
            let mut keys = Vec::new();
            for (tokens, n_slots) in feed.seq.memory.segments(tokens) {
                let key = Key::new(identity, &tokens, n_slots);
                keys.push(key);
                if found.contains_key(&key) {
                    continue;
                }
                let known = self.concepts.get(key, n_slots * n_embd);
                if known.is_none() {
                    missing.push(Missing {
                        key,
                        tokens,
                        n_slots,
                    });
                }
                found.insert(key, known);
            }
            wanted.push(keys);
        }
        if missing.is_empty() {
            self.compressors.clear();
        }
        let mut from = 0;
        while from < missing.len() {
            let mut rows = 0;
            let fits = missing[from..].iter().take_while(|m| {
                rows += m.tokens.len() + m.n_slots;
                rows <= self.n_ubatch()
            });
            let n = fits.count().max(1);
            let together = &missing[from..from + n];
            for (m, embeddings) in together.iter().zip(self.compress_together(together)?) {
                self.concepts.put(m.key, &embeddings);
                found.insert(m.key, Some(embeddings));
            }
            from += n;
        }
        for (feed, keys) in feeds.iter_mut().zip(wanted) {
            if !keys.is_empty() {
                let all = keys.iter().filter_map(|key| found[key].clone());
                feed.seq.memory.embed(all.collect());
            }
        }
        Ok(())
    }

    /// One pass over segments, none of which sees another; the embeddings of each.
    fn compress_together(&mut self, segments: &[Missing]) -> Result<Vec<Arc<[f32]>>> {
        let model = Arc::clone(&self.model);
        let tensors = model.weights.concepts.as_ref();
        let tensors = tensors.expect("segments come from a memory with a compressor");
        let n_embd = model.hparams().n_embd;
        let spec: MemorySpec = "full".parse()?;
        // What is cached must not depend on who asked first.
        let options = SequenceOptions {
            n_ctx: 0,
            type_k: KvType::F32,
            type_v: KvType::F32,
        };
        while self.compressors.len() < segments.len() {
            let sequence = Sequence::new(&model, &spec, options)?;
            self.compressors.push(sequence);
        }
        let mut plans = Vec::with_capacity(segments.len());
        let mut out_rows = Vec::new();
        let mut n_rows = 0;
        for segment in segments {
            let tokens = segment.tokens.iter().map(|&id| Source::Token(id));
            let queries = (0..segment.n_slots).map(Source::Vector);
            let entries: Vec<Entry> = tokens
                .chain(queries)
                .enumerate()
                .map(|(i, source)| Entry {
                    source,
                    token: None,
                    pos: i as u32,
                    cell: Cell::Raw(i),
                    visible: Visible {
                        n_kept: 0,
                        raw_begin: 0,
                        raw_end: i as u64 + 1,
                    },
                })
                .collect();
            n_rows += entries.len();
            out_rows.extend(n_rows - segment.n_slots..n_rows);
            plans.push(Plan {
                entries,
                vectors: tensors.queries[..segment.n_slots * n_embd].to_vec(),
                ..Plan::default()
            });
        }
        let n_out = out_rows.len();
        // They are never committed: the next segments are written over these.
        let parts = self.compressors.iter_mut().zip(&plans);
        let parts = parts.map(|(seq, plan)| (&mut *seq.memory, plan)).collect();
        let mut pass = Pass::new(
            &*self.ops,
            &model.weights,
            [&mut self.before, &mut self.scratch],
            parts,
            out_rows,
        )?;
        pass.adapt()?;
        pass.run(model.arch.forward)?;
        let out = &mut self.embeddings;
        self.ops.device().resize(out, n_out * n_embd)?;
        self.ops
            .mul_mat(&self.scratch.h, 0..n_out, &mut [(&tensors.proj, out)]);
        if let Some(bias) = &tensors.proj_bias {
            self.ops.add_bias(out, bias);
        }
        let mut copy = Vec::new();
        let mut rows = out.read_with(&mut copy)?;
        let mut all = Vec::with_capacity(segments.len());
        for segment in segments {
            let (own, rest) = rows.split_at(segment.n_slots * n_embd);
            all.push(Arc::from(own));
            rows = rest;
        }
        Ok(all)
    }
}
