//! Anthropic's Messages on top of chat.

use super::app::{App, new_id};
use super::chat;
use super::errors::{ApiError, ApiResult};
use super::fields::{get, wrong};
use super::generate::{self, Generation, Protocol, json_reply, named};
use super::openai::named_model;
use super::output::{Delta, Format, Reader};
use super::prompt::NO_IMAGES;
use super::routes::Call;
use axum::response::Response;
use mneme_engine::scheduler::{Finished, Head, Piece, Stop};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Text of a string or of blocks of text.
fn plain(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => {
            let texts = blocks.iter().filter_map(|b| b["text"].as_str());
            texts.collect::<Vec<_>>().join("\n")
        }
        _ => String::new(),
    }
}

/// The chat request that a Messages request stands for.
fn to_chat(body: &Value) -> ApiResult<Value> {
    let Some(Value::Array(messages)) = get(body, "messages") else {
        return Err(ApiError::invalid("'messages' is required"));
    };
    let mut chat = Vec::new();
    if let Some(system) = get(body, "system") {
        chat.push(json!({"role": "system", "content": plain(system)}));
    }
    for message in messages {
        add_message(&mut chat, message)?;
    }
    let mut out: Map<String, Value> = body.as_object().cloned().unwrap_or_default();
    for name in [
        "system",
        "tools",
        "tool_choice",
        "thinking",
        "metadata",
        "stop_sequences",
    ] {
        out.remove(name);
    }
    out.insert("messages".into(), chat.into());
    out.entry("max_tokens").or_insert(json!(4096));
    if let Some(stop) = get(body, "stop_sequences") {
        out.insert("stop".into(), stop.clone());
    }
    if let Some(Value::Array(tools)) = get(body, "tools") {
        let tools = tools.iter().map(|t| {
            json!({"type": "function", "function": {
                "name": t["name"],
                "description": get(t, "description").cloned().unwrap_or(json!("")),
                "parameters": get(t, "input_schema").cloned().unwrap_or(json!({"type": "object"})),
            }})
        });
        out.insert("tools".into(), tools.collect());
    }
    if let Some(choice) = get(body, "tool_choice") {
        let choice = match choice["type"].as_str() {
            Some("any") => json!("required"),
            Some("tool") => json!({"type": "function", "function": {"name": choice["name"]}}),
            Some("none") => json!("none"),
            _ => json!("auto"),
        };
        out.insert("tool_choice".into(), choice);
    }
    if let Some(thinking) = get(body, "thinking") {
        let on = thinking["type"] == "enabled" || thinking["type"] == "adaptive";
        let kwargs = out.entry("chat_template_kwargs").or_insert(json!({}));
        if let Some(kwargs) = kwargs.as_object_mut() {
            kwargs.entry("enable_thinking").or_insert(on.into());
        }
    }
    Ok(Value::Object(out))
}

fn add_message(chat: &mut Vec<Value>, message: &Value) -> ApiResult<()> {
    let Some(role) = message["role"].as_str() else {
        return Err(wrong("messages", "messages with a role", message));
    };
    let blocks = match &message["content"] {
        Value::Array(blocks) => blocks,
        content => {
            chat.push(json!({"role": role, "content": content}));
            return Ok(());
        }
    };
    let mut texts = Vec::new();
    let mut calls = Vec::new();
    let mut results = Vec::new();
    let mut thoughts = String::new();
    for block in blocks {
        match block["type"].as_str() {
            Some("text") => texts.push(json!({"type": "text", "text": block["text"]})),
            Some("thinking") => thoughts += block["thinking"].as_str().unwrap_or(""),
            Some("redacted_thinking") => {}
            Some("tool_use") => calls.push(json!({
                "id": block["id"],
                "type": "function",
                "function": {"name": block["name"], "arguments": block["input"].to_string()},
            })),
            Some("tool_result") => {
                let mut parts = block["content"].as_array().into_iter().flatten();
                if parts.any(|part| part["type"] == "image") {
                    return Err(ApiError::server(NO_IMAGES));
                }
                results.push(json!({
                    "role": "tool",
                    "tool_call_id": block["tool_use_id"],
                    "content": plain(&block["content"]),
                }));
            }
            Some("image") => return Err(ApiError::server(NO_IMAGES)),
            _ => return Err(wrong("content", "blocks of a known type", block)),
        }
    }
    if !texts.is_empty() || !calls.is_empty() || results.is_empty() {
        let content = match texts.is_empty() {
            true => json!(""),
            false => Value::Array(texts),
        };
        let mut message = json!({"role": role, "content": content});
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        if !thoughts.is_empty() {
            message["reasoning_content"] = thoughts.into();
        }
        chat.push(message);
    }
    chat.extend(results);
    Ok(())
}

/// A block of the answer that is being written.
#[derive(Clone, Copy, PartialEq)]
enum Block {
    Text,
    Thinking,
    Tool,
}

/// `/v1/messages` on the wire.
struct Messages {
    model: String,
    id: String,
    format: Format,
    reader: Reader,
    /// Whether the message has begun in the stream.
    begun: bool,
    open: Option<Block>,
    /// Number of the block that is open or comes next.
    index: usize,
}

impl Messages {
    fn stop_reason(stop: &Stop, calls: bool) -> (&'static str, Value) {
        match stop {
            _ if calls => ("tool_use", Value::Null),
            Stop::Limit => ("max_tokens", Value::Null),
            Stop::Word(word) => ("stop_sequence", json!(word)),
            Stop::Eos => ("end_turn", Value::Null),
        }
    }

