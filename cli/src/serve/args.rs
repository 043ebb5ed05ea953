//! Flags of the server: llama-server's, from one table, and ours for memories.
//!
//! Every flag that takes a value is also read from the environment (`LLAMA_ARG_...`); the command
//! line wins. In long flags `_` means `-`.

use super::proxy::listens_here_only;
use super::routes::ROUTES;
use super::tools::{self, mcp};
use crate::device::{DeviceArgs, parse_layers};
use anyhow::{Context, Result, anyhow, bail};
use mneme_engine::SequenceOptions;
use mneme_engine::embed::{POOLINGS, Pooling};
use mneme_engine::memory::MEMORIES;
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::sequence::{KV_TYPES, kv_type};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// What a flag takes.
#[derive(Clone, Copy, PartialEq)]
enum Takes {
    /// Nothing.
    Nothing,
    /// A value.
    Value,
    /// A value or nothing (`-fa`).
    Maybe,
}

use Takes::{Maybe, Nothing, Value as Text};

type Set = fn(&mut Args, &str) -> Result<()>;

/// One flag.
struct Flag {
    names: &'static [&'static str],
    takes: Takes,
    /// Environment variable without `LLAMA_ARG_`; empty for none.
    env: &'static str,
    /// Shown by `--help`; empty for flags that are accepted and have no meaning here.
    help: &'static str,
    set: Set,
}

const fn flag(
    names: &'static [&'static str],
    takes: Takes,
    env: &'static str,
    help: &'static str,
    set: Set,
) -> Flag {
    Flag {
        names,
        takes,
        env,
        help,
        set,
    }
}

/// Everything the server can be told.
#[derive(Clone, Debug)]
pub struct Args {
    pub model: Option<PathBuf>,
    pub hf_repo: Option<String>,
    pub memory_adapter: Option<PathBuf>,
    pub memory: Option<MemorySpec>,
    pub concept_cache: Option<String>,
    pub aliases: Vec<String>,
    pub tags: Vec<String>,
    pub n_ctx: usize,
    pub n_parallel: Option<usize>,
    pub kv_unified: Option<bool>,
    pub n_batch: usize,
    pub n_ubatch: usize,
    pub n_threads: Option<usize>,
    pub device: DeviceArgs,
    pub sequence: SequenceOptions,
    pub hosts: Vec<String>,
    pub port: u16,
    pub api_prefix: String,
    pub ssl_key_file: Option<PathBuf>,
    pub ssl_cert_file: Option<PathBuf>,
    pub api_keys: Vec<String>,
    pub timeout: Duration,
    /// Empty for what suits the other flags.
    pub cors_origins: String,
    pub cors_methods: String,
    pub cors_headers: String,
    pub cors_credentials: bool,
    pub ping_interval: i64,
    pub max_waiting: usize,
    pub max_body: usize,
    pub chat_template: Option<String>,
    pub chat_template_file: Option<PathBuf>,
    pub chat_template_kwargs: Map<String, Value>,
    pub jinja: bool,
    pub prefill_assistant: bool,
    pub reasoning_format: String,
    pub reasoning: String,
    pub endpoint_slots: bool,
    pub endpoint_props: bool,
    pub endpoint_metrics: bool,
    pub embeddings: bool,
    pub reranking: bool,
    pub pooling: Option<Pooling>,
    pub embd_normalize: i32,
    pub slot_save_path: Option<PathBuf>,
    pub similarity: f32,
    pub context_shift: bool,
    /// Most bytes of prompts that have left their slots; `None` for no limit.
    pub cache_bytes: Option<usize>,
    pub cache_idle: bool,
    /// The model is let go when nobody has used it for so long.
    pub sleep_idle: Option<Duration>,
    pub ui: bool,
    /// Whether pages may have other addresses fetched.
    pub proxy: bool,
    /// Tools that are run here.
    pub tools: Vec<String>,
    pub mcp_servers: Vec<mcp::Config>,
    /// Route of Vertex AI's prediction protocol.
    pub predict_route: Option<String>,
    pub verbose: bool,
    /// Server-wide values of the fields of a request, by their names there.
    pub defaults: Map<String, Value>,
    /// What to print instead of serving.
    pub print: Option<String>,
}

