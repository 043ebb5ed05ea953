//! OpenAI's Responses on top of chat.

use super::app::{App, new_id, now};
use super::chat;
use super::errors::{ApiError, ApiResult};
use super::fields::{get, text, wrong};
use super::generate::{self, Generation, Protocol, json_reply, named, progress_json};
use super::openai::named_model;
use super::output::{Delta, Format, Message, Reader};
use super::prompt::NO_IMAGES;
use super::routes::Call;
use axum::response::Response;
use mneme_engine::scheduler::{Finished, Head, Piece, Timings};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The chat request that a Responses request stands for.
fn to_chat(body: &Value) -> ApiResult<Value> {
    if get(body, "previous_response_id").is_some() {
        return Err(ApiError::invalid(
            "llama.cpp does not support 'previous_response_id'.",
        ));
    }
    let mut messages = Vec::new();
    if let Some(instructions) = text(body, "instructions")? {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    match get(body, "input") {
        Some(Value::String(input)) => messages.push(json!({"role": "user", "content": input})),
        Some(Value::Array(items)) => {
            for item in items {
                add_item(&mut messages, item)?;
            }
        }
        Some(other) => return Err(wrong("input", "text or a list of items", other)),
        None => return Err(ApiError::invalid("'input' is required")),
    }
    let mut out: Map<String, Value> = body.as_object().cloned().unwrap_or_default();
    for name in [
        "input",
        "instructions",
        "text",
        "tools",
        "tool_choice",
        "reasoning",
    ] {
        out.remove(name);
    }
    out.insert("messages".into(), messages.into());
    if let Some(n) = out.remove("max_output_tokens") {
        out.insert("max_tokens".into(), n);
    }
    if let Some(Value::Array(tools)) = get(body, "tools") {
        let functions: Vec<Value> = tools
            .iter()
            .filter(|t| t["type"] == "function")
            .map(|t| {
                let mut f = t.as_object().cloned().unwrap_or_default();
                f.remove("type");
                json!({"type": "function", "function": f})
            })
            .collect();
        if functions.len() < tools.len() {
            return Err(ApiError::invalid("'type' of tool must be 'function'"));
        }
        out.insert("tools".into(), functions.into());
    }
    match get(body, "tool_choice") {
        Some(Value::Object(o)) if o.get("type") == Some(&json!("function")) => {
            let choice = json!({"type": "function", "function": {"name": o.get("name")}});
            out.insert("tool_choice".into(), choice);
        }
        Some(other) => {
            out.insert("tool_choice".into(), other.clone());
        }
        None => {}
    }
    if let Some(effort) = get(body, "reasoning").and_then(|r| get(r, "effort")) {
        out.insert("reasoning_effort".into(), effort.clone());
    }
    if let Some(format) = get(body, "text").and_then(|t| get(t, "format")) {
        let format = match format["type"].as_str() {
            Some("json_schema") => json!({"type": "json_schema", "json_schema": format}),
            _ => format.clone(),
        };
        out.insert("response_format".into(), format);
    }
    Ok(Value::Object(out))
}

fn add_item(messages: &mut Vec<Value>, item: &Value) -> ApiResult<()> {
    match item["type"].as_str() {
        Some("function_call") => messages.push(json!({
            "role": "assistant",
            "content": "",
            "tool_calls": [{
                "id": item["call_id"],
                "type": "function",
                "function": {"name": item["name"], "arguments": item["arguments"]},
            }],
        })),
        Some("function_call_output") => {
            let output = match &item["output"] {
                Value::String(text) => text.clone(),
                Value::Array(parts) => parts.iter().filter_map(|p| p["text"].as_str()).collect(),
                other => return Err(wrong("output", "text", other)),
            };
            messages.push(json!({
                "role": "tool", "tool_call_id": item["call_id"], "content": output,
            }));
        }
        Some("reasoning") => {}
        Some("message") | None => {
            let Some(role) = item["role"].as_str() else {
                return Err(wrong("input", "items with a role", item));
            };
            let role = if role == "developer" { "system" } else { role };
            let content = match &item["content"] {
                Value::Array(parts) => {
                    let mut texts = Vec::new();
                    for part in parts {
                        match (part["type"].as_str(), part["text"].as_str()) {
                            (Some("input_text" | "output_text" | "text"), Some(text)) => {
                                texts.push(json!({"type": "text", "text": text}));
                            }
                            (Some("refusal"), _) => {}
                            (Some("input_image"), _) => return Err(ApiError::server(NO_IMAGES)),
                            _ => return Err(wrong("content", "parts of text", part)),
                        }
                    }
                    Value::Array(texts)
                }
                other => other.clone(),
            };
            messages.push(json!({"role": role, "content": content}));
        }
        Some(other) => return Err(ApiError::invalid(format!("input item of type '{other}'"))),
    }
    Ok(())
}

/// `/v1/responses` on the wire.
struct Responses {
    generation: Arc<Generation>,
    model: String,
    id: String,
    created: u64,
    format: Format,
    reader: Reader,
    /// Ids of the items of reasoning and message, made when they begin.
    reasoning_id: Option<String>,
    message_id: Option<String>,
    /// Items that are complete.
    done: Vec<Value>,
    /// Call in progress: its item's id and where it stands in the list.
    call: Option<(String, Value)>,
    sequence: u64,
}

impl Responses {
    fn object(&self, status: &str, output: &[Value], usage: Value) -> Value {
        let text: String = (output.iter())
            .filter(|o| o["type"] == "message")
            .flat_map(|o| o["content"].as_array().into_iter().flatten())
            .filter_map(|c| c["text"].as_str())
            .collect();
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": if status == "in_progress" { Value::Null } else { now().into() },
            "status": status,
            "model": self.model,
            "output": output,
            "output_text": text,
            "usage": usage,
            "error": null,
            "incomplete_details": null,
            "instructions": null,
            "metadata": {},
            "parallel_tool_calls": true,
            "temperature": self.generation.settings.0["temperature"],
            "top_p": self.generation.settings.0["top_p"],
            "tool_choice": "auto",
            "tools": [],
        })
    }

    fn usage(n_prompt: usize, t: &Timings) -> Value {
        json!({
            "input_tokens": n_prompt,
            "output_tokens": t.n_predicted,
            "total_tokens": n_prompt + t.n_predicted,
            "input_tokens_details": {"cached_tokens": t.n_cached},
            "output_tokens_details": {"reasoning_tokens": 0},
        })
    }

    fn reasoning_item(id: &str, text: &str, status: &str) -> Value {
        let content = match text.is_empty() {
            true => json!([]),
            false => json!([{"type": "reasoning_text", "text": text}]),
        };
        json!({"id": id, "type": "reasoning", "summary": [], "content": content, "status": status})
    }

    fn message_item(id: &str, text: Option<&str>, status: &str) -> Value {
        let content = match text {
            None => json!([]),
            Some(text) => json!([Self::part(text)]),
        };
        json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": content})
    }

    fn part(text: &str) -> Value {
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
    }

    fn call_item(id: &str, call_id: &str, name: &str, arguments: &str, status: &str) -> Value {
        json!({
            "id": id, "type": "function_call", "status": status,
            "call_id": call_id, "name": name, "arguments": arguments,
        })
    }

    /// All items of a complete message.
    fn items(message: &Message) -> Vec<Value> {
        let mut out = Vec::new();
        if !message.reasoning.is_empty() {
            out.push(Self::reasoning_item(
                &new_id("rs_"),
                &message.reasoning,
                "completed",
            ));
        }
        if !message.content.is_empty() || message.calls.is_empty() {
            out.push(Self::message_item(
                &new_id("msg_"),
                Some(&message.content),
                "completed",
            ));
        }
        for call in &message.calls {
            out.push(Self::call_item(
                &new_id("fc_"),
                &call.id,
                &call.name,
                &call.arguments,
                "completed",
            ));
        }
        out
    }

    fn event(&mut self, kind: &str, mut body: Value, timings: Option<&Value>) -> String {
        body["type"] = kind.into();
        body["sequence_number"] = self.sequence.into();
        if let Some(timings) = timings {
            body["timings"] = timings.clone();
        }
        self.sequence += 1;
        named(kind, &body)
    }

    /// Ends the item that is open, if any.
    fn close(&mut self) -> String {
        let mut out = String::new();
        let at = self.done.len();
        if let Some(id) = self.reasoning_id.take() {
            let text = self.reader.message().reasoning.clone();
            let item = Self::reasoning_item(&id, &text, "completed");
            out += &self.event(
                "response.output_item.done",
                json!({"output_index": at, "item": item}),
                None,
            );
            self.done.push(item);
        }
        if let Some(id) = self.message_id.take() {
            let text = self.reader.message().content.clone();
            let at = self.done.len();
            let place = |more: Value| {
                let mut place = json!({"item_id": id, "output_index": at, "content_index": 0});
                if let (Some(place), Value::Object(more)) = (place.as_object_mut(), more) {
                    place.extend(more);
                }
                place
            };
            out += &self.event(
                "response.output_text.done",
                place(json!({"text": text, "logprobs": []})),
                None,
            );
            out += &self.event(
                "response.content_part.done",
                place(json!({"part": Self::part(&text)})),
                None,
            );
            let item = Self::message_item(&id, Some(&text), "completed");
            out += &self.event(
                "response.output_item.done",
                json!({"output_index": at, "item": item}),
                None,
            );
            self.done.push(item);
        }
        if let Some((id, mut item)) = self.call.take() {
            let at = self.done.len();
            item["status"] = "completed".into();
            let body = json!({"item_id": id, "output_index": at, "arguments": item["arguments"], "name": item["name"]});
            out += &self.event("response.function_call_arguments.done", body, None);
            out += &self.event(
                "response.output_item.done",
                json!({"output_index": at, "item": item}),
                None,
            );
            self.done.push(item);
        }
        out
    }

    fn open_message(&mut self) -> String {
        let mut out = self.close();
        let id = new_id("msg_");
        let at = self.done.len();
        let item = Self::message_item(&id, None, "in_progress");
        out += &self.event(
            "response.output_item.added",
            json!({"output_index": at, "item": item}),
            None,
        );
        let body =
            json!({"item_id": id, "output_index": at, "content_index": 0, "part": Self::part("")});
        out += &self.event("response.content_part.added", body, None);
        self.message_id = Some(id);
        out
    }

    fn delta(&mut self, delta: Delta, timings: Option<&Value>) -> String {
        let mut out = String::new();
        match delta {
            Delta::Reasoning(text) => {
                if self.reasoning_id.is_none() {
                    out += &self.close();
                    let id = new_id("rs_");
                    let item = Self::reasoning_item(&id, "", "in_progress");
                    let body = json!({"output_index": self.done.len(), "item": item});
                    out += &self.event("response.output_item.added", body, None);
                    self.reasoning_id = Some(id);
                }
                let body = json!({
                    "item_id": self.reasoning_id, "output_index": self.done.len(),
                    "content_index": 0, "delta": text,
                });
                out += &self.event("response.reasoning_text.delta", body, timings);
            }
            Delta::Content(text) => {
                if self.message_id.is_none() {
                    out += &self.open_message();
                }
                let body = json!({
                    "item_id": self.message_id, "output_index": self.done.len(),
                    "content_index": 0, "delta": text, "logprobs": [],
                });
                out += &self.event("response.output_text.delta", body, timings);
            }
            Delta::Call { name, id, .. } => {
                out += &self.close();
                let item_id = new_id("fc_");
                let item = Self::call_item(&item_id, &id, &name, "", "in_progress");
                let body = json!({"output_index": self.done.len(), "item": item});
                out += &self.event("response.output_item.added", body, None);
                self.call = Some((item_id, item));
            }
            Delta::Arguments { text, .. } => {
                let Some((id, item)) = &mut self.call else {
                    return out;
                };
                let all = item["arguments"].as_str().unwrap_or("").to_owned() + &text;
                item["arguments"] = all.into();
                let body = json!({"item_id": id, "output_index": self.done.len(), "delta": text});
                out += &self.event("response.function_call_arguments.delta", body, timings);
            }
        }
        out
    }
}

