//! Tokenizer files to `tokenizer.ggml.*` keys: byte-level BPE from `tokenizer.json` (or `vocab.json`
//! and `merges.txt`), SentencePiece from `tokenizer.model` or from a `tokenizer.json` made of one.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use mneme_engine::gguf::GgufWriter;
use serde_json::Value as Json;

use crate::Error;
use crate::source::read_json;
use crate::spm::SpmModel;

/// Token types of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A vocabulary as GGUF stores it.
#[derive(Debug, Default)]
pub struct Vocabulary {
    model: &'static str,
    pre: Option<String>,
    tokens: Vec<String>,
    types: Vec<i32>,
    /// SentencePiece only.
    scores: Vec<f32>,
    /// BPE only.
    merges: Vec<String>,
    /// SentencePiece only.
    add_space_prefix: Option<bool>,
    /// Ids by role: `bos`, `eos`, `unk`, `sep`, `pad`, `cls`, `mask`.
    special: BTreeMap<&'static str, u32>,
    add_bos: bool,
    add_eos: bool,
    /// The default template, and the named ones.
    chat_template: Option<String>,
    named_templates: Vec<(String, String)>,
}

/// Role, key in GGUF. The spelling `seperator` is the format's.
const SPECIAL: &[(&str, &str)] = &[
    ("bos", "tokenizer.ggml.bos_token_id"),
    ("eos", "tokenizer.ggml.eos_token_id"),
    ("unk", "tokenizer.ggml.unknown_token_id"),
    ("sep", "tokenizer.ggml.seperator_token_id"),
    ("pad", "tokenizer.ggml.padding_token_id"),
    ("cls", "tokenizer.ggml.cls_token_id"),
    ("mask", "tokenizer.ggml.mask_token_id"),
];

/// How a token that is not in the model proper was added.
struct Added {
    content: String,
    special: bool,
}

/// The tokenizer files of a folder.
struct Files {
    folder: PathBuf,
    tokenizer: Option<Json>,
    config: Json,
    model_config: Json,
    generation: Json,
    special_map: Json,
}

impl Vocabulary {
    /// Reads the tokenizer of a folder. `n_vocab` is the number of rows of the embedding: ids without a
    /// token are padded. `pre` overrides the recognition of the pre-tokenizer.
    pub fn open(folder: &Path, n_vocab: usize, pre: Option<&str>) -> Result<Vocabulary, Error> {
        let json = |name: &str| Ok::<_, Error>(read_json(&folder.join(name))?.unwrap_or_default());
        let files = Files {
            folder: folder.to_path_buf(),
            tokenizer: read_json(&folder.join("tokenizer.json"))?,
            config: json("tokenizer_config.json")?,
            model_config: json("config.json")?,
            generation: json("generation_config.json")?,
            special_map: json("special_tokens_map.json")?,
        };
        let mut vocabulary = match &files.tokenizer {
            Some(tokenizer) if is_byte_level(tokenizer) => files.byte_level(tokenizer, pre)?,
            _ if folder.join("tokenizer.model").is_file() => files.sentencepiece()?,
            Some(tokenizer) => files.byte_fallback(tokenizer)?,
            None if folder.join("vocab.json").is_file() => files.vocab_and_merges(pre)?,
            None => {
                return Err(Error::Tokenizer {
                    path: folder.to_path_buf(),
                    message: "no tokenizer.json, tokenizer.model or vocab.json in it".into(),
                });
            }
        };
        vocabulary.pad(&files, n_vocab)?;
        files.special_tokens(&mut vocabulary);
        files.chat_templates(&mut vocabulary)?;
        Ok(vocabulary)
    }

