//! `mneme run`: goes on with a text.

use crate::args::{self, GrammarArgs, MemoryArgs, ModelArgs, SamplingArgs, parse_positive};
use crate::generate::{Limits, Speaker, Stop};
use crate::interrupt::{self, Interrupted};
use crate::saved::Saved;
use anyhow::{Context, Result, bail};
use mneme_engine::sampler::Sampler;
use mneme_engine::{Engine, Sequence};
use serde_json::json;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Arguments of `mneme run`.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  mneme run -m model.gguf -p \"Once upon a time\" -n 64\n  \
    mneme run -m model.gguf -f book.txt -n 100 --memory window:window=2048,sinks=4 --json\n  \
    mneme run -m model.gguf -p 'A cat as JSON: ' -j '{}' -n 100\n  \
    echo 'The capital of France is' | mneme run -m model.gguf -n 8 --temp 0\n  \
    mneme run -m model.gguf -f book.txt -n 0 --session book.session   # read once\n  \
    mneme run -m model.gguf -p ' The end' -n 50 --session book.session # and go on\n  \
    mneme run -m model.gguf --context law.txt --context case.txt -p 'Who wins?' # `concepts`"
)]
pub struct Args {
    /// Text to go on with; without -p and -f it is read from stdin
    #[arg(
        short,
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        conflicts_with = "file"
    )]
    prompt: Option<String>,
    /// File with the text (UTF-8), `-` for stdin
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// File that is read before the prompt (UTF-8), compressed where the memory is `concepts`; may be repeated
    #[arg(long, value_name = "FILE")]
    context: Vec<PathBuf>,
    /// Write out \n, \t, \" and the like in -p and -r
    #[arg(short, long)]
    escape: bool,
    /// Most tokens to say; -1 for no limit
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// Stop at this text; may be repeated
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    reverse_prompt: Vec<String>,
    /// Print the prompt too
    #[arg(long)]
    echo: bool,
    /// Print control tokens
    #[arg(long)]
    special: bool,
    /// Print one line of JSON with text and statistics instead of streaming
    #[arg(long)]
    json: bool,
    /// Go on from this file if it exists, and save there at the end
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Tokens read between two looks at Ctrl-C
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = parse_positive)]
    batch_size: usize,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    grammar: GrammarArgs,
}

impl Args {
    /// The prompt's text.
    fn text(&self) -> Result<String> {
        if let Some(text) = &self.prompt {
            return Ok(match self.escape {
                true => args::unescape(text),
                false => text.clone(),
            });
        }
        let mut text = match &self.file {
            Some(path) if path.as_os_str() != "-" => text_of(path)?,
            None if std::io::stdin().is_terminal() => return Ok(String::new()),
            _ => {
                let mut bytes = Vec::new();
                std::io::stdin()
                    .read_to_end(&mut bytes)
                    .context("reading stdin")?;
                utf8(bytes, "stdin")?
            }
        };
        // An editor's last newline is not part of the prompt, as in llama.cpp.
        if text.ends_with('\n') {
            text.pop();
        }
        Ok(text)
    }
}

/// A text file.
fn text_of(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    utf8(bytes, &path.display().to_string())
}

