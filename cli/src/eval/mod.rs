//! `mneme eval`: what a memory remembers, at what price.
//!
//! A text is generated (or read from a file), every arm, a memory with its dials, reads it and is
//! asked the same questions, and the report says how often each was right, where the facts lay
//! and how many bytes were held. docs/eval.md tells what each number means.

pub mod arm;
mod boundary;
mod budget;
mod jsonl;
mod plot;
pub mod prompt;
mod random;
pub mod records;
mod report;
mod ruler;
mod run;
pub mod sample;
pub mod score;
mod text;

use crate::report::write_text;
use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use mneme_engine::gguf::Gguf;
use mneme_engine::tokenizer::Tokenizer;
use serde_json::{Map, json};
use std::io::Write;
use std::path::PathBuf;
use text::Texts;

/// Arguments of `mneme eval`.
#[derive(Parser)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write texts with questions as JSONL, to be read here or elsewhere
    Generate(Box<Generate>),
    /// Ask a model with several memories the same questions, side by side
    Run(Box<run::Args>),
    /// List the tasks
    Tasks,
}

#[derive(Parser)]
struct Generate {
    #[command(flatten)]
    texts: Texts,
    /// Model whose tokens count for --length; words and punctuation marks count without one.
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// Where to write; standard output without it.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Generate(args) => generate(&args),
        Command::Run(args) => run::run(&args),
        Command::Tasks => {
            for (name, about) in records::tasks() {
                println!("{name:16} {about}");
            }
            for name in ruler::tasks() {
                println!("{name:16} in the shape of RULER's task of that name");
            }
            Ok(())
        }
    }
}

fn generate(args: &Generate) -> Result<()> {
    let tokenizer = match &args.model {
        None => None,
        Some(path) => {
            let gguf = Gguf::open(path)?;
            let of = || format!("the tokenizer of {}", path.display());
            Some(Tokenizer::from_gguf(&gguf).with_context(of)?)
        }
    };
    let count = |s: &str| match &tokenizer {
        Some(t) => t.encode(s, false, false).len(),
        None => text::count_words(s),
    };
    let mut out = String::new();
    for group in args.texts.groups() {
        for i in 0..args.texts.n() {
            let (sample, shape) = args.texts.sample(&group, i, &count)?;
            let mut extra = Map::new();
            extra.insert("seed".into(), json!(args.texts.seed_of(i)));
            if let Some(shape) = shape {
                extra.insert("n_facts".into(), json!(shape.n_facts));
                extra.insert("n_filler".into(), json!(shape.n_filler));
                extra.insert("n_questions".into(), json!(shape.n_questions));
            }
            for line in jsonl::write(&sample, &extra) {
                out.push_str(&line);
                out.push('\n');
            }
        }
    }
    match &args.output {
        Some(path) => write_text(path, &out),
        None => {
            (std::io::stdout().write_all(out.as_bytes())).context("cannot write to standard output")
        }
    }
}
