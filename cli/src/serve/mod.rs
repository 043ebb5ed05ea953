//! `mneme serve`: llama.cpp's server protocol, OpenAI's and Anthropic's, over one model.
//!
//! A request is parsed by the module of its API, becomes a [`generate::Generation`], and is handed
//! to the scheduler; JSON goes no further. Every route is a row of [`routes::ROUTES`], every flag
//! a row in [`args`], every generation field a row in [`fields`].

mod anthropic;
pub(crate) mod app;
pub(crate) mod args;
mod chat;
mod embed;
mod errors;
mod fields;
mod front;
mod generate;
mod http;
mod local;
mod metrics;
mod native;
mod openai;
mod openapi;
mod output;
mod predict;
mod prompt;
mod proxy;
mod responses;
pub(crate) mod routes;
mod slots;
mod tools;
mod ui;

use anyhow::{Context, Result, bail};
use app::App;
use front::Front;
use mneme_engine::chat::{ChatTemplate, NAMED_TEMPLATES};
use mneme_engine::embed::{Classifier, Pooling};
use mneme_engine::ops::{CELLS, Contexts};
use mneme_engine::scheduler::{Options, Scheduler, Totals};
use mneme_engine::{Engine, LoadOptions, Model, SequenceOptions};
use std::io::Write;
use std::sync::Arc;
use tokio::sync::watch;

/// Shown as `system_fingerprint` and `build_info`.
pub const BUILD_INFO: &str = concat!("b1-mneme-", env!("CARGO_PKG_VERSION"));

/// Flags, read by the server's own table (`mneme serve --help`).
#[derive(clap::Args, Clone, Debug)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// Flags of llama-server
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "FLAGS"
    )]
    flags: Vec<String>,
}

impl Args {
    /// Whether one of the flags asks for everything to be said.
    pub fn is_verbose(&self) -> bool {
        let asks = |flag: &String| ["-v", "--verbose", "--log-verbose"].contains(&flag.as_str());
        self.flags.iter().any(asks)
    }
}

