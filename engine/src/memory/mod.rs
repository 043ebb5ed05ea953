//! Memories: what is kept of the past, and how.
//!
//! A memory decides which *entries* enter the main sequence, which earlier entries each one may
//! see, and which cells are freed afterwards. It is planned before a pass and changes in one
//! place after it ([`Memory::commit`]). One memory is one file here and one row of [`MEMORIES`].

pub mod ahn;
pub mod concepts;
pub mod decider;
pub mod full;
pub mod gist;
mod layered;
pub mod nodes;
pub mod spec;
pub mod store;
pub mod trunk;
pub mod window;

use crate::error::{Error, Result};
use crate::ops::{Buffer, Ops, Rows};
use crate::session::{Decoder, Encoder};
use crate::weights::Weights;
use mneme_kernels::attend::{PAGE_CELLS, PageLayout, Visible};
use spec::MemorySpec;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use store::{Cell, Store};
use trunk::TrunkStep;

/// What a memory is built over: fixed for its lifetime.
#[derive(Clone)]
pub struct Context {
    /// The model's hyperparameters and tensors.
    pub weights: Arc<Weights>,
    /// Bytes of each token, for rules on text.
    pub pieces: Arc<dyn Pieces>,
    /// Types and shape of keys and values.
    pub layout: PageLayout,
    /// Most cells held per layer.
    pub n_ctx: usize,
}

impl Context {
    /// An empty store for this model.
    pub fn store(&self) -> Store {
        let layers = self.weights.layers.iter();
        Store::new(self.layout, layers.map(|layer| layer.device.clone()))
    }

    /// Bytes of one cell in all layers.
    pub fn cell_bytes(&self) -> usize {
        self.layout.page_bytes() * self.weights.hparams.n_layer / PAGE_CELLS
    }

    /// Upper bound on the bytes of pages that hold `n_cells` in `n_regions` regions: each region
    /// may leave two pages partly filled.
    pub fn page_bound(&self, n_cells: usize, n_regions: usize) -> usize {
        let pages = n_cells.div_ceil(PAGE_CELLS) + n_regions;
        pages * self.layout.page_bytes() * self.weights.hparams.n_layer
    }

    /// Refuses when `wanted` more cells do not fit.
    pub fn check_room(&self, store: &Store, wanted: usize) -> Result<()> {
        let held = store.n_cells();
        if held + wanted > self.n_ctx {
            return Err(Error::ContextFull {
                n_ctx: self.n_ctx,
                held,
                wanted,
            });
        }
        Ok(())
    }
}

/// Text of tokens, as the sentence rule needs it.
pub trait Pieces: Send + Sync {
    /// Bytes token `id` stands for; empty for control tokens.
    fn piece(&self, id: u32) -> &[u8];
}

/// What a row of a pass is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Source {
    /// A token of the vocabulary.
    Token(u32),
    /// The next of the slots of the nodes that [`Plan::readouts`] make.
    Slot,
    /// A row of [`Plan::vectors`].
    Vector(usize),
}

/// One entry of the main sequence: one row of the pass.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Its embedding.
    pub source: Source,
    /// Index into the offered tokens of the token this row answers for (its logits are that
    /// token's); `None` for slots.
    pub token: Option<usize>,
    /// Rotary position.
    pub pos: u32,
    /// Where its keys and values go.
    pub cell: Cell,
    /// What it sees.
    pub visible: Visible,
}

/// What a pass will do for one sequence.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// How many of the offered tokens this pass consumes; the rest must be offered again.
    pub n_tokens: usize,
    /// Rows in order.
    pub entries: Vec<Entry>,
    /// Last readouts `[n, c]` of the active memory over closed segments: the pass makes the slots of
    /// their nodes, so many for each, which are among the entries in this order.
    pub readouts: Vec<f32>,
    /// Embeddings `[n, n_embd]` that entries bring with them.
    pub vectors: Vec<f32>,
    /// Raw cells that [`Memory::recall`] takes in; those of the pass itself included.
    pub recalls: Range<u64>,
}

impl Plan {
    /// Number of new kept and raw cells.
    pub fn n_cells(&self) -> (usize, usize) {
        let kept = self
            .entries
            .iter()
            .filter(|e| matches!(e.cell, Cell::Kept(_)))
            .count();
        (kept, self.entries.len() - kept)
    }
}

/// One layer's part of a pass that a recurrent memory adds to attention.
pub struct Recall<'a> {
    /// Layer index.
    pub layer: usize,
    /// The rows of the pass.
    pub rows: &'a Rows,
    /// Which part of them is this sequence's.
    pub part: usize,
    /// Inputs of the layer after its first norm, `[n, n_embd]`.
    pub h: &'a Buffer,
    /// Rotated queries `[n, n_head, head_dim]`.
    pub q: &'a Buffer,
    /// Attention output, added to, `[n, n_head, head_dim]`.
    pub out: &'a mut Buffer,
    /// Buffers for whatever lies between, with room for every row of the pass.
    pub s: &'a mut RecallScratch,
}

