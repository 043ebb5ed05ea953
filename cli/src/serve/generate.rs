//! From a parsed request to the scheduler, and from its events to replies and streams.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::fields::{self, Settings};
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use mneme_engine::embed::Pooling;
use mneme_engine::grammar::Grammar;
use mneme_engine::memory::Stats;
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::sampler::SamplerParams;
use mneme_engine::scheduler::{
    Embedded, Event, Finished, Head, Job, Params, Piece, Stop, Timings, TokenProbs,
};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc::{self, UnboundedReceiver};

/// A generation, ready to be handed in.
pub struct Generation {
    /// Fields of the request.
    pub settings: Settings,
    /// One prompt per answer group.
    pub prompts: Vec<Vec<u32>>,
    /// Language of the answers.
    pub grammar: Option<Grammar>,
    /// Control tokens to show.
    pub preserved: Vec<u32>,
    /// Memory asked for.
    pub memory: Option<MemorySpec>,
    /// Embeddings are wanted instead of answers.
    pub embed: Option<Pooling>,
}

impl Generation {
    /// Settings, memory and grammar of `body`, for prompts that are set later.
    pub fn read(app: &App, body: &Value) -> ApiResult<Generation> {
        let settings = Settings::read(body, &app.args.defaults, &app.model.tokenizer)?;
        if settings.int("n_cmpl") as usize > app.n_slots {
            return Err(fields::wrong(
                "n",
                &format!("1 to {} (the number of slots)", app.n_slots),
                &json!(settings.int("n_cmpl")),
            ));
        }
        Ok(Generation {
            grammar: grammar(app, body, &settings)?,
            settings,
            prompts: Vec::new(),
            preserved: Vec::new(),
            memory: app.memory_of(body)?,
            embed: None,
        })
    }

    /// Answers per prompt.
    pub fn n(&self) -> usize {
        self.settings.int("n_cmpl").max(1) as usize
    }

    /// `timings` of an answer. The memory is part of them when the request named one or it is not
    /// the plain one: llama.cpp's own `timings` hold nothing but numbers.
    pub fn timings(&self, answer: &Finished) -> Value {
        let shown = self.memory.is_some() || answer.memory.name != "full";
        timings(&answer.timings, shown.then_some(&answer.memory))
    }

    fn params(&self, nth: usize) -> ApiResult<Params> {
        let s = &self.settings;
        let mut sampling = s.0.clone();
        if let Some(seed) = s.0["seed"].as_u64().filter(|n| *n != u64::from(u32::MAX)) {
            sampling.insert("seed".into(), (seed as u32).wrapping_add(nth as u32).into());
        }
        let biases = s.0["logit_bias"].as_array().into_iter().flatten();
        let biases: Value = biases
            .map(|b| match b["bias"].as_f64() {
                Some(bias) => json!([b["token"], bias]),
                None => json!([b["token"], false]),
            })
            .collect();
        sampling.insert("logit_bias".into(), biases);
        let sampler: SamplerParams = serde_json::from_value(Value::Object(sampling))
            .map_err(|e| ApiError::invalid(e.to_string()))?;
        Ok(Params {
            sampler,
            n_predict: s.int("n_predict"),
            stop: s.strings("stop"),
            n_keep: s.int("n_keep"),
            n_discard: s.int("n_discard") as usize,
            n_indent: s.int("n_indent") as usize,
            t_max_predict: match s.int("t_max_predict_ms") {
                n if n > 0 => Some(Duration::from_millis(n as u64)),
                _ => None,
            },
            n_probs: s.int("n_probs") as usize,
            post_sampling_probs: s.is("post_sampling_probs"),
            cache_prompt: s.is("cache_prompt"),
            grammar: self.grammar.clone(),
            preserved: self.preserved.clone(),
            progress: s.is("return_progress") && s.is("stream"),
        })
    }

