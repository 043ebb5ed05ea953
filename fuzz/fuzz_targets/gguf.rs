//! Any bytes as a GGUF file: an error, or a file whose every value, tensor and vocabulary can be read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mneme_engine::chat::ChatTemplate;
use mneme_engine::gguf::Gguf;
use mneme_engine::tokenizer::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = Gguf::from_bytes(bytes.to_vec()) else {
        return;
    };
    for (_, value) in gguf.keys() {
        let _ = value.to_string();
    }
    for tensor in gguf.tensors() {
        assert_eq!(gguf.data(tensor).len() as u64, tensor.n_bytes);
    }
    if let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) {
        let ids = tokenizer.encode("a <s> \u{e9}\n", true, true);
        let _ = tokenizer.decode(&ids, false);
    }
    let _ = ChatTemplate::from_gguf(&gguf);
});
