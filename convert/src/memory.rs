//! Memories in checkpoints: AHN in its published layout, `nodes`, `gist` and `concepts` as a trainer exports
//! them. Keys and tensors are those of `docs/gguf.md`.

use std::ops::RangeInclusive;

use mneme_engine::gguf::{GgufWriter, Value};
use serde_json::Value as Json;

use crate::Error;
use crate::config::{Arch, Config};
use crate::names::is_memory;
use crate::plan::{Layout, PlannedTensor, Role};
use crate::source::{Source, short};

/// The window that the authors of AHN evaluate: with the sinks, 32,768 tokens without loss.
pub const AHN_WINDOW: u32 = 32640;
/// The sinks that the authors of AHN evaluate.
pub const AHN_SINKS: u32 = 128;

/// Which recurrence an AHN checkpoint holds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum AhnKind {
    GatedDeltaNet,
    DeltaNet,
    Mamba2,
}

impl AhnKind {
    fn name(self) -> &'static str {
        match self {
            AhnKind::GatedDeltaNet => "gated_delta_net",
            AhnKind::DeltaNet => "delta_net",
            AhnKind::Mamba2 => "mamba2",
        }
    }
}

/// What a checkpoint holds besides its base model.
#[derive(Debug)]
pub struct Memory {
    /// `{arch}.memory.*` and the `tokenizer.ggml.*_token_ids` of the memory, in full.
    keys: Vec<(String, Value)>,
    /// `ahn`, `nodes`, `gist` or `concepts`.
    pub kind: String,
    /// Things that the user should know.
    pub notes: Vec<String>,
}

/// The memory's keys and tensors, `None` for a plain model.
///
/// `window` and `sinks` go before everything that the checkpoint says.
pub fn memory_of(
    config: &Config,
    source: &Source,
    window: Option<u32>,
    sinks: Option<u32>,
) -> Result<Option<(Memory, Vec<PlannedTensor>)>, Error> {
    let is_ahn = source.tensors().keys().any(|name| name.contains(".ahn"))
        || config.json()["_ahn_implementation"].is_string()
            && config.json()["_layer_implementation"]
                .as_str()
                .is_some_and(|layer| layer.contains("Mem"));
    let checkpoint = Checkpoint { config, source };
    if is_ahn {
        return checkpoint.ahn(window, sinks).map(Some);
    }
    if config.json()["memory"].is_object() {
        return checkpoint.exported(window, sinks).map(Some);
    }
    if let Some(name) = source.tensors().keys().find(|name| is_memory(name)) {
        let message = format!(
            "tensor {name:?} belongs to a memory, but config.json has no \"memory\" object"
        );
        return Err(checkpoint.error(message));
    }
    if window.is_some() || sinks.is_some() {
        return Err(Error::Options(
            "--window and --sinks are for checkpoints with a memory; this one has none".into(),
        ));
    }
    Ok(None)
}

impl Memory {
    /// Sets the keys.
    pub fn write_keys(&self, writer: &mut GgufWriter) {
        for (key, value) in &self.keys {
            writer.set(key, value.clone());
        }
    }
}

struct Checkpoint<'a> {
    config: &'a Config,
    source: &'a Source,
}

