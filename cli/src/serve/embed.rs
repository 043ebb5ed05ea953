//! Embeddings and reranking: vectors and scores of texts instead of answers.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::fields::{self, get, wrong};
use super::generate::{Generation, json_reply};
use super::prompt::{self, NO_IMAGES};
use super::routes::Call;
use axum::response::Response;
use mneme_engine::embed::{Pooling, normalise};
use mneme_engine::scheduler::Embedded;
use serde_json::{Value, json};
use std::sync::Arc;

/// Texts of one request that are handed in at a time: a request of thousands must not fill the
/// queue for everybody else.
const AT_A_TIME: usize = 64;

/// Embeds `prompts` in order, with the generation fields of `body`.
async fn embed(app: &App, body: &Value, prompts: Vec<Vec<u32>>) -> ApiResult<Vec<Embedded>> {
    for prompt in &prompts {
        if prompt.len() > app.n_ctx {
            return Err(ApiError::server(format!(
                "input ({} tokens) is too large to process. a slot holds {} tokens, see --ctx-size",
                prompt.len(),
                app.n_ctx
            )));
        }
    }
    let mut generation = Generation::read(app, body)?;
    generation.embed = Some(app.pooling);
    generation.settings.0.insert("n_cmpl".into(), 1.into());
    let mut out = Vec::with_capacity(prompts.len());
    let mut prompts = prompts.into_iter().peekable();
    while prompts.peek().is_some() {
        generation.prompts = prompts.by_ref().take(AT_A_TIME).collect();
        out.extend(generation.submit(app)?.all_embedded().await?);
    }
    Ok(out)
}

/// The texts of `value`: as for completions, and objects with OpenAI's parts of text.
fn texts(app: &App, name: &str, value: &Value) -> ApiResult<Vec<Vec<u32>>> {
    let one = |value: &Value| -> ApiResult<Vec<u32>> {
        let vocab = &app.model.tokenizer;
        let ids = match (value, value.get("content")) {
            (Value::String(text), _) => vocab.encode(text, true, true),
            (Value::Object(_), Some(Value::Array(parts))) => {
                let mut text = String::new();
                for part in parts {
                    match (part["type"].as_str(), part["text"].as_str()) {
                        (Some("text"), Some(more)) => text += more,
                        (Some("image_url" | "input_audio" | "input_video"), _) => {
                            return Err(ApiError::server(NO_IMAGES));
                        }
                        _ => return Err(wrong("content", "parts of type text", part)),
                    }
                }
                vocab.encode(&text, true, true)
            }
            (Value::Object(_), Some(other)) => {
                return Err(wrong("content", "a list of parts", other));
            }
            _ => prompt::prompt(app, name, value)?,
        };
        match ids.is_empty() {
            true => Err(ApiError::invalid("Input content cannot be empty")),
            false => Ok(ids),
        }
    };
    match value {
        Value::Array(all) if all.is_empty() => {
            Err(ApiError::invalid(format!("\"{name}\" must not be empty")))
        }
        Value::Array(all) if !all.iter().any(Value::is_number) => all.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

/// Vectors as they are given out: read by the classifier or scaled, where that applies.
fn vectors(app: &App, embedded: &Embedded, norm: i32) -> Vec<Vec<f32>> {
    let of = |v: &Vec<f32>| match (&app.classifier, app.pooling) {
        (Some(classifier), Pooling::Rank) => classifier.scores(v),
        (_, Pooling::None) => v.clone(),
        _ => {
            let mut v = v.clone();
            normalise(&mut v, norm);
            v
        }
    };
    embedded.vectors.iter().map(of).collect()
}

/// Standard base64 with padding (RFC 4648).
fn base64(bytes: impl Iterator<Item = u8>) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = bytes.collect();
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= three.len() {
                letter as char
            } else {
                '='
            });
        }
    }
    out
}

/// What both forms of an embedding request share.
async fn answer(app: &App, body: &Value, openai: bool) -> ApiResult<Response> {
    if !app.args.embeddings {
        return Err(ApiError::unsupported(
            "This server does not support embeddings. Start it with `--embeddings`",
        ));
    }
    if openai && app.pooling == Pooling::None {
        return Err(ApiError::invalid(
            "Pooling type 'none' is not OAI compatible. Please use a different pooling type",
        ));
    }
    // `content` is llama.cpp's own name and gets its own form.
    let (name, value, openai) = match (get(body, "input"), get(body, "content")) {
        (Some(value), _) => ("input", value, openai),
        (None, Some(value)) => ("content", value, false),
        (None, None) => {
            return Err(ApiError::invalid(
                "\"input\" or \"content\" must be provided",
            ));
        }
    };
    let as_base64 = match get(body, "encoding_format") {
        None => false,
        Some(format) => match format.as_str() {
            Some("base64") => true,
            Some("float") => false,
            _ => return Err(wrong("encoding_format", "float or base64", format)),
        },
    };
    let norm = match get(body, "embd_normalize") {
        None => app.args.embd_normalize,
        Some(n) => match n.as_i64().and_then(|n| i32::try_from(n).ok()) {
            Some(n) => n,
            None => return Err(wrong("embd_normalize", "a whole number", n)),
        },
    };
    let embedded = embed(app, body, texts(app, name, value)?).await?;
    let of = |e: &Embedded| vectors(app, e, norm);
    if !openai {
        let all = embedded.iter().enumerate();
        let all: Value = all
            .map(|(i, e)| json!({"index": i, "embedding": of(e)}))
            .collect();
        return Ok(json_reply(&all));
    }
    let n: usize = embedded.iter().map(|e| e.n_prompt).sum();
    let data: Value = (embedded.iter().enumerate())
        .map(|(i, e)| {
            let v = of(e).into_iter().next().unwrap_or_default();
            match as_base64 {
                false => json!({"embedding": v, "index": i, "object": "embedding"}),
                true => json!({
                    "embedding": base64(v.iter().flat_map(|x| x.to_le_bytes())),
                    "index": i,
                    "object": "embedding",
                    "encoding_format": "base64",
                }),
            }
        })
        .collect();
    Ok(json_reply(&json!({
        "model": model_of(app, body)?,
        "object": "list",
        "usage": {"prompt_tokens": n, "total_tokens": n},
        "data": data,
    })))
}

