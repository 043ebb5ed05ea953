//! The engine: a model, verbs, and sequences that are stepped together.

use crate::error::{Error, FeedError, Result};
use crate::memory::spec::MemorySpec;
use crate::memory::{self, Context, Memory, NodeInfo, Pieces, Plan, Stats};
use crate::model::{Pass, Scratch};
use crate::ops::{MOST_BEST, Ops};
use crate::session::{Decoder, Encoder, MAGIC, VERSION};
use crate::tokenizer::Tokenizer;
use mneme_kernels::attend::{KvType, PageLayout};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

pub use crate::load::{LoadOptions, Model};

struct TokenPieces(Arc<Tokenizer>);

impl Pieces for TokenPieces {
    fn piece(&self, id: u32) -> &[u8] {
        self.0.piece(id)
    }
}

/// What a sequence holds at most, and in which types.
#[derive(Clone, Copy, Debug)]
pub struct SequenceOptions {
    /// Most cells per layer; 0 for what the model was trained with.
    pub n_ctx: usize,
    /// Type of keys.
    pub type_k: KvType,
    /// Type of values.
    pub type_v: KvType,
}

impl Default for SequenceOptions {
    fn default() -> SequenceOptions {
        SequenceOptions {
            n_ctx: 0,
            type_k: KvType::F16,
            type_v: KvType::F16,
        }
    }
}

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
    ops: Box<dyn Ops>,
    /// Of the layers that run by the verbs themselves, the last ones.
    scratch: Scratch,
    /// Of the layers before them, where the model is split.
    before: Scratch,
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
        let mut best = match run.and_then(|()| self.best(feeds, &answers)) {
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
            true => computed.read_with(&mut self.logits)?,
            false => &[],
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
        let sequences: Vec<(&mut (dyn Memory + 'static), &Plan)> = feeds
            .iter_mut()
            .zip(plans)
            .filter(|(_, plan)| !plan.entries.is_empty())
            .map(|(feed, plan)| (&mut *feed.seq.memory, plan))
            .collect();
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
}

/// A conversation: the tokens read so far and what is remembered of them.
pub struct Sequence {
    memory: Box<dyn Memory>,
    spec: MemorySpec,
    options: SequenceOptions,
    model: Arc<Model>,
    tokens: Vec<u32>,
    /// Forks of the memory at moments worth returning to, oldest first.
    marks: Vec<(usize, Box<dyn Memory>)>,
    /// Whether a dial was turned, so that the description no longer says all.
    altered: bool,
}

/// Marks kept per sequence whatever they hold, and at most; the oldest but the first goes when one
/// more is set.
pub const MARKS: RangeInclusive<usize> = 8..=64;
/// Between the two, as many marks as would fit these bytes if they shared nothing.
pub const MARK_BYTES: usize = 256 << 20;

impl Sequence {
    /// An empty sequence.
    pub fn new(
        model: &Arc<Model>,
        spec: &MemorySpec,
        options: SequenceOptions,
    ) -> Result<Sequence> {
        let hp = model.hparams();
        let ctx = Context {
            weights: Arc::clone(&model.weights),
            pieces: Arc::new(TokenPieces(Arc::clone(&model.tokenizer))),
            layout: PageLayout {
                n_head_kv: hp.n_head_kv,
                head_dim_k: hp.head_dim,
                head_dim_v: hp.head_dim,
                ty_k: options.type_k,
                ty_v: options.type_v,
            },
            n_ctx: match options.n_ctx {
                0 => hp.n_ctx_train,
                n => n,
            },
        };
        if (options.type_k == KvType::Q8_0 || options.type_v == KvType::Q8_0)
            && !hp.head_dim.is_multiple_of(32)
        {
            return Err(spec.refuse(format!(
                "q8_0 keys and values need heads of a multiple of 32, this model's have {}",
                hp.head_dim
            )));
        }
        Ok(Sequence {
            memory: memory::build(&ctx, spec)?,
            spec: spec.clone(),
            options,
            model: Arc::clone(model),
            tokens: Vec::new(),
            marks: Vec::new(),
            altered: false,
        })
    }

    /// Tokens read so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of tokens read so far.
    pub fn n_past(&self) -> usize {
        self.tokens.len()
    }

    /// The memory's description.
    pub fn spec(&self) -> &MemorySpec {
        &self.spec
    }

    /// Numbers about the memory.
    pub fn stats(&self) -> Stats {
        self.memory.stats()
    }

    /// The nodes held.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        self.memory.nodes()
    }

    /// A token that must come next whatever the logits say.
    pub fn forced_next(&self) -> Option<u32> {
        self.memory.forced_next()
    }

    /// Changes a dial of the memory (`tau`, `target_rate`) for everything read from now on, in
    /// remembered states too.
    pub fn set(&mut self, dial: &str, value: f64) -> Result<()> {
        self.altered = true;
        let marks = self.marks.iter_mut().map(|(_, memory)| memory);
        for memory in std::iter::once(&mut self.memory).chain(marks) {
            (memory.set(dial, value)).map_err(|what| self.spec.refuse(what))?;
        }
        Ok(())
    }

    /// Remembers this moment: [`Sequence::truncate`] can return to it exactly. Pages are shared,
    /// so a mark costs the recurrent state and what is freed later.
    pub fn mark(&mut self) {
        let n = self.tokens.len();
        if self.marks.last().is_some_and(|(at, _)| *at == n) {
            return;
        }
        let stats = self.stats();
        let held = (stats.cell_bytes + stats.state_bytes).max(1);
        let most = (MARK_BYTES / held).clamp(*MARKS.start(), *MARKS.end());
        if self.marks.len() >= most {
            self.marks.drain(1..self.marks.len() + 2 - most);
        }
        self.marks.push((n, self.memory.fork()));
    }

    /// Goes back to at most `n` tokens and returns how many are still known: `n` where the memory
    /// can take tokens back, else the last cut (`nodes`, `gist`) or mark before, else 0. The rest of
    /// the `n` must be fed again.
    pub fn truncate(&mut self, ops: &dyn Ops, n: usize) -> usize {
        let n = n.min(self.tokens.len());
        self.marks.retain(|(at, _)| *at <= n);
        // A memory that cannot go back empties itself: try on a fork.
        let mut memory = self.memory.fork();
        let mut held = memory.truncate(ops, &self.tokens, n);
        if let Some((at, mark)) = self.marks.last()
            && *at > held
        {
            memory = mark.fork();
            held = *at;
        }
        self.memory = memory;
        self.tokens.truncate(held);
        held
    }

    /// Frees no cell from now on; what is visible stays the same. The mask that freeing is tested
    /// against.
    pub fn hold_all(&mut self) {
        self.memory.store_mut().hold_all();
    }

    /// A second sequence with the same past; cells are shared until written.
    pub fn fork(&self) -> Sequence {
        Sequence {
            memory: self.memory.fork(),
            spec: self.spec.clone(),
            options: self.options,
            model: Arc::clone(&self.model),
            tokens: self.tokens.clone(),
            marks: Vec::new(),
            altered: self.altered,
        }
    }

    /// As [`Sequence::fork`], with the remembered moments.
    pub fn twin(&self) -> Sequence {
        let marks = self.marks.iter().map(|(at, memory)| (*at, memory.fork()));
        Sequence {
            marks: marks.collect(),
            ..self.fork()
        }
    }

    /// Whether a dial of the memory was turned since it was made.
    pub fn is_altered(&self) -> bool {
        self.altered
    }

    /// Bytes of the memory and its remembered moments, counted as if they shared nothing.
    pub fn n_bytes(&self) -> usize {
        let bytes = |memory: &dyn Memory| {
            let stats = memory.stats();
            stats.cell_bytes + stats.state_bytes
        };
        let marks: usize = self.marks.iter().map(|(_, memory)| bytes(&**memory)).sum();
        bytes(&*self.memory) + marks
    }

    /// The sequence as [`Sequence::save`] writes it, in host memory. Remembered moments are not in it.
    pub fn pack(&self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut out = Encoder::new(&mut bytes);
        self.encode(&mut out, &[])?;
        out.finish()?;
        Ok(bytes)
    }

    /// Reads what [`Sequence::pack`] wrote.
    pub fn unpack(model: &Arc<Model>, bytes: &[u8], n_ctx: usize) -> Result<Sequence> {
        let mut reader = bytes;
        let (seq, _) = Sequence::decode(
            model,
            &mut reader,
            bytes.len() as u64,
            n_ctx,
            Path::new("-"),
        )?;
        Ok(seq)
    }

    /// Writes the sequence to `path`, replacing an older file only once all is written. `extra` is
    /// the caller's own (sampler state).
    pub fn save(&self, path: &Path, extra: &[u8]) -> Result<u64> {
        let io = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
            return Err(io(std::io::Error::other("is there and no regular file")));
        }
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let mut temp = tempfile::Builder::new()
            .prefix(".mneme-")
            .tempfile_in(dir)
            .map_err(io)?;
        {
            let mut buffered = BufWriter::new(temp.as_file_mut());
            let mut out = Encoder::new(&mut buffered);
            self.encode(&mut out, extra).map_err(io)?;
            out.finish().map_err(io)?;
            buffered.flush().map_err(io)?;
        }
        temp.as_file().sync_all().map_err(io)?;
        let n = temp.as_file().metadata().map_err(io)?.len();
        temp.persist(path).map_err(|e| io(e.error))?;
        Ok(n)
    }

    fn encode(&self, out: &mut Encoder<'_>, extra: &[u8]) -> std::io::Result<()> {
        out.bytes(&MAGIC)?;
        out.u32(VERSION)?;
        out.u64(self.model.identity())?;
        out.blob(self.spec.text.as_bytes())?;
        out.blob(kv_name(self.options.type_k).as_bytes())?;
        out.blob(kv_name(self.options.type_v).as_bytes())?;
        out.u32s(&self.tokens)?;
        out.blob(extra)?;
        self.memory.save(out)
    }

    /// Reads a sequence written by [`Sequence::save`] for the same model and memory; returns it
    /// with the caller's bytes.
    pub fn load(model: &Arc<Model>, path: &Path, n_ctx: usize) -> Result<(Sequence, Vec<u8>)> {
        let file = File::open(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        let len = file.metadata().map_or(0, |m| m.len());
        Sequence::decode(model, &mut BufReader::new(file), len, n_ctx, path)
    }

    /// Reads `len` bytes that [`Sequence::encode`] wrote; `path` is what errors name.
    fn decode(
        model: &Arc<Model>,
        reader: &mut dyn Read,
        len: u64,
        n_ctx: usize,
        path: &Path,
    ) -> Result<(Sequence, Vec<u8>)> {
        let refuse = |what: String| Error::Session {
            path: path.to_owned(),
            what,
        };
        let mut from = Decoder::new(reader, len);
        let broken = |e: std::io::Error| refuse(e.to_string());
        let mut magic = [0; 8];
        from.bytes_into(&mut magic).map_err(broken)?;
        if magic != MAGIC {
            return Err(refuse("not a session file".into()));
        }
        let version = from.u32().map_err(broken)?;
        if version != VERSION {
            return Err(refuse(format!(
                "version {version}; this program reads version {VERSION}"
            )));
        }
        let identity = from.u64().map_err(broken)?;
        if identity != model.identity() {
            return Err(refuse(format!(
                "made with another model than {}",
                model.path.display()
            )));
        }
        let spec = from.string().map_err(broken)?.parse::<MemorySpec>();
        let spec = spec.map_err(|e| refuse(e.to_string()))?;
        let mut kv = || -> Result<KvType> {
            let name = from.string().map_err(broken)?;
            kv_type(&name).ok_or_else(|| refuse(format!("unknown K/V type `{name}`")))
        };
        let options = SequenceOptions {
            n_ctx,
            type_k: kv()?,
            type_v: kv()?,
        };
        let tokens = from.u32s().map_err(broken)?;
        let n_vocab = model.hparams().n_vocab;
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= n_vocab) {
            return Err(refuse(Error::TokenId { id, n_vocab }.to_string()));
        }
        let extra = from.blob().map_err(broken)?;
        let mut seq = Sequence::new(model, &spec, options)?;
        seq.memory.restore(&mut from).map_err(broken)?;
        from.finish().map_err(broken)?;
        if seq.memory.stats().n_tokens != tokens.len() {
            return Err(refuse("the tokens do not match the memory".into()));
        }
        seq.tokens = tokens;
        Ok((seq, extra))
    }
}

/// Names of K/V types as `-ctk` takes them.
pub const KV_TYPES: &[(&str, KvType)] = &[
    ("f32", KvType::F32),
    ("f16", KvType::F16),
    ("bf16", KvType::BF16),
    ("q8_0", KvType::Q8_0),
];

/// The K/V type called `name`.
pub fn kv_type(name: &str) -> Option<KvType> {
    KV_TYPES.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
}

/// The name of a K/V type.
pub fn kv_name(ty: KvType) -> &'static str {
    let row = KV_TYPES.iter().find(|(_, t)| *t == ty);
    row.expect("every type has a name").0
}
