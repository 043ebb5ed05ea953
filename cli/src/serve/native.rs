//! llama.cpp's own endpoints: completion, infill, tokens, templates, properties.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::fields::{self, get, wrong};
use super::front::{Front, Present};
use super::generate::{self, Generation, Protocol, data, json_reply};
use super::{chat, prompt, routes::Call};
use axum::response::Response;
use mneme_engine::scheduler::{Finished, Head, Piece};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// `/completion` on the wire.
struct Native {
    app: Arc<App>,
    generation: Arc<Generation>,
}

impl Native {
    fn is(&self, name: &str) -> bool {
        self.generation.settings.is(name)
    }

    /// The object that ends a stream and is the whole of a plain reply.
    fn last(&self, index: usize, answer: &Finished) -> Value {
        final_object(&self.app, &self.generation, index, answer)
    }
}

/// A complete native answer.
pub fn final_object(app: &App, generation: &Generation, index: usize, answer: &Finished) -> Value {
    let settings = &generation.settings;
    let streams = settings.is("stream");
    let (stop_type, word) = generate::stop_words(&answer.stop);
    let prompt = &generation.prompts[index / generation.n()];
    let tokens: &[u32] = match settings.is("return_tokens") && !streams {
        true => &answer.tokens,
        false => &[],
    };
    let mut out = json!({
        "index": index,
        "content": if streams { "" } else { answer.text.as_str() },
        "tokens": tokens,
        "id_slot": answer.id_slot,
        "stop": true,
        "model": app.model_name(),
        "tokens_predicted": answer.timings.n_predicted,
        "tokens_evaluated": answer.n_prompt,
        "generation_settings": settings.echo(),
        "prompt": app.decode(prompt),
        "has_new_line": answer.has_new_line,
        "truncated": answer.truncated,
        "stop_type": stop_type,
        "stopping_word": word,
        "tokens_cached": answer.n_past,
        "timings": generation.timings(answer),
    });
    if !streams && settings.int("n_probs") > 0 {
        let post = settings.is("post_sampling_probs");
        out["completion_probabilities"] = generate::probs_json(app, &answer.probs, post);
    }
    select(out, &settings.strings("response_fields"))
}

/// Only the fields named; `a/b` reaches into an object and the whole path is the key.
fn select(object: Value, fields: &[String]) -> Value {
    if fields.is_empty() {
        return object;
    }
    let mut out = Map::new();
    for path in fields {
        let found = path.split('/').try_fold(&object, |v, key| v.get(key));
        if let Some(found) = found {
            out.insert(path.clone(), found.clone());
        }
    }
    Value::Object(out)
}

impl Protocol for Native {
    fn reply(&mut self, answers: Vec<Finished>) -> ApiResult<Value> {
        let all: Vec<Value> = (answers.iter().enumerate())
            .map(|(i, a)| self.last(i, a))
            .collect();
        Ok(match all.len() {
            1 => all.into_iter().next().unwrap_or_default(),
            _ => Value::Array(all),
        })
    }

    fn progress(&mut self, index: usize, head: Head) -> String {
        let mut out = json!({
            "index": index,
            "content": "",
            "tokens": [],
            "stop": false,
            "id_slot": -1,
            "tokens_predicted": 0,
            "tokens_evaluated": head.n_prompt,
            "prompt_progress": generate::progress_json(&head),
        });
        if self.is("timings_per_token") {
            out["timings"] = generate::progress_timings(&head);
        }
        data(&out)
    }

    fn piece(&mut self, index: usize, piece: Piece) -> String {
        let mut out = json!({
            "index": index,
            "content": piece.text,
            "tokens": piece.tokens,
            "stop": false,
            "id_slot": -1,
            "tokens_predicted": piece.n_decoded,
            "tokens_evaluated": piece.n_prompt,
        });
        if self.is("timings_per_token") {
            out["timings"] = generate::timings(&piece.timings, None);
        }
        if self.generation.settings.int("n_probs") > 0 {
            let post = self.is("post_sampling_probs");
            out["completion_probabilities"] = generate::probs_json(&self.app, &piece.probs, post);
        }
        data(&out)
    }

