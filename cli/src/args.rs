//! Flags that several commands share. Where llama.cpp has a flag of the same meaning, ours is
//! spelled the same, its several-letter short forms (`-ctk`, `-hf`) included.

use crate::bytes::human_bytes;
use crate::device::DeviceArgs;
use crate::progress::{Progress, Unit};
use anyhow::{Context, Result, bail};
use mneme_engine::engine::N_UBATCH;
use mneme_engine::grammar::{Grammar, GrammarVocab};
use mneme_engine::memory::concepts::cache::ConceptCache;
use mneme_engine::memory::{MEMORIES, spec::MemorySpec};
use mneme_engine::ops::Contexts;
use mneme_engine::sampler::{SamplerKind, SamplerParams};
use mneme_engine::sequence::{KV_TYPES, kv_type};
use mneme_engine::tokenizer::Tokenizer;
use mneme_engine::{Engine, LoadOptions, Model, Sequence, SequenceOptions};
use mneme_kernels::attend::{KvType, PageLayout};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// llama.cpp's short flags of several letters, and the long ones clap knows.
const LLAMA_FLAGS: &[(&str, &str)] = &[
    ("-hf", "--hf-repo"),
    ("-hfr", "--hf-repo"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-ub", "--ubatch-size"),
    ("-sys", "--system-prompt"),
    ("-np", "--parallel"),
    ("-jf", "--json-schema-file"),
    ("-dev", "--device"),
    ("-ngl", "--n-gpu-layers"),
];

/// Flags whose next argument is text that may look like a flag.
const TEXT_FLAGS: &[&str] = &["-p", "--prompt", "-sys", "--system-prompt", "-r"];

/// Writes llama.cpp's short flags out, which clap would read as bundles of letters.
pub fn llama_flags(args: Vec<OsString>) -> Vec<OsString> {
    let mut out: Vec<OsString> = Vec::with_capacity(args.len());
    let mut args = args.into_iter();
    let mut text_next = false;
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg);
            out.extend(args);
            break;
        }
        let is_text = std::mem::replace(&mut text_next, TEXT_FLAGS.iter().any(|f| arg == *f));
        let long = LLAMA_FLAGS.iter().find_map(|(short, long)| {
            let rest = arg.to_str()?.strip_prefix(short)?;
            (rest.is_empty() || rest.starts_with('=')).then(|| format!("{long}{rest}"))
        });
        match long {
            Some(long) if !is_text => out.push(long.into()),
            _ => out.push(arg),
        }
    }
    out
}

/// The memories as a table for `--help`, from the engine's own.
pub fn memory_help() -> String {
    let mut text = String::from("Memories (--memory NAME[:key=value,...]):\n");
    for row in MEMORIES {
        text += &format!("  {:<8} {}\n", row.name, row.about);
        if !row.options.is_empty() {
            text += &wrap(&row.options.join(" "), 11, 88);
        }
    }
    text + "Without --memory, the one the file was trained for, else full."
}

