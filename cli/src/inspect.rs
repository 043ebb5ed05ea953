//! `mneme inspect`: what a GGUF file holds, and the memory it will take.

use crate::args::{CellArgs, MemoryArgs, ModelArgs, parse_kv, parse_positive};
use crate::bytes::human_bytes;
use crate::device::DeviceArgs;
use crate::segments;
use anyhow::{Result, bail};
use mneme_engine::engine::N_UBATCH;
use mneme_engine::gguf::{Gguf, TensorInfo, Value};
use mneme_engine::hparams::Hparams;
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::ops;
use mneme_engine::sequence::kv_name;
use mneme_kernels::attend::{KvType, PAGE_CELLS, PageLayout};
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Arguments of `mneme inspect`.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  mneme inspect model.gguf -c 131072 --cache-type-k q8_0\n  \
    mneme inspect model.gguf --key tokenizer.chat_template\n  \
    mneme inspect -m nodes.gguf --segments book.txt -o book.html"
)]
pub struct Args {
    /// File (GGUF; of a split file, the first part)
    #[arg(value_name = "FILE", required_unless_present = "model")]
    file: Option<PathBuf>,
    /// The same, by a flag
    #[arg(short, long, value_name = "FILE", conflicts_with = "file")]
    model: Option<PathBuf>,
    /// Write a page that shows how the memory cuts this text (UTF-8) into segments
    #[arg(long, value_name = "FILE", conflicts_with_all = ["key", "json"])]
    segments: Option<PathBuf>,
    /// Where to write it [default: the text's name with .html]
    #[arg(short, long, value_name = "FILE", requires = "segments")]
    output: Option<PathBuf>,
    /// Memory that cuts it [default: what the file was trained for]
    #[arg(long, value_name = "NAME[:key=value,...]", requires = "segments")]
    memory: Option<MemorySpec>,
    /// Trained memory to lay over the model (GGUF adapter)
    #[arg(long, value_name = "FILE", requires = "segments")]
    memory_adapter: Option<PathBuf>,
    /// Context length of the estimates, tokens; 0: what the model was trained with
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    ctx_size: usize,
    /// Window of the estimates, tokens
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = parse_positive)]
    window: usize,
    /// Sinks of the estimates, tokens
    #[arg(long, value_name = "N", default_value_t = 4)]
    sinks: usize,
    /// Type of keys: f32, f16, bf16, q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = parse_kv)]
    cache_type_k: KvType,
    /// Type of values: f32, f16, bf16, q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = parse_kv)]
    cache_type_v: KvType,
    /// Also say what lies where when a GPU runs this many layers, the last ones, and the CPU the
    /// others (short: -ngl)
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    #[arg(long, value_name = "N", alias = "gpu-layers", value_parser = crate::device::parse_layers)]
    n_gpu_layers: Option<mneme_engine::ops::Layers>,
    /// Print the whole value of one key and nothing else
    #[arg(long, value_name = "NAME", conflicts_with = "json")]
    key: Option<String>,
    /// Leave out the list of tensors
    #[arg(long)]
    no_tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Longest value shown in the list of keys, in characters.
const MAX_SHOWN: usize = 100;
/// Elements of an array that are shown.
const MAX_ELEMENTS: usize = 6;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let file = match (&args.file, &args.model) {
        (Some(file), _) | (None, Some(file)) => file,
        (None, None) => bail!("a model is needed"),
    };
    if let Some(text) = &args.segments {
        return segments(args, file, text);
    }
    let gguf = Gguf::open(file)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    if let Some(key) = &args.key {
        print_key(&mut out, &gguf, key)?;
    } else if args.json {
        writeln!(out, "{:#}", as_json(args, &gguf))?;
    } else {
        print_all(&mut out, args, &gguf)?;
    }
    out.flush()?;
    Ok(())
}

/// Shows how the memory cuts `text`.
fn segments(args: &Args, file: &Path, text: &Path) -> Result<()> {
    let model = ModelArgs {
        model: Some(file.to_owned()),
        hf_repo: None,
        concept_cache: None,
        memory_adapter: args.memory_adapter.clone(),
        threads: None,
        ubatch_size: None,
        device: DeviceArgs::default(),
    };
    let memory = MemoryArgs {
        memory: args.memory.clone(),
        tau: None,
        target_rate: None,
        cells: CellArgs {
            ctx_size: args.ctx_size,
            cache_type_k: args.cache_type_k,
            cache_type_v: args.cache_type_v,
        },
    };
    let out = match &args.output {
        Some(out) => out.clone(),
        None => text.with_extension("html"),
    };
    segments::write_page(&model, &memory, text, &out)?;
    writeln!(io::stdout(), "{}", out.display())?;
    Ok(())
}

