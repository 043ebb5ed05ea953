//! A vocabulary in GGUF form from the `tokenizer.json` of a parity fixture.

#![allow(dead_code)] // each test file uses its part

use std::path::PathBuf;

use mneme_engine::gguf::{Gguf, GgufWriter};
use serde_json::Value as Json;

/// The parity fixtures with texts to tokenise.
pub const NAMES: &[&str] = &[
    "qwen2-tiny",
    "qwen2-tiny-untied",
    "qwen2-k256",
    "qwen3-tiny",
    "qwen3-tiny-tied",
    "llama-tiny",
    "llama-tiny-untied",
    "ahn-gdn-tiny",
    "ahn-gdn-qwen3",
];

pub fn json(name: &str, file: &str) -> Json {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../fixtures")
        .join(name)
        .join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// Keys of the vocabulary, as a converter writes them.
pub fn writer(name: &str) -> GgufWriter {
    let tokenizer = json(name, "tokenizer.json");
    let config = json(name, "tokenizer_config.json");
    let model = &tokenizer["model"];
    let mut texts = Vec::new();
    let mut types = Vec::new();
    let mut put = |id: u64, text: &str, ty: i32| {
        let id = id as usize;
        if texts.len() <= id {
            texts.resize(id + 1, String::new());
            types.resize(id + 1, 5);
        }
        texts[id] = text.to_string();
        types[id] = ty;
    };
    for (text, id) in model["vocab"].as_object().unwrap() {
        put(id.as_u64().unwrap(), text, 1);
    }
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        let ty = if added["special"] == true { 3 } else { 4 };
        put(
            added["id"].as_u64().unwrap(),
            added["content"].as_str().unwrap(),
            ty,
        );
    }
    let merges = model["merges"].as_array().unwrap().iter();
    let merges: Vec<String> = merges
        .map(|m| match m.as_array() {
            Some(pair) => format!(
                "{} {}",
                pair[0].as_str().unwrap(),
                pair[1].as_str().unwrap()
            ),
            None => m.as_str().unwrap().to_string(),
        })
        .collect();
    let id_of = |key: &str| {
        let text = config[key].as_str()?;
        texts.iter().position(|t| t == text).map(|id| id as u32)
    };
    let mut w = GgufWriter::new();
    let is_llama = name.starts_with("llama");
    w.set(
        "general.architecture",
        if is_llama { "llama" } else { "qwen2" },
    )
    .set("tokenizer.ggml.model", "gpt2")
    .set(
        "tokenizer.ggml.pre",
        if is_llama { "llama-bpe" } else { "qwen2" },
    )
    .set("tokenizer.ggml.merges", merges)
    .set(
        "tokenizer.chat_template",
        config["chat_template"].as_str().unwrap(),
    );
    for (key, from) in [
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("padding", "pad_token"),
    ] {
        if let Some(id) = id_of(from) {
            w.set(&format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
    w.set("tokenizer.ggml.tokens", texts.clone())
        .set("tokenizer.ggml.token_type", types);
    w
}

pub fn gguf(name: &str) -> Gguf {
    Gguf::from_bytes(writer(name).to_bytes(&[]).unwrap()).unwrap()
}
