//! A memory adapter laid over a base file is the merged file, and over another base it is refused.

mod checkpoint;

use checkpoint::dir;
use mneme_convert::ConvertOptions;
use mneme_engine::gguf::{Gguf, GgufWriter, Value};
use mneme_engine::ops::Cpu;
use mneme_engine::{Engine, Feed, LoadOptions, Model, SequenceOptions, Want};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

fn convert(fixture: &str, to: &Path, adapter: bool) -> PathBuf {
    let mut options = ConvertOptions::new(dir().join(fixture), to);
    options.adapter = adapter;
    mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect(fixture);
    to.to_owned()
}

/// The file without its memory: what a user of the base model already has.
fn base_of(merged: &Path, to: &Path) {
    let merged = Gguf::open(merged).expect("just written");
    let mut writer = GgufWriter::new();
    for (key, value) in merged
        .keys()
        .iter()
        .filter(|(k, _)| !k.contains(".memory."))
    {
        writer.set(key, value.clone());
    }
    let is_memory = |name: &str| name.contains(".ahn_") || name.starts_with("mem.");
    let tensors: Vec<_> = merged
        .tensors()
        .iter()
        .filter(|t| !is_memory(&t.name))
        .collect();
    assert!(tensors.len() < merged.tensors().len());
    for tensor in &tensors {
        writer
            .tensor(&tensor.name, &tensor.dims, tensor.ty)
            .expect("a valid tensor");
    }
    let mut sink = writer.create(to, false).expect("a new file");
    for tensor in tensors {
        sink.tensor(&tensor.name, merged.data(tensor))
            .expect("written");
    }
    sink.finish().expect("written");
}

fn logits(path: &Path, adapter: Option<&Path>, ids: &[u32], want: Want) -> Vec<f32> {
    let ops = Cpu::new(1);
    let options = LoadOptions {
        memory_adapter: adapter.map(Path::to_owned),
    };
    let model = Model::load(path, &options, &ops, |_, _| {}).expect("loads");
    let memory = model.default_memory();
    assert_ne!(memory.name, "full", "the file's own memory is the default");
    let mut engine = Engine::new(model, ops, 64);
    let options = SequenceOptions::default();
    let mut seq = engine.sequence(&memory, options).expect("a sequence");
    let mut logits = engine
        .step(&mut [Feed {
            seq: &mut seq,
            tokens: ids,
            want,
        }])
        .expect("fits");
    logits.remove(0)
}

#[test]
fn base_and_adapter_are_the_merged_file() {
    for fixture in [
        "ahn-gdn-tiny",
        "ahn-mamba2-tiny",
        "nodes-linear",
        "concepts-llama",
    ] {
        let tmp = tempfile::tempdir().expect("a folder");
        let merged = convert(fixture, &tmp.path().join("merged.gguf"), false);
        let adapter = convert(fixture, &tmp.path().join("adapter.gguf"), true);
        let base = tmp.path().join("base.gguf");
        base_of(&merged, &base);
        let mut ids: Vec<u32> = (0..90).map(|i| (i * 37) % 500).collect();
        let mut want = Want::All;
        if fixture.starts_with("concepts") {
            // Most of it a context, of which there are no logits.
            (ids[3], ids[80]) = (512, 513);
            want = Want::Last;
        }
        let expected = logits(&merged, None, &ids, want);
        let got = logits(&base, Some(&adapter), &ids, want);
        assert_eq!(got, expected, "{fixture}");
    }
}

#[test]
fn an_adapter_for_another_base_is_refused() {
    let tmp = tempfile::tempdir().expect("a folder");
    let adapter = convert("ahn-gdn-tiny", &tmp.path().join("adapter.gguf"), true);
    let load = |base: &Path, adapter: &Path| {
        let options = LoadOptions {
            memory_adapter: Some(adapter.to_owned()),
        };
        match Model::load(base, &options, &Cpu::new(1), |_, _| {}) {
            Ok(_) => panic!("{} went through", base.display()),
            Err(error) => error.to_string(),
        }
    };
    let other = convert("qwen3-tiny", &tmp.path().join("qwen3.gguf"), false);
    assert!(load(&other, &adapter).contains("architecture"));
    let other = convert("qwen2-k256", &tmp.path().join("k256.gguf"), false);
    assert!(load(&other, &adapter).contains("embedding_length"));
    // A whole model is no adapter.
    assert!(load(&other, &other).contains("general.type"));
}

/// An adapter with another memory than the base has: both can be chosen, each with its own keys.
#[test]
fn an_adapter_over_a_base_with_a_memory_of_its_own() {
    let tmp = tempfile::tempdir().expect("a folder");
    let base = convert("nodes-compact", &tmp.path().join("base.gguf"), false);
    let adapter = tmp.path().join("adapter.gguf");
    let mut options = ConvertOptions::new(dir().join("concepts-qwen2"), &adapter);
    options.adapter = true;
    mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect("converted");
    // The fixture's context tokens are beyond this base's vocabulary: two that it has.
    let whole = Gguf::open(&adapter).expect("just written");
    let fitting = tmp.path().join("fitting.gguf");
    let mut writer = GgufWriter::new();
    for (key, value) in whole.keys() {
        writer.set(key, value.clone());
    }
    writer.set(
        "tokenizer.ggml.context_token_ids",
        Value::from(vec![500i32, 501]),
    );
    for t in whole.tensors() {
        writer.tensor(&t.name, &t.dims, t.ty).expect("a tensor");
    }
    let mut sink = writer.create(&fitting, false).expect("a new file");
    for t in whole.tensors() {
        sink.tensor(&t.name, whole.data(t)).expect("written");
    }
    sink.finish().expect("written");

    let ids: Vec<u32> = (0..90).map(|i| (i * 37) % 500).collect();
    let run = |adapter: Option<&Path>, memory: &str| {
        let ops = Cpu::new(1);
        let options = LoadOptions {
            memory_adapter: adapter.map(Path::to_owned),
        };
        let model = Model::load(&base, &options, &ops, |_, _| {}).expect("loads");
        let own = model.default_memory().name;
        let mut engine = Engine::new(model, ops, 64);
        let spec = memory.parse().expect(memory);
        let mut seq = (engine.sequence(&spec, SequenceOptions::default())).expect(memory);
        let feed = Feed {
            seq: &mut seq,
            tokens: &ids,
            want: Want::All,
        };
        let logits = engine.step(&mut [feed]).expect("fits").remove(0);
        (own, logits, seq.stats())
    };
    let (own, expected, stats) = run(None, "nodes");
    let (other, got, beside) = run(Some(&fitting), "nodes");
    assert_eq!((own.as_str(), other.as_str()), ("nodes", "concepts"));
    assert_eq!(got, expected);
    assert_eq!(beside, stats);
    let (_, full, _) = run(None, "full");
    assert_eq!(run(Some(&fitting), "concepts").1, full, "no contexts");
}
