//! From a sample to tokens, and back from tokens to places in its text.

use super::sample::{Question, Sample};
use anyhow::Result;
use mneme_engine::memory::decider::sentence_ends;
use mneme_engine::tokenizer::Tokenizer;
use std::ops::Range;

/// How text and question are put to a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Style {
    /// `records` where the vocabulary has its special tokens, else `plain`.
    Auto,
    /// The form the language of records is trained in: text, user token, question, assistant token.
    Records,
    /// Text, then "Question:" and "Answer:" lines; for any model.
    Plain,
}

/// Special tokens of the language of records.
const RECORDS: [&str; 4] = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"];

/// The form in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// See [`Style::Records`].
    Records {
        /// The token before a question.
        user: u32,
        /// The token before an answer.
        assistant: u32,
    },
    /// See [`Style::Plain`].
    Plain,
}

impl Form {
    /// The form `style` asks for with this vocabulary.
    pub fn of(style: Style, tokenizer: &Tokenizer) -> Result<Form> {
        let ids = RECORDS.map(|name| tokenizer.token_id(name));
        let has_all = ids.iter().all(Option::is_some);
        match (style, ids) {
            (Style::Auto | Style::Records, [_, Some(user), Some(assistant), _]) if has_all => {
                Ok(Form::Records { user, assistant })
            }
            (Style::Records, _) => anyhow::bail!(
                "--style records: the vocabulary lacks one of {}",
                RECORDS.join(" ")
            ),
            _ => Ok(Form::Plain),
        }
    }

    /// Tokens of a question, up to where the answer begins.
    pub fn question(self, tokenizer: &Tokenizer, q: &Question) -> Vec<u32> {
        match self {
            Form::Records { user, assistant } => {
                let mut ids = vec![user];
                ids.extend(tokenizer.encode(&q.text, false, false));
                ids.push(assistant);
                ids.extend(tokenizer.encode(&q.prefix, false, false));
                ids
            }
            Form::Plain if q.text.is_empty() => tokenizer.encode(&q.prefix, false, false),
            Form::Plain => {
                let text = format!("\n\nQuestion: {}\nAnswer:{}", q.text, q.prefix);
                tokenizer.encode(&text, false, false)
            }
        }
    }

    /// Whether an answer ends with its line.
    pub fn one_line(self) -> bool {
        self == Form::Plain
    }
}

/// A text as tokens that know where they came from.
pub struct Document {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Byte of the text each token begins at, and one more entry for its end.
    starts: Vec<usize>,
}

impl Document {
    /// Tokens of `sample`'s text. The records form encodes sentence by sentence, as the trainer
    /// does: tokens never span two of them.
    pub fn new(tokenizer: &Tokenizer, form: Form, sample: &Sample) -> Document {
        let text = &sample.text;
        let by_sentence = form != Form::Plain && !sample.segments.is_empty();
        let mut pieces: Vec<&str> = Vec::new();
        let mut at = 0;
        if by_sentence {
            for s in &sample.segments {
                pieces.push(&text[at..s.range.end]);
                at = s.range.end;
            }
        }
        pieces.push(&text[at..]);
        let mut doc = Document {
            ids: Vec::new(),
            starts: Vec::new(),
        };
        let mut end = 0;
        for (i, piece) in pieces.into_iter().enumerate() {
            let start = end;
            end += piece.len();
            let ids = tokenizer.encode(piece, i == 0, false);
            // A space the tokenizer puts in front, or a normaliser that shortens: count from the
            // end, where offsets agree again.
            let len = |id: u32| match tokenizer.is_control(id) {
                true => 0,
                false => tokenizer.piece(id).len(),
            };
            let total: usize = ids.iter().map(|&id| len(id)).sum();
            let mut left = total;
            for &id in &ids {
                doc.starts.push(end.saturating_sub(left).max(start));
                left -= len(id);
            }
            doc.ids.extend(ids);
        }
        doc.starts.push(text.len());
        doc
    }

    /// Tokens that hold any of these bytes.
    pub fn tokens(&self, bytes: &Range<usize>) -> Range<usize> {
        let n = self.ids.len();
        let start = (0..n).find(|&i| self.starts[i + 1] > bytes.start);
        let start = start.unwrap_or(n);
        let end = (start..n).find(|&i| self.starts[i] >= bytes.end);
        start..end.unwrap_or(n)
    }

    /// Number of tokens up to the end of each of `ends`, ascending bytes.
    pub fn boundaries(&self, ends: &[usize]) -> Vec<usize> {
        let mut i = 0;
        let mut out = Vec::with_capacity(ends.len());
        for &end in ends {
            while i < self.ids.len() && self.starts[i] < end {
                i += 1;
            }
            out.push(i);
        }
        out
    }

    /// Number of tokens up to the end of each sentence, by the engine's rule.
    pub fn sentence_ends(&self, tokenizer: &Tokenizer) -> Vec<usize> {
        let piece = |i: usize| self.ids.get(i).map_or(&b""[..], |&id| tokenizer.piece(id));
        (0..self.ids.len())
            .filter(|&t| {
                let before = t.checked_sub(1).map(piece);
                sentence_ends(before, piece(t), piece(t + 1))
            })
            .map(|t| t + 1)
            .collect()
    }

    /// The same text with the tokens `extra` after each of `boundaries`, ascending.
    pub fn with(&self, extra: &[u32], boundaries: &[usize]) -> Document {
        let mut out = Document {
            ids: Vec::new(),
            starts: Vec::new(),
        };
        let mut next = boundaries.iter().peekable();
        for i in 0..=self.ids.len() {
            while next.next_if(|&&b| b <= i).is_some() {
                for &id in extra {
                    out.ids.push(id);
                    out.starts.push(self.starts[i]);
                }
            }
            out.starts.push(self.starts[i]);
            out.ids.extend(self.ids.get(i));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(pieces: &[&str]) -> Document {
        let mut starts = vec![0];
        for p in pieces {
            starts.push(starts[starts.len() - 1] + p.len());
        }
        Document {
            ids: (0..pieces.len() as u32).collect(),
            starts,
        }
    }

    #[test]
    fn bytes_and_tokens() {
        // "Anna lives here. Bert too."
        let doc = document(&["An", "na", " lives", " here", ".", " Bert", " too", "."]);
        assert_eq!(doc.tokens(&(0..16)), 0..5);
        assert_eq!(doc.tokens(&(17..26)), 5..8, "the space belongs to its word");
        assert_eq!(doc.tokens(&(3..4)), 1..2);
        assert_eq!(doc.boundaries(&[16, 26]), [5, 8]);
        let gist = doc.with(&[90, 91], &[5, 8]);
        assert_eq!(gist.ids, [0, 1, 2, 3, 4, 90, 91, 5, 6, 7, 90, 91]);
        assert_eq!(gist.tokens(&(0..16)), 0..5);
        assert_eq!(gist.tokens(&(17..26)), 7..10);
        assert_eq!(gist.boundaries(&[16]), [5]);
    }
}