    /// Sets the keys.
    pub fn write_keys(&self, writer: &mut GgufWriter) {
        writer.set("tokenizer.ggml.model", self.model);
        if let Some(pre) = &self.pre {
            writer.set("tokenizer.ggml.pre", pre.as_str());
        }
        writer.set("tokenizer.ggml.tokens", self.tokens.clone());
        if !self.scores.is_empty() {
            writer.set("tokenizer.ggml.scores", self.scores.clone());
        }
        writer.set("tokenizer.ggml.token_type", self.types.clone());
        if !self.merges.is_empty() {
            writer.set("tokenizer.ggml.merges", self.merges.clone());
        }
        for (role, key) in SPECIAL {
            if let Some(&id) = self.special.get(role) {
                writer.set(key, id);
            }
        }
        writer.set("tokenizer.ggml.add_bos_token", self.add_bos);
        writer.set("tokenizer.ggml.add_eos_token", self.add_eos);
        if let Some(add) = self.add_space_prefix {
            writer.set("tokenizer.ggml.add_space_prefix", add);
        }
        if let Some(template) = &self.chat_template {
            writer.set("tokenizer.chat_template", template.as_str());
        }
        if !self.named_templates.is_empty() {
            let names: Vec<String> = self.named_templates.iter().map(|t| t.0.clone()).collect();
            writer.set("tokenizer.chat_templates", names);
            for (name, template) in &self.named_templates {
                writer.set(
                    &format!("tokenizer.chat_template.{name}"),
                    template.as_str(),
                );
            }
        }
    }

    /// Fills ids up to `n_vocab` with unused tokens: embeddings are often padded to a round number.
    fn pad(&mut self, files: &Files, n_vocab: usize) -> Result<(), Error> {
        if self.tokens.len() > n_vocab {
            return Err(Error::Tokenizer {
                path: files.folder.clone(),
                message: format!(
                    "the tokenizer has {} tokens, but the model has vocab_size {n_vocab}",
                    self.tokens.len()
                ),
            });
        }
        for id in self.tokens.len()..n_vocab {
            self.tokens.push(format!("[PAD{id}]"));
            self.types.push(UNUSED);
            if !self.scores.is_empty() {
                self.scores.push(-10000.0);
            }
        }
        Ok(())
    }
}

/// Whether a `tokenizer.json` is a BPE over byte-level characters.
fn is_byte_level(tokenizer: &Json) -> bool {
    let model = &tokenizer["model"];
    let kind = model["type"].as_str();
    matches!(kind, Some("BPE") | None) && model["byte_fallback"].as_bool() != Some(true)
}

