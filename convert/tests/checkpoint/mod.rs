//! Reading fixtures independently of the converter.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ggml_sys::Type;
use mneme_convert::{ConvertOptions, Converted, Error, convert};
use mneme_engine::gguf::Gguf;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value as Json;

/// The folder of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    root.join(name)
}

/// Fixtures whose name starts with one of these, sorted.
pub fn fixtures(prefixes: &[&str]) -> Vec<String> {
    let entries = std::fs::read_dir(fixture("")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
        .filter(|name| fixture(name).join("model.safetensors").is_file())
        .collect();
    names.sort();
    for prefix in prefixes {
        assert!(
            names.iter().any(|name| name.starts_with(prefix)),
            "no fixture {prefix}*"
        );
    }
    names
}

/// A parsed JSON file.
pub fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Converts without watching.
pub fn run(options: &ConvertOptions) -> Result<Converted, Error> {
    convert(options, &mut |_| ControlFlow::Continue(()))
}

/// Name, shape and values as F32 of every tensor of a checkpoint.
pub fn checkpoint(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut out = BTreeMap::new();
    for (name, view) in tensors.iter() {
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            Dtype::BF16 => {
                let halves = data.as_chunks::<2>().0.iter();
                halves
                    .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
                    .collect()
            }
            other => panic!("{name} is {other:?}"),
        };
        out.insert(name.to_string(), (view.shape().to_vec(), values));
    }
    out
}

/// A tensor of a GGUF file as F32.
pub fn values(gguf: &Gguf, name: &str) -> Vec<f32> {
    let info = gguf.require_tensor(name).unwrap();
    let mut out = vec![f32::NAN; info.n_elements() as usize];
    let ty = Type::from_id(info.ty.id()).unwrap();
    ggml_sys::dequantize(ty, gguf.data(info), &mut out).unwrap();
    out
}

/// Bit patterns, so that zeros differ by sign and NaNs compare.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The GGUF name of a base tensor.
pub fn base_name(name: &str) -> Option<String> {
    const LAYER: &[(&str, &str)] = &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let row = LAYER.iter().find(|row| row.0 == module)?;
    Some(format!("blk.{layer}.{}.{kind}", row.1))
}

/// Undoes the reordering of rotated pairs: `[n_head, d/2, 2, cols]` to `[n_head, 2, d/2, cols]`.
pub fn halves(values: &[f32], n_rows: usize, head_dim: usize) -> Vec<f32> {
    let n_cols = values.len() / n_rows;
    let mut out = vec![f32::NAN; values.len()];
    for row in 0..n_rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let half = head_dim / 2;
        let from = head * head_dim + 2 * (within % half) + within / half;
        out[row * n_cols..][..n_cols].copy_from_slice(&values[from * n_cols..][..n_cols]);
    }
    out
}