    fn start(&mut self, n_prompt: usize, n_cached: usize) -> String {
        if std::mem::replace(&mut self.begun, true) {
            return String::new();
        }
        named(
            "message_start",
            &json!({"type": "message_start", "message": {
                "id": self.id, "type": "message", "role": "assistant", "content": [],
                "model": self.model, "stop_reason": null, "stop_sequence": null,
                "usage": {
                    "cache_read_input_tokens": n_cached,
                    "input_tokens": n_prompt - n_cached,
                    "output_tokens": 0,
                },
            }}),
        )
    }

    fn open(&mut self, block: Block, content: Value) -> String {
        let mut out = String::new();
        if block != Block::Tool && self.open == Some(block) {
            return out;
        }
        out += &self.close();
        self.open = Some(block);
        out + &named(
            "content_block_start",
            &json!({"type": "content_block_start", "index": self.index, "content_block": content}),
        )
    }

    fn close(&mut self) -> String {
        let Some(block) = self.open.take() else {
            return String::new();
        };
        let mut out = String::new();
        if block == Block::Thinking {
            out += &self.say(json!({"type": "signature_delta", "signature": ""}));
        }
        out += &named(
            "content_block_stop",
            &json!({"type": "content_block_stop", "index": self.index}),
        );
        self.index += 1;
        out
    }

    fn say(&self, delta: Value) -> String {
        named(
            "content_block_delta",
            &json!({"type": "content_block_delta", "index": self.index, "delta": delta}),
        )
    }

    fn delta(&mut self, delta: Delta) -> String {
        match delta {
            Delta::Content(text) => {
                self.open(Block::Text, json!({"type": "text", "text": ""}))
                    + &self.say(json!({"type": "text_delta", "text": text}))
            }
            Delta::Reasoning(text) => {
                let block = json!({"type": "thinking", "thinking": ""});
                self.open(Block::Thinking, block)
                    + &self.say(json!({"type": "thinking_delta", "thinking": text}))
            }
            Delta::Call { name, id, .. } => {
                let block = json!({"type": "tool_use", "id": id, "name": name, "input": {}});
                self.open(Block::Tool, block)
            }
            Delta::Arguments { text, .. } => {
                self.say(json!({"type": "input_json_delta", "partial_json": text}))
            }
        }
    }
}

impl Protocol for Messages {
    fn reply(&mut self, answers: Vec<Finished>) -> ApiResult<Value> {
        let answer = answers
            .first()
            .ok_or_else(|| ApiError::server("no answer"))?;
        let mut reader = Reader::new(self.format.clone(), || new_id("toolu_"));
        reader.push(&answer.text, true);
        let message = reader.message();
        let mut content = Vec::new();
        if !message.reasoning.is_empty() {
            content.push(json!({
                "type": "thinking", "thinking": message.reasoning, "signature": "",
            }));
        }
        if !message.content.is_empty() || message.calls.is_empty() {
            content.push(json!({"type": "text", "text": message.content}));
        }
        for call in &message.calls {
            let input: Value = serde_json::from_str(&call.arguments).unwrap_or(json!({}));
            content.push(json!({
                "type": "tool_use", "id": call.id, "name": call.name, "input": input,
            }));
        }
        let (reason, word) = Self::stop_reason(&answer.stop, !message.calls.is_empty());
        let t = &answer.timings;
        Ok(json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": reason,
            "stop_sequence": word,
            "usage": {
                "cache_read_input_tokens": t.n_cached,
                "input_tokens": answer.n_prompt - t.n_cached,
                "output_tokens": t.n_predicted,
            },
        }))
    }

    fn progress(&mut self, _: usize, head: Head) -> String {
        self.start(head.n_prompt, head.n_cached)
    }

    fn piece(&mut self, _: usize, piece: Piece) -> String {
        let mut out = self.start(piece.n_prompt, piece.timings.n_cached);
        for delta in self.reader.push(&piece.text, false) {
            out += &self.delta(delta);
        }
        out
    }

    fn finished(&mut self, _: usize, answer: Finished) -> String {
        let mut out = self.start(answer.n_prompt, answer.timings.n_cached);
        for delta in self.reader.push("", true) {
            out += &self.delta(delta);
        }
        out += &self.close();
        let calls = !self.reader.message().calls.is_empty();
        let (reason, word) = Self::stop_reason(&answer.stop, calls);
        out += &named(
            "message_delta",
            &json!({
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": word},
                "usage": {"output_tokens": answer.timings.n_predicted},
            }),
        );
        out + &named("message_stop", &json!({"type": "message_stop"}))
    }
}

/// POST /v1/messages
pub async fn messages(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let chat = chat::read(&app, &to_chat(&body)?)?;
    let generation: Generation = chat.generation;
    let protocol = Messages {
        model: named_model(&app, &body)?,
        id: new_id("msg_"),
        reader: Reader::new(chat.format.clone(), || new_id("toolu_")),
        format: chat.format,
        begun: false,
        open: None,
        index: 0,
    };
    generate::answer(&app, &generation, protocol).await
}

/// POST /v1/messages/count_tokens
pub async fn count_tokens(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let rendered = chat::render(&app, &to_chat(&call.json()?)?)?;
    let n = app.encode(&rendered.prompt).len();
    Ok(json_reply(&json!({ "input_tokens": n })))
}
