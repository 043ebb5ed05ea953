//! x86-64 with AVX-512 F, BW, VL, DQ and VNNI.

pub(crate) mod add;
pub(crate) mod attend;
pub(crate) mod mul_mat;
pub(crate) mod mul_mat_2_bit;
pub(crate) mod mul_mat_32;
mod mul_mat_float;
mod mul_mat_tile;
pub(crate) mod recur;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;
