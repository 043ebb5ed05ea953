//! Continuous batching: many requests over a few slots, one thread that owns the engine.
//!
//! A slot holds one [`Sequence`]. Every pass feeds one token of each answer that is being written
//! and a bounded share of the prompts that are being read, so a long prompt never stalls an answer
//! and a short prompt never waits for a long one. What comes out of a slot does not depend on what
//! else runs: the kernels give every row the same bits whatever shares its pass.
//!
//! Requests come in through a [`Handle`] and answer through a closure of their own. The scheduler
//! knows no HTTP and no JSON of it.

mod cache;
mod job;
mod pass;
mod probs;
mod slot;
mod text;

pub use cache::CacheStats;
pub use job::{
    Embedded, Event, Failure, Finished, Head, Job, Params, Piece, Stop, Timings, TokenProbs,
};
pub use text::Answer;

use crate::engine::{Engine, Output};
use crate::error::Result;
use crate::memory::spec::MemorySpec;
use crate::memory::{NodeInfo, Stats};
use crate::sequence::{Sequence, SequenceOptions};
use cache::PromptCache;
use slot::Slot;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

/// Size and habits of a scheduler.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of slots.
    pub n_slots: usize,
    /// Most tokens (cells, for memories that forget) of one slot.
    pub n_ctx: usize,
    /// Cells all slots share; `None` when each has its own [`Options::n_ctx`].
    pub pool: Option<usize>,
    /// Most prompt tokens read in one pass.
    pub n_batch: usize,
    /// Types of keys and values.
    pub sequence: SequenceOptions,
    /// Memory of a request that asks for none.
    pub memory: MemorySpec,
    /// A slot is chosen for its past when at least this share of the prompt is already in it.
    pub similarity: f32,
    /// Requests that may wait for a slot before more are refused.
    pub max_waiting: usize,
    /// Whether a full slot forgets its oldest text instead of ending the answer.
    pub context_shift: bool,
    /// Most bytes of texts kept after they left their slots; 0 for none, `None` for no limit.
    pub cache_bytes: Option<usize>,
    /// Whether, with a shared pool, the text of an idle slot is kept as soon as another one starts.
    pub cache_idle: bool,
    /// Totals to count on from.
    pub totals: Totals,
}

/// What a slot looks like from outside.
#[derive(Clone, Debug)]
pub struct SlotView {
    /// Number of the slot.
    pub id: usize,
    /// Whether it works on a request.
    pub is_processing: bool,
    /// Tokens in its sequence.
    pub n_past: usize,
    /// The request it works on or worked on last.
    pub task: Option<TaskView>,
    /// Description of its memory.
    pub memory: String,
    /// Numbers about its memory.
    pub stats: Stats,
}

/// A request as a slot shows it.
#[derive(Clone, Debug)]
pub struct TaskView {
    /// Number of the request.
    pub id: u64,
    /// What the caller attached to it.
    pub echo: Arc<serde_json::Value>,
    /// Prompt tokens.
    pub n_prompt: usize,
    /// Prompt tokens read so far, not counting those already known.
    pub n_processed: usize,
    /// Prompt tokens that were already known.
    pub n_cached: usize,
    /// Tokens of the answer so far.
    pub n_decoded: usize,
    /// Tokens the answer may still get; -1 for no limit or when it has ended.
    pub n_remain: i64,
    /// Whether the answer holds a line break.
    pub has_new_line: bool,
}

/// A slot's memory in detail.
#[derive(Clone, Debug)]
pub struct MemoryView {
    /// Description of the memory.
    pub spec: String,
    /// Numbers about it.
    pub stats: Stats,
    /// Its nodes, in order of the text.
    pub nodes: Vec<NodeInfo>,
    /// The tokens of the sequence.
    pub tokens: Vec<u32>,
}

/// Running totals.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Prompt tokens read.
    pub prompt_tokens: u64,
    /// Prompt tokens that were already known.
    pub prompt_cached: u64,
    /// Time spent on prompts, in seconds.
    pub prompt_seconds: f64,
    /// Tokens written.
    pub predicted_tokens: u64,
    /// Time spent writing, in seconds.
    pub predicted_seconds: f64,
    /// Passes.
    pub n_passes: u64,
    /// Sum over passes of the slots that took part.
    pub n_busy_slots: u64,
    /// Longest sequence seen.
    pub n_tokens_max: usize,
    /// Requests that hold a slot now.
    pub processing: usize,
    /// Requests that wait for one now.
    pub deferred: usize,
    /// Requests that ended because nobody waited for them any more.
    pub cancelled: u64,
    /// Texts kept after they left their slots.
    pub cache: CacheStats,
}

/// Why a slot's file could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SlotError(pub String);

/// What saving or restoring did.
#[derive(Clone, Copy, Debug)]
pub struct SlotFile {
    /// The slot.
    pub id_slot: usize,
    /// Tokens in the file.
    pub n_tokens: usize,
    /// Bytes of the file.
    pub n_bytes: u64,
}

