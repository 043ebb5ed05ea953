//! Chat templates: from messages to the prompt a model was trained on.
//!
//! Templates are Jinja as Hugging Face runs it (blocks trimmed, Python's string methods, `raise_exception`,
//! `strftime_now`, `tojson`, loop controls, `{% generation %}` ignored), rendered by `minijinja`. A template comes
//! with the model file and is not trusted: its steps, recursion and output are bounded. (Not bounded is a
//! single string it builds by doubling; a hostile file can make that as large as memory.)

mod caps;
mod named;
mod python;

use std::borrow::Cow;
use std::io;
use std::sync::{LazyLock, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::gguf::{self, Gguf};

pub use caps::Caps;
pub use named::NAMED_TEMPLATES;
pub use python::strftime;

/// Most steps of the template engine in one rendering; a prompt of 1000 messages takes some hundred thousand.
const FUEL: u64 = 20_000_000;
/// Deepest recursion of macros and loops.
const MAX_RECURSION: usize = 200;
/// Longest source accepted, in bytes.
const MAX_SOURCE_BYTES: usize = 4 << 20;
/// Longest prompt rendered, in bytes.
const MAX_OUTPUT_BYTES: usize = 256 << 20;

/// A chat template that cannot be used, or a conversation it does not accept.
#[allow(missing_docs)]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    #[error("chat template is {got} bytes long, at most {max}")]
    TooLong { got: usize, max: usize },
    #[error("chat template, line {line}: {message}")]
    Syntax { line: usize, message: String },
    /// The template itself refused the messages by `raise_exception`.
    #[error("the chat template refused the messages: {0}")]
    Refused(String),
    #[error("rendering the chat template failed: {0}")]
    Render(String),
    #[error("rendering the chat template needs more than {FUEL} steps")]
    OutOfFuel,
    #[error("the rendered prompt exceeds {MAX_OUTPUT_BYTES} bytes")]
    TooMuchOutput,
    #[error("messages must be an array, got {got}")]
    Messages { got: &'static str },
    #[error("message {index}: {what}")]
    Message { index: usize, what: String },
    #[error("no built-in chat template is called {got:?}; there are {known}")]
    UnknownName { got: String, known: String },
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct RenderInput {
    /// Array of messages in OpenAI's form: `role`, `content` (text, null or parts), `tool_calls`, ...
    pub messages: Value,
    /// Array of tool definitions.
    pub tools: Option<Value>,
    /// Open the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// A last message of the assistant is left open, so that the model goes on with it.
    pub continue_final_message: bool,
    /// Further variables, such as `enable_thinking`.
    pub kwargs: Map<String, Value>,
    /// Text of the token, empty without one.
    pub bos_token: String,
    /// Text of the token, empty without one.
    pub eos_token: String,
    /// Seconds since 1970 for `strftime_now` (UTC); the present without it.
    pub now: Option<u64>,
}

/// A compiled chat template.
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    is_fallback: bool,
    caps: OnceLock<Caps>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.source)
            .finish()
    }
}

