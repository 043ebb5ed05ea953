//! stub
use crate::gguf::Gguf;
/// stub
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct Error;
/// stub
pub struct Tokenizer;
impl Tokenizer {
    /// stub
    pub fn from_gguf(_: &Gguf) -> Result<Tokenizer, Error> {
        Ok(Tokenizer)
    }
    /// stub
    pub fn piece(&self, _: u32) -> &[u8] {
        b""
    }
}
