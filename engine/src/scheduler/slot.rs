//! One slot: a sequence and the request that is working on it.

use super::job::{Embedded, Event, Failure, Finished, Head, Job, Piece, Stop, Timings, TokenProbs};
use super::text::Answer;
use super::{SlotView, TaskView, probs};
use crate::embed::Pooler;
use crate::engine::{Model, Output, Want};
use crate::error::Result;
use crate::grammar::Grammar;
use crate::sampler::Sampler;
use crate::sequence::Sequence;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A sequence and what it is used for.
pub(super) struct Slot {
    pub id: usize,
    pub seq: Sequence,
    pub task: Option<Task>,
    /// The clock when its last request ended; 0 for never.
    pub last_used: u64,
    /// Whether it ever held anything.
    pub used: bool,
    /// Its last request, for those who look.
    pub last: Option<TaskView>,
}

impl Slot {
    pub fn new(id: usize, seq: Sequence) -> Result<Slot> {
        Ok(Slot {
            id,
            seq,
            task: None,
            last_used: 0,
            used: false,
            last: None,
        })
    }

    pub fn view(&self) -> SlotView {
        SlotView {
            id: self.id,
            is_processing: self.task.is_some(),
            n_past: self.seq.n_past(),
            task: match &self.task {
                Some(task) => Some(task.view()),
                None => self.last.clone(),
            },
            memory: self.seq.spec().text.clone(),
            stats: self.seq.stats(),
        }
    }

    /// Number of tokens its sequence and `prompt` begin with alike.
    pub fn common_prefix(&self, prompt: &[u32]) -> usize {
        let pairs = self.seq.tokens().iter().zip(prompt);
        pairs.take_while(|(a, b)| a == b).count()
    }
}

/// A request at work.
pub(super) struct Task {
    pub job: Job,
    /// Tokens to be fed, from `fed` on; the answer goes on when all are.
    pub pending: Vec<u32>,
    pub fed: usize,
    /// Lengths of the sequence at which its state is to be remembered, last first.
    pub marks: Vec<usize>,
    pub n_cached: usize,
    pub truncated: bool,
    /// Takes hidden states when an embedding is wanted.
    pub pooler: Option<Pooler>,
    sampler: Sampler,
    grammar: Option<Grammar>,
    answer: Answer,
    tokens: Vec<u32>,
    probs: Vec<TokenProbs>,
    /// Tokens and probabilities already given out.
    n_told: usize,
    /// Bytes of text at the end of every token, to drop probabilities of text cut away.
    ends: Vec<usize>,
    n_decoded: usize,
    has_new_line: bool,
    started: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
}

/// What to do with a slot after a token.
pub(super) enum Next {
    /// Feed this token.
    Feed,
    /// The answer is complete.
    Done(Stop),
    /// The answer cannot go on.
    Broken(String),
}

impl Task {
    /// A task whose prompt is in the sequence up to `n_cached`.
    pub fn new(mut job: Job, n_cached: usize, n_embd: usize, sampler: Sampler) -> Task {
        let now = Instant::now();
        let mut task = Task {
            pending: job.prompt[n_cached..].to_vec(),
            fed: 0,
            marks: Vec::new(),
            n_cached,
            truncated: false,
            pooler: job.embed.map(|pooling| Pooler::new(pooling, n_embd)),
            sampler,
            grammar: job.params.grammar.take(),
            answer: Answer::new(job.params.stop.clone()),
            tokens: Vec::new(),
            probs: Vec::new(),
            n_told: 0,
            ends: Vec::new(),
            n_decoded: 0,
            has_new_line: false,
            started: now,
            first_token: None,
            last_token: now,
            job,
        };
        for &id in &task.job.prompt {
            task.sampler.accept(id);
        }
        task
    }

    /// Tokens still to be fed.
    pub fn n_left(&self) -> usize {
        self.pending.len() - self.fed
    }

    /// Whether it writes: nothing but its last token is to be fed.
    pub fn is_writing(&self) -> bool {
        self.n_decoded > 0 && self.n_left() == 1
    }