/// Called once with an answer.
pub type Reply<T> = Box<dyn FnOnce(T) + Send>;

/// What can be asked of a scheduler besides generating.
pub enum Command {
    /// Work on a request.
    Generate(Box<Job>),
    /// Describe all slots.
    Slots(Reply<Vec<SlotView>>),
    /// Describe one slot's memory; `None` for a number that is no slot's.
    Memory(usize, Reply<Option<MemoryView>>),
    /// Change a dial of a slot's memory, at once; `None` for a number that is no slot's.
    Set(
        usize,
        String,
        f64,
        Reply<Option<std::result::Result<Stats, SlotError>>>,
    ),
    /// Running totals.
    Totals(Reply<Totals>),
    /// Write a slot's sequence to a file, once the slot is idle.
    Save(
        usize,
        PathBuf,
        Reply<std::result::Result<SlotFile, SlotError>>,
    ),
    /// Replace a slot's sequence by one from a file, once the slot is idle.
    Restore(
        usize,
        PathBuf,
        Reply<std::result::Result<SlotFile, SlotError>>,
    ),
    /// Empty a slot, once it is idle; answers how many tokens went.
    Erase(usize, Reply<usize>),
    /// End everything.
    Stop,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// As many requests wait as may wait.
    #[error("too many requests are waiting ({0})")]
    Full(usize),
    /// The scheduler has ended.
    #[error("the server is shutting down")]
    Stopped,
}

/// The way in: cheap to clone, used from any thread.
#[derive(Clone)]
pub struct Handle {
    tx: Sender<Command>,
    waiting: Arc<AtomicUsize>,
    max_waiting: usize,
}

impl Handle {
    /// Hands in a request, unless too many wait already.
    pub fn submit(&self, job: Job) -> std::result::Result<(), Refused> {
        let n = job.weight();
        let before = self.waiting.fetch_add(n, Ordering::AcqRel);
        if before + n > self.max_waiting {
            self.waiting.fetch_sub(n, Ordering::AcqRel);
            return Err(Refused::Full(before));
        }
        self.send(Command::Generate(Box::new(job)))
    }

    /// Hands in a command.
    pub fn send(&self, command: Command) -> std::result::Result<(), Refused> {
        self.tx.send(command).map_err(|_| Refused::Stopped)
    }
}

/// A request that waits, perhaps with its prompt already read.
struct Waiting {
    job: Job,
    head: Option<(Sequence, Output)>,
}

/// The engine, its slots and the requests that wait for one.
pub struct Scheduler {
    engine: Engine,
    options: Options,
    slots: Vec<Slot>,
    queue: VecDeque<Waiting>,
    cache: PromptCache,
    /// Commands for slots that are busy.
    parked: Vec<Command>,
    rx: Receiver<Command>,
    waiting: Arc<AtomicUsize>,
    totals: Totals,
    /// Tokens per second a pass reads, by recent experience; 0 before the first.
    speed: f64,
    next_id: u64,
    clock: u64,
    stopping: bool,
}

impl Scheduler {
    /// A scheduler over `engine`, and the way in. Refused when the memory cannot be built.
    pub fn new(engine: Engine, options: Options) -> Result<(Scheduler, Handle)> {
        let (tx, rx) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let handle = Handle {
            tx,
            waiting: Arc::clone(&waiting),
            max_waiting: options.max_waiting,
        };
        let slots = (0..options.n_slots)
            .map(|id| Slot::new(id, engine.sequence(&options.memory, options.sequence)?))
            .collect::<Result<Vec<_>>>()?;
        let cache = PromptCache::new(
            options.cache_bytes,
            engine.ops().device().is_host(),
            options.sequence.n_ctx,
            options.totals.cache,
        );
        if options.cache_idle && options.pool.is_some() && cache.is_on() {
            tracing::debug!("__TEST_TAG_CACHE_IDLE_SLOTS_ENABLED__");
        }
        let scheduler = Scheduler {
            engine,
            cache,
            slots,
            queue: VecDeque::new(),
            parked: Vec::new(),
            rx,
            waiting,
            totals: options.totals.clone(),
            options,
            speed: 0.0,
            next_id: 0,
            clock: 0,
            stopping: false,
        };
        Ok((scheduler, handle))
    }

