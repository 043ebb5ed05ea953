//! Prompts in all the forms that requests give them.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::fields::{self, get, wrong};
use serde_json::Value;

/// Message for parts of a prompt that are no text.
pub const NO_IMAGES: &str =
    "image input is not supported - hint: this server reads text models only";

/// The prompts of a request: one, or a batch.
pub fn prompts(app: &App, name: &str, value: &Value) -> ApiResult<Vec<Vec<u32>>> {
    match value {
        Value::Array(all) if all.is_empty() => {
            Err(ApiError::invalid(format!("\"{name}\" must not be empty")))
        }
        Value::Array(all) if !all.iter().any(Value::is_number) => {
            all.iter().map(|one| prompt(app, name, one)).collect()
        }
        one => Ok(vec![prompt(app, name, one)?]),
    }
}

/// One prompt: text, token ids, both mixed, or an object around a text.
pub fn prompt(app: &App, name: &str, value: &Value) -> ApiResult<Vec<u32>> {
    match value {
        Value::String(text) => Ok(app.encode(text)),
        Value::Array(parts) => mixed(app, name, parts),
        Value::Object(_) => {
            match get(value, "multimodal_data") {
                None => {}
                Some(Value::Array(media)) if media.is_empty() => {}
                Some(_) => return Err(ApiError::server(NO_IMAGES)),
            }
            match value.get("prompt_string") {
                Some(Value::String(text)) => Ok(app.encode(text)),
                _ => Err(wrong(name, "an object with prompt_string", value)),
            }
        }
        other => Err(wrong(name, "text, token ids or both", other)),
    }
}

/// Ids and texts in one list; only a text at the very beginning gets BOS.
pub fn mixed(app: &App, name: &str, parts: &[Value]) -> ApiResult<Vec<u32>> {
    let vocab = &app.model.tokenizer;
    let mut ids = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        match part {
            Value::String(text) => ids.extend(vocab.encode(text, i == 0, true)),
            other => ids.push(token_id(app, name, other)?),
        }
    }
    match ids.is_empty() {
        true => Err(ApiError::invalid(format!("\"{name}\" must not be empty"))),
        false => Ok(ids),
    }
}

/// An id that the vocabulary has.
pub fn token_id(app: &App, name: &str, value: &Value) -> ApiResult<u32> {
    let n_vocab = app.model.hparams().n_vocab;
    match value.as_u64() {
        Some(id) if (id as usize) < n_vocab => Ok(id as u32),
        _ => Err(wrong(name, &format!("token ids below {n_vocab}"), value)),
    }
}

/// The prompt of `/infill`: files around, text before, text after.
pub fn infill(app: &App, body: &Value) -> ApiResult<Vec<u32>> {
    let vocab = &app.model.tokenizer;
    let ids = vocab.ids();
    let (Some(prefix_id), Some(suffix_id), Some(middle_id)) =
        (ids.fim_prefix, ids.fim_suffix, ids.fim_middle)
    else {
        return Err(ApiError::unsupported(
            "Infill is not supported by this model: it has no tokens for prefix, suffix and middle",
        ));
    };
    let text = |name: &str| Ok::<_, ApiError>(fields::text(body, name)?.unwrap_or(""));
    let encode = |text: &str| vocab.encode(text, false, false);
    let mut extra = Vec::new();
    let files = match get(body, "input_extra") {
        None => &[][..],
        Some(Value::Array(files)) => &files[..],
        Some(other) => return Err(wrong("input_extra", "a list of files", other)),
    };
    if let Some(repo) = ids.fim_repo {
        extra.push(repo);
        extra.extend(encode("myproject\n"));
    }
    for file in files {
        let Some(content) = file.get("text").and_then(Value::as_str) else {
            return Err(ApiError::invalid(
                "extra_context chunk must contain a \"text\" field with a string value",
            ));
        };
        let name = match get(file, "filename") {
            None => "tmp",
            Some(Value::String(name)) => name,
            Some(_) => {
                return Err(ApiError::invalid(
                    "extra_context chunk must contain a \"filename\" field with a string value",
                ));
            }
        };
        match ids.fim_sep {
            Some(sep) => {
                extra.push(sep);
                extra.extend(encode(&format!("{name}\n")));
            }
            None => extra.extend(encode("\n\n--- snippet ---\n\n")),
        }
        extra.extend(encode(content));
    }
    if let Some(sep) = ids.fim_sep {
        extra.push(sep);
        extra.extend(encode("filename\n"));
    }
    let mut before = encode(text("input_prefix")?);
    let prompt = encode(text("prompt")?);
    let mut after = encode(text("input_suffix")?);
    // The nearest text matters most: three quarters of a batch before the gap, one after it.
    let n_batch = app.args.n_batch.min(app.n_ctx / 2).max(8);
    before.drain(..before.len().saturating_sub(n_batch / 4 * 3));
    after.truncate((n_batch / 4).saturating_sub(2 + prompt.len()));
    let n_predict = fields::get(body, "n_predict")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    let room =
        (app.n_ctx - n_batch).saturating_sub(2 * n_predict.min(u64::from(u32::MAX)) as usize);
    extra.drain(..extra.len().saturating_sub(room));
    let mut out = extra;
    if vocab.add_bos() {
        out.extend(vocab.bos());
    }
    out.push(prefix_id);
    out.extend(before);
    out.extend(prompt);
    out.push(suffix_id);
    out.extend(after);
    out.push(middle_id);
    Ok(out)
}