/// `words` broken into lines of at most `width`, indented by `indent`.
fn wrap(words: &str, indent: usize, width: usize) -> String {
    let mut out = String::new();
    let mut line = String::new();
    for word in words.split(' ') {
        if indent + line.len() + 1 + word.len() > width {
            out += &format!("{:indent$}{line}\n", "");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    out + &format!("{:indent$}{line}\n", "")
}

/// Which model, and on how many threads.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Model file (GGUF; of a split file, the first part)
    #[arg(
        short,
        long,
        value_name = "FILE",
        env = "MNEME_MODEL",
        required_unless_present = "hf_repo",
        conflicts_with = "hf_repo"
    )]
    pub model: Option<PathBuf>,
    /// Model from the Hugging Face hub, downloaded once (short: -hf); quant defaults to Q4_K_M
    #[arg(long, value_name = "USER/REPO[:QUANT]")]
    pub hf_repo: Option<String>,
    /// Trained memory to lay over the model (GGUF adapter)
    #[arg(long, value_name = "FILE")]
    pub memory_adapter: Option<PathBuf>,
    /// Where compressed contexts are kept for the next time (memory `concepts`): a folder, redis://HOST:PORT/DB, or
    /// none [default: mneme/concepts in the user's cache folder]
    #[arg(
        long,
        value_name = "PLACE",
        env = "MNEME_CONCEPT_CACHE",
        hide_env_values = true
    )]
    pub concept_cache: Option<String>,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = parse_threads)]
    pub threads: Option<usize>,
    /// Most rows computed in one pass (short: -ub) [default: 512, on a GPU 2048]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub ubatch_size: Option<usize>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl ModelArgs {
    /// Path of the model file; fetches it from the hub when that is where it is.
    pub fn path(&self) -> Result<PathBuf> {
        match (&self.model, &self.hf_repo) {
            (Some(path), _) => Ok(path.clone()),
            #[cfg(feature = "hf")]
            (None, Some(name)) => crate::hub::fetch(name),
            #[cfg(not(feature = "hf"))]
            (None, Some(name)) => {
                bail!("-hf {name}: this mneme was built without the feature `hf`")
            }
            (None, None) => bail!("a model is needed: -m FILE or -hf USER/REPO"),
        }
    }

    /// The same flags for the model in another file, with no adapter over it.
    pub fn of(&self, file: &Path) -> ModelArgs {
        ModelArgs {
            model: Some(file.to_owned()),
            hf_repo: None,
            memory_adapter: None,
            ..self.clone()
        }
    }

    /// Threads to use.
    pub fn n_threads(&self) -> usize {
        self.threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
    }

    /// Loads the model, with a progress bar when it takes long; on a GPU beside room for
    /// `contexts`.
    pub fn load(&self, contexts: Contexts) -> Result<Engine> {
        let path = self.path()?;
        let contexts = Contexts {
            n_ubatch: self.ubatch_size.unwrap_or(0),
            ..contexts
        };
        let adapter = self.memory_adapter.as_deref();
        let ops = self
            .device
            .open(&path, adapter, self.n_threads(), contexts)?;
        let options = LoadOptions {
            memory_adapter: self.memory_adapter.clone(),
        };
        let mut bar = Progress::new("loading", 0, Unit::Bytes);
        let model = Model::load(&path, &options, &*ops, |done, total| {
            bar.set_len(total);
            bar.set(done);
        })
        .map_err(|e| {
            // Most errors name a key or a tensor; say of which file.
            let named = path.display().to_string();
            let known = e.to_string().contains(&named);
            let e = anyhow::Error::new(e);
            if known { e } else { e.context(named) }
        })?;
        drop(bar);
        let concepts = concept_cache(self.concept_cache.as_deref(), &model)?;
        let mut engine = Engine::new(model, ops, self.ubatch_size.unwrap_or(0));
        engine.concepts = concepts;
        Ok(engine)
    }
}

/// Where `model` keeps compressed contexts, given what the flag says: nowhere but in this process for a
/// model that compresses none.
pub fn concept_cache(place: Option<&str>, model: &Model) -> Result<ConceptCache> {
    if model.weights.concepts.is_none() {
        return Ok(ConceptCache::default());
    }
    match place {
        Some("none") => Ok(ConceptCache::default()),
        Some(place) => ConceptCache::open(place).context("--concept-cache"),
        None => {
            let folder = cache_folder().map(|dir| dir.join("concepts"));
            let folder = folder.as_deref().and_then(Path::to_str);
            let open = |place| {
                ConceptCache::open(place)
                    .inspect_err(|e| eprintln!("compressed contexts are not kept: {e}"))
                    .unwrap_or_default()
            };
            Ok(folder.map_or_else(ConceptCache::default, open))
        }
    }
}

/// The user's folder for what can be made again.
fn cache_folder() -> Option<PathBuf> {
    let cache = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".cache"),
    };
    Some(cache.join("mneme"))
}

