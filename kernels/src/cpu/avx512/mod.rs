//! x86-64 with AVX-512 F, BW, VL, DQ and VNNI.

pub(crate) mod attend;
pub(crate) mod mul_mat;
mod mul_mat_float;
