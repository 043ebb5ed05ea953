//! Text to token ids and back, from the vocabulary in a GGUF file.
//!
//! Two kinds: byte-level BPE (`gpt2`: GPT-2, Qwen, Llama 3, ...) and SentencePiece by scores (`llama`: Llama 2,
//! Mistral, ...). Ids are llama.cpp's, with one difference: text for Qwen models is put into Unicode normal
//! form C first, as their own tokenizer does.

mod bpe;
mod error;
mod pre;
mod special;
mod spm;
mod stream;
mod words;

use std::sync::{Mutex, TryLockError};

use ahash::AHashMap;

use crate::gguf::Gguf;

pub use error::Error;
pub use stream::{TokenStream, Utf8Stream};

use bpe::ByteBpe;
use pre::Family;
use special::{Fragment, Special, Specials};
use spm::Spm;
use words::Words;

/// What a token is for: the values of `tokenizer.ggml.token_type`.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenType {
    Undefined,
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenType {
    fn from_file(value: i64) -> TokenType {
        match value {
            1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => TokenType::Undefined,
        }
    }
}

/// Ids of the tokens with a role; `None` where the vocabulary has no such token.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// End of turn.
    pub eot: Option<u32>,
    /// End of message (a tool call follows).
    pub eom: Option<u32>,
    pub unknown: Option<u32>,
    pub padding: Option<u32>,
    /// Fill in the middle: before the prefix, suffix and middle, padding, repository name, between files.
    pub fim_prefix: Option<u32>,
    pub fim_suffix: Option<u32>,
    pub fim_middle: Option<u32>,
    pub fim_pad: Option<u32>,
    pub fim_repo: Option<u32>,
    pub fim_sep: Option<u32>,
}

enum Kind {
    Bpe(Box<ByteBpe>),
    Spm(Box<Spm>),
}

/// A vocabulary with its rules. Immutable and shared between threads.
pub struct Tokenizer {
    kind: Kind,
    name: String,
    types: Vec<TokenType>,
    /// Bytes of every token, one after the other; token `id` is `piece_ends[id - 1]..piece_ends[id]`.
    pieces: Vec<u8>,
    piece_ends: Vec<u32>,
    specials: Specials,
    ids: SpecialIds,
    eog: Vec<bool>,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
    /// Kept between calls; a call that finds it taken starts with an empty one.
    words: Mutex<Words>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("name", &self.name)
            .field("n_vocab", &self.n_vocab())
            .field("ids", &self.ids)
            .finish()
    }
}

/// Names of tokens by role, where the file has no key for it. First found wins.
const EOT_NAMES: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];
const EOM_NAMES: &[&str] = &["<|eom_id|>"];
const FIM_PREFIX_NAMES: &[&str] = &[
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
];
const FIM_SUFFIX_NAMES: &[&str] = &[
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
];
const FIM_MIDDLE_NAMES: &[&str] = &[
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
];
const FIM_PAD_NAMES: &[&str] = &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"];
const FIM_REPO_NAMES: &[&str] = &[
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
];
const FIM_SEP_NAMES: &[&str] = &["<|file_sep|>"];
/// Tokens that end a generation wherever they exist.
const EOG_NAMES: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Channel marks of the harmony format: shown as text.
const SHOWN_NAMES: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

const KEY_TOKENS: &str = "tokenizer.ggml.tokens";
const KEY_TYPES: &str = "tokenizer.ggml.token_type";
const KEY_SCORES: &str = "tokenizer.ggml.scores";