fn utf8(bytes: Vec<u8>, name: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        anyhow::anyhow!("{name}: not UTF-8 at byte {at}")
    })
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    interrupt::watch();
    let text = args.text()?;
    let contexts = args.context.iter().map(|path| text_of(path));
    let contexts = contexts.collect::<Result<Vec<String>>>()?;
    let params = args.sampling.params()?;
    args.session
        .iter()
        .try_for_each(|path| Saved::check(path))?;
    let start = Instant::now();
    let mut engine = args.model.load(args.memory.contexts())?;
    let load_seconds = start.elapsed().as_secs_f64();
    let model = engine.model.clone();
    let tokenizer = &model.tokenizer;
    let mut sampler = Sampler::new(&params, tokenizer)?;
    let n_ctx = args.memory.cells.options(&model)?.n_ctx;
    let resumed = args.session.as_ref().filter(|path| path.exists());
    let (mut seq, saved) = match resumed {
        Some(path) => {
            let asked = args.memory.memory.as_ref();
            Saved::load(&model, path, n_ctx, asked)?
        }
        None => (args.memory.sequence(&engine)?, Saved::default()),
    };
    if resumed.is_some() {
        saved.restore_sampler(&mut sampler, &seq);
    }
    let fresh = seq.n_past() == 0 && saved.pending.is_empty();
    let prompt = match &contexts[..] {
        [] => tokenizer.encode(&text, fresh, true),
        contexts => {
            let mut prompt = tokenizer.encode("", fresh, true);
            for context in contexts {
                prompt.extend(model.context_ids(seq.spec(), context));
            }
            prompt.extend(tokenizer.encode(&text, false, true));
            prompt
        }
    };
    if prompt.is_empty() && saved.pending.is_empty() {
        bail!("the prompt is empty: give -p TEXT, -f FILE or text on stdin");
    }
    let n_prompt = prompt.len() + saved.pending.len();
    // Other memories drop cells while they read; the engine says when even that is not enough.
    if seq.spec().name == "full" && seq.n_past() + n_prompt > n_ctx {
        bail!(
            "the prompt has {n_prompt} tokens and {} are held, the context has room for {n_ctx}: \
             give a larger -c, or a --memory that keeps less",
            seq.n_past()
        );
    }
    let stops: Vec<String> = args
        .reverse_prompt
        .iter()
        .map(|stop| match args.escape {
            true => args::unescape(stop),
            false => stop.clone(),
        })
        .collect();
    let limits = Limits {
        n_predict: usize::try_from(args.n_predict).ok(),
        stops: &stops,
        special: args.special,
    };
    let mut out = std::io::stdout().lock();
    let mut show = |text: &str| -> Result<()> {
        if !args.json && !text.is_empty() {
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    };
    let mut speaker = Speaker {
        engine: &mut engine,
        seq: &mut seq,
        sampler: &mut sampler,
        grammar: args.grammar.build(tokenizer)?,
        pending: saved.pending,
    };
    if args.echo {
        show(&text)?;
    }
    let start = Instant::now();
    let output = speaker.read(&prompt, args.batch_size)?;
    let prompt_seconds = start.elapsed().as_secs_f64();
    let answer = speaker.answer(output, &limits, &mut show)?;
    let pending = speaker.pending;
    if !args.json && args.n_predict != 0 && !answer.text.ends_with('\n') {
        show("\n")?;
    }
    if let Some(path) = &args.session {
        let saved = Saved {
            pending,
            sampler: sampler.save(),
            ..Saved::default()
        };
        saved.save(&seq, path)?;
    }
    if answer.stop == Stop::Context {
        eprintln!("the context is full: {n_ctx} cells (-c)");
    }
    let per_second = |n: usize, seconds: f64| match n {
        0 => 0.0,
        n => n as f64 / seconds.max(1e-9),
    };
    if args.json {
        let line = json!({
            "model": model.path.display().to_string(),
            "prompt": text,
            "text": answer.text,
            "tokens": answer.tokens,
            "stop": answer.stop,
            "n_prompt": n_prompt,
            "n_predicted": answer.tokens.len(),
            "seed": sampler.seed(),
            "timings": {
                "load_seconds": load_seconds,
                "prompt_seconds": prompt_seconds,
                "prompt_per_second": per_second(n_prompt, prompt_seconds),
                "predicted_seconds": answer.seconds,
                "predicted_per_second": per_second(answer.tokens.len(), answer.seconds),
            },
            "memory": memory_json(&seq, &engine),
        });
        writeln!(out, "{line}")?;
    } else if std::io::stderr().is_terminal() {
        eprintln!(
            "\n{n_prompt} tokens read at {:.1}/s, {} said at {:.1}/s",
            per_second(n_prompt, prompt_seconds),
            answer.tokens.len(),
            per_second(answer.tokens.len(), answer.seconds),
        );
    }
    match answer.stop {
        Stop::Interrupted => Err(Interrupted.into()),
        _ => Ok(()),
    }
}

/// What the memory holds, for programs.
fn memory_json(seq: &Sequence, engine: &Engine) -> serde_json::Value {
    let stats = seq.stats();
    let held = stats.cell_bytes + stats.state_bytes;
    let mut memory = json!({
        "spec": seq.spec().text,
        "stats": stats,
        "held_bytes": held,
        "full_bytes": stats.full_bytes,
        "nodes": seq.nodes(),
    });
    if stats.name == "concepts" {
        let (found, made) = engine.concepts.counts();
        memory["segments"] = json!({"from_cache": found, "compressed": made});
    }
    memory
}
