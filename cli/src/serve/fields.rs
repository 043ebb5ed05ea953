//! The fields every generation request shares: names, types, defaults and limits, in one table.

use super::errors::{ApiError, ApiResult};
use mneme_engine::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

/// Type and limits of a field.
enum Kind {
    /// Whole number; outside these bounds the request is refused.
    Hard(i64, i64),
    /// Whole number, moved to the nearest bound.
    Whole(i64, i64),
    /// Number, moved to the nearest bound.
    Real(f64, f64),
    Bool,
    Text,
    Strings,
}

use Kind::{Bool, Hard, Real, Strings, Whole};

struct Field {
    name: &'static str,
    aliases: &'static [&'static str],
    kind: Kind,
    default: fn() -> Value,
}

/// Most strings of a list: every token is compared with all of them.
const MAX_STRINGS: usize = 1024;
/// Most biases: every token gets all of them.
const MAX_BIASES: usize = 1 << 18;

const I32: i64 = i32::MAX as i64;

macro_rules! fields {
    ($($name:literal $(| $alias:literal)* : $kind:expr => $default:tt;)*) => {
        &[$(Field {
            name: $name,
            aliases: &[$($alias),*],
            kind: $kind,
            default: || json!($default),
        }),*]
    };
}

/// Every field with a plain value, in the order `generation_settings` shows them.
const FIELDS: &[Field] = fields! {
    "seed": Whole(-1, u32::MAX as i64) => 4294967295u32;
    "temperature": Real(0.0, f64::MAX) => 0.8;
    "dynatemp_range": Real(0.0, f64::MAX) => 0.0;
    "dynatemp_exponent": Real(f64::MIN, f64::MAX) => 1.0;
    "top_k": Whole(0, I32) => 40;
    "top_p": Real(0.0, 1.0) => 0.95;
    "min_p": Real(0.0, 1.0) => 0.05;
    "top_n_sigma": Real(f64::MIN, f64::MAX) => (-1.0);
    "xtc_probability": Real(0.0, 1.0) => 0.0;
    "xtc_threshold": Real(0.0, 1.0) => 0.1;
    "typical_p": Real(0.0, 1.0) => 1.0;
    "repeat_last_n": Hard(0, I32) => 64;
    "repeat_penalty": Real(0.0, f64::MAX) => 1.0;
    "presence_penalty": Real(f64::MIN, f64::MAX) => 0.0;
    "frequency_penalty": Real(f64::MIN, f64::MAX) => 0.0;
    "dry_multiplier": Real(f64::MIN, f64::MAX) => 0.0;
    "dry_base": Real(f64::MIN, f64::MAX) => 1.75;
    "dry_allowed_length": Whole(0, I32) => 2;
    "dry_penalty_last_n": Hard(-1, I32) => 64;
    "dry_sequence_breakers": Strings => ["\n", ":", "\"", "*"];
    "mirostat": Hard(0, 2) => 0;
    "mirostat_tau": Real(f64::MIN, f64::MAX) => 5.0;
    "mirostat_eta": Real(f64::MIN, f64::MAX) => 0.1;
    "adaptive_target": Real(f64::MIN, f64::MAX) => (-1.0);
    "adaptive_decay": Real(f64::MIN, f64::MAX) => 0.9;
    "n_predict" | "max_completion_tokens" | "max_tokens": Hard(-1, I32) => (-1);
    "n_keep": Hard(-1, I32) => 0;
    "n_discard": Hard(0, I32) => 0;
    "n_indent": Hard(0, I32) => 0;
    "t_max_predict_ms": Whole(-1, i64::MAX) => (-1);
    "n_cache_reuse": Hard(0, I32) => 0;
    "ignore_eos": Bool => false;
    "stream": Bool => false;
    "n_probs": Hard(0, I32) => 0;
    "min_keep": Hard(0, I32) => 0;
    "post_sampling_probs": Bool => false;
    "timings_per_token": Bool => false;
    "cache_prompt": Bool => true;
    "return_tokens": Bool => false;
    "return_progress": Bool => false;
    "response_fields": Strings => [];
    "id_slot": Hard(-1, I32) => (-1);
    "n_cmpl" | "n": Hard(1, I32) => 1;
    "sse_ping_interval": Hard(-1, I32) => 30;
    "grammar": Kind::Text => "";
};

