//! OpenAI's endpoints: models, text completions, chat completions.

use super::app::{App, new_id, now};
use super::chat;
use super::errors::{ApiError, ApiResult};
use super::fields::{flag, get, text};
use super::front::{Front, Present};
use super::generate::{
    self, Generation, Protocol, data, finish_reason, json_reply, probs_json, progress_json, usage,
};
use super::output::{Delta, Format, Message, Reader};
use super::{native, prompt, routes::Call};
use axum::response::Response;
use mneme_engine::scheduler::{Finished, Head, Piece, Stop, TokenProbs};
use serde_json::{Value, json};
use std::sync::Arc;

/// GET /v1/models
pub async fn models(front: Arc<Front>, _: Call) -> ApiResult<Response> {
    let mut list = match front.present()? {
        Present::Awake(app) => model_list(&app),
        Present::Asleep(notes) => notes.models.clone(),
    };
    list["data"][0]["created"] = now().into();
    Ok(json_reply(&list))
}

/// What GET /v1/models answers.
pub fn model_list(app: &App) -> Value {
    let hp = app.model.hparams();
    let gguf = app.model.gguf();
    let name = app.model_name();
    let tensors = gguf.tensors();
    let n_params: u64 = tensors.iter().map(|t| t.n_elements()).sum();
    let size: u64 = tensors.iter().map(|t| t.n_bytes).sum();
    let vocab_type = match gguf.opt_str("tokenizer.ggml.model") {
        Ok(Some("llama")) => 1,
        Ok(Some("gpt2")) => 2,
        _ => 0,
    };
    json!({
        "models": [{
            "name": name, "model": name, "modified_at": "", "size": "", "digest": "",
            "type": "model", "description": "", "tags": [""], "capabilities": ["completion"],
            "parameters": "",
            "details": {
                "parent_model": "", "format": "gguf", "family": "", "families": [""],
                "parameter_size": "", "quantization_level": "",
            },
        }],
        "object": "list",
        "data": [{
            "id": name,
            "aliases": app.args.aliases,
            "tags": app.args.tags,
            "object": "model",
            "created": now(),
            "owned_by": "llamacpp",
            "meta": {
                "vocab_type": vocab_type,
                "n_vocab": hp.n_vocab,
                "n_ctx": app.n_ctx,
                "n_ctx_train": hp.n_ctx_train,
                "n_embd": hp.n_embd,
                "n_params": n_params,
                "size": size,
                "ftype": native::file_type(app),
            },
        }],
    })
}

/// What every reply of one request shares.
struct Common {
    app: Arc<App>,
    generation: Arc<Generation>,
    id: String,
    created: u64,
    verbose: bool,
    include_usage: bool,
    /// Answers that are complete: prompt, predicted and cached tokens.
    counts: Vec<(usize, usize, usize)>,
}

impl Common {
    fn new(app: &Arc<App>, generation: &Arc<Generation>, body: &Value) -> ApiResult<Common> {
        Ok(Common {
            app: Arc::clone(app),
            generation: Arc::clone(generation),
            id: new_id("chatcmpl-"),
            created: now(),
            verbose: app.args.verbose || flag(body, "verbose", false)?,
            include_usage: match get(body, "stream_options") {
                Some(options) => flag(options, "include_usage", false)?,
                None => false,
            },
            counts: Vec::new(),
        })
    }

    fn object(&self, object: &str, choices: Value) -> Value {
        json!({
            "choices": choices,
            "created": self.created,
            "model": self.app.model_name(),
            "system_fingerprint": super::BUILD_INFO,
            "object": object,
            "id": self.id,
        })
    }

    fn count(&mut self, answer: &Finished) {
        let t = &answer.timings;
        self.counts
            .push((answer.n_prompt, t.n_predicted, t.n_cached));
    }

    /// Tokens of all answers; a prompt that several answers share counts once.
    fn usage(&self) -> Value {
        let n = self.generation.n();
        let prompts = self.counts.iter().step_by(n);
        usage(
            prompts.clone().map(|c| c.0).sum(),
            self.counts.iter().map(|c| c.1).sum(),
            prompts.map(|c| c.2).sum(),
        )
    }

    fn timings(&self, answer: &Finished) -> Value {
        self.generation.timings(answer)
    }

    fn wants_probs(&self) -> bool {
        self.generation.settings.int("n_probs") > 0
    }

    fn logprobs(&self, probs: &[TokenProbs]) -> Value {
        let post = self.generation.settings.is("post_sampling_probs");
        match self.wants_probs() {
            true => json!({"content": probs_json(&self.app, probs, post)}),
            false => Value::Null,
        }
    }

    fn per_token(&self) -> bool {
        self.generation.settings.is("timings_per_token")
    }