impl Tokenizer {
    /// Builds the tokenizer of a model file.
    ///
    /// Fails on tokenizers and pre-tokenizers that are not supported, and on vocabularies that contradict
    /// themselves (doubled tokens, merges of tokens that do not exist, arrays of the wrong length).
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer, Error> {
        let model = gguf.str("tokenizer.ggml.model")?;
        let is_bpe = match model {
            "gpt2" => true,
            "llama" => false,
            got => {
                return Err(Error::ModelName {
                    got: got.to_string(),
                });
            }
        };
        let mut texts = gguf.arr_str(KEY_TOKENS)?.to_vec();
        let n_vocab = texts.len();
        if n_vocab == 0 {
            return Err(Error::NoTokens);
        }
        if u32::try_from(n_vocab).is_err() {
            return Err(Error::TooManyTokens { got: n_vocab });
        }
        for (id, text) in texts.iter_mut().enumerate() {
            if text.is_empty() {
                *text = format!("[EMPTY_{id}]"); // a hole in the vocabulary; must not match everywhere
            }
        }
        let mut by_text: AHashMap<&str, usize> = AHashMap::with_capacity(n_vocab);
        for (second, text) in texts.iter().enumerate() {
            if let Some(first) = by_text.insert(text, second) {
                return Err(Error::DuplicateToken {
                    text: text.clone(),
                    first,
                    second,
                });
            }
        }
        let find = |names: &[&str]| {
            let first = names.iter().find_map(|name| by_text.get(name));
            first.map(|&id| id as u32)
        };

        let mut types = read_types(gguf, n_vocab)?;
        let id_key = |key: &str| -> Result<Option<u32>, Error> {
            let id = gguf.opt_i64(&format!("tokenizer.ggml.{key}"))?;
            match id {
                Some(id) if id < 0 => Ok(None),
                Some(id) if id >= n_vocab as i64 => {
                    tracing::warn!(
                        "key tokenizer.ggml.{key}: id {id} is outside the vocabulary of {n_vocab} tokens; ignored"
                    );
                    Ok(None)
                }
                Some(id) => Ok(Some(id as u32)),
                None => Ok(None),
            }
        };
        // Without a key, Llama 2's usual ids stand for SentencePiece vocabularies.
        let default = |id: u32| (!is_bpe && (id as usize) < n_vocab).then_some(id);
        let has = |key: &str| gguf.get(&format!("tokenizer.ggml.{key}")).is_some();
        let or_default = |key: &str, id: u32| -> Result<Option<u32>, Error> {
            if has(key) {
                id_key(key)
            } else {
                Ok(default(id))
            }
        };
        let or_named = |keys: &[&str], names: &[&str]| -> Result<Option<u32>, Error> {
            for key in keys {
                if let Some(id) = id_key(key)? {
                    return Ok(Some(id));
                }
            }
            Ok(find(names))
        };
        let ids = SpecialIds {
            bos: or_default("bos_token_id", 1)?,
            eos: or_default("eos_token_id", 2)?,
            unknown: or_default("unknown_token_id", 0)?,
            padding: id_key("padding_token_id")?,
            eot: or_named(&["eot_token_id"], EOT_NAMES)?,
            eom: or_named(&["eom_token_id"], EOM_NAMES)?,
            fim_prefix: or_named(&["fim_pre_token_id", "prefix_token_id"], FIM_PREFIX_NAMES)?,
            fim_suffix: or_named(&["fim_suf_token_id", "suffix_token_id"], FIM_SUFFIX_NAMES)?,
            fim_middle: or_named(&["fim_mid_token_id", "middle_token_id"], FIM_MIDDLE_NAMES)?,
            fim_pad: or_named(&["fim_pad_token_id"], FIM_PAD_NAMES)?,
            fim_repo: or_named(&["fim_rep_token_id"], FIM_REPO_NAMES)?,
            fim_sep: or_named(&["fim_sep_token_id"], FIM_SEP_NAMES)?,
        };
        let eog = mark_special(&ids, &mut types, &find);

        let family = match is_bpe {
            true => {
                let name = gguf.opt_str("tokenizer.ggml.pre")?.unwrap_or("default");
                Some(Family::find(name).ok_or_else(|| Error::Pre {
                    got: name.to_string(),
                    known: Family::all_names(),
                })?)
            }
            false => None,
        };
        let (pieces, piece_ends) = pieces(&texts, &types, is_bpe)?;
        let strips_right = gguf.opt_str("general.name")?.is_some_and(|name| {
            let name = name.to_ascii_lowercase();
            name.contains("phi-3") || name.contains("phi3")
        });
        let specials = Specials::new(special_tokens(&texts, &types, strips_right));
        let kind = match family {
            Some(family) => {
                let merges = gguf.arr_str("tokenizer.ggml.merges")?;
                Kind::Bpe(Box::new(ByteBpe::new(&texts, merges, family)?))
            }
            None => {
                let scores = read_scores(gguf, n_vocab)?;
                Kind::Spm(Box::new(Spm::new(&texts, scores, byte_tokens(&by_text))))
            }
        };
        Ok(Tokenizer {
            kind,
            name: match gguf.opt_str("tokenizer.ggml.pre")? {
                Some(pre) if is_bpe => format!("{model} ({pre})"),
                _ => model.to_string(),
            },
            types,
            pieces,
            piece_ends,
            specials,
            ids,
            eog,
            add_bos: (gguf.opt_bool("tokenizer.ggml.add_bos_token")?)
                .unwrap_or(family.is_none_or(|f| f.add_bos)),
            add_eos: gguf
                .opt_bool("tokenizer.ggml.add_eos_token")?
                .unwrap_or(false),
            add_space_prefix: (gguf.opt_bool("tokenizer.ggml.add_space_prefix")?)
                .unwrap_or(!is_bpe),
            words: Mutex::new(Words::default()),
        })
    }

