//! Grammars that constrain generation: JSON schema, regular expressions, Lark and GBNF, by `llguidance`.
//!
//! [`GrammarVocab`] holds the vocabulary as a trie and is made once per model; it compiles [`Grammar`]s, each the state
//! of one sequence. Before sampling, [`Grammar::mask`] sets the logits of tokens that cannot follow to minus
//! infinity; after it, [`Grammar::accept`] takes the chosen one.

mod gbnf;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::tokenizer::{TokenType, Tokenizer};

/// A grammar that cannot be used, or a token that it does not allow.
#[allow(missing_docs)]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("gbnf grammar, line {line}: {what}")]
    Gbnf { line: usize, what: String },
    #[error("{kind}: {what}")]
    Compile { kind: &'static str, what: String },
    #[error("{kind} is {got} bytes long, at most {max}")]
    TooLong {
        kind: &'static str,
        got: usize,
        max: usize,
    },
    #[error("{kind}: brackets are nested too deeply, at most {max}")]
    TooDeep { kind: &'static str, max: usize },
    #[error("grammars need a token that ends a generation, and the vocabulary has none")]
    NoEnd,
    #[error("grammar state: {0}")]
    State(String),
}

/// Deepest nesting of brackets in a grammar: its parsers recurse.
const MAX_NESTING: usize = 150;

/// A vocabulary, ready for grammars.
pub struct GrammarVocab {
    factory: ParserFactory,
    /// Tokens with the same bytes as an earlier one: the trie knows one of them, and what is allowed for one is for all.
    twins: Arc<[(u32, u32)]>,
    ends: Arc<[u32]>,
}

impl GrammarVocab {
    /// Builds the trie of a vocabulary (some tenths of a second for 150,000 tokens).
    pub fn new(tokenizer: &Tokenizer) -> Result<GrammarVocab, Error> {
        let n_vocab = tokenizer.n_vocab() as u32;
        let mut ends = tokenizer.eog_ids();
        let eos = match (tokenizer.eos(), ends.first()) {
            (Some(eos), _) => eos,
            (None, Some(&end)) => end,
            (None, None) => return Err(Error::NoEnd),
        };
        ends.retain(|&id| id != eos);
        ends.insert(0, eos);
        let mut words = Vec::with_capacity(n_vocab as usize);
        let mut first_with = ahash::AHashMap::new();
        let mut twins = Vec::new();
        for id in 0..n_vocab {
            let piece = tokenizer.piece(id);
            let special = matches!(
                tokenizer.token_type(id),
                TokenType::Control | TokenType::Unknown
            ) || tokenizer.is_eog(id);
            let word = match special {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], piece].concat(),
                // The marker is no byte of any text; a token of this byte alone can only be part of broken UTF-8.
                false if piece.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
                false => piece.to_vec(),
            };
            if !word.is_empty()
                && let Some(&first) = first_with.get(&word)
            {
                twins.push((first, id));
            } else {
                first_with.insert(word.clone(), id);
            }
            words.push(word);
        }
        let mut info = TokRxInfo::new(n_vocab, eos);
        info.tok_bos = tokenizer.bos();
        let factory = guarded("vocabulary", || {
            let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
                .map_err(|e| e.to_string())?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        })?;
        Ok(GrammarVocab {
            factory,
            twins: twins.into(),
            ends: ends.into(),
        })
    }

    /// Text that is JSON by this schema. The empty schema means any object, as llama.cpp's server has it.
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar, Error> {
        let any_object = json!({"type": "object"});
        let schema = match schema {
            Value::Object(fields) if fields.is_empty() => &any_object,
            other => other,
        };
        check("json schema", &schema.to_string())?;
        let mut schema = schema.clone();
        if let Value::Object(fields) = &mut schema {
            // White space between tokens of JSON ends: a weak model would go on with it for ever.
            fields.entry("x-guidance").or_insert_with(
                || json!({"whitespace_pattern": r"\x20|\x0A{1,2}[\x20\x09]{0,20}"}),
            );
        }
        self.compile("json schema", TopLevelGrammar::from_json_schema(schema))
    }

    /// Text that a regular expression matches as a whole.
    pub fn regex(&self, pattern: &str) -> Result<Grammar, Error> {
        check("regular expression", pattern)?;
        self.compile("regular expression", TopLevelGrammar::from_regex(pattern))
    }

    /// Text by a grammar in `llguidance`'s dialect of Lark.
    pub fn lark(&self, source: &str) -> Result<Grammar, Error> {
        check("lark grammar", source)?;
        self.compile(
            "lark grammar",
            TopLevelGrammar::from_lark(source.to_string()),
        )
    }

    /// Text by a grammar in GBNF, starting at its rule `root`.
    pub fn gbnf(&self, source: &str) -> Result<Grammar, Error> {
        if source.len() > gbnf::MAX_SOURCE_BYTES {
            return Err(Error::TooLong {
                kind: "gbnf grammar",
                got: source.len(),
                max: gbnf::MAX_SOURCE_BYTES,
            });
        }
        let lark = gbnf::to_lark(source)?;
        self.compile("gbnf grammar", TopLevelGrammar::from_lark(lark))
    }

    fn compile(&self, kind: &'static str, grammar: TopLevelGrammar) -> Result<Grammar, Error> {
        let matcher = guarded(kind, || {
            let parser = (self.factory.create_parser(grammar)).map_err(|e| e.to_string())?;
            Ok(Matcher::new(Ok(parser)))
        })?;
        if let Some(what) = matcher.get_error() {
            return Err(Error::Compile { kind, what });
        }
        Ok(Grammar {
            matcher,
            twins: self.twins.clone(),
            ends: self.ends.clone(),
        })
    }
}