/// What the past is kept as.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
pub struct MemoryArgs {
    /// Memory [default: what the file was trained for, else full]; see `mneme --help`
    #[arg(long, value_name = "NAME[:key=value,...]")]
    pub memory: Option<MemorySpec>,
    /// Boundary threshold of the nodes memory: lower makes more nodes
    #[arg(long, value_name = "P")]
    pub tau: Option<f64>,
    /// Tokens per node slot the nodes memory steers towards
    #[arg(long, value_name = "R")]
    pub target_rate: Option<f64>,
    #[command(flatten)]
    pub cells: CellArgs,
}

/// How much is kept, and in which types.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
pub struct CellArgs {
    /// Most cells (tokens and nodes) held at once; 0: what the model was trained with
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub ctx_size: usize,
    /// Type of keys: f32, f16, bf16, q8_0 (short: -ctk)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = parse_kv)]
    pub cache_type_k: KvType,
    /// Type of values: f32, f16, bf16, q8_0 (short: -ctv)
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = parse_kv)]
    pub cache_type_v: KvType,
}

impl MemoryArgs {
    /// The memory's description for `model`.
    pub fn spec(&self, model: &Model) -> Result<MemorySpec> {
        let mut spec = match &self.memory {
            Some(spec) => spec.clone(),
            None => model.default_memory(),
        };
        for (key, value) in [("tau", self.tau), ("target_rate", self.target_rate)] {
            let Some(value) = value else { continue };
            let colon = if spec.text.contains(':') { ',' } else { ':' };
            spec = format!("{}{colon}{key}={value}", spec.text).parse()?;
        }
        Ok(spec)
    }

    /// What one context takes.
    pub fn contexts(&self) -> Contexts {
        self.cells.contexts(self.memory.as_ref())
    }

    /// An empty sequence with this memory.
    pub fn sequence(&self, engine: &Engine) -> Result<Sequence> {
        self.cells.sequence(engine, &self.spec(&engine.model)?)
    }
}

impl CellArgs {
    /// What one context with `memory` takes.
    pub fn contexts(&self, memory: Option<&MemorySpec>) -> Contexts {
        Contexts {
            n_cells: most_cells(self.ctx_size, memory),
            type_k: self.cache_type_k,
            type_v: self.cache_type_v,
            ..Contexts::default()
        }
    }

    /// An empty sequence with the memory `spec`.
    pub fn sequence(&self, engine: &Engine, spec: &MemorySpec) -> Result<Sequence> {
        Ok(engine.sequence(spec, self.options(&engine.model)?)?)
    }

    /// Cells a sequence holds at most.
    pub fn n_ctx(&self, model: &Model) -> usize {
        match self.ctx_size {
            0 => model.hparams().n_ctx_train,
            n => n,
        }
    }

    /// What the engine takes; refuses a context that cannot be.
    pub fn options(&self, model: &Model) -> Result<SequenceOptions> {
        let n_ctx = self.n_ctx(model);
        let bytes = n_ctx as u128 * self.cell_bytes(model) as u128;
        if let Some(ram) = total_memory()
            && self.ctx_size != 0
            && bytes > u128::from(ram)
        {
            bail!(
                "-c {n_ctx}: {} for keys and values, this machine has {}; ask for fewer cells \
                 (a bounded --memory needs only sinks + window)",
                human_bytes(bytes as f64),
                human_bytes(ram as f64),
            );
        }
        if n_ctx > 1 << 31 {
            bail!("-c {n_ctx}: at most {} cells are possible", 1u64 << 31);
        }
        Ok(SequenceOptions {
            n_ctx,
            type_k: self.cache_type_k,
            type_v: self.cache_type_v,
        })
    }

    /// Bytes of one cell in all layers.
    pub fn cell_bytes(&self, model: &Model) -> usize {
        let hp = model.hparams();
        let layout = PageLayout {
            n_head_kv: hp.n_head_kv,
            head_dim_k: hp.head_dim,
            head_dim_v: hp.head_dim,
            ty_k: self.cache_type_k,
            ty_v: self.cache_type_v,
        };
        layout.page_bytes() * hp.n_layer / mneme_kernels::attend::PAGE_CELLS
    }
}