/// Fields that are not part of `generation_settings`.
const NOT_ECHOED: &[&str] = &[
    "cache_prompt",
    "return_tokens",
    "return_progress",
    "response_fields",
    "id_slot",
    "n_cmpl",
    "sse_ping_interval",
    "n_indent",
    "t_max_predict_ms",
    "n_cache_reuse",
];

/// Names of the sampling filters and their letters, in the default order.
const SAMPLERS: &[(&str, char, &[&str])] = &[
    ("penalties", 'e', &[]),
    ("dry", 'd', &[]),
    ("top_n_sigma", 's', &["top-n-sigma"]),
    ("top_k", 'k', &["top-k", "topk"]),
    (
        "typ_p",
        'y',
        &["typical-p", "typical_p", "typical", "typ-p", "typ"],
    ),
    ("top_p", 'p', &["top-p", "topp", "nucleus"]),
    ("min_p", 'm', &["min-p", "minp"]),
    ("xtc", 'x', &[]),
    ("temperature", 't', &["temp"]),
];

/// Names of the sampling filters in their default order.
pub fn default_samplers() -> Vec<&'static str> {
    SAMPLERS.iter().map(|row| row.0).collect()
}

/// Filters as a list of names or a string of letters; unknown ones are left out.
fn samplers(value: &Value) -> ApiResult<Value> {
    let names: Vec<&str> = match value {
        Value::String(letters) => letters
            .chars()
            .take(MAX_STRINGS)
            .filter_map(|c| SAMPLERS.iter().find(|row| row.1 == c))
            .map(|row| row.0)
            .collect(),
        Value::Array(names) => names
            .iter()
            .take(MAX_STRINGS)
            .filter_map(Value::as_str)
            .filter_map(|n| SAMPLERS.iter().find(|r| r.0 == n || r.2.contains(&n)))
            .map(|row| row.0)
            .collect(),
        other => return Err(wrong("samplers", "a list of names or a string", other)),
    };
    Ok(json!(names))
}

/// The error for a field of the wrong type or outside its limits.
pub fn wrong(name: &str, expected: &str, got: &Value) -> ApiError {
    let mut got = got.to_string();
    if got.len() > 80 {
        got.truncate(
            (0..=80)
                .rev()
                .find(|n| got.is_char_boundary(*n))
                .unwrap_or(0),
        );
        got.push_str("...");
    }
    ApiError::invalid(format!("Field '{name}': expected {expected}, got {got}"))
}

/// A field that is there and not null.
pub fn get<'a>(body: &'a Value, name: &str) -> Option<&'a Value> {
    body.get(name).filter(|v| !v.is_null())
}

/// A string field.
pub fn text<'a>(body: &'a Value, name: &str) -> ApiResult<Option<&'a str>> {
    match get(body, name) {
        None => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(other) => Err(wrong(name, "a string", other)),
    }
}

/// A flag, with its default.
pub fn flag(body: &Value, name: &str, default: bool) -> ApiResult<bool> {
    match get(body, name) {
        None => Ok(default),
        Some(Value::Bool(b)) => Ok(*b),
        Some(other) => Err(wrong(name, "true or false", other)),
    }
}

fn whole(x: &Value) -> Option<i64> {
    match x {
        // Numbers too large for 64 bits, and those with a fraction, arrive as floating point.
        Value::Number(n) => n.as_i64().or_else(|| n.as_f64().map(|x| x as i64)),
        _ => None,
    }
}

impl Field {
    fn read(&self, name: &str, value: &Value) -> ApiResult<Value> {
        match self.kind {
            Hard(low, high) => match whole(value) {
                Some(n) if (low..=high).contains(&n) => Ok(json!(n)),
                Some(_) if high == I32 => Err(wrong(name, &format!("at least {low}"), value)),
                Some(_) => Err(wrong(name, &format!("{low} to {high}"), value)),
                None => Err(wrong(name, "a whole number", value)),
            },
            Whole(low, high) => match whole(value) {
                Some(n) => Ok(json!(n.clamp(low, high))),
                None => Err(wrong(name, "a whole number", value)),
            },
            Real(low, high) => match value.as_f64() {
                Some(x) => {
                    let most = f64::from(f32::MAX);
                    Ok(json!(x.clamp(low.max(-most), high.min(most))))
                }
                None => Err(wrong(name, "a number", value)),
            },
            Bool => match value {
                Value::Bool(_) => Ok(value.clone()),
                _ => Err(wrong(name, "true or false", value)),
            },
            Kind::Text => match value {
                Value::String(_) => Ok(value.clone()),
                _ => Err(wrong(name, "a string", value)),
            },
            Strings => match value.as_array() {
                Some(all) if all.len() > MAX_STRINGS => {
                    let most = format!("at most {MAX_STRINGS} strings");
                    Err(wrong(name, &most, &json!(all.len())))
                }
                Some(all) if all.iter().all(Value::is_string) => Ok(value.clone()),
                _ => Err(wrong(name, "a list of strings", value)),
            },
        }
    }
}

