//! File types, and which type each tensor gets in one: the mixtures of llama.cpp, so that a file
//! quantized here holds the same types, and then the same bytes, as one quantized there.
//!
//! The rules are those of `llama_model_quantize` at ggml 0.26 for dense models of the architectures
//! that mneme runs. They are history more than theory (each line is some experiment's result), so they
//! are written as a table of exceptions per tensor category rather than explained.

use ggml_sys::Type;
use regex::Regex;

use crate::Error;

/// One row per file type: name, id in `general.file_type`, type of a matrix without a rule, remark.
macro_rules! file_types {
    ($($variant:ident, $name:literal, $id:literal, $base:ident, $about:literal;)*) => {
        /// A file type: one type for all matrices, or a mixture around one.
        #[allow(missing_docs, non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum FileType { $($variant),* }

        impl FileType {
            /// All of them, roughly by size.
            pub const ALL: &[FileType] = &[$(FileType::$variant),*];

            /// Name, as in llama.cpp's tools.
            pub fn name(self) -> &'static str {
                match self { $(FileType::$variant => $name),* }
            }

            /// `general.file_type`.
            pub fn id(self) -> u32 {
                match self { $(FileType::$variant => $id),* }
            }

            /// The type of a matrix that no rule names.
            pub fn base_type(self) -> Type {
                match self { $(FileType::$variant => Type::$base),* }
            }

            /// A few words for a list.
            pub fn about(self) -> &'static str {
                match self { $(FileType::$variant => $about),* }
            }
        }
    };
}

file_types! {
    IQ1_S, "IQ1_S", 24, IQ1_S, "1.6 bits, needs an importance matrix";
    IQ1_M, "IQ1_M", 31, IQ1_M, "1.8 bits, needs an importance matrix";
    Q1_0, "Q1_0", 40, Q1_0, "1.1 bits, for models trained for it";
    TQ1_0, "TQ1_0", 36, TQ1_0, "1.7 bits, for ternary models";
    IQ2_XXS, "IQ2_XXS", 19, IQ2_XXS, "2.1 bits, needs an importance matrix";
    TQ2_0, "TQ2_0", 37, TQ2_0, "2.1 bits, for ternary models";
    Q2_0, "Q2_0", 41, Q2_0, "2.3 bits, for models trained for it";
    IQ2_XS, "IQ2_XS", 20, IQ2_XS, "2.3 bits, needs an importance matrix";
    IQ2_S, "IQ2_S", 28, IQ2_XS, "2.5 bits, needs an importance matrix";
    IQ2_M, "IQ2_M", 29, IQ2_S, "2.7 bits, needs an importance matrix";
    Q2_K_S, "Q2_K_S", 21, Q2_K, "2.8 bits, needs an importance matrix";
    Q2_K, "Q2_K", 10, Q2_K, "3.0 bits";
    IQ3_XXS, "IQ3_XXS", 23, IQ3_XXS, "3.1 bits, needs an importance matrix";
    IQ3_XS, "IQ3_XS", 22, IQ3_S, "3.3 bits, needs an importance matrix";
    IQ3_S, "IQ3_S", 26, IQ3_S, "3.4 bits, better with an importance matrix";
    IQ3_M, "IQ3_M", 27, IQ3_S, "3.7 bits, better with an importance matrix";
    Q3_K_S, "Q3_K_S", 11, Q3_K, "3.5 bits";
    Q3_K_M, "Q3_K_M", 12, Q3_K, "3.9 bits";
    Q3_K_L, "Q3_K_L", 13, Q3_K, "4.3 bits";
    IQ4_XS, "IQ4_XS", 30, IQ4_XS, "4.3 bits";
    IQ4_NL, "IQ4_NL", 25, IQ4_NL, "4.5 bits";
    Q4_0, "Q4_0", 2, Q4_0, "4.5 bits, the fastest to compute with";
    Q4_K_S, "Q4_K_S", 14, Q4_K, "4.6 bits";
    Q4_K_M, "Q4_K_M", 15, Q4_K, "4.8 bits, a good default";
    MXFP4_MOE, "MXFP4_MOE", 38, MXFP4, "4.3 bits for experts, 8 for the rest";
    Q4_1, "Q4_1", 3, Q4_1, "5.0 bits";
    Q5_0, "Q5_0", 8, Q5_0, "5.5 bits";
    Q5_K_S, "Q5_K_S", 16, Q5_K, "5.5 bits";
    Q5_K_M, "Q5_K_M", 17, Q5_K, "5.7 bits";
    Q5_1, "Q5_1", 9, Q5_1, "6.0 bits";
    Q6_K, "Q6_K", 18, Q6_K, "6.6 bits";
    Q8_0, "Q8_0", 7, Q8_0, "8.5 bits, hardly to be told from 16";
    F16, "F16", 1, F16, "16 bits";
    BF16, "BF16", 32, BF16, "16 bits with the range of 32";
    F32, "F32", 0, F32, "32 bits";
}

