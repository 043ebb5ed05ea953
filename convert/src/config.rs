//! `config.json`: what the model is, as keys of GGUF.

use std::path::{Path, PathBuf};

use mneme_engine::gguf::{GgufWriter, Value};
use serde_json::Value as Json;

use crate::Error;
use crate::source::{read_json, short};

/// The model families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    /// Qwen2 and Qwen2.5: biases on q, k, v; NEOX rope.
    Qwen2,
    /// Qwen3: norms on q and k heads; NEOX rope.
    Qwen3,
    /// Llama 2, 3 and Mistral: NORM rope, so q and k rows are permuted.
    Llama,
}

/// `architectures` entries that are understood.
const ARCHITECTURES: &[(&str, Arch)] = &[
    ("Qwen2ForCausalLM", Arch::Qwen2),
    ("Qwen3ForCausalLM", Arch::Qwen3),
    ("LlamaForCausalLM", Arch::Llama),
    ("LLaMAForCausalLM", Arch::Llama),
    ("MistralForCausalLM", Arch::Llama),
];

impl Arch {
    /// `general.architecture`.
    pub fn name(self) -> &'static str {
        match self {
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Llama => "llama",
        }
    }
}

/// The longest-context rescaling of rope that a config asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// YaRN, arXiv 2309.00071.
    Yarn {
        /// How much longer the context becomes.
        factor: f32,
        /// Context length before.
        original: u32,
        /// What the formula's attention factor `0.1 ln(factor) + 1` is multiplied by, if the config gives an
        /// `attention_factor` of its own. GGUF's `rope.scaling.attn_factor` means this ratio.
        attn_factor: Option<f32>,
        /// Ramp bounds, if the config overrides 32 and 1.
        beta_fast: Option<f32>,
        /// See `beta_fast`.
        beta_slow: Option<f32>,
    },
    /// Llama 3: each frequency kept, blended or divided; stored as the tensor `rope_freqs.weight`.
    Llama3 {
        /// Divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above original / low are divided.
        low: f64,
        /// Wavelengths below original / high are kept.
        high: f64,
        /// Context length before.
        original: f64,
    },
}

/// What `config.json` says of the model.
#[derive(Clone, Debug)]
pub struct Config {
    path: PathBuf,
    json: Json,
    /// Family.
    pub arch: Arch,
    /// Embedding width.
    pub n_embd: usize,
    /// Layers.
    pub n_layer: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Feed-forward width.
    pub n_ff: usize,
    /// Rows of the token embedding.
    pub n_vocab: usize,
    /// Longest trained context.
    pub n_ctx: usize,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Rope base.
    pub rope_theta: f64,
    /// Rope rescaling.
    pub rope_scaling: RopeScaling,
    /// Whether the head shares the token embedding; `None` where the config does not say.
    pub tied: Option<bool>,
}

impl Config {
    /// Reads and checks `config.json` of a folder.
    pub fn open(folder: &Path) -> Result<Config, Error> {
        let path = folder.join("config.json");
        let json = read_json(&path)?.ok_or_else(|| Error::Files {
            path: folder.to_path_buf(),
            message: "no config.json in it".into(),
        })?;
        Config::from_json(path, json)
    }

