//! Bad input is refused with words that name what is wrong, and no output file is left.

mod checkpoint;

use std::ops::ControlFlow;
use std::path::Path;

use checkpoint::{fixture, json, run};
use ggml_sys::Type;
use mneme_convert::{
    ConvertOptions, Error, FileType, MixOptions, QuantizeOptions, convert, quantize,
};
use mneme_engine::gguf::Gguf;
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};

/// A copy of a fixture's input files, for spoiling.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        std::fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
    }
    dir
}

type Edit = fn(&mut Json);

fn edit(path: &Path, edit: impl FnOnce(&mut Json)) {
    let mut value = json(path);
    edit(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// Converts a spoiled folder; the error's text must hold every word, and no file may be left.
fn refused(dir: &Path, words: &[&str]) {
    refused_with(&ConvertOptions::new(dir, dir.join("out.gguf")), words);
}

fn refused_with(options: &ConvertOptions, words: &[&str]) {
    let folder = options.output.path.parent().unwrap();
    let count = || std::fs::read_dir(folder).unwrap().count();
    let before = count();
    let error = run(options).expect_err("must be refused").to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} does not mention {word:?}");
    }
    assert_eq!(before, count(), "{error}: a file was left");
}

#[test]
fn missing_files_are_named() {
    for (file, word) in [
        ("config.json", "config.json"),
        ("model.safetensors", ".safetensors"),
        ("tokenizer.json", "tokenizer.json"),
    ] {
        let dir = copy("qwen2-tiny");
        std::fs::remove_file(dir.path().join(file)).unwrap();
        refused(dir.path(), &[word]);
    }
    let dir = copy("qwen2-tiny");
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(
        &index,
        r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#,
    )
    .unwrap();
    refused(dir.path(), &["model-00001-of-00002.safetensors", "missing"]);
    std::fs::write(&index, r#"{"weight_map": {"a": "../model.safetensors"}}"#).unwrap();
    refused(dir.path(), &["weight_map.a", "same folder"]);

    let dir = tempfile::tempdir().unwrap();
    let mut options = ConvertOptions::new(dir.path().join("nowhere"), dir.path().join("o.gguf"));
    refused_with(&options, &["nowhere"]);
    options.model = fixture("qwen2-tiny").join("config.json");
    refused_with(&options, &["config.json"]);
}

#[test]
fn broken_configs_are_named() {
    let dir = copy("qwen2-tiny");
    std::fs::write(dir.path().join("config.json"), "{\"hidden_size\": ").unwrap();
    refused(dir.path(), &["config.json", "not valid JSON"]);
    let cases: &[(Edit, &[&str])] = &[
        (
            |c| c["architectures"][0] = "MambaForCausalLM".into(),
            &["MambaForCausalLM", "not supported"],
        ),
        (
            |c| c["hidden_size"] = "64".into(),
            &["hidden_size", "positive integer", "\"64\""],
        ),
        (
            |c| c["hidden_size"] = u64::MAX.into(),
            &["hidden_size", "positive integer"],
        ),
        (
            |c| c["num_attention_heads"] = 0.into(),
            &["num_attention_heads"],
        ),
        (
            |c| c["num_key_value_heads"] = 3.into(),
            &["num_key_value_heads", "divisor"],
        ),
        (
            |c| c["hidden_act"] = "gelu".into(),
            &["hidden_act", "silu", "gelu"],
        ),
        (
            |c| c["num_hidden_layers"] = 4.into(),
            &["model.layers.3.", "missing"],
        ),
        (
            |c| c["num_hidden_layers"] = 2.into(),
            &["model.layers.2.", "does not belong"],
        ),
        (
            |c| c["tie_word_embeddings"] = false.into(),
            &["lm_head.weight", "missing"],
        ),
        (
            |c| c["vocab_size"] = 513.into(),
            &["model.embed_tokens.weight", "[513, 64]", "[512, 64]"],
        ),
        (
            |c| c["rope_scaling"] = json!({"rope_type": "longrope"}),
            &["rope_scaling.rope_type", "longrope"],
        ),
        (
            |c| c["rope_scaling"] = json!({"type": "yarn"}),
            &["rope_scaling.factor", "positive number"],
        ),
    ];
    for (spoil, words) in cases {
        let dir = copy("qwen2-tiny");
        edit(&dir.path().join("config.json"), spoil);
        refused(dir.path(), words);
    }
    // Without a list of architectures the model type decides.
    let dir = copy("qwen2-tiny");
    edit(&dir.path().join("config.json"), |c| {
        c["architectures"] = Json::Null
    });
    run(&ConvertOptions::new(dir.path(), dir.path().join("o.gguf"))).unwrap();
}

#[test]
fn broken_weights_are_named() {
    let bytes = std::fs::read(fixture("qwen2-tiny").join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
    let dir = copy("qwen2-tiny");
    let weights = dir.path().join("model.safetensors");
    for n in [0, 4, 8, 9, header / 2, header, header + 1, bytes.len() - 1] {
        std::fs::write(&weights, &bytes[..n]).unwrap();
        refused(dir.path(), &["model.safetensors"]);
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&weights, huge).unwrap();
    refused(dir.path(), &["model.safetensors"]);

    // NaN cannot be quantized; the place is told.
    let mut poisoned = bytes;
    poisoned[header + 6..header + 8].copy_from_slice(&0x7fc0u16.to_le_bytes());
    std::fs::write(&weights, poisoned).unwrap();
    let mut options = ConvertOptions::new(dir.path(), dir.path().join("out.gguf"));
    options.outtype = Some(Type::Q8_0);
    refused_with(&options, &["token_embd.weight", "NaN", "row 0, column 3"]);

    let dir = copy("qwen2-tiny");
    edit(&dir.path().join("config.json"), |c| {
        c["intermediate_size"] = 192.into()
    });
    refused(
        dir.path(),
        &[
            "model.layers.0.mlp.gate_proj.weight",
            "[192, 64]",
            "[160, 64]",
        ],
    );
    let dir = copy("qwen2-tiny");
    let (first, second) = (
        dir.path().join("a.safetensors"),
        dir.path().join("b.safetensors"),
    );
    std::fs::rename(dir.path().join("model.safetensors"), &first).unwrap();
    std::fs::copy(&first, second).unwrap();
    refused(dir.path(), &["b.safetensors", "another file"]);
}

#[test]
fn broken_tokenizers_are_named() {
    let cases: &[(Edit, &[&str])] = &[
        (|t| t["model"]["type"] = "WordPiece".into(), &["WordPiece"]),
        (
            |t| t["model"]["vocab"]["x y"] = 1_000_000_000.into(),
            &["absurd"],
        ),
        (
            |t| t["model"]["vocab"]["x y"] = (-1).into(),
            &["\"x y\"", "-1"],
        ),
        (|t| t["model"]["vocab"]["x y"] = 3.into(), &["share id 3"]),
        (
            |t| t["model"]["vocab"]["x y"] = 600.into(),
            &["601 tokens", "vocab_size 512"],
        ),
        (|t| t["model"]["merges"][7] = 7.into(), &["merge 7"]),
        (
            |t| t["pre_tokenizer"] = json!({"type": "Whitespace"}),
            &["pre-tokenizer", "--pre"],
        ),
    ];
    for (spoil, words) in cases {
        let dir = copy("qwen2-tiny");
        edit(&dir.path().join("tokenizer.json"), spoil);
        refused(dir.path(), words);
    }
    let dir = copy("qwen2-tiny");
    edit(&dir.path().join("tokenizer.json"), |t| {
        t["pre_tokenizer"] = Json::Null
    });
    let mut options = ConvertOptions::new(dir.path(), dir.path().join("o.gguf"));
    options.pre = Some("default".into());
    run(&options).unwrap();
    let gguf = Gguf::open(&options.output.path).unwrap();
    assert_eq!(gguf.str("tokenizer.ggml.pre").unwrap(), "default");
}

#[test]
fn outputs_in_the_way_are_kept() {
    let dir = copy("qwen2-tiny");
    let out = dir.path().join("out.gguf");
    std::fs::write(&out, "precious").unwrap();
    refused(dir.path(), &["out.gguf", "already exists", "--force"]);
    assert_eq!(std::fs::read(&out).unwrap(), b"precious");
    let mut options = ConvertOptions::new(dir.path(), &out);
    options.output.overwrite = true;
    run(&options).unwrap();
    assert!(Gguf::open(&out).is_ok());
    for (path, word) in [
        (
            dir.path().join("no/such/out.gguf"),
            "no/such does not exist",
        ),
        (dir.path().into(), "is a folder"),
    ] {
        let error = run(&ConvertOptions::new(dir.path(), path))
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn an_unwritable_folder_is_named() {
    // Nobody, root included, can create files in /proc.
    let options = ConvertOptions::new(fixture("qwen2-tiny"), "/proc/out.gguf");
    let error = run(&options).unwrap_err().to_string();
    assert!(error.contains("/proc/out.gguf"), "{error}");
}

#[test]
fn stopping_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = ConvertOptions::new(fixture("qwen2-tiny"), dir.path().join("o.gguf"));
    for split in [None, Some(1 << 16)] {
        options.output.split_max_bytes = split;
        let mut left = 12;
        let stopped = convert(&options, &mut |_| {
            left -= 1;
            match left {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        assert!(matches!(stopped, Err(Error::Stopped)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn memories_that_cannot_be_are_refused() {
    let cases: &[(&str, Edit, &[&str])] = &[
        (
            "ahn-gdn-tiny",
            |c| c["use_q_proj"] = true.into(),
            &["use_q_proj", "not supported"],
        ),
        (
            "ahn-gdn-tiny",
            |c| c["use_ahn_router"] = true.into(),
            &["router", "not supported"],
        ),
        (
            "ahn-gdn-tiny",
            |c| c["_ahn_implementation"] = "Rwkv".into(),
            &["_ahn_implementation", "Rwkv"],
        ),
        (
            "ahn-gdn-tiny",
            |c| c["fa_layer_ids"] = "0,7".into(),
            &["fa_layer_ids", "below"],
        ),
        (
            "ahn-gdn-tiny",
            |c| c["fa_layer_ids"] = "0,x".into(),
            &["fa_layer_ids", "commas"],
        ),
        (
            "ahn-dn-tiny",
            |c| c["_ahn_implementation"] = "GatedDeltaNet".into(),
            &["ahn.fn.a_proj.weight", "missing"],
        ),
        (
            "gist-qwen2",
            |c| c["memory"]["gist_token_ids"][0] = 100_000.into(),
            &["gist_token_ids", "vocab_size"],
        ),
        (
            "nodes-linear",
            |c| c["memory"]["kind"] = "dreams".into(),
            &["memory.kind", "dreams"],
        ),
        (
            "nodes-linear",
            |c| c["memory"] = Json::Null,
            &["mem.", "\"memory\" object"],
        ),
    ];
    for (name, spoil, words) in cases {
        let dir = copy(name);
        edit(&dir.path().join("config.json"), spoil);
        refused(dir.path(), words);
    }
    let dir = copy("gist-qwen2");
    let mut options = ConvertOptions::new(dir.path(), dir.path().join("o.gguf"));
    options.adapter = true;
    refused_with(&options, &["gist", "--memory-adapter"]);
    options.model = fixture("qwen2-tiny");
    refused_with(&options, &["no memory"]);
    (options.adapter, options.window) = (false, Some(4));
    refused_with(&options, &["--window"]);
}

#[test]
fn full_attention_layers_have_no_memory() {
    let dir = copy("ahn-gdn-tiny");
    edit(&dir.path().join("config.json"), |c| {
        c["fa_layer_ids"] = "1".into()
    });
    let out = dir.path().join("o.gguf");
    run(&ConvertOptions::new(dir.path(), &out)).unwrap();
    let gguf = Gguf::open(&out).unwrap();
    let full = gguf.opt_arr_i64("qwen2.memory.ahn.full_layers").unwrap();
    assert_eq!(full, Some(vec![1]));
    assert!(gguf.tensor("blk.0.ahn_b.weight").is_some());
    assert!(gguf.tensor("blk.1.ahn_b.weight").is_none());
}

/// The published layout: AHN tensors in a folder of their own, the base in another.
#[test]
fn ahn_only_checkpoints() {
    let source = fixture("ahn-gdn-qwen3");
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let (ahn, base): (Vec<_>, Vec<_>) = tensors
        .into_iter()
        .partition(|(name, _)| name.contains(".ahn."));
    let (ahn_dir, base_dir) = (copy("ahn-gdn-qwen3"), copy("ahn-gdn-qwen3"));
    safetensors::serialize_to_file(ahn, None, &ahn_dir.path().join("model.safetensors")).unwrap();
    safetensors::serialize_to_file(base, None, &base_dir.path().join("model.safetensors")).unwrap();
    edit(&base_dir.path().join("config.json"), |c| {
        c["_layer_implementation"] = Json::Null
    });
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::remove_file(ahn_dir.path().join(file)).unwrap();
    }
    refused(ahn_dir.path(), &["memory tensors only", "--memory-adapter"]);

    let mut options = ConvertOptions::new(ahn_dir.path(), ahn_dir.path().join("a.gguf"));
    options.adapter = true;
    run(&options).unwrap();
    let adapter = Gguf::open(&options.output.path).unwrap();

    let mut options = ConvertOptions::new(base_dir.path(), base_dir.path().join("m.gguf"));
    options.memory = Some(ahn_dir.path().into());
    run(&options).unwrap();
    let merged = Gguf::open(&options.output.path).unwrap();

    let direct = ahn_dir.path().join("d.gguf");
    run(&ConvertOptions::new(&source, &direct)).unwrap();
    let direct = Gguf::open(&direct).unwrap();
    assert_eq!(direct.tensors().len(), merged.tensors().len());
    for info in direct.tensors() {
        let data = direct.data(info);
        let other = merged.tensor(&info.name).unwrap();
        assert_eq!(data, merged.data(other), "{}", info.name);
        if info.name.contains(".ahn_") {
            let other = adapter.tensor(&info.name).unwrap();
            assert_eq!(data, adapter.data(other), "{}", info.name);
        }
    }
    edit(&ahn_dir.path().join("config.json"), |c| {
        c["num_hidden_layers"] = 3.into()
    });
    options.output.overwrite = true;
    refused_with(&options, &["num_hidden_layers", "base model"]);
}

#[test]
fn quantizing_twice_or_in_place_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    run(&ConvertOptions::new(fixture("qwen2-k256"), path("input"))).unwrap();
    let options = |input: &str, output: &str, file_type| QuantizeOptions {
        input: path(input),
        output: ConvertOptions::new("", path(output)).output,
        file_type,
        mix: MixOptions::default(),
        imatrix: None,
        allow_requantize: false,
    };
    let go = |options: &QuantizeOptions| quantize(options, &mut |_| ControlFlow::Continue(()));
    let refused = |options: &QuantizeOptions, word: &str| {
        let error = go(options).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    go(&options("input", "once", FileType::Q8_0)).unwrap();
    let mut again = options("once", "twice", FileType::Q4_K_M);
    refused(&again, "--allow-requantize");
    assert!(!path("twice").exists());
    again.allow_requantize = true;
    go(&again).unwrap();
    let mut in_place = options("input", "input", FileType::Q8_0);
    in_place.output.overwrite = true;
    refused(&in_place, "same file");
    refused(
        &options("input", "third", FileType::IQ2_XS),
        "importance matrix",
    );
    refused(&options("nothing", "third", FileType::Q8_0), "nothing");
}
