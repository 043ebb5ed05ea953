//! x86-64 with AVX2, FMA and F16C.

pub(crate) mod add;
pub(crate) mod attend;
pub(crate) mod mul_mat;
pub(crate) mod recur;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;