    /// Hands everything in.
    pub fn submit(&self, app: &App) -> ApiResult<Answers> {
        let n = self.n();
        let full = self.memory.as_ref().unwrap_or(&app.memory).name == "full";
        for prompt in &self.prompts {
            if full && prompt.len() + usize::from(self.embed.is_none()) > app.n_ctx {
                return Err(mneme_engine::scheduler::Failure::Context {
                    n_prompt: prompt.len(),
                    n_ctx: app.n_ctx,
                }
                .into());
            }
        }
        let (tx, rx) = mpsc::unbounded_channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let echo = Arc::new(self.settings.echo());
        let job = |index: usize, nth: usize| -> ApiResult<Job> {
            let tx = tx.clone();
            Ok(Job {
                id: 0,
                prompt: self.prompts[index / n].clone(),
                params: self.params(nth)?,
                memory: self.memory.clone(),
                id_slot: match self.settings.int("id_slot") {
                    id if id >= 0 && nth == 0 => Some(id as usize),
                    _ => None,
                },
                echo: Arc::clone(&echo),
                cancelled: Arc::clone(&cancelled),
                events: Box::new(move |event| {
                    // Nobody listens any more: the flag tells the scheduler.
                    let _ = tx.send((index, event));
                }),
                embed: self.embed,
                children: Vec::new(),
            })
        };
        let answers = Answers {
            rx,
            n: n * self.prompts.len(),
            _guard: CancelGuard(Arc::clone(&cancelled)),
        };
        for i in 0..self.prompts.len() {
            let mut parent = job(i * n, 0)?;
            for nth in 1..n {
                parent.children.push(job(i * n + nth, nth)?);
            }
            app.handle.submit(parent)?;
        }
        Ok(answers)
    }
}

/// The grammar of a request: its own, or the one that its schema stands for.
fn grammar(app: &App, body: &Value, settings: &Settings) -> ApiResult<Option<Grammar>> {
    let own = settings.0["grammar"].as_str().filter(|g| !g.is_empty());
    let schema = fields::get(body, "json_schema").or_else(|| app.args.defaults.get("json_schema"));
    let regex = fields::text(body, "regex")?;
    match (own, schema) {
        // As llama.cpp marks grammars in Lark's form.
        (Some(text), _) if text.starts_with("%llguidance") => {
            app.grammars()?.lark(text).map(Some).map_err(|e| refuse(&e))
        }
        (Some(text), _) => app.grammars()?.gbnf(text).map(Some).map_err(|e| refuse(&e)),
        (None, Some(schema)) => schema_grammar(app, schema).map(Some),
        (None, None) => match regex.filter(|r| !r.is_empty()) {
            Some(regex) => app
                .grammars()?
                .regex(regex)
                .map(Some)
                .map_err(|e| refuse(&e)),
            None => Ok(None),
        },
    }
}

fn refuse(e: &mneme_engine::grammar::Error) -> ApiError {
    ApiError::invalid(format!("Failed to parse grammar: {e}"))
}

/// Brings a schema into the form the grammar compiler knows: a list under `items` (schemas before
/// 2020) becomes `prefixItems`; what speaks of items or properties without a type means that type;
/// objects have no properties but those named, unless it says otherwise (as llama.cpp reads it).
/// A `part` of a conjunction leaves that last one to the others.
fn modernise(schema: &mut Value, part: bool) {
    let Value::Object(o) = schema else {
        return;
    };
    if o.get("items").is_some_and(Value::is_array) && !o.contains_key("prefixItems") {
        let items = o.remove("items").unwrap_or_default();
        o.insert("prefixItems".into(), items);
        let more = o.remove("additionalItems").unwrap_or(json!(false));
        o.insert("items".into(), more);
    }
    let speaks = |names: [&str; 2]| names.iter().any(|name| o.contains_key(*name));
    let kind = match (
        speaks(["items", "prefixItems"]),
        speaks(["properties", "required"]),
    ) {
        (true, false) => Some("array"),
        (false, true) => Some("object"),
        _ => None,
    };
    let other = ["type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"];
    if let Some(kind) = kind.filter(|_| !other.iter().any(|name| o.contains_key(*name))) {
        o.insert("type".into(), kind.into());
    }
    let joins = [
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "if",
        "not",
        "patternProperties",
    ];
    let joins = joins.iter().any(|name| o.contains_key(*name));
    if o.contains_key("properties") && !part && !joins {
        o.entry("additionalProperties").or_insert(json!(false));
    }
    for name in ["not", "if", "then", "else"] {
        (o.get_mut(name).into_iter()).for_each(|s| modernise(s, true));
    }
    for name in ["items", "additionalProperties", "contains"] {
        (o.get_mut(name).into_iter()).for_each(|s| modernise(s, false));
    }
    let is_more = o.contains_key("properties") || o.contains_key("required");
    for name in ["anyOf", "oneOf", "allOf", "prefixItems"] {
        let part = match name {
            "prefixItems" => false,
            "allOf" => true,
            _ => part || is_more,
        };
        let all = o.get_mut(name).and_then(Value::as_array_mut);
        (all.into_iter().flatten()).for_each(|s| modernise(s, part));
    }
    for name in ["properties", "patternProperties", "$defs", "definitions"] {
        let all = o.get_mut(name).and_then(Value::as_object_mut);
        all.into_iter()
            .flat_map(|o| o.values_mut())
            .for_each(|s| modernise(s, false));
    }
}