    /// What a feed of its next `share` tokens is to return.
    pub fn want(&self, share: usize) -> Want {
        let last = share == self.n_left();
        match &self.pooler {
            Some(pooler) if last || pooler.pooling().needs_all() => Want::Hidden,
            None if last => self.n_best().map_or(Want::Last, Want::Best),
            _ => Want::None,
        }
    }

    /// How many of the likeliest tokens are enough to choose from; `None` where all logits are
    /// looked at: by the grammar, for probabilities, by requests that go on from the same prompt in
    /// their own way, or by the sampler.
    fn n_best(&self) -> Option<usize> {
        let whole =
            self.grammar.is_some() || self.job.params.n_probs > 0 || !self.job.children.is_empty();
        self.sampler.n_best().filter(|_| !whole)
    }

    /// Whether the prompt is still being read.
    pub fn is_reading(&self) -> bool {
        self.n_decoded == 0
    }

    pub fn head(&self, id_slot: usize) -> Head {
        Head {
            id_slot,
            n_prompt: self.job.prompt.len(),
            n_cached: self.n_cached,
            n_processed: match self.is_reading() {
                true => self.n_cached + self.fed,
                false => self.job.prompt.len(),
            },
            elapsed: self.started.elapsed(),
        }
    }

    pub fn tell(&mut self, event: Event) {
        (self.job.events)(event);
    }

    pub fn fail(self, failure: Failure) {
        self.job.refuse(failure);
    }

    /// Chooses the next token from `output` (changed in place) and takes it into the answer.
    /// `forced` comes whatever the logits say. What may be shown is told.
    pub fn choose(&mut self, model: &Model, output: &mut Output, forced: Option<u32>) -> Next {
        let now = Instant::now();
        let n_probs = self.job.params.n_probs;
        let post = self.job.params.post_sampling_probs;
        let raw = match output {
            Output::Rows(logits) if n_probs > 0 && !post => Some(logits.clone()),
            _ => None,
        };
        let id = match (forced, output) {
            (Some(id), _) => id,
            (None, Output::Best(best)) => self.sampler.sample_best(best),
            (None, Output::Rows(logits)) => {
                if let Some(grammar) = &mut self.grammar {
                    if grammar.is_stopped() {
                        // Nothing may follow any more: the answer is complete.
                        self.note_token(now);
                        return Next::Done(Stop::Eos);
                    }
                    if let Err(e) = grammar.mask(logits) {
                        return Next::Broken(e.to_string());
                    }
                }
                self.sampler.sample(logits)
            }
        };
        if n_probs > 0 {
            self.probs.push(match raw {
                Some(raw) => probs::from_logits(&raw, id, n_probs),
                None => self.after_filters(id, n_probs),
            });
        }
        self.sampler.accept(id);
        if let Some(grammar) = &mut self.grammar
            && forced.is_none()
            && let Err(e) = grammar.accept(id)
        {
            return Next::Broken(e.to_string());
        }
        self.note_token(now);
        self.tokens.push(id);
        self.take_in(model, id)
    }

    fn note_token(&mut self, now: Instant) {
        self.first_token.get_or_insert(now);
        self.last_token = now;
        self.n_decoded += 1;
    }

    fn after_filters(&self, id: u32, n: usize) -> TokenProbs {
        let mut all: Vec<(u32, f32)> = (self.sampler.candidates().iter())
            .map(|c| (c.id, c.p))
            .filter(|(_, p)| *p > 0.0)
            .collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let value = all.iter().find(|(t, _)| *t == id).map_or(0.0, |t| t.1);
        all.truncate(n);
        TokenProbs {
            id,
            value,
            top: all,
        }
    }