    fn verbose(&self, out: &mut Value, index: usize, answer: &Finished) {
        if self.verbose {
            out["__verbose"] = native::final_object(&self.app, &self.generation, index, answer);
        }
    }
}

/// `/v1/completions` on the wire.
struct Completion(Common);

impl Completion {
    fn choice(&self, index: usize, text: &str, logprobs: Value, finish: Option<&str>) -> Value {
        json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish})
    }
}

impl Protocol for Completion {
    fn reply(&mut self, answers: Vec<Finished>) -> ApiResult<Value> {
        let mut choices = Vec::new();
        for (i, answer) in answers.iter().enumerate() {
            self.0.count(answer);
            let logprobs = self.0.logprobs(&answer.probs);
            let finish = finish_reason(&answer.stop);
            choices.push(self.choice(i, &answer.text, logprobs, Some(finish)));
        }
        let mut out = self.0.object("text_completion", choices.into());
        out["usage"] = self.0.usage();
        if let Some(first) = answers.first() {
            out["timings"] = self.0.timings(first);
            self.0.verbose(&mut out, 0, first);
        }
        Ok(out)
    }

    fn progress(&mut self, index: usize, head: Head) -> String {
        let choice = self.choice(index, "", Value::Null, None);
        let mut out = self.0.object("text_completion", json!([choice]));
        out["prompt_progress"] = progress_json(&head);
        if self.0.per_token() {
            out["timings"] = generate::progress_timings(&head);
        }
        data(&out)
    }

    fn piece(&mut self, index: usize, piece: Piece) -> String {
        let choice = self.choice(index, &piece.text, self.0.logprobs(&piece.probs), None);
        let mut out = self.0.object("text_completion", json!([choice]));
        if self.0.per_token() {
            out["timings"] = generate::timings(&piece.timings, None);
        }
        data(&out)
    }

    fn finished(&mut self, index: usize, answer: Finished) -> String {
        self.0.count(&answer);
        let finish = finish_reason(&answer.stop);
        let choice = self.choice(index, "", Value::Null, Some(finish));
        let mut out = self.0.object("text_completion", json!([choice]));
        let t = &answer.timings;
        out["usage"] = usage(answer.n_prompt, t.n_predicted, t.n_cached);
        out["timings"] = self.0.timings(&answer);
        self.0.verbose(&mut out, index, &answer);
        data(&out)
    }

    fn end(&mut self) -> String {
        "data: [DONE]\n\n".into()
    }
}

/// POST /v1/completions
pub async fn completions(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let Some(value) = get(&body, "prompt") else {
        return Err(ApiError::invalid("\"prompt\" is missing"));
    };
    let mut generation = Generation::read(&app, &body)?;
    generation.prompts = prompt::prompts(&app, "prompt", value)?;
    let generation = Arc::new(generation);
    let protocol = Completion(Common::new(&app, &generation, &body)?);
    generate::answer(&app, &generation, protocol).await
}

fn call_id() -> String {
    new_id("")
}

/// A message as OpenAI has it.
pub fn message_json(message: &Message) -> Value {
    let content = match (message.content.is_empty(), message.calls.is_empty()) {
        (true, false) => Value::Null,
        _ => message.content.clone().into(),
    };
    let mut out = json!({"role": "assistant", "content": content});
    if !message.reasoning.is_empty() {
        out["reasoning_content"] = message.reasoning.clone().into();
    }
    if !message.calls.is_empty() {
        let call = |call: &super::output::ToolCall| {
            json!({
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
                "id": call.id,
            })
        };
        out["tool_calls"] = message.calls.iter().map(call).collect();
    }
    out
}

/// One answer of a chat stream.
struct Choice {
    reader: Reader,
    /// Whether the role has been told.
    begun: bool,
    /// Probabilities of text the reader holds back.
    probs: Vec<TokenProbs>,
}

/// `/v1/chat/completions` on the wire.
struct ChatCompletion {
    common: Common,
    format: Format,
    choices: Vec<Choice>,
}

