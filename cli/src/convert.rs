//! `mneme convert`: a Hugging Face folder becomes a GGUF file.

use crate::bytes::human_bytes;
use crate::interrupt::{self, Interrupted};
use crate::progress::{Progress, Unit};
use anyhow::{Context, Result, bail};
use ggml_type::OutType;
use mneme_convert::{AHN_SINKS, AHN_WINDOW, ConvertOptions, Error, OutputOptions, Written};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Arguments of `mneme convert`.
#[derive(clap::Args)]
#[command(after_help = "\
Reads config.json, tokenizer.json (or tokenizer.model, or vocab.json and merges.txt), the chat template,
generation_config.json and all safetensors files of the folder. Architectures: Qwen2, Qwen3, Llama, Mistral.
The file runs in mneme and, without a memory, in llama.cpp.

Memories: AHN checkpoints in their published layout, and the nodes and gist checkpoints of mneme's trainer.
A checkpoint that holds the memory only becomes an adapter (--memory-adapter), or is merged into its base.

Examples:
  mneme convert Qwen2.5-0.5B-Instruct
  mneme convert Qwen2.5-3B-Instruct -o qwen.gguf --outtype q8_0
  mneme convert AHN-GDN-for-Qwen-2.5-Instruct-3B --memory-adapter -o ahn.gguf
  mneme convert Qwen2.5-3B-Instruct --memory AHN-GDN-for-Qwen-2.5-Instruct-3B -o qwen-ahn.gguf")]
pub struct Args {
    /// Folder with config.json and the safetensors files
    #[arg(value_name = "FOLDER")]
    model: PathBuf,
    /// File to write [default: FOLDER-TYPE.gguf in the current folder]
    #[arg(short, long, value_name = "FILE")]
    outfile: Option<PathBuf>,
    /// Type of the matrices: auto keeps each one's own; f32, f16, bf16, q8_0 or any other ggml type
    ///
    /// Vectors and norms are always F32. For mixtures such as Q4_K_M, convert to f16 or bf16 first and then
    /// use `mneme quantize`.
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    outtype: OutType,
    /// Folder of a memory checkpoint to merge into the model
    #[arg(long, value_name = "FOLDER", conflicts_with = "memory_adapter")]
    memory: Option<PathBuf>,
    /// Write the memory alone, to be laid over any GGUF of the base model
    #[arg(long)]
    memory_adapter: bool,
    /// Window of the memory in tokens
    #[arg(long, value_name = "N", long_help = format!("\
Window of the memory in tokens. For AHN the default is {AHN_WINDOW}, whatever the checkpoint's config says: \
published configs hold a training value"))]
    window: Option<u32>,
    /// First tokens that the memory never drops
    #[arg(long, value_name = "N", long_help = format!("\
First tokens that the memory never drops. For AHN the default is {AHN_SINKS}"))]
    sinks: Option<u32>,
    /// Split the output into parts of at most this much tensor data, such as 4G or 500M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    split_max_size: Option<u64>,
    /// Pre-tokenizer, as GGUF names it (qwen2, llama-bpe, gpt-2, ...), if it is not recognised
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Name of the model in the file [default: the folder's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Replace the output if it exists
    #[arg(short, long)]
    force: bool,
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = crate::args::parse_positive)]
    threads: Option<usize>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    use_threads(args.threads)?;
    let outfile = match &args.outfile {
        Some(path) => path.clone(),
        None => default_outfile(args)?,
    };
    let options = ConvertOptions {
        model: args.model.clone(),
        memory: args.memory.clone(),
        adapter: args.memory_adapter,
        output: OutputOptions {
            path: outfile,
            overwrite: args.force,
            split_max_bytes: args.split_max_size,
        },
        outtype: args.outtype.0,
        pre: args.pre.clone(),
        name: args.name.clone(),
        window: args.window,
        sinks: args.sinks,
    };
    let converted = watched("converting", |progress| {
        mneme_convert::convert(&options, progress)
    })?;
    for note in &converted.notes {
        eprintln!("note: {note}");
    }
    let what = match &converted.memory {
        Some(memory) => format!("{} with memory {memory}", converted.arch),
        None => converted.arch.to_string(),
    };
    print_written(&converted.written, &what);
    Ok(())
}

