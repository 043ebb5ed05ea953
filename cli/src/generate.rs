//! One answer: read the prompt, then sample, show and feed tokens until something says stop.

use crate::interrupt::{self, Interrupted};
use crate::progress::{Progress, Unit};
use anyhow::Result;
use mneme_engine::grammar::Grammar;
use mneme_engine::sampler::Sampler;
use mneme_engine::{Engine, Error, Feed, Output, Sequence, Want};
use serde::Serialize;
use std::time::Instant;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stop {
    /// The model said a token that ends a text, or the grammar allows no more.
    Eos,
    /// One of the stop texts appeared.
    Word,
    /// As many tokens as were asked for.
    Limit,
    /// The context is full.
    Context,
    /// Ctrl-C.
    Interrupted,
}

/// What limits an answer.
pub struct Limits<'a> {
    /// Most tokens; `None` for no limit.
    pub n_predict: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stops: &'a [String],
    /// Show control tokens.
    pub special: bool,
}

/// An answer.
pub struct Answer {
    /// Its tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Its text, as shown.
    pub text: String,
    /// Why it ended.
    pub stop: Stop,
    /// Seconds from the first token to the last.
    pub seconds: f64,
}

/// A conversation's parts that an answer changes.
pub struct Speaker<'a> {
    /// The engine.
    pub engine: &'a mut Engine,
    /// What has been read.
    pub seq: &'a mut Sequence,
    /// Chooses tokens.
    pub sampler: &'a mut Sampler,
    /// What the answer must look like.
    pub grammar: Option<Grammar>,
    /// Tokens said and not yet read: the last of the answer before.
    pub pending: Vec<u32>,
}

impl Speaker<'_> {
    /// Reads what is pending and `tokens`, and returns what the next token is chosen from. Shows a
    /// bar when it takes long; Ctrl-C is an error, and what was read until then stays read.
    pub fn read(&mut self, tokens: &[u32], n_batch: usize) -> Result<Output> {
        let want = self.want();
        self.read_for(tokens, n_batch, want)
    }

    /// As [`Speaker::read`], for tokens that an answer will not follow.
    pub fn read_on(&mut self, tokens: &[u32], n_batch: usize) -> Result<()> {
        self.read_for(tokens, n_batch, Want::None).map(|_| ())
    }

    fn read_for(&mut self, tokens: &[u32], n_batch: usize, last: Want) -> Result<Output> {
        let mut all = std::mem::take(&mut self.pending);
        all.extend_from_slice(tokens);
        let mut bar = Progress::new("reading", all.len() as u64, Unit::Count);
        let mut output = Output::default();
        let mut done = 0;
        while done < all.len() {
            if interrupt::pressed() {
                return Err(Interrupted.into());
            }
            let n = n_batch.min(all.len() - done);
            let want = match done + n == all.len() {
                true => last,
                false => Want::None,
            };
            output = self.feed(&all[done..done + n], want)?;
            done += n;
            bar.set(done as u64);
        }
        // What was pending was accepted when it was said.
        tokens.iter().for_each(|&id| self.sampler.accept(id));
        Ok(output)
    }

    /// What choosing the next token takes.
    fn want(&self) -> Want {
        let n_best = self.sampler.n_best().filter(|_| self.grammar.is_none());
        n_best.map_or(Want::Last, Want::Best)
    }

    fn feed(&mut self, tokens: &[u32], want: Want) -> Result<Output, Error> {
        let feed = Feed {
            seq: self.seq,
            tokens,
            want,
        };
        Ok(self.engine.step_or_blame(&mut [feed])?.swap_remove(0))
    }

    /// The next token by sampler and grammar.
    fn choose(&mut self, output: &mut Output) -> Result<u32> {
        match (output, &mut self.grammar) {
            (Output::Best(best), _) => Ok(self.sampler.sample_best(best)),
            (Output::Rows(logits), None) => Ok(self.sampler.sample(logits)),
            (Output::Rows(logits), Some(grammar)) => {
                grammar.mask(logits)?;
                let id = self.sampler.sample(logits);
                grammar.accept(id)?;
                Ok(id)
            }
        }
    }

    /// Goes on from `output`, telling `show` every piece of text as it becomes certain. The last
    /// token of the answer is left pending.
    pub fn answer(
        &mut self,
        mut output: Output,
        limits: &Limits<'_>,
        mut show: impl FnMut(&str) -> Result<()>,
    ) -> Result<Answer> {
        let start = Instant::now();
        let model = self.engine.model.clone();
        let tokenizer = &model.tokenizer;
        let mut stream = tokenizer.stream();
        let mut filter = StopFilter::new(limits.stops);
        let mut answer = Answer {
            tokens: Vec::new(),
            text: String::new(),
            stop: Stop::Limit,
            seconds: 0.0,
        };
        while limits.n_predict.is_none_or(|n| answer.tokens.len() < n) {
            if interrupt::pressed() {
                answer.stop = Stop::Interrupted;
                break;
            }
            if !self.pending.is_empty() {
                let pending = std::mem::take(&mut self.pending);
                match self.feed(&pending, self.want()) {
                    Ok(next) => output = next,
                    Err(Error::ContextFull { .. }) => {
                        self.pending = pending;
                        answer.stop = Stop::Context;
                        break;
                    }
                    Err(e) => return Err(e.into()),
                }
            }
            let id = match self.seq.forced_next() {
                Some(id) => id,
                None => self.choose(&mut output)?,
            };
            self.sampler.accept(id);
            self.pending.push(id);
            answer.tokens.push(id);
            if tokenizer.is_eog(id) {
                answer.stop = Stop::Eos;
                break;
            }
            let hidden = tokenizer.is_control(id) && !limits.special;
            if !hidden && let Some(text) = stream.push(id) {
                let (sure, hit) = filter.push(&text);
                answer.text += &sure;
                show(&sure)?;
                if hit {
                    answer.stop = Stop::Word;
                    break;
                }
            }
            if self.grammar.as_ref().is_some_and(Grammar::is_stopped) {
                answer.stop = Stop::Eos;
                break;
            }
        }
        if answer.stop != Stop::Word {
            let mut rest = filter.rest();
            rest += &stream.flush().unwrap_or_default();
            answer.text += &rest;
            show(&rest)?;
        }
        answer.seconds = start.elapsed().as_secs_f64();
        Ok(answer)
    }
}