    /// Kind and pre-tokenizer, such as `gpt2 (qwen2)`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of tokens.
    pub fn n_vocab(&self) -> usize {
        self.types.len()
    }

    /// Token ids of `text`.
    ///
    /// `add_special`: put BOS in front and EOS at the end where the model wants them. `parse_special`: control
    /// tokens that are written out in the text (`<|im_end|>`) become these tokens; without it they are ordinary text.
    /// User-defined tokens are recognised either way.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 4 + 2);
        if add_special && self.add_bos {
            out.extend(self.ids.bos);
        }
        let mut fresh = Words::default();
        let mut kept = match self.words.try_lock() {
            Ok(kept) => Some(kept),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let words = kept.as_deref_mut().unwrap_or(&mut fresh);
        let mut scratch = spm::Scratch::default();
        let mut after_special = true;
        for fragment in self.specials.partition(text, parse_special) {
            match (fragment, &self.kind) {
                (Fragment::Token(id), _) => {
                    out.push(id);
                    after_special = true;
                }
                (Fragment::Text(range), _) if range.is_empty() => {}
                (Fragment::Text(range), Kind::Bpe(bpe)) => {
                    bpe.encode(&text[range], words, &mut out);
                }
                (Fragment::Text(range), Kind::Spm(spm)) => {
                    let mut spaced = text[range].replace(' ', spm::SPACE);
                    if self.add_space_prefix && after_special {
                        spaced.insert_str(0, spm::SPACE);
                    }
                    spm.encode(&spaced, words, &mut scratch, &mut out);
                    after_special = false;
                }
            }
        }
        if add_special && self.add_eos {
            out.extend(self.ids.eos);
        }
        out
    }

