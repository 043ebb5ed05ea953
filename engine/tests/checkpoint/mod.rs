//! Tiny checkpoints with expected values from PyTorch, see fixtures/README.md.

#![allow(dead_code)] // each test file uses its part

use mneme_convert::ConvertOptions;
use mneme_engine::ops::Ops;
use mneme_engine::{LoadOptions, Model};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One folder of fixtures/.
pub struct Fixture {
    pub name: String,
    pub model: Arc<Model>,
    pub expected: HashMap<String, Tensor>,
    pub meta: serde_json::Value,
}

/// A tensor of expected.safetensors.
pub struct Tensor {
    pub f32: Vec<f32>,
    pub i64: Vec<i64>,
}

pub fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures")
}

/// Names of the fixtures that begin with one of `prefixes`.
pub fn names(prefixes: &[&str]) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir())
        .expect("fixtures/ is part of the repository")
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| prefixes.iter().any(|p| n.starts_with(p)))
        .collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

impl Fixture {
    pub fn open(name: &str, ops: &dyn Ops) -> Fixture {
        let gguf = tempfile::tempdir().expect("a folder");
        let path = gguf.path().join("model.gguf");
        let options = ConvertOptions::new(dir().join(name), &path);
        mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect(name);
        let model = Model::load(&path, &LoadOptions::default(), ops, |_, _| {}).expect(name);
        let folder = dir().join(name);
        let bytes = std::fs::read(folder.join("expected.safetensors")).expect(name);
        let parsed = safetensors::SafeTensors::deserialize(&bytes).expect(name);
        let expected = parsed
            .tensors()
            .into_iter()
            .map(|(key, view)| {
                let mut tensor = Tensor {
                    f32: Vec::new(),
                    i64: Vec::new(),
                };
                let data = view.data();
                match view.dtype() {
                    safetensors::Dtype::F32 => {
                        let (words, _) = data.as_chunks::<4>();
                        tensor.f32 = words.iter().map(|w| f32::from_le_bytes(*w)).collect();
                    }
                    safetensors::Dtype::F64 => {
                        let (words, _) = data.as_chunks::<8>();
                        tensor.f32 = words
                            .iter()
                            .map(|w| f64::from_le_bytes(*w) as f32)
                            .collect();
                    }
                    safetensors::Dtype::I64 => {
                        let (words, _) = data.as_chunks::<8>();
                        tensor.i64 = words.iter().map(|w| i64::from_le_bytes(*w)).collect();
                    }
                    other => panic!("{name}: {key}: dtype {other:?}"),
                }
                (key, tensor)
            })
            .collect();
        let meta = std::fs::read(folder.join("meta.json")).expect(name);
        Fixture {
            name: name.to_owned(),
            model,
            expected,
            meta: serde_json::from_slice(&meta).expect(name),
        }
    }

    pub fn ids(&self, key: &str) -> Vec<u32> {
        self.expected[key].i64.iter().map(|&i| i as u32).collect()
    }

    pub fn logits(&self, key: &str) -> &[f32] {
        &self.expected[key].f32
    }
}

/// Largest absolute difference; both must be finite and equally long.
pub fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter().zip(expected).fold(0.0, |worst, (g, e)| {
        assert!(g.is_finite(), "a logit is {g}");
        (g - e).abs().max(worst)
    })
}