/// What recurrent memories compute with, kept between passes.
#[derive(Default)]
pub struct RecallScratch {
    /// Write strengths of a part's rows, later of the cells taken in `[n, n_head]`.
    pub beta: Buffer,
    /// Log decays of the same.
    pub g: Buffer,
    /// Keys taken in `[n, n_head_kv, head_dim]`.
    pub k: Buffer,
    /// Values taken in `[n, n_head_kv, head_dim]`.
    pub v: Buffer,
    /// What was read `[n, n_head, head_dim]`.
    pub o: Buffer,
    /// Gate of what was read `[n, n_head]`.
    pub gate: Buffer,
}

/// The interface of all memories.
pub trait Memory: Send {
    /// The row of [`MEMORIES`] this is.
    fn name(&self) -> &'static str;

    /// Refuses tokens after which there are no logits: after `every` one of them, or after the last.
    fn check(&self, _tokens: &[u32], _every: bool) -> Result<()> {
        Ok(())
    }

    /// The segments that a plan over `tokens` needs embeddings of, and how many of each.
    fn segments(&self, _tokens: &[u32]) -> Vec<(Vec<u32>, usize)> {
        Vec::new()
    }

    /// Takes the embeddings `[n, n_embd]` of each of [`Memory::segments`], for the next plan.
    fn embed(&mut self, _embeddings: Vec<Arc<[f32]>>) {}

    /// Lays out the next pass over a prefix of `tokens`. `wanted` says whether logits of every
    /// token will be read (then no row may be skipped). On an error nothing has changed; what a
    /// plan computed ahead is dropped unless [`Memory::commit`] follows.
    fn plan(&mut self, ops: &dyn Ops, tokens: &[u32], wanted: bool) -> Result<Plan>;

    /// The cells.
    fn store(&self) -> &Store;

    /// The cells, to be written during the pass.
    fn store_mut(&mut self) -> &mut Store;

    /// Whether raw cells of this layer are never freed and all visible (AHN's full layers).
    fn sees_all(&self, _layer: usize) -> bool {
        false
    }

    /// Kept cells that are always read, and how many of the others each query reads (0: all).
    fn ranking(&self) -> (u32, u32) {
        (0, 0)
    }

    /// Adds what the memory recalls to the attention output of one layer, after that layer's
    /// keys and values have been written.
    fn recall(&mut self, _ops: &dyn Ops, _part: Recall<'_>) {}

    /// The compressor's step over the token of the planned pass, the last of its rows, where the plan
    /// left it to the pass. The pass runs it and brings home what comes of it, which
    /// [`Memory::commit`] takes over.
    fn trunk_step(&mut self) -> Option<TrunkStep<'_>> {
        None
    }

    /// The buffers that [`Memory::recall`] and [`Memory::trunk_step`] have read and written in the
    /// planned pass, beside cells.
    fn buffers(&self) -> Vec<&Buffer> {
        Vec::new()
    }

    /// Whether [`Memory::commit`] needs the logits of every token.
    fn reads_logits(&self) -> bool {
        false
    }

    /// The one place that changes what is remembered: takes over the pass's cells and frees what
    /// later entries cannot see. `logits` has a row per token of the plan when
    /// [`Memory::reads_logits`]. Returns how many tokens were taken, at most `plan.n_tokens`; the
    /// others must be offered again. When the device fails nothing has changed.
    fn commit(
        &mut self,
        ops: &dyn Ops,
        plan: &Plan,
        tokens: &[u32],
        logits: Option<&[f32]>,
    ) -> Result<usize>;

    /// Forgets from the end of `tokens`, which are all that were read, until at most `n` remain and
    /// returns how many do remain: as many as are still exactly known, often fewer than `n`. The
    /// rest of the `n` must be the next that are read.
    fn truncate(&mut self, ops: &dyn Ops, tokens: &[u32], n: usize) -> usize;

    /// A second memory with the same content; pages are shared until written.
    fn fork(&self) -> Box<dyn Memory>;

    /// Writes the content.
    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()>;

    /// Reads what [`Memory::save`] wrote into an empty memory of the same description.
    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()>;

    /// Numbers about what is held.
    fn stats(&self) -> Stats;

    /// The nodes in order of the text they stand for.
    fn nodes(&self) -> Vec<NodeInfo> {
        Vec::new()
    }

    /// A token that must come next whatever the model says (the rest of a gist group).
    fn forced_next(&self) -> Option<u32> {
        None
    }

    /// Changes a run-time dial (`tau`, `target_rate`); words when there is no such dial.
    fn set(&mut self, dial: &str, value: f64) -> std::result::Result<(), String> {
        let _ = value;
        Err(format!("the {} memory has no dial `{dial}`", self.name()))
    }
}