/// Serves until a signal comes.
pub fn run(args: &Args) -> Result<()> {
    let mut args = args::Args::parse(&args.flags, |name| std::env::var(name).ok())?;
    args.verbose |= tracing::enabled!(tracing::Level::INFO);
    if let Some(text) = &args.print {
        print!("{text}");
        return Ok(());
    }
    let path = match (&args.model, &args.hf_repo) {
        (Some(path), _) => path.clone(),
        #[cfg(feature = "hf")]
        (None, Some(name)) => crate::hub::fetch(name)?,
        #[cfg(not(feature = "hf"))]
        (None, Some(name)) => bail!("-hf {name}: this mneme was built without the feature `hf`"),
        (None, None) => bail!("a model is needed: -m FILE or -hf USER/REPO"),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .context("starting the server's threads")?;
    let result = runtime.block_on(main(args, path));
    runtime.shutdown_background();
    result
}

async fn main(args: args::Args, path: std::path::PathBuf) -> Result<()> {
    let sockets = http::bind(&args).await?;
    for socket in &sockets {
        eprintln!("listening on {}", socket.address());
    }
    let idle = args.sleep_idle;
    let front = Arc::new(Front::new(args, path));
    let (stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(http::serve(sockets, http::router(&front), stopped.clone()));
    tokio::spawn(watch_signals(stop));
    let told = async move {
        let mut stopped = stopped;
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    tokio::select! {
        loaded = front.load() => loaded.context("loading the model")?,
        // Told to stop before there was anything to serve.
        () = told => return Ok(()),
    }
    if let Some(after) = idle {
        tokio::spawn(Arc::clone(&front).watch(after));
    }
    let _ = serving.await;
    front.end().await;
    Ok(())
}

/// The first SIGINT or SIGTERM asks to end, the second one ends.
async fn watch_signals(stop: watch::Sender<bool>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return;
    };
    let mut asked = false;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if asked {
            std::process::exit(130);
        }
        asked = true;
        let _ = stop.send(true);
    }
}

/// Loads the model and starts the thread that runs it, which counts on from `totals`.
pub(crate) fn load(
    args: args::Args,
    path: &std::path::Path,
    totals: Totals,
) -> Result<(App, std::thread::JoinHandle<()>)> {
    let n_threads = args
        .n_threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let (n_slots, unified) = args.slots();
    let n_total = match args.n_ctx {
        0 => CELLS,
        n => n,
    };
    let adapter = args.memory_adapter.as_deref();
    let contexts = Contexts {
        n: n_slots,
        n_cells: crate::args::most_cells(n_total.div_ceil(n_slots), args.memory.as_ref()),
        type_k: args.sequence.type_k,
        type_v: args.sequence.type_v,
        n_ubatch: args.n_ubatch,
        all_logits: false,
    };
    let ops = args.device.open(path, adapter, n_threads, contexts)?;
    let options = LoadOptions {
        memory_adapter: args.memory_adapter.clone(),
    };
    let model = Model::load(path, &options, &*ops, |_, _| {})
        .with_context(|| format!("loading {}", path.display()))?;
    let (template, tool_template) = templates(&args, &model)?;
    let memory = args
        .memory
        .clone()
        .unwrap_or_else(|| model.default_memory());
    let n_total = match args.n_ctx {
        0 => model.hparams().n_ctx_train,
        n => n,
    };
    let n_ctx = if unified { n_total } else { n_total / n_slots };
    if n_ctx < 8 {
        bail!(
            "--ctx-size {n_total}: {n_slots} slots would get {n_ctx} tokens each, at least 8 are needed"
        );
    }
    let sequence = SequenceOptions {
        n_ctx,
        ..args.sequence
    };
    let concepts = crate::args::concept_cache(args.concept_cache.as_deref(), &model)?;
    let mut engine = Engine::new(Arc::clone(&model), ops, args.n_ubatch);
    engine.concepts = concepts;
    let (scheduler, handle) = Scheduler::new(
        engine,
        Options {
            n_slots,
            n_ctx,
            pool: unified.then_some(n_total),
            n_batch: args.n_batch,
            sequence,
            memory: memory.clone(),
            similarity: args.similarity,
            max_waiting: args.max_waiting,
            context_shift: args.context_shift,
            cache_bytes: args.cache_bytes,
            cache_idle: args.cache_idle,
            totals,
        },
    )?;
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            let run = std::panic::AssertUnwindSafe(|| scheduler.run());
            if std::panic::catch_unwind(run).is_err() {
                // Without it nothing can be answered; a supervisor will start us anew.
                let _ = writeln!(std::io::stderr(), "error: the engine's thread failed");
                std::process::exit(1);
            }
        })
        .context("starting the engine's thread")?;
    // Broken server-wide defaults are found now, not by the first client.
    fields::Settings::read(&serde_json::json!({}), &args.defaults, &model.tokenizer)
        .map_err(|e| anyhow::anyhow!(e.message))?;
    let classifier = Classifier::of_model(&model.weights)?;
    let pooling = match (args.reranking, args.pooling) {
        (true, _) => Pooling::Rank,
        (false, Some(pooling)) => pooling,
        (false, None) => Pooling::of_model(model.gguf(), model.hparams())?.unwrap_or(Pooling::Last),
    };
    if pooling == Pooling::Rank && args.embeddings && classifier.is_none() {
        bail!(
            "--reranking: {} has no classifier (tensor `cls.output.weight`)",
            path.display()
        );
    }
    let app = App {
        args,
        model,
        template,
        tool_template,
        handle,
        n_slots,
        n_ctx,
        memory,
        pooling,
        classifier,
        grammar_vocab: std::sync::OnceLock::new(),
    };
    Ok((app, thread))
}

/// The chat template of the flags, else of the model; and the model's own for tools.
fn templates(args: &args::Args, model: &Model) -> Result<(ChatTemplate, Option<ChatTemplate>)> {
    if let Some(path) = &args.chat_template_file {
        let source = std::fs::read_to_string(path)
            .with_context(|| format!("--chat-template-file {}", path.display()))?;
        return Ok((ChatTemplate::new(&source)?, None));
    }
    if let Some(text) = &args.chat_template {
        let known = NAMED_TEMPLATES.iter().any(|row| row.0 == text);
        let template = match known {
            true => ChatTemplate::named(text)?,
            false => ChatTemplate::new(text)?,
        };
        return Ok((template, None));
    }
    let broken = |e: mneme_engine::chat::Error| {
        // A model is still useful for completions when its template is not.
        let _ = writeln!(std::io::stderr(), "warning: {e}; using chatml instead");
        ChatTemplate::named("chatml")
    };
    let template = ChatTemplate::from_gguf(model.gguf()).or_else(broken)?;
    let tool_template = ChatTemplate::tool_use_from_gguf(model.gguf()).unwrap_or(None);
    Ok((template, tool_template))
}