impl Default for Args {
    fn default() -> Args {
        Args {
            model: None,
            hf_repo: None,
            memory_adapter: None,
            memory: None,
            concept_cache: None,
            aliases: Vec::new(),
            tags: Vec::new(),
            n_ctx: 0,
            n_parallel: None,
            kv_unified: None,
            n_batch: 2048,
            n_ubatch: 0,
            n_threads: None,
            device: DeviceArgs::default(),
            sequence: SequenceOptions::default(),
            hosts: vec!["127.0.0.1".into()],
            port: 8080,
            api_prefix: String::new(),
            ssl_key_file: None,
            ssl_cert_file: None,
            api_keys: Vec::new(),
            timeout: Duration::from_secs(3600),
            cors_origins: String::new(),
            cors_methods: "GET, POST, DELETE, OPTIONS".into(),
            cors_headers: "*".into(),
            cors_credentials: true,
            ping_interval: 30,
            max_waiting: 1024,
            max_body: 64 << 20,
            chat_template: None,
            chat_template_file: None,
            chat_template_kwargs: Map::new(),
            jinja: true,
            prefill_assistant: true,
            reasoning_format: "deepseek".into(),
            reasoning: "auto".into(),
            endpoint_slots: true,
            endpoint_props: false,
            endpoint_metrics: false,
            embeddings: false,
            reranking: false,
            pooling: None,
            embd_normalize: 2,
            slot_save_path: None,
            similarity: 0.1,
            context_shift: false,
            cache_bytes: Some(8192 << 20),
            cache_idle: true,
            sleep_idle: None,
            ui: true,
            proxy: false,
            tools: Vec::new(),
            mcp_servers: Vec::new(),
            predict_route: None,
            verbose: false,
            defaults: Map::new(),
            print: None,
        }
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T> {
    (text.trim().parse()).map_err(|_| anyhow!("expected a number, got `{text}`"))
}

fn positive(text: &str) -> Result<usize> {
    match number(text)? {
        0 => bail!("expected at least 1"),
        n => Ok(n),
    }
}

fn list(text: &str) -> Vec<String> {
    let parts = text.split(',').map(str::trim).filter(|s| !s.is_empty());
    parts.map(String::from).collect()
}

/// Sets a default of the request field `name`, as the JSON value it looks like, else as text.
fn field(args: &mut Args, name: &str, text: &str) -> Result<()> {
    let value = serde_json::from_str(text).unwrap_or_else(|_| text.into());
    args.defaults.insert(name.into(), value);
    Ok(())
}

fn numeric(args: &mut Args, name: &str, text: &str) -> Result<()> {
    let x: f64 = number(text)?;
    if !x.is_finite() {
        bail!("expected a finite number, got `{text}`");
    }
    args.defaults.insert(
        name.into(),
        match x.fract() == 0.0 && x.abs() < 1e15 {
            true => json!(x as i64),
            false => json!(x),
        },
    );
    Ok(())
}

fn ignore(_: &mut Args, _: &str) -> Result<()> {
    Ok(())
}

fn bias(args: &mut Args, text: &str) -> Result<()> {
    let at = text.find(['+', '-']).filter(|at| *at > 0);
    let at = at.with_context(|| format!("expected ID+BIAS or ID-BIAS, got `{text}`"))?;
    let (id, bias): (u32, f64) = (number(&text[..at])?, number(&text[at..])?);
    let all = args.defaults.entry("logit_bias").or_insert(json!([]));
    if let Some(all) = all.as_array_mut() {
        all.push(json!([id, bias]));
    }
    Ok(())
}

fn stop(args: &mut Args, text: &str) -> Result<()> {
    let all = args.defaults.entry("stop").or_insert(json!([]));
    if let Some(all) = all.as_array_mut() {
        all.push(text.into());
    }
    Ok(())
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.to_string())
}

macro_rules! put {
    ($field:ident = $value:expr) => {
        |args, _| {
            args.$field = $value;
            Ok(())
        }
    };
    ($field:ident <- $parse:expr) => {
        |args, text| {
            args.$field = $parse(text)?;
            Ok(())
        }
    };
}

macro_rules! num {
    ($name:literal) => {
        |args, text| numeric(args, $name, text)
    };
}

fn some_path(text: &str) -> Result<Option<PathBuf>> {
    Ok(Some(text.into()))
}

fn text(text: &str) -> Result<String> {
    Ok(text.into())
}

/// Every flag.
#[rustfmt::skip]
const FLAGS: &[Flag] = &[
    flag(&["-h", "--help", "--usage"], Nothing, "", "print this and exit", |args, _| { args.print = Some(help()); Ok(()) }),
    flag(&["--version"], Nothing, "", "print the version and exit", |args, _| { args.print = Some(format!("version: {}\n", super::BUILD_INFO)); Ok(()) }),
    // Model.
    flag(&["-m", "--model"], Text, "MODEL", "FILE  model (GGUF; of a split file, the first part)", put!(model <- some_path)),
    flag(&["-hf", "-hfr", "--hf-repo"], Text, "HF_REPO", "USER/REPO[:QUANT]  model from the Hugging Face hub, downloaded once", |args, v| { args.hf_repo = Some(v.into()); Ok(()) }),
    flag(&["--memory-adapter"], Text, "MEMORY_ADAPTER", "FILE  trained memory to lay over the model (GGUF adapter)", put!(memory_adapter <- some_path)),
    flag(&["--memory"], Text, "MEMORY", "NAME[:key=value,...]  memory of every slot; a request may ask for another", |args, v| { args.memory = Some(v.parse()?); Ok(()) }),
    flag(&["--concept-cache"], Text, "CONCEPT_CACHE", "PLACE  where compressed contexts are kept for the next time: a folder, redis://HOST:PORT/DB, or none", |args, v| { args.concept_cache = Some(v.into()); Ok(()) }),
    flag(&["-a", "--alias"], Text, "ALIAS", "NAMES  names of the model for clients, comma separated", |args, v| { args.aliases = list(v); args.aliases.sort(); args.aliases.dedup(); Ok(()) }),
    flag(&["--tags"], Text, "TAGS", "TAGS  shown with the model, comma separated", |args, v| { args.tags = list(v); Ok(()) }),
    flag(&["-c", "--ctx-size"], Text, "CTX_SIZE", "N  context in tokens, shared by the slots; 0 for the model's own", put!(n_ctx <- number)),
    flag(&["-np", "--parallel"], Text, "N_PARALLEL", "N  slots; without it 4 that share one pool of cells", |args, v| {
        args.n_parallel = match number::<i64>(v)? { n if n > 0 => Some(n as usize), _ => None };
        Ok(())
    }),
    flag(&["-kvu", "--kv-unified"], Nothing, "KV_UNIFIED", "all slots share the whole context", put!(kv_unified = Some(true))),
    flag(&["-no-kvu", "--no-kv-unified"], Nothing, "", "every slot has an equal part of the context", put!(kv_unified = Some(false))),
    flag(&["-b", "--batch-size"], Text, "BATCH", "N  most prompt tokens read at a time (2048)", put!(n_batch <- positive)),
    flag(&["-ub", "--ubatch-size"], Text, "UBATCH", "N  most rows computed in one pass (512; on a GPU 2048)", put!(n_ubatch <- positive)),
    flag(&["-t", "--threads"], Text, "THREADS", "N  threads; without it one per core", |args, v| {
        args.n_threads = match number::<i64>(v)? { n if n > 0 => Some(n as usize), _ => None };
        Ok(())
    }),
    flag(&["-dev", "--device"], Text, "DEVICE", "DEVICE  auto, cpu, cuda or cuda:N (auto: the first GPU there is)", |args, v| { args.device.device = v.parse()?; Ok(()) }),
    flag(&["-ngl", "--gpu-layers", "--n-gpu-layers"], Text, "N_GPU_LAYERS", "N  layers on the GPU, the last ones and the head; the CPU runs the others. 0: none, all: all, auto: as many as fit (auto)", |args, v| {
        args.device.n_gpu_layers = Some(parse_layers(v).map_err(|e| anyhow!(e))?);
        Ok(())
    }),
    flag(&["-ctk", "--cache-type-k"], Text, "CACHE_TYPE_K", "TYPE  keys: f32 f16 bf16 q8_0 (f16)", |args, v| { args.sequence.type_k = cache_type(v)?; Ok(()) }),
    flag(&["-ctv", "--cache-type-v"], Text, "CACHE_TYPE_V", "TYPE  values: f32 f16 bf16 q8_0 (f16)", |args, v| { args.sequence.type_v = cache_type(v)?; Ok(()) }),
    // Server.
    flag(&["--host"], Text, "HOST", "ADDRESSES  where to listen, comma separated; PATH.sock for a Unix socket (127.0.0.1)", |args, v| { args.hosts = list(v); Ok(()) }),
    flag(&["--port"], Text, "PORT", "N  port (8080)", put!(port <- number)),
    flag(&["--api-prefix"], Text, "API_PREFIX", "/PATH  put every route below this", |args, v| { args.api_prefix = v.trim_end_matches('/').into(); Ok(()) }),
    flag(&["--ssl-key-file"], Text, "SSL_KEY_FILE", "FILE  private key (PEM); with --ssl-cert-file the server speaks https", put!(ssl_key_file <- some_path)),
    flag(&["--ssl-cert-file"], Text, "SSL_CERT_FILE", "FILE  certificate and what it rests on (PEM)", put!(ssl_cert_file <- some_path)),
    flag(&["--api-key"], Text, "API_KEY", "KEYS  keys that clients must show, comma separated", |args, v| { args.api_keys.extend(list(v)); Ok(()) }),
    flag(&["--api-key-file"], Text, "API_KEY_FILE", "FILE  the same, one per line", |args, v| {
        args.api_keys.extend(read(v)?.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from));
        Ok(())
    }),
    flag(&["-to", "--timeout"], Text, "TIMEOUT", "SECONDS  a request body may take this long (3600)", |args, v| { args.timeout = Duration::from_secs(number(v)?); Ok(()) }),
    flag(&["--cors-origins"], Text, "CORS_ORIGINS", "ORIGINS  origins that may read replies; * for all, localhost for loopback ones", put!(cors_origins <- text)),
    flag(&["--cors-methods"], Text, "CORS_METHODS", "METHODS  methods that pages may use", put!(cors_methods <- text)),
    flag(&["--cors-headers"], Text, "CORS_HEADERS", "HEADERS  headers that pages may send", put!(cors_headers <- text)),
    flag(&["--no-cors-credentials"], Nothing, "", "pages may not send credentials", put!(cors_credentials = false)),
    flag(&["--sse-ping-interval"], Text, "SSE_PING_INTERVAL", "SECONDS  a stream that says nothing for this long gets a comment; -1 off (30)", put!(ping_interval <- number)),
    flag(&["--max-waiting"], Text, "MAX_WAITING", "N  requests that may wait for a slot; more get status 503 (1024)", put!(max_waiting <- positive)),
    flag(&["--max-body"], Text, "MAX_BODY", "MIB  largest request body; larger ones get status 413 (64)", |args, v| { args.max_body = positive(v)?.saturating_mul(1 << 20); Ok(()) }),
    flag(&["--slots"], Nothing, "ENDPOINT_SLOTS", "GET /slots works (default)", put!(endpoint_slots = true)),
    flag(&["--no-slots"], Nothing, "", "GET /slots answers 501", put!(endpoint_slots = false)),
    flag(&["--props"], Nothing, "ENDPOINT_PROPS", "POST /props works", put!(endpoint_props = true)),
    flag(&["--metrics"], Nothing, "ENDPOINT_METRICS", "GET /metrics works", put!(endpoint_metrics = true)),
    flag(&["--embedding", "--embeddings"], Nothing, "EMBEDDINGS", "POST /v1/embeddings and /embedding work", put!(embeddings = true)),
    flag(&["--pooling"], Text, "POOLING", "none|mean|cls|last|rank  how tokens become an embedding (the model's own, else last)", |args, v| {
        args.pooling = Some(Pooling::named(v).with_context(|| {
            let known: Vec<_> = POOLINGS.iter().map(|p| p.0).collect();
            format!("expected one of {}, got `{v}`", known.join(", "))
        })?);
        Ok(())
    }),
    flag(&["--embd-normalize"], Text, "", "N  length of embeddings: -1 as they are, 0 largest component 32760, 2 Euclidean 1, else p-norm 1 (2)", put!(embd_normalize <- number)),
    flag(&["--rerank", "--reranking"], Nothing, "RERANKING", "POST /rerank works, for models with a classifier", |args, _| { args.reranking = true; args.embeddings = true; Ok(()) }),
    flag(&["--slot-save-path"], Text, "SLOT_SAVE_PATH", "DIR  slots can be saved to and restored from files in this folder", put!(slot_save_path <- some_path)),
    flag(&["-sps", "--slot-prompt-similarity"], Text, "", "X  a slot is chosen for its past when it holds this share of the prompt (0.1)", put!(similarity <- number)),
    flag(&["--context-shift"], Nothing, "CONTEXT_SHIFT", "a full slot forgets its oldest text instead of ending the answer", put!(context_shift = true)),
    flag(&["--no-context-shift"], Nothing, "NO_CONTEXT_SHIFT", "the answer ends when the slot is full (default)", put!(context_shift = false)),
    flag(&["--sleep-idle-seconds"], Text, "SLEEP_IDLE_SECONDS", "N  let the model go when nobody has used it for so long, load it again for the next request; -1 off (-1)", |args, v| {
        args.sleep_idle = match number::<i64>(v)? {
            -1 => None,
            n if n > 0 => Some(Duration::from_secs(n as u64)),
            _ => bail!("expected a positive number of seconds, or -1, got `{v}`"),
        };
        Ok(())
    }),
    flag(&["--no-ui", "--no-webui"], Nothing, "NO_WEBUI", "no page at /", put!(ui = false)),
    flag(&["--ui", "--webui"], Nothing, "WEBUI", "a page at / (default)", put!(ui = true)),
    flag(&["-v", "--verbose", "--log-verbose"], Nothing, "", "say more; replies carry `__verbose`", put!(verbose = true)),
    // Templates.
    flag(&["--jinja"], Nothing, "JINJA", "use the model's own chat template (default)", put!(jinja = true)),
    flag(&["--no-jinja"], Nothing, "", "no tools in chats", put!(jinja = false)),
    flag(&["--chat-template"], Text, "CHAT_TEMPLATE", "NAME|TEXT  chat template, built in by name or written out", |args, v| { args.chat_template = Some(v.into()); Ok(()) }),
    flag(&["--chat-template-file"], Text, "CHAT_TEMPLATE_FILE", "FILE  chat template", put!(chat_template_file <- some_path)),
    flag(&["--chat-template-kwargs"], Text, "CHAT_TEMPLATE_KWARGS", "JSON  further variables for the template", |args, v| {
        args.chat_template_kwargs = serde_json::from_str(v).context("expected a JSON object")?;
        Ok(())
    }),
    flag(&["--prefill-assistant"], Nothing, "PREFILL_ASSISTANT", "a last message of the assistant is continued (default)", put!(prefill_assistant = true)),
    flag(&["--no-prefill-assistant"], Nothing, "NO_PREFILL_ASSISTANT", "it is a message like any other", put!(prefill_assistant = false)),
    flag(&["--reasoning-format"], Text, "THINK", "none|deepseek|deepseek-legacy|auto  where thoughts go (deepseek: reasoning_content)", put!(reasoning_format <- text)),
    flag(&["-rea", "--reasoning"], Text, "REASONING", "on|off|auto  whether the template asks for thoughts", put!(reasoning <- text)),
    flag(&["--reasoning-budget"], Text, "THINK_BUDGET", "N  0 for no thoughts, -1 for any", |args, v| { if number::<i64>(v)? == 0 { args.reasoning = "off".into(); } Ok(()) }),
    // Defaults of request fields.
    flag(&["-n", "--predict", "--n-predict"], Text, "N_PREDICT", "N  most tokens of an answer; -1 for no limit", num!("n_predict")),
    flag(&["-s", "--seed"], Text, "SEED", "N  seed; -1 for a new one each time", num!("seed")),
    flag(&["--temp", "--temperature"], Text, "TEMP", "X  temperature (0.8)", num!("temperature")),
    flag(&["--top-k"], Text, "TOP_K", "N  (40)", num!("top_k")),
    flag(&["--top-p"], Text, "TOP_P", "X  (0.95)", num!("top_p")),
    flag(&["--min-p"], Text, "MIN_P", "X  (0.05)", num!("min_p")),
    flag(&["--top-nsigma", "--top-n-sigma"], Text, "TOP_NSIGMA", "X  (-1: off)", num!("top_n_sigma")),
    flag(&["--xtc-probability"], Text, "XTC_PROBABILITY", "X  (0)", num!("xtc_probability")),
    flag(&["--xtc-threshold"], Text, "XTC_THRESHOLD", "X  (0.1)", num!("xtc_threshold")),
    flag(&["--typical", "--typical-p"], Text, "TYPICAL", "X  (1)", num!("typical_p")),
    flag(&["--repeat-last-n"], Text, "REPEAT_LAST_N", "N  (64)", num!("repeat_last_n")),
    flag(&["--repeat-penalty"], Text, "REPEAT_PENALTY", "X  (1)", num!("repeat_penalty")),
    flag(&["--presence-penalty"], Text, "PRESENCE_PENALTY", "X  (0)", num!("presence_penalty")),
    flag(&["--frequency-penalty"], Text, "FREQUENCY_PENALTY", "X  (0)", num!("frequency_penalty")),
    flag(&["--dry-multiplier"], Text, "DRY_MULTIPLIER", "X  (0)", num!("dry_multiplier")),
    flag(&["--dry-base"], Text, "DRY_BASE", "X  (1.75)", num!("dry_base")),
    flag(&["--dry-allowed-length"], Text, "DRY_ALLOWED_LENGTH", "N  (2)", num!("dry_allowed_length")),
    flag(&["--dry-penalty-last-n"], Text, "DRY_PENALTY_LAST_N", "N  (64)", num!("dry_penalty_last_n")),
    flag(&["--dynatemp-range"], Text, "DYNATEMP_RANGE", "X  (0)", num!("dynatemp_range")),
    flag(&["--dynatemp-exp"], Text, "DYNATEMP_EXP", "X  (1)", num!("dynatemp_exponent")),
    flag(&["--mirostat"], Text, "MIROSTAT", "0|1|2  (0)", num!("mirostat")),
    flag(&["--mirostat-lr"], Text, "MIROSTAT_LR", "X  (0.1)", num!("mirostat_eta")),
    flag(&["--mirostat-ent"], Text, "MIROSTAT_ENT", "X  (5)", num!("mirostat_tau")),
    flag(&["--keep"], Text, "KEEP", "N  prompt tokens that a context shift keeps", num!("n_keep")),
    flag(&["--samplers"], Text, "SAMPLERS", "NAMES  order of the filters, separated by ;", |args, v| { args.defaults.insert("samplers".into(), v.split(';').collect::<Vec<_>>().into()); Ok(()) }),
    flag(&["--sampling-seq", "--sampler-seq"], Text, "SAMPLER_SEQ", "LETTERS  the same, by letters (edskypmxt)", |args, v| { args.defaults.insert("samplers".into(), v.into()); Ok(()) }),
    flag(&["--ignore-eos"], Nothing, "IGNORE_EOS", "never end by a token of the model", |args, _| { args.defaults.insert("ignore_eos".into(), true.into()); Ok(()) }),
    flag(&["-l", "--logit-bias"], Text, "LOGIT_BIAS", "ID+BIAS|ID-BIAS  (may repeat)", bias),
    flag(&["-r", "--reverse-prompt"], Text, "REVERSE_PROMPT", "TEXT  stop string (may repeat)", stop),
    flag(&["--grammar"], Text, "GRAMMAR", "GBNF  language of every answer", |args, v| { args.defaults.insert("grammar".into(), v.into()); Ok(()) }),
    flag(&["--grammar-file"], Text, "GRAMMAR_FILE", "FILE  the same", |args, v| { args.defaults.insert("grammar".into(), read(v)?.into()); Ok(()) }),
    flag(&["-j", "--json-schema"], Text, "JSON_SCHEMA", "JSON  schema of every answer", |args, v| field(args, "json_schema", v)),
    flag(&["-jf", "--json-schema-file"], Text, "JSON_SCHEMA_FILE", "FILE  the same", |args, v| field(args, "json_schema", &read(v)?)),
    flag(&["--cache-prompt"], Nothing, "CACHE_PROMPT", "use again what a slot already holds of a prompt (default)", |args, _| { args.defaults.insert("cache_prompt".into(), true.into()); Ok(()) }),
    flag(&["--no-cache-prompt"], Nothing, "NO_CACHE_PROMPT", "read every prompt anew", |args, _| { args.defaults.insert("cache_prompt".into(), false.into()); Ok(()) }),
    flag(&["-cram", "--cache-ram"], Text, "CACHE_RAM", "MIB  host memory for prompts that have left their slots: 0 for none, -1 for no limit (8192)", |args, v| {
        args.cache_bytes = match number::<i64>(v)? {
            -1 => None,
            n => Some(usize::try_from(n).map_err(|_| anyhow!("expected a number of MiB, or -1, got `{v}`"))?.saturating_mul(1 << 20)),
        };
        Ok(())
    }),
    flag(&["--cache-idle-slots"], Nothing, "CACHE_IDLE_SLOTS", "slots that share one pool are put into that memory as soon as another one starts (default)", put!(cache_idle = true)),
    flag(&["--no-cache-idle-slots"], Nothing, "NO_CACHE_IDLE_SLOTS", "only when their cells are needed", put!(cache_idle = false)),
    // Accepted for llama-server's sake: nothing here depends on them.
    flag(&["-cb", "--cont-batching", "-nocb", "--no-cont-batching", "--offline", "--no-warmup", "--warmup", "--mlock",
        "--no-mmap", "--mmap", "--perf", "--no-perf", "--swa-full", "--check-tensors", "--log-disable", "--log-prefix",
        "--log-timestamps", "--no-log-prefix", "--no-log-timestamps", "-kvo", "--kv-offload", "-nkvo", "--no-kv-offload",
        "--repack", "-nr", "--no-repack", "--no-host", "-cmoe", "--cpu-moe",
        "--verbose-prompt", "--backend-sampling", "--no-models-autoload", "--models-autoload",
        "--no-mmproj", "--escape", "-e", "--no-escape", "--special", "-sp", "--spm-infill", "--skip-chat-parsing",
        "--lora-init-without-apply", "--dio", "--direct-io", "--no-dio", "--no-direct-io", "--cpu-strict", "--op-offload",
        "--no-op-offload"], Nothing, "", "", ignore),
    flag(&["-fa", "--flash-attn"], Maybe, "", "", ignore),
    flag(&["-tb", "--threads-batch", "--threads-http", "-hff", "--hf-file", "-mu",
        "--model-url", "-dr", "--docker-repo", "-hft", "--hf-token", "-lv", "--verbosity", "--log-verbosity", "--log-file",
        "--log-colors", "-lm", "--load-mode", "--numa", "-ot", "--override-tensor", "-ncmoe", "--n-cpu-moe", "-sm",
        "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu", "--prio", "--prio-batch", "--poll",
        "--poll-batch", "-C", "--cpu-mask", "-Cr", "--cpu-range", "--cache-reuse",
        "--path", "--fit", "--fit-ctx", "--fit-target", "-dt", "--defrag-thold", "--slot-save-interval",
        "--mmproj", "--mmproj-url", "--media-path", "--models-dir", "--models-max", "--models-preset",
        "--reasoning-budget-message", "--dry-sequence-breaker", "--adaptive-target",
        "--adaptive-decay", "-ctxcp", "--ctx-checkpoints", "--swa-checkpoints", "--grp-attn-n", "--grp-attn-w", "-gan", "-gaw", "--chat-template-tool-use",
        "--webui-config", "--webui-config-file", "--ui-config", "--ui-config-file", "--checkpoint-every-n-tokens"],
        Text, "", "", ignore),
    // What acts on this machine: see docs/server.md.
    flag(&["--ui-mcp-proxy", "--webui-mcp-proxy"], Nothing, "UI_MCP_PROXY", "/cors-proxy fetches other addresses for pages of this machine", put!(proxy = true)),
    flag(&["--no-ui-mcp-proxy", "--no-webui-mcp-proxy"], Nothing, "", "it does not (default)", put!(proxy = false)),
    flag(&["--tools"], Text, "TOOLS", "NAMES  /tools runs these tools for clients of this machine, with your rights: all, or a comma list", |args, v| { args.tools = list(v); tools::check(&args.tools) }),
    flag(&["--mcp-servers-config"], Text, "MCP_SERVERS_CONFIG", "FILE  programs whose tools /tools offers too (JSON: mcpServers)", |args, v| { args.mcp_servers.extend(mcp::configs(&read(v)?)?); Ok(()) }),
    flag(&["--mcp-servers-json"], Text, "MCP_SERVERS_JSON", "JSON  the same", |args, v| { args.mcp_servers.extend(mcp::configs(v)?); Ok(()) }),
    flag(&["-md", "--model-draft", "--spec-draft-model", "--draft", "--draft-n", "--draft-max", "--draft-min", "--draft-p-min",
        "--spec-type", "--spec-draft-n-max", "--spec-draft-n-min", "--lora", "--lora-scaled", "--control-vector",
        "--rope-scaling", "--rope-scale", "--rope-freq-base", "--rope-freq-scale", "--yarn-orig-ctx", "--yarn-ext-factor",
        "--yarn-attn-factor", "--yarn-beta-slow", "--yarn-beta-fast", "--override-kv"], Text, "", "", not_here),
];

