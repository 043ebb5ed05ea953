//! Any text through a byte-level and a score-based vocabulary: ids inside the vocabulary, and the text back.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mneme_engine::gguf::{Gguf, GgufWriter};
use mneme_engine::tokenizer::Tokenizer;

static BPE: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut texts: Vec<String> = Vec::new();
    let mut next = 0x100u32;
    for b in 0..=255u8 {
        let c = match b {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap()
            }
        };
        texts.push(c.to_string());
    }
    let merges = [
        "t h",
        "th e",
        "h e",
        "\u{120} t",
        "\u{120}t he",
        "1 2",
        "a a",
        "aa aa",
    ];
    for merge in merges {
        texts.push(merge.replace(' ', ""));
    }
    texts.push("<|im_end|>".into());
    let mut types = vec![1i32; texts.len()];
    *types.last_mut().unwrap() = 3;
    build("gpt2", texts, types, merges.map(String::from).to_vec())
});

static SPM: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut texts: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let mut types = vec![2i32, 3, 3];
    for b in 0..=255u8 {
        texts.push(format!("<0x{b:02X}>"));
        types.push(6);
    }
    for text in [
        "\u{2581}",
        "a",
        "b",
        "\u{2581}a",
        "ab",
        "\u{2581}\u{2581}",
        "b\u{2581}",
    ] {
        texts.push(text.into());
        types.push(1);
    }
    build("llama", texts, types, Vec::new())
});

fn build(model: &str, texts: Vec<String>, types: Vec<i32>, merges: Vec<String>) -> Tokenizer {
    let scores: Vec<f32> = (0..texts.len()).map(|i| -(i as f32)).collect();
    let mut w = GgufWriter::new();
    w.set("tokenizer.ggml.model", model)
        .set("tokenizer.ggml.pre", "llama-bpe")
        .set("tokenizer.ggml.tokens", texts)
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.scores", scores)
        .set("tokenizer.ggml.merges", merges);
    let gguf = Gguf::from_bytes(w.to_bytes(&[]).unwrap()).unwrap();
    Tokenizer::from_gguf(&gguf).unwrap()
}

fuzz_target!(|text: &str| {
    for parse in [false, true] {
        let ids = BPE.encode(text, false, parse);
        assert_eq!(BPE.decode(&ids, false), text);
        let mut stream = BPE.stream();
        let mut streamed = String::new();
        for &id in &ids {
            streamed.extend(stream.push(id));
        }
        streamed.extend(stream.flush());
        assert_eq!(streamed, text);
        let ids = SPM.encode(text, true, parse);
        assert!(ids.iter().all(|&id| (id as usize) < SPM.n_vocab()));
        if !parse && !text.contains('\u{2581}') {
            assert_eq!(SPM.decode(&ids, true), text);
        }
    }
});
