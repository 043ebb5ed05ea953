//! Flags that several commands share. Where llama.cpp has a flag of the same meaning, ours is
//! spelled the same, its several-letter short forms (`-ctk`, `-hf`) included.

use crate::progress::{Progress, Unit};
use anyhow::{Result, bail};
use mneme_engine::engine::{KV_TYPES, N_UBATCH, kv_type};
use mneme_engine::memory::{MEMORIES, spec::MemorySpec};
use mneme_engine::ops::Cpu;
use mneme_engine::{Engine, LoadOptions, Model, Sequence, SequenceOptions};
use mneme_kernels::attend::{KvType, PageLayout};
use std::ffi::OsString;
use std::path::PathBuf;

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
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = parse_threads)]
    pub threads: Option<usize>,
    /// Most rows computed in one pass (short: -ub)
    #[arg(long, value_name = "N", default_value_t = N_UBATCH, value_parser = parse_positive)]
    pub ubatch_size: usize,
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

    /// Threads to use.
    pub fn n_threads(&self) -> usize {
        self.threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
    }

    /// Loads the model, with a progress bar when it takes long.
    pub fn load(&self) -> Result<Engine> {
        let path = self.path()?;
        let ops = Cpu::new(self.n_threads());
        let options = LoadOptions {
            memory_adapter: self.memory_adapter.clone(),
        };
        let mut bar = Progress::new("loading", 0, Unit::Bytes);
        let model = Model::load(&path, &options, &ops, |done, total| {
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
        Ok(Engine::new(model, ops, self.ubatch_size))
    }
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

    /// An empty sequence with this memory.
    pub fn sequence(&self, engine: &Engine) -> Result<Sequence> {
        self.cells.sequence(engine, &self.spec(&engine.model)?)
    }
}

impl CellArgs {
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

/// Bytes of memory in this machine, where the system says so.
fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// `1.5 GiB`.
pub fn human_bytes(n: f64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut n = n;
    let mut unit = 0;
    while n >= 1024.0 && unit + 1 < UNITS.len() {
        n /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n:.0} B"),
        _ => format!("{n:.1} {}", UNITS[unit]),
    }
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
    fn bytes_are_readable() {
        assert_eq!(human_bytes(17.0), "17 B");
        assert_eq!(human_bytes(1536.0), "1.5 KiB");
        assert_eq!(human_bytes(3.0 * (1u64 << 40) as f64), "3.0 TiB");
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