impl Protocol for Responses {
    fn reply(&mut self, answers: Vec<Finished>) -> ApiResult<Value> {
        let answer = answers
            .first()
            .ok_or_else(|| ApiError::server("no answer"))?;
        let mut reader = Reader::new(self.format.clone(), || new_id("call_"));
        reader.push(&answer.text, true);
        let items = Self::items(reader.message());
        let usage = Self::usage(answer.n_prompt, &answer.timings);
        Ok(self.object("completed", &items, usage))
    }

    fn begin(&mut self) -> String {
        let response = self.object("in_progress", &[], Value::Null);
        let body = json!({ "response": response });
        self.event("response.created", body.clone(), None)
            + &self.event("response.in_progress", body, None)
    }

    fn progress(&mut self, _: usize, head: Head) -> String {
        let response = self.object("in_progress", &[], Value::Null);
        let body = json!({"response": response, "prompt_progress": progress_json(&head)});
        self.event("response.in_progress", body, None)
    }

    fn piece(&mut self, _: usize, piece: Piece) -> String {
        let per_token = self.generation.settings.is("timings_per_token");
        let timings = per_token.then(|| generate::timings(&piece.timings, None));
        let deltas = self.reader.push(&piece.text, false);
        let deltas = deltas.into_iter();
        deltas.map(|d| self.delta(d, timings.as_ref())).collect()
    }