/// Tokens that are control tokens by their looks, where a file does not say so.
fn looks_special(content: &str) -> bool {
    (content.starts_with("<|") && content.ends_with("|>"))
        || (content.starts_with("<｜") && content.ends_with("｜>"))
        || matches!(content, "<pad>" | "<mask>")
}

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn error(&self, name: &str, message: impl Into<String>) -> Error {
        Error::Tokenizer {
            path: self.path(name),
            message: message.into(),
        }
    }

    /// Added tokens by id: of `tokenizer.json`, `added_tokens.json` and `tokenizer_config.json`.
    fn added(&self) -> Result<BTreeMap<usize, Added>, Error> {
        let mut added = BTreeMap::new();
        let mut insert = |id: Option<usize>, content: &Json, special: bool| {
            if let (Some(id), Some(content)) = (id, content.as_str()) {
                let special = special || looks_special(content);
                added.insert(
                    id,
                    Added {
                        content: content.into(),
                        special,
                    },
                );
            }
        };
        let plain = read_json(&self.path("added_tokens.json"))?.unwrap_or_default();
        for (content, id) in plain.as_object().into_iter().flatten() {
            insert(usize_of(id), &Json::from(content.as_str()), false);
        }
        let decoder = self.config["added_tokens_decoder"].as_object();
        for (id, token) in decoder.into_iter().flatten() {
            let special = token["special"].as_bool() == Some(true);
            insert(id.parse().ok(), &token["content"], special);
        }
        let listed = self
            .tokenizer
            .as_ref()
            .and_then(|t| t["added_tokens"].as_array());
        for token in listed.into_iter().flatten() {
            let special = token["special"].as_bool() == Some(true);
            insert(usize_of(&token["id"]), &token["content"], special);
        }
        Ok(added)
    }

    /// Puts tokens by id in order; ids without a token become unused ones.
    fn assemble(
        &self,
        file: &str,
        vocab: HashMap<usize, (String, i32)>,
        added: &BTreeMap<usize, Added>,
    ) -> Result<(Vec<String>, Vec<i32>), Error> {
        // Ids run without large holes: a hostile id must not ask for terabytes.
        let n_known = vocab.len() + added.len();
        let n = vocab
            .keys()
            .chain(added.keys())
            .max()
            .map_or(0, |id| id + 1);
        if n > n_known * 2 + 65536 {
            let message = format!("token id {} is absurd for {n_known} tokens", n - 1);
            return Err(self.error(file, message));
        }
        let mut tokens = vec![None; n];
        for (id, token) in vocab {
            tokens[id] = Some(token);
        }
        for (&id, token) in added {
            let kind = if token.special { CONTROL } else { USER_DEFINED };
            tokens[id] = Some((token.content.clone(), kind));
        }
        let mut seen: HashMap<String, usize> = HashMap::with_capacity(n);
        let (mut texts, mut types) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for (id, token) in tokens.into_iter().enumerate() {
            let (text, kind) = token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED));
            if let Some(first) = seen.insert(text.clone(), id) {
                let message = format!("token {text:?} has two ids, {first} and {id}");
                return Err(self.error(file, message));
            }
            texts.push(text);
            types.push(kind);
        }
        Ok((texts, types))
    }

    fn byte_level(&self, tokenizer: &Json, pre: Option<&str>) -> Result<Vocabulary, Error> {
        let file = "tokenizer.json";
        let vocab = self.vocab_of(file, &tokenizer["model"]["vocab"], |_| NORMAL)?;
        let (tokens, types) = self.assemble(file, vocab, &self.added()?)?;
        let pre = match pre {
            Some(pre) => pre.to_string(),
            None => recognise_pre(&tokenizer["pre_tokenizer"])
                .ok_or_else(|| self.error(file, unknown_pre(&tokenizer["pre_tokenizer"])))?
                .to_string(),
        };
        Ok(Vocabulary {
            model: "gpt2",
            pre: Some(pre),
            tokens,
            types,
            merges: self.merges_of(file, &tokenizer["model"]["merges"])?,
            ..Vocabulary::default()
        })
    }

    /// The files of slow tokenizers: `vocab.json` and `merges.txt`.
    fn vocab_and_merges(&self, pre: Option<&str>) -> Result<Vocabulary, Error> {
        let vocab = read_json(&self.path("vocab.json"))?.unwrap_or_default();
        let vocab = self.vocab_of("vocab.json", &vocab, |_| NORMAL)?;
        let (tokens, types) = self.assemble("vocab.json", vocab, &self.added()?)?;
        let path = self.path("merges.txt");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let lines = text
            .lines()
            .filter(|line| !line.starts_with("#version") && !line.is_empty());
        let class = self.config["tokenizer_class"].as_str().unwrap_or_default();
        let pre = match pre {
            Some(pre) => pre,
            None if class.starts_with("Qwen2Tokenizer") => "qwen2",
            None if class.starts_with("GPT2Tokenizer") => "gpt-2",
            None => {
                let message = format!(
                    "tokenizer_class {class:?} does not tell the pre-tokenizer: give it by --pre"
                );
                return Err(self.error("tokenizer_config.json", message));
            }
        };
        Ok(Vocabulary {
            model: "gpt2",
            pre: Some(pre.to_string()),
            tokens,
            types,
            merges: lines.map(str::to_owned).collect(),
            ..Vocabulary::default()
        })
    }

    fn vocab_of(
        &self,
        file: &str,
        vocab: &Json,
        kind: impl Fn(&str) -> i32,
    ) -> Result<HashMap<usize, (String, i32)>, Error> {
        let vocab = vocab.as_object().filter(|vocab| !vocab.is_empty());
        let vocab = vocab.ok_or_else(|| self.error(file, "has no vocabulary"))?;
        let mut by_id = HashMap::with_capacity(vocab.len());
        for (token, id) in vocab {
            let id = usize_of(id).ok_or_else(|| {
                self.error(
                    file,
                    format!("token {token:?} has id {id}, expected a number"),
                )
            })?;
            if let Some((other, _)) = by_id.insert(id, (token.clone(), kind(token))) {
                return Err(self.error(
                    file,
                    format!("tokens {other:?} and {token:?} share id {id}"),
                ));
            }
        }
        Ok(by_id)
    }

    /// Merges as GGUF has them: two parts with a space between, spaces inside a part as `Ġ`.
    fn merges_of(&self, file: &str, merges: &Json) -> Result<Vec<String>, Error> {
        let merges = merges.as_array();
        let merges = merges.ok_or_else(|| self.error(file, "has no merges"))?;
        let whole = |merge: &Json| match merge {
            Json::String(merge) => Some(merge.clone()),
            Json::Array(parts) if parts.len() == 2 => {
                let part = |i: usize| Some(parts[i].as_str()?.replace(' ', "\u{120}"));
                Some(format!("{} {}", part(0)?, part(1)?))
            }
            _ => None,
        };
        let mut out = Vec::with_capacity(merges.len());
        for (i, merge) in merges.iter().enumerate() {
            out.push(whole(merge).ok_or_else(|| {
                self.error(
                    file,
                    format!("merge {i} is neither a string nor a pair of strings"),
                )
            })?);
        }
        Ok(out)
    }

    fn sentencepiece(&self) -> Result<Vocabulary, Error> {
        let file = "tokenizer.model";
        let path = self.path(file);
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let model = SpmModel::parse(&bytes).map_err(|message| self.error(file, message))?;
        if model.model_type != 2 {
            let message = format!(
                "SentencePiece model type {} is not supported: expected BPE (2)",
                model.model_type
            );
            return Err(self.error(file, message));
        }
        let mut vocabulary = Vocabulary {
            model: "llama",
            pre: Some("default".into()),
            add_space_prefix: Some(model.add_dummy_prefix),
            ..Vocabulary::default()
        };
        for piece in model.pieces {
            vocabulary.tokens.push(piece.text);
            vocabulary.scores.push(piece.score);
            vocabulary.types.push(piece.kind);
        }
        for (id, token) in self.added()? {
            if id > vocabulary.tokens.len() {
                let message = format!(
                    "added token {:?} has id {id}, but the tokens before end at {}",
                    token.content,
                    vocabulary.tokens.len()
                );
                return Err(self.error("tokenizer_config.json", message));
            }
            let kind = if token.special { CONTROL } else { USER_DEFINED };
            if id == vocabulary.tokens.len() {
                vocabulary.tokens.push(token.content);
                vocabulary.scores.push(-1000.0);
                vocabulary.types.push(kind);
            } else if !matches!(vocabulary.types[id], UNKNOWN | BYTE) {
                vocabulary.tokens[id] = token.content;
                vocabulary.types[id] = kind;
            }
        }
        self.check_unique(file, &vocabulary.tokens)?;
        Ok(vocabulary)
    }

    /// A `tokenizer.json` that was made of a SentencePiece model: BPE with byte fallback. The scores are
    /// gone; the rank of the merge that makes a token orders tokens as they did.
    fn byte_fallback(&self, tokenizer: &Json) -> Result<Vocabulary, Error> {
        let file = "tokenizer.json";
        let model = &tokenizer["model"];
        if model["type"].as_str().unwrap_or("BPE") != "BPE" {
            let message = format!(
                "model type {} is not supported: expected BPE",
                model["type"]
            );
            return Err(self.error(file, message));
        }
        let unknown = model["unk_token"].as_str().unwrap_or("<unk>").to_owned();
        let vocab = self.vocab_of(file, &model["vocab"], |token| {
            let byte = token
                .strip_prefix("<0x")
                .and_then(|rest| rest.strip_suffix('>'));
            if byte.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok()) {
                BYTE
            } else if token == unknown {
                UNKNOWN
            } else {
                NORMAL
            }
        })?;
        let mut added = self.added()?;
        added.retain(|_, token| token.content != unknown);
        let (tokens, types) = self.assemble(file, vocab, &added)?;
        let mut rank = HashMap::new();
        for (i, merge) in self.merges_of(file, &model["merges"])?.iter().enumerate() {
            if let Some((left, right)) = merge.split_once(' ') {
                rank.entry(format!("{left}{right}")).or_insert(i);
            }
        }
        let scores = tokens
            .iter()
            .zip(&types)
            .map(|(token, &kind)| match (rank.get(token), kind) {
                (Some(&rank), NORMAL) => -(rank as f32),
                // Single characters are never the result of a merge.
                (None, NORMAL) => -(rank.len() as f32),
                (_, CONTROL | USER_DEFINED) => -1000.0,
                _ => 0.0,
            })
            .collect();
        Ok(Vocabulary {
            model: "llama",
            pre: Some("default".into()),
            tokens,
            types,
            scores,
            add_space_prefix: Some(prepends_space(tokenizer)),
            ..Vocabulary::default()
        })
    }

    fn check_unique(&self, file: &str, tokens: &[String]) -> Result<(), Error> {
        let mut seen = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(first) = seen.insert(token, id) {
                return Err(self.error(
                    file,
                    format!("token {token:?} has two ids, {first} and {id}"),
                ));
            }
        }
        Ok(())
    }

    /// Ids of BOS and the like: by text from `tokenizer_config.json` and `special_tokens_map.json`, by id from
    /// `config.json` and `generation_config.json`; the first that says wins.
    fn special_tokens(&self, vocabulary: &mut Vocabulary) {
        let by_text: HashMap<&str, u32> = vocabulary
            .tokens
            .iter()
            .enumerate()
            .map(|(id, token)| (token.as_str(), id as u32))
            .collect();
        let mut special = BTreeMap::new();
        for (role, _) in SPECIAL {
            let text = [&self.config, &self.special_map]
                .into_iter()
                .find_map(|json| {
                    let entry = &json[format!("{role}_token")];
                    entry.as_str().or(entry["content"].as_str())
                });
            let id = text
                .and_then(|text| by_text.get(text).copied())
                .or_else(|| {
                    [&self.model_config, &self.generation]
                        .into_iter()
                        .find_map(|json| {
                            let entry = &json[format!("{role}_token_id")];
                            // A list names several end tokens, the main one first.
                            let id = entry.as_u64().or(entry[0].as_u64())?;
                            u32::try_from(id)
                                .ok()
                                .filter(|&id| (id as usize) < vocabulary.tokens.len())
                        })
                });
            if let Some(id) = id {
                special.insert(*role, id);
            }
        }
        vocabulary.special = special;
        let (first, last) = self
            .tokenizer
            .as_ref()
            .map_or((false, false), template_ends);
        let spm = vocabulary.model == "llama";
        let flag = |key: &str| self.config[key].as_bool();
        vocabulary.add_bos =
            flag("add_bos_token").unwrap_or(first || (spm && self.tokenizer.is_none()));
        vocabulary.add_eos = flag("add_eos_token").unwrap_or(last);
        if let (Some(add), true) = (flag("add_prefix_space"), spm) {
            vocabulary.add_space_prefix = Some(add);
        }
    }

    /// `chat_template.jinja`, then `chat_template.json`, then `tokenizer_config.json`: a string, or a list of named ones.
    fn chat_templates(&self, vocabulary: &mut Vocabulary) -> Result<(), Error> {
        let path = self.path("chat_template.jinja");
        let jinja = match std::fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let json = read_json(&self.path("chat_template.json"))?.unwrap_or_default();
        let entry = match &json["chat_template"] {
            Json::Null => &self.config["chat_template"],
            entry => entry,
        };
        vocabulary.chat_template = entry.as_str().map(str::to_owned);
        for named in entry.as_array().into_iter().flatten() {
            if let (Some(name), Some(template)) =
                (named["name"].as_str(), named["template"].as_str())
            {
                if name == "default" {
                    vocabulary.chat_template = Some(template.to_owned());
                } else if !name.is_empty()
                    && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                {
                    vocabulary
                        .named_templates
                        .push((name.to_owned(), template.to_owned()));
                }
            }
        }
        if jinja.is_some() {
            vocabulary.chat_template = jinja;
        }
        Ok(())
    }
}

