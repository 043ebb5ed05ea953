//! Settings of the sampler, with llama.cpp's names and defaults.

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use crate::tokenizer::Tokenizer;

/// Seed that stands for a random one.
pub const RANDOM_SEED: u32 = u32::MAX;

/// A setting that cannot be used.
#[allow(missing_docs)]
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    #[error("unknown sampler {got:?}: expected one of {}", SamplerKind::NAMES.map(|n| n.1).join(", "))]
    UnknownSampler { got: String },
    #[error("unknown sampler letter {got:?}: expected letters of \"{}\"", SamplerKind::NAMES.map(|n| n.2).iter().collect::<String>())]
    UnknownLetter { got: char },
    #[error("{name} must be {expected}, got {got}")]
    Range {
        name: &'static str,
        expected: &'static str,
        got: f64,
    },
    #[error("mirostat must be 0, 1 or 2, got {got}")]
    Mirostat { got: u8 },
    #[error("logit_bias: {what}")]
    LogitBias { what: String },
    #[error("saved sampler state: {what}")]
    State { what: &'static str },
}

/// A step of the chain.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    Penalties,
    Dry,
    TopNSigma,
    TopK,
    TypicalP,
    TopP,
    MinP,
    Xtc,
    Temperature,
    /// Accepted and without effect.
    Infill,
    /// Accepted and without effect.
    AdaptiveP,
}

impl SamplerKind {
    /// Kind, name and letter of every step.
    pub const NAMES: [(SamplerKind, &'static str, char); 11] = [
        (SamplerKind::Penalties, "penalties", 'e'),
        (SamplerKind::Dry, "dry", 'd'),
        (SamplerKind::TopNSigma, "top_n_sigma", 's'),
        (SamplerKind::TopK, "top_k", 'k'),
        (SamplerKind::TypicalP, "typ_p", 'y'),
        (SamplerKind::TopP, "top_p", 'p'),
        (SamplerKind::MinP, "min_p", 'm'),
        (SamplerKind::Xtc, "xtc", 'x'),
        (SamplerKind::Temperature, "temperature", 't'),
        (SamplerKind::Infill, "infill", 'i'),
        (SamplerKind::AdaptiveP, "adaptive_p", 'a'),
    ];

    /// llama.cpp's order.
    pub const DEFAULT: [SamplerKind; 9] = [
        SamplerKind::Penalties,
        SamplerKind::Dry,
        SamplerKind::TopNSigma,
        SamplerKind::TopK,
        SamplerKind::TypicalP,
        SamplerKind::TopP,
        SamplerKind::MinP,
        SamplerKind::Xtc,
        SamplerKind::Temperature,
    ];

    /// Name, as in `samplers`.
    pub fn name(self) -> &'static str {
        let row = SamplerKind::NAMES.iter().find(|row| row.0 == self);
        row.map_or("", |row| row.1)
    }

    /// The step with this name; common other spellings are known (`top-k`, `nucleus`, `temp`, `typ`, ...).
    pub fn from_name(name: &str) -> Result<SamplerKind, Error> {
        let plain: String = (name.chars())
            .filter(|c| !matches!(c, '-' | '_'))
            .flat_map(char::to_lowercase)
            .collect();
        Ok(match plain.as_str() {
            "penalties" => SamplerKind::Penalties,
            "dry" => SamplerKind::Dry,
            "topnsigma" => SamplerKind::TopNSigma,
            "topk" => SamplerKind::TopK,
            "typp" | "typ" | "typical" | "typicalp" => SamplerKind::TypicalP,
            "topp" | "nucleus" => SamplerKind::TopP,
            "minp" => SamplerKind::MinP,
            "xtc" => SamplerKind::Xtc,
            "temperature" | "temp" => SamplerKind::Temperature,
            "infill" => SamplerKind::Infill,
            "adaptivep" => SamplerKind::AdaptiveP,
            _ => {
                return Err(Error::UnknownSampler {
                    got: name.to_string(),
                });
            }
        })
    }

    /// Steps from letters, such as `edskypmxt`.
    pub fn from_letters(letters: &str) -> Result<Vec<SamplerKind>, Error> {
        let find = |got: char| {
            let row = SamplerKind::NAMES.iter().find(|row| row.2 == got);
            row.map(|row| row.0).ok_or(Error::UnknownLetter { got })
        };
        letters.chars().map(find).collect()
    }
}

