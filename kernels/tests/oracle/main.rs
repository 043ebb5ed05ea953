//! Every op on every instruction set of this machine against plain Rust with F64 sums.
//!
//! One file per op. Outputs are poisoned with NaN first, shapes are ragged on purpose, and each
//! test states the bound it holds the op to and where that bound comes from.

mod add;
mod mul_mat;
mod rms_norm;
mod rope;
mod swiglu;

use mneme_kernels::dispatch::{self, Isa};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// Instruction sets to compare with [`Isa::Scalar`].
fn vector_isas() -> impl Iterator<Item = Isa> {
    dispatch::available()
        .iter()
        .copied()
        .filter(|&isa| isa != Isa::Scalar)
}

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Roughly normal numbers of size `scale`.
fn normal(rng: &mut impl Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n)
        .map(|_| {
            let sum: f32 = (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum();
            sum * 0.7 * scale
        })
        .collect()
}

fn poisoned(n: usize) -> Vec<f32> {
    vec![f32::NAN; n]
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}
