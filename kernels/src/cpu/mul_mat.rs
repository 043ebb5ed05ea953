//! What every vector instruction set's `mul_mat` works on: one panel, some tokens.

use crate::mul_mat::activations::Quants;
use crate::mul_mat::buffer::Buffer;
use crate::mul_mat::layout::{ROWS, VECTOR, scales_offset};
use crate::quant::WeightType;
use std::ops::Range;

/// Activations of all tokens, in the form the weight type calls for.
#[derive(Clone, Copy)]
pub(crate) enum Tokens<'a> {
    /// `[n_tokens, n_cols]`, for F32, F16 and BF16 weights.
    F32(&'a [f32]),
    /// With the weight type's block length.
    Quants(&'a Quants),
}

/// The work of one thread at a time: 16 rows of weights times a run of tokens.
pub(crate) struct Panel<'a> {
    pub(crate) ty: WeightType,
    pub(crate) n_cols: usize,
    /// The panel's bytes (`mul_mat::layout`), all of them readable.
    pub(crate) bytes: *const u8,
    pub(crate) x: Tokens<'a>,
    /// Which tokens of `x`.
    pub(crate) tokens: Range<usize>,
    /// The panel's first row of token 0; token `t` is `t * stride` numbers on.
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
    /// Rows to write, 1..=16.
    pub(crate) rows: usize,
}

impl Panel<'_> {
    /// The same panel times other tokens.
    pub(crate) fn with_tokens(&self, tokens: Range<usize>) -> Self {
        Panel { tokens, ..*self }
    }

    /// The panel's F16 scales.
    pub(crate) fn scales(&self) -> *const u8 {
        self.bytes.wrapping_add(scales_offset(self.ty, self.n_cols))
    }
}

/// 256 columns of a panel, unpacked.
#[repr(C, align(64))]
pub(crate) struct Unpacked {
    /// `[64][16]` words of four unsigned quants.
    pub(crate) words: [[u8; VECTOR]; 64],
    /// K types: scales of the sub-blocks.
    pub(crate) scales: [[i32; ROWS]; 16],
    /// Q4_K: minima of sub-blocks `2i` and `2i + 1`, side by side for each row.
    pub(crate) mins: [[i16; 2 * ROWS]; 4],
    /// K types: scale of the scales, scale of the minima.
    pub(crate) d: [f32; ROWS],
    pub(crate) dmin: [f32; ROWS],
}

/// A thread's working memory, kept from call to call.
pub(crate) struct Scratch {
    /// `[n_tokens][16]` running sums.
    acc: Buffer,
    unpacked: Buffer,
}

impl Scratch {
    pub(crate) fn new() -> Scratch {
        Scratch {
            acc: Buffer::zeroed(0),
            unpacked: Buffer::zeroed(0),
        }
    }

    /// Sums for `n` tokens, contents undefined, and room for unpacked weights of type `W`.
    ///
    /// # Safety
    /// `W` is plain numbers, at most 64-byte aligned: any bytes are a value of it.
    pub(crate) unsafe fn parts<W>(&mut self, n: usize) -> (&mut [[f32; ROWS]], &mut W) {
        const { assert!(align_of::<W>() <= VECTOR) };
        self.acc.reserve(n * VECTOR);
        self.unpacked.reserve(size_of::<W>());
        // SAFETY: both are large enough, aligned to 64, and hold plain numbers.
        unsafe {
            (
                std::slice::from_raw_parts_mut(self.acc.as_mut_ptr().cast(), n),
                &mut *self.unpacked.as_mut_ptr().cast(),
            )
        }
    }
}