/// Settings of a [`super::Sampler`]. Deserialises from a request's JSON: absent fields have their defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplerParams {
    /// Seed; [`RANDOM_SEED`] (or -1 in JSON) for a random one.
    #[serde(deserialize_with = "seed")]
    pub seed: u32,
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Half-width of the range of a temperature that follows the entropy; 0 is off.
    pub dynatemp_range: f32,
    /// How the entropy, as a share of its maximum, maps to the range.
    pub dynatemp_exponent: f32,
    /// Keep the k likeliest tokens; 0 or less is off.
    pub top_k: i32,
    /// Keep the likeliest tokens that together reach this probability; 1 is off.
    pub top_p: f32,
    /// Keep tokens at least this share as likely as the likeliest; 0 is off.
    pub min_p: f32,
    /// Keep tokens whose information is nearest to the entropy, up to this probability; 1 is off (arXiv 2202.00666).
    pub typical_p: f32,
    /// Keep tokens whose logit is within this many standard deviations of the greatest; 0 or less is off (arXiv 2411.07641).
    pub top_n_sigma: f32,
    /// Chance that all but the last of the tokens above `xtc_threshold` are taken out; 0 is off.
    pub xtc_probability: f32,
    /// See `xtc_probability`; above 0.5 is off.
    pub xtc_threshold: f32,
    /// How many tokens the cutting steps keep at least.
    pub min_keep: usize,
    /// How many of the last tokens the penalties look at; 0 is off, -1 all.
    pub repeat_last_n: i32,
    /// Divides positive logits of tokens seen lately and multiplies negative ones; 1 is off.
    pub repeat_penalty: f32,
    /// Subtracted once from the logit of a token seen lately.
    pub presence_penalty: f32,
    /// Subtracted for every time a token was seen lately.
    pub frequency_penalty: f32,
    /// Scale of the penalty on tokens that would prolong a repetition (DRY); 0 is off.
    pub dry_multiplier: f32,
    /// Base of its growth with the length of the repetition.
    pub dry_base: f32,
    /// Length up to which a repetition costs nothing.
    pub dry_allowed_length: i32,
    /// How many of the last tokens are searched; 0 is off, -1 all.
    pub dry_penalty_last_n: i32,
    /// Texts that no repetition reaches across.
    pub dry_sequence_breakers: Vec<String>,
    /// 0, or version 1 or 2 of mirostat, which replaces the chain (arXiv 2007.14966).
    pub mirostat: u8,
    /// Target surprise in bits.
    pub mirostat_tau: f32,
    /// Learning rate.
    pub mirostat_eta: f32,
    /// Accepted and without effect.
    pub adaptive_target: f32,
    /// Accepted and without effect.
    pub adaptive_decay: f32,
    /// Tokens that end a generation are never taken.
    pub ignore_eos: bool,
    /// Added to the logits of tokens; minus infinity forbids one. In JSON `[[id, bias]]` with `false` to forbid.
    #[serde(serialize_with = "put_bias", deserialize_with = "take_bias")]
    pub logit_bias: Vec<(u32, f32)>,
    /// Steps in their order; in JSON a list of names or a string of letters.
    #[serde(serialize_with = "put_kinds", deserialize_with = "take_kinds")]
    pub samplers: Vec<SamplerKind>,
}

impl Default for SamplerParams {
    fn default() -> SamplerParams {
        SamplerParams {
            seed: RANDOM_SEED,
            temperature: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            min_keep: 0,
            repeat_last_n: 64,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 64,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_string).to_vec(),
            mirostat: 0,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
            adaptive_target: -1.0,
            adaptive_decay: 0.9,
            ignore_eos: false,
            logit_bias: Vec::new(),
            samplers: SamplerKind::DEFAULT.to_vec(),
        }
    }
}

impl SamplerParams {
    /// Settings that always take the likeliest token.
    pub fn greedy() -> SamplerParams {
        SamplerParams {
            temperature: 0.0,
            ..SamplerParams::default()
        }
    }

    /// Moves values outside their range to its nearest end, as the server does.
    pub fn clamped(mut self) -> SamplerParams {
        self.temperature = self.temperature.max(0.0);
        self.top_k = self.top_k.max(0);
        for p in [
            &mut self.top_p,
            &mut self.min_p,
            &mut self.typical_p,
            &mut self.xtc_probability,
        ] {
            *p = p.clamp(0.0, 1.0);
        }
        self.dynatemp_range = self.dynatemp_range.max(0.0);
        self.dry_allowed_length = self.dry_allowed_length.max(0);
        self
    }

