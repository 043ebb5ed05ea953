//! Finds special tokens in text before it is tokenised.
//!
//! As in llama.cpp, a longer special token is cut out of the whole text before a shorter one is looked for.

use std::ops::Range;

use aho_corasick::AhoCorasick;

/// A stretch of text, or a special token found in it.
#[derive(Debug, PartialEq)]
pub(super) enum Fragment {
    Text(Range<usize>),
    Token(u32),
}

/// A token that is matched as a whole.
pub(super) struct Special {
    pub id: u32,
    pub text: String,
    /// Matched even where special tokens are not to be parsed (user-defined tokens).
    pub always: bool,
    /// Swallows the ASCII white space that follows.
    pub strips_right: bool,
}

/// The special tokens of a vocabulary.
pub(super) struct Specials {
    /// Longest text first.
    tokens: Vec<Special>,
    finder: Option<AhoCorasick>,
}

impl Specials {
    pub fn new(mut tokens: Vec<Special>) -> Specials {
        tokens.retain(|t| !t.text.is_empty());
        tokens.sort_by(|a, b| b.text.len().cmp(&a.text.len()).then(a.id.cmp(&b.id)));
        let finder = match tokens.is_empty() {
            true => None,
            // Fails only beyond the automaton's size limit; then every token is looked for.
            false => AhoCorasick::new(tokens.iter().map(|t| &t.text)).ok(),
        };
        Specials { tokens, finder }
    }

    /// Cuts `text` into special tokens and what is between them.
    pub fn partition(&self, text: &str, parse_special: bool) -> Vec<Fragment> {
        let mut fragments = vec![Fragment::Text(0..text.len())];
        // One pass over the text finds which tokens occur at all: almost always none, or a few.
        let present: Vec<usize> = match &self.finder {
            None => (0..self.tokens.len()).collect(),
            Some(finder) => {
                let mut seen = vec![false; self.tokens.len()];
                for m in finder.find_overlapping_iter(text) {
                    seen[m.pattern().as_usize()] = true;
                }
                (0..seen.len()).filter(|&i| seen[i]).collect()
            }
        };
        for i in present {
            let special = &self.tokens[i];
            if !special.always && !parse_special {
                continue;
            }
            let mut cut = Vec::with_capacity(fragments.len());
            for fragment in fragments {
                match fragment {
                    Fragment::Text(range) => cut_out(text, range, special, &mut cut),
                    token => cut.push(token),
                }
            }
            fragments = cut;
        }
        fragments
    }
}

fn cut_out(text: &str, range: Range<usize>, special: &Special, out: &mut Vec<Fragment>) {
    let mut start = range.start;
    while let Some(found) = text[start..range.end].find(&special.text) {
        if found > 0 {
            out.push(Fragment::Text(start..start + found));
        }
        out.push(Fragment::Token(special.id));
        start += found + special.text.len();
        if special.strips_right {
            let rest = &text[start..range.end];
            let kept = rest.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']);
            start = range.end - kept.len();
        }
    }
    if start < range.end {
        out.push(Fragment::Text(start..range.end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials(rows: &[(&str, bool, bool)]) -> Specials {
        let tokens = rows.iter().zip(0..).map(|(row, id)| Special {
            id,
            text: row.0.to_string(),
            always: row.1,
            strips_right: row.2,
        });
        Specials::new(tokens.collect())
    }

    #[test]
    fn longest_first_wherever_it_stands() {
        let s = specials(&[
            ("<a>", false, false),
            ("<a><b>", false, false),
            ("b><c", false, false),
        ]);
        use Fragment::*;
        assert_eq!(
            s.partition("x<a><b><c><a>", true),
            [Text(0..1), Token(1), Text(7..10), Token(0)]
        );
        assert_eq!(s.partition("x<a>", false), [Text(0..4)]);
        assert_eq!(s.partition("", true), [Text(0..0)]);
    }

    #[test]
    fn user_defined_tokens_are_always_cut_out() {
        let s = specials(&[("<u>", true, false), ("<c>", false, true)]);
        use Fragment::*;
        assert_eq!(s.partition("<c> <u>", false), [Text(0..4), Token(0)]);
        assert_eq!(s.partition("<c> \n<u>", true), [Token(1), Token(0)]);
        assert_eq!(s.partition("<c> \n", true), [Token(1)]);
    }
}
