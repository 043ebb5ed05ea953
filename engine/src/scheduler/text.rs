//! Text of one answer: whole characters only, held back while it may be the start of a stop string.

use crate::tokenizer::Utf8Stream;

/// Collects the pieces of an answer and says what of it may be shown.
#[derive(Debug, Default)]
pub struct Answer {
    utf8: Utf8Stream,
    text: String,
    /// Bytes of `text` already given out.
    sent: usize,
    stops: Vec<String>,
}

impl Answer {
    /// An empty answer that ends at any of `stops`; empty stop strings are ignored.
    pub fn new(stops: Vec<String>) -> Answer {
        Answer {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            ..Answer::default()
        }
    }

    /// All text so far, up to the stop string if one was met.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Adds the bytes of a token. When they complete a stop string, the text is cut before it and
    /// the string is returned; where several do, the one that begins first.
    pub fn push(&mut self, bytes: &[u8]) -> Option<String> {
        let before = self.text.len();
        self.text.push_str(&self.utf8.push(bytes)?);
        self.find_stop(before)
    }

    /// Ends the answer: what is left of a character that never became whole comes out as U+FFFD.
    pub fn flush(&mut self) {
        if let Some(rest) = self.utf8.flush() {
            self.text.push_str(&rest);
        }
    }

    fn find_stop(&mut self, before: usize) -> Option<String> {
        let found = self.stops.iter().filter_map(|stop| {
            // Only a match that reaches into the new bytes can be new, and it cannot reach back
            // into text that was already shown.
            let from = before.saturating_sub(stop.len() - 1).max(self.sent);
            let hay = &self.text.as_bytes()[from..];
            let at = hay
                .windows(stop.len())
                .position(|window| window == stop.as_bytes())?;
            Some((from + at, stop))
        });
        let (at, stop) = found.min_by_key(|(at, _)| *at)?;
        let stop = stop.clone();
        self.text.truncate(at);
        Some(stop)
    }

    /// Whether bytes of an unfinished character wait for more.
    pub fn is_mid_character(&self) -> bool {
        !self.utf8.pending().is_empty()
    }

    /// Takes the text that may be shown now; all that is left when `finished`.
    pub fn take(&mut self, finished: bool) -> Option<String> {
        let end = match finished {
            true => self.text.len(),
            false => self.text.len() - self.held_back(),
        };
        if end <= self.sent {
            return None;
        }
        let text = self.text[self.sent..end].to_owned();
        self.sent = end;
        Some(text)
    }

    /// Length of the longest end of the text that begins a stop string.
    fn held_back(&self) -> usize {
        let unsent = &self.text.as_bytes()[self.sent..];
        let longest = |stop: &String| {
            let stop = stop.as_bytes();
            (1..stop.len().min(unsent.len() + 1))
                .rev()
                .find(|&n| unsent.ends_with(&stop[..n]))
                .unwrap_or(0)
        };
        let held = self.stops.iter().map(longest).max().unwrap_or(0);
        // A stop string may begin with the first bytes of a character that another one shares.
        let mut at = self.text.len() - held;
        while !self.text.is_char_boundary(at) {
            at -= 1;
        }
        self.text.len() - at
    }

    /// Spaces and tabs the last line begins with, and whether anything follows them.
    pub fn last_indent(&self) -> (usize, bool) {
        let line = self.text.rsplit('\n').next().unwrap_or("");
        let body = line.trim_start_matches([' ', '\t']);
        (line.len() - body.len(), !body.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>, String) {
        let mut answer = Answer::new(stops.iter().map(|s| s.to_string()).collect());
        let mut shown = Vec::new();
        let mut word = None;
        for piece in pieces {
            word = answer.push(piece.as_bytes());
            shown.extend(answer.take(word.is_some()));
            if word.is_some() {
                break;
            }
        }
        answer.flush();
        shown.extend(answer.take(true));
        (shown, word, answer.text().to_owned())
    }

    #[test]
    fn text_that_may_begin_a_stop_string_waits() {
        let (shown, word, text) = run(&["User:"], &["Hi ", "Us", "ually"]);
        assert_eq!(shown, ["Hi ", "Usually"]);
        assert_eq!((word, text.as_str()), (None, "Hi Usually"));
    }

    #[test]
    fn a_stop_string_over_several_tokens_never_appears() {
        let (shown, word, text) = run(&["User:"], &["Hi U", "se", "r: x", "y"]);
        assert_eq!(shown, ["Hi "]);
        assert_eq!((word.as_deref(), text.as_str()), (Some("User:"), "Hi "));
    }

    #[test]
    fn the_earliest_stop_string_wins() {
        let (_, word, text) = run(&["c", "ab"], &["xabc"]);
        assert_eq!((word.as_deref(), text.as_str()), (Some("ab"), "x"));
    }

    #[test]
    fn what_was_held_back_comes_out_at_the_end() {
        let (shown, word, _) = run(&["END"], &["a", "E", "N"]);
        assert_eq!(shown, ["a", "EN"]);
        assert_eq!(word, None);
    }

    #[test]
    fn characters_stay_whole() {
        let mut answer = Answer::new(vec!["€€".into()]);
        let bytes = "x€é".as_bytes();
        let mut shown = String::new();
        for byte in bytes {
            assert_eq!(answer.push(&[*byte]), None);
            shown.extend(answer.take(false));
        }
        assert_eq!(shown, "x€é");
        answer.push(&[0xe2, 0x82]);
        assert!(answer.is_mid_character());
        assert_eq!(answer.take(false), None);
        answer.flush();
        assert_eq!(answer.take(true).as_deref(), Some("\u{fffd}"));
    }

    #[test]
    fn indent_of_the_last_line() {
        let mut answer = Answer::new(Vec::new());
        answer.push(b"a\n  b");
        assert_eq!(answer.last_indent(), (2, true));
        answer.push(b"\n \t");
        assert_eq!(answer.last_indent(), (2, false));
    }
}