impl FileType {
    /// The file type with this name, in any case; `Q3_K`, `Q4_K` and `Q5_K` mean the `_M` mixtures.
    pub fn from_name(name: &str) -> Option<FileType> {
        let name = name.to_ascii_uppercase();
        match name.as_str() {
            "Q3_K" => return Some(FileType::Q3_K_M),
            "Q4_K" => return Some(FileType::Q4_K_M),
            "Q5_K" => return Some(FileType::Q5_K_M),
            _ => {}
        }
        FileType::ALL.iter().copied().find(|ty| ty.name() == name)
    }

    /// The file type of a file whose matrices are all of one type.
    pub fn of_type(ty: Type) -> Option<FileType> {
        use FileType::*;
        let smallest_mix = [
            (Type::Q3_K, Q3_K_S),
            (Type::Q4_K, Q4_K_S),
            (Type::Q5_K, Q5_K_S),
        ];
        let mix = smallest_mix.iter().find(|row| row.0 == ty).map(|row| row.1);
        mix.or_else(|| FileType::from_name(ty.name()))
    }
}

/// What the rules ask about the model.
#[derive(Clone, Debug)]
pub struct ModelShape {
    /// `general.architecture`.
    pub arch: String,
    /// Layers.
    pub n_layer: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
}

impl ModelShape {
    fn n_gqa(&self) -> usize {
        self.n_head.checked_div(self.n_head_kv).unwrap_or(0)
    }

    /// The 70B models of old share few k/v heads, so that attn_v is small and gets more bits.
    fn is_70b(&self) -> bool {
        self.n_layer == 80
            && (self.arch == "qwen2" || self.arch == "llama" && self.n_head != self.n_head_kv)
    }
}

/// A tensor as the rules see it.
#[derive(Clone, Copy, Debug)]
pub struct MixTensor<'a> {
    /// GGUF name.
    pub name: &'a str,
    /// ggml's order, the row first.
    pub dims: &'a [u64],
    /// The type that it has.
    pub ty: Type,
}

