//! From waiting requests to slots, and one pass over all that run.

use super::cache::MIN_KEPT;
use super::job::{Event, Failure, Job, Stop};
use super::slot::{Next, Task};
use super::{Scheduler, Waiting};
use crate::engine::{Feed, Output};
use crate::error::{Error, FeedError, Result};
use crate::memory::rewinds;
use crate::sampler::Sampler;
use crate::sequence::Sequence;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a pass may take while somebody else waits for the next one.
const SHARED_PASS: Duration = Duration::from_millis(120);
/// How long a pass may take when nobody does; a new request waits at most this long.
const LONE_PASS: Duration = Duration::from_millis(800);
/// Fewest prompt tokens of a pass.
const MIN_SHARE: usize = 16;
/// Prompt tokens of the first pass, from which the speed is learnt.
const FIRST_SHARE: usize = 64;
/// Tokens between two remembered states of a prompt that cannot be taken back token by token.
const MARK_EVERY: usize = 2048;

/// What llama.cpp's tests of its server look for in the log when an idle slot's text is kept; there
/// is another such word where the scheduler is made.
const TAG_IDLE: &str = "__TEST_TAG_CACHE_IDLE_SLOT__";

/// What each slot that was fed got: logits or the likeliest tokens, or hidden states for an
/// embedding.
type Outputs = Vec<(usize, Result<Output>)>;

impl Scheduler {
    /// Gives idle slots to waiting requests, oldest first. A request that wants a certain slot
    /// waits for it without holding up the others.
    pub(super) fn assign(&mut self) {
        let mut at = 0;
        while at < self.queue.len() {
            let Some(id) = self.slot_for(&self.queue[at]) else {
                at += 1;
                continue;
            };
            if let Some(waiting) = self.queue.remove(at) {
                self.waiting
                    .fetch_sub(waiting.job.weight(), Ordering::AcqRel);
                self.start(id, waiting);
            }
        }
    }

    /// The idle slot that suits a request: the one it wants, else the one that holds the largest
    /// share of its prompt, else the one that has been idle longest.
    fn slot_for(&self, waiting: &Waiting) -> Option<usize> {
        let job = &waiting.job;
        let idle = || self.slots.iter().filter(|s| s.task.is_none());
        if let Some(id) = job.id_slot {
            let id = id % self.slots.len();
            return idle().find(|s| s.id == id).map(|s| s.id);
        }
        let spec = job.memory.as_ref().unwrap_or(&self.options.memory);
        let similar = idle()
            .filter(|s| job.params.cache_prompt && s.seq.spec().text == spec.text)
            .map(|s| (s.common_prefix(&job.prompt), s.id))
            .max_by_key(|(n, id)| (*n, std::cmp::Reverse(*id)));
        if let Some((n, id)) = similar
            && n as f32 > self.options.similarity * job.prompt.len() as f32
        {
            return Some(id);
        }
        idle().min_by_key(|s| (s.last_used, s.id)).map(|s| s.id)
    }

    fn start(&mut self, id: usize, waiting: Waiting) {
        let Waiting { job, head } = waiting;
        let (n_prompt, n_ctx) = (job.prompt.len(), self.options.n_ctx);
        if n_prompt == 0 {
            return job.refuse(Failure::Invalid("the prompt is empty".into()));
        }
        let spec = job.memory.as_ref().unwrap_or(&self.options.memory).clone();
        // An answer needs room for a token; an embedding does not.
        if spec.name == "full" && n_prompt + usize::from(job.embed.is_none()) > n_ctx {
            return job.refuse(Failure::Context { n_prompt, n_ctx });
        }
        let sampler = match Sampler::new(&job.params.sampler, &self.engine.model.tokenizer) {
            Ok(sampler) => sampler,
            Err(e) => return job.refuse(Failure::Invalid(e.to_string())),
        };
        let (held, output, marks) = match head {
            Some((seq, output)) => {
                let before = std::mem::replace(&mut self.slots[id].seq, seq);
                self.cache.keep(before);
                (n_prompt, Some(output), Vec::new())
            }
            None => match self.prepare(id, &job, &spec) {
                Ok((held, marks)) => (held, None, marks),
                Err(e) => return job.refuse(Failure::Invalid(e.to_string())),
            },
        };
        let slot = &mut self.slots[id];
        slot.used = true;
        let n_embd = self.engine.model.hparams().n_embd;
        let mut task = Task::new(job, held, n_embd, sampler);
        task.marks = marks;
        self.totals.prompt_cached += held as u64;
        self.keep_idle(id);
        let slot = &mut self.slots[id];
        if task.job.params.progress {
            let head = task.head(id);
            task.tell(Event::Progress(head));
        }
        slot.task = Some(task);
        if let Some(output) = output {
            self.answer(id, output);
        }
    }