    fn finished(&mut self, index: usize, answer: Finished) -> String {
        data(&self.last(index, &answer))
    }
}

async fn run(app: Arc<App>, generation: Generation) -> ApiResult<Response> {
    let generation = Arc::new(generation);
    let protocol = Native {
        app: Arc::clone(&app),
        generation: Arc::clone(&generation),
    };
    generate::answer(&app, &generation, protocol).await
}

/// POST /completion
pub async fn completion(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let Some(value) = get(&body, "prompt") else {
        return Err(ApiError::invalid("\"prompt\" is missing"));
    };
    let mut generation = Generation::read(&app, &body)?;
    generation.prompts = prompt::prompts(&app, "prompt", value)?;
    run(app, generation).await
}

/// POST /infill
pub async fn infill(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    for name in ["input_prefix", "input_suffix"] {
        if fields::text(&body, name)?.is_none() {
            return Err(ApiError::invalid(format!("\"{name}\" is required")));
        }
    }
    let ids = prompt::infill(&app, &body)?;
    let mut generation = Generation::read(&app, &body)?;
    generation.prompts = vec![ids];
    run(app, generation).await
}

/// POST /tokenize
pub async fn tokenize(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let vocab = &app.model.tokenizer;
    let add_special = fields::flag(&body, "add_special", false)?;
    let parse_special = fields::flag(&body, "parse_special", true)?;
    let ids = match get(&body, "content") {
        None => Vec::new(),
        Some(Value::String(text)) => vocab.encode(text, add_special, parse_special),
        Some(Value::Array(parts)) => {
            let mut ids = Vec::new();
            for (i, part) in parts.iter().enumerate() {
                match part {
                    Value::String(text) => {
                        ids.extend(vocab.encode(text, add_special && i == 0, parse_special));
                    }
                    other => ids.push(prompt::token_id(&app, "content", other)?),
                }
            }
            ids
        }
        Some(other) => return Err(wrong("content", "text or a list", other)),
    };
    let tokens: Value = match fields::flag(&body, "with_pieces", false)? {
        false => json!(ids),
        true => (ids.iter())
            .map(|&id| {
                let piece = vocab.piece(id);
                let shown = match std::str::from_utf8(piece) {
                    Ok(text) => json!(text),
                    Err(_) => json!(piece),
                };
                json!({"id": id, "piece": shown})
            })
            .collect(),
    };
    Ok(json_reply(&json!({ "tokens": tokens })))
}

/// POST /detokenize
pub async fn detokenize(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let ids = match get(&body, "tokens") {
        None => Vec::new(),
        Some(Value::Array(ids)) => (ids.iter())
            .map(|id| prompt::token_id(&app, "tokens", id))
            .collect::<ApiResult<Vec<u32>>>()?,
        Some(other) => return Err(wrong("tokens", "a list of token ids", other)),
    };
    Ok(json_reply(&json!({ "content": app.decode(&ids) })))
}

/// POST /apply-template
pub async fn apply_template(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let rendered = chat::render(&app, &body)?;
    Ok(json_reply(&json!({ "prompt": rendered.prompt })))
}

/// GET /props
pub async fn props(front: Arc<Front>, _: Call) -> ApiResult<Response> {
    Ok(json_reply(&match front.present()? {
        Present::Awake(app) => properties(&app).await?,
        Present::Asleep(notes) => {
            let mut out = notes.props.clone();
            out["is_sleeping"] = true.into();
            out
        }
    }))
}