    /// Works until told to stop or until every handle is gone.
    pub fn run(mut self) {
        loop {
            let idle = self.queue.is_empty() && self.slots.iter().all(|s| s.task.is_none());
            if idle {
                match self.rx.recv() {
                    Ok(command) => self.take(command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = self.rx.try_recv() {
                self.take(command);
            }
            if self.stopping {
                self.fail_all(&Failure::Stopped);
                return;
            }
            self.drop_cancelled();
            self.unpark();
            self.assign();
            self.pass();
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Generate(mut job) => {
                self.next_id += 1;
                job.id = self.next_id;
                for child in &mut job.children {
                    self.next_id += 1;
                    child.id = self.next_id;
                }
                self.queue.push_back(Waiting {
                    job: *job,
                    head: None,
                });
            }
            Command::Slots(reply) => reply(self.slots.iter().map(Slot::view).collect()),
            Command::Memory(id, reply) => {
                reply(self.slots.get(id).map(|slot| MemoryView {
                    spec: slot.seq.spec().text.clone(),
                    stats: slot.seq.stats(),
                    nodes: slot.seq.nodes(),
                    tokens: slot.seq.tokens().to_vec(),
                }));
            }
            Command::Set(id, dial, value, reply) => {
                reply(self.slots.get_mut(id).map(|slot| {
                    let set = slot.seq.set(&dial, value);
                    set.map_err(|e| SlotError(e.to_string()))?;
                    Ok(slot.seq.stats())
                }));
            }
            Command::Totals(reply) => {
                self.totals.processing = self.slots.iter().filter(|s| s.task.is_some()).count();
                self.totals.deferred = self.queue.len();
                self.totals.cache = self.cache.stats();
                reply(self.totals.clone());
            }
            Command::Save(..) | Command::Restore(..) | Command::Erase(..) => {
                self.parked.push(command);
                self.unpark();
            }
            Command::Stop => self.stopping = true,
        }
    }

    /// Carries out the commands whose slot has become idle.
    fn unpark(&mut self) {
        for command in std::mem::take(&mut self.parked) {
            let id = match &command {
                Command::Save(id, ..) | Command::Restore(id, ..) | Command::Erase(id, _) => {
                    *id % self.slots.len()
                }
                _ => continue,
            };
            if self.slots[id].task.is_some() {
                self.parked.push(command);
                continue;
            }
            match command {
                Command::Save(_, path, reply) => reply(self.save(id, &path)),
                Command::Restore(_, path, reply) => reply(self.restore(id, &path)),
                Command::Erase(_, reply) => {
                    let n = self.slots[id].seq.n_past();
                    if n > 0 {
                        self.cache.forget(&self.slots[id].seq);
                        self.reset(id);
                    }
                    reply(n);
                }
                _ => {}
            }
        }
    }

    fn save(
        &mut self,
        id: usize,
        path: &std::path::Path,
    ) -> std::result::Result<SlotFile, SlotError> {
        let seq = &self.slots[id].seq;
        let n_bytes = seq.save(path, &[]).map_err(|e| SlotError(e.to_string()))?;
        Ok(SlotFile {
            id_slot: id,
            n_tokens: seq.n_past(),
            n_bytes,
        })
    }

    fn restore(
        &mut self,
        id: usize,
        path: &std::path::Path,
    ) -> std::result::Result<SlotFile, SlotError> {
        let model = &self.engine.model;
        let (seq, _) = Sequence::load(model, path, self.options.sequence.n_ctx)
            .map_err(|e| SlotError(e.to_string()))?;
        let n_bytes = std::fs::metadata(path).map_or(0, |m| m.len());
        if seq.spec().name == "full" && seq.n_past() > self.options.n_ctx {
            return Err(SlotError(format!(
                "Restored prompt does not fit in the slot context ({} tokens, {} fit)",
                seq.n_past(),
                self.options.n_ctx
            )));
        }
        let n_tokens = seq.n_past();
        let before = std::mem::replace(&mut self.slots[id].seq, seq);
        self.cache.keep(before);
        self.slots[id].used = n_tokens > 0;
        Ok(SlotFile {
            id_slot: id,
            n_tokens,
            n_bytes,
        })
    }

    /// Empties a slot, keeping its kind of memory.
    fn reset(&mut self, id: usize) {
        let spec = self.slots[id].seq.spec().clone();
        let fresh = self.engine.sequence(&spec, self.options.sequence);
        // The same description was accepted before.
        if let Ok(seq) = fresh {
            self.slots[id].seq = seq;
        }
    }

    fn fail_all(&mut self, failure: &Failure) {
        for slot in &mut self.slots {
            if let Some(task) = slot.task.take() {
                task.fail(failure.clone());
            }
        }
        for waiting in self.queue.drain(..) {
            waiting.job.refuse(failure.clone());
        }
    }

    fn drop_cancelled(&mut self) {
        let (waiting, totals) = (&self.waiting, &mut self.totals);
        self.queue.retain(|w| {
            let gone = w.job.is_cancelled();
            if gone {
                waiting.fetch_sub(w.job.weight(), Ordering::AcqRel);
                totals.cancelled += 1;
            }
            !gone
        });
        for slot in &mut self.slots {
            if slot.task.as_ref().is_some_and(|t| t.job.is_cancelled()) {
                slot.task = None;
                totals.cancelled += 1;
            }
        }
    }
}