/// Cells that a context of `n_ctx` holds at most, 0 for not given: a window bounds them, with the
/// rows of one pass.
pub fn most_cells(n_ctx: usize, memory: Option<&MemorySpec>) -> usize {
    let bounded = memory.filter(|spec| ["window", "ahn"].contains(&spec.name.as_str()));
    let window = bounded.and_then(|spec| spec.get("window", 0usize).ok().filter(|n| *n > 0));
    match (window, bounded) {
        (Some(window), Some(spec)) => {
            let sinks = spec.get("sinks", 0usize).unwrap_or(0);
            let held = window.saturating_add(sinks).saturating_add(N_UBATCH);
            match n_ctx {
                0 => held,
                n => held.min(n),
            }
        }
        _ => n_ctx,
    }
}

/// How tokens are chosen. Names, defaults and order are llama.cpp's.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Seed; -1 for a random one
    #[arg(short, long, value_name = "N", default_value = "-1", value_parser = parse_seed,
        allow_hyphen_values = true)]
    pub seed: u32,
    /// Temperature; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8, alias = "temperature")]
    pub temp: f32,
    /// Keep the K likeliest tokens; 0 is off
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: i32,
    /// Keep the likeliest tokens that together reach P; 1 is off
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    /// Keep tokens at least P times as likely as the likeliest; 0 is off
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub min_p: f32,
    /// Locally typical sampling; 1 is off
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub typical: f32,
    /// Keep tokens within N standard deviations of the greatest logit; -1 is off
    #[arg(long, value_name = "N", default_value_t = -1.0, allow_hyphen_values = true)]
    pub top_nsigma: f32,
    /// Chance to take out all but the last of the tokens above --xtc-threshold
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub xtc_probability: f32,
    /// See --xtc-probability
    #[arg(long, value_name = "P", default_value_t = 0.1)]
    pub xtc_threshold: f32,
    /// Range of a temperature that follows the entropy; 0 is off
    #[arg(long, value_name = "R", default_value_t = 0.0)]
    pub dynatemp_range: f32,
    /// How the entropy maps to that range
    #[arg(long, value_name = "E", default_value_t = 1.0)]
    pub dynatemp_exp: f32,
    /// Tokens the penalties look back at; 0 is off, -1 all
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        allow_hyphen_values = true
    )]
    pub repeat_last_n: i32,
    /// Divides the logits of tokens seen lately; 1 is off
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// Subtracted once from the logits of tokens seen lately
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_hyphen_values = true
    )]
    pub presence_penalty: f32,
    /// Subtracted for every time a token was seen lately
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_hyphen_values = true
    )]
    pub frequency_penalty: f32,
    /// Scale of the penalty on prolonged repetitions (DRY); 0 is off
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub dry_multiplier: f32,
    /// Base of its growth
    #[arg(long, value_name = "X", default_value_t = 1.75)]
    pub dry_base: f32,
    /// Repetitions up to this length cost nothing
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub dry_allowed_length: i32,
    /// Tokens searched for repetitions; 0 is off, -1 all
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        allow_hyphen_values = true
    )]
    pub dry_penalty_last_n: i32,
    /// Text no repetition reaches across; may be repeated, `none` for none [default: \n : \" *]
    #[arg(long, value_name = "TEXT")]
    pub dry_sequence_breaker: Vec<String>,
    /// Mirostat version 1 or 2 instead of the chain; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub mirostat: u8,
    /// Mirostat learning rate
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub mirostat_lr: f32,
    /// Mirostat target surprise, bits
    #[arg(long, value_name = "X", default_value_t = 5.0)]
    pub mirostat_ent: f32,
    /// Steps of the chain in order, separated by `;`
    #[arg(long, value_name = "NAMES")]
    pub samplers: Option<String>,
    /// Added to a token's logit: ID+BIAS or ID-BIAS; may be repeated
    #[arg(short, long, value_name = "ID(+/-)BIAS", value_parser = parse_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Never end a text
    #[arg(long)]
    pub ignore_eos: bool,
}

