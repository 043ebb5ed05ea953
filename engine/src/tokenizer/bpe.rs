//! Byte-level BPE (`tokenizer.ggml.model = gpt2`): the merges are those of the `tokenizers` library.

use std::borrow::Cow;

use ahash::AHashMap;
use tokenizers::Model;
use tokenizers::models::bpe::BPE;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use super::error::Error;
use super::pre::{Family, Splitter};
use super::words::Words;

pub(super) struct ByteBpe {
    model: BPE,
    splitter: Splitter,
    nfc: bool,
    /// The printable character that stands for each byte in token texts.
    alphabet: [char; 256],
}

/// GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order.
pub(super) fn byte_alphabet() -> [char; 256] {
    let mut next = 0x100u32;
    std::array::from_fn(|b| match b as u8 {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(b as u8),
        _ => {
            let c = char::from_u32(next).expect("U+0100 to U+0143 are characters");
            next += 1;
            c
        }
    })
}

impl ByteBpe {
    /// `texts` are the tokens by id (all different), `merges` two texts with a space between, by rank.
    pub fn new(texts: &[String], merges: &[String], family: &Family) -> Result<ByteBpe, Error> {
        let vocab: AHashMap<String, u32> = (texts.iter().cloned()).zip(0u32..).collect();
        let mut pairs = Vec::with_capacity(merges.len());
        let mut joined = String::new();
        for (rank, merge) in merges.iter().enumerate() {
            // The first half may itself start with a space in vocabularies that are not byte-level.
            let mut cut = merge.char_indices().skip(1).filter(|&(_, c)| c == ' ');
            let Some((at, _)) = cut.next() else {
                return Err(Error::MergeShape {
                    rank,
                    got: merge.clone(),
                });
            };
            let (left, right) = (&merge[..at], &merge[at + 1..]);
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            for text in [left, right, &joined] {
                if !vocab.contains_key(text) {
                    return Err(Error::MergeToken {
                        rank,
                        merge: merge.clone(),
                        token: text.to_string(),
                    });
                }
            }
            pairs.push((left.to_string(), right.to_string()));
        }
        let model = BPE::builder()
            .vocab_and_merges(vocab, pairs)
            .cache_capacity(0)
            .ignore_merges(family.ignore_merges)
            .build()
            .map_err(|e| Error::Model(e.to_string()))?;
        let alphabet = byte_alphabet();
        let missing = alphabet
            .iter()
            .filter(|c| model.token_to_id(&c.to_string()).is_none());
        let missing = missing.count();
        if missing > 0 {
            tracing::warn!(
                "the vocabulary has no token for {missing} of the 256 bytes; text with them is dropped"
            );
        }
        Ok(ByteBpe {
            model,
            splitter: family.splitter(),
            nfc: family.nfc,
            alphabet,
        })
    }

    /// Id of the token with this text (in the byte alphabet).
    pub fn id(&self, text: &str) -> Option<u32> {
        self.model.token_to_id(text)
    }

    /// Appends the ids of `text`.
    pub fn encode(&self, text: &str, words: &mut Words, out: &mut Vec<u32>) {
        let text = if self.nfc {
            to_nfc(text)
        } else {
            Cow::Borrowed(text)
        };
        self.splitter.split(&text, &mut |word| {
            words.ids(word, out, |word, out| {
                let spelled: String = word.bytes().map(|b| self.alphabet[b as usize]).collect();
                // Without dropout and unknown token the library has no way to fail.
                if let Ok(tokens) = self.model.tokenize(&spelled) {
                    out.extend(tokens.iter().map(|t| t.id));
                }
            });
        });
    }
}

/// Unicode normal form C, without a copy where the text is in it already.
fn to_nfc(text: &str) -> Cow<'_, str> {
    if text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(text.nfc().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_is_gpt2s() {
        let a = byte_alphabet();
        assert_eq!(
            (a[b' ' as usize], a[b'\n' as usize], a[b'a' as usize]),
            ('Ġ', 'Ċ', 'a')
        );
        assert_eq!(
            (a[0], a[0x7f], a[0xa0], a[0xad], a[0xff]),
            ('Ā', 'ġ', 'ł', 'Ń', 'ÿ')
        );
        let mut all = a.to_vec();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 256);
    }
}