/// Runs a step of the grammar engine; a panic in it becomes an error.
fn guarded<T>(kind: &'static str, step: impl FnOnce() -> Result<T, String>) -> Result<T, Error> {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(what)) => Err(Error::Compile { kind, what }),
        Err(_) => Err(Error::Compile {
            kind,
            what: "the grammar engine failed".to_string(),
        }),
    }
}

/// Refuses sources that would exhaust the stack of a recursive parser.
fn check(kind: &'static str, source: &str) -> Result<(), Error> {
    let max = gbnf::MAX_SOURCE_BYTES;
    if source.len() > max {
        return Err(Error::TooLong {
            kind,
            got: source.len(),
            max,
        });
    }
    let mut depth = 0usize;
    for b in source.bytes() {
        match b {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_NESTING {
            return Err(Error::TooDeep {
                kind,
                max: MAX_NESTING,
            });
        }
    }
    Ok(())
}

/// The state of a grammar in one sequence. A clone goes its own way.
pub struct Grammar {
    matcher: Matcher,
    twins: Arc<[(u32, u32)]>,
    ends: Arc<[u32]>,
}

impl Clone for Grammar {
    fn clone(&self) -> Grammar {
        Grammar {
            matcher: self.matcher.deep_clone(),
            twins: self.twins.clone(),
            ends: self.ends.clone(),
        }
    }
}

impl Grammar {
    /// Sets the logits of all tokens that cannot come next to minus infinity. When the text is complete and nothing can
    /// follow, only the tokens that end a generation are left.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), Error> {
        let mut allowed = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|e| Error::State(e.to_string()))?;
        for &(first, second) in self.twins.iter() {
            if allowed.is_allowed(first) || allowed.is_allowed(second) {
                allowed.allow_token(first);
                allowed.allow_token(second);
            }
        }
        for (words, chunk) in allowed.as_slice().iter().zip(logits.chunks_mut(32)) {
            match *words {
                u32::MAX => {}
                0 => chunk.fill(f32::NEG_INFINITY),
                bits => {
                    for (i, logit) in chunk.iter_mut().enumerate() {
                        if bits >> i & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        // Rows that the model has and the vocabulary has not.
        let known = allowed.len().min(logits.len());
        logits[known..].fill(f32::NEG_INFINITY);
        Ok(())
    }

    /// Takes the token that was chosen. Fails, and leaves the grammar unusable, if it was not allowed.
    pub fn accept(&mut self, id: u32) -> Result<(), Error> {
        if self.matcher.is_stopped()
            && self.matcher.stop_reason().is_ok()
            && self.ends.contains(&id)
        {
            return Ok(());
        }
        self.matcher
            .consume_token(id)
            .map_err(|e| Error::State(e.to_string()))
    }

    /// How many of `ids`, from the first on, the grammar would take.
    pub fn validate(&mut self, ids: &[u32]) -> Result<usize, Error> {
        self.matcher
            .validate_tokens(ids)
            .map_err(|e| Error::State(e.to_string()))
    }

    /// Takes back the last `n` tokens accepted.
    pub fn rollback(&mut self, n: usize) -> Result<(), Error> {
        self.matcher
            .rollback(n)
            .map_err(|e| Error::State(e.to_string()))
    }

    /// Whether the text so far is complete (more may still be allowed).
    pub fn is_complete(&mut self) -> bool {
        if self.matcher.is_stopped() {
            return self.matcher.stop_reason().is_ok();
        }
        self.matcher.is_accepting().unwrap_or(false)
    }

    /// Whether nothing more can follow.
    pub fn is_stopped(&self) -> bool {
        self.matcher.is_stopped()
    }
}
