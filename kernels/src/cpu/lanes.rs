//! Element-wise ops and sums in sixteen lanes, written once for every vector instruction set.
//!
//! Each function is inlined into a function of the instruction set (`avx2::add`, ...), where its
//! loops over arrays of fixed length become that set's vectors. The lanes and the order of their
//! sums are the same everywhere, and so are the results. `mul_add` is one instruction on all of
//! these sets.

pub(crate) mod add;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;

/// Numbers handled at a time.
const LANES: usize = 16;
