//! AArch64 with dot-product instructions.

pub(crate) mod mul_mat;