impl Checkpoint<'_> {
    fn error(&self, message: impl Into<String>) -> Error {
        Error::Memory {
            path: self.source.folder().to_path_buf(),
            message: message.into(),
        }
    }

    fn key_error(&self, key: &str, expected: &str, got: &Json) -> Error {
        Error::Key {
            path: self.config.path().to_path_buf(),
            key: key.into(),
            expected: expected.into(),
            got: short(got),
        }
    }

    fn ahn_kind(&self) -> Result<AhnKind, Error> {
        let json = self.config.json();
        let named = &json["_ahn_implementation"];
        match named.as_str() {
            Some("GatedDeltaNet") => return Ok(AhnKind::GatedDeltaNet),
            Some("DeltaNet") => return Ok(AhnKind::DeltaNet),
            Some("Mamba2") => return Ok(AhnKind::Mamba2),
            Some(_) => {
                let expected = "\"GatedDeltaNet\", \"DeltaNet\" or \"Mamba2\"";
                return Err(self.key_error("_ahn_implementation", expected, named));
            }
            None => {}
        }
        let has = |suffix: &str| {
            self.source
                .tensors()
                .keys()
                .any(|name| name.ends_with(suffix))
        };
        Ok(if has(".ahn.fn.dt_proj.weight") {
            AhnKind::Mamba2
        } else if has(".ahn.fn.a_proj.weight") {
            AhnKind::GatedDeltaNet
        } else {
            AhnKind::DeltaNet
        })
    }

    /// `fa_layer_ids`: layers that keep full attention, as `"0,3"` or a list.
    fn full_layers(&self) -> Result<Vec<usize>, Error> {
        let json = &self.config.json()["fa_layer_ids"];
        let n_layer = self.config.n_layer;
        let expected = "layer numbers with commas between";
        let ids: Option<Vec<usize>> = match json {
            Json::Null => Some(Vec::new()),
            Json::String(text) => text
                .split(',')
                .map(str::trim)
                .filter(|part| !part.is_empty())
                .map(|part| part.parse().ok())
                .collect(),
            Json::Array(ids) => ids.iter().map(|id| id.as_u64()?.try_into().ok()).collect(),
            _ => None,
        };
        let mut ids = ids.ok_or_else(|| self.key_error("fa_layer_ids", expected, json))?;
        ids.sort_unstable();
        ids.dedup();
        if ids.last().is_some_and(|&last| last >= n_layer) {
            let expected = format!("layer numbers below num_hidden_layers = {n_layer}");
            return Err(self.key_error("fa_layer_ids", &expected, json));
        }
        Ok(ids)
    }

    fn ahn(
        &self,
        window: Option<u32>,
        sinks: Option<u32>,
    ) -> Result<(Memory, Vec<PlannedTensor>), Error> {
        let json = self.config.json();
        let arch = self.config.arch;
        if arch == Arch::Llama {
            return Err(self.error("AHN is defined for qwen2 and qwen3 models, not for llama"));
        }
        for (key, what, tensor) in [
            (
                "use_q_proj",
                "its own query projection (use_q_proj)",
                ".ahn.fn.q_proj.",
            ),
            (
                "use_ahn_router",
                "an AHN router (use_ahn_router)",
                ".ahn_router.",
            ),
        ] {
            let named = self
                .source
                .tensors()
                .keys()
                .find(|name| name.contains(tensor));
            if json[key].as_bool() == Some(true) || named.is_some() {
                return Err(self.error(format!(
                    "the checkpoint has {what}, whose published code does not compute what it describes; \
                     such checkpoints are not supported"
                )));
            }
        }
        let kind = self.ahn_kind()?;
        let full_layers = self.full_layers()?;
        let mut tensors = Vec::new();
        for il in (0..self.config.n_layer).filter(|il| !full_layers.contains(il)) {
            self.ahn_layer(kind, il, &mut tensors)?;
        }
        self.check_ahn_strangers(&full_layers)?;

        let mut notes = Vec::new();
        let stated = |key: &str| json[key].as_u64();
        let stale = (
            stated("sliding_window"),
            stated("num_attn_sinks").unwrap_or(0),
        );
        if window.is_none()
            && let (Some(stale_window), stale_sinks) = stale
            && stale_window != u64::from(AHN_WINDOW)
        {
            notes.push(format!(
                "config.json says sliding_window {stale_window} and {stale_sinks} sinks, which are training \
                 values; written are the evaluated {AHN_WINDOW} and {AHN_SINKS}. To use the config's: \
                 --window {stale_window} --sinks {stale_sinks}"
            ));
        }
        let prefix = format!("{}.memory", arch.name());
        let full_layers: Vec<i32> = full_layers.iter().map(|&il| il as i32).collect();
        let keys = vec![
            (format!("{prefix}.kind"), "ahn".into()),
            (
                format!("{prefix}.window"),
                window.unwrap_or(AHN_WINDOW).into(),
            ),
            (format!("{prefix}.sinks"), sinks.unwrap_or(AHN_SINKS).into()),
            (format!("{prefix}.ahn.kind"), kind.name().into()),
            (format!("{prefix}.ahn.full_layers"), full_layers.into()),
        ];
        let memory = Memory {
            keys,
            kind: "ahn".into(),
            notes,
        };
        Ok((memory, tensors))
    }

    fn ahn_layer(
        &self,
        kind: AhnKind,
        il: usize,
        tensors: &mut Vec<PlannedTensor>,
    ) -> Result<(), Error> {
        let (n_head, n_embd, d) = (self.config.n_head, self.config.n_embd, self.config.head_dim);
        let from = |suffix: &str| format!("model.layers.{il}.ahn.fn.{suffix}");
        let to = |suffix: &str| format!("blk.{il}.{suffix}");
        let gate = [n_head, n_embd];
        let mut take = |suffix: &str, name: &str, shape: &[usize], layout, role| {
            let tensor = self.source.tensor(&from(suffix))?;
            tensor.expect_shape(shape)?;
            tensors.push(PlannedTensor::from_source(to(name), tensor, layout, role));
            Ok::<_, Error>(())
        };
        let (matrix, vector, as_is) = (Role::MemoryMatrix, Role::MemoryVector, Layout::AsIs);
        match kind {
            AhnKind::GatedDeltaNet | AhnKind::DeltaNet => {
                take("b_proj.weight", "ahn_b.weight", &gate, as_is, matrix)?;
                if kind == AhnKind::GatedDeltaNet {
                    take("a_proj.weight", "ahn_a.weight", &gate, as_is, matrix)?;
                    take("dt_bias", "ahn_dt.bias", &[n_head], as_is, vector)?;
                }
                take("g_proj.weight", "ahn_g.weight", &gate, as_is, matrix)?;
                take("o_norm.weight", "ahn_norm.weight", &[d], as_is, vector)?;
            }
            AhnKind::Mamba2 => {
                take("dt_proj.weight", "ahn_dt.weight", &gate, as_is, matrix)?;
                take("g_proj.weight", "ahn_g.weight", &gate, as_is, matrix)?;
                take("g_proj.bias", "ahn_g.bias", &[n_head], as_is, vector)?;
                take(
                    "norm.weight",
                    "ahn_norm.weight",
                    &[n_head * d],
                    as_is,
                    vector,
                )?;
            }
        }
        // `[head, in, out]` in the checkpoint: each head becomes an ordinary [out, in] matrix.
        take(
            "o_proj.weight",
            "ahn_out.weight",
            &[n_head, d, d],
            Layout::TransposeEach,
            matrix,
        )?;
        if kind == AhnKind::Mamba2 {
            let first = self.vector(&from("dt_proj.bias"), n_head)?;
            let second = self.vector(&from("dt_bias"), n_head)?;
            let sum = first.iter().zip(second).map(|(a, b)| a + b).collect();
            tensors.push(PlannedTensor::from_values(to("ahn_dt.bias"), sum));
        }
        if kind != AhnKind::DeltaNet {
            let log = self.vector(&from("A_log"), n_head)?;
            let decay = log.iter().map(|&a| -f64::from(a).exp() as f32).collect();
            tensors.push(PlannedTensor::from_values(to("ahn_decay"), decay));
        }
        Ok(())
    }

    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>, Error> {
        let tensor = self.source.tensor(name)?;
        tensor.expect_shape(&[n])?;
        Ok(self.source.read_all(tensor))
    }

    /// Refuses AHN tensors of layers that the model does not have, or that no variant has.
    fn check_ahn_strangers(&self, full_layers: &[usize]) -> Result<(), Error> {
        const KNOWN: &[&str] = &[
            "b_proj.weight",
            "a_proj.weight",
            "A_log",
            "dt_bias",
            "D",
            "g_proj.weight",
            "g_proj.bias",
            "dt_proj.weight",
            "dt_proj.bias",
            "o_norm.weight",
            "norm.weight",
            "o_proj.weight",
        ];
        for name in self
            .source
            .tensors()
            .keys()
            .filter(|name| name.contains(".ahn."))
        {
            let layer = name
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split_once(".ahn.fn."));
            let known = layer.is_some_and(|(il, suffix)| {
                let il = il
                    .parse::<usize>()
                    .ok()
                    .filter(|&il| il < self.config.n_layer);
                // A layer with full attention may carry unused tensors.
                il.is_some_and(|il| KNOWN.contains(&suffix) || full_layers.contains(&il))
            });
            if !known {
                return Err(Error::UnknownTensor {
                    tensor: name.clone(),
                    arch: self.config.arch.name(),
                    n_layer: self.config.n_layer,
                });
            }
        }
        Ok(())
    }

    /// `nodes`, `gist`, `concepts`: the config's `memory` object holds the keys, nested or dotted, and the
    /// tensors carry their final names.
    fn exported(
        &self,
        window: Option<u32>,
        sinks: Option<u32>,
    ) -> Result<(Memory, Vec<PlannedTensor>), Error> {
        let object = &self.config.json()["memory"];
        let arch = self.config.arch.name();
        let mut keys = Vec::new();
        self.flatten("", object, &mut keys)?;
        let mut kind = None;
        let mut out = Vec::new();
        for (key, value) in keys {
            if key == "kind" {
                kind = value.as_str().map(str::to_owned);
            }
            // These are about the vocabulary, and live with it.
            let name = match key.as_str() {
                "gist_token_ids" | "gist.token_ids" => "tokenizer.ggml.gist_token_ids".to_string(),
                "context_token_ids" => "tokenizer.ggml.context_token_ids".to_string(),
                _ => format!("{arch}.memory.{key}"),
            };
            out.push((name, value));
        }
        for (key, value) in [("window", window), ("sinks", sinks)] {
            if let Some(value) = value {
                let name = format!("{arch}.memory.{key}");
                out.retain(|(other, _)| *other != name);
                out.push((name, value.into()));
            }
        }
        let kinds = ["nodes", "gist", "concepts"];
        let kind = kind
            .filter(|kind| kinds.contains(&kind.as_str()))
            .ok_or_else(|| {
                self.key_error(
                    "memory.kind",
                    "\"nodes\", \"gist\" or \"concepts\"",
                    &object["kind"],
                )
            })?;
        match kind.as_str() {
            "gist" => self.check_tokens(&out, "gist_token_ids", 1..=usize::MAX)?,
            "concepts" => self.check_tokens(&out, "context_token_ids", 2..=2)?,
            _ => {}
        }
        let mut tensors = Vec::new();
        for (name, tensor) in self.source.tensors() {
            if name.starts_with("mem.") {
                let role = exported_role(name, tensor.shape.len());
                let layout = self.layout_of(name);
                tensors.push(PlannedTensor::from_source(
                    name.clone(),
                    tensor,
                    layout,
                    role,
                ));
            }
        }
        let first = match kind.as_str() {
            "nodes" => Some("mem.in.weight"),
            "concepts" => Some("mem.ce_proj.weight"),
            _ => None,
        };
        if let Some(first) = first.filter(|name| !self.source.tensors().contains_key(*name)) {
            return Err(Error::MissingTensor {
                tensor: first.into(),
                path: self.source.folder().to_path_buf(),
            });
        }
        let memory = Memory {
            keys: out,
            kind,
            notes: Vec::new(),
        };
        Ok((memory, tensors))
    }

    /// How rows of a memory's tensor lie in the file: what is added to q and k as those do.
    fn layout_of(&self, name: &str) -> Layout {
        let added = name.starts_with("mem.lora.") && self.config.arch == Arch::Llama;
        match added {
            true if name.ends_with(".attn_q.b.weight") => Layout::RopePairs {
                n_head: self.config.n_head,
            },
            true if name.ends_with(".attn_k.b.weight") => Layout::RopePairs {
                n_head: self.config.n_head_kv,
            },
            _ => Layout::AsIs,
        }
    }

    /// `tokenizer.ggml.{name}`: so many tokens of the vocabulary.
    fn check_tokens(
        &self,
        keys: &[(String, Value)],
        name: &str,
        expected: RangeInclusive<usize>,
    ) -> Result<(), Error> {
        let key = format!("tokenizer.ggml.{name}");
        let found = keys.iter().find(|(k, _)| *k == key);
        let json = &self.config.json()["memory"][name];
        let ids = found.and_then(|(_, value)| value.as_array());
        let ids: Option<Vec<i128>> = ids.map(|ids| {
            (0..ids.len())
                .filter_map(|i| ids.get(i)?.as_i128())
                .collect()
        });
        let n_vocab = self.config.n_vocab as i128;
        let fine = ids.is_some_and(|ids| {
            expected.contains(&ids.len()) && ids.iter().all(|id| (0..n_vocab).contains(id))
        });
        if fine {
            return Ok(());
        }
        let number = match *expected.end() {
            usize::MAX => String::new(),
            n => format!("{n} "),
        };
        let expected = format!("{number}token ids below vocab_size = {n_vocab}");
        Err(self.key_error(&format!("memory.{name}"), &expected, json))
    }

    /// Turns a JSON object into dotted keys with GGUF values: integers u32 (i32 if negative), other numbers
    /// f32, lists of integers i32[].
    fn flatten(
        &self,
        prefix: &str,
        json: &Json,
        out: &mut Vec<(String, Value)>,
    ) -> Result<(), Error> {
        for (key, value) in json.as_object().into_iter().flatten() {
            let name = if prefix.is_empty() {
                key.clone()
            } else {
                format!("{prefix}.{key}")
            };
            let refuse =
                |expected: &str| self.key_error(&format!("memory.{name}"), expected, value);
            let converted = match value {
                Json::Object(_) => {
                    self.flatten(&name, value, out)?;
                    continue;
                }
                Json::Null => continue,
                Json::Bool(value) => Value::Bool(*value),
                Json::String(value) => Value::String(value.clone()),
                Json::Number(number) => match (number.as_u64(), number.as_i64()) {
                    (Some(n), _) => {
                        Value::U32(u32::try_from(n).map_err(|_| refuse("a number that fits u32"))?)
                    }
                    (None, Some(n)) => {
                        Value::I32(i32::try_from(n).map_err(|_| refuse("a number that fits i32"))?)
                    }
                    (None, None) => Value::F32(number.as_f64().unwrap_or(f64::NAN) as f32),
                },
                Json::Array(list) => {
                    let list: Option<Vec<i32>> = list
                        .iter()
                        .map(|item| item.as_i64()?.try_into().ok())
                        .collect();
                    list.ok_or_else(|| refuse("a list of integers"))?.into()
                }
            };
            // `threshold: 1` means 1.0.
            let converted = match (name.as_str(), converted) {
                ("decider.threshold", Value::U32(n)) => Value::F32(n as f32),
                (_, value) => value,
            };
            out.push((name, converted));
        }
        Ok(())
    }
}