    fn finished(&mut self, _: usize, answer: Finished) -> String {
        let mut out = String::new();
        for delta in self.reader.push("", true) {
            out += &self.delta(delta, None);
        }
        out += &self.close();
        if self.done.is_empty() {
            out += &self.open_message();
            out += &self.close();
        }
        let done = std::mem::take(&mut self.done);
        let usage = Self::usage(answer.n_prompt, &answer.timings);
        // A client that waits for the end waits for `response.completed`.
        let response = self.object("completed", &done, usage);
        let timings = self.generation.timings(&answer);
        out += &self.event(
            "response.completed",
            json!({ "response": response }),
            Some(&timings),
        );
        out
    }
}

/// POST /v1/responses
pub async fn responses(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let chat = chat::read(&app, &to_chat(&body)?)?;
    let generation = Arc::new(chat.generation);
    let protocol = Responses {
        generation: Arc::clone(&generation),
        model: named_model(&app, &body)?,
        id: new_id("resp_"),
        created: now(),
        reader: Reader::new(chat.format.clone(), || new_id("call_")),
        format: chat.format,
        reasoning_id: None,
        message_id: None,
        done: Vec::new(),
        call: None,
        sequence: 0,
    };
    generate::answer(&app, &generation, protocol).await
}

/// POST /v1/responses/input_tokens
pub async fn tokens(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let rendered = chat::render(&app, &to_chat(&call.json()?)?)?;
    let n = app.encode(&rendered.prompt).len();
    Ok(json_reply(
        &json!({"object": "response.input_tokens", "input_tokens": n}),
    ))
}
