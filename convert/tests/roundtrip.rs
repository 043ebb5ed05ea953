//! Fixtures to GGUF and back: every tensor equals the checkpoint bit for bit, every key is what the
//! config says, memories included.

mod checkpoint;

use std::ops::ControlFlow;

use checkpoint::{base_name, bits, checkpoint, fixture, fixtures, halves, json, run, values};
use ggml_sys::Type;
use mneme_convert::{ConvertOptions, FileType, MixOptions, QuantizeOptions, quantize};
use mneme_engine::gguf::{GgmlType, Gguf};
use serde_json::Value as Json;

#[test]
fn base_tensors_and_keys_survive() {
    for name in fixtures(&["qwen2", "qwen3", "llama", "ahn", "nodes", "gist"]) {
        let folder = fixture(&name);
        let config = json(&folder.join("config.json"));
        let size = |key: &str| config[key].as_u64().unwrap() as usize;
        let n_head = size("num_attention_heads");
        let stated = config["head_dim"].as_u64();
        let head_dim = stated.map_or(size("hidden_size") / n_head, |d| d as usize);
        let is_llama = config["model_type"] == "llama";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let converted = run(&ConvertOptions::new(&folder, &path)).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(converted.written.n_tensors, gguf.tensors().len());

        let mut n_base = 0;
        for (from, (shape, expected)) in checkpoint(&folder) {
            let Some(to) = base_name(&from) else { continue };
            n_base += 1;
            let info = gguf.require_tensor(&to).unwrap();
            let dims: Vec<usize> = info.dims.iter().rev().map(|&n| n as usize).collect();
            assert_eq!(dims, shape, "{name} {to}");
            let mut got = values(&gguf, &to);
            if is_llama && (to.contains("attn_q.") || to.contains("attn_k.")) {
                got = halves(&got, shape[0], head_dim);
            }
            assert_eq!(bits(&got), bits(&expected), "{name} {to}");
            if shape.len() == 1 {
                assert_eq!(info.ty, GgmlType::F32, "{name} {to}");
            }
        }
        let tied = config["tie_word_embeddings"].as_bool().unwrap();
        assert_eq!(gguf.tensor("output.weight").is_none(), tied, "{name}");
        let of_memory = |name: &str| name.contains("ahn_") || name.starts_with("mem.");
        let n_memory = gguf.tensors().iter().filter(|t| of_memory(&t.name)).count();
        let n_freqs = usize::from(is_llama);
        assert_eq!(gguf.tensors().len(), n_base + n_memory + n_freqs, "{name}");

        let arch = gguf.str("general.architecture").unwrap();
        assert_eq!(arch, config["model_type"].as_str().unwrap());
        for (key, expected) in [
            ("block_count", size("num_hidden_layers")),
            ("context_length", size("max_position_embeddings")),
            ("embedding_length", size("hidden_size")),
            ("feed_forward_length", size("intermediate_size")),
            ("attention.head_count", n_head),
            ("attention.head_count_kv", size("num_key_value_heads")),
            ("vocab_size", size("vocab_size")),
            ("rope.dimension_count", head_dim),
        ] {
            let got = gguf.u32(&format!("{arch}.{key}")).unwrap();
            assert_eq!(got as usize, expected, "{name} {key}");
        }
        if stated.is_some() {
            let got = gguf.u32(&format!("{arch}.attention.key_length")).unwrap();
            assert_eq!(got as usize, head_dim);
        }
        for (key, from) in [
            ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
            ("rope.freq_base", "rope_theta"),
        ] {
            let expected = config[from].as_f64().unwrap() as f32;
            assert_eq!(gguf.f32(&format!("{arch}.{key}")).unwrap(), expected);
        }
        assert_tokenizer(&name, &gguf, is_llama);
    }
}