    /// Refuses values that no sampler can work with.
    pub fn validate(&self) -> Result<(), Error> {
        let finite = [
            ("temperature", self.temperature),
            ("dynatemp_range", self.dynatemp_range),
            ("dynatemp_exponent", self.dynatemp_exponent),
            ("top_p", self.top_p),
            ("min_p", self.min_p),
            ("typical_p", self.typical_p),
            ("top_n_sigma", self.top_n_sigma),
            ("xtc_probability", self.xtc_probability),
            ("xtc_threshold", self.xtc_threshold),
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
            ("dry_multiplier", self.dry_multiplier),
            ("dry_base", self.dry_base),
            ("mirostat_tau", self.mirostat_tau),
            ("mirostat_eta", self.mirostat_eta),
        ];
        for (name, value) in finite {
            if !value.is_finite() {
                return Err(Error::Range {
                    name,
                    expected: "a finite number",
                    got: value.into(),
                });
            }
        }
        let inverse = 1.0 / self.repeat_penalty;
        if self.repeat_penalty <= 0.0 || !self.repeat_penalty.is_finite() || !inverse.is_finite() {
            return Err(Error::Range {
                name: "repeat_penalty",
                expected: "finite and greater than 0",
                got: self.repeat_penalty.into(),
            });
        }
        for (name, value) in [
            ("repeat_last_n", self.repeat_last_n),
            ("dry_penalty_last_n", self.dry_penalty_last_n),
        ] {
            if value < -1 {
                return Err(Error::Range {
                    name,
                    expected: "-1 or more",
                    got: value.into(),
                });
            }
        }
        if self.mirostat > 2 {
            return Err(Error::Mirostat { got: self.mirostat });
        }
        Ok(())
    }
}

/// Reads `logit_bias` of a request: `[[id or text, bias or false], ...]` or `{"id or text": bias or false, ...}`.
/// Text is tokenised and every token gets the bias; a string of digits as a key of an object is an id.
pub fn parse_logit_bias(json: &Value, tokenizer: &Tokenizer) -> Result<Vec<(u32, f32)>, Error> {
    let fail = |what: String| Error::LogitBias { what };
    let mut out = Vec::new();
    let mut put = |token: &Value, bias: &Value, text_may_be_id: bool| -> Result<(), Error> {
        let bias = match bias {
            Value::Bool(false) => f32::NEG_INFINITY,
            Value::Number(n) => n.as_f64().unwrap_or_default() as f32,
            other => return Err(fail(format!("expected a number or false, got {other}"))),
        };
        let mut id = token.as_u64();
        if let (None, Value::String(text), true) = (id, token, text_may_be_id) {
            id = text.parse().ok();
        }
        match (id, token) {
            (Some(id), _) if id < tokenizer.n_vocab() as u64 => out.push((id as u32, bias)),
            (Some(id), _) => {
                let n = tokenizer.n_vocab();
                return Err(fail(format!("token {id} is outside the vocabulary of {n}")));
            }
            (None, Value::String(text)) => {
                let ids = tokenizer.encode(text, false, false);
                out.extend(ids.into_iter().map(|id| (id, bias)));
            }
            (None, other) => {
                return Err(fail(format!("expected a token id or text, got {other}")));
            }
        }
        Ok(())
    };
    match json {
        Value::Null => {}
        Value::Array(rows) => {
            for row in rows {
                match row.as_array().map(Vec::as_slice) {
                    Some([token, bias]) => put(token, bias, false)?,
                    _ => return Err(fail(format!("expected [token, bias], got {row}"))),
                }
            }
        }
        Value::Object(rows) => {
            for (token, bias) in rows {
                put(&Value::String(token.clone()), bias, true)?;
            }
        }
        other => {
            return Err(fail(format!("expected an array or an object, got {other}")));
        }
    }
    Ok(out)
}

fn seed<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    let value = i64::deserialize(d)?;
    match value {
        -1 => Ok(RANDOM_SEED),
        _ => u32::try_from(value)
            .map_err(|_| de::Error::custom(format!("seed must fit 32 bits, got {value}"))),
    }
}

fn put_kinds<S: Serializer>(kinds: &[SamplerKind], s: S) -> Result<S::Ok, S::Error> {
    s.collect_seq(kinds.iter().map(|k| k.name()))
}

fn take_kinds<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<SamplerKind>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Letters(String),
        Names(Vec<String>),
    }
    match Either::deserialize(d)? {
        Either::Letters(letters) => SamplerKind::from_letters(&letters),
        Either::Names(names) => names.iter().map(|n| SamplerKind::from_name(n)).collect(),
    }
    .map_err(de::Error::custom)
}

fn put_bias<S: Serializer>(bias: &[(u32, f32)], s: S) -> Result<S::Ok, S::Error> {
    // JSON has no infinity: null stands for "never".
    s.collect_seq(bias.iter().map(|&(id, b)| (id, b.is_finite().then_some(b))))
}

fn take_bias<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(u32, f32)>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Bias {
        Number(f32),
        Flag(bool),
        Null(()),
    }
    let rows = Vec::<(u32, Bias)>::deserialize(d)?;
    let bias = rows.into_iter().map(|(id, bias)| match bias {
        Bias::Number(b) => Ok((id, b)),
        Bias::Flag(false) | Bias::Null(()) => Ok((id, f32::NEG_INFINITY)),
        Bias::Flag(true) => Err(de::Error::custom("logit_bias must be a number or false")),
    });
    bias.collect()
}
