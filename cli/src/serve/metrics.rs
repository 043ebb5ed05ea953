//! GET /metrics: running totals for Prometheus.

use super::errors::{ApiError, ApiResult};
use super::front::{Front, Present};
use super::routes::Call;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use mneme_engine::scheduler::{Command, SlotView, Totals};
use std::fmt::Write;
use std::sync::Arc;

/// Totals at the last scrape: rates are averages since then.
#[derive(Clone, Debug, Default)]
pub struct Scrape {
    prompt_tokens: u64,
    prompt_seconds: f64,
    predicted_tokens: u64,
    predicted_seconds: f64,
}

fn per(n: f64, d: f64) -> f64 {
    if d > 0.0 { n / d } else { 0.0 }
}

fn row(out: &mut String, kind: &str, name: &str, help: &str, value: f64) {
    let name = format!("llamacpp:{name}");
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}"
    );
}

/// GET /metrics
pub async fn metrics(front: Arc<Front>, _: Call) -> ApiResult<Response> {
    if !front.args.endpoint_metrics {
        return Err(ApiError::unsupported(
            "This server does not support metrics endpoint. Start it with `--metrics`",
        ));
    }
    let (t, slots) = match front.present()? {
        Present::Awake(app) => (
            app.ask(Command::Totals).await?,
            app.ask(Command::Slots).await?,
        ),
        Present::Asleep(notes) => (notes.totals.clone(), notes.slots.clone()),
    };
    let before = {
        let mut kept = front.scraped.lock().unwrap_or_else(|e| e.into_inner());
        std::mem::replace(
            &mut *kept,
            Scrape {
                prompt_tokens: t.prompt_tokens,
                prompt_seconds: t.prompt_seconds,
                predicted_tokens: t.predicted_tokens,
                predicted_seconds: t.predicted_seconds,
            },
        )
    };
    let mut response = text(&t, &before, &slots).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; version=0.0.4"),
    );
    headers.insert("Process-Start-Time-Unix", HeaderValue::from(front.started));
    Ok(response)
}

#[rustfmt::skip]
fn text(t: &Totals, before: &Scrape, slots: &[SlotView]) -> String {
    let mut out = String::new();
    let known = (t.prompt_tokens + t.prompt_cached) as f64;
    for (name, help, value) in [
        ("prompt_tokens_total", "Number of prompt tokens processed.", t.prompt_tokens as f64),
        ("prompt_tokens_cached_total", "Number of prompt tokens that were already known.", t.prompt_cached as f64),
        ("prompt_seconds_total", "Prompt process time", t.prompt_seconds),
        ("tokens_predicted_total", "Number of generation tokens processed.", t.predicted_tokens as f64),
        ("tokens_predicted_seconds_total", "Predict process time", t.predicted_seconds),
        ("n_decode_total", "Number of passes through the model", t.n_passes as f64),
        ("n_tokens_max", "Largest number of tokens seen in a slot.", t.n_tokens_max as f64),
        ("spec_decode_num_draft_tokens_total", "Number of draft tokens.", 0.0),
        ("spec_decode_num_accepted_tokens_total", "Number of accepted draft tokens.", 0.0),
        ("spec_decode_num_drafts_total", "Number of drafts.", 0.0),
        ("requests_cancelled_total", "Requests whose client went away.", t.cancelled as f64),
    ] {
        row(&mut out, "counter", name, help, value);
    }
    for (name, help, value) in [
        ("prompt_tokens_seconds", "Average prompt throughput in tokens/s.",
            per((t.prompt_tokens - before.prompt_tokens) as f64, t.prompt_seconds - before.prompt_seconds)),
        ("predicted_tokens_seconds", "Average generation throughput in tokens/s.",
            per((t.predicted_tokens - before.predicted_tokens) as f64, t.predicted_seconds - before.predicted_seconds)),
        ("requests_processing", "Number of requests processing.", t.processing as f64),
        ("requests_deferred", "Number of requests deferred.", t.deferred as f64),
        ("n_busy_slots_per_decode", "Average number of busy slots per pass.", per(t.n_busy_slots as f64, t.n_passes as f64)),
        ("prompt_cache_hit_ratio", "Share of prompt tokens that were already known.", per(t.prompt_cached as f64, known)),
    ] {
        row(&mut out, "gauge", name, help, value);
    }
    let cache = &t.cache;
    for (name, kind, help, value) in [
        ("prompt_cache_bytes", "gauge", "Bytes of prompts that left their slots.", cache.n_bytes as f64),
        ("prompt_cache_limit_bytes", "gauge", "Most bytes of them; -1 for no limit.", cache.limit.map_or(-1.0, |n| n as f64)),
        ("prompt_cache_entries", "gauge", "Prompts that left their slots and are kept.", cache.n_entries as f64),
        ("prompt_cache_tokens", "gauge", "Tokens of these prompts.", cache.n_tokens as f64),
        ("prompt_cache_kept_total", "counter", "Prompts that were kept.", cache.n_kept as f64),
        ("prompt_cache_evicted_total", "counter", "Kept prompts that went to make room.", cache.n_evicted as f64),
        ("prompt_cache_hits_total", "counter", "Requests that began with a kept prompt.", cache.n_hits as f64),
    ] {
        let _ = writeln!(out, "# HELP mneme:{name} {help}\n# TYPE mneme:{name} {kind}\nmneme:{name} {value}");
    }
    type Value = fn(&SlotView) -> f64;
    let memory: [(&str, &str, Value); 7] = [
        ("memory_rate", "Tokens per node slot over closed segments.", |s| s.stats.rate),
        ("memory_rate_spread", "Standard deviation of segment length over its mean.", |s| s.stats.rate_spread),
        ("memory_nodes", "Memory nodes held.", |s| s.stats.n_nodes as f64),
        ("memory_bytes", "Bytes held.", |s| (s.stats.cell_bytes + s.stats.state_bytes) as f64),
        ("memory_full_bytes", "Bytes a full cache would hold.", |s| s.stats.full_bytes as f64),
        ("memory_longest_segment", "Longest segment in tokens.", |s| s.stats.longest_segment as f64),
        ("memory_tokens", "Tokens read.", |s| s.stats.n_tokens as f64),
    ];
    for (name, help, value) in memory {
        let _ = writeln!(out, "# HELP mneme:{name} {help}\n# TYPE mneme:{name} gauge");
        for slot in slots {
            let _ = writeln!(out, "mneme:{name}{{slot=\"{}\",memory=\"{}\"}} {}", slot.id, slot.stats.name, value(slot));
        }
    }
    out
}
