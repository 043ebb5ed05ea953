//! Architectures: one file, one row of [`ARCHS`], one forward pass that reads top to bottom.

mod llama;
mod pass;
mod qwen2;
mod qwen3;

pub use pass::{Pass, Scratch};

/// Runs the layers that a pass is at.
pub type Forward = fn(&mut Pass<'_>);

/// One supported architecture.
pub struct Arch {
    /// `general.architecture` of its files.
    pub name: &'static str,
    /// Its forward pass.
    pub forward: Forward,
}

/// Every architecture there is.
pub const ARCHS: &[Arch] = &[
    Arch {
        name: "llama",
        forward: llama::forward,
    },
    Arch {
        name: "qwen2",
        forward: qwen2::forward,
    },
    Arch {
        name: "qwen3",
        forward: qwen3::forward,
    },
];