    /// Makes the slot's sequence hold as much of the prompt as is known anywhere, at most all but
    /// its last token. Returns how much, and where to remember states, last first.
    fn prepare(
        &mut self,
        id: usize,
        job: &Job,
        spec: &crate::memory::spec::MemorySpec,
    ) -> Result<(usize, Vec<usize>)> {
        let most = job.prompt.len() - 1;
        let same_kind = self.slots[id].seq.spec().text == spec.text;
        // Hidden states of tokens that are known already cannot be had again.
        let again = job.embed.is_some_and(|pooling| pooling.needs_all());
        if !job.params.cache_prompt || !same_kind || again {
            if !same_kind || self.slots[id].seq.n_past() > 0 {
                let fresh = self.engine.sequence(spec, self.options.sequence)?;
                let before = std::mem::replace(&mut self.slots[id].seq, fresh);
                self.cache.keep(before);
            }
            return Ok((0, marks(spec.name.as_str(), 0, 0, most)));
        }
        let common = self.slots[id].common_prefix(&job.prompt).min(most);
        // The slot goes on to something else: what it held is worth keeping.
        if common * 2 < self.slots[id].seq.n_past() {
            self.cache.keep(self.slots[id].seq.twin());
        }
        // Another slot may know more of it; its cells are shared, not copied.
        let other = (self.slots.iter())
            .filter(|s| job.id_slot.is_none() && s.id != id && s.seq.spec().text == spec.text)
            .map(|s| (s.common_prefix(&job.prompt).min(most), s.id))
            .max();
        let mut held = match other {
            Some((n, from)) if n > common + MIN_SHARE && rewinds(&spec.name) => {
                let mut fork: Sequence = self.slots[from].seq.fork();
                let held = fork.truncate(self.engine.ops(), n);
                self.slots[id].seq = fork;
                held
            }
            _ => self.slots[id].seq.truncate(self.engine.ops(), common),
        };
        tracing::debug!("updating prompt cache: {:?}", self.cache.stats());
        let found = self.cache.find(
            &self.engine.model,
            self.engine.ops(),
            &spec.text,
            &job.prompt,
            held + MIN_KEPT,
            most,
        );
        if let Some(seq) = found {
            held = seq.n_past();
            self.slots[id].seq = seq;
        }
        Ok((held, marks(spec.name.as_str(), held, common, most)))
    }

    /// With a shared pool, keeps the texts of idle slots other than `starting`: the pool may need
    /// their cells at any time.
    fn keep_idle(&mut self, starting: usize) {
        let on = self.options.cache_idle && self.options.pool.is_some() && self.cache.is_cheap();
        if !on || !self.cache.is_on() {
            return;
        }
        for slot in self.slots.iter().filter(|s| s.task.is_none()) {
            let is_new = slot.id != starting && !self.cache.knows(&slot.seq);
            if is_new && self.cache.keep(slot.seq.twin()) {
                tracing::debug!("{TAG_IDLE} slot {}: {} tokens", slot.id, slot.seq.n_past());
            }
        }
    }