fn assert_tokenizer(name: &str, gguf: &Gguf, is_llama: bool) {
    let folder = fixture(name);
    let config = json(&folder.join("config.json"));
    let tokenizer = json(&folder.join("tokenizer.json"));
    let tokenizer_config = json(&folder.join("tokenizer_config.json"));
    let tokens = gguf.arr_str("tokenizer.ggml.tokens").unwrap();
    assert_eq!(
        Some(tokens.len() as u64),
        config["vocab_size"].as_u64(),
        "{name}"
    );
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        assert_eq!(&tokens[id.as_u64().unwrap() as usize], token, "{name}");
    }
    let types = gguf
        .opt_arr_i64("tokenizer.ggml.token_type")
        .unwrap()
        .unwrap();
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        assert_eq!(&tokens[id], added["content"].as_str().unwrap());
        assert_eq!(types[id], 3, "{name} {}", tokens[id]);
    }
    let merges = gguf.arr_str("tokenizer.ggml.merges").unwrap();
    let expected = tokenizer["model"]["merges"].as_array().unwrap();
    assert_eq!(merges.len(), expected.len());
    for (got, expected) in merges.iter().zip(expected) {
        let pair = [expected[0].as_str().unwrap(), expected[1].as_str().unwrap()];
        assert_eq!(*got, pair.join(" "));
    }
    let template = tokenizer_config["chat_template"].as_str().unwrap();
    assert_eq!(gguf.str("tokenizer.chat_template").unwrap(), template);
    let eos = gguf.u32("tokenizer.ggml.eos_token_id").unwrap() as usize;
    assert_eq!(
        &tokens[eos],
        tokenizer_config["eos_token"].as_str().unwrap(),
        "{name}"
    );
    let pre = gguf.str("tokenizer.ggml.pre").unwrap();
    assert_eq!(pre, if is_llama { "llama-bpe" } else { "qwen2" });
    assert_eq!(
        gguf.bool("tokenizer.ggml.add_bos_token").unwrap(),
        is_llama,
        "{name}"
    );
}

#[test]
fn llama3_frequencies_are_kept_blended_and_divided() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    run(&ConvertOptions::new(fixture("llama-tiny"), &path)).unwrap();
    let freqs = values(&Gguf::open(&path).unwrap(), "rope_freqs.weight");
    // theta 10000, d 16, factor 8, low 1, high 4, original 256, worked out by hand. Wavelengths are
    // 2 pi 10^(i/2): below 64 kept (i <= 2: 62.8), above 256 divided (i >= 4: 628), blended at i = 3 (198.7).
    assert_eq!(freqs[..3], [1.0; 3]);
    assert_eq!(freqs[4..], [8.0; 4]);
    let smooth = (256.0 / 198.69177 - 1.0) / 3.0f64;
    let expected = 1.0 / ((1.0 - smooth) / 8.0 + smooth);
    let got = f64::from(freqs[3]);
    assert!((got - expected).abs() < 1e-4, "{got} against {expected}");
}

#[test]
fn ahn_tensors_and_keys() {
    for name in fixtures(&["ahn"]) {
        let folder = fixture(&name);
        let config = json(&folder.join("config.json"));
        let dir = tempfile::tempdir().unwrap();
        let (merged, adapter) = (dir.path().join("m.gguf"), dir.path().join("a.gguf"));
        let converted = run(&ConvertOptions::new(&folder, &merged)).unwrap();
        assert_eq!(converted.memory.as_deref(), Some("ahn"));
        assert_eq!(converted.notes.len(), 1, "the stale window must be told");
        let mut options = ConvertOptions::new(&folder, &adapter);
        (options.adapter, options.window, options.sinks) = (true, Some(16), Some(4));
        run(&options).unwrap();
        let (merged, adapter) = (Gguf::open(&merged).unwrap(), Gguf::open(&adapter).unwrap());

        let arch = config["model_type"].as_str().unwrap();
        let key = |suffix: &str| format!("{arch}.memory.{suffix}");
        let cells = |gguf: &Gguf| {
            (
                gguf.u32(&key("window")).unwrap(),
                gguf.u32(&key("sinks")).unwrap(),
            )
        };
        assert_eq!(cells(&merged), (32640, 128), "never silently the config's");
        assert_eq!(cells(&adapter), (16, 4));
        assert_eq!(adapter.str("general.type").unwrap(), "adapter");
        assert_eq!(adapter.str("adapter.type").unwrap(), "memory");
        assert_eq!(merged.str("general.type").unwrap(), "model");
        let kind = match config["_ahn_implementation"].as_str().unwrap() {
            "GatedDeltaNet" => "gated_delta_net",
            "DeltaNet" => "delta_net",
            _ => "mamba2",
        };
        let is_ahn = |name: &str| name.contains(".ahn_");
        assert!(adapter.tensors().iter().all(|t| is_ahn(&t.name)), "{name}");
        let n_merged = merged.tensors().iter().filter(|t| is_ahn(&t.name)).count();
        assert_eq!(n_merged, adapter.tensors().len());
        for gguf in [&merged, &adapter] {
            assert_eq!(gguf.str(&key("kind")).unwrap(), "ahn");
            assert_eq!(gguf.str(&key("ahn.kind")).unwrap(), kind);
            let full = gguf.opt_arr_i64(&key("ahn.full_layers")).unwrap().unwrap();
            assert!(full.is_empty());
            assert_ahn_layers(&name, gguf, &config, kind);
        }
    }
}

