//! Token ids: those of the parity fixtures, and llama.cpp's on its own vocabularies when these are at hand.

mod fixture;

use std::path::Path;

use mneme_engine::gguf::{Array, Gguf, GgufWriter, Value};
use mneme_engine::tokenizer::{Error, TokenType, Tokenizer};
use proptest::prelude::*;
use serde_json::Value as Json;

fn tokenizer(w: &GgufWriter) -> Result<Tokenizer, Error> {
    Tokenizer::from_gguf(&Gguf::from_bytes(w.to_bytes(&[]).unwrap()).unwrap())
}

fn ids(json: &Json) -> Vec<u32> {
    let ids = json.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn fixtures_text_cases() {
    for name in fixture::NAMES {
        let t = tokenizer(&fixture::writer(name)).unwrap();
        let cases = fixture::json(name, "text_cases.json");
        for case in cases["encode"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let add_special = case["add_special_tokens"].as_bool().unwrap();
            let expected = ids(&case["ids"]);
            assert_eq!(
                t.encode(text, add_special, true),
                expected,
                "{name}: {text:?}"
            );
            let skipped = t.decode(&expected, true);
            assert_eq!(skipped, case["decoded_skip_special"], "{name}: {text:?}");
            let kept = t.decode(&expected, false);
            assert_eq!(kept, case["decoded_keep_special"], "{name}: {text:?}");
            let mut stream = t.stream();
            let mut streamed = String::new();
            for &id in &expected {
                streamed.extend(stream.push(id));
            }
            streamed.extend(stream.flush());
            assert_eq!(streamed, kept);
        }
        for case in cases["chat"].as_array().unwrap() {
            let text = case["rendered"].as_str().unwrap();
            assert_eq!(
                t.encode(text, false, true),
                ids(&case["ids"]),
                "{name}: {text:?}"
            );
        }
    }
}

#[test]
fn roles_of_the_fixtures_tokens() {
    let t = tokenizer(&fixture::writer("qwen2-tiny")).unwrap();
    assert_eq!(t.n_vocab(), 512);
    assert_eq!((t.bos(), t.eos(), t.eot()), (None, Some(511), Some(511)));
    assert_eq!(t.ids().padding, Some(509));
    assert!(!t.add_bos());
    assert_eq!(t.eog_ids(), [509, 511]);
    assert!(t.is_control(510) && !t.is_control(64) && !t.is_eog(510));
    assert_eq!(t.piece(510), b"<|im_start|>");
    assert_eq!(t.piece(99999), b"");
    assert_eq!(t.token_type(99999), TokenType::Undefined);
    assert_eq!(t.eos_text(), "<|im_end|>");
    assert_eq!(t.token_id("<|im_end|>"), Some(511));

    let t = tokenizer(&fixture::writer("llama-tiny")).unwrap();
    assert_eq!((t.bos(), t.eos()), (Some(507), Some(511)));
    assert!(
        t.add_bos(),
        "llama-bpe adds BOS where the file does not say"
    );
    assert_eq!(t.encode("", true, true), [507]);
    let mut w = fixture::writer("llama-tiny");
    w.set("tokenizer.ggml.add_bos_token", false)
        .set("tokenizer.ggml.add_eos_token", true);
    assert_eq!(tokenizer(&w).unwrap().encode("", true, true), [511]);
}

#[test]
fn special_text_is_plain_text_unless_parsed() {
    let t = tokenizer(&fixture::writer("qwen2-tiny")).unwrap();
    assert_eq!(t.encode("<|im_end|>", false, true), [511]);
    let plain = t.encode("<|im_end|>", false, false);
    assert!(plain.len() > 3 && !plain.contains(&511), "{plain:?}");
    assert_eq!(t.decode(&plain, true), "<|im_end|>");
    // A user-defined token is recognised either way.
    let mut w = fixture::writer("qwen2-tiny");
    let mut types = vec![1i32; 512];
    types[510] = 4;
    w.set("tokenizer.ggml.token_type", types);
    let t = tokenizer(&w).unwrap();
    assert_eq!(t.encode("<|im_start|>", false, false), [510]);
}

#[test]
fn streaming_gives_whole_characters() {
    let t = tokenizer(&fixture::writer("qwen2-tiny")).unwrap();
    let text = "naïve 🦙 日本";
    let mut stream = t.stream();
    let mut parts = Vec::new();
    for id in t.encode(text, false, false) {
        parts.extend(stream.push(id));
    }
    assert_eq!(parts.concat(), text);
    assert!(parts.iter().all(|p| !p.contains('\u{fffd}')), "{parts:?}");
    assert_eq!(stream.flush(), None);
}

fn spm_writer() -> GgufWriter {
    let mut texts: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let mut types = vec![2i32, 3, 3];
    let mut scores = vec![0f32; 3];
    for b in 0..256 {
        texts.push(format!("<0x{b:02X}>"));
        types.push(6);
        scores.push(0.0);
    }
    for (i, text) in [
        "▁", "h", "e", "l", "o", "▁h", "he", "▁he", "ll", "llo", "▁hello",
    ]
    .iter()
    .enumerate()
    {
        texts.push(text.to_string());
        types.push(1);
        scores.push(-(i as f32));
    }
    let mut w = GgufWriter::new();
    w.set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", texts)
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.scores", scores);
    w
}

#[test]
fn sentencepiece_by_scores() {
    let t = tokenizer(&spm_writer()).unwrap();
    assert_eq!(
        (t.bos(), t.eos(), t.ids().unknown),
        (Some(1), Some(2), Some(0))
    );
    assert!(t.add_bos() && t.add_space_prefix() && !t.add_eos());
    let hello = t.token_id("▁hello").unwrap();
    let space = t.token_id("▁").unwrap();
    assert_eq!(t.encode("hello", true, true), [1, hello]);
    assert_eq!(t.encode("hello  hello", false, true), [hello, space, hello]);
    // Bytes, special tokens (the text after one gets a space again), and back.
    assert_eq!(t.encode("é", false, true), [space, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(t.encode("</s>hello", false, true), [2, hello]);
    assert_eq!(t.decode(&[1, hello, space, hello], true), "hello  hello");
    assert_eq!(t.decode(&[1, hello], false), "<s>hello");
    assert_eq!(t.piece(hello), b" hello");
    assert_eq!(t.encode("", true, true), [1]);
    let mut w = spm_writer();
    w.set("tokenizer.ggml.add_space_prefix", false);
    assert_ne!(tokenizer(&w).unwrap().encode("hello", false, true), [hello]);
}

/// A vocabulary with one key changed.
fn changed(key: &str, edit: impl FnOnce(Value) -> Value) -> GgufWriter {
    let mut w = fixture::writer("qwen2-tiny");
    let old = w
        .keys()
        .iter()
        .find(|(k, _)| k == key)
        .map(|(_, v)| v.clone());
    let new = edit(old.unwrap_or(Value::U32(0)));
    w.set(key, new);
    w
}

fn strings(v: Value) -> Vec<String> {
    match v {
        Value::Array(Array::String(s)) => s,
        other => panic!("{other}"),
    }
}

#[test]
fn hostile_vocabularies_are_errors() {
    let fails = |w: GgufWriter, part: &str| {
        let e = tokenizer(&w).unwrap_err().to_string();
        assert!(e.contains(part), "{e:?} should name {part:?}");
    };
    fails(changed("tokenizer.ggml.model", |_| "bert".into()), "bert");
    fails(
        changed("tokenizer.ggml.model", |_| 1u32.into()),
        "tokenizer.ggml.model",
    );
    fails(
        changed("tokenizer.ggml.pre", |_| "no-such".into()),
        "no-such",
    );
    fails(
        changed("tokenizer.ggml.tokens", |_| Vec::<String>::new().into()),
        "empty",
    );
    fails(
        changed("tokenizer.ggml.tokens", |_| vec![1u32].into()),
        "array of strings",
    );
    let doubled = changed("tokenizer.ggml.tokens", |v| {
        let mut s = strings(v);
        s[7] = s[300].clone();
        s.into()
    });
    fails(doubled, "twice, as 7 and 300");
    fails(
        changed("tokenizer.ggml.token_type", |_| vec![1i32; 511].into()),
        "512 tokens, got 511",
    );
    let merge = |m: &str| {
        let m = m.to_string();
        changed("tokenizer.ggml.merges", |v| {
            let mut s = strings(v);
            s[3] = m;
            s.into()
        })
    };
    fails(merge("ab"), "merge 3");
    fails(merge(""), "merge 3");
    fails(merge(" "), "merge 3");
    fails(merge("zzz Ġ"), "zzz");
    fails(merge("<|im_end|> <|im_start|>"), "<|im_end|><|im_start|>");
    let mut w = spm_writer();
    w.set("tokenizer.ggml.scores", vec![0f32; 5]);
    fails(w, "tokenizer.ggml.scores");
    let mut w = spm_writer();
    w.set("tokenizer.ggml.token_type", vec![6i32; 270]);
    fails(w, "byte");
    fails(GgufWriter::new(), "tokenizer.ggml.model");
    // An id outside the vocabulary is ignored with a warning, as llama.cpp does; an empty token matches nothing.
    let w = changed("tokenizer.ggml.bos_token_id", |_| 600u32.into());
    assert_eq!(tokenizer(&w).unwrap().bos(), None);
    let w = changed("tokenizer.ggml.tokens", |v| {
        let mut s = strings(v);
        s[509] = String::new();
        s.into()
    });
    let t = tokenizer(&w).unwrap();
    assert_eq!(t.decode(&t.encode("abc", false, true), false), "abc");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_text_survives(text in "\\PC{0,40}|[ \\n\\t\\ra-z0-9'<|>_é日😀]{0,60}", parse in any::<bool>()) {
        use unicode_normalization::UnicodeNormalization;
        let qwen = tokenizer(&fixture::writer("qwen2-tiny")).unwrap();
        let expected: String = text.nfc().collect();
        prop_assert_eq!(qwen.decode(&qwen.encode(&text, true, parse), false), expected);
        let llama = tokenizer(&fixture::writer("llama-tiny")).unwrap();
        prop_assert_eq!(llama.decode(&llama.encode(&text, false, parse), false), text.as_str());
        let spm = tokenizer(&spm_writer()).unwrap();
        if !text.contains('▁') {
            prop_assert_eq!(spm.decode(&spm.encode(&text, false, false), false), text.as_str());
        }
    }
}

#[test]
fn pathological_texts_end() {
    let qwen = tokenizer(&fixture::writer("qwen2-tiny")).unwrap();
    let spm = tokenizer(&spm_writer()).unwrap();
    for unit in ["a", "hello", " ", "\n", "é", "<|im_end|>", "<", "▁", "1"] {
        let text = unit.repeat(200_000 / unit.len());
        assert_eq!(qwen.decode(&qwen.encode(&text, false, true), false), text);
        assert!(!spm.encode(&text, false, true).is_empty());
    }
}

/// llama.cpp's vocabularies with the texts that come with them (`.inp`, `.out`) and those of `tools/vocab_cases.py`.
#[test]
fn llama_cpp_vocabularies() {
    let Ok(dir) = std::env::var("MNEME_VOCAB_DIR") else {
        eprintln!("skipped: set MNEME_VOCAB_DIR to a folder with ggml-vocab-*.gguf files");
        return;
    };
    let mut n_cases = 0;
    let mut paths: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    paths.sort();
    for path in paths
        .iter()
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
    {
        let gguf = Gguf::open(path).unwrap();
        let t = match Tokenizer::from_gguf(&gguf) {
            Ok(t) => t,
            Err(e @ (Error::ModelName { .. } | Error::Pre { .. })) => {
                eprintln!(
                    "{}: {}",
                    path.display(),
                    e.to_string().chars().take(120).collect::<String>()
                );
                continue;
            }
            Err(e) => panic!("{}: {e}", path.display()),
        };
        let beside = |ext: &str| format!("{}.{ext}", path.display());
        if Path::new(&beside("inp")).exists() {
            let inp = std::fs::read_to_string(beside("inp")).unwrap();
            let out = std::fs::read_to_string(beside("out")).unwrap();
            for (text, line) in inp.split("\n__ggml_vocab_test__\n").zip(out.lines()) {
                let expected: Vec<u32> = line
                    .split_whitespace()
                    .map(|id| id.parse().unwrap())
                    .collect();
                assert_eq!(
                    t.encode(text, false, false),
                    expected,
                    "{}: {text:?}",
                    path.display()
                );
                n_cases += 1;
            }
        }
        let Ok(cases) = std::fs::read_to_string(beside("cases.json")) else {
            continue;
        };
        let cases: Json = serde_json::from_str(&cases).unwrap();
        let mut wrong = 0;
        for case in cases["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let flag = |key: &str| case[key].as_bool().unwrap();
            if !unicode_normalization::is_nfc(text) && t.name() == "gpt2 (qwen2)" {
                continue; // composed first, see the module's text
            }
            let got = t.encode(text, flag("add_special"), flag("parse_special"));
            if got != ids(&case["ids"]) {
                wrong += 1;
                if wrong < 5 {
                    eprintln!(
                        "{}: {text:?}\n  got      {got:?}\n  expected {:?}",
                        path.display(),
                        ids(&case["ids"])
                    );
                }
            }
            n_cases += 1;
        }
        assert_eq!(wrong, 0, "{}", path.display());
        for (id, piece) in cases["pieces"].as_array().unwrap().iter().enumerate() {
            let piece: Vec<u8> = piece
                .as_array()
                .unwrap()
                .iter()
                .map(|b| b.as_u64().unwrap() as u8)
                .collect();
            // llama.cpp spells characters outside the byte alphabet as a note; here they stand for themselves.
            if piece.starts_with(b"[UNK_BYTE_") {
                continue;
            }
            assert_eq!(t.piece(id as u32), piece, "{}: piece {id}", path.display());
        }
        assert_eq!(t.eog_ids(), ids(&cases["eog"]), "{}", path.display());
        eprintln!("{}: {} equal", path.display(), t.name());
    }
    assert!(n_cases > 0);
}
