//! SentencePiece-style tokenising by scores, as llama.cpp does it for `tokenizer.ggml.model = llama`.
//!
//! The text starts as single characters; of all neighbours whose concatenation is a token, the pair with the
//! highest score (the leftmost on a tie) is joined, until none is left. What is no token then is spelled in byte
//! tokens. (The Unigram model of the `tokenizers` library finds the best segmentation as a whole, which
//! differs, and its BPE takes merges by rank, which GGUF files of this kind do not carry.)

use std::collections::BinaryHeap;

use ahash::AHashMap;

use super::words::Words;

/// U+2581, which stands for a space in token texts.
pub(super) const SPACE: &str = "\u{2581}";

pub(super) struct Spm {
    ids: AHashMap<String, u32>,
    scores: Vec<f32>,
    /// Byte tokens; the unknown token (or nothing) where the vocabulary lacks one.
    bytes: [Option<u32>; 256],
    /// Length in bytes of the longest token: longer pairs need no look-up.
    max_bytes: usize,
    /// Characters that some token has directly before a space sign. Everywhere else a space sign starts a
    /// stretch of text that merges with nothing before it, so that stretches can be tokenised one by one.
    before_space: Vec<char>,
}

#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    /// Neighbours; `usize::MAX` at the ends.
    prev: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

/// A pair that may be joined: `right` directly follows `left`, and together they span `n_bytes`.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    n_bytes: usize,
}

impl PartialEq for Pair {
    fn eq(&self, other: &Pair) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Pair {}
impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Pair) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Pair {
    fn cmp(&self, other: &Pair) -> std::cmp::Ordering {
        // A total order even if a file holds NaN.
        (self.score.total_cmp(&other.score)).then(other.left.cmp(&self.left))
    }
}

/// Buffers that are kept between calls.
#[derive(Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Pair>,
}

impl Spm {
    /// `texts`, `scores` by id; `bytes[b]` is the token for byte `b`.
    pub fn new(texts: &[String], scores: Vec<f32>, bytes: [Option<u32>; 256]) -> Spm {
        let mut ids = AHashMap::with_capacity(texts.len());
        let mut before_space = Vec::new();
        for (id, text) in texts.iter().enumerate() {
            ids.insert(text.clone(), id as u32);
            let mut last = None;
            for c in text.chars() {
                if c == '\u{2581}' {
                    before_space.extend(last.filter(|&l| l != '\u{2581}'));
                }
                last = Some(c);
            }
        }
        before_space.sort_unstable();
        before_space.dedup();
        Spm {
            ids,
            scores,
            bytes,
            max_bytes: texts.iter().map(String::len).max().unwrap_or(0),
            before_space,
        }
    }

    /// Id of the token with this text.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Appends the ids of `text`, whose spaces are replaced by [`SPACE`] already.
    pub fn encode(&self, text: &str, words: &mut Words, scratch: &mut Scratch, out: &mut Vec<u32>) {
        let mut start = 0;
        let mut last = None;
        for (at, c) in text.char_indices() {
            if c == '\u{2581}'
                && last.is_some_and(|l| l != c && self.before_space.binary_search(&l).is_err())
            {
                self.encode_stretch(&text[start..at], words, scratch, out);
                start = at;
            }
            last = Some(c);
        }
        self.encode_stretch(&text[start..], words, scratch, out);
    }

    fn encode_stretch(
        &self,
        text: &str,
        words: &mut Words,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        words.ids(text, out, |text, out| self.merge(text, scratch, out));
    }

    fn merge(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        let symbols = &mut scratch.symbols;
        let queue = &mut scratch.queue;
        symbols.clear();
        queue.clear();
        for (i, (start, c)) in text.char_indices().enumerate() {
            symbols.push(Symbol {
                start,
                end: start + c.len_utf8(),
                prev: i.wrapping_sub(1),
                next: i + 1,
            });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        for right in 1..symbols.len() {
            self.offer(text, symbols, queue, right - 1, right);
        }
        while let Some(pair) = queue.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            // Either may have been joined with another since; an absorbed symbol is empty.
            let joined = left.end - left.start + (right.end - right.start);
            if left.end == left.start || right.end == right.start || joined != pair.n_bytes {
                continue;
            }
            symbols[pair.left].end = right.end;
            symbols[pair.left].next = right.next;
            symbols[pair.right].end = right.start;
            if right.next != NONE {
                symbols[right.next].prev = pair.left;
                self.offer(text, symbols, queue, pair.left, right.next);
            }
            if left.prev != NONE {
                self.offer(text, symbols, queue, left.prev, pair.left);
            }
        }
        let mut i = 0;
        while i != NONE && i < symbols.len() {
            let piece = &text[symbols[i].start..symbols[i].end];
            match self.ids.get(piece) {
                Some(&id) => out.push(id),
                // Joined symbols are tokens, so this is a single character.
                None => out.extend(piece.bytes().filter_map(|b| self.bytes[b as usize])),
            }
            i = symbols[i].next;
        }
    }

    fn offer(
        &self,
        text: &str,
        symbols: &[Symbol],
        queue: &mut BinaryHeap<Pair>,
        left: usize,
        right: usize,
    ) {
        let (start, end) = (symbols[left].start, symbols[right].end);
        if end - start > self.max_bytes {
            return;
        }
        if let Some(&id) = self.ids.get(&text[start..end]) {
            queue.push(Pair {
                score: self.scores[id as usize],
                left,
                right,
                n_bytes: end - start,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spm(tokens: &[(&str, f32)]) -> Spm {
        let texts: Vec<String> = tokens.iter().map(|t| t.0.to_string()).collect();
        let scores = tokens.iter().map(|t| t.1).collect();
        let bytes = std::array::from_fn(|b| Some(1000 + b as u32));
        Spm::new(&texts, scores, bytes)
    }

    fn encode(spm: &Spm, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        spm.encode(
            text,
            &mut Words::default(),
            &mut Scratch::default(),
            &mut out,
        );
        out
    }

    #[test]
    fn joins_the_best_score_first_and_the_leftmost_on_a_tie() {
        let s = spm(&[
            ("a", 0.0),
            ("b", 0.0),
            ("ab", -1.0),
            ("ba", -2.0),
            ("aa", -1.0),
            ("aab", -3.0),
        ]);
        assert_eq!(encode(&s, "aba"), [2, 0]);
        assert_eq!(encode(&s, "bab"), [1, 2]);
        // "aa" and "ab" tie in "aab": the left pair wins, then "aab" is a token.
        assert_eq!(encode(&s, "aab"), [5]);
        assert_eq!(encode(&s, "aaa"), [4, 0]);
    }

    #[test]
    fn unknown_characters_become_bytes() {
        let s = spm(&[("a", 0.0)]);
        assert_eq!(encode(&s, "aé"), [0, 1000 + 0xc3, 1000 + 0xa9]);
        assert_eq!(encode(&s, ""), [0u32; 0]);
    }

    #[test]
    fn stretches_split_only_where_no_token_spans() {
        // ".▁b" is a token, so a "." before a space sign must not end a stretch.
        let s = spm(&[
            ("a", 0.0),
            ("b", 0.0),
            (".", 0.0),
            ("▁", 0.0),
            ("▁b", -1.0),
            (".▁b", -2.0),
            ("a.", -5.0),
        ]);
        assert_eq!(encode(&s, "a.▁b"), [0, 5]);
        assert_eq!(encode(&s, "a▁b▁▁b"), [0, 4, 3, 4]);
    }
}