/// The language of JSON texts that `schema` accepts; an empty schema means any object.
pub fn schema_grammar(app: &App, schema: &Value) -> ApiResult<Grammar> {
    let mut schema = match schema {
        Value::Object(o) if o.is_empty() => json!({"type": "object"}),
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => {
            json!({"type": ["object", "array", "string", "number", "boolean", "null"]})
        }
        other => return Err(fields::wrong("json_schema", "a schema object", other)),
    };
    modernise(&mut schema, false);
    app.grammars()?.json_schema(&schema).map_err(|e| refuse(&e))
}

struct CancelGuard(Arc<AtomicBool>);

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Events of all answers of one request; dropping it cancels them.
pub struct Answers {
    rx: UnboundedReceiver<(usize, Event)>,
    /// Number of answers.
    n: usize,
    _guard: CancelGuard,
}

impl Answers {
    /// The next event; `None` when the scheduler has gone.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        self.rx.recv().await
    }

    /// All complete answers, in order.
    pub async fn all(mut self) -> ApiResult<Vec<Finished>> {
        let mut done: Vec<Option<Finished>> = (0..self.n).map(|_| None).collect();
        let mut left = self.n;
        while left > 0 {
            match self.next().await {
                Some((i, Event::Finished(answer))) => {
                    done[i] = Some(*answer);
                    left -= 1;
                }
                Some((_, Event::Failed(failure))) => return Err(failure.into()),
                Some(_) => {}
                None => return Err(ApiError::unavailable("the server is shutting down")),
            }
        }
        Ok(done.into_iter().flatten().collect())
    }
}

impl Answers {
    /// All embeddings, in order.
    pub async fn all_embedded(mut self) -> ApiResult<Vec<Embedded>> {
        let mut done: Vec<Option<Embedded>> = (0..self.n).map(|_| None).collect();
        for _ in 0..self.n {
            match self.next().await {
                Some((i, Event::Embedded(embedded))) => done[i] = Some(embedded),
                Some((_, Event::Failed(failure))) => return Err(failure.into()),
                Some(_) => return Err(ApiError::server("an answer came instead of an embedding")),
                None => return Err(ApiError::unavailable("the server is shutting down")),
            }
        }
        Ok(done.into_iter().flatten().collect())
    }
}

/// How one of the APIs writes answers down.
pub trait Protocol: Send + 'static {
    /// The whole reply.
    fn reply(&mut self, answers: Vec<Finished>) -> ApiResult<Value>;
    /// Before everything else in a stream.
    fn begin(&mut self) -> String {
        String::new()
    }
    /// The prompt was read up to here.
    fn progress(&mut self, index: usize, head: Head) -> String;
    /// A part of answer `index`.
    fn piece(&mut self, index: usize, piece: Piece) -> String;
    /// Answer `index` is complete.
    fn finished(&mut self, index: usize, answer: Finished) -> String;
    /// After everything else.
    fn end(&mut self) -> String {
        String::new()
    }
}