fn print_key(out: &mut impl Write, gguf: &Gguf, key: &str) -> Result<()> {
    match gguf.get(key) {
        None => bail!("{}: no key {key:?}", gguf.path().display()),
        Some(Value::String(text)) => writeln!(out, "{text}")?,
        Some(Value::Array(array)) => {
            for i in 0..array.len() {
                if let Some(value) = array.get(i) {
                    writeln!(out, "{value}")?;
                }
            }
        }
        Some(value) => writeln!(out, "{value}")?,
    }
    Ok(())
}

fn print_all(out: &mut impl Write, args: &Args, gguf: &Gguf) -> Result<()> {
    writeln!(
        out,
        "{}: GGUF version {}, {}, {} part(s), {} keys, {} tensors\n",
        gguf.path().display(),
        gguf.version(),
        human_bytes(gguf.n_bytes() as f64),
        gguf.n_parts(),
        gguf.keys().len(),
        gguf.tensors().len()
    )?;
    let width = gguf.keys().iter().map(|(k, _)| k.len()).max().unwrap_or(0);
    for (key, value) in gguf.keys() {
        let text = value.to_string();
        let mut shown: String = text.chars().take(MAX_SHOWN).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        writeln!(out, "{key:<width$}  {:<16}  {shown}", value.type_name())?;
    }
    if !args.no_tensors && !gguf.tensors().is_empty() {
        writeln!(out)?;
        let width = gguf
            .tensors()
            .iter()
            .map(|t| t.name.len())
            .max()
            .unwrap_or(0);
        for t in gguf.tensors() {
            let dims: Vec<String> = t.dims.iter().rev().map(u64::to_string).collect();
            writeln!(
                out,
                "{:<width$}  {:<8}  {:>20}  {:>12}",
                t.name,
                t.ty.name(),
                format!("[{}]", dims.join(", ")),
                human_bytes(t.n_bytes as f64)
            )?;
        }
    }
    if !gguf.tensors().is_empty() {
        writeln!(out)?;
    }
    for (ty, total) in totals(gguf) {
        writeln!(
            out,
            "{:<8}  {:>5} tensors  {:>15} values  {:>12}",
            ty,
            total.n_tensors,
            total.n_values,
            human_bytes(total.n_bytes as f64)
        )?;
    }
    writeln!(out)?;
    match Estimate::new(args, gguf) {
        Err(why) => writeln!(out, "no estimate of memory: {why}")?,
        Ok(estimate) => {
            writeln!(
                out,
                "Estimated memory at {} tokens, keys {} and values {} ({} a token):",
                estimate.n_ctx,
                kv_name(args.cache_type_k),
                kv_name(args.cache_type_v),
                human_bytes(estimate.cell_bytes as f64),
            )?;
            writeln!(
                out,
                "  weights {}, work space {}; loading alone peaks at {}",
                human_bytes(estimate.weight_bytes as f64),
                human_bytes(estimate.work_bytes as f64),
                human_bytes(estimate.load_bytes as f64)
            )?;
            for m in &estimate.memories {
                writeln!(
                    out,
                    "  {:<34} {:>12} cells  {:>12}  peak {:>12}",
                    m.memory,
                    m.n_cells,
                    human_bytes(m.n_bytes as f64),
                    human_bytes(m.peak_bytes as f64)
                )?;
            }
            #[cfg(any(feature = "cuda", feature = "cuda-host"))]
            if let Some((n, gpu, cpu)) = split(args, gguf) {
                let [gpu, cpu] = [gpu, cpu].map(|bytes| crate::device::describe_bytes(&bytes));
                writeln!(
                    out,
                    "  full, {n} layers on a GPU: there {gpu}; on the CPU {cpu}"
                )?;
            }
        }
    }
    Ok(())
}

/// Tensors of one type.
#[derive(Default, serde::Serialize)]
struct Total {
    n_tensors: usize,
    n_values: u64,
    n_bytes: u64,
}

fn totals(gguf: &Gguf) -> BTreeMap<&'static str, Total> {
    let mut all: BTreeMap<&'static str, Total> = BTreeMap::new();
    for t in gguf.tensors() {
        let total = all.entry(t.ty.name()).or_default();
        total.n_tensors += 1;
        total.n_values = total.n_values.saturating_add(t.n_elements());
        total.n_bytes += t.n_bytes;
    }
    all
}

