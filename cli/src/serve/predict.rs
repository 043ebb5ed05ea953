//! The prediction protocol of Vertex AI: several requests of other routes in one body.
//!
//! Only with `AIP_MODE=PREDICTION` in the environment, which that cloud sets for its containers.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::generate::json_reply;
use super::routes::{Call, Handler, ROUTES};
use axum::body::{Bytes, to_bytes};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;

/// Most instances of a request.
const MAX_INSTANCES: usize = 128;
/// Largest reply to an instance, in bytes.
const MAX_REPLY: usize = 256 << 20;

/// The name of a path in `@requestFormat`: `/v1/chat/completions` is `chatCompletions`.
fn format_name(path: &str) -> String {
    let path = path.strip_prefix("/v1").unwrap_or(path);
    let mut out = String::new();
    let mut upper = false;
    for c in path.trim_start_matches('/').chars() {
        match c {
            '{' => break,
            '/' | '-' | '_' => upper = true,
            c if upper => {
                out.push(c.to_ascii_uppercase());
                upper = false;
            }
            c => out.push(c),
        }
    }
    out
}

/// POST to the route of `AIP_PREDICT_ROUTE`.
pub async fn predict(app: Arc<App>, call: Call) -> ApiResult<Response> {
    let body: Value = serde_json::from_slice(&call.body)
        .map_err(|e| ApiError::invalid(format!("the request body is not JSON: {e}")))?;
    let Some(instances) = body.get("instances").and_then(Value::as_array) else {
        return Err(ApiError::invalid(
            "the request body needs a list named \"instances\"",
        ));
    };
    if instances.len() > MAX_INSTANCES {
        return Err(ApiError::invalid(format!(
            "\"instances\": at most {MAX_INSTANCES}, got {}",
            instances.len()
        )));
    }
    let all = instances.iter().map(|one| {
        let app = Arc::clone(&app);
        async move { instance(app, one).await.unwrap_or_else(|e| e.body()) }
    });
    let predictions = futures::future::join_all(all).await;
    Ok(json_reply(&json!({ "predictions": predictions })))
}

async fn instance(app: Arc<App>, one: &Value) -> ApiResult<Value> {
    let mut body = one.clone();
    let named = body
        .as_object_mut()
        .and_then(|o| o.remove("@requestFormat"));
    let Some(name) = named.as_ref().and_then(Value::as_str) else {
        return Err(ApiError::invalid(
            "an instance is an object with a string \"@requestFormat\"",
        ));
    };
    if body.get("stream").is_some() {
        body["stream"] = false.into();
    }
    let fits = |path: &&str| !path.contains('{') && (*path == name || format_name(path) == name);
    let route = ROUTES
        .iter()
        .find(|r| r.method == "POST" && r.paths.iter().any(fits));
    let Some(Handler::Model(handler)) = route.map(|r| r.handler) else {
        return Err(ApiError::invalid(format!(
            "\"@requestFormat\": no route is called {name}"
        )));
    };
    let call = Call {
        id: String::new(),
        query: Vec::new(),
        headers: Default::default(),
        body: Bytes::from(body.to_string()),
    };
    let reply = handler(app, call).await?.into_body();
    let reply = (to_bytes(reply, MAX_REPLY).await).map_err(|e| ApiError::server(e.to_string()))?;
    serde_json::from_slice(&reply).map_err(|e| ApiError::server(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_paths() {
        for (path, name) in [
            ("/v1/chat/completions", "chatCompletions"),
            ("/apply-template", "applyTemplate"),
            ("/completion", "completion"),
            ("/v1/messages/count_tokens", "messagesCountTokens"),
        ] {
            assert_eq!(format_name(path), name);
        }
    }
}