/// The tensors of `nodes` that are matrices to multiply by; all others are small and stay F32.
fn exported_role(name: &str, n_dims: usize) -> Role {
    const MATRICES: &[&str] = &[
        "in.weight",
        "qkv.weight",
        "beta.weight",
        "alpha.weight",
        "gate.weight",
        "out.weight",
        "ffn_gate.weight",
        "ffn_up.weight",
        "ffn_down.weight",
        "map.weight",
        "q.weight",
        "k.weight",
        "ce_proj.weight",
        "a.weight",
        "b.weight",
    ];
    let suffix = name.rsplit_once('.').map(|(head, last)| {
        let part = head.rsplit_once('.').map_or(head, |(_, part)| part);
        format!("{part}.{last}")
    });
    let is_matrix = n_dims == 2 && suffix.is_some_and(|suffix| MATRICES.contains(&suffix.as_str()));
    if is_matrix {
        Role::MemoryMatrix
    } else {
        Role::MemoryVector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_of_exported_tensors() {
        for name in [
            "mem.in.weight",
            "mem.blk.3.qkv.weight",
            "mem.blk.0.ffn_down.weight",
            "mem.node.map.weight",
            "mem.decider.q.weight",
            "mem.ce_proj.weight",
            "mem.lora.11.attn_q.a.weight",
            "mem.lora.0.ffn_down.b.weight",
        ] {
            assert_eq!(exported_role(name, 2), Role::MemoryMatrix, "{name}");
        }
        for name in [
            "mem.blk.0.a",
            "mem.blk.0.conv.weight",
            "mem.decider.weight",
            "mem.decider.0.weight",
            "mem.node.slot.weight",
            "mem.query.weight",
            "mem.in_norm.weight",
            "mem.blk.1.dt.bias",
        ] {
            assert_eq!(exported_role(name, 2), Role::MemoryVector, "{name}");
        }
    }
}
