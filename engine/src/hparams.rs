//! The numbers that shape a model, read from GGUF metadata and checked against each other.

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use std::path::Path;

/// How positions are stretched beyond the range the model was trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Positions as they are.
    None,
    /// Every position divided by `factor`.
    Linear {
        /// Stretch, at least 1.
        factor: f32,
    },
    /// YaRN (arXiv 2309.00071): high frequencies kept, low ones divided, a ramp between.
    Yarn {
        /// Stretch, at least 1.
        factor: f32,
        /// Context length before stretching, tokens.
        n_ctx_orig: u32,
        /// Extra factor on the attention temperature.
        attn_factor: f32,
        /// Rotations over `n_ctx_orig` above which a frequency is kept.
        beta_fast: f32,
        /// Rotations below which a frequency is divided by `factor`.
        beta_slow: f32,
    },
}

/// Hyperparameters, named as GGUF and llama.cpp name them.
#[derive(Clone, Debug, PartialEq)]
pub struct Hparams {
    /// `general.architecture`.
    pub arch: String,
    /// Tokens in the vocabulary: rows of `token_embd`.
    pub n_vocab: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Decoder layers.
    pub n_layer: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Width of one query or key head; not always `n_embd / n_head`.
    pub head_dim: usize,
    /// Rotated dimensions of a head, the first ones.
    pub n_rot: usize,
    /// Width inside the feed-forward block.
    pub n_ff: usize,
    /// Context length the model was trained for, tokens.
    pub n_ctx_train: usize,
    /// Epsilon of every RMS norm.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Position stretching.
    pub rope_scaling: RopeScaling,
}

/// Largest value of any single width or count: far above every known model, small enough that
/// products of two fit comfortably.
const LIMIT: u32 = 1 << 24;

