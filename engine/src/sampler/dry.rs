//! DRY ("don't repeat yourself"): a penalty on tokens that would prolong a repetition, growing with its length
//! (p-e-w, text-generation-webui pull request 5677).

use std::collections::VecDeque;

use ahash::AHashMap;

use super::params::SamplerParams;
use crate::tokenizer::Tokenizer;

/// Longest part of a breaker after its first token.
const MAX_TAIL: usize = 20;
/// Longest breaker, in characters.
const MAX_BREAKER_CHARS: usize = 40;

#[derive(Clone)]
pub(super) struct Dry {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    /// How many tokens are searched.
    last_n: usize,
    /// By token: what must follow it for a breaker to be complete (nothing, for most).
    breakers: AHashMap<u32, Vec<Vec<u32>>>,
    /// Newest first.
    recent: Vec<u32>,
    repeats: Vec<usize>,
    longest: AHashMap<u32, usize>,
}

impl Dry {
    /// `None` when the settings turn it off.
    pub fn new(params: &SamplerParams, tokenizer: Option<&Tokenizer>) -> Option<Dry> {
        let last_n = match params.dry_penalty_last_n {
            n if n < 0 => usize::MAX,
            n => n as usize,
        };
        if params.dry_multiplier == 0.0 || params.dry_base < 1.0 || last_n == 0 {
            return None;
        }
        let mut breakers: AHashMap<u32, Vec<Vec<u32>>> = AHashMap::new();
        for breaker in params
            .dry_sequence_breakers
            .iter()
            .filter(|b| !b.is_empty())
        {
            let short: String = breaker.chars().take(MAX_BREAKER_CHARS).collect();
            if let Some(tokenizer) = tokenizer {
                add_breaker(tokenizer, &short, &mut breakers);
            }
        }
        Some(Dry {
            multiplier: params.dry_multiplier,
            base: params.dry_base,
            allowed_length: params.dry_allowed_length.max(0) as usize,
            last_n,
            breakers,
            recent: Vec::new(),
            repeats: Vec::new(),
            longest: AHashMap::new(),
        })
    }

    /// How many past tokens it needs.
    pub fn n_history(&self) -> usize {
        self.last_n
    }

    /// Lowers the logits of tokens that would prolong a repetition of `history` (oldest first).
    pub fn apply(&mut self, history: &VecDeque<u32>, logits: &mut [f32]) {
        self.recent.clear();
        self.recent.extend(history.iter().rev().take(self.last_n));
        if self.recent.len() <= self.allowed_length {
            return;
        }
        // No repetition reaches across the last breaker.
        let limit = self.since_breaker();
        if limit < self.allowed_length {
            return;
        }
        common_prefixes(&self.recent, &mut self.repeats);
        self.longest.clear();
        for at in 1..self.recent.len() {
            let length = self.repeats[at].min(limit);
            if length >= self.allowed_length && length > 0 || self.allowed_length == 0 {
                // The end of the text also stands `at` tokens back, and there this token followed.
                let longest = self.longest.entry(self.recent[at - 1]).or_default();
                *longest = length.max(*longest);
            }
        }
        // Where the power would leave f32.
        let max_exponent = match self.base > 1.000_001 {
            true => (f32::MAX.ln() / self.base.ln()) as usize,
            false => usize::MAX,
        };
        for (&id, &length) in &self.longest {
            let alone = |tails: &Vec<Vec<u32>>| tails.iter().any(Vec::is_empty);
            if self.breakers.get(&id).is_some_and(alone) {
                continue;
            }
            if let Some(logit) = logits.get_mut(id as usize) {
                let exponent = (length - self.allowed_length).min(max_exponent);
                *logit -= self.multiplier * self.base.powi(exponent.min(i32::MAX as usize) as i32);
            }
        }
    }

    /// How many tokens were said since the end of the last breaker.
    fn since_breaker(&self) -> usize {
        for (i, id) in self.recent.iter().enumerate() {
            let Some(tails) = self.breakers.get(id) else {
                continue;
            };
            let complete = |tail: &&Vec<u32>| {
                tail.len() <= i
                    && (tail.iter().zip(self.recent[..i].iter().rev())).all(|(a, b)| a == b)
            };
            if let Some(longest) = tails.iter().filter(complete).map(Vec::len).max() {
                return i - longest;
            }
        }
        self.recent.len()
    }
}

/// For every position, how long the text from there equals the text from the start (the Z function); 0 for the start.
fn common_prefixes(text: &[u32], out: &mut Vec<usize>) {
    out.clear();
    out.resize(text.len(), 0);
    let (mut from, mut to) = (0, 0); // the match found so far that reaches farthest
    for i in 1..text.len() {
        let mut n = match i < to {
            true => out[i - from].min(to - i),
            false => 0,
        };
        while i + n < text.len() && text[n] == text[i + n] {
            n += 1;
        }
        out[i] = n;
        if i + n > to {
            (from, to) = (i, i + n);
        }
    }
}

/// Every token that holds the breaker, or ends in the start of it together with the tokens of the rest.
fn add_breaker(tokenizer: &Tokenizer, breaker: &str, breakers: &mut AHashMap<u32, Vec<Vec<u32>>>) {
    let bytes = breaker.as_bytes();
    // The rest of the breaker after each possible cut, tokenised once.
    let mut tails: Vec<Option<Vec<u32>>> = vec![None; bytes.len()];
    for id in 0..tokenizer.n_vocab() as u32 {
        if tokenizer.is_control(id) {
            continue;
        }
        let piece = tokenizer.piece(id);
        let entry = |tail: Vec<u32>, breakers: &mut AHashMap<u32, Vec<Vec<u32>>>| {
            let all = breakers.entry(id).or_default();
            if !all.contains(&tail) {
                all.push(tail);
            }
        };
        if piece.windows(bytes.len()).any(|w| w == bytes) {
            entry(Vec::new(), breakers);
            continue;
        }
        for cut in 1..bytes.len().min(piece.len() + 1) {
            if !breaker.is_char_boundary(cut) || !piece.ends_with(&bytes[..cut]) {
                continue;
            }
            let tail = tails[cut].get_or_insert_with(|| {
                let mut ids = tokenizer.encode(&breaker[cut..], false, false);
                ids.truncate(MAX_TAIL);
                ids
            });
            entry(tail.clone(), breakers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_prefixes_are_found() {
        let mut z = Vec::new();
        common_prefixes(&[1, 1, 2, 1, 1, 2, 1, 3], &mut z);
        assert_eq!(z, [0, 1, 0, 4, 1, 0, 1, 0]);
        common_prefixes(&[7; 6], &mut z);
        assert_eq!(z, [0, 5, 4, 3, 2, 1]);
        common_prefixes(&[], &mut z);
        assert!(z.is_empty());
    }
}