    /// One pass: a token for everybody who writes, a share for everybody who reads.
    pub(super) fn pass(&mut self) {
        let shares = self.shares();
        let n_busy = shares.iter().filter(|n| **n > 0).count();
        if n_busy == 0 {
            return;
        }
        if !self.fits_pool(&shares) {
            return;
        }
        let begin = Instant::now();
        let (rows, results) = self.step(&shares);
        let n_rows: usize = shares.iter().sum();
        let seconds = begin.elapsed().as_secs_f64();
        if rows >= MIN_SHARE && seconds > 0.0 {
            let now = n_rows as f64 / seconds;
            self.speed = match self.speed {
                0.0 => now,
                before => 0.7 * before + 0.3 * now,
            };
        }
        self.totals.n_passes += 1;
        self.totals.n_busy_slots += n_busy as u64;
        for (id, result) in results {
            self.after(id, shares[id], result);
        }
    }

    /// How many tokens of each slot the next pass takes.
    fn shares(&self) -> Vec<usize> {
        let mut shares = vec![0; self.slots.len()];
        let mut reading: Vec<(usize, usize)> = Vec::new();
        let mut n_writing = 0;
        for (id, slot) in self.slots.iter().enumerate() {
            match &slot.task {
                Some(task) if task.is_writing() => {
                    shares[id] = 1;
                    n_writing += 1;
                }
                Some(task) => reading.push((task.n_left(), id)),
                None => {}
            }
        }
        let alone = n_writing == 0 && reading.len() <= 1 && self.queue.is_empty();
        let limit = if alone { LONE_PASS } else { SHARED_PASS };
        let most = (self.options.n_batch)
            .min(self.engine.n_ubatch())
            .saturating_sub(n_writing)
            .max(1);
        let mut room = match self.speed {
            0.0 => most.min(FIRST_SHARE),
            speed => {
                let n = (speed * limit.as_secs_f64()) as usize;
                (n / MIN_SHARE * MIN_SHARE).max(MIN_SHARE).min(most)
            }
        };
        // The shortest first: what it leaves of its fair part goes to the longer ones.
        reading.sort_unstable();
        let n = reading.len();
        for (nth, (left, id)) in reading.into_iter().enumerate() {
            let slot = &self.slots[id];
            let fair = (room / (n - nth)).max(1);
            let to_mark = slot.task.as_ref().and_then(|t| {
                let mark = t.marks.last()?;
                mark.checked_sub(slot.seq.n_past()).filter(|n| *n > 0)
            });
            shares[id] = left.min(fair).min(to_mark.unwrap_or(left));
            room = room.saturating_sub(shares[id]);
        }
        shares
    }

    /// Whether the shared cells suffice for the next pass. Idle slots give theirs up first; when
    /// that is not enough, all that run fail, as no one of them is more to blame than another.
    fn fits_pool(&mut self, shares: &[usize]) -> bool {
        let Some(pool) = self.options.pool else {
            return true;
        };
        let wanted: usize = shares.iter().sum();
        let cells = |s: &super::Slot| s.seq.stats().n_cells;
        let busy: usize = (self.slots.iter())
            .filter(|s| s.task.is_some())
            .map(cells)
            .sum();
        if busy + wanted > pool {
            for slot in &mut self.slots {
                if let Some(task) = slot.task.take() {
                    task.fail(Failure::PoolExhausted);
                }
            }
            return false;
        }
        let mut idle: Vec<(u64, usize, usize)> = (self.slots.iter())
            .filter(|s| s.task.is_none() && s.seq.n_past() > 0)
            .map(|s| (s.last_used, s.id, cells(s)))
            .collect();
        idle.sort_unstable();
        let mut held: usize = busy + idle.iter().map(|i| i.2).sum::<usize>();
        for (_, id, n) in idle {
            if held + wanted <= pool {
                break;
            }
            self.cache.keep(self.slots[id].seq.twin());
            self.reset(id);
            held -= n;
        }
        true
    }

