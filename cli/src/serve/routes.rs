//! Every route, in one table: what is served, and what /openapi.json says.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::front::Front;
use super::generate::json_reply;
use super::{
    anthropic, embed, metrics, native, openai, openapi, proxy, responses, slots, tools, ui,
};
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::response::Response;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use std::sync::Arc;

/// A request as handlers see it.
pub struct Call {
    /// The `{id}` of the path; empty without one.
    pub id: String,
    /// Query parameters, decoded.
    pub query: Vec<(String, String)>,
    /// The head of the request.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Call {
    /// The body as JSON, whatever the content type says.
    pub fn json(&self) -> ApiResult<Value> {
        serde_json::from_slice(&self.body)
            .map_err(|e| ApiError::server(format!("the request body is not JSON: {e}")))
    }

    /// A query parameter.
    pub fn query(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// What a handler returns.
type Answer = BoxFuture<'static, ApiResult<Response>>;

/// A handler.
#[derive(Clone, Copy)]
pub enum Handler {
    /// Needs the model; a server that sleeps wakes up.
    Model(fn(Arc<App>, Call) -> Answer),
    /// Answers also while the model is not there.
    Front(fn(Arc<Front>, Call) -> Answer),
}

/// What the body of a request is, for /openapi.json.
#[derive(Clone, Copy, PartialEq)]
pub enum BodyKind {
    /// None.
    Nothing,
    /// A JSON value.
    Json,
    /// JSON with the generation fields and these of its own.
    Generation(&'static [&'static str]),
}

/// A route.
pub struct Route {
    /// GET or POST.
    pub method: &'static str,
    /// Paths; all but the first are other names for it.
    pub paths: &'static [&'static str],
    /// One line about it.
    pub about: &'static str,
    /// Its body.
    pub body: BodyKind,
    /// Whether it needs no API key.
    pub open: bool,
    /// What it does.
    pub handler: Handler,
}

use BodyKind::{Generation, Json, Nothing};

macro_rules! routes {
    ($($method:literal [$($path:literal),+] $body:expr, $open:literal, $kind:ident $handler:path, $about:literal;)*) => {
        &[$(Route {
            method: $method,
            paths: &[$($path),+],
            about: $about,
            body: $body,
            open: $open,
            handler: Handler::$kind(|who, call| Box::pin($handler(who, call))),
        }),*]
    };
}

/// Every route.
pub const ROUTES: &[Route] = routes! {
    "GET" ["/health", "/v1/health"] Nothing, true, Front health, "Whether the model is loaded";
    "GET" ["/v1/models", "/models"] Nothing, false, Front openai::models, "The model";
    "GET" ["/props"] Nothing, false, Front native::props, "Properties of server, model and memory";
    "POST" ["/props"] Json, false, Model native::set_props, "Changes nothing; needs --props";
    "POST" ["/completion", "/completions"] Generation(&["prompt"]), false, Model native::completion, "Continue a prompt";
    "POST" ["/infill"] Generation(&["input_prefix", "input_suffix", "input_extra", "prompt"]), false, Model native::infill, "Fill a gap in code";
    "POST" ["/tokenize"] Json, false, Model native::tokenize, "Text to token ids";
    "POST" ["/detokenize"] Json, false, Model native::detokenize, "Token ids to text";
    "POST" ["/apply-template"] Json, false, Model native::apply_template, "Messages to the prompt they become";
    "POST" ["/v1/completions"] Generation(&["prompt", "model"]), false, Model openai::completions, "OpenAI text completion";
    "POST" ["/v1/chat/completions", "/chat/completions"] Generation(&["messages", "model", "tools", "tool_choice", "response_format", "stream_options", "top_logprobs", "chat_template_kwargs", "reasoning_effort", "reasoning_format"]), false, Model openai::chat_completions, "OpenAI chat completion";
    "POST" ["/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"] Json, false, Model openai::chat_tokens, "Tokens of a chat request's prompt";
    "POST" ["/v1/responses", "/responses"] Generation(&["input", "model", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning"]), false, Model responses::responses, "OpenAI Responses";
    "POST" ["/v1/responses/input_tokens", "/responses/input_tokens"] Json, false, Model responses::tokens, "Tokens of a Responses request's prompt";
    "POST" ["/v1/messages"] Generation(&["messages", "model", "system", "stop_sequences", "tools", "tool_choice", "thinking"]), false, Model anthropic::messages, "Anthropic Messages";
    "POST" ["/v1/messages/count_tokens"] Json, false, Model anthropic::count_tokens, "Tokens of a Messages request's prompt";
    "POST" ["/v1/embeddings"] Json, false, Model embed::openai, "OpenAI embeddings; needs --embeddings";
    "POST" ["/embedding", "/embeddings"] Json, false, Model embed::native, "Embeddings; needs --embeddings";
    "POST" ["/v1/rerank", "/rerank", "/v1/reranking", "/reranking"] Json, false, Model embed::rerank, "Documents in order of relevance; needs --reranking";
    "GET" ["/slots"] Nothing, false, Model slots::list, "What every slot does";
    "GET" ["/slots/{id}/memory"] Nothing, false, Model slots::memory, "A slot's memory: numbers, and nodes with their spans; ?text adds the text";
    "POST" ["/slots/{id}/memory"] Json, false, Model slots::set_memory, "Changes dials of a slot's memory (tau, target_rate) for what it reads from now on";
    "POST" ["/slots/{id}"] Json, false, Model slots::act, "?action=save, restore or erase; needs --slot-save-path";
    "GET" ["/metrics"] Nothing, false, Front metrics::metrics, "Running totals for Prometheus; needs --metrics";
    "GET" ["/lora-adapters"] Nothing, false, Model native::lora, "Adapters: none";
    "POST" ["/lora-adapters"] Json, false, Model native::set_lora, "Accepts the empty list";
    "GET" ["/cors-proxy"] Nothing, false, Front proxy::get, "Fetches ?url= for a page; needs --ui-mcp-proxy";
    "POST" ["/cors-proxy"] Json, false, Front proxy::post, "The same, with a body";
    "GET" ["/tools"] Nothing, false, Front tools::list, "Tools that this server runs; needs --tools";
    "POST" ["/tools"] Json, false, Front tools::call, "Runs a tool; needs --tools";
    "GET" ["/openapi.json"] Nothing, false, Front openapi::description, "This description";
    "GET" ["/", "/index.html"] Nothing, true, Front ui::page, "A page to chat and to look at the memory";
    "GET" ["/bundle.js"] Nothing, true, Front ui::script, "The page's program";
    "GET" ["/bundle.css"] Nothing, true, Front ui::style, "The page's style";
};

/// GET /health
async fn health(_: Arc<Front>, _: Call) -> ApiResult<Response> {
    Ok(json_reply(&json!({"status": "ok"})))
}