fn assert_ahn_layers(name: &str, gguf: &Gguf, config: &Json, kind: &str) {
    let source = checkpoint(&fixture(name));
    let n_head = config["num_attention_heads"].as_u64().unwrap() as usize;
    let is_f32 = config["torch_dtype"] == "float32";
    for il in 0..config["num_hidden_layers"].as_u64().unwrap() {
        let from = |suffix: &str| &source[&format!("model.layers.{il}.ahn.fn.{suffix}")].1;
        let to = |suffix: &str| values(gguf, &format!("blk.{il}.{suffix}"));
        let mut same = vec![("g_proj.weight", "ahn_g.weight")];
        match kind {
            "mamba2" => {
                same.push(("dt_proj.weight", "ahn_dt.weight"));
                same.push(("g_proj.bias", "ahn_g.bias"));
                same.push(("norm.weight", "ahn_norm.weight"));
                let pairs = from("dt_proj.bias").iter().zip(from("dt_bias"));
                let sum: Vec<f32> = pairs.map(|(a, b)| a + b).collect();
                assert_eq!(bits(&to("ahn_dt.bias")), bits(&sum), "{name}");
            }
            _ => {
                same.push(("b_proj.weight", "ahn_b.weight"));
                same.push(("o_norm.weight", "ahn_norm.weight"));
            }
        }
        if kind == "gated_delta_net" {
            same.push(("a_proj.weight", "ahn_a.weight"));
            same.push(("dt_bias", "ahn_dt.bias"));
        }
        let n_decay = usize::from(kind != "delta_net");
        let n_sum = usize::from(kind == "mamba2");
        let of_layer = format!("blk.{il}.ahn_");
        let n = gguf
            .tensors()
            .iter()
            .filter(|t| t.name.starts_with(&of_layer))
            .count();
        assert_eq!(
            n,
            same.len() + 1 + n_decay + n_sum,
            "{name}: D is dropped, all else is there"
        );
        for (old, new) in same {
            assert_eq!(bits(&to(new)), bits(from(old)), "{name} {new}");
        }
        if kind != "delta_net" {
            for (decay, log) in to("ahn_decay").iter().zip(from("A_log")) {
                assert!((decay + log.exp()).abs() <= 1e-6 * decay.abs());
            }
        }
        // [head, in, out] to [head, out, in].
        let (got, old) = (to("ahn_out.weight"), from("o_proj.weight"));
        let d = config["head_dim"].as_u64().map_or_else(
            || config["hidden_size"].as_u64().unwrap() as usize / n_head,
            |d| d as usize,
        );
        let info = gguf.tensor(&format!("blk.{il}.ahn_out.weight")).unwrap();
        assert_eq!(info.dims, [d as u64, d as u64, n_head as u64]);
        for (i, value) in got.iter().enumerate() {
            let (h, o, c) = (i / (d * d), i / d % d, i % d);
            assert_eq!(
                value.to_bits(),
                old[(h * d + c) * d + o].to_bits(),
                "{name}"
            );
        }
        assert_eq!(
            info.ty,
            if is_f32 {
                GgmlType::F32
            } else {
                GgmlType::BF16
            }
        );
    }
}

#[test]
fn exported_memories_are_written_through() {
    for name in fixtures(&["nodes", "gist"]) {
        let folder = fixture(&name);
        let config = json(&folder.join("config.json"));
        let arch = config["model_type"].as_str().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        run(&ConvertOptions::new(&folder, &path)).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        for (key, value) in config["memory"].as_object().unwrap() {
            let to = match key.as_str() {
                "gist_token_ids" => "tokenizer.ggml.gist_token_ids".to_string(),
                _ => format!("{arch}.memory.{key}"),
            };
            let got = gguf
                .get(&to)
                .unwrap_or_else(|| panic!("{name}: {to} is missing"));
            match value {
                Json::String(s) => assert_eq!(got.as_str(), Some(s.as_str()), "{name} {to}"),
                Json::Bool(b) => assert_eq!(got.as_bool(), Some(*b), "{name} {to}"),
                Json::Number(n) if n.is_f64() || key == "decider.threshold" => {
                    let got = got.as_f64().map(|v| v as f32);
                    assert_eq!(got, n.as_f64().map(|v| v as f32), "{name} {to}");
                }
                Json::Number(n) => {
                    assert_eq!(got.as_i128(), n.as_i64().map(i128::from), "{name} {to}")
                }
                Json::Array(list) => {
                    let got = gguf.opt_arr_i64(&to).unwrap().unwrap();
                    let list: Vec<i64> = list.iter().map(|v| v.as_i64().unwrap()).collect();
                    assert_eq!(got, list, "{name} {to}");
                }
                other => panic!("{name} {to}: {other}"),
            }
        }
        for (tensor, (shape, expected)) in checkpoint(&folder) {
            if tensor.starts_with("mem.") {
                let info = gguf.require_tensor(&tensor).unwrap();
                let dims: Vec<usize> = info.dims.iter().rev().map(|&n| n as usize).collect();
                assert_eq!(dims, shape, "{name} {tensor}");
                assert_eq!(
                    bits(&values(&gguf, &tensor)),
                    bits(&expected),
                    "{name} {tensor}"
                );
            }
        }
    }
}