/// Departures from the rules.
#[derive(Clone, Debug, Default)]
pub struct MixOptions {
    /// No rules: the base type for every matrix.
    pub pure: bool,
    /// Type of `output.weight`.
    pub output_type: Option<Type>,
    /// Type of `token_embd.weight`.
    pub embedding_type: Option<Type>,
    /// First pattern that is found in a name decides its type.
    pub patterns: Vec<(Regex, Type)>,
    /// Leave `output.weight` as it is.
    pub keep_output: bool,
    /// Whether there is an importance matrix: some rules are for lack of one.
    pub has_imatrix: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Category {
    TokenEmbd,
    Output,
    AttnQ,
    AttnK,
    AttnV,
    AttnQkv,
    AttnOutput,
    FfnUp,
    FfnGate,
    FfnDown,
    Other,
}

fn category(name: &str) -> Category {
    const PARTS: &[(&str, Category)] = &[
        ("attn_qkv.weight", Category::AttnQkv),
        ("attn_v.weight", Category::AttnV),
        ("attn_k.weight", Category::AttnK),
        ("attn_q.weight", Category::AttnQ),
        ("attn_output.weight", Category::AttnOutput),
        ("ffn_up", Category::FfnUp),
        ("ffn_gate", Category::FfnGate),
        ("ffn_down", Category::FfnDown),
    ];
    match name {
        "output.weight" => Category::Output,
        "token_embd.weight" => Category::TokenEmbd,
        _ => {
            let part = PARTS.iter().find(|row| name.contains(row.0));
            part.map_or(Category::Other, |row| row.1)
        }
    }
}

/// Whether a tensor belongs to a memory.
pub(crate) fn is_memory(name: &str) -> bool {
    name.starts_with("mem.") || name.contains(".ahn_")
}

/// The large matrices of a `nodes` compressor; everything else of a memory keeps its type.
fn is_compressor_matrix(name: &str) -> bool {
    const SUFFIXES: &[&str] = &[
        "qkv.weight",
        "gate.weight",
        "out.weight",
        "ffn_gate.weight",
        "ffn_up.weight",
        "ffn_down.weight",
    ];
    match name {
        "mem.in.weight" | "mem.node.map.weight" => true,
        _ => {
            (name.starts_with("mem.blk.") || name.starts_with("mem.active."))
                && SUFFIXES
                    .iter()
                    .any(|suffix| name.ends_with(&format!(".{suffix}")))
        }
    }
}

/// Whether a tensor of the base model may change its type: matrices named `weight`, norms excepted.
fn is_quantizable(tensor: &MixTensor<'_>, options: &MixOptions) -> bool {
    // As ggml counts dims: trailing ones do not count.
    let n_dims = tensor
        .dims
        .iter()
        .rposition(|&n| n != 1)
        .map_or(1, |i| i + 1);
    n_dims >= 2
        && tensor.name.ends_with("weight")
        && !tensor.name.contains("_norm.weight")
        && !tensor.name.contains("ffn_gate_inp.weight")
        && !(options.keep_output && tensor.name == "output.weight")
}

/// Replaces a type whose blocks do not divide the rows.
pub fn fit_rows(ty: Type, n_cols: u64) -> Result<Type, Error> {
    let divides = |ty: Type| n_cols.is_multiple_of(ty.block_size() as u64);
    if divides(ty) {
        return Ok(ty);
    }
    let smaller = match ty {
        Type::IQ1_S
        | Type::IQ1_M
        | Type::IQ2_XXS
        | Type::IQ2_XS
        | Type::IQ2_S
        | Type::IQ3_XXS
        | Type::IQ3_S
        | Type::IQ4_XS => Type::IQ4_NL,
        Type::Q2_0 | Type::Q2_K | Type::Q3_K | Type::TQ1_0 | Type::TQ2_0 => Type::Q4_0,
        Type::Q4_K => Type::Q5_0,
        Type::Q5_K => Type::Q5_1,
        Type::Q6_K => Type::Q8_0,
        _ if ty.block_size() <= 32 => ty,
        _ => {
            return Err(Error::Options(format!(
                "rows of {n_cols} values do not fit type {ty}, and no other type stands in for it"
            )));
        }
    };
    Ok(if divides(smaller) { smaller } else { Type::F16 })
}

/// The type of every tensor. `tensors` must be in layer order ([`sort_key`]): some rules count.
pub fn tensor_types(
    shape: &ModelShape,
    tensors: &[MixTensor<'_>],
    file_type: FileType,
    options: &MixOptions,
) -> Result<Vec<Type>, Error> {
    let base = file_type.base_type();
    let is_v = |name: &str| matches!(category(name), Category::AttnV | Category::AttnQkv);
    let mut mix = Mix {
        shape,
        file_type,
        options,
        tied: !tensors.iter().any(|tensor| tensor.name == "output.weight"),
        n_v: tensors.iter().filter(|tensor| is_v(tensor.name)).count(),
        i_v: 0,
        i_down: 0,
        i_gate: 0,
        i_up: 0,
    };
    let mut types = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let n_cols = tensor.dims.first().copied().unwrap_or(1);
        if is_memory(tensor.name) {
            let shrink = is_compressor_matrix(tensor.name)
                && base.is_quantized()
                && n_cols.is_multiple_of(Type::Q8_0.block_size() as u64)
                && !tensor.ty.is_quantized();
            types.push(if shrink { Type::Q8_0 } else { tensor.ty });
            continue;
        }
        if !is_quantizable(tensor, options) {
            types.push(tensor.ty);
            continue;
        }
        let category = category(tensor.name);
        let asked = match category {
            Category::TokenEmbd => options.embedding_type,
            Category::Output => options.output_type,
            _ => None,
        };
        if let Some(ty) = asked {
            types.push(ty);
            continue;
        }
        if !base.is_quantized() {
            types.push(base);
            continue;
        }
        let named = options
            .patterns
            .iter()
            .find(|row| row.0.is_match(tensor.name));
        let ty = match named {
            Some((_, ty)) => *ty,
            None if options.pure => base,
            None => mix.choose(category, n_cols),
        };
        types.push(fit_rows(ty, n_cols)?);
    }
    Ok(types)
}

/// Layer number (-1 outside of layers) and name: the order in which llama.cpp walks and writes tensors.
pub fn sort_key(name: &str) -> (i64, &str) {
    let layer = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'));
    let layer = layer.and_then(|(layer, _)| layer.parse::<u32>().ok());
    (layer.map_or(-1, i64::from), name)
}

/// Whether a file type insists on an importance for this tensor.
pub(crate) fn needs_imatrix(name: &str, ty: Type, file_type: FileType) -> bool {
    if matches!(name, "token_embd.weight" | "output.weight") {
        return false;
    }
    match ty {
        Type::IQ1_S | Type::IQ1_M | Type::IQ2_XXS | Type::IQ2_XS | Type::IQ2_S | Type::IQ3_XXS => {
            true
        }
        Type::Q2_K => file_type == FileType::Q2_K_S,
        _ => false,
    }
}

/// The rules and the counters that they use.
struct Mix<'a> {
    shape: &'a ModelShape,
    file_type: FileType,
    options: &'a MixOptions,
    tied: bool,
    n_v: usize,
    i_v: usize,
    i_down: usize,
    i_gate: usize,
    i_up: usize,
}