    /// Feeds the shares. Returns the prompt rows among them and what came of it.
    fn step(&mut self, shares: &[usize]) -> (usize, Outputs) {
        let mut rows = 0;
        let mut results = Outputs::new();
        // One kind of output and one pass' worth at a time: then an error changes nothing.
        for hidden in [false, true] {
            let ids: Vec<usize> = (self.slots.iter())
                .filter(|s| shares[s.id] > 0)
                .filter(|s| (s.task.as_ref()).is_some_and(|t| t.pooler.is_some() == hidden))
                .map(|s| s.id)
                .collect();
            let mut group = Vec::new();
            let mut n = 0;
            for id in ids {
                if n + shares[id] > self.engine.n_ubatch() && n > 0 {
                    self.feed(&mut group, shares, &mut results);
                    n = 0;
                }
                group.push(id);
                n += shares[id];
                if (self.slots[id].task.as_ref()).is_some_and(|t| !t.is_writing()) {
                    rows += shares[id];
                }
            }
            self.feed(&mut group, shares, &mut results);
        }
        (rows, results)
    }

    /// Feeds a group of slots together. Whoever is at fault for an error leaves the group, and the
    /// others try again.
    fn feed(&mut self, group: &mut Vec<usize>, shares: &[usize], results: &mut Outputs) {
        while !group.is_empty() {
            let mut feeds = Vec::with_capacity(group.len());
            for slot in self.slots.iter_mut().filter(|s| group.contains(&s.id)) {
                let Some(task) = &slot.task else {
                    continue;
                };
                let share = shares[slot.id];
                feeds.push(Feed {
                    seq: &mut slot.seq,
                    tokens: &task.pending[task.fed..task.fed + share],
                    want: task.want(share),
                });
            }
            match self.engine.step_or_blame(&mut feeds) {
                Ok(outputs) => {
                    results.extend(group.drain(..).zip(outputs.into_iter().map(Ok)));
                }
                Err(FeedError { feed, source }) => {
                    let id = group.remove(feed.unwrap_or(0).min(group.len() - 1));
                    results.push((id, Err(source)));
                }
            }
        }
    }

    /// What a pass means for one slot.
    fn after(&mut self, id: usize, share: usize, result: Result<Output>) {
        let slot = &mut self.slots[id];
        let Some(task) = &mut slot.task else {
            return;
        };
        match result {
            Ok(output) => {
                task.fed += share;
                if task.marks.last() == Some(&slot.seq.n_past()) {
                    task.marks.pop();
                    slot.seq.mark();
                }
                if task.is_reading() {
                    self.totals.prompt_tokens += share as u64;
                    if task.job.params.progress {
                        let head = task.head(id);
                        task.tell(Event::Progress(head));
                    }
                }
                self.totals.n_tokens_max = self.totals.n_tokens_max.max(slot.seq.n_past());
                if let Some(pooler) = &mut task.pooler {
                    pooler.push(&output.rows());
                    if task.n_left() == 0 {
                        self.finish_embedding(id);
                    }
                } else if task.n_left() == 0 {
                    self.answer(id, output);
                }
            }
            Err(Error::ContextFull { .. }) if !task.is_reading() => {
                task.truncated = true;
                self.finish(id, Stop::Limit);
            }
            Err(Error::ContextFull { n_ctx, .. }) => {
                let n_prompt = task.job.prompt.len();
                self.fail(id, Failure::Context { n_prompt, n_ctx });
            }
            // What a memory cannot do with these tokens is up to whoever sent them.
            Err(e @ Error::Memory { .. }) => self.fail(id, Failure::Invalid(e.to_string())),
            Err(e) => self.fail(id, Failure::Engine(e.to_string())),
        }
    }