/// Settings of a request: every field of the table, `stop`, `samplers` and `logit_bias`.
#[derive(Clone, Debug)]
pub struct Settings(pub Map<String, Value>);

impl Settings {
    /// Reads the settings of `body`; `defaults` (same names) stand in for what it leaves out.
    /// A request's `n_predict` of -1 means the server's.
    pub fn read(
        body: &Value,
        defaults: &Map<String, Value>,
        vocab: &Tokenizer,
    ) -> ApiResult<Settings> {
        let mut out = Map::new();
        for field in FIELDS {
            let asked = std::iter::once(&field.name)
                .chain(field.aliases)
                .find_map(|name| Some((*name, get(body, name)?)));
            // `logprobs` as a number is `n_probs`.
            let asked = match (field.name, get(body, "logprobs")) {
                ("n_probs", Some(n)) if asked.is_none() && n.is_number() => Some(("logprobs", n)),
                _ => asked,
            };
            let value = match (asked, defaults.get(field.name)) {
                (Some((name, value)), _) => field.read(name, value)?,
                (None, Some(value)) => field.read(field.name, value)?,
                (None, None) => (field.default)(),
            };
            out.insert(field.name.into(), value);
        }
        let seed = match out["seed"].as_i64() {
            Some(-1) | None => u32::MAX,
            Some(n) => n as u32,
        };
        out.insert("seed".into(), seed.into());
        let most = defaults
            .get("n_predict")
            .and_then(Value::as_i64)
            .unwrap_or(-1);
        if let Some(n) = out["n_predict"].as_i64()
            && most >= 0
            && n < 0
        {
            out.insert("n_predict".into(), most.into());
        }
        let either = |name: &str| get(body, name).or_else(|| defaults.get(name));
        out.insert(
            "stop".into(),
            match either("stop") {
                None => json!([]),
                Some(Value::String(one)) => json!([one]),
                Some(all) => Field::read(&STOP, "stop", all)?,
            },
        );
        out.insert(
            "samplers".into(),
            match either("samplers") {
                None => json!(default_samplers()),
                Some(value) => samplers(value)?,
            },
        );
        let ignore_eos = out["ignore_eos"] == true;
        out.insert(
            "logit_bias".into(),
            logit_bias(either("logit_bias"), ignore_eos, vocab)?,
        );
        let n = out["n_predict"].clone();
        out.insert("max_tokens".into(), n);
        Ok(Settings(out))
    }

    /// A whole number; 0 for a field that is none.
    pub fn int(&self, name: &str) -> i64 {
        self.0.get(name).and_then(Value::as_i64).unwrap_or(0)
    }

    /// A flag.
    pub fn is(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|v| v == true)
    }

    /// A list of strings.
    pub fn strings(&self, name: &str) -> Vec<String> {
        let all = self.0.get(name).and_then(Value::as_array);
        let all = all.into_iter().flatten().filter_map(Value::as_str);
        all.map(String::from).collect()
    }

    /// What `generation_settings` shows.
    pub fn echo(&self) -> Value {
        let mut out = self.0.clone();
        out.retain(|name, _| !NOT_ECHOED.contains(&name.as_str()));
        for (name, value) in [
            ("grammar_lazy", json!(false)),
            ("grammar_triggers", json!([])),
            ("preserved_tokens", json!([])),
            ("chat_format", json!("Content-only")),
            ("reasoning_format", json!("none")),
            ("reasoning_in_content", json!(false)),
            ("generation_prompt", json!("")),
            ("backend_sampling", json!(false)),
            ("speculative.types", json!("none")),
            ("lora", json!([])),
        ] {
            out.entry(name).or_insert(value);
        }
        Value::Object(out)
    }

    /// What `/props` shows: the echo without what only a request has.
    pub fn echo_defaults(&self) -> Value {
        let mut out = self.echo();
        if let Some(out) = out.as_object_mut() {
            for name in [
                "stop",
                "grammar",
                "logit_bias",
                "grammar_triggers",
                "preserved_tokens",
                "grammar_lazy",
                "dry_sequence_breakers",
            ] {
                out.remove(name);
            }
        }
        out
    }
}