fn as_json(args: &Args, gguf: &Gguf) -> serde_json::Value {
    let keys: Map<String, serde_json::Value> = (gguf.keys().iter())
        .map(|(key, value)| {
            (
                key.clone(),
                json!({"type": value.type_name(), "value": value_json(value)}),
            )
        })
        .collect();
    let tensors: Vec<serde_json::Value> = (gguf.tensors().iter())
        .map(|t| {
            json!({"name": t.name, "type": t.ty.name(), "dims": t.dims, "n_bytes": t.n_bytes,
                "part": t.part, "offset": t.offset})
        })
        .collect();
    let mut all = json!({
        "file": gguf.path(), "version": gguf.version(), "n_bytes": gguf.n_bytes(), "n_parts": gguf.n_parts(),
        "keys": keys, "types": totals(gguf),
        "n_params": gguf.tensors().iter().map(|t| t.n_elements()).sum::<u64>(),
    });
    if !args.no_tensors {
        all["tensors"] = json!(tensors);
    }
    all["estimate"] = match Estimate::new(args, gguf) {
        Ok(estimate) => json!(estimate),
        Err(why) => json!({"error": why}),
    };
    #[cfg(any(feature = "cuda", feature = "cuda-host"))]
    if let Some((n, gpu, cpu)) = split(args, gguf) {
        all["split"] = json!({"n_gpu_layers": n, "gpu": gpu, "cpu": cpu});
    }
    all
}

/// A value for JSON; long arrays are cut short (the type tells how long they are).
fn value_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::Array(a) => (0..a.len().min(MAX_ELEMENTS))
            .filter_map(|i| a.get(i))
            .map(|v| value_json(&v))
            .collect(),
        other => match other.as_i128().and_then(|v| i64::try_from(v).ok()) {
            Some(v) => json!(v),
            None => serde_json::Value::Null,
        },
    }
}

/// What a model will take.
#[derive(serde::Serialize)]
struct Estimate {
    n_ctx: usize,
    /// Bytes of one token's keys and values in all layers.
    cell_bytes: usize,
    /// Weights in memory: interleaved copies or mapped, each tensor once.
    weight_bytes: u64,
    /// Activations of one pass, logits, vocabulary.
    work_bytes: u64,
    /// Peak while loading: interleaved copies, vocabulary, and the file's pages of the largest tensor beside its copy.
    load_bytes: u64,
    memories: Vec<MemoryEstimate>,
}

/// What one memory will take at most.
#[derive(serde::Serialize)]
struct MemoryEstimate {
    memory: String,
    n_cells: usize,
    /// Keys, values and states.
    n_bytes: u64,
    /// The whole process at its largest: loading, or running with the memory full.
    peak_bytes: u64,
}

/// Layers that `args` ask to have on a GPU, and what then lies there and on the CPU with a full cache.
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
fn split(args: &Args, gguf: &Gguf) -> Option<(usize, ops::Bytes, ops::Bytes)> {
    use mneme_engine::engine::N_UBATCH_CARD;
    let archs: Vec<&str> = mneme_engine::model::ARCHS.iter().map(|a| a.name).collect();
    let hp = Hparams::from_gguf(gguf, gguf.path(), &archs).ok()?;
    let n = match args.n_gpu_layers? {
        ops::Layers::Fit => hp.n_layer,
        ops::Layers::Some(n) => n.min(hp.n_layer),
    };
    let contexts = ops::Contexts {
        n_cells: match args.ctx_size {
            0 => hp.n_ctx_train,
            n => n,
        },
        type_k: args.cache_type_k,
        type_v: args.cache_type_v,
        ..ops::Contexts::default()
    };
    let rows = [N_UBATCH, N_UBATCH_CARD];
    let room = ops::Room::of(gguf, None, &hp, &contexts, rows, ops::card_bytes);
    Some((n, room.card(n), room.host(n)))
}