impl SamplingArgs {
    /// What the sampler takes.
    pub fn params(&self) -> Result<SamplerParams> {
        let defaults = SamplerParams::default();
        let breakers = match &self.dry_sequence_breaker[..] {
            [] => defaults.dry_sequence_breakers.clone(),
            [one] if one == "none" => Vec::new(),
            texts => texts.iter().map(|t| unescape(t)).collect(),
        };
        let samplers = match &self.samplers {
            None => defaults.samplers.clone(),
            Some(names) => names
                .split(';')
                .filter(|name| !name.is_empty())
                .map(SamplerKind::from_name)
                .collect::<Result<_, _>>()?,
        };
        let params = SamplerParams {
            seed: self.seed,
            temperature: self.temp,
            dynatemp_range: self.dynatemp_range,
            dynatemp_exponent: self.dynatemp_exp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical,
            top_n_sigma: self.top_nsigma,
            xtc_probability: self.xtc_probability,
            xtc_threshold: self.xtc_threshold,
            repeat_last_n: self.repeat_last_n,
            repeat_penalty: self.repeat_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            dry_multiplier: self.dry_multiplier,
            dry_base: self.dry_base,
            dry_allowed_length: self.dry_allowed_length,
            dry_penalty_last_n: self.dry_penalty_last_n,
            dry_sequence_breakers: breakers,
            mirostat: self.mirostat,
            mirostat_tau: self.mirostat_ent,
            mirostat_eta: self.mirostat_lr,
            ignore_eos: self.ignore_eos,
            logit_bias: self.logit_bias.clone(),
            samplers,
            ..defaults
        };
        params.validate()?;
        Ok(params)
    }
}

/// What an answer's text must look like.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Constraint")]
#[group(multiple = false)]
pub struct GrammarArgs {
    /// Grammar in GBNF
    #[arg(long, value_name = "TEXT")]
    pub grammar: Option<String>,
    /// File with a grammar in GBNF
    #[arg(long, value_name = "FILE")]
    pub grammar_file: Option<PathBuf>,
    /// JSON schema; `{}` for any object
    #[arg(short, long, value_name = "JSON")]
    pub json_schema: Option<String>,
    /// File with a JSON schema (short: -jf)
    #[arg(long, value_name = "FILE")]
    pub json_schema_file: Option<PathBuf>,
    /// Regular expression for the whole answer
    #[arg(long, value_name = "REGEX")]
    pub regex: Option<String>,
}

impl GrammarArgs {
    /// The grammar asked for.
    pub fn build(&self, tokenizer: &Tokenizer) -> Result<Option<Grammar>> {
        let read =
            |path: &PathBuf| std::fs::read_to_string(path).context(path.display().to_string());
        let vocab = || GrammarVocab::new(tokenizer);
        let schema = |text: &str| -> Result<Grammar> {
            let schema = serde_json::from_str(text).context("json schema")?;
            Ok(vocab()?.json_schema(&schema)?)
        };
        Ok(Some(if let Some(text) = &self.grammar {
            vocab()?.gbnf(text)?
        } else if let Some(path) = &self.grammar_file {
            vocab()?.gbnf(&read(path)?)?
        } else if let Some(text) = &self.json_schema {
            schema(text)?
        } else if let Some(path) = &self.json_schema_file {
            schema(&read(path)?)?
        } else if let Some(pattern) = &self.regex {
            vocab()?.regex(pattern)?
        } else {
            return Ok(None);
        }))
    }
}

/// A seed; -1 is the one that means a random one.
fn parse_seed(text: &str) -> Result<u32, String> {
    match text {
        "-1" => Ok(u32::MAX),
        text => text.parse().map_err(|e| format!("{e}")),
    }
}

/// `17+2.5`, `17-inf`.
fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let at = text
        .find(['+', '-'])
        .ok_or("expected ID+BIAS or ID-BIAS, such as 15043+1 or 15043-inf")?;
    let id = text[..at].parse().map_err(|e| format!("token id: {e}"))?;
    let bias: f32 = text[at..].parse().map_err(|e| format!("bias: {e}"))?;
    match bias.is_nan() {
        true => Err("bias: not a number".into()),
        false => Ok((id, bias)),
    }
}