#[test]
fn a_split_model_equals_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, split) = (dir.path().join("w.gguf"), dir.path().join("s.gguf"));
    run(&ConvertOptions::new(fixture("qwen2-k256"), &whole)).unwrap();
    let mut options = ConvertOptions::new(fixture("qwen2-k256"), &split);
    options.output.split_max_bytes = Some(1 << 20);
    let files = run(&options).unwrap().written.files;
    assert!(files.len() > 2, "{files:?}");
    assert!(!split.exists());
    let (whole, split) = (Gguf::open(&whole).unwrap(), Gguf::open(&files[0]).unwrap());
    assert_eq!(split.n_parts(), files.len());
    for info in whole.tensors() {
        let other = split.require_tensor(&info.name).unwrap();
        assert_eq!(whole.data(info), split.data(other), "{}", info.name);
    }
}

#[test]
fn types_of_the_output() {
    let dir = tempfile::tempdir().unwrap();
    for (ty, matrix, file_type) in [
        (Type::F32, GgmlType::F32, 0),
        (Type::F16, GgmlType::F16, 1),
        (Type::BF16, GgmlType::BF16, 32),
        (Type::Q8_0, GgmlType::Q8_0, 7),
        (Type::Q4_K, GgmlType::Q4_K, 14),
    ] {
        let path = dir.path().join(format!("{ty}.gguf"));
        let mut options = ConvertOptions::new(fixture("qwen2-k256"), &path);
        options.outtype = Some(ty);
        run(&options).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.u32("general.file_type").unwrap(), file_type);
        for info in gguf.tensors() {
            let expected = if info.dims.len() == 1 {
                GgmlType::F32
            } else {
                matrix
            };
            assert_eq!(info.ty, expected, "{ty} {}", info.name);
        }
    }
    // Rows of 64 and 160 do not fit blocks of 256.
    let path = dir.path().join("narrow.gguf");
    let mut options = ConvertOptions::new(fixture("qwen2-tiny"), &path);
    options.outtype = Some(Type::Q6_K);
    run(&options).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let narrow = gguf.tensor("blk.0.ffn_down.weight").unwrap();
    assert_eq!(narrow.ty, GgmlType::Q8_0);
}

#[test]
fn quantize_keeps_memories_and_metadata() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["ahn-mamba2-tiny", "nodes-linear"] {
        let input = dir.path().join(format!("{name}.gguf"));
        let output = dir.path().join(format!("{name}-q.gguf"));
        run(&ConvertOptions::new(fixture(name), &input)).unwrap();
        let options = QuantizeOptions {
            input: input.clone(),
            output: ConvertOptions::new("", &output).output,
            file_type: FileType::Q4_0,
            mix: MixOptions::default(),
            imatrix: None,
            allow_requantize: false,
        };
        quantize(&options, &mut |_| ControlFlow::Continue(())).unwrap();
        let (before, after) = (Gguf::open(&input).unwrap(), Gguf::open(&output).unwrap());
        for (key, value) in before.keys() {
            if key != "general.file_type" {
                assert_eq!(after.get(key), Some(value), "{key}");
            }
        }
        assert_eq!(after.u32("general.file_type").unwrap(), 2);
        let matrix = after.tensor("blk.0.attn_q.weight").unwrap();
        assert_eq!(matrix.ty, GgmlType::Q4_0);
        assert_eq!(before.tensors().len(), after.tensors().len());
        let mut n_large = 0;
        for info in before.tensors() {
            let quantized = after.tensor(&info.name).unwrap();
            assert_eq!(quantized.dims, info.dims);
            let parts = [
                ".qkv.",
                ".gate.",
                ".out.",
                ".ffn_gate.",
                ".ffn_up.",
                ".ffn_down.",
                "mem.in.",
                ".map.",
            ];
            if info.name.starts_with("mem.") && parts.iter().any(|part| info.name.contains(part)) {
                assert_eq!(quantized.ty, GgmlType::Q8_0, "{}", info.name);
                n_large += 1;
            } else if info.name.contains("ahn_") || info.name.starts_with("mem.") {
                assert_eq!(quantized.ty, info.ty, "{}", info.name);
                assert_eq!(after.data(quantized), before.data(info), "{}", info.name);
            }
        }
        assert_eq!(n_large > 0, name == "nodes-linear");
    }
}