/// One event of a stream: `data: JSON` and an empty line.
pub fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// One named event of a stream.
pub fn named(name: &str, value: &Value) -> String {
    format!("event: {name}\ndata: {value}\n\n")
}

/// A JSON reply.
pub fn json_reply(value: &Value) -> Response {
    let mut response = value.to_string().into_response();
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json; charset=utf-8"),
    );
    response
}

/// Runs a generation and answers in the form of `protocol`, streamed or whole.
pub async fn answer(
    app: &App,
    generation: &Generation,
    mut protocol: impl Protocol,
) -> ApiResult<Response> {
    let mut answers = generation.submit(app)?;
    if !generation.settings.is("stream") {
        let answers = answers.all().await?;
        return Ok(json_reply(&protocol.reply(answers)?));
    }
    // What fails before the first event is an ordinary error.
    let first = match answers.next().await {
        Some((_, Event::Failed(failure))) => return Err(failure.into()),
        Some(first) => first,
        None => return Err(ApiError::unavailable("the server is shutting down")),
    };
    let ping = match generation.settings.0["sse_ping_interval"].as_i64() {
        Some(n) if n > 0 => Some(Duration::from_secs(n as u64)),
        _ => None,
    };
    let left = answers.n;
    let state = StreamState {
        answers,
        protocol,
        next: Some(first),
        begun: false,
        left,
        ping,
    };
    let stream = futures::stream::unfold(state, |mut state| async move {
        let text = state.step().await?;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(text)), state))
    });
    let mut response = Body::from_stream(stream).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("X-Accel-Buffering", HeaderValue::from_static("no"));
    Ok(response)
}

struct StreamState<P> {
    answers: Answers,
    protocol: P,
    next: Option<(usize, Event)>,
    begun: bool,
    left: usize,
    ping: Option<Duration>,
}