    /// Checks a parsed config.
    pub fn from_json(path: PathBuf, json: Json) -> Result<Config, Error> {
        let reader = Reader {
            path: &path,
            json: &json,
        };
        let arch = reader.arch()?;
        let n_embd = reader.size("hidden_size")?;
        let n_head = reader.size("num_attention_heads")?;
        let n_head_kv = reader.opt_size("num_key_value_heads")?.unwrap_or(n_head);
        let head_dim = match reader.opt_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if n_embd.is_multiple_of(n_head) => n_embd / n_head,
            None => return Err(reader.error("num_attention_heads", "a divisor of hidden_size")),
        };
        if !n_head.is_multiple_of(n_head_kv) {
            return Err(reader.error("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(reader.error("head_dim", "an even number"));
        }
        let activation = json["hidden_act"].as_str();
        if activation.is_some_and(|activation| !matches!(activation, "silu" | "swish")) {
            return Err(reader.error("hidden_act", "\"silu\""));
        }
        if !matches!(json["partial_rotary_factor"].as_f64(), None | Some(1.0)) {
            return Err(reader.error("partial_rotary_factor", "1"));
        }
        if json["mlp_bias"].as_bool() == Some(true) {
            return Err(reader.error("mlp_bias", "false"));
        }
        let rope_theta = json["rope_parameters"]["rope_theta"]
            .as_f64()
            .or(reader.opt_f64("rope_theta")?)
            .unwrap_or(10000.0);
        if !(rope_theta.is_finite() && rope_theta > 0.0) {
            return Err(reader.error("rope_theta", "a positive number"));
        }
        let n_ctx = reader.size("max_position_embeddings")?;
        Ok(Config {
            arch,
            n_embd,
            n_layer: reader.size("num_hidden_layers")?,
            n_head,
            n_head_kv,
            head_dim,
            n_ff: reader.size("intermediate_size")?,
            n_vocab: reader.size("vocab_size")?,
            n_ctx,
            rms_eps: reader.opt_f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope_theta,
            rope_scaling: reader.rope_scaling(n_ctx)?,
            tied: json["tie_word_embeddings"].as_bool(),
            path,
            json,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The parsed file, for the keys that other modules read.
    pub fn json(&self) -> &Json {
        &self.json
    }

    /// Sets the keys of the architecture.
    pub fn write_keys(&self, writer: &mut GgufWriter) {
        let arch = self.arch.name();
        let mut set = |key: &str, value: Value| {
            writer.set(&format!("{arch}.{key}"), value);
        };
        let size = |n: usize| Value::U32(n as u32); // sizes were checked to fit u32
        set("block_count", size(self.n_layer));
        set("context_length", size(self.n_ctx));
        set("embedding_length", size(self.n_embd));
        set("feed_forward_length", size(self.n_ff));
        set("attention.head_count", size(self.n_head));
        set("attention.head_count_kv", size(self.n_head_kv));
        set("attention.layer_norm_rms_epsilon", self.rms_eps.into());
        if self.head_dim * self.n_head != self.n_embd || !self.json["head_dim"].is_null() {
            set("attention.key_length", size(self.head_dim));
            set("attention.value_length", size(self.head_dim));
        }
        set("vocab_size", size(self.n_vocab));
        set("rope.dimension_count", size(self.head_dim));
        set("rope.freq_base", (self.rope_theta as f32).into());
        match &self.rope_scaling {
            RopeScaling::None | RopeScaling::Llama3 { .. } => {}
            RopeScaling::Linear { factor } => {
                set("rope.scaling.type", "linear".into());
                set("rope.scaling.factor", (*factor).into());
            }
            RopeScaling::Yarn {
                factor,
                original,
                attn_factor,
                beta_fast,
                beta_slow,
            } => {
                set("rope.scaling.type", "yarn".into());
                set("rope.scaling.factor", (*factor).into());
                set("rope.scaling.original_context_length", (*original).into());
                for (key, value) in [
                    ("rope.scaling.attn_factor", attn_factor),
                    ("rope.scaling.yarn_beta_fast", beta_fast),
                    ("rope.scaling.yarn_beta_slow", beta_slow),
                ] {
                    if let Some(value) = value {
                        set(key, (*value).into());
                    }
                }
            }
        }
    }

    /// `rope_freqs.weight`: what each of the `head_dim / 2` frequencies is divided by, if the scaling is
    /// llama3's. Computed as `transformers` does, in F32 at the end.
    pub fn rope_freqs(&self) -> Option<Vec<f32>> {
        let RopeScaling::Llama3 {
            factor,
            low,
            high,
            original,
        } = self.rope_scaling
        else {
            return None;
        };
        let frequency = |i: usize| {
            self.rope_theta
                .powf(-(2.0 * i as f64) / self.head_dim as f64)
        };
        let divisor = |i: usize| {
            let wavelength = std::f64::consts::TAU / frequency(i);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        Some((0..self.head_dim / 2).map(|i| divisor(i) as f32).collect())
    }
}

/// Typed access with errors that name the file and key.
struct Reader<'a> {
    path: &'a Path,
    json: &'a Json,
}

impl Reader<'_> {
    fn error(&self, key: &str, expected: &str) -> Error {
        let value = key.split('.').fold(self.json, |value, part| &value[part]);
        Error::Key {
            path: self.path.to_path_buf(),
            key: key.into(),
            expected: expected.into(),
            got: short(value),
        }
    }

    fn arch(&self) -> Result<Arch, Error> {
        let names = self.json["architectures"].as_array();
        let name = names.and_then(|names| names.first()?.as_str());
        let named = name.and_then(|name| ARCHITECTURES.iter().find(|row| row.0 == name));
        // Old and hand-made configs have a model_type only.
        let typed = || {
            let model_type = self.json["model_type"].as_str()?;
            let model_type = if model_type == "mistral" {
                "llama"
            } else {
                model_type
            };
            ARCHITECTURES.iter().find(|row| row.1.name() == model_type)
        };
        let found = if name.is_some() { named } else { typed() };
        found.map(|row| row.1).ok_or_else(|| Error::Architecture {
            path: self.path.to_path_buf(),
            got: name
                .or(self.json["model_type"].as_str())
                .unwrap_or("nothing")
                .into(),
            supported: ARCHITECTURES
                .iter()
                .map(|row| row.0)
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// A positive size that fits u32, if the key is there.
    fn opt_size(&self, key: &str) -> Result<Option<usize>, Error> {
        let value = &self.json[key];
        if value.is_null() {
            return Ok(None);
        }
        let size = value.as_u64().and_then(|n| u32::try_from(n).ok());
        match size {
            Some(n) if n > 0 && n <= i32::MAX as u32 => Ok(Some(n as usize)),
            _ => Err(self.error(key, "a positive integer")),
        }
    }

    fn size(&self, key: &str) -> Result<usize, Error> {
        self.opt_size(key)?
            .ok_or_else(|| self.error(key, "a positive integer"))
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>, Error> {
        let value = key.split('.').fold(self.json, |value, part| &value[part]);
        if value.is_null() {
            return Ok(None);
        }
        value
            .as_f64()
            .map(Some)
            .ok_or_else(|| self.error(key, "a number"))
    }

    fn rope_scaling(&self, n_ctx: usize) -> Result<RopeScaling, Error> {
        // transformers 5 has renamed the object.
        let object = ["rope_scaling", "rope_parameters"]
            .into_iter()
            .find(|key| self.json[key].is_object());
        let Some(object) = object else {
            return Ok(RopeScaling::None);
        };
        let scaling = &self.json[object];
        let kind = ["rope_type", "type"]
            .iter()
            .find_map(|key| scaling[key].as_str())
            .unwrap_or("default");
        let number = |key: &str| self.opt_f64(&format!("{object}.{key}"));
        let positive = |key: &str| match number(key)? {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            _ => Err(self.error(&format!("{object}.{key}"), "a positive number")),
        };
        let float = |key: &str| Ok::<_, Error>(number(key)?.map(|value| value as f32));
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear {
                factor: positive("factor")? as f32,
            }),
            "yarn" => Ok(RopeScaling::Yarn {
                factor: positive("factor")? as f32,
                attn_factor: match number("attention_factor")? {
                    None => None,
                    Some(whole) => {
                        let formula = 0.1 * positive("factor")?.max(1.0).ln() + 1.0;
                        Some((whole / formula) as f32)
                    }
                },
                original: match number("original_max_position_embeddings")? {
                    Some(_) => positive("original_max_position_embeddings")? as u32,
                    None => n_ctx as u32,
                },
                beta_fast: float("beta_fast")?,
                beta_slow: float("beta_slow")?,
            }),
            "llama3" => {
                let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
                if low >= high {
                    let key = format!("{object}.high_freq_factor");
                    return Err(self.error(&key, "more than low_freq_factor"));
                }
                Ok(RopeScaling::Llama3 {
                    factor: positive("factor")?,
                    low,
                    high,
                    original: positive("original_max_position_embeddings")?,
                })
            }
            _ => {
                let key = format!("{object}.rope_type");
                let mut error = self.error(&key, "\"default\", \"linear\", \"yarn\" or \"llama3\"");
                if let Error::Key { got, .. } = &mut error {
                    *got = format!("{kind:?}");
                }
                Err(error)
            }
        }
    }
}