/// `FOLDER-TYPE.gguf` in the current folder.
fn default_outfile(args: &Args) -> Result<PathBuf> {
    let folder = args.memory.as_ref().unwrap_or(&args.model);
    let full = folder
        .canonicalize()
        .with_context(|| folder.display().to_string())?;
    let Some(name) = full.file_name() else {
        bail!(
            "{}: has no name to call the output by; give -o FILE",
            folder.display()
        );
    };
    let mut name = name.to_os_string();
    if args.memory_adapter {
        name.push("-memory");
    }
    if let Some(ty) = args.outtype.0 {
        name.push(format!("-{ty}"));
    }
    name.push(".gguf");
    Ok(Path::new(".").join(name))
}

/// Runs `work` under a progress bar; Ctrl-C and signals stop it between slabs.
pub fn watched<T>(
    what: &'static str,
    work: impl FnOnce(&mut mneme_convert::OnProgress<'_>) -> Result<T, Error>,
) -> Result<T> {
    interrupt::watch_all();
    let mut bar = Progress::new(what, 0, Unit::Bytes);
    let done = work(&mut |step| {
        bar.set_len(step.bytes_total);
        bar.set(step.bytes_done);
        match interrupt::pressed() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    drop(bar);
    match done {
        Err(Error::Stopped) => Err(Interrupted.into()),
        done => Ok(done?),
    }
}

/// One line per file on stdout.
pub fn print_written(written: &Written, what: &str) {
    for file in &written.files {
        println!("{}", file.display());
    }
    let size = human_bytes(written.n_bytes as f64);
    eprintln!("{what}: {} tensors, {size}", written.n_tensors);
}

/// Sets how many threads convert rows.
pub fn use_threads(n: Option<usize>) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(n.unwrap_or(0));
    pool.build_global().context("cannot start the threads")
}

/// `500M`, `4G`: bytes, in powers of 1000 as llama.cpp's tools count them.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.trim().to_ascii_uppercase().as_bytes() {
        [digits @ .., b'K'] => (digits.len(), 1_000),
        [digits @ .., b'M'] => (digits.len(), 1_000_000),
        [digits @ .., b'G'] => (digits.len(), 1_000_000_000),
        digits => (digits.len(), 1),
    };
    let number = text.trim().get(..digits).unwrap_or_default().parse::<u64>();
    match number.ok().and_then(|n| n.checked_mul(factor)) {
        Some(n) if n > 0 => Ok(n),
        _ => Err("expected a size such as 4G, 500M or 1000000000".into()),
    }
}

/// Names of ggml types on the command line.
pub mod ggml_type {
    use mneme_convert::Type;
    use std::str::FromStr;

    /// A type, or `auto`.
    #[derive(Clone, Copy, Debug)]
    pub struct OutType(pub Option<Type>);

    impl FromStr for OutType {
        type Err = String;

        fn from_str(text: &str) -> Result<OutType, String> {
            match text.eq_ignore_ascii_case("auto") {
                true => Ok(OutType(None)),
                false => parse(text).map(|ty| OutType(Some(ty))),
            }
        }
    }

    /// A type by name.
    pub fn parse(text: &str) -> Result<Type, String> {
        let found = Type::from_name(text).filter(|ty| ty.can_quantize());
        found.ok_or_else(|| {
            let names: Vec<_> = Type::all()
                .filter(|ty| ty.can_quantize())
                .map(Type::name)
                .collect();
            let hint = match mneme_convert::FileType::from_name(text) {
                Some(_) => format!("{text} is a mixture of types, for `mneme quantize`; "),
                None => String::new(),
            };
            format!("{hint}the types are {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(parse_size("4G"), Ok(4_000_000_000));
        assert_eq!(parse_size("500m"), Ok(500_000_000));
        assert_eq!(parse_size("12"), Ok(12));
        for bad in [
            "",
            "G",
            "-1",
            "0",
            "99999999999999999999",
            "4T",
            "1.5G",
            "é",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn types_are_read() {
        assert!("auto".parse::<OutType>().unwrap().0.is_none());
        assert_eq!("Q8_0".parse::<OutType>().unwrap().0.unwrap().name(), "q8_0");
        let error = "q4_k_m".parse::<OutType>().unwrap_err();
        assert!(error.contains("mixture"), "{error}");
        assert!("i32".parse::<OutType>().is_err());
    }
}