/// The model's name as the request has it, else the server's.
fn model_of(app: &App, body: &Value) -> ApiResult<String> {
    Ok(match fields::text(body, "model")? {
        Some(name) => name.to_owned(),
        None => app.model_name(),
    })
}

/// POST /v1/embeddings
pub async fn openai(app: Arc<App>, call: Call) -> ApiResult<Response> {
    answer(&app, &call.json()?, true).await
}

/// POST /embedding
pub async fn native(app: Arc<App>, call: Call) -> ApiResult<Response> {
    answer(&app, &call.json()?, false).await
}

/// The ids a reranker reads for one document: its template, or both texts one after the other.
fn pair(app: &App, query: &str, document: &str) -> ApiResult<Vec<u32>> {
    let vocab = &app.model.tokenizer;
    let template = app.model.gguf().opt_str("tokenizer.chat_template.rerank");
    if let Some(template) = template.map_err(|e| ApiError::server(e.to_string()))? {
        // Texts that name the other placeholder stay as they are.
        let mut text = String::new();
        let mut rest = template;
        loop {
            let at = ["{query}", "{document}"].map(|name| rest.find(name).map(|at| (at, name)));
            let Some((at, name)) = at.into_iter().flatten().min() else {
                text += rest;
                break;
            };
            text += &rest[..at];
            text += if name == "{query}" { query } else { document };
            rest = &rest[at + name.len()..];
        }
        return Ok(vocab.encode(&text, false, true));
    }
    let mut ids = Vec::new();
    if vocab.add_bos() {
        ids.extend(vocab.bos());
    }
    for text in [query, document] {
        ids.extend(vocab.encode(text, false, false));
        if vocab.add_eos() {
            ids.extend(vocab.eos());
        }
    }
    Ok(ids)
}

/// POST /rerank
pub async fn rerank(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body = call.json()?;
    let Some(classifier) = app.classifier.as_ref().filter(|_| app.args.reranking) else {
        return Err(ApiError::unsupported(
            "This server does not support reranking. Start it with `--reranking`",
        ));
    };
    let Some(query) = fields::text(&body, "query")? else {
        return Err(ApiError::invalid("\"query\" must be provided"));
    };
    let tei = get(&body, "texts").is_some();
    let documents = get(&body, "documents").or_else(|| get(&body, "texts"));
    let documents = documents.and_then(Value::as_array);
    let documents: Option<Vec<&str>> =
        documents.and_then(|all| all.iter().map(Value::as_str).collect());
    let documents = documents
        .filter(|all| !all.is_empty())
        .ok_or_else(|| ApiError::invalid("\"documents\" must be a non-empty string array"))?;
    let top_n = match get(&body, "top_n") {
        None => documents.len(),
        Some(n) => match n.as_u64() {
            Some(n) => n as usize,
            None => return Err(wrong("top_n", "a whole number", n)),
        },
    };
    let return_text = tei && fields::flag(&body, "return_text", false)?;
    let pairs = documents.iter().map(|document| pair(&app, query, document));
    let pairs = pairs.collect::<ApiResult<Vec<_>>>()?;
    let embedded = embed(&app, &body, pairs).await?;
    let n: usize = embedded.iter().map(|e| e.n_prompt).sum();
    let mut scored: Vec<(usize, f32)> = (embedded.iter().enumerate())
        .map(|(i, e)| {
            let scores = e.vectors.first().map(|v| classifier.scores(v));
            (i, scores.and_then(|s| s.first().copied()).unwrap_or(0.0))
        })
        .collect();
    scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    scored.truncate(top_n);
    let label = if tei { "score" } else { "relevance_score" };
    let results: Value = (scored.into_iter())
        .map(|(i, score)| {
            let mut out = json!({"index": i, label: score});
            if return_text {
                out["text"] = documents[i].into();
            }
            out
        })
        .collect();
    if tei {
        return Ok(json_reply(&results));
    }
    Ok(json_reply(&json!({
        "model": model_of(&app, &body)?,
        "object": "list",
        "usage": {"prompt_tokens": n, "total_tokens": n},
        "results": results,
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.bytes()), expected);
        }
        assert_eq!(base64([0xfb, 0xff, 0xbf].into_iter()), "+/+/");
    }
}
