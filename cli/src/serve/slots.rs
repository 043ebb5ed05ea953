//! Slots: what they do, what they remember, and their files.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::fields::wrong;
use super::generate::{json_reply, memory_json};
use super::routes::Call;
use axum::response::Response;
use mneme_engine::scheduler::{Command, SlotView};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

fn slot_json(app: &App, slot: &SlotView) -> Value {
    let mut out = json!({
        "id": slot.id,
        "n_ctx": app.n_ctx,
        "speculative": false,
        "is_processing": slot.is_processing,
        "memory": {"spec": slot.memory, "stats": memory_json(&slot.stats)},
    });
    if let Some(task) = &slot.task {
        let more = json!({
            "id_task": task.id,
            "n_prompt_tokens": slot.n_past,
            "n_prompt_tokens_processed": task.n_processed,
            "n_prompt_tokens_cache": task.n_cached,
            "params": *task.echo,
            "next_token": [{
                "has_next_token": slot.is_processing,
                "has_new_line": task.has_new_line,
                "n_remain": task.n_remain,
                "n_decoded": task.n_decoded,
            }],
        });
        if let (Some(out), Value::Object(more)) = (out.as_object_mut(), more) {
            out.extend(more);
        }
    }
    out
}

/// GET /slots
pub async fn list(app: Arc<App>, call: Call) -> ApiResult<Response> {
    if !app.args.endpoint_slots {
        return Err(ApiError::unsupported(
            "This server does not support slots endpoint. Start it with `--slots`",
        ));
    }
    let slots = app.ask(Command::Slots).await?;
    if call.query("fail_on_no_slot").is_some() && slots.iter().all(|s| s.is_processing) {
        return Err(ApiError::unavailable("no slot available"));
    }
    let all: Value = slots.iter().map(|s| slot_json(&app, s)).collect();
    Ok(json_reply(&all))
}

fn slot_id(call: &Call) -> ApiResult<usize> {
    let id = call.id.parse::<u32>();
    id.map(|n| n as usize)
        .map_err(|_| ApiError::invalid("Invalid slot ID"))
}

/// GET /slots/{id}/memory
pub async fn memory(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let id = slot_id(&call)?;
    let view = app.ask(|reply| Command::Memory(id, reply)).await?;
    let Some(view) = view else {
        return Err(ApiError::invalid("Invalid slot ID"));
    };
    let with_text = call.query("text").is_some();
    let text = |start: usize, end: usize| {
        let end = end.min(view.tokens.len());
        app.decode(view.tokens.get(start..end).unwrap_or(&[]))
    };
    let nodes: Value = (view.nodes.iter())
        .map(|node| {
            let mut out = json!(node);
            // JSON knows no NaN, which a cut without a probability could have.
            if !node.p.is_finite() {
                out["p"] = Value::Null;
            }
            if with_text {
                out["text"] = text(node.start, node.end).into();
            }
            out
        })
        .collect();
    let mut out = json!({
        "id_slot": id,
        "memory": view.spec,
        "stats": memory_json(&view.stats),
        "nodes": nodes,
        "n_tokens": view.tokens.len(),
    });
    if with_text {
        let from = view.nodes.iter().map(|n| n.end).max().unwrap_or(0);
        out["tail"] = json!({"start": from, "text": text(from, view.tokens.len())});
    }
    Ok(json_reply(&out))
}

/// POST /slots/{id}/memory
pub async fn set_memory(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let id = slot_id(&call)?;
    let body = call.json()?;
    let Some(dials) = body.as_object().filter(|o| !o.is_empty()) else {
        return Err(ApiError::invalid(
            "expected an object of dials and numbers, such as {\"tau\": 0.5}",
        ));
    };
    let mut stats = None;
    for (dial, value) in dials {
        let Some(number) = value.as_f64() else {
            return Err(wrong(dial, "a number", value));
        };
        let dial = dial.clone();
        let set = (app.ask(|reply| Command::Set(id, dial, number, reply))).await?;
        let Some(set) = set else {
            return Err(ApiError::invalid("Invalid slot ID"));
        };
        stats = Some(set.map_err(|e| ApiError::invalid(e.to_string()))?);
    }
    let stats = stats.as_ref().map(memory_json);
    Ok(json_reply(&json!({"id_slot": id, "stats": stats})))
}

/// A file name that cannot leave the folder it is put in.
fn file_name(body: &Value) -> ApiResult<&str> {
    let name = body.get("filename").and_then(Value::as_str).unwrap_or("");
    let bad = name.is_empty()
        || name.len() > 255
        || name.starts_with('.')
        || name.ends_with(['.', ' '])
        || name.contains("..")
        || name.chars().any(|c| {
            c.is_control()
                || matches!(
                    c,
                    '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|' | '\u{fffd}'
                )
        });
    match bad {
        true => Err(ApiError::invalid("Invalid filename")),
        false => Ok(name),
    }
}

/// POST /slots/{id}?action=save|restore|erase
pub async fn act(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let Some(dir) = &app.args.slot_save_path else {
        return Err(ApiError::unsupported(
            "This server does not support slots action. Start it with `--slot-save-path`",
        ));
    };
    let id = slot_id(&call)?;
    let begin = Instant::now();
    let spent = |begin: Instant| begin.elapsed().as_secs_f64() * 1e3;
    let target = |call: &Call| -> ApiResult<(String, PathBuf)> {
        let body = call.json()?;
        let name = file_name(&body)?.to_owned();
        let path = dir.join(&name);
        Ok((name, path))
    };
    match call.query("action") {
        Some("save") => {
            let (name, path) = target(&call)?;
            let file = app.ask(|reply| Command::Save(id, path, reply)).await?;
            let file = file.map_err(|e| ApiError::server(e.to_string()))?;
            Ok(json_reply(&json!({
                "id_slot": file.id_slot,
                "filename": name,
                "n_saved": file.n_tokens,
                "n_written": file.n_bytes,
                "timings": {"save_ms": spent(begin)},
            })))
        }
        Some("restore") => {
            let (name, path) = target(&call)?;
            let file = app.ask(|reply| Command::Restore(id, path, reply)).await?;
            let file = file.map_err(|e| {
                let why = e.to_string();
                tracing::warn!("slot {id}: {why}");
                ApiError::invalid(match why.starts_with("Restored prompt") {
                    true => why,
                    false => "Unable to restore slot, no available space in KV cache or invalid slot save file".into(),
                })
            })?;
            Ok(json_reply(&json!({
                "id_slot": file.id_slot,
                "filename": name,
                "n_restored": file.n_tokens,
                "n_read": file.n_bytes,
                "timings": {"restore_ms": spent(begin)},
            })))
        }
        Some("erase") => {
            let n = app.ask(|reply| Command::Erase(id, reply)).await?;
            Ok(json_reply(&json!({"id_slot": id, "n_erased": n})))
        }
        _ => Err(ApiError::invalid("Invalid action")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_stay_in_their_folder() {
        for bad in [
            "", ".", "..", "../x", "a/b", "a\\b", "x\u{0}", "c:x", ".hidden", "a..b",
        ] {
            assert!(file_name(&json!({"filename": bad})).is_err(), "{bad:?}");
        }
        assert!(file_name(&json!({"filename": 1})).is_err());
        assert_eq!(
            file_name(&json!({"filename": "slot1.bin"})),
            Ok("slot1.bin")
        );
    }
}