impl Estimate {
    /// Fails with the reason where the file is no model that the engine runs.
    fn new(args: &Args, gguf: &Gguf) -> Result<Estimate, String> {
        let archs: Vec<&str> = mneme_engine::model::ARCHS
            .iter()
            .map(|row| row.name)
            .collect();
        let hp = Hparams::from_gguf(gguf, gguf.path(), &archs).map_err(|e| e.to_string())?;
        let n_ctx = match args.ctx_size {
            0 => hp.n_ctx_train,
            n => n,
        };
        let layout = PageLayout {
            n_head_kv: hp.n_head_kv,
            head_dim_k: hp.head_dim,
            head_dim_v: hp.head_dim,
            ty_k: args.cache_type_k,
            ty_v: args.cache_type_v,
        };
        let page_bytes = layout.page_bytes() as u64 * hp.n_layer as u64;
        let tied = gguf.tensor("output.weight").is_none();
        // Without tying, of the token embeddings only the rows that are read come into memory.
        let used = |t: &&TensorInfo| tied || t.name != "token_embd.weight";
        // Of most types the engine makes interleaved copies; the others stay mapped and come in when
        // first read.
        let copied = |t: &TensorInfo| match t.dims.len() {
            0 | 1 => Some(4 * t.n_elements()), // vectors become F32
            _ => {
                ops::copied_bytes(t.ty, t.n_rows() as usize, t.n_cols() as usize).map(|n| n as u64)
            }
        };
        let used = || gguf.tensors().iter().filter(used);
        let weight_bytes: u64 = used().map(|t| copied(t).unwrap_or(t.n_bytes)).sum();
        let copies: u64 = used().filter_map(copied).sum();
        let largest = used().filter(|t| copied(t).is_some()).map(|t| t.n_bytes);
        // Texts, merges and look-up tables, measured on a vocabulary of 150,000.
        let vocabulary = (hp.n_vocab * 150) as u64;
        let row = 4 * hp.n_embd + 3 * hp.n_ff + 2 * (hp.n_head + 2 * hp.n_head_kv) * hp.head_dim;
        let work_bytes = (N_UBATCH * row * 4 + hp.n_vocab * 8) as u64 + vocabulary;
        let load_bytes = copies + largest.max().unwrap_or(0) + vocabulary;
        let memory = |memory: String, n_cells: usize, n_regions: usize, state_bytes: u64| {
            // Each region may leave a page partly filled.
            let pages = (n_cells.div_ceil(PAGE_CELLS) + n_regions - 1) as u64;
            let n_bytes = pages * page_bytes + state_bytes;
            MemoryEstimate {
                memory,
                n_cells,
                n_bytes,
                peak_bytes: load_bytes.max(weight_bytes + work_bytes + n_bytes),
            }
        };
        let Args { window, sinks, .. } = *args;
        // A pass is written before what left the window is freed.
        let spanned = n_ctx.min(window + sinks + N_UBATCH);
        let mut memories = vec![
            memory("full".into(), n_ctx, 1, 0),
            memory(
                format!("window:window={window},sinks={sinks}"),
                spanned,
                2,
                0,
            ),
        ];
        let key = |suffix: &str| format!("{}.memory.{suffix}", hp.arch);
        let kind = gguf.opt_str(&key("kind")).map_err(|e| e.to_string())?;
        let number = |suffix: &str, default: usize| match gguf.opt_u32(&key(suffix)) {
            Ok(found) => Ok(found.map_or(default, |n| n as usize)),
            Err(e) => Err(e.to_string()),
        };
        match kind {
            Some("ahn") => {
                let state = (hp.n_layer * hp.n_head * hp.head_dim * hp.head_dim * 4) as u64;
                memories.push(memory(
                    format!("ahn:window={window},sinks={sinks}"),
                    spanned,
                    2,
                    state,
                ));
            }
            Some("nodes") => {
                let longest = number("decider.max_segment", 256)?;
                let kept = number("sinks", sinks)? + number("window", 0)?;
                for rate in [4, 8, 16] {
                    let n_cells = n_ctx.min(kept + longest + N_UBATCH + n_ctx.div_ceil(rate));
                    memories.push(memory(
                        format!("nodes, {rate} tokens a slot"),
                        n_cells,
                        2,
                        0,
                    ));
                }
            }
            Some("concepts") => {
                // Where all of the text is context; a last embedding may stand for fewer tokens.
                let ratio = number("concepts.ratio", 2)?.max(1);
                let segment = number("concepts.segment", 1)?.max(1);
                let n_cells = n_ctx.div_ceil(segment) * segment.div_ceil(ratio);
                let name = format!("concepts, contexts {ratio} to 1");
                memories.push(memory(name, n_cells.min(n_ctx), 1, 0));
            }
            _ => {}
        }
        Ok(Estimate {
            n_ctx,
            cell_bytes: (page_bytes / PAGE_CELLS as u64) as usize,
            weight_bytes,
            work_bytes,
            load_bytes,
            memories,
        })
    }
}
