//! The engine: a model, verbs, and the passes that step sequences together.

use crate::error::{Error, FeedError, Result};
use crate::memory::concepts::cache::ConceptCache;
use crate::memory::spec::MemorySpec;
use crate::memory::{Memory, Plan};
use crate::model::{Pass, Scratch};
use crate::ops::{Buffer, MOST_BEST, Ops};
use crate::sequence::{Sequence, SequenceOptions};
use std::sync::Arc;

pub use crate::load::{LoadOptions, Model};

/// What a feed wants of the pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Nothing.
    None,
    /// Logits after the last token.
    Last,
    /// The likeliest tokens after the last one, so many of them, with their logits; at most
    /// [`MOST_BEST`].
    Best(usize),
    /// Logits after every token.
    All,
    /// Hidden states of every token after the last norm, `[n, n_embd]`: what embeddings are made of.
    Hidden,
}

impl Want {
    /// Whether something is wanted of every token.
    fn is_every(self) -> bool {
        matches!(self, Want::All | Want::Hidden)
    }
}

/// What came of a feed.
#[derive(Clone, Debug)]
pub enum Output {
    /// Logits `[n, n_vocab]` or hidden states `[n, n_embd]`; none where nothing was wanted.
    Rows(Vec<f32>),
    /// Tokens with their logits, likeliest first, of equals the lower id. Fewer than were asked for
    /// say that no others are possible.
    Best(Vec<(u32, f32)>),
}

impl Default for Output {
    fn default() -> Output {
        Output::Rows(Vec::new())
    }
}

impl Output {
    /// The rows.
    ///
    /// # Panics
    /// When [`Want::Best`] was asked for.
    pub fn rows(self) -> Vec<f32> {
        match self {
            Output::Rows(rows) => rows,
            Output::Best(_) => panic!("rows of a feed that asked for the likeliest tokens"),
        }
    }
}

/// Tokens for one sequence.
pub struct Feed<'a> {
    /// The sequence that reads them.
    pub seq: &'a mut Sequence,
    /// The tokens.
    pub tokens: &'a [u32],
    /// What to return.
    pub want: Want,
}

/// A model on threads.
pub struct Engine {
    /// The model.
    pub model: Arc<Model>,
    /// Compressed contexts; in this process alone unless a place for them is given.
    pub concepts: ConceptCache,
    pub(crate) ops: Box<dyn Ops>,
    /// Of the layers that run by the verbs themselves, the last ones.
    pub(crate) scratch: Scratch,
    /// Of the layers before them, where the model is split.
    pub(crate) before: Scratch,
    /// What segments are compressed in, as long as pass follows pass.
    pub(crate) compressors: Vec<Sequence>,
    /// Embeddings of the segments compressed last.
    pub(crate) embeddings: Buffer,
    /// A pass's logits, where another device computed them.
    logits: Vec<f32>,
    n_ubatch: usize,
}

/// Rows of one pass on the host unless told otherwise.
pub const N_UBATCH: usize = 512;
/// The same on a card, which small products leave idle.
pub const N_UBATCH_CARD: usize = 2048;

impl Engine {
    /// An engine that runs `model` by the verbs it was loaded for, at most `n_ubatch` rows a pass;
    /// 0 for what suits the device.
    pub fn new(model: Arc<Model>, ops: impl Into<Box<dyn Ops>>, n_ubatch: usize) -> Engine {
        let ops = ops.into();
        let n_ubatch = match n_ubatch {
            // The host's layers of a split model take most of a pass.
            0 if ops.of_layer(0).device().is_host() => N_UBATCH,
            0 => N_UBATCH_CARD,
            n => n,
        };
        Engine {
            model,
            ops,
            scratch: Scratch::default(),
            before: Scratch::default(),
            concepts: ConceptCache::default(),
            compressors: Vec::new(),
            embeddings: Buffer::default(),
            logits: Vec::new(),
            n_ubatch,
        }
    }

    /// The verbs.
    pub fn ops(&self) -> &dyn Ops {
        &*self.ops
    }

    /// Most rows of one pass.
    pub fn n_ubatch(&self) -> usize {
        self.n_ubatch
    }

    /// An empty sequence with the memory `spec` describes.
    pub fn sequence(&self, spec: &MemorySpec, options: SequenceOptions) -> Result<Sequence> {
        Sequence::new(&self.model, spec, options)
    }