    /// Token ids of a rendered chat prompt: special tokens are parsed, and BOS is put in front where the model wants it
    /// and the template has not written it already.
    pub fn encode_prompt(&self, text: &str) -> Vec<u32> {
        let mut ids = self.encode(text, false, true);
        if let Some(bos) = self.ids.bos.filter(|_| self.add_bos)
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// The bytes a token stands for: for control and user-defined tokens their text, nothing for unused tokens and
    /// ids outside the vocabulary. May be part of a character only.
    pub fn piece(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.piece_ends.get(id) else {
            return &[];
        };
        let start = match id {
            0 => 0,
            _ => self.piece_ends[id - 1],
        };
        &self.pieces[start as usize..end as usize]
    }

    /// Text of `ids`. `skip_special` leaves out control and unknown tokens. Where the tokenizer puts a space in front
    /// of a text, that space is taken away again. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// To show tokens one by one, use [`Tokenizer::stream`]; it keeps the leading space.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        let mut strip = self.add_space_prefix;
        for &id in ids {
            if skip_special && self.is_special(id) {
                continue;
            }
            let piece = self.piece(id);
            bytes.extend_from_slice(match piece {
                [b' ', rest @ ..] if strip && !self.is_special(id) => rest,
                _ => piece,
            });
            strip = strip && self.is_special(id);
        }
        match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        }
    }

    /// Text of tokens as they come, whole characters only.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
    }

    /// Id of the token whose text in the vocabulary is exactly this (byte-level tokens in their own alphabet).
    pub fn token_id(&self, text: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bpe(bpe) => bpe.id(text),
            Kind::Spm(spm) => spm.id(text),
        }
    }

    /// Type of a token; `Undefined` outside the vocabulary.
    pub fn token_type(&self, id: u32) -> TokenType {
        (self.types.get(id as usize).copied()).unwrap_or(TokenType::Undefined)
    }

    /// Whether this is a control token.
    pub fn is_control(&self, id: u32) -> bool {
        self.token_type(id) == TokenType::Control
    }

    /// Whether this is a control or the unknown token.
    fn is_special(&self, id: u32) -> bool {
        matches!(self.token_type(id), TokenType::Control | TokenType::Unknown)
    }

    /// Whether this token ends a generation.
    pub fn is_eog(&self, id: u32) -> bool {
        self.eog.get(id as usize).copied().unwrap_or(false)
    }

    /// All tokens that end a generation.
    pub fn eog_ids(&self) -> Vec<u32> {
        let ids = self.eog.iter().zip(0u32..).filter(|(eog, _)| **eog);
        ids.map(|(_, id)| id).collect()
    }

    /// Ids of the tokens with a role.
    pub fn ids(&self) -> &SpecialIds {
        &self.ids
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<u32> {
        self.ids.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<u32> {
        self.ids.eos
    }

    /// End of turn.
    pub fn eot(&self) -> Option<u32> {
        self.ids.eot
    }

    /// Whether a text gets BOS in front.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether a text gets EOS at its end.
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }

    /// Whether a text gets a space in front.
    pub fn add_space_prefix(&self) -> bool {
        self.add_space_prefix
    }

    /// Text of BOS, empty without one.
    pub fn bos_text(&self) -> String {
        self.ids.bos.map_or(String::new(), |id| self.text(id))
    }

    /// Text of EOS, empty without one.
    pub fn eos_text(&self) -> String {
        self.ids.eos.map_or(String::new(), |id| self.text(id))
    }

    fn text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.piece(id)).into_owned()
    }
}

fn read_types(gguf: &Gguf, n_vocab: usize) -> Result<Vec<TokenType>, Error> {
    let Some(values) = gguf.opt_arr_i64(KEY_TYPES)? else {
        return Ok(vec![TokenType::Normal; n_vocab]);
    };
    check_length(KEY_TYPES, n_vocab, values.len())?;
    Ok((values.into_iter().take(n_vocab))
        .map(TokenType::from_file)
        .collect())
}

fn read_scores(gguf: &Gguf, n_vocab: usize) -> Result<Vec<f32>, Error> {
    let Some(scores) = gguf.opt_arr_f32(KEY_SCORES)? else {
        return Ok(vec![0.0; n_vocab]);
    };
    check_length(KEY_SCORES, n_vocab, scores.len())?;
    Ok(scores[..n_vocab].to_vec())
}

/// Arrays may be longer than the vocabulary (as llama.cpp has it), not shorter.
fn check_length(key: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if got < expected {
        return Err(Error::Length { key, expected, got });
    }
    Ok(())
}

