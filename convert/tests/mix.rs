//! The types of tensors against those that llama.cpp's quantizer chooses, for every file type, with and
//! without an importance matrix, on three shapes: rows of 256 with two heads per k/v head, rows of 224
//! with seven, and 80 layers. `mix_types.txt` was written by `tools/check_llama.py types` from dry runs
//! of llama.cpp's own code (llama-cpp-python 0.3.36).

use ggml_sys::Type;
use mneme_convert::{
    FileType, MixOptions, MixTensor, ModelShape, Regex, fit_rows, sort_key, tensor_types,
};

/// One model of the table: its shape, and row lengths by kind of tensor (`attn_q.weight`).
struct Model {
    shape: ModelShape,
    cols: Vec<(String, u64)>,
}

impl Model {
    /// `model ARCH N_LAYER N_HEAD N_HEAD_KV KIND=COLS...`
    fn parse(line: &str) -> Model {
        let mut words = line.split(' ').skip(1);
        let arch = words.next().unwrap().to_string();
        let mut number = || words.next().unwrap().parse().unwrap();
        let shape = ModelShape {
            arch,
            n_layer: number(),
            n_head: number(),
            n_head_kv: number(),
        };
        let cols = words.map(|word| word.split_once('=').unwrap());
        let cols = cols.map(|(kind, n)| (kind.to_string(), n.parse().unwrap()));
        Model {
            shape,
            cols: cols.collect(),
        }
    }

    /// Names and dims of all matrices, in llama.cpp's order.
    fn tensors(&self) -> Vec<(String, [u64; 2])> {
        let mut out = Vec::new();
        for (kind, n_cols) in &self.cols {
            if matches!(kind.as_str(), "token_embd.weight" | "output.weight") {
                out.push((kind.clone(), [*n_cols, 1024]));
                continue;
            }
            for il in 0..self.shape.n_layer {
                out.push((format!("blk.{il}.{kind}"), [*n_cols, 64]));
            }
        }
        out.sort_by(|a, b| sort_key(&a.0).cmp(&sort_key(&b.0)));
        out
    }

    fn types(&self, file_type: FileType, options: &MixOptions) -> Vec<(String, Type)> {
        let named = self.tensors();
        let seen: Vec<MixTensor<'_>> = named
            .iter()
            .map(|(name, dims)| MixTensor {
                name,
                dims,
                ty: Type::F16,
            })
            .collect();
        let types = tensor_types(&self.shape, &seen, file_type, options).unwrap();
        named.into_iter().map(|(name, _)| name).zip(types).collect()
    }
}

/// `q6_K*3 q4_K` for a run of types.
fn run_lengths(types: &[Type]) -> String {
    let runs = types.chunk_by(|a, b| a == b);
    let shown = runs.map(|run| match run.len() {
        1 => run[0].name().to_string(),
        n => format!("{}*{n}", run[0].name()),
    });
    shown.collect::<Vec<_>>().join(" ")
}

fn models() -> Vec<Model> {
    let lines = include_str!("mix_types.txt").lines();
    lines
        .filter(|line| line.starts_with("model "))
        .map(Model::parse)
        .collect()
}

#[test]
fn every_choice_is_llama_cpps() {
    let (mut model, mut case, mut n_checked) = (None, None, 0);
    for line in include_str!("mix_types.txt").lines() {
        if line.starts_with("model ") {
            model = Some(Model::parse(line));
        } else if let Some(row) = line.strip_prefix("  ") {
            let (kind, expected) = row.split_once(' ').unwrap();
            let types: &Vec<(String, Type)> = case.as_ref().unwrap();
            let of_kind: Vec<Type> = types
                .iter()
                .filter(|(name, _)| name == kind || name.ends_with(&format!(".{kind}")))
                .map(|(_, ty)| *ty)
                .collect();
            let shape = &model.as_ref().unwrap().shape;
            assert_eq!(
                run_lengths(&of_kind),
                expected,
                "{shape:?} {kind}: {:?}",
                line
            );
            n_checked += of_kind.len();
        } else {
            let (name, imatrix) = line.split_once(' ').unwrap();
            let options = MixOptions {
                has_imatrix: imatrix == "imatrix",
                ..MixOptions::default()
            };
            let file_type = FileType::from_name(name).unwrap();
            case = Some(model.as_ref().unwrap().types(file_type, &options));
        }
    }
    assert!(n_checked > 30_000, "only {n_checked} choices in the table");
}

#[test]
fn departures_from_the_mixture() {
    let model = &models()[0];
    let of = |options: &MixOptions, name: &str| {
        let types = model.types(FileType::Q4_K_M, options);
        types.into_iter().find(|row| row.0 == name).unwrap().1
    };
    let plain = MixOptions::default();
    assert_eq!(of(&plain, "blk.0.ffn_down.weight"), Type::Q6_K);
    assert_eq!(of(&plain, "output.weight"), Type::Q6_K);
    let pure = MixOptions {
        pure: true,
        ..plain.clone()
    };
    assert_eq!(of(&pure, "blk.0.ffn_down.weight"), Type::Q4_K);
    assert_eq!(of(&pure, "output.weight"), Type::Q4_K);
    let kept = MixOptions {
        keep_output: true,
        ..plain.clone()
    };
    assert_eq!(of(&kept, "output.weight"), Type::F16);
    let asked = MixOptions {
        output_type: Some(Type::Q8_0),
        embedding_type: Some(Type::F16),
        patterns: vec![
            (Regex::new("blk.1.ffn").unwrap(), Type::Q8_0),
            (Regex::new("ffn_down").unwrap(), Type::Q5_K),
        ],
        ..plain
    };
    assert_eq!(of(&asked, "output.weight"), Type::Q8_0);
    assert_eq!(of(&asked, "token_embd.weight"), Type::F16);
    assert_eq!(
        of(&asked, "blk.1.ffn_down.weight"),
        Type::Q8_0,
        "the first pattern counts"
    );
    assert_eq!(of(&asked, "blk.0.ffn_down.weight"), Type::Q5_K);
    assert_eq!(of(&asked, "blk.5.ffn_up.weight"), Type::Q4_K);
}

#[test]
fn rows_that_do_not_fit() {
    assert_eq!(fit_rows(Type::Q4_K, 512).unwrap(), Type::Q4_K);
    assert_eq!(fit_rows(Type::Q4_K, 896).unwrap(), Type::Q5_0);
    assert_eq!(fit_rows(Type::Q6_K, 896).unwrap(), Type::Q8_0);
    assert_eq!(fit_rows(Type::IQ4_XS, 96).unwrap(), Type::IQ4_NL);
    assert_eq!(fit_rows(Type::Q3_K, 100).unwrap(), Type::F16);
    assert_eq!(fit_rows(Type::Q8_0, 33).unwrap(), Type::F16);
    assert!(fit_rows(Type::Q1_0, 96).is_err());
}

#[test]
fn names_and_ids_of_file_types() {
    for ty in FileType::ALL {
        assert_eq!(FileType::from_name(&ty.name().to_lowercase()), Some(*ty));
        assert_eq!(
            FileType::ALL
                .iter()
                .filter(|other| other.id() == ty.id())
                .count(),
            1
        );
    }
    assert_eq!(FileType::from_name("q4_k"), Some(FileType::Q4_K_M));
    assert_eq!(FileType::from_name("q9"), None);
}