    /// Takes the next token of slot `id` from what came of the tokens before.
    fn answer(&mut self, id: usize, mut output: Output) {
        let slot = &mut self.slots[id];
        let Some(task) = &mut slot.task else {
            return;
        };
        if task.is_reading() {
            let children = std::mem::take(&mut task.job.children);
            for child in children.into_iter().rev() {
                self.waiting.fetch_add(child.weight(), Ordering::AcqRel);
                self.queue.push_front(Waiting {
                    job: child,
                    head: Some((slot.seq.fork(), output.clone())),
                });
            }
        }
        let forced = slot.seq.forced_next();
        match task.choose(&self.engine.model, &mut output, forced) {
            Next::Done(stop) => self.finish(id, stop),
            Next::Feed => self.make_room(id),
            Next::Broken(what) => self.fail(id, Failure::Engine(what)),
        }
    }

    /// Ends the answer of a slot whose context is used up, or makes it forget its oldest text.
    fn make_room(&mut self, id: usize) {
        let slot = &mut self.slots[id];
        let n_past = slot.seq.n_past();
        if slot.seq.spec().name != "full" || n_past + 1 < self.options.n_ctx {
            return;
        }
        let Some(task) = &mut slot.task else {
            return;
        };
        task.truncated = true;
        if !self.options.context_shift {
            return self.finish(id, Stop::Limit);
        }
        let params = &task.job.params;
        let n_keep = match params.n_keep {
            n if n < 0 => task.job.prompt.len(),
            n => n as usize,
        };
        let n_keep = n_keep.min(n_past.saturating_sub(4));
        let n_left = n_past - n_keep;
        let n_discard = match params.n_discard {
            0 => n_left / 2,
            n => n.min(n_left),
        };
        let mut pending = slot.seq.tokens()[n_keep + n_discard..].to_vec();
        pending.append(&mut task.pending);
        let held = slot.seq.truncate(self.engine.ops(), n_keep);
        let mut again = task.job.prompt.get(held..n_keep).unwrap_or(&[]).to_vec();
        again.append(&mut pending);
        task.pending = again;
        task.fed = 0;
    }

    fn finish(&mut self, id: usize, stop: Stop) {
        let slot = &mut self.slots[id];
        let Some(task) = slot.task.take() else {
            return;
        };
        let (timings, view) = task.finish(id, &slot.seq, stop);
        self.clock += 1;
        slot.last_used = self.clock;
        slot.last = Some(view);
        self.totals.prompt_seconds += timings.prompt.as_secs_f64();
        self.totals.predicted_tokens += timings.n_predicted as u64;
        self.totals.predicted_seconds += timings.predicted.as_secs_f64();
    }

    fn finish_embedding(&mut self, id: usize) {
        let slot = &mut self.slots[id];
        let Some(task) = slot.task.take() else {
            return;
        };
        let (timings, view) = task.finish_embedding();
        self.clock += 1;
        slot.last_used = self.clock;
        slot.last = Some(view);
        self.totals.prompt_seconds += timings.prompt.as_secs_f64();
    }

    fn fail(&mut self, id: usize, failure: Failure) {
        if let Some(task) = self.slots[id].task.take() {
            self.clock += 1;
            self.slots[id].last_used = self.clock;
            task.fail(failure);
        }
    }
}

/// Lengths at which a prompt's state is worth remembering, last first: where it left the slot's
/// old text (others are likely to leave it there too), at regular distances, and before its last
/// token. None for a memory that can go back anywhere.
fn marks(memory: &str, held: usize, common: usize, most: usize) -> Vec<usize> {
    if rewinds(memory) {
        return Vec::new();
    }
    let regular = (1..).map(|i| i * MARK_EVERY).take_while(|n| *n < most);
    let mut marks: Vec<usize> = regular
        .chain([common, most])
        .filter(|n| *n > held)
        .collect();
    marks.sort_unstable();
    marks.dedup();
    marks.reverse();
    marks
}
