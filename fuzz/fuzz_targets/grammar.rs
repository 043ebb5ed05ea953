//! Any text as GBNF, Lark, a regular expression or a JSON schema: an error or a grammar that can be stepped.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mneme_engine::gguf::{Gguf, GgufWriter};
use mneme_engine::grammar::GrammarVocab;
use mneme_engine::tokenizer::Tokenizer;

static VOCAB: LazyLock<GrammarVocab> = LazyLock::new(|| {
    let mut texts: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    let mut types = vec![2i32, 3, 3];
    for b in 0..=255u8 {
        texts.push(format!("<0x{b:02X}>"));
        types.push(6);
    }
    let mut w = GgufWriter::new();
    w.set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", texts)
        .set("tokenizer.ggml.token_type", types);
    let gguf = Gguf::from_bytes(w.to_bytes(&[]).unwrap()).unwrap();
    GrammarVocab::new(&Tokenizer::from_gguf(&gguf).unwrap()).unwrap()
});

fuzz_target!(|input: (u8, &str)| {
    let (kind, source) = input;
    let grammar = match kind % 4 {
        0 => VOCAB.gbnf(source),
        1 => VOCAB.lark(source),
        2 => VOCAB.regex(source),
        _ => match serde_json::from_str(source) {
            Ok(schema) => VOCAB.json_schema(&schema),
            Err(_) => return,
        },
    };
    let Ok(mut grammar) = grammar else { return };
    for _ in 0..4 {
        let mut logits = vec![0f32; 259];
        if grammar.mask(&mut logits).is_err() {
            return;
        }
        match logits.iter().position(|l| *l == 0.0) {
            Some(id) if grammar.accept(id as u32).is_ok() => {}
            _ => return,
        }
    }
});