const STOP: Field = Field {
    name: "stop",
    aliases: &[],
    kind: Strings,
    default: || json!([]),
};

/// Biases as `[{"bias", "token"}]`; minus infinity is null.
fn logit_bias(value: Option<&Value>, ignore_eos: bool, vocab: &Tokenizer) -> ApiResult<Value> {
    let mut out = Vec::new();
    let mut add = |key: &Value, bias: &Value| -> ApiResult<()> {
        let bias = match bias {
            Value::Bool(false) => Value::Null,
            Value::Number(n) => json!(n.as_f64()),
            // As the echo writes it.
            Value::Null => Value::Null,
            other => return Err(wrong("logit_bias", "a number or false as bias", other)),
        };
        let ids = match key {
            Value::Number(n) => match n.as_u64() {
                Some(id) if (id as usize) < vocab.n_vocab() => vec![id as u32],
                // Outside the vocabulary: nothing to bias.
                _ => Vec::new(),
            },
            Value::String(text) => vocab.encode(text, false, false),
            other => return Err(wrong("logit_bias", "token ids or text", other)),
        };
        if out.len() + ids.len() > MAX_BIASES {
            let most = format!("at most {MAX_BIASES} biases");
            return Err(wrong("logit_bias", &most, &json!(out.len() + ids.len())));
        }
        for id in ids {
            out.push(json!({"bias": bias, "token": id}));
        }
        Ok(())
    };
    match value {
        None => {}
        Some(Value::Array(all)) => {
            for pair in all {
                match pair {
                    Value::Array(pair) if pair.len() == 2 => add(&pair[0], &pair[1])?,
                    Value::Object(o) if o.contains_key("token") => {
                        add(&o["token"], o.get("bias").unwrap_or(&Value::Null))?;
                    }
                    other => return Err(wrong("logit_bias", "pairs of token and bias", other)),
                }
            }
        }
        Some(Value::Object(all)) => {
            for (key, bias) in all {
                // Keys are strings in JSON: one that is a number is an id.
                let id = key.parse::<u64>().map(Value::from);
                add(&id.unwrap_or_else(|_| json!(key)), bias)?;
            }
        }
        Some(other) => return Err(wrong("logit_bias", "a list or an object", other)),
    }
    if ignore_eos {
        for id in vocab.eog_ids() {
            out.push(json!({"bias": null, "token": id}));
        }
    }
    Ok(Value::Array(out))
}

/// The fields as JSON-schema properties.
pub fn schema() -> Map<String, Value> {
    let mut out = Map::new();
    for field in FIELDS {
        let mut schema = match field.kind {
            Hard(low, high) => json!({"type": "integer", "minimum": low, "maximum": high}),
            Whole(..) => json!({"type": "integer"}),
            Real(..) => json!({"type": "number"}),
            Bool => json!({"type": "boolean"}),
            Kind::Text => json!({"type": "string"}),
            Strings => json!({"type": "array", "items": {"type": "string"}}),
        };
        schema["default"] = (field.default)();
        for name in std::iter::once(&field.name).chain(field.aliases) {
            out.insert((*name).into(), schema.clone());
        }
    }
    let strings = json!({"type": "array", "items": {"type": "string"}});
    out.insert(
        "stop".into(),
        json!({"anyOf": [{"type": "string"}, strings]}),
    );
    out.insert(
        "samplers".into(),
        json!({"anyOf": [{"type": "string"}, strings]}),
    );
    out.insert("logit_bias".into(), json!({"type": ["array", "object"]}));
    out.insert("json_schema".into(), json!({}));
    out.insert("regex".into(), json!({"type": "string"}));
    let about =
        "Memory of the slot: NAME[:key=value,...]; another one than the slot has makes it anew";
    out.insert(
        "memory".into(),
        json!({"type": "string", "description": about}),
    );
    out
}