/// Carries the text of `raise_exception` through the template engine's error.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// `{% generation %}` marks what the assistant said for training; it prints its body.
static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern compiles")
});

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template.
    pub fn new(source: &str) -> Result<ChatTemplate, Error> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(Error::TooLong {
                got: source.len(),
                max: MAX_SOURCE_BYTES,
            });
        }
        let without_marks = GENERATION.replace_all(source, |c: &regex::Captures| {
            let word = if c.get(2).is_some() {
                "endif"
            } else {
                "if true"
            };
            format!("{{%{} {word} {}%}}", &c[1], &c[3])
        });
        let mut env = environment();
        env.add_template_owned(NAME, without_marks.into_owned())
            .map_err(|e| Error::Syntax {
                line: e.line().unwrap_or(0),
                message: describe(&e),
            })?;
        Ok(ChatTemplate {
            env,
            source: source.to_string(),
            is_fallback: false,
            caps: OnceLock::new(),
        })
    }

    /// The template of a model file; ChatML where it has none.
    pub fn from_gguf(gguf: &Gguf) -> Result<ChatTemplate, Error> {
        match gguf.opt_str("tokenizer.chat_template")? {
            Some(source) => ChatTemplate::new(source),
            None => {
                let mut template = ChatTemplate::named("chatml")?;
                template.is_fallback = true;
                Ok(template)
            }
        }
    }

    /// The second template that some model files carry for conversations with tools.
    pub fn tool_use_from_gguf(gguf: &Gguf) -> Result<Option<ChatTemplate>, Error> {
        match gguf.opt_str("tokenizer.chat_template.tool_use")? {
            Some(source) => ChatTemplate::new(source).map(Some),
            None => Ok(None),
        }
    }

    /// A built-in template by name, see [`NAMED_TEMPLATES`].
    pub fn named(name: &str) -> Result<ChatTemplate, Error> {
        match NAMED_TEMPLATES.iter().find(|row| row.0 == name) {
            Some(row) => ChatTemplate::new(row.1),
            None => {
                let known: Vec<&str> = NAMED_TEMPLATES.iter().map(|row| row.0).collect();
                Err(Error::UnknownName {
                    got: name.to_string(),
                    known: known.join(", "),
                })
            }
        }
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the file had no template and ChatML stands in.
    pub fn is_fallback(&self) -> bool {
        self.is_fallback
    }

    /// What the template can show. Found out at the first call.
    pub fn caps(&self) -> &Caps {
        self.caps.get_or_init(|| caps::probe(self))
    }

    /// Renders the prompt.
    ///
    /// Messages are first brought into the form that the template understands: parts of text become one text (joined by
    /// newlines) or the other way round, arguments of tool calls become objects or JSON text, null content becomes
    /// empty. `tools` reach the template as they are.
    pub fn render(&self, input: &RenderInput) -> Result<String, Error> {
        let Value::Array(messages) = &input.messages else {
            return Err(Error::Messages {
                got: kind_of(&input.messages),
            });
        };
        let mut adapted = Vec::with_capacity(messages.len());
        for (index, message) in messages.iter().enumerate() {
            adapted.push(self.adapt(index, message)?);
        }
        let mut continued = None;
        let is_assistant = |m: &Value| m["role"] == "assistant";
        if input.continue_final_message && adapted.last().is_some_and(is_assistant) {
            continued = adapted.pop().map(|m| text_of(&m["content"]));
        }
        let mut prompt = self.render_as_is(&RenderInput {
            messages: Value::Array(adapted),
            add_generation_prompt: input.add_generation_prompt || continued.is_some(),
            ..input.clone()
        })?;
        prompt.extend(continued);
        Ok(prompt)
    }

    /// Renders without touching the messages.
    fn render_as_is(&self, input: &RenderInput) -> Result<String, Error> {
        let mut context = Map::new();
        context.insert("messages".into(), input.messages.clone());
        if let Some(tools) = &input.tools {
            context.insert("tools".into(), tools.clone());
        } else {
            context.insert("tools".into(), Value::Null);
        }
        context.insert(
            "add_generation_prompt".into(),
            json!(input.add_generation_prompt),
        );
        context.insert("bos_token".into(), json!(input.bos_token));
        context.insert("eos_token".into(), json!(input.eos_token));
        let now = input.now.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            since.map_or(0, |d| d.as_secs())
        });
        context.insert(NOW.into(), json!(now));
        for (key, value) in &input.kwargs {
            context.insert(key.clone(), value.clone());
        }
        let template = self.env.get_template(NAME).map_err(|e| render_error(&e))?;
        let mut out = Limited::default();
        let context = minijinja::Value::from(Serde(Value::Object(context)));
        let rendered = template.render_captured_to(context, &mut out).map(|_| ());
        match rendered {
            Ok(()) => String::from_utf8(out.bytes).map_err(|e| Error::Render(e.to_string())),
            Err(_) if out.full => Err(Error::TooMuchOutput),
            Err(e) => Err(render_error(&e)),
        }
    }

    fn adapt(&self, index: usize, message: &Value) -> Result<Value, Error> {
        let fail = |what: &str| Error::Message {
            index,
            what: what.to_string(),
        };
        let Value::Object(fields) = message else {
            return Err(fail("expected an object"));
        };
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(fail("\"role\" must be a string"));
        }
        let mut fields = fields.clone();
        match fields.get("content") {
            None if fields["role"] == "assistant" => {}
            None => return Err(fail("\"content\" is missing")),
            // Text that is fine as it is: almost every message. Probing the template can wait.
            Some(Value::String(_)) if !self.wants_parts() => {}
            Some(Value::String(text)) => {
                let parts = json!([{"type": "text", "text": text}]);
                fields.insert("content".into(), parts);
            }
            Some(Value::Null) if self.caps().supports_null_content => {}
            Some(Value::Null) => {
                fields.insert("content".into(), json!(""));
            }
            Some(Value::Array(parts)) => {
                let all_text = parts
                    .iter()
                    .all(|p| p["type"] == "text" && p["text"].is_string());
                if !self.caps().supports_typed_content {
                    if !all_text {
                        return Err(fail("the chat template takes text only"));
                    }
                    let text = text_of(&fields["content"]);
                    fields.insert("content".into(), json!(text));
                }
            }
            Some(_) => return Err(fail("\"content\" must be text, null or an array of parts")),
        }
        if let Some(Value::Array(calls)) = fields.get_mut("tool_calls") {
            let caps = self.caps();
            for call in calls {
                adapt_arguments(call, caps);
            }
        }
        Ok(Value::Object(fields))
    }

    /// Whether content must be a list of parts.
    fn wants_parts(&self) -> bool {
        // Only a template that looks at the type of a part can want this; spare the others the probing.
        let looks = ["['type']", "[\"type\"]", ".type"];
        looks.iter().any(|l| self.source.contains(l))
            && !self.caps().supports_string_content
            && self.caps().supports_typed_content
    }
}