/// What GET /props answers while the model is there.
pub async fn properties(app: &App) -> ApiResult<Value> {
    let vocab = &app.model.tokenizer;
    let settings = fields::Settings::read(&json!({}), &app.args.defaults, vocab)?;
    let gguf = app.model.gguf();
    let cache = app
        .ask(mneme_engine::scheduler::Command::Totals)
        .await?
        .cache;
    let mut out = json!({
        "default_generation_settings": {"params": settings.echo_defaults(), "n_ctx": app.n_ctx},
        "total_slots": app.n_slots,
        "model_alias": app.model_name(),
        "model_path": app.model.path.display().to_string(),
        "model_ftype": file_type(app),
        "modalities": {"vision": false, "video": false, "audio": false},
        "media_marker": "<__media__>",
        "endpoint_slots": app.args.endpoint_slots,
        "endpoint_props": app.args.endpoint_props,
        "endpoint_metrics": app.args.endpoint_metrics,
        "ui": app.args.ui,
        "ui_settings": {},
        "chat_template": app.template.source(),
        "chat_template_caps": app.template.caps(),
        "bos_token": vocab.bos_text(),
        "eos_token": vocab.eos_text(),
        "build_info": super::BUILD_INFO,
        "is_sleeping": false,
        "cors_proxy_enabled": app.args.proxy,
        "prompt_cache": {
            "limit_bytes": cache.limit,
            "bytes": cache.n_bytes,
            "entries": cache.n_entries,
            "tokens": cache.n_tokens,
        },
        "memory": {
            "default": app.memory.text,
            "name": app.memory.name,
            "options": app.memory.options.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect::<Map<String, Value>>(),
            "available": mneme_engine::memory::MEMORIES.iter().map(|row| json!({
                "name": row.name, "about": row.about, "options": row.options,
            })).collect::<Vec<_>>(),
            "slots": app.ask(mneme_engine::scheduler::Command::Slots).await?.iter()
                .map(|s| json!({"id": s.id, "memory": s.memory}))
                .collect::<Vec<_>>(),
        },
    });
    if let Some(template) = &app.tool_template {
        out["chat_template_tool_use"] = template.source().into();
    }
    if let Ok(Some(name)) = gguf.opt_str("general.name") {
        out["model_name"] = name.into();
    }
    Ok(out)
}

/// POST /props
pub async fn set_props(app: Arc<App>, call: Call) -> ApiResult<Response> {
    if !app.args.endpoint_props {
        return Err(ApiError::unsupported(
            "This server does not support changing global properties. Start it with `--props`",
        ));
    }
    call.json()?;
    Ok(json_reply(&json!({"success": true})))
}

/// The commonest type of the model's matrices.
pub fn file_type(app: &App) -> String {
    let mut bytes: Vec<(&str, u64)> = Vec::new();
    for tensor in app
        .model
        .gguf()
        .tensors()
        .iter()
        .filter(|t| t.dims.len() > 1)
    {
        match bytes.iter_mut().find(|b| b.0 == tensor.ty.name()) {
            Some(row) => row.1 += tensor.n_bytes,
            None => bytes.push((tensor.ty.name(), tensor.n_bytes)),
        }
    }
    let most = bytes.iter().max_by_key(|b| b.1);
    most.map_or(String::new(), |b| b.0.to_uppercase())
}

/// GET /lora-adapters
pub async fn lora(_: Arc<App>, _: Call) -> ApiResult<Response> {
    Ok(json_reply(&json!([])))
}

/// POST /lora-adapters
pub async fn set_lora(_: Arc<App>, call: Call) -> ApiResult<Response> {
    match call.json()?.as_array() {
        None => Err(ApiError::invalid("Request body must be an array")),
        Some(all) if all.is_empty() => Ok(json_reply(&json!({"success": true}))),
        Some(_) => Err(ApiError::invalid("no LoRA adapter is loaded")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn response_fields_reach_into_objects() {
        let object = json!({"content": "x", "a": {"b": {"c": 1}}});
        let fields: Vec<String> = ["content", "a/b/c", "nope", "a/nope"]
            .map(String::from)
            .into();
        assert_eq!(
            select(object.clone(), &fields),
            json!({"content": "x", "a/b/c": 1})
        );
        assert_eq!(select(object.clone(), &[]), object);
    }
}
