//! `mneme`: language models with a compressed long-context memory, from the command line.
//!
//! One file per command. Flags that several commands share are in [`args`]; everything that
//! computes is in the engine.

mod args;
mod bench;
mod bytes;
mod chat;
mod convert;
mod demo;
mod device;
mod eval;
mod generate;
#[cfg(feature = "hf")]
mod hub;
mod inspect;
mod interrupt;
mod logits;
mod npy;
mod perplexity;
mod plots;
mod progress;
mod quantize;
mod report;
mod run;
mod saved;
mod segments;
mod serve;
mod tokenize;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

/// Run language models with a context of any length in memory of a chosen size.
#[derive(Parser)]
#[command(name = "mneme", version, propagate_version = true, subcommand_required = true,
    arg_required_else_help = true, max_term_width = 100,
    after_help = args::memory_help(), after_long_help = long_help())]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more on stderr; twice for everything
    #[arg(short = 'v', long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// No wider instruction set than this, of avx2, avx-vnni, avx512, amx, neon, scalar: to compare
    #[arg(long, value_name = "NAME", global = true, hide_short_help = true)]
    isa: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Go on with a text: from -p, a file or stdin
    Run(run::Args),
    /// Talk with a model, with line editing, sessions and a look into its memory
    Chat(chat::Args),
    /// Serve a model over HTTP: llama.cpp's protocol, OpenAI's and Anthropic's
    Serve(serve::Args),
    /// Bring a Hugging Face checkpoint or a memory into GGUF
    Convert(convert::Args),
    /// Write a GGUF in another type
    Quantize(quantize::Args),
    /// How well the model predicts a text, over all of it and by position
    Perplexity(perplexity::Args),
    /// Tokens per second at depths of context, for each memory
    Bench(bench::Args),
    /// A long document, what each memory remembers of it, and your own questions
    Demo(demo::Args),
    /// What each memory remembers of a text, side by side
    Eval(eval::Args),
    /// What a GGUF file holds, and the memory it will take
    Inspect(inspect::Args),
    /// The tokens of a text
    Tokenize(tokenize::Args),
    /// Logits of given token ids, as a NumPy file, to compare with other programs
    Logits(logits::Args),
}

impl Command {
    fn run(self) -> anyhow::Result<()> {
        match self {
            Command::Run(args) => run::run(&args),
            Command::Chat(args) => chat::run(&args),
            Command::Serve(args) => serve::run(&args),
            Command::Convert(args) => convert::run(&args),
            Command::Quantize(args) => quantize::run(&args),
            Command::Perplexity(args) => perplexity::run(&args),
            Command::Bench(args) => bench::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Eval(args) => eval::run(args),
            Command::Inspect(args) => inspect::run(&args),
            Command::Tokenize(args) => tokenize::run(&args),
            Command::Logits(args) => logits::run(&args),
        }
    }
}

fn long_help() -> String {
    format!(
        "Examples:\n  \
         mneme run -m model.gguf -p \"Once upon a time\" -n 64\n  \
         mneme chat -m model.gguf --memory window:window=4096,sinks=4\n  \
         mneme chat -hf Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0\n  \
         mneme convert path/to/hf-model -o model.gguf && mneme quantize model.gguf q4_k_m.gguf Q4_K_M\n  \
         mneme serve -m model.gguf --port 8080\n  \
         mneme bench -m model.gguf -d 0,4096,16384 --memory full --memory nodes\n\n{}",
        args::memory_help()
    )
}

fn main() -> ExitCode {
    let args = args::llama_flags(std::env::args_os().collect::<Vec<OsString>>());
    let matches = match Cli::command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(e) => {
            // A reader that closed the pipe (`mneme --help | head`) is no error.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    if let Some(name) = &cli.isa
        && let Err(e) = mneme_kernels::dispatch::limit(name)
    {
        let e = Cli::command().error(clap::error::ErrorKind::InvalidValue, format!("--isa: {e}"));
        let _ = e.print();
        return ExitCode::from(2);
    }
    let level = match cli.verbose {
        _ if matches!(&cli.command, Command::Serve(args) if args.is_verbose()) => {
            tracing::Level::DEBUG
        }
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .without_time()
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .init();
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is::<interrupt::Interrupted>() => ExitCode::from(interrupt::exit_code()),
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(io::stderr(), "error: {}", one_line(&e));
            ExitCode::FAILURE
        }
    }
}

/// Whether somebody stopped reading what we write, as `head` does.
fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// The error and its causes, each once: some errors already quote the one below them.
fn one_line(e: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in e.chain() {
        let cause = cause.to_string();
        if line.ends_with(&cause) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&cause);
    }
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn causes_are_told_once() {
        let io = io::Error::other("disk on fire");
        let e = anyhow::Error::new(io).context("a.gguf: disk on fire");
        assert_eq!(one_line(&e), "a.gguf: disk on fire");
        let e = anyhow::anyhow!("inner").context("outer");
        assert_eq!(one_line(&e), "outer: inner");
    }
}
