//! The verbs a model is written in.
//!
//! Models and memories call these and nothing below them. [`Cpu`] is the implementation on the
//! host; this is the only place where `mneme_kernels` and `ggml_sys` meet.

mod cpu;

pub use cpu::{Cpu, Matrix, Table};
pub use mneme_kernels::rope::RopeKind;
