//! Sequences: what is read and remembered of one text, in memory and in session files.

use crate::error::{Error, Result};
use crate::load::Model;
use crate::memory::spec::MemorySpec;
use crate::memory::{self, Context, Memory, NodeInfo, Pieces, Stats};
use crate::ops::Ops;
use crate::session::{Decoder, Encoder, MAGIC, VERSION};
use crate::tokenizer::Tokenizer;
use mneme_kernels::attend::{KvType, PageLayout};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

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

/// A conversation: the tokens read so far and what is remembered of them.
pub struct Sequence {
    pub(crate) memory: Box<dyn Memory>,
    pub(crate) spec: MemorySpec,
    options: SequenceOptions,
    model: Arc<Model>,
    pub(crate) tokens: Vec<u32>,
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