impl Hparams {
    /// Reads and checks the keys of `gguf`; `n_vocab` comes from the shape of `token_embd.weight`.
    pub fn from_gguf(gguf: &Gguf, path: &Path, known: &[&str]) -> Result<Hparams> {
        let arch = gguf.str("general.architecture")?.to_owned();
        if !known.contains(&arch.as_str()) {
            return Err(Error::Architecture {
                path: path.to_owned(),
                arch,
                known: known.join(", "),
            });
        }
        let key = |suffix: &str| format!("{arch}.{suffix}");
        let count = |suffix: &str| -> Result<Option<usize>> {
            let key = key(suffix);
            match gguf.opt_u32(&key)? {
                None => Ok(None),
                Some(n) if n == 0 || n > LIMIT => Err(Error::Key {
                    key,
                    what: format!("{n} is outside 1..={LIMIT}"),
                }),
                Some(n) => Ok(Some(n as usize)),
            }
        };
        let need = |suffix: &str| count(suffix)?.ok_or_else(|| missing(&key(suffix)));

        let n_embd = need("embedding_length")?;
        let n_layer = need("block_count")?;
        let n_head = need("attention.head_count")?;
        let n_head_kv = count("attention.head_count_kv")?.unwrap_or(n_head);
        let n_ff = need("feed_forward_length")?;
        let n_ctx_train = need("context_length")?;
        if n_layer > 4096 {
            return Err(Error::Key {
                key: key("block_count"),
                what: format!("{n_layer} layers are more than 4096"),
            });
        }
        if !n_head.is_multiple_of(n_head_kv) {
            return Err(Error::Key {
                key: key("attention.head_count_kv"),
                what: format!("{n_head_kv} does not divide the {n_head} query heads"),
            });
        }
        let head_dim = match count("attention.key_length")? {
            Some(d) => d,
            None if n_embd.is_multiple_of(n_head) => n_embd / n_head,
            None => {
                return Err(Error::Key {
                    key: key("attention.key_length"),
                    what: format!("absent, and {n_head} heads do not divide {n_embd}"),
                });
            }
        };
        if let Some(v) = count("attention.value_length")?
            && v != head_dim
        {
            return Err(Error::Key {
                key: key("attention.value_length"),
                what: format!("{v} differs from the key length {head_dim}"),
            });
        }
        let n_rot = count("rope.dimension_count")?.unwrap_or(head_dim);
        if n_rot > head_dim || !n_rot.is_multiple_of(2) {
            return Err(Error::Key {
                key: key("rope.dimension_count"),
                what: format!("{n_rot} is odd or above the head width {head_dim}"),
            });
        }
        let rms_eps = gguf.f32(&key("attention.layer_norm_rms_epsilon"))?;
        let rope_theta = gguf.opt_f32(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        if !(rope_theta > 1.0 && rope_theta.is_finite()) {
            return Err(Error::Key {
                key: key("rope.freq_base"),
                what: format!("{rope_theta} is not above 1"),
            });
        }
        if let Some(n) = gguf.opt_u32(&key("attention.sliding_window"))?
            && arch == "llama"
            && n > 0
        {
            tracing::warn!("{arch}.attention.sliding_window = {n} is ignored: use --memory window");
        }
        let embd = gguf
            .tensor("token_embd.weight")
            .ok_or_else(|| Error::TensorMissing("token_embd.weight".into()))?;
        let n_vocab = match embd.dims.as_slice() {
            [cols, rows] if *cols == n_embd as u64 && *rows > 0 && *rows <= LIMIT as u64 => {
                *rows as usize
            }
            got => {
                return Err(Error::TensorShape {
                    name: "token_embd.weight".into(),
                    expected: vec![
                        n_embd as u64,
                        gguf.opt_u32(&key("vocab_size"))?.unwrap_or(0) as u64,
                    ],
                    got: got.to_vec(),
                });
            }
        };
        Ok(Hparams {
            rope_scaling: rope_scaling(gguf, &arch, n_ctx_train)?,
            arch,
            n_vocab,
            n_embd,
            n_layer,
            n_head,
            n_head_kv,
            head_dim,
            n_rot,
            n_ff,
            n_ctx_train,
            rms_eps,
            rope_theta,
        })
    }

    /// Inverse frequencies `[n_rot / 2]` and the factor on cos and sin. `freq_factors` is the
    /// content of `rope_freqs.weight` (Llama 3), a divisor per frequency.
    pub fn rope_frequencies(&self, freq_factors: Option<&[f32]>) -> (Vec<f32>, f32) {
        let n_rot = self.n_rot as f64;
        let theta = self.rope_theta as f64;
        let plain = |i: usize| {
            let factor = freq_factors.map_or(1.0, |f| f[i] as f64);
            theta.powf(-2.0 * i as f64 / n_rot) / factor
        };
        let half = self.n_rot / 2;
        match self.rope_scaling {
            RopeScaling::None => ((0..half).map(|i| plain(i) as f32).collect(), 1.0),
            RopeScaling::Linear { factor } => (
                (0..half)
                    .map(|i| (plain(i) / factor as f64) as f32)
                    .collect(),
                1.0,
            ),
            RopeScaling::Yarn {
                factor,
                n_ctx_orig,
                attn_factor,
                beta_fast,
                beta_slow,
            } => {
                // Dimension whose wave turns `beta` times over the original context.
                let dim = |beta: f32| {
                    let turns = beta as f64 * 2.0 * std::f64::consts::PI;
                    n_rot * (n_ctx_orig as f64 / turns).ln() / (2.0 * theta.ln())
                };
                let low = dim(beta_fast).floor().max(0.0);
                let high = dim(beta_slow).ceil().min(n_rot - 1.0);
                let freq = |i: usize| {
                    let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    (plain(i) / factor as f64 * ramp + plain(i) * kept) as f32
                };
                let mscale = attn_factor * (1.0 + 0.1 * factor.ln());
                ((0..half).map(freq).collect(), mscale)
            }
        }
    }

    /// Bytes of keys and values one token costs in all layers, in a K/V type of
    /// `bytes_per_value` (F16: 2.0, Q8_0: 1.0625).
    pub fn kv_bytes_per_token(&self, bytes_per_value: f64) -> f64 {
        (2 * self.n_layer * self.n_head_kv * self.head_dim) as f64 * bytes_per_value
    }
}

fn missing(key: &str) -> Error {
    Error::Key {
        key: key.into(),
        what: "not found".into(),
    }
}

fn rope_scaling(gguf: &Gguf, arch: &str, n_ctx_train: usize) -> Result<RopeScaling> {
    let key = |suffix: &str| format!("{arch}.rope.scaling.{suffix}");
    // `rope.scale_linear` is the key of files from before 2023-12.
    let factor = match gguf.opt_f32(&key("factor"))? {
        Some(factor) => factor,
        None => gguf
            .opt_f32(&format!("{arch}.rope.scale_linear"))?
            .unwrap_or(1.0),
    };
    if !(factor >= 1.0 && factor.is_finite()) && factor != 0.0 {
        return Err(Error::Key {
            key: key("factor"),
            what: format!("{factor} is below 1"),
        });
    }
    let factor = factor.max(1.0);
    match gguf.opt_str(&key("type"))? {
        None if factor == 1.0 => Ok(RopeScaling::None),
        None | Some("linear") => Ok(RopeScaling::Linear { factor }),
        // Llama 3 writes its divisors into `rope_freqs.weight`; the key only says so.
        Some("none" | "llama3") => Ok(RopeScaling::None),
        Some("yarn") => Ok(RopeScaling::Yarn {
            factor,
            n_ctx_orig: gguf
                .opt_u32(&key("original_context_length"))?
                .filter(|&n| n > 0)
                .unwrap_or(n_ctx_train as u32),
            attn_factor: gguf.opt_f32(&key("attn_factor"))?.unwrap_or(1.0),
            beta_fast: gguf.opt_f32(&key("yarn_beta_fast"))?.unwrap_or(32.0),
            beta_slow: gguf.opt_f32(&key("yarn_beta_slow"))?.unwrap_or(1.0),
        }),
        Some(other) => Err(Error::Key {
            key: key("type"),
            what: format!("`{other}` is not one of none, linear, yarn, llama3"),
        }),
    }
}