fn usize_of(json: &Json) -> Option<usize> {
    json.as_u64()
        .and_then(|id| usize::try_from(id).ok())
        .filter(|&id| id < 1 << 31)
}

/// Whether the post-processor puts a special token in front, and at the end, of a single text.
fn template_ends(tokenizer: &Json) -> (bool, bool) {
    let post = &tokenizer["post_processor"];
    let nested = post["processors"].as_array().map_or(&[][..], Vec::as_slice);
    let mut processors = std::iter::once(post).chain(nested);
    let template = processors.find(|p| p["type"] == "TemplateProcessing");
    let single = template.and_then(|template| template["single"].as_array());
    let is_special =
        |part: Option<&Json>| part.is_some_and(|part| part["SpecialToken"].is_object());
    let single = single.map_or(&[][..], Vec::as_slice);
    (is_special(single.first()), is_special(single.last()))
}

/// Whether a SentencePiece-like `tokenizer.json` puts a space in front of text.
fn prepends_space(tokenizer: &Json) -> bool {
    let listed = |part: &'static str, list: &'static str| {
        let whole = &tokenizer[part];
        std::iter::once(whole).chain(whole[list].as_array().into_iter().flatten())
    };
    let prepend = listed("normalizer", "normalizers").any(|n| n["type"] == "Prepend");
    let metaspace = listed("pre_tokenizer", "pretokenizers").any(|p| {
        p["type"] == "Metaspace"
            && p["prepend_scheme"].as_str().unwrap_or("always") != "never"
            && p["add_prefix_space"].as_bool() != Some(false)
    });
    prepend || metaspace
}

