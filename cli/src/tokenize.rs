//! `mneme tokenize`: the tokens of a text.

use anyhow::{Context, Result, bail};
use mneme_engine::gguf::Gguf;
use mneme_engine::tokenizer::Tokenizer;
use serde_json::json;
use std::io::{self, Read, Write};
use std::path::PathBuf;

/// Arguments of `mneme tokenize`.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  mneme tokenize -m model.gguf -p \"Hello there\"\n  mneme tokenize -m model.gguf -f book.txt --json > book.json"
)]
pub struct Args {
    /// Model file (GGUF); only its vocabulary is read
    #[arg(short, long, value_name = "FILE", env = "MNEME_MODEL")]
    model: PathBuf,
    /// Text [default: stdin]
    #[arg(
        short,
        long,
        value_name = "TEXT",
        conflicts_with = "file",
        allow_hyphen_values = true
    )]
    prompt: Option<String>,
    /// Text from a file; `-` is stdin
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print the ids only, as a list
    #[arg(long, conflicts_with = "json")]
    ids: bool,
    /// Print JSON: ids and pieces (bytes where a piece is part of a character)
    #[arg(long)]
    json: bool,
    /// Do not add BOS and EOS, even if the model wants them
    #[arg(long)]
    no_bos: bool,
    /// Take special tokens in the text as ordinary text
    #[arg(long)]
    no_parse_special: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let gguf = Gguf::open(&args.model)?;
    let tokenizer =
        Tokenizer::from_gguf(&gguf).with_context(|| args.model.display().to_string())?;
    let text = text(args)?;
    let ids = tokenizer.encode(&text, !args.no_bos, !args.no_parse_special);
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.ids {
        writeln!(out, "{ids:?}")?;
    } else if args.json {
        let piece = |id: u32| match std::str::from_utf8(tokenizer.piece(id)) {
            Ok(text) => json!(text),
            Err(_) => json!(tokenizer.piece(id)),
        };
        let tokens: Vec<_> = (ids.iter())
            .map(|&id| json!({"id": id, "piece": piece(id)}))
            .collect();
        let all = json!({
            "model": args.model, "tokenizer": tokenizer.name(), "n_vocab": tokenizer.n_vocab(),
            "n_tokens": ids.len(), "tokens": tokens
        });
        writeln!(out, "{all}")?;
    } else {
        for &id in &ids {
            let piece = String::from_utf8_lossy(tokenizer.piece(id));
            writeln!(out, "{id:>7}  {piece:?}")?;
        }
    }
    out.flush()?;
    Ok(())
}

/// The text asked for.
fn text(args: &Args) -> Result<String> {
    let (name, bytes) = match (&args.prompt, &args.file) {
        (Some(text), _) => return Ok(text.clone()),
        (None, Some(path)) if path.as_os_str() != "-" => {
            let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
            (path.display().to_string(), bytes)
        }
        _ => {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes)?;
            ("stdin".to_string(), bytes)
        }
    };
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(e) => bail!("{name}: not UTF-8 at byte {}", e.utf8_error().valid_up_to()),
    }
}
