//! Remembers the ids of words already tokenised: natural text repeats its words.

use ahash::AHashMap;

/// Longest word remembered, in bytes.
const MAX_BYTES: usize = 64;
/// Most words remembered; then all are forgotten.
const MAX_WORDS: usize = 1 << 16;

/// Ids by word.
#[derive(Default)]
pub(super) struct Words {
    known: AHashMap<Box<str>, Box<[u32]>>,
}

impl Words {
    /// Appends the ids of `word`, computed by `encode` unless they are known.
    pub fn ids(
        &mut self,
        word: &str,
        out: &mut Vec<u32>,
        encode: impl FnOnce(&str, &mut Vec<u32>),
    ) {
        if word.len() > MAX_BYTES {
            return encode(word, out);
        }
        if let Some(ids) = self.known.get(word) {
            return out.extend_from_slice(ids);
        }
        let from = out.len();
        encode(word, out);
        if self.known.len() >= MAX_WORDS {
            self.known.clear();
        }
        self.known.insert(word.into(), out[from..].into());
    }
}