/// Patterns of `Split` pre-tokenizers and the names that llama.cpp has for them.
const PRE_PATTERNS: &[(&str, &str)] = &[
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken",
    ),
];

/// The name of a pre-tokenizer, by its structure.
fn recognise_pre(pre: &Json) -> Option<&'static str> {
    let nested = pre["pretokenizers"].as_array();
    let steps: Vec<&Json> = nested.map_or_else(|| vec![pre], |steps| steps.iter().collect());
    let plain_bytes =
        |step: &Json| step["type"] == "ByteLevel" && step["use_regex"].as_bool() == Some(false);
    // The regex of GPT-2 is built into ByteLevel.
    let gpt2_bytes =
        |step: &Json| step["type"] == "ByteLevel" && step["use_regex"].as_bool() != Some(false);
    match steps.as_slice() {
        [bytes] if gpt2_bytes(bytes) => Some("gpt-2"),
        [digits, bytes] if digits["type"] == "Digits" && gpt2_bytes(bytes) => {
            (digits["individual_digits"].as_bool() == Some(true)).then_some("smollm")
        }
        [split, bytes] if split["type"] == "Split" && plain_bytes(bytes) => {
            let isolated =
                split["behavior"] == "Isolated" && split["invert"].as_bool() != Some(true);
            let pattern = split["pattern"]["Regex"].as_str()?;
            let row = PRE_PATTERNS.iter().find(|row| row.0 == pattern)?;
            isolated.then_some(row.1)
        }
        _ => None,
    }
}

