//! A model of random weights that speaks the tokens of the language of records: its answers are
//! noise, everything around them is real.

use mneme_engine::gguf::{GgmlType, GgufWriter};
use std::path::{Path, PathBuf};

const N_EMBD: u64 = 32;
const N_LAYER: u64 = 2;
const N_FF: u64 = 48;
/// Width of the compressor.
const C: u64 = 16;
/// Its heads.
const HC: u64 = 2;

/// Reproducible numbers in -1..1 (a multiplicative generator: quality does not matter here).
fn noise(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            x = x.wrapping_mul(0xD120_2E8A_5A2B_1F35).rotate_left(23) ^ 0x5851_F42D;
            ((x >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

/// Writes the model into `dir` and returns its path. Without `memory` it has no compressor.
pub fn model(dir: &Path, memory: bool) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/tokenizer/tokenizer.json");
    let text = std::fs::read_to_string(root).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut tokens: Vec<(u64, String)> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(t, id)| (id.as_u64().unwrap(), t.clone()))
        .collect();
    let special = json["added_tokens"].as_array().unwrap();
    let n_plain = tokens.len();
    for t in special {
        let id = t["id"].as_u64().unwrap();
        if !tokens.iter().any(|(i, _)| *i == id) {
            tokens.push((id, t["content"].as_str().unwrap().into()));
        }
    }
    tokens.sort();
    let is_special = |t: &str| special.iter().any(|s| s["content"] == t);
    let types: Vec<i32> = tokens
        .iter()
        .map(|(_, t)| if is_special(t) { 3 } else { 1 })
        .collect();
    let end = tokens.iter().find(|(_, t)| t == "<|end|>").unwrap().0;
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| match m.as_array() {
            Some(pair) => format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            ),
            None => m.as_str().unwrap().to_owned(),
        })
        .collect();
    assert!(n_plain > 1000 && tokens.len() as u64 == tokens[tokens.len() - 1].0 + 1);
    let n_vocab = tokens.len() as u64;

    let mut w = GgufWriter::new();
    w.set("general.architecture", "qwen2");
    for (key, value) in [
        ("block_count", N_LAYER),
        ("context_length", 512),
        ("embedding_length", N_EMBD),
        ("feed_forward_length", N_FF),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ] {
        w.set(&format!("qwen2.{key}"), value as u32);
    }
    w.set("qwen2.attention.layer_norm_rms_epsilon", 1e-6f32);
    w.set("qwen2.rope.freq_base", 10_000f32);
    w.set("tokenizer.ggml.model", "gpt2");
    w.set("tokenizer.ggml.pre", "qwen2");
    let texts: Vec<String> = tokens.into_iter().map(|(_, t)| t).collect();
    w.set("tokenizer.ggml.tokens", texts);
    w.set("tokenizer.ggml.token_type", types);
    w.set("tokenizer.ggml.merges", merges);
    w.set("tokenizer.ggml.eos_token_id", end as u32);
    w.set("tokenizer.ggml.add_bos_token", false);

    // Name, dims in ggml's order, scale of the noise, what is added to it.
    let mut all: Vec<(String, Vec<u64>, f32, f32)> = Vec::new();
    let mut add = |name: &str, dims: &[u64], scale: f32, plus: f32| {
        all.push((name.into(), dims.into(), scale, plus));
    };
    add("token_embd.weight", &[N_EMBD, n_vocab], 1.0, 0.0);
    add("output_norm.weight", &[N_EMBD], 0.1, 1.0);
    for il in 0..N_LAYER {
        let name = |s: &str| format!("blk.{il}.{s}");
        add(&name("attn_norm.weight"), &[N_EMBD], 0.1, 1.0);
        add(&name("attn_q.weight"), &[N_EMBD, N_EMBD], 0.3, 0.0);
        add(&name("attn_k.weight"), &[N_EMBD, N_EMBD / 2], 0.3, 0.0);
        add(&name("attn_v.weight"), &[N_EMBD, N_EMBD / 2], 0.3, 0.0);
        add(&name("attn_q.bias"), &[N_EMBD], 0.1, 0.0);
        add(&name("attn_k.bias"), &[N_EMBD / 2], 0.1, 0.0);
        add(&name("attn_v.bias"), &[N_EMBD / 2], 0.1, 0.0);
        add(&name("attn_output.weight"), &[N_EMBD, N_EMBD], 0.3, 0.0);
        add(&name("ffn_norm.weight"), &[N_EMBD], 0.1, 1.0);
        add(&name("ffn_gate.weight"), &[N_EMBD, N_FF], 0.3, 0.0);
        add(&name("ffn_up.weight"), &[N_EMBD, N_FF], 0.3, 0.0);
        add(&name("ffn_down.weight"), &[N_FF, N_EMBD], 0.3, 0.0);
    }
    if memory {
        w.set("qwen2.memory.kind", "nodes");
        for (key, value) in [
            ("node.slots", 1),
            ("decider.min_segment", 2),
            ("decider.max_segment", 48),
            ("compressor.block_count", 1),
            ("compressor.embedding_length", C),
            ("compressor.head_count", HC),
            ("compressor.feed_forward_length", 24),
            ("compressor.conv_kernel", 4),
        ] {
            w.set(&format!("qwen2.memory.{key}"), value as u32);
        }
        w.set("qwen2.memory.decider.type", "linear");
        w.set("qwen2.memory.decider.threshold", 0.5f32);
        add("mem.in_norm.weight", &[N_EMBD], 0.1, 1.0);
        add("mem.in.weight", &[N_EMBD, C], 0.3, 0.0);
        for prefix in ["mem.blk.0", "mem.active"] {
            let name = |s: &str| format!("{prefix}.{s}");
            add(&name("qkv.weight"), &[C, 3 * C], 0.5, 0.0);
            add(&name("beta.weight"), &[C, HC], 0.5, 0.0);
            add(&name("alpha.weight"), &[C, HC], 0.5, 0.0);
            add(&name("a"), &[HC], 0.1, -0.3);
            add(&name("dt.bias"), &[HC], 0.1, 0.0);
            add(&name("gate.weight"), &[C, C], 0.5, 0.0);
            add(&name("head_norm.weight"), &[C / HC], 0.1, 1.0);
        }
        for (name, dims, scale, plus) in [
            ("norm.weight", vec![C], 0.1, 1.0),
            ("conv.weight", vec![4, 3 * C], 0.5, 0.0),
            ("out.weight", vec![C, C], 0.5, 0.0),
            ("ffn_norm.weight", vec![C], 0.1, 1.0),
            ("ffn_gate.weight", vec![C, 24], 0.5, 0.0),
            ("ffn_up.weight", vec![C, 24], 0.5, 0.0),
            ("ffn_down.weight", vec![24, C], 0.5, 0.0),
        ] {
            add(&format!("mem.blk.0.{name}"), &dims, scale, plus);
        }
        add("mem.out_norm.weight", &[C], 0.1, 1.0);
        // Spread p out, and lean towards no cut.
        add("mem.decider.weight", &[C, 1], 1.5, 0.0);
        add("mem.decider.bias", &[1], 0.0, -3.0);
        add("mem.node.map.weight", &[C, N_EMBD], 0.3, 0.0);
        add("mem.node.slot.weight", &[N_EMBD, 1], 0.5, 0.0);
    }
    for (name, dims, ..) in &all {
        w.tensor(name, dims, GgmlType::F32).unwrap();
    }
    let path = dir.join(if memory { "tiny.gguf" } else { "plain.gguf" });
    let mut sink = w.create(&path, true).unwrap();
    for (seed, (name, dims, scale, plus)) in all.iter().enumerate() {
        let n: u64 = dims.iter().product();
        let values = noise(seed as u64 + 7, n as usize, *scale);
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|v| (v + plus).to_le_bytes())
            .collect();
        sink.tensor(name, &bytes).unwrap();
    }
    sink.finish().unwrap();
    path
}