/// The first and last eighth of the layers, and every third between.
fn more_bits(i: usize, n: usize) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
}

impl Mix<'_> {
    fn choose(&mut self, category: Category, n_cols: u64) -> Type {
        use FileType::*;
        let base = self.file_type.base_type();
        let low = matches!(
            self.file_type,
            IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ2_M
        );
        match category {
            Category::Output => self.output(n_cols),
            Category::TokenEmbd if self.tied => self.output(n_cols),
            _ if self.file_type == MXFP4_MOE => Type::Q8_0,
            Category::TokenEmbd => match self.file_type {
                IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS => Type::Q2_K,
                IQ2_S | IQ2_M | IQ3_XXS => Type::IQ3_S,
                TQ1_0 | TQ2_0 | Q2_0 => Type::Q4_K,
                _ => base,
            },
            _ if low => self.low_bits(category),
            Category::AttnV | Category::AttnQkv => self.attn_v(),
            Category::AttnK | Category::AttnQ => match self.file_type {
                IQ3_XS => Type::IQ3_XXS,
                IQ3_XXS => Type::IQ2_S,
                _ => base,
            },
            Category::AttnOutput => match self.file_type {
                Q2_K => Type::Q3_K,
                IQ3_XXS => Type::IQ3_S,
                Q3_K_M | IQ3_M => Type::Q4_K,
                Q3_K_L => Type::Q5_K,
                _ => base,
            },
            Category::FfnDown => self.ffn_down(),
            Category::FfnGate => {
                self.i_gate += 1;
                self.ffn_gate_up(self.i_gate - 1)
            }
            Category::FfnUp => {
                self.i_up += 1;
                self.ffn_gate_up(self.i_up - 1)
            }
            Category::Other => base,
        }
    }

    /// The head, and the embedding where it is the head.
    fn output(&self, n_cols: u64) -> Type {
        use FileType::*;
        if let Some(ty) = self.options.output_type {
            return ty;
        }
        let base = self.file_type.base_type();
        if self.file_type == MXFP4_MOE || !n_cols.is_multiple_of(base.block_size() as u64) {
            return Type::Q8_0;
        }
        match self.file_type {
            IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ2_M | IQ3_XXS => Type::Q5_K,
            _ if base == Type::Q8_0 => Type::Q8_0,
            _ => Type::Q6_K,
        }
    }

    /// File types of less than three bits.
    fn low_bits(&mut self, category: Category) -> Type {
        use FileType::*;
        let base = self.file_type.base_type();
        let upper = matches!(self.file_type, IQ2_S | IQ2_M);
        let better = if upper { Type::IQ3_S } else { Type::Q2_K };
        match category {
            Category::AttnV | Category::AttnQkv => {
                self.i_v += 1;
                if self.shape.n_gqa() >= 4 {
                    Type::Q4_K
                } else {
                    better
                }
            }
            Category::FfnDown => {
                self.i_down += 1;
                if self.i_down - 1 < self.shape.n_layer / 8 {
                    better
                } else {
                    base
                }
            }
            Category::AttnOutput => match self.file_type {
                IQ1_S | IQ1_M => Type::IQ2_XXS,
                IQ2_S | IQ2_M => Type::IQ3_S,
                _ => base,
            },
            _ => base,
        }
    }

    fn attn_v(&mut self) -> Type {
        use FileType::*;
        let (i, n) = (self.i_v, self.n_v);
        self.i_v += 1;
        let few_kv = self.shape.n_gqa() >= 4;
        let ty = match self.file_type {
            Q2_K if few_kv => Type::Q4_K,
            Q2_K => Type::Q3_K,
            Q2_K_S if few_kv => Type::Q4_K,
            IQ3_XXS if few_kv => Type::Q4_K,
            IQ3_XXS if !self.options.has_imatrix => Type::IQ3_S,
            IQ3_XXS => Type::IQ3_XXS,
            IQ3_XS | IQ3_S if few_kv => Type::Q4_K,
            IQ3_M => Type::Q4_K,
            Q3_K_M if i < 2 => Type::Q5_K,
            Q3_K_M => Type::Q4_K,
            Q3_K_L => Type::Q5_K,
            IQ4_NL | IQ4_XS if few_kv => Type::Q5_K,
            Q4_K_M | Q5_K_M if more_bits(i, n) => Type::Q6_K,
            Q4_K_S if i < 4 => Type::Q5_K,
            _ => self.file_type.base_type(),
        };
        if self.shape.is_70b() && (ty == Type::Q3_K || ty == Type::Q4_K) {
            return Type::Q5_K;
        }
        ty
    }

    fn ffn_down(&mut self) -> Type {
        use FileType::*;
        let (i, n) = (self.i_down, self.shape.n_layer);
        self.i_down += 1;
        let first = i < n / 8;
        let imatrix = self.options.has_imatrix;
        match self.file_type {
            Q2_K => Type::Q3_K,
            Q2_K_S if first => Type::Q4_K,
            IQ3_XXS if !imatrix && first => Type::Q4_K,
            IQ3_XXS if !imatrix => Type::Q3_K,
            Q3_K_M if i < n / 16 => Type::Q5_K,
            Q3_K_M => Type::Q4_K,
            IQ3_M if first => Type::Q4_K,
            Q3_K_L => Type::Q5_K,
            Q4_K_M | Q5_K_M if more_bits(i, n) => Type::Q6_K,
            IQ4_NL | IQ4_XS if first && !imatrix => Type::Q5_K,
            Q4_K_S if first => Type::Q5_K,
            Q4_0 if first && imatrix => Type::Q4_1,
            Q5_0 if first && imatrix => Type::Q5_1,
            _ => self.file_type.base_type(),
        }
    }

    fn ffn_gate_up(&self, i: usize) -> Type {
        let n = self.shape.n_layer;
        if self.file_type == FileType::IQ3_XS && i >= n / 8 && i < 7 * n / 8 {
            return Type::IQ3_XXS;
        }
        self.file_type.base_type()
    }
}