/// Flags that would change what the model computes or what the wire carries, which we cannot do.
fn not_here(_: &mut Args, _: &str) -> Result<()> {
    bail!("not supported by this server")
}

fn cache_type(name: &str) -> Result<mneme_kernels::attend::KvType> {
    kv_type(name).with_context(|| {
        let known: Vec<_> = KV_TYPES.iter().map(|t| t.0).collect();
        format!("expected one of {}, got `{name}`", known.join(", "))
    })
}

fn help() -> String {
    let mut out = String::from("Usage: mneme serve -m MODEL [flags]\n\nFlags:\n");
    for flag in FLAGS.iter().filter(|f| !f.help.is_empty()) {
        let (value, about) = match flag.takes {
            Nothing => ("", flag.help),
            _ => flag.help.split_once("  ").unwrap_or(("", flag.help)),
        };
        out += &format!("  {} {value}\n        {about}", flag.names.join(", "));
        if !flag.env.is_empty() {
            out += &format!(" [LLAMA_ARG_{}]", flag.env);
        }
        out.push('\n');
    }
    out += "\nOther flags of llama-server that do not change answers are accepted and ignored.\n\nMemories:\n";
    for row in MEMORIES {
        out += &format!("  {:<8} {}\n", row.name, row.about);
        if !row.options.is_empty() {
            out += &format!("           {}\n", row.options.join(" "));
        }
    }
    out
}