    /// Feeds tokens to several sequences, in passes they share, and returns the rows each feed
    /// asked for: logits `[n, n_vocab]` or hidden states `[n, n_embd]`. Tokens are checked and room
    /// is asked for before anything changes; feeding more than one pass' worth may leave earlier
    /// passes read when a later one is refused.
    ///
    /// # Panics
    /// When a feed wants [`Want::Best`], which are no rows.
    pub fn step(&mut self, feeds: &mut [Feed<'_>]) -> Result<Vec<Vec<f32>>> {
        let outputs = self.step_or_blame(feeds)?;
        Ok(outputs.into_iter().map(Output::rows).collect())
    }

    /// As [`Engine::step`], for feeds that want anything; an error says which feed it is about.
    /// When all feeds fit one pass and want the same kind of thing (logits or hidden states),
    /// nothing has changed on an error.
    ///
    /// # Panics
    /// When more than [`MOST_BEST`] tokens are wanted, or none.
    pub fn step_or_blame(
        &mut self,
        feeds: &mut [Feed<'_>],
    ) -> std::result::Result<Vec<Output>, FeedError> {
        let n_vocab = self.model.hparams().n_vocab;
        for (i, feed) in feeds.iter().enumerate() {
            let blame = |source| FeedError {
                feed: Some(i),
                source,
            };
            if feed.want == Want::Hidden && feed.seq.memory.reads_logits() {
                let what = "its tokens are chosen by logits, so there are no embeddings with it";
                return Err(blame(feed.seq.spec.refuse(what)));
            }
            if let Some(&id) = feed.tokens.iter().find(|&&id| id as usize >= n_vocab) {
                return Err(blame(Error::TokenId { id, n_vocab }));
            }
            if feed.want != Want::None && !feed.tokens.is_empty() {
                let every = feed.want.is_every();
                feed.seq.memory.check(feed.tokens, every).map_err(blame)?;
            }
        }
        let mut outputs: Vec<Output> = feeds.iter().map(|_| Output::default()).collect();
        let mut read = vec![0; feeds.len()];
        loop {
            let mut room = self.n_ubatch;
            // Shares of this pass: every feed gets its fair part, so that a long prompt and many
            // short ones move together.
            let mut waiting: Vec<usize> = (0..feeds.len())
                .filter(|&i| read[i] < feeds[i].tokens.len())
                .collect();
            if waiting.is_empty() {
                return Ok(outputs);
            }
            // A pass ends with logits or with hidden states, not both.
            let hidden = feeds[waiting[0]].want == Want::Hidden;
            waiting.retain(|&i| (feeds[i].want == Want::Hidden) == hidden);
            waiting.sort_by_key(|&i| feeds[i].tokens.len() - read[i]);
            let mut shares = vec![0; feeds.len()];
            for (nth, &i) in waiting.iter().enumerate() {
                let fair = (room / (waiting.len() - nth)).max(usize::from(room > 0));
                shares[i] = fair.min(feeds[i].tokens.len() - read[i]);
                room -= shares[i];
            }
            self.pass(feeds, &shares, hidden, &mut read, &mut outputs)?;
        }
    }

    /// One pass over the next `shares` tokens of each feed.
    fn pass(
        &mut self,
        feeds: &mut [Feed<'_>],
        shares: &[usize],
        hidden: bool,
        read: &mut [usize],
        outputs: &mut [Output],
    ) -> std::result::Result<(), FeedError> {
        let hp = self.model.hparams();
        let width = if hidden { hp.n_embd } else { hp.n_vocab };
        self.compress(feeds, shares, read)?;
        let mut plans: Vec<Plan> = Vec::with_capacity(feeds.len());
        for (i, feed) in feeds.iter_mut().enumerate() {
            let tokens = &feed.tokens[read[i]..read[i] + shares[i]];
            plans.push(match tokens {
                [] => Plan::default(),
                _ => feed
                    .seq
                    .memory
                    .plan(&*self.ops, tokens, feed.want.is_every())
                    .map_err(|source| FeedError {
                        feed: Some(i),
                        source,
                    })?,
            });
        }
        // Rows whose logits are read: by the caller, or by the memory itself.
        let mut out_rows = Vec::new();
        let mut answers: Vec<Vec<usize>> = Vec::with_capacity(feeds.len());
        let mut row = 0;
        for (i, plan) in plans.iter().enumerate() {
            let first = out_rows.len();
            let last = feeds[i].tokens.len() - read[i];
            let all = feeds[i].want.is_every() || feeds[i].seq.memory.reads_logits();
            let of_last = matches!(feeds[i].want, Want::Last | Want::Best(_));
            for (j, entry) in plan.entries.iter().enumerate() {
                let wanted = entry
                    .token
                    .is_some_and(|t| all || (of_last && t + 1 == last));
                if wanted {
                    out_rows.push(row + j);
                }
            }
            answers.push((first..out_rows.len()).collect());
            row += plan.entries.len();
        }
        let run = self.run(feeds, &plans, out_rows, hidden);
        let run = run.and_then(|()| self.best(feeds, &answers));
        let run = run.and_then(|best| {
            self.bring_home(feeds, &plans)?;
            Ok(best)
        });
        let mut best = match run {
            Ok(best) => best,
            Err(e) => {
                for feed in feeds {
                    feed.seq.memory.store_mut().unreserve();
                }
                return Err(e.into());
            }
        };
        let is_whole = |i: usize| {
            let feed: &Feed<'_> = &feeds[i];
            !matches!(feed.want, Want::Best(_)) || feed.seq.memory.reads_logits()
        };
        let computed = match hidden {
            true => &self.scratch.h,
            false => &self.scratch.logits,
        };
        // The likeliest tokens alone are little to bring home: rows come where someone reads them.
        let computed = match (0..feeds.len()).any(|i| is_whole(i) && !answers[i].is_empty()) {
            true => computed.read_with(&mut self.logits),
            false => Ok(&[][..]),
        };
        let computed = match computed {
            Ok(computed) => computed,
            Err(e) => {
                for feed in feeds {
                    feed.seq.memory.store_mut().unreserve();
                }
                return Err(e.into());
            }
        };
        let mut failed = None;
        for (i, (feed, plan)) in feeds.iter_mut().zip(&plans).enumerate() {
            if shares[i] == 0 {
                continue;
            }
            let rows = match (answers[i].first(), answers[i].last()) {
                (Some(first), Some(last)) if !computed.is_empty() => {
                    &computed[first * width..(last + 1) * width]
                }
                _ => &[],
            };
            let tokens = &feed.tokens[read[i]..read[i] + shares[i]];
            let memory = &mut feed.seq.memory;
            let reads_logits = memory.reads_logits();
            let logits = reads_logits.then_some(rows);
            let taken = match memory.commit(&*self.ops, plan, tokens, logits) {
                Ok(taken) => taken,
                Err(source) => {
                    // The others' cells are written as well: theirs count.
                    memory.store_mut().unreserve();
                    failed.get_or_insert(FeedError {
                        feed: Some(i),
                        source,
                    });
                    continue;
                }
            };
            feed.seq.tokens.extend_from_slice(&tokens[..taken]);
            read[i] += taken;
            let is_last = read[i] == feed.tokens.len() && taken > 0;
            match (feed.want, &mut outputs[i]) {
                (Want::All | Want::Hidden, Output::Rows(all)) => {
                    all.extend_from_slice(&rows[..taken * width]);
                }
                (Want::Last, output) if is_last => {
                    *output = Output::Rows(rows[rows.len() - width..].to_vec());
                }
                (Want::Best(_), output) if is_last => {
                    *output = Output::Best(std::mem::take(&mut best[i]));
                }
                _ => {}
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

impl Engine {
    /// The likeliest tokens after the last row of each feed that wants them, as many as it wants;
    /// `answers` are the rows of logits that each feed has.
    fn best(&self, feeds: &[Feed<'_>], answers: &[Vec<usize>]) -> Result<Vec<Vec<(u32, f32)>>> {
        let mut best = vec![Vec::new(); feeds.len()];
        let wanted = |(i, feed): (usize, &Feed<'_>)| match (feed.want, answers[i].last()) {
            (Want::Best(k), Some(&row)) => Some((i, row, k)),
            _ => None,
        };
        let wanted: Vec<(usize, usize, usize)> =
            feeds.iter().enumerate().filter_map(wanted).collect();
        let rows: Vec<usize> = wanted.iter().map(|w| w.1).collect();
        let Some(most) = wanted.iter().map(|w| w.2).max() else {
            return Ok(best);
        };
        assert!((1..=MOST_BEST).contains(&most), "{most} likeliest tokens");
        let n_vocab = self.model.hparams().n_vocab;
        let found = self.ops.best(&self.scratch.logits, &rows, n_vocab, most)?;
        for ((i, _, k), mut found) in wanted.into_iter().zip(found) {
            found.truncate(k);
            best[i] = found;
        }
        Ok(best)
    }

    /// The layers over what is planned of each feed; logits of `out_rows` into the scratch.
    fn run(
        &mut self,
        feeds: &mut [Feed<'_>],
        plans: &[Plan],
        out_rows: Vec<usize>,
        hidden: bool,
    ) -> Result<()> {
        let sequences: Vec<_> = planned(feeds, plans).collect();
        if sequences.is_empty() {
            return Ok(());
        }
        let mut pass = Pass::new(
            &*self.ops,
            &self.model.weights,
            [&mut self.before, &mut self.scratch],
            sequences,
            out_rows,
        )?;
        pass.hidden = hidden;
        pass.run(self.model.arch.forward)
    }

    /// Takes home what the compressor left of tokens that came alone. Whatever the pass computed is
    /// waited for here, where nothing else of it was wanted.
    fn bring_home(&mut self, feeds: &mut [Feed<'_>], plans: &[Plan]) -> Result<()> {
        let Some(nodes) = &self.model.weights.nodes else {
            return Ok(());
        };
        // The compressor ran with the first layer, by that layer's buffers.
        let s = match self.ops.first_layer() {
            0 => &mut self.scratch.trunk,
            _ => &mut self.before.trunk,
        };
        let steps = planned(feeds, plans).filter_map(|(memory, _)| memory.trunk_step());
        let mut steps: Vec<_> = steps.collect();
        match &steps[..] {
            [] => Ok(()),
            _ => nodes.bring_home(&*self.ops, s, &mut steps),
        }
    }
}

/// The memories that have rows in a pass, with their plans, in the order of the rows.
fn planned<'a>(
    feeds: &'a mut [Feed<'_>],
    plans: &'a [Plan],
) -> impl Iterator<Item = (&'a mut (dyn Memory + 'static), &'a Plan)> {
    let with_plans = feeds.iter_mut().zip(plans);
    let with_rows = with_plans.filter(|(_, plan)| !plan.entries.is_empty());
    with_rows.map(|(feed, plan)| (&mut *feed.seq.memory, plan))
}