impl<P: Protocol> StreamState<P> {
    /// The next text to send; `None` at the end.
    async fn step(&mut self) -> Option<String> {
        if !self.begun {
            self.begun = true;
            let begin = self.protocol.begin();
            if !begin.is_empty() {
                return Some(begin);
            }
        }
        loop {
            if self.left == 0 {
                return None;
            }
            let event = match self.next.take() {
                Some(event) => Some(event),
                None => match self.ping {
                    None => self.answers.next().await,
                    Some(ping) => match tokio::time::timeout(ping, self.answers.next()).await {
                        Ok(event) => event,
                        Err(_) => return Some(":\n\n".into()),
                    },
                },
            };
            let text = match event {
                Some((i, Event::Progress(head))) => self.protocol.progress(i, head),
                Some((i, Event::Piece(piece))) => self.protocol.piece(i, piece),
                Some((i, Event::Finished(answer))) => {
                    self.left -= 1;
                    let mut text = self.protocol.finished(i, *answer);
                    if self.left == 0 {
                        text += &self.protocol.end();
                    }
                    text
                }
                Some((_, Event::Failed(failure))) => {
                    self.left = 0;
                    data(&ApiError::from(failure).body())
                }
                // Only those who ask for embeddings get them.
                Some((_, Event::Embedded(_))) => String::new(),
                None => {
                    self.left = 0;
                    data(&ApiError::unavailable("the server is shutting down").body())
                }
            };
            if !text.is_empty() {
                return Some(text);
            }
        }
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn rate(n: usize, d: Duration) -> f64 {
    match d.as_secs_f64() {
        s if s > 0.0 => n as f64 / s,
        _ => 0.0,
    }
}

/// `timings` of a prompt that is being read.
pub fn progress_timings(head: &Head) -> Value {
    let n_prompt = head.n_processed - head.n_cached;
    let prompt = match n_prompt {
        0 => Duration::ZERO,
        _ => head.elapsed,
    };
    let read = Timings {
        n_cached: head.n_cached,
        n_prompt,
        prompt,
        ..Timings::default()
    };
    timings(&read, None)
}

/// `timings` of a reply.
pub fn timings(t: &Timings, memory: Option<&Stats>) -> Value {
    let steps = t.n_predicted.saturating_sub(1);
    let per = |d: Duration, n: usize| if n == 0 { 0.0 } else { ms(d) / n as f64 };
    let mut out = json!({
        "cache_n": t.n_cached,
        "prompt_n": t.n_prompt,
        "prompt_ms": ms(t.prompt),
        "prompt_per_token_ms": per(t.prompt, t.n_prompt),
        "prompt_per_second": rate(t.n_prompt, t.prompt),
        "predicted_n": t.n_predicted,
        "predicted_ms": ms(t.predicted),
        "predicted_per_token_ms": per(t.predicted, steps),
        "predicted_per_second": rate(steps, t.predicted),
    });
    if let Some(stats) = memory {
        out["memory"] = memory_json(stats);
    }
    out
}

/// A memory in numbers.
pub fn memory_json(s: &Stats) -> Value {
    json!({
        "name": s.name,
        "n_tokens": s.n_tokens,
        "nodes": s.n_nodes,
        "slots": s.n_slots,
        "cells": s.n_cells,
        "dropped": s.n_dropped,
        "bytes": s.cell_bytes + s.state_bytes,
        "cell_bytes": s.cell_bytes,
        "state_bytes": s.state_bytes,
        "card_bytes": s.card_bytes,
        "full_bytes": s.full_bytes,
        "rate": s.rate,
        "rate_spread": s.rate_spread,
        "longest_segment": s.longest_segment,
        "tau": s.tau,
    })
}

/// `stop_type` and `stopping_word` of a native reply.
pub fn stop_words(stop: &Stop) -> (&'static str, &str) {
    match stop {
        Stop::Eos => ("eos", ""),
        Stop::Limit => ("limit", ""),
        Stop::Word(word) => ("word", word),
    }
}

/// `finish_reason` of an OpenAI reply.
pub fn finish_reason(stop: &Stop) -> &'static str {
    match stop {
        Stop::Limit => "length",
        _ => "stop",
    }
}

/// Tokens with their alternatives; `post` names them as probabilities after the filters.
pub fn probs_json(app: &App, probs: &[TokenProbs], post: bool) -> Value {
    let (value, top) = match post {
        true => ("prob", "top_probs"),
        false => ("logprob", "top_logprobs"),
    };
    let entry = |id: u32, x: f32| {
        let (token, bytes) = app.token_json(id);
        json!({"id": id, "token": token, "bytes": bytes, value: x})
    };
    let all = probs.iter().map(|p| {
        let mut out = entry(p.id, p.value);
        out[top] = p.top.iter().map(|(id, x)| entry(*id, *x)).collect();
        out
    });
    all.collect()
}

/// `usage` of an OpenAI reply.
pub fn usage(n_prompt: usize, n_predicted: usize, n_cached: usize) -> Value {
    json!({
        "completion_tokens": n_predicted,
        "prompt_tokens": n_prompt,
        "total_tokens": n_prompt + n_predicted,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    })
}

/// `prompt_progress` of a stream.
pub fn progress_json(head: &Head) -> Value {
    json!({
        "total": head.n_prompt,
        "cache": head.n_cached,
        "processed": head.n_processed,
        "time_ms": head.elapsed.as_millis() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_are_brought_up_to_date() {
        let mut schema = json!({"properties": {
            "items": {"items": [{"type": "integer"}]},
            "type": {"required": ["x"]},
            "any": {"anyOf": [{"items": {"type": "null"}}, {"properties": {"y": {}}}]},
            "all": {"allOf": [{"properties": {"y": {}}}, {"properties": {"z": {}}}]},
        }});
        modernise(&mut schema, false);
        let expected = json!({"type": "object", "additionalProperties": false, "properties": {
            "items": {"type": "array", "prefixItems": [{"type": "integer"}], "items": false},
            "type": {"type": "object", "required": ["x"]},
            "any": {"anyOf": [
                {"type": "array", "items": {"type": "null"}},
                {"type": "object", "additionalProperties": false, "properties": {"y": {}}},
            ]},
            "all": {"allOf": [
                {"type": "object", "properties": {"y": {}}},
                {"type": "object", "properties": {"z": {}}},
            ]},
        }});
        assert_eq!(schema, expected);
    }
}