fn unknown_pre(pre: &Json) -> String {
    let names: Vec<&str> = PRE_PATTERNS.iter().map(|row| row.1).collect();
    format!(
        "its pre-tokenizer is none that is known ({}, gpt-2, smollm): {}. Give its GGUF name by --pre",
        names.join(", "),
        crate::source::short(pre)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pre_tokenizers_are_recognised_by_structure() {
        let bytes = json!({"type": "ByteLevel", "use_regex": false});
        let split = |pattern: &str| {
            let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, bytes]})
        };
        for (pattern, name) in PRE_PATTERNS {
            assert_eq!(recognise_pre(&split(pattern)), Some(*name));
        }
        assert_eq!(recognise_pre(&split(r"\p{L}+")), None);
        assert_eq!(
            recognise_pre(&json!({"type": "ByteLevel", "use_regex": true})),
            Some("gpt-2")
        );
        assert_eq!(recognise_pre(&json!({"type": "Whitespace"})), None);
        assert_eq!(recognise_pre(&Json::Null), None);
    }

    #[test]
    fn merges_of_both_forms_agree() {
        let files = Files {
            folder: "x".into(),
            tokenizer: None,
            config: Json::Null,
            model_config: Json::Null,
            generation: Json::Null,
            special_map: Json::Null,
        };
        let old = files.merges_of("t", &json!(["a b", "ab c"])).unwrap();
        let new = files
            .merges_of("t", &json!([["a", "b"], ["ab", "c"]]))
            .unwrap();
        assert_eq!(old, new);
        let spaced = files.merges_of("t", &json!([[" ", "a"]])).unwrap();
        assert_eq!(spaced, ["\u{120} a"]);
        assert!(files.merges_of("t", &json!([["a"]])).is_err());
    }
}
