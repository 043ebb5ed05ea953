//! The arithmetic of mneme: slices in, slices out.
//!
//! One op is one file here (its public function, shapes and checks) and one file of the same
//! name per instruction set under `cpu/`. The instruction set is chosen once, at run time, by
//! [`dispatch`]. Nothing in this crate knows files, models, or ggml.
//!
//! Every op is *batch invariant*: the numbers of a row do not depend, to the last bit, on which
//! other rows are in the call, on the number of threads, or on how a prompt was cut into chunks.

pub mod add;
pub mod attend;
mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-host"))]
pub mod cuda;
pub mod dispatch;
pub mod mul_mat;
pub mod peak;
pub mod pool;
pub mod quant;
pub mod recur;
pub mod rms_norm;
pub mod rope;
mod split;
pub mod swiglu;
