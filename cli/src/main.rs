//! mneme: the command line.

use clap::{Parser, Subcommand};

mod eval;

#[derive(Parser)]
#[command(name = "mneme", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what a memory remembers.
    Eval(eval::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Eval(args) => eval::run(args),
    }
}