/// A memory node as shown to people.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct NodeInfo {
    /// Number of the node in order of creation.
    pub id: u64,
    /// 0 for a segment of tokens, 1 and up for consolidated nodes.
    pub level: u32,
    /// First token of the text it stands for.
    pub start: usize,
    /// One past its last token.
    pub end: usize,
    /// Boundary probability at the cut.
    pub p: f32,
    /// Nodes it was made of.
    pub children: Vec<u64>,
    /// Bytes of its cells in all layers.
    pub bytes: usize,
}

/// Numbers about a memory. Bytes are of one sequence; forks that share pages count them twice.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Stats {
    /// Row of [`MEMORIES`].
    pub name: &'static str,
    /// Tokens read so far.
    pub n_tokens: usize,
    /// Entries that went through the model so far, slots included.
    pub n_entries: usize,
    /// Cells held per layer.
    pub n_cells: usize,
    /// Tokens whose cells are freed.
    pub n_dropped: usize,
    /// Nodes held.
    pub n_nodes: usize,
    /// Node slots held.
    pub n_slots: usize,
    /// Bytes of pages of keys and values.
    pub cell_bytes: usize,
    /// Bytes of recurrent states, gate caches and node vectors.
    pub state_bytes: usize,
    /// Of these two, bytes in a card's memory; the others are the host's.
    pub card_bytes: usize,
    /// Bytes a full cache of the same K/V types would take for the same tokens.
    pub full_bytes: usize,
    /// Upper bound on `cell_bytes + state_bytes` after the next token.
    pub bound_bytes: usize,
    /// Tokens per node slot over the whole text, of closed segments; 0 without nodes.
    pub rate: f64,
    /// Standard deviation of segment length over its mean; 0 with fewer than two.
    pub rate_spread: f64,
    /// Longest segment, tokens.
    pub longest_segment: usize,
    /// Threshold in use.
    pub tau: Option<f32>,
}

/// Builds a memory from its description.
type Build = fn(&Context, &MemorySpec) -> Result<Box<dyn Memory>>;

/// One kind of memory.
pub struct Row {
    /// Name on the command line.
    pub name: &'static str,
    /// One line for `--help`.
    pub about: &'static str,
    /// Options after the colon.
    pub options: &'static [&'static str],
    /// Whether [`Memory::truncate`] reaches any token.
    pub rewinds: bool,
    /// Constructor.
    pub build: Build,
}

/// Every memory there is.
pub const MEMORIES: &[Row] = &[
    Row {
        name: "full",
        about: "every key and value of every token",
        options: &[],
        rewinds: true,
        build: full::build,
    },
    Row {
        name: "window",
        about: "the first tokens (sinks) and the last ones (StreamingLLM)",
        options: &["window", "sinks"],
        rewinds: false,
        build: window::build,
    },
    Row {
        name: "layered",
        about: "some layers keep everything, the others sinks and a window",
        options: &["full", "window", "sinks"],
        rewinds: false,
        build: layered::build,
    },
    Row {
        name: "ahn",
        about: "sinks, a window, and a recurrent state of all that left it",
        options: &["window", "sinks"],
        rewinds: false,
        build: ahn::build,
    },
    Row {
        name: "nodes",
        about: "semantic segments folded into memory nodes",
        options: &[
            "sinks",
            "window",
            "tau",
            "target_rate",
            "decider",
            "min",
            "max",
            "stride",
            "rate",
            "seed",
            "sigma",
            "position",
            "sees",
            "top_k",
            "node_max",
            "fanin",
            "reset",
        ],
        rewinds: false,
        build: nodes::build,
    },
    Row {
        name: "gist",
        about: "learned gist tokens after each sentence stand for it",
        options: &["keep_bos"],
        rewinds: false,
        build: gist::build,
    },
    Row {
        name: "concepts",
        about: "contexts compressed segment by segment into embeddings, cached and used again",
        options: &["ratio", "segment"],
        rewinds: true,
        build: concepts::build,
    },
];

/// Whether the memory called `name` goes back to any token.
pub fn rewinds(name: &str) -> bool {
    MEMORIES.iter().any(|row| row.name == name && row.rewinds)
}

/// Builds the memory `spec` describes.
pub fn build(ctx: &Context, spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    let row = MEMORIES
        .iter()
        .find(|row| row.name == spec.name)
        .ok_or_else(|| {
            let known: Vec<_> = MEMORIES.iter().map(|r| r.name).collect();
            Error::Memory {
                spec: spec.text.clone(),
                what: format!("unknown; the memories are {}", known.join(", ")),
            }
        })?;
    for (key, _) in &spec.options {
        if !row.options.contains(&key.as_str()) {
            return Err(Error::Memory {
                spec: spec.text.clone(),
                what: if row.options.is_empty() {
                    format!("`{}` takes no options, got `{key}`", row.name)
                } else {
                    format!(
                        "`{}` has no option `{key}`; it has {}",
                        row.name,
                        row.options.join(", ")
                    )
                },
            });
        }
    }
    (row.build)(ctx, spec)
}
