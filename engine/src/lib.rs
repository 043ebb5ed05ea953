//! The engine of mneme: reads GGUF files, tokenises, runs models over compressed memories, samples.

pub mod chat;
pub mod gguf;
pub mod tokenizer;