/// `text` with `\n`, `\r`, `\t`, `\"`, `\'`, `\\` and `\xNN` (below 80) written out.
pub fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let rest = chars.as_str();
        match chars.next() {
            Some('n') => out.push('\n'),
            Some('r') => out.push('\r'),
            Some('t') => out.push('\t'),
            Some(c @ ('"' | '\'' | '\\')) => out.push(c),
            Some('x') => match rest.get(1..3).and_then(|h| u8::from_str_radix(h, 16).ok()) {
                Some(byte) if byte < 0x80 => {
                    out.push(char::from(byte));
                    chars = rest[3..].chars();
                }
                _ => out.push_str("\\x"),
            },
            Some(c) => {
                out.push('\\');
                out.push(c);
            }
            None => out.push('\\'),
        }
    }
    out
}

/// Bytes of memory in this machine, where the system says so.
fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A K/V type by name.
pub fn parse_kv(text: &str) -> Result<KvType, String> {
    kv_type(text).ok_or_else(|| {
        let names: Vec<_> = KV_TYPES.iter().map(|(name, _)| *name).collect();
        format!("the types are {}", names.join(", "))
    })
}

/// A count of at least one.
pub fn parse_positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

/// Threads: at least one, and not so many that the system refuses to start them.
fn parse_threads(text: &str) -> Result<usize, String> {
    match parse_positive(text)? {
        n if n > 1024 => Err("at most 1024".into()),
        n => Ok(n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(args: &[&str]) -> Vec<String> {
        let args = args.iter().map(OsString::from).collect();
        let text = |a: OsString| a.into_string().expect("the tests pass text");
        llama_flags(args).into_iter().map(text).collect()
    }

    #[test]
    fn llama_short_flags_become_long_ones() {
        assert_eq!(
            rewritten(&["mneme", "run", "-ctk", "q8_0", "-hf=a/b", "-c", "8"]),
            [
                "mneme",
                "run",
                "--cache-type-k",
                "q8_0",
                "--hf-repo=a/b",
                "-c",
                "8"
            ]
        );
        // A prompt is left alone, and so is all behind `--`.
        assert_eq!(
            rewritten(&["-p", "-ub", "-ub"]),
            ["-p", "-ub", "--ubatch-size"]
        );
        assert_eq!(rewritten(&["--", "-ub"]), ["--", "-ub"]);
    }

    #[test]
    fn without_flags_sampling_is_llama_cpps() {
        #[derive(clap::Parser)]
        struct Only {
            #[command(flatten)]
            sampling: SamplingArgs,
        }
        let parse = |args: &[&str]| {
            let args = ["x"].iter().chain(args);
            <Only as clap::Parser>::try_parse_from(args).map(|o| o.sampling.params())
        };
        let params = parse(&[]).unwrap().unwrap();
        assert_eq!(params, SamplerParams::default());
        let args = ["--samplers", "top_k;temp", "-l", "7-inf", "-s", "3"];
        let params = parse(&args).unwrap().unwrap();
        assert_eq!(
            params.samplers,
            [SamplerKind::TopK, SamplerKind::Temperature]
        );
        assert_eq!(params.logit_bias, [(7, f32::NEG_INFINITY)]);
        assert_eq!(params.seed, 3);
        assert!(parse(&["--samplers", "top_k;magic"]).unwrap().is_err());
        assert!(parse(&["-l", "7"]).is_err());
        assert!(parse(&["--repeat-penalty", "0"]).unwrap().is_err());
    }

    #[test]
    fn escapes_are_written_out() {
        assert_eq!(unescape(r#"a\nb\t\"\\n\x41é\q\"#), "a\nb\t\"\\nAé\\q\\");
        assert_eq!(unescape(r"\xZZ\xff\x4"), r"\xZZ\xff\x4");
    }

    #[test]
    fn every_memory_is_in_the_help() {
        let help = memory_help();
        for row in MEMORIES {
            assert!(help.contains(row.name), "{}", row.name);
            assert!(row.options.iter().all(|o| help.contains(o)), "{}", row.name);
        }
    }
}