/// Finds stop texts in a stream, holding back text that may yet become one.
struct StopFilter<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> StopFilter<'a> {
    fn new(stops: &'a [String]) -> StopFilter<'a> {
        StopFilter {
            stops,
            held: String::new(),
        }
    }

    /// Text that is now certain, and whether a stop text ended it.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held += text;
        let stops = self.stops.iter().filter(|s| !s.is_empty());
        if let Some(at) = stops
            .clone()
            .filter_map(|s| self.held.find(s.as_str()))
            .min()
        {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end of the text that begins some stop text.
        let keep = stops
            .filter_map(|stop| {
                let begins = |n: &usize| self.held.ends_with(&stop[..*n]);
                let ends = stop.char_indices().map(|(i, _)| i).filter(|i| *i > 0);
                ends.rev().find(begins)
            })
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back in vain.
    fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool, String) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut filter = StopFilter::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            let (sure, hit) = filter.push(piece);
            shown.push(sure);
            if hit {
                return (shown, true, String::new());
            }
        }
        let rest = filter.rest();
        (shown, false, rest)
    }

    #[test]
    fn stop_texts_are_found_across_pieces_and_never_shown() {
        let (shown, hit, _) = run(&["User:"], &["hello\nUs", "er", ": no"]);
        assert_eq!((shown.concat().as_str(), hit), ("hello\n", true));
        let (shown, hit, rest) = run(&["User:"], &["a Us", "ual"]);
        assert_eq!(shown, ["a ", "Usual"]);
        assert!(!hit && rest.is_empty());
        let (shown, hit, rest) = run(&["ab", "é€"], &["xa", "é"]);
        assert_eq!(shown, ["x", "a"]);
        assert!(!hit);
        assert_eq!(rest, "é");
        // The earliest stop text counts.
        let (shown, hit, _) = run(&["z", "bc"], &["abcz"]);
        assert_eq!((shown.concat().as_str(), hit), ("a", true));
        assert!(run(&[""], &["a"]).0 == ["a"]);
    }
}
