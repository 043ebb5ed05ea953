//! Pre-tokenizers: how text is cut into words before byte-level merges.
//!
//! A pre-tokenizer is a list of patterns, each applied to the pieces the ones before it left; both matches and
//! the text between them become pieces. The patterns are those of the models' `tokenizer.json` files, named as
//! in the GGUF key `tokenizer.ggml.pre`.
//!
//! Most end in the alternatives `\s+(?!\S)|\s+`: a run of white space leaves its last character to the word that
//! follows. Look-ahead would cost us the linear-time regex engine, so the patterns here end in `\s+`
//! and [`Splitter::split`] hands the last character back.

use regex::Regex;

/// Rules of one family of models.
pub(super) struct Family {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A word that is a token as it stands is not merged from its parts.
    pub ignore_merges: bool,
    /// Whether BOS is added where the file does not say.
    pub add_bos: bool,
    /// Text is put into Unicode normal form C first.
    pub nfc: bool,
}

/// Families with `ignore_merges`, `add_bos` and `nfc` unset.
const fn plain(names: &'static [&'static str], patterns: &'static [&'static str]) -> Family {
    Family {
        names,
        patterns,
        ignore_merges: false,
        add_bos: false,
        nfc: false,
    }
}

const GPT2: &str = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const LLAMA3: &str = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN2: &str = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN35: &str = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+"##;
const SEED_CODER: &str = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+";
const BAILING: &str = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// The table: a row per family.
const FAMILIES: &[Family] = &[
    Family {
        nfc: true,
        ..plain(&["qwen2"], &[QWEN2])
    },
    plain(&["qwen35"], &[QWEN35]),
    plain(
        &[
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    Family {
        ignore_merges: true,
        add_bos: true,
        ..plain(
            &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
            ],
            &[LLAMA3],
        )
    },
    plain(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    Family {
        ignore_merges: true,
        ..plain(&["glm4", "glm5"], &[LLAMA3])
    },
    plain(
        &[
            "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum",
            "exaone4",
        ],
        &[GPT2],
    ),
    plain(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[r"\p{N}", GPT2],
    ),
    plain(
        &["falcon"],
        &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    ),
    plain(
        &["default"],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ),
    plain(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[GPT4O]),
    Family {
        ignore_merges: true,
        add_bos: true,
        ..plain(&["tekken"], &[TEKKEN])
    },
    plain(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        &[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK3],
    ),
    plain(
        &["deepseek-coder"],
        &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[一-龥ࠀ-一가-\u{d7ff}]+",
            r"\p{N}",
        ],
    ),
    plain(&["seed-coder"], &[SEED_CODER]),
    plain(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    plain(&["poro-chat", "bloom", "gpt3-finnish"], &[BLOOM]),
    plain(&["viking"], &[BLOOM, r"\p{N}"]),
];

impl Family {
    /// The family with this name in `tokenizer.ggml.pre`.
    pub fn find(name: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|f| f.names.contains(&name))
    }

    /// All names, for the error about an unknown one.
    pub fn all_names() -> String {
        let names: Vec<&str> = FAMILIES.iter().flat_map(|f| f.names).copied().collect();
        names.join(", ")
    }

    pub fn splitter(&self) -> Splitter {
        let rules = self.patterns.iter().map(|pattern| Rule {
            regex: Regex::new(pattern).expect("the table's patterns compile"),
            hands_back: pattern.ends_with(r"|\s+"),
            newlines_apart: pattern.contains(r"\s*[\r\n]"),
        });
        Splitter {
            rules: rules.collect(),
        }
    }
}

struct Rule {
    regex: Regex,
    /// The pattern ends in `\s+`, which stands for `\s+(?!\S)|\s+`.
    hands_back: bool,
    /// Runs that end in a newline are matched by an alternative of their own, which hands nothing back.
    newlines_apart: bool,
}

/// Compiled patterns of a family.
pub(super) struct Splitter {
    rules: Vec<Rule>,
}

impl Splitter {
    /// Calls `word` with every piece of `text`, in order. The pieces together are `text`.
    pub fn split<'t>(&self, text: &'t str, word: &mut dyn FnMut(&'t str)) {
        split_by(&self.rules, text, word);
    }
}

fn split_by<'t>(rules: &[Rule], text: &'t str, word: &mut dyn FnMut(&'t str)) {
    let Some((rule, later)) = rules.split_first() else {
        if !text.is_empty() {
            word(text);
        }
        return;
    };
    let mut done = 0;
    while let Some(m) = rule.regex.find_at(text, done) {
        let end = match rule.hands_back {
            true => rule.end_after_handing_back(text, m.start(), m.end()),
            false => m.end(),
        };
        if m.start() > done {
            split_by(later, &text[done..m.start()], word);
        }
        split_by(later, &text[m.start()..end], word);
        done = end; // no pattern matches the empty string, so this advances
    }
    if done < text.len() {
        split_by(later, &text[done..], word);
    }
}

impl Rule {
    /// End of the match `start..end` as the look-ahead would have it: a run of white space of two or more characters
    /// before something else is one character shorter.
    fn end_after_handing_back(&self, text: &str, start: usize, end: usize) -> usize {
        let last = match text[start..end].chars().next_back() {
            Some(c) if c.is_whitespace() => c,
            _ => return end,
        };
        if self.newlines_apart && matches!(last, '\r' | '\n') {
            return end;
        }
        let followed = text[end..]
            .chars()
            .next()
            .is_some_and(|c| !c.is_whitespace());
        let shorter = end - last.len_utf8();
        if followed && shorter > start {
            shorter
        } else {
            end
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(family: &str, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        let splitter = Family::find(family).unwrap().splitter();
        splitter.split(text, &mut |w| out.push(w.to_string()));
        assert_eq!(out.concat(), text);
        out
    }

    #[test]
    fn white_space_hands_back_its_last_character() {
        assert_eq!(words("qwen2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(words("qwen2", "a b  "), ["a", " b", "  "]);
        assert_eq!(words("qwen2", "a \n\n  b"), ["a", " \n\n", " ", " b"]);
        assert_eq!(words("qwen2", "\t\tx"), ["\t", "\tx"]);
        assert_eq!(words("qwen2", "\t\t1"), ["\t", "\t", "1"]);
        assert_eq!(words("gpt-2", "a\n\n  b"), ["a", "\n\n ", " b"]);
        assert_eq!(words("gpt-2", "a\nb"), ["a", "\n", "b"]);
        assert_eq!(words("gpt-2", "  "), ["  "]);
    }

    #[test]
    fn digits_and_contractions() {
        assert_eq!(
            words("qwen2", "I'LL 2024"),
            ["I", "'LL", " ", "2", "0", "2", "4"]
        );
        assert_eq!(words("llama-bpe", "x12345"), ["x", "123", "45"]);
        assert_eq!(words("smollm", "a 12"), ["a", " ", "1", "2"]);
        assert_eq!(words("falcon", "a 12345!"), ["a", " ", "123", "45", "!"]);
    }

    #[test]
    fn every_family_compiles_and_loses_nothing() {
        let text = "Ünïcödé 🚀 don't\r\n\r\n  x=1234567;\t 你好，世界。 ﷽ \u{200b}\u{301} '";
        for family in FAMILIES {
            for name in family.names {
                assert_eq!(words(name, text).concat(), text, "{name}");
            }
        }
    }
}
