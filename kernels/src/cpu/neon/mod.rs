//! AArch64 with dot-product instructions.

pub(crate) mod add;
pub(crate) mod attend;
pub(crate) mod mul_mat;
pub(crate) mod recur;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;
