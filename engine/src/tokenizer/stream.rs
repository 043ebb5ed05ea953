//! Turns pieces of tokens into text as they come: only whole UTF-8 characters leave.

use super::Tokenizer;

/// Collects bytes and gives out whole characters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// An empty stream.
    pub fn new() -> Utf8Stream {
        Utf8Stream::default()
    }

    /// Adds bytes and returns the text that is complete now, if any. Bytes that can be no part of a character come
    /// out as U+FFFD, as `String::from_utf8_lossy` has it.
    pub fn push(&mut self, bytes: &[u8]) -> Option<String> {
        self.pending.extend_from_slice(bytes);
        let keep = incomplete_tail(&self.pending);
        let whole = self.pending.len() - keep;
        if whole == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&self.pending[..whole]).into_owned();
        self.pending.drain(..whole);
        Some(text)
    }

    /// Ends the stream: what is left of a character that never became whole comes out as U+FFFD.
    pub fn flush(&mut self) -> Option<String> {
        if self.pending.is_empty() {
            return None;
        }
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        Some(text)
    }

    /// Bytes held back.
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }
}

/// Number of bytes at the end that may become a character with more bytes.
fn incomplete_tail(bytes: &[u8]) -> usize {
    for n in 1..=bytes.len().min(3) {
        let tail = &bytes[bytes.len() - n..];
        // A lead byte: incomplete if the error is that the input ends too early.
        if tail[0] & 0xc0 != 0x80 {
            return match std::str::from_utf8(tail) {
                Err(e) if e.error_len().is_none() => n - e.valid_up_to(),
                _ => 0,
            };
        }
    }
    0
}

/// A [`Utf8Stream`] fed with the tokens of a tokenizer.
#[derive(Clone)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    stream: Utf8Stream,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> TokenStream<'a> {
        TokenStream {
            tokenizer,
            stream: Utf8Stream::new(),
        }
    }

    /// Adds a token (control tokens with their text) and returns the text that is complete now, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.stream.push(self.tokenizer.piece(id))
    }

    /// Ends the stream; see [`Utf8Stream::flush`].
    pub fn flush(&mut self) -> Option<String> {
        self.stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream_bytes(bytes: &[u8], chunk: usize) -> (Vec<String>, Option<String>) {
        let mut s = Utf8Stream::new();
        let parts = bytes.chunks(chunk).filter_map(|c| s.push(c)).collect();
        (parts, s.flush())
    }

    #[test]
    fn whole_characters_only() {
        let text = "aé€😀 z";
        for chunk in 1..6 {
            let (parts, rest) = stream_bytes(text.as_bytes(), chunk);
            assert_eq!(parts.concat(), text);
            assert_eq!(rest, None);
        }
        let (parts, _) = stream_bytes("😀".as_bytes(), 1);
        assert_eq!(parts, ["😀"]);
    }

    #[test]
    fn broken_bytes_are_replaced_as_in_lossy() {
        let cases: [&[u8]; 8] = [
            b"a\xff\xfeb",
            b"\xe2\x82",
            b"\xf0\x9f\x98",
            b"\xf0\x9fx",
            b"\x80\x80\x80\x80",
            b"\xe2\x28\xa1",
            b"\xc0\x80",
            b"\xed\xa0\x80z",
        ];
        for bytes in cases {
            for chunk in 1..4 {
                let (parts, rest) = stream_bytes(bytes, chunk);
                let got = parts.concat() + &rest.unwrap_or_default();
                assert_eq!(got, String::from_utf8_lossy(bytes), "{bytes:x?} by {chunk}");
            }
        }
    }
}