impl ChatCompletion {
    fn finish(stop: &Stop, message: &Message) -> &'static str {
        match finish_reason(stop) {
            "stop" if !message.calls.is_empty() => "tool_calls",
            reason => reason,
        }
    }

    fn chunk(&self, index: usize, delta: Value, finish: Option<&str>) -> Value {
        let choice = json!({"finish_reason": finish, "index": index, "delta": delta});
        self.common.object("chat.completion.chunk", json!([choice]))
    }

    /// Events for what the reader understood.
    fn deltas(&mut self, index: usize, deltas: Vec<Delta>, timings: Option<Value>) -> String {
        let mut out = String::new();
        if !self.choices[index].begun {
            self.choices[index].begun = true;
            let role = json!({"role": "assistant", "content": null});
            out += &data(&self.chunk(index, role, None));
        }
        let n = deltas.len();
        for (i, delta) in deltas.into_iter().enumerate() {
            let delta = match delta {
                Delta::Content(text) => json!({ "content": text }),
                Delta::Reasoning(text) => json!({ "reasoning_content": text }),
                Delta::Call { index, name, id } => json!({"tool_calls": [{
                    "index": index, "id": id, "type": "function",
                    "function": {"name": name, "arguments": ""},
                }]}),
                Delta::Arguments { index, text } => json!({"tool_calls": [{
                    "index": index, "function": {"arguments": text},
                }]}),
            };
            let mut chunk = self.chunk(index, delta, None);
            if self.common.wants_probs() {
                let probs = match i + 1 == n {
                    true => std::mem::take(&mut self.choices[index].probs),
                    false => Vec::new(),
                };
                chunk["choices"][0]["logprobs"] = self.common.logprobs(&probs);
            }
            if let Some(timings) = &timings {
                chunk["timings"] = timings.clone();
            }
            out += &data(&chunk);
        }
        out
    }
}

impl Protocol for ChatCompletion {
    fn reply(&mut self, answers: Vec<Finished>) -> ApiResult<Value> {
        let mut choices = Vec::new();
        for (i, answer) in answers.iter().enumerate() {
            self.common.count(answer);
            let mut reader = Reader::new(self.format.clone(), call_id);
            reader.push(&answer.text, true);
            let message = reader.message();
            let mut choice = json!({
                "finish_reason": Self::finish(&answer.stop, message),
                "index": i,
                "message": message_json(message),
            });
            if self.common.wants_probs() {
                choice["logprobs"] = self.common.logprobs(&answer.probs);
            }
            choices.push(choice);
        }
        let mut out = self.common.object("chat.completion", choices.into());
        out["usage"] = self.common.usage();
        if let Some(first) = answers.first() {
            out["timings"] = self.common.timings(first);
            self.common.verbose(&mut out, 0, first);
        }
        Ok(out)
    }

    fn progress(&mut self, index: usize, head: Head) -> String {
        self.choices[index].begun = true;
        let role = json!({"role": "assistant", "content": null});
        let mut chunk = self.chunk(index, role, None);
        chunk["prompt_progress"] = progress_json(&head);
        if self.common.per_token() {
            chunk["timings"] = generate::progress_timings(&head);
        }
        data(&chunk)
    }

    fn piece(&mut self, index: usize, piece: Piece) -> String {
        let choice = &mut self.choices[index];
        choice.probs.extend(piece.probs);
        let deltas = choice.reader.push(&piece.text, false);
        let per_token = self.common.per_token();
        let timings = per_token.then(|| generate::timings(&piece.timings, None));
        self.deltas(index, deltas, timings)
    }

    fn finished(&mut self, index: usize, answer: Finished) -> String {
        self.common.count(&answer);
        let deltas = self.choices[index].reader.push("", true);
        let mut out = self.deltas(index, deltas, None);
        let finish = Self::finish(&answer.stop, self.choices[index].reader.message());
        let mut chunk = self.chunk(index, json!({}), Some(finish));
        let last = self.common.counts.len() == self.choices.len();
        let mut usage_chunk = None;
        if last && self.common.include_usage {
            let mut chunk = self.common.object("chat.completion.chunk", json!([]));
            chunk["usage"] = self.common.usage();
            chunk["timings"] = self.common.timings(&answer);
            usage_chunk = Some(chunk);
        } else {
            chunk["timings"] = self.common.timings(&answer);
        }
        self.common.verbose(&mut chunk, index, &answer);
        out += &data(&chunk);
        out.extend(usage_chunk.map(|chunk| data(&chunk)));
        out
    }

    fn end(&mut self) -> String {
        "data: [DONE]\n\n".into()
    }
}

/// POST /v1/chat/completions
pub async fn chat_completions(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let chat = chat::read(&app, &body)?;
    let generation = Arc::new(chat.generation);
    let choices = (0..generation.n())
        .map(|_| Choice {
            reader: Reader::new(chat.format.clone(), call_id),
            begun: false,
            probs: Vec::new(),
        })
        .collect();
    let protocol = ChatCompletion {
        common: Common::new(&app, &generation, &body)?,
        format: chat.format,
        choices,
    };
    generate::answer(&app, &generation, protocol).await
}

/// POST /v1/chat/completions/input_tokens
pub async fn chat_tokens(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let rendered = chat::render(&app, &call.json()?)?;
    let n = app.encode(&rendered.prompt).len();
    Ok(json_reply(
        &json!({"object": "response.input_tokens", "input_tokens": n}),
    ))
}

/// Model that a request names, else the server's own.
pub fn named_model(app: &App, body: &Value) -> ApiResult<String> {
    Ok(match text(body, "model")? {
        Some(name) => name.to_owned(),
        None => app.model_name(),
    })
}