/// Variable that carries the time to `strftime_now`.
const NOW: &str = "_now";

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    env.set_syntax(syntax.expect("the standard delimiters do not collide"));
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, _, value| {
        match value.as_str() {
            Some(text) => out.write_str(text)?,
            None => out.write_str(&python::str_of(value)?)?,
        }
        Ok(())
    });
    // Python cannot iterate over None; the engine can, and templates ask before they take the length.
    env.add_test("iterable", |value: &minijinja::Value| {
        !matches!(
            value.kind(),
            ValueKind::None | ValueKind::Bool | ValueKind::Number
        )
    });
    env.add_filter("tojson", python::tojson);
    env.add_filter("string", |value: &minijinja::Value| python::str_of(value));
    env.add_function("raise_exception", |message: &minijinja::Value| {
        let message = python::str_of(message)?;
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
        Err::<String, _>(error.with_source(Raised(message)))
    });
    env.add_function("strftime_now", |state: &minijinja::State, format: &str| {
        let now = state.lookup(NOW).and_then(|v| u64::try_from(v).ok());
        python::strftime(format, now.unwrap_or(0))
    });
    env
}

/// Arguments of a call in the form the template shows rightly.
fn adapt_arguments(call: &mut Value, caps: &Caps) {
    let arguments = match call.get_mut("function") {
        Some(Value::Object(function)) => function.get_mut("arguments"),
        _ => call
            .as_object_mut()
            .and_then(|call| call.get_mut("arguments")),
    };
    let Some(arguments) = arguments else { return };
    if let Value::String(text) = arguments {
        if caps.supports_object_arguments
            && !caps.supports_string_arguments
            && let Ok(object) = serde_json::from_str(text)
        {
            *arguments = object;
        }
    } else if arguments.is_object() && !caps.supports_object_arguments {
        *arguments = Value::String(arguments.to_string());
    }
}

/// Text of content: a string, or the text parts joined by newlines.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<Cow<str>> = (parts.iter())
                .filter_map(|p| p["text"].as_str().map(Cow::Borrowed))
                .collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The engine's message without its place, which stands elsewhere.
fn describe(e: &minijinja::Error) -> String {
    match e.detail() {
        Some(detail) => format!("{}: {detail}", e.kind()),
        None => e.kind().to_string(),
    }
}

fn render_error(e: &minijinja::Error) -> Error {
    if e.kind() == ErrorKind::OutOfFuel {
        return Error::OutOfFuel;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref::<Raised>() {
            return Error::Refused(message.clone());
        }
        cause = error.source();
    }
    match e.line() {
        Some(line) => Error::Render(format!("{} (line {line})", describe(e))),
        None => Error::Render(describe(e)),
    }
}

/// Collects output up to a limit.
#[derive(Default)]
struct Limited {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + part.len() > MAX_OUTPUT_BYTES {
            self.full = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