impl Args {
    /// Reads flags from the environment and then from `argv`.
    pub fn parse(argv: &[String], env: impl Fn(&str) -> Option<String>) -> Result<Args> {
        let mut args = Args::default();
        for flag in FLAGS.iter().filter(|f| !f.env.is_empty()) {
            let name = format!("LLAMA_ARG_{}", flag.env);
            let Some(value) = env(&name) else { continue };
            if flag.takes == Nothing {
                match value.as_str() {
                    "1" | "true" | "on" | "enabled" => {}
                    _ => continue,
                }
            }
            (flag.set)(&mut args, &value).with_context(|| name)?;
        }
        args.predict(&env)?;
        // Keys on the command line stand for all keys.
        let keys_from_env = std::mem::take(&mut args.api_keys);
        let mut rest = argv.iter().peekable();
        while let Some(arg) = rest.next() {
            let (name, inline) = match arg.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value.to_string())),
                _ => (arg.as_str(), None),
            };
            let name = match name.strip_prefix("--") {
                Some(long) => format!("--{}", long.replace('_', "-")),
                None => name.to_string(),
            };
            let flag = FLAGS.iter().find(|f| f.names.contains(&name.as_str()));
            let Some(flag) = flag else {
                bail!("invalid argument: {arg}");
            };
            let value = match flag.takes {
                Nothing => String::new(),
                Text => match inline.or_else(|| rest.next().cloned()) {
                    Some(value) => value,
                    None => bail!("expected value for argument: {arg}"),
                },
                Maybe => match (inline, rest.peek()) {
                    (Some(value), _) => value,
                    (None, Some(next)) if !next.starts_with('-') => {
                        rest.next().cloned().unwrap_or_default()
                    }
                    _ => String::new(),
                },
            };
            (flag.set)(&mut args, &value).with_context(|| name)?;
            if args.print.is_some() {
                return Ok(args);
            }
        }
        if args.api_keys.is_empty() {
            args.api_keys = keys_from_env;
        }
        args.check()?;
        Ok(args)
    }

    /// What Vertex AI tells its containers through the environment.
    fn predict(&mut self, env: impl Fn(&str) -> Option<String>) -> Result<()> {
        if env("AIP_MODE").as_deref() != Some("PREDICTION") {
            return Ok(());
        }
        let path = env("AIP_PREDICT_ROUTE").unwrap_or_else(|| "/predict".into());
        let taken = ROUTES.iter().any(|r| r.paths.contains(&path.as_str()));
        if taken || !path.starts_with('/') || path.contains(['{', '}', '*']) {
            bail!("AIP_PREDICT_ROUTE: expected a path that no other route has, got `{path}`");
        }
        self.predict_route = Some(path);
        if let Some(port) = env("AIP_HTTP_PORT") {
            self.port = number(&port).context("AIP_HTTP_PORT")?;
        }
        Ok(())
    }

    /// Whether a client can make this machine do more than answer.
    fn acts_here(&self) -> bool {
        self.proxy || !self.tools.is_empty() || !self.mcp_servers.is_empty()
    }

    fn check(&mut self) -> Result<()> {
        if self.acts_here()
            && let Some(host) = self.hosts.iter().find(|host| !listens_here_only(host))
        {
            bail!(
                "--host {host}: with --tools, --mcp-servers-* or --ui-mcp-proxy only loopback addresses may be listened on"
            );
        }
        if self.cors_origins.is_empty() {
            let all = if self.acts_here() { "localhost" } else { "*" };
            self.cors_origins = all.into();
        }
        let formats = ["none", "deepseek", "deepseek-legacy", "auto"];
        if !formats.contains(&self.reasoning_format.as_str()) {
            bail!(
                "--reasoning-format: expected one of {}, got `{}`",
                formats.join(", "),
                self.reasoning_format
            );
        }
        if let Some(dir) = &self.slot_save_path
            && !dir.is_dir()
        {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("--slot-save-path {}", dir.display()))?;
        }
        if self.ssl_key_file.is_some() != self.ssl_cert_file.is_some() {
            bail!("--ssl-key-file and --ssl-cert-file: one needs the other");
        }
        if self.hosts.is_empty() {
            bail!("--host: no address given");
        }
        Ok(())
    }

    /// Number of slots, and whether they share the whole context.
    pub fn slots(&self) -> (usize, bool) {
        match self.n_parallel {
            Some(n) => (n, self.kv_unified.unwrap_or(false)),
            None => (4, self.kv_unified.unwrap_or(true)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(argv: &[&str]) -> Result<Args> {
        let argv: Vec<String> = argv.iter().map(|s| s.to_string()).collect();
        Args::parse(&argv, |_| None)
    }

    #[test]
    fn no_name_is_used_twice() {
        let mut seen = std::collections::HashSet::new();
        for name in FLAGS.iter().flat_map(|f| f.names) {
            assert!(seen.insert(*name), "{name}");
        }
    }

    #[test]
    fn flags_as_the_suite_gives_them() {
        let args = parse(&[
            "--port",
            "8081",
            "--temp",
            "0.8",
            "--seed",
            "42",
            "--host",
            "127.0.0.1",
            "--offline",
            "--model",
            "m.gguf",
            "--batch-size",
            "32",
            "--no-slots",
            "--alias",
            "b,a",
            "--ctx-size",
            "512",
            "--parallel",
            "2",
            "--n-predict",
            "64",
            "--no-jinja",
            "--backend_sampling",
            "-fa",
            "on",
            "--verbose",
        ]);
        let args = args.expect("these are all flags");
        assert_eq!((args.port, args.n_batch, args.n_ctx), (8081, 32, 512));
        assert_eq!(args.aliases, ["a", "b"]);
        assert_eq!(args.slots(), (2, false));
        assert_eq!(args.defaults["temperature"], json!(0.8));
        assert_eq!(args.defaults["seed"], json!(42));
        assert!(!args.jinja && args.verbose && !args.endpoint_slots);
        assert_eq!(parse(&["-fa", "--port", "1"]).expect("bare -fa").port, 1);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let message = |argv: &[&str]| format!("{:#}", parse(argv).expect_err("refused"));
        assert_eq!(message(&["--frob"]), "invalid argument: --frob");
        assert_eq!(
            message(&["--port", "x"]),
            "--port: expected a number, got `x`"
        );
        assert_eq!(message(&["--port"]), "expected value for argument: --port");
        assert!(message(&["-ctk", "q9"]).contains("q8_0"));
        assert!(message(&["--lora", "x"]).contains("not supported"));
    }

    #[test]
    fn the_command_line_wins_over_the_environment() {
        let env = |name: &str| (name == "LLAMA_ARG_PORT").then(|| "1234".to_string());
        let args = Args::parse(&[], env).expect("a port");
        assert_eq!(args.port, 1234);
        let args = Args::parse(&["--port=99".into()], env).expect("a port");
        assert_eq!(args.port, 99);
    }
}