/// Corrects the types of well-known tokens that converters get wrong, and returns which tokens end a generation.
fn mark_special(
    ids: &SpecialIds,
    types: &mut [TokenType],
    find: &dyn Fn(&[&str]) -> Option<u32>,
) -> Vec<bool> {
    let mut eog = vec![false; types.len()];
    let roles = [
        (EOT_NAMES, ids.eot),
        (EOM_NAMES, ids.eom),
        (FIM_PREFIX_NAMES, ids.fim_prefix),
        (FIM_SUFFIX_NAMES, ids.fim_suffix),
        (FIM_MIDDLE_NAMES, ids.fim_middle),
        (FIM_PAD_NAMES, ids.fim_pad),
        (FIM_REPO_NAMES, ids.fim_repo),
        (FIM_SEP_NAMES, ids.fim_sep),
    ];
    for (names, id) in roles {
        // Only a token found by its name is known to be one.
        if let Some(id) = id.filter(|&id| names.iter().any(|n| find(&[n]) == Some(id))) {
            types[id as usize] = TokenType::Control;
        }
    }
    for name in EOG_NAMES {
        if let Some(id) = find(&[name]) {
            eog[id as usize] = true;
            types[id as usize] = TokenType::Control;
        }
    }
    for name in SHOWN_NAMES {
        if let Some(id) = find(&[name]) {
            types[id as usize] = TokenType::UserDefined;
        }
    }
    let ending = [
        ids.fim_pad,
        ids.fim_repo,
        ids.fim_sep,
        ids.eos,
        ids.eot,
        ids.eom,
    ];
    for id in ending.into_iter().flatten() {
        eog[id as usize] = true;
    }
    // In the harmony format and its kin <|end|> only ends a message.
    let has = |name: &str| find(&[name]).is_some();
    let harmony = (has("<|return|>") && (has("<|call|>") || has("<|calls|>")))
        || (has("<|flush|>") && (has("<|call|>") || has("<|calls|>")));
    if let Some(end) = find(&["<|end|>"]).filter(|_| harmony) {
        eog[end as usize] = false;
        types[end as usize] = TokenType::UserDefined;
    }
    eog
}

/// Bytes of every token and where each ends.
fn pieces(
    texts: &[String],
    types: &[TokenType],
    is_bpe: bool,
) -> Result<(Vec<u8>, Vec<u32>), Error> {
    let byte_of: AHashMap<char, u8> = (bpe::byte_alphabet().into_iter()).zip(0u8..=255).collect();
    let mut pieces = Vec::with_capacity(texts.iter().map(String::len).sum());
    let mut ends = Vec::with_capacity(texts.len());
    let mut utf8 = [0; 4];
    for (id, (text, ty)) in texts.iter().zip(types).enumerate() {
        match ty {
            TokenType::Control | TokenType::UserDefined | TokenType::Unknown => {
                pieces.extend_from_slice(text.as_bytes());
            }
            TokenType::Byte => match byte_token(text) {
                Some(byte) => pieces.push(byte),
                None => {
                    return Err(Error::ByteToken {
                        id,
                        text: text.clone(),
                    });
                }
            },
            TokenType::Normal if is_bpe => {
                for c in text.chars() {
                    match byte_of.get(&c) {
                        Some(&byte) => pieces.push(byte),
                        // Not byte-level after all: the character itself.
                        None => pieces.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes()),
                    }
                }
            }
            TokenType::Normal => {
                pieces.extend_from_slice(text.replace(spm::SPACE, " ").as_bytes());
            }
            TokenType::Unused | TokenType::Undefined => {}
        }
        match u32::try_from(pieces.len()) {
            Ok(end) => ends.push(end),
            Err(_) => return Err(Error::TooManyTokens { got: texts.len() }),
        }
    }
    Ok((pieces, ends))
}

/// The byte that `<0x0A>` stands for.
fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// Byte tokens of a SentencePiece vocabulary; single characters stand in where they are missing.
fn byte_tokens(by_text: &AHashMap<&str, usize>) -> [Option<u32>; 256] {
    std::array::from_fn(|b| {
        let named = by_text.get(format!("<0x{b:02X}>").as_str());
        let plain = || {
            let c = char::from(b as u8);
            c.is_ascii().then(|| by_text.get(c.to_string().as_str()))?
        };
        named.or_else(plain).map(|&id| id as u32)
    })
}

fn special_tokens(texts: &[String], types: &[TokenType], strips_right: bool) -> Vec<Special> {
    let mut out = Vec::new();
    for (id, (text, ty)) in texts.iter().zip(types).enumerate() {
        let always = match ty {
            TokenType::UserDefined => true,
            TokenType::Control | TokenType::Unknown => false,
            _ => continue,
        };
        out.push(Special {
            id: id as u32,
            text: text.clone(),
            always,
            strips_right: strips_right
                && !matches!(text.as_str(), "<unk>" | "<s>" | "<|endoftext|>"),
        });
    }
    out
}
