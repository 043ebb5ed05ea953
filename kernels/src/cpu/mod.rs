//! The kernels of each instruction set, and the tables that choose among them.
//!
//! Every table asserts that the set is available, so that the unsafe functions it returns may
//! be called on this machine.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
mod fetch;
mod lanes;
pub(crate) mod mul_mat;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;

use crate::attend::tile::PageKernels;
use crate::cpu::mul_mat::{Panel, Scratch};
use crate::dispatch::{Isa, available};
use crate::mul_mat::activations::QuantizeRow;
use crate::recur::{Chunked, HeadKernels};
use crate::rope::RopeKind;

/// `x` row, weights, eps, out row.
pub(crate) type RmsNorm = unsafe fn(&[f32], &[f32], f32, &mut [f32]);
/// gate, up, out.
pub(crate) type Swiglu = unsafe fn(&[f32], &[f32], &mut [f32]);
/// x, y.
pub(crate) type Add = unsafe fn(&mut [f32], &[f32]);
/// Position, inverse frequencies, scale, cosines, sines.
pub(crate) type Turns = unsafe fn(u32, &[f32], f32, &mut [f32], &mut [f32]);
/// The rotated part of a head, cosines, sines.
pub(crate) type Rope = unsafe fn(RopeKind, &mut [f32], &[f32], &[f32]);

/// `mul_mat` of an instruction set.
pub(crate) struct MulMat {
    /// One panel times its tokens; or a pair of them.
    pub(crate) panel: unsafe fn(&Panel<'_>, &mut Scratch),
    pub(crate) quantize_row: QuantizeRow,
    /// Fewest tokens for which panels are worked on in pairs.
    pub(crate) pairs_from: usize,
}

/// Stops a caller that names an instruction set this machine lacks.
pub(crate) fn check(isa: Isa) {
    assert!(
        available().contains(&isa),
        "this machine has no {}",
        isa.name()
    );
}

pub(crate) fn rms_norm(isa: Isa) -> RmsNorm {
    check(isa);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => avx2::rms_norm::rms_norm,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => avx512::rms_norm::rms_norm,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::rms_norm::rms_norm,
        _ => scalar::rms_norm::rms_norm,
    }
}

pub(crate) fn swiglu(isa: Isa) -> Swiglu {
    check(isa);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => avx2::swiglu::swiglu,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => avx512::swiglu::swiglu,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::swiglu::swiglu,
        _ => scalar::swiglu::swiglu,
    }
}

pub(crate) fn add(isa: Isa) -> Add {
    check(isa);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => avx2::add::add,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => avx512::add::add,
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::add::add,
        _ => scalar::add::add,
    }
}

pub(crate) fn rope(isa: Isa) -> (Turns, Rope) {
    check(isa);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => (avx2::rope::turns, avx2::rope::rope),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => (avx512::rope::turns, avx512::rope::rope),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => (neon::rope::turns, neon::rope::rope),
        _ => (scalar::rope::turns, scalar::rope::rope),
    }
}

/// `None` for plain Rust, which works on the file's own rows.
pub(crate) fn mul_mat(isa: Isa) -> Option<MulMat> {
    check(isa);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Some(MulMat {
            panel: avx2::mul_mat::panel::<false>,
            quantize_row: avx2::mul_mat::quantize_row,
            pairs_from: usize::MAX,
        }),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => Some(MulMat {
            panel: avx2::mul_mat::panel::<true>,
            quantize_row: avx2::mul_mat::quantize_row,
            pairs_from: usize::MAX,
        }),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Some(MulMat {
            panel: neon::mul_mat::panel,
            quantize_row: neon::mul_mat::quantize_row,
            pairs_from: usize::MAX,
        }),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Some(MulMat {
            panel: avx512::mul_mat::panel,
            quantize_row: avx512::mul_mat::quantize_row,
            pairs_from: avx512::mul_mat::PAIRS_FROM,
        }),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => Some(MulMat {
            panel: amx::mul_mat::panel,
            quantize_row: avx512::mul_mat::quantize_row,
            pairs_from: usize::MAX,
        }),
        _ => None,
    }
}

/// None: the scalar set, which goes cell by cell.
pub(crate) fn attend(isa: Isa) -> Option<PageKernels> {
    check(isa);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => Some(amx::attend::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => Some(avx512::attend::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Some(avx2::attend::KERNELS),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => Some(avx2::attend::KERNELS_VNNI),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => Some(neon::attend::KERNELS),
        _ => None,
    }
}

/// Scalar has the recurrent form only.
pub(crate) fn recur(isa: Isa) -> HeadKernels {
    check(isa);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => HeadKernels {
            recurrent: avx512::recur::recurrent,
            chunked: Chunked::Heads(amx::recur::chunked, amx::recur::HEADS),
            chunked_from: 32,
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => HeadKernels {
            recurrent: avx512::recur::recurrent,
            chunked: Chunked::Head(avx512::recur::chunked),
            chunked_from: usize::MAX,
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => HeadKernels {
            recurrent: avx2::recur::recurrent,
            chunked: Chunked::Head(avx2::recur::chunked),
            chunked_from: usize::MAX,
        },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => HeadKernels {
            recurrent: neon::recur::recurrent,
            chunked: Chunked::Head(neon::recur::chunked),
            chunked_from: usize::MAX,
        },
        _ => HeadKernels {
            recurrent: scalar::recur::recur,
            chunked: Chunked::Head(scalar::recur::recur),
            chunked_from: usize::MAX,
        },
    }
}