    fn take_in(&mut self, model: &Model, id: u32) -> Next {
        let tokenizer = &model.tokenizer;
        if tokenizer.is_eog(id) {
            return Next::Done(Stop::Eos);
        }
        let shown = !tokenizer.is_control(id) || self.job.params.preserved.contains(&id);
        let piece = if shown { tokenizer.piece(id) } else { &[] };
        self.has_new_line |= piece.contains(&b'\n');
        let word = self.answer.push(piece);
        self.ends.push(self.answer.text().len());
        if let Some(word) = word {
            return Next::Done(Stop::Word(word));
        }
        let params = &self.job.params;
        if params.n_predict >= 0 && self.n_decoded as i64 >= params.n_predict {
            return Next::Done(Stop::Limit);
        }
        if self.has_new_line {
            let spent = self.first_token.map_or(Duration::ZERO, |t| t.elapsed());
            if params.t_max_predict.is_some_and(|max| spent > max) {
                return Next::Done(Stop::Limit);
            }
            let (indent, has_body) = self.answer.last_indent();
            if params.n_indent > 0 && has_body && indent < params.n_indent {
                return Next::Done(Stop::Limit);
            }
        }
        self.show(false);
        self.pending.clear();
        self.pending.push(id);
        self.fed = 0;
        Next::Feed
    }

    /// Tells what may be shown now.
    fn show(&mut self, finished: bool) {
        let Some(text) = self.answer.take(finished) else {
            return;
        };
        let piece = Piece {
            text,
            tokens: self.tokens[self.n_told..].to_vec(),
            probs: self.probs.get(self.n_told..).unwrap_or(&[]).to_vec(),
            n_prompt: self.job.prompt.len(),
            n_decoded: self.n_decoded,
            timings: self.timings(),
        };
        self.n_told = self.tokens.len();
        (self.job.events)(Event::Piece(piece));
    }

    fn timings(&self) -> Timings {
        let first = self.first_token.unwrap_or(self.last_token);
        Timings {
            n_cached: self.n_cached,
            n_prompt: self.job.prompt.len() - self.n_cached,
            prompt: first - self.started,
            n_predicted: self.n_decoded,
            predicted: self.last_token - first,
        }
    }

    /// Ends the task with what it has.
    pub fn finish(mut self, id_slot: usize, seq: &Sequence, stop: Stop) -> (Timings, TaskView) {
        self.answer.flush();
        let is_word = matches!(stop, Stop::Word(_));
        if is_word {
            let len = self.answer.text().len();
            let keep =
                self.ends.iter().take_while(|end| **end < len).count() + usize::from(len > 0);
            self.probs.truncate(keep);
            let keep = self.n_told.max(keep.min(self.tokens.len()));
            self.tokens.truncate(keep);
        }
        self.show(true);
        let timings = self.timings();
        let finished = Finished {
            id_slot,
            id_task: self.job.id,
            text: self.answer.text().to_owned(),
            tokens: std::mem::take(&mut self.tokens),
            probs: std::mem::take(&mut self.probs),
            stop,
            truncated: self.truncated,
            has_new_line: self.has_new_line,
            n_prompt: self.job.prompt.len(),
            n_past: seq.n_past(),
            timings,
            memory: seq.stats(),
        };
        let view = TaskView {
            n_decoded: 0,
            n_remain: -1,
            ..self.view()
        };
        self.tell(Event::Finished(Box::new(finished)));
        (timings, view)
    }

    /// Ends a task that wanted an embedding.
    pub fn finish_embedding(mut self) -> (Timings, TaskView) {
        self.last_token = Instant::now();
        let timings = self.timings();
        let view = TaskView {
            n_remain: -1,
            ..self.view()
        };
        let vectors = self.pooler.take().map_or(Vec::new(), Pooler::finish);
        let n_prompt = self.job.prompt.len();
        self.tell(Event::Embedded(Embedded { vectors, n_prompt }));
        (timings, view)
    }

    pub fn view(&self) -> TaskView {
        let n_predict = self.job.params.n_predict;
        TaskView {
            id: self.job.id,
            echo: Arc::clone(&self.job.echo),
            n_prompt: self.job.prompt.len(),
            n_processed: self.head(0).n_processed - self.n_cached,
            n_cached: self.n_cached,
            n_decoded: self.n_decoded,
            n_remain: match n_predict {
                -1 => -1,
                n => n - self.n_decoded as i64,
            },
            has_new_line: self.has_new_line,
        }
    }
}
