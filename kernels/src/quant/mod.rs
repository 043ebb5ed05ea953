//! Weight types: the bytes of a row as GGUF files store them, and what those bytes mean.
//!
//! One file per block type, each with its layout, its size and `dequantize`. The kernels never
//! compute on these layouts directly; `mul_mat` interleaves them first (see `mul_mat::layout`).
//! Layouts are those of the GGUF specification and ggml's quantisation types of the same names.

pub(crate) mod iq4_nl;
pub(crate) mod iq4_xs;
mod q2_k;
pub(crate) mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

pub use iq4_nl::{BlockIQ4NL, VALUES as IQ4_VALUES};
pub use iq4_xs::BlockIQ4XS;
pub use q2_k::BlockQ2K;
pub use q3_k::BlockQ3K;
pub use q4_0::BlockQ4_0;
pub use q4_1::BlockQ4_1;
pub use q4_k::BlockQ4K;
pub use q5_0::BlockQ5_0;
pub use q5_1::BlockQ5_1;
pub use q5_k::BlockQ5K;
pub use q6_k::BlockQ6K;
pub use q8_0::BlockQ8_0;

use half::{bf16, f16};

/// How the numbers of a weight matrix are stored. Names are GGUF's.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an IEEE single.
    BF16,
    /// Blocks of 32: an F16 scale and 32 signed bytes.
    Q8_0,
    /// Blocks of 32: an F16 scale and 32 4-bit values, zero at 8.
    Q4_0,
    /// Blocks of 32: an F16 scale, an F16 minimum and 32 4-bit values.
    Q4_1,
    /// Blocks of 32: an F16 scale and 32 5-bit values, zero at 16.
    Q5_0,
    /// Blocks of 32: an F16 scale, an F16 minimum and 32 5-bit values.
    Q5_1,
    /// Blocks of 32: an F16 scale and 32 4-bit places in a table of values.
    IQ4_NL,
    /// Blocks of 256: sixteen sub-blocks of 16 2-bit values with 4-bit scales and minima.
    Q2_K,
    /// Blocks of 256: sixteen sub-blocks of 16 3-bit values with 6-bit scales, zero at 4.
    Q3_K,
    /// Blocks of 256: eight sub-blocks of 32 4-bit values with 6-bit scales and minima.
    Q4_K,
    /// Blocks of 256: as Q4_K, with 5-bit values.
    Q5_K,
    /// Blocks of 256: sixteen sub-blocks of 16 6-bit values with 8-bit scales, zero at 32.
    Q6_K,
    /// Blocks of 256: eight sub-blocks of 32 4-bit places in IQ4_NL's table with 6-bit scales.
    IQ4_XS,
}

impl WeightType {
    /// Every type, in the order of the enum; for tables and tests.
    pub const ALL: [WeightType; 15] = [
        WeightType::F32,
        WeightType::F16,
        WeightType::BF16,
        WeightType::Q8_0,
        WeightType::Q4_0,
        WeightType::Q4_1,
        WeightType::Q5_0,
        WeightType::Q5_1,
        WeightType::IQ4_NL,
        WeightType::Q2_K,
        WeightType::Q3_K,
        WeightType::Q4_K,
        WeightType::Q5_K,
        WeightType::Q6_K,
        WeightType::IQ4_XS,
    ];

    /// GGUF's name of the type.
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "F32",
            WeightType::F16 => "F16",
            WeightType::BF16 => "BF16",
            WeightType::Q8_0 => "Q8_0",
            WeightType::Q4_0 => "Q4_0",
            WeightType::Q4_1 => "Q4_1",
            WeightType::Q5_0 => "Q5_0",
            WeightType::Q5_1 => "Q5_1",
            WeightType::IQ4_NL => "IQ4_NL",
            WeightType::Q2_K => "Q2_K",
            WeightType::Q3_K => "Q3_K",
            WeightType::Q4_K => "Q4_K",
            WeightType::Q5_K => "Q5_K",
            WeightType::Q6_K => "Q6_K",
            WeightType::IQ4_XS => "IQ4_XS",
        }
    }

    /// Numbers per block; a row holds a whole number of blocks.
    pub fn block_len(self) -> usize {
        match self {
            WeightType::F32 | WeightType::F16 | WeightType::BF16 => 1,
            WeightType::Q8_0
            | WeightType::Q4_0
            | WeightType::Q4_1
            | WeightType::Q5_0
            | WeightType::Q5_1
            | WeightType::IQ4_NL => 32,
            WeightType::Q2_K
            | WeightType::Q3_K
            | WeightType::Q4_K
            | WeightType::Q5_K
            | WeightType::Q6_K
            | WeightType::IQ4_XS => 256,
        }
    }

    /// Whether blocks of 32 have a minimum that is added (Q4_1, Q5_1), or sub-blocks minima that are
    /// taken away (Q2_K, Q4_K, Q5_K).
    pub(crate) fn has_minima(self) -> bool {
        matches!(self, WeightType::Q4_1 | WeightType::Q5_1) || self.sub_minima() > 0
    }

    /// How many sub-blocks of a block of 256 have minima.
    pub(crate) fn sub_minima(self) -> usize {
        match self {
            WeightType::Q2_K => 16,
            WeightType::Q4_K | WeightType::Q5_K => 8,
            _ => 0,
        }
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        match self {
            WeightType::F32 => 4,
            WeightType::F16 | WeightType::BF16 => 2,
            WeightType::Q8_0 => BlockQ8_0::BYTES,
            WeightType::Q4_0 => BlockQ4_0::BYTES,
            WeightType::Q4_1 => BlockQ4_1::BYTES,
            WeightType::Q5_0 => BlockQ5_0::BYTES,
            WeightType::Q5_1 => BlockQ5_1::BYTES,
            WeightType::IQ4_NL => BlockIQ4NL::BYTES,
            WeightType::Q2_K => BlockQ2K::BYTES,
            WeightType::Q3_K => BlockQ3K::BYTES,
            WeightType::Q4_K => BlockQ4K::BYTES,
            WeightType::Q5_K => BlockQ5K::BYTES,
            WeightType::Q6_K => BlockQ6K::BYTES,
            WeightType::IQ4_XS => BlockIQ4XS::BYTES,
        }
    }

    /// Bytes of a row of `n_cols` numbers; `None` unless `n_cols` is a whole number of blocks.
    pub fn row_bytes(self, n_cols: usize) -> Option<usize> {
        if !n_cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (n_cols / self.block_len()).checked_mul(self.block_bytes())
    }
}

/// Writes the numbers of one row (or of any whole number of blocks) into `out`.
///
/// # Panics
/// If `bytes` is not exactly the row of `out.len()` numbers.
pub fn dequantize_row(ty: WeightType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        Some(bytes.len()),
        ty.row_bytes(out.len()),
        "{} row of {} numbers: wrong number of bytes",
        ty.name(),
        out.len()
    );
    let blocks = bytes.chunks_exact(ty.block_bytes());
    let outs = out.chunks_exact_mut(ty.block_len());
    let pairs = blocks.zip(outs);
    match ty {
        WeightType::F32 => {
            pairs.for_each(|(b, o)| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
        WeightType::F16 => {
            pairs.for_each(|(b, o)| o[0] = f16::from_le_bytes([b[0], b[1]]).to_f32());
        }
        WeightType::BF16 => {
            pairs.for_each(|(b, o)| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32());
        }
        WeightType::Q8_0 => pairs.for_each(|(b, o)| BlockQ8_0::read(b).dequantize(o)),
        WeightType::Q4_0 => pairs.for_each(|(b, o)| BlockQ4_0::read(b).dequantize(o)),
        WeightType::Q4_1 => pairs.for_each(|(b, o)| BlockQ4_1::read(b).dequantize(o)),
        WeightType::Q5_0 => pairs.for_each(|(b, o)| BlockQ5_0::read(b).dequantize(o)),
        WeightType::Q5_1 => pairs.for_each(|(b, o)| BlockQ5_1::read(b).dequantize(o)),
        WeightType::IQ4_NL => pairs.for_each(|(b, o)| BlockIQ4NL::read(b).dequantize(o)),
        WeightType::Q2_K => pairs.for_each(|(b, o)| BlockQ2K::read(b).dequantize(o)),
        WeightType::Q3_K => pairs.for_each(|(b, o)| BlockQ3K::read(b).dequantize(o)),
        WeightType::Q4_K => pairs.for_each(|(b, o)| BlockQ4K::read(b).dequantize(o)),
        WeightType::Q5_K => pairs.for_each(|(b, o)| BlockQ5K::read(b).dequantize(o)),
        WeightType::Q6_K => pairs.for_each(|(b, o)| BlockQ6K::read(b).dequantize(o)),
        WeightType::IQ4_XS => pairs.for_each(|(b, o)| BlockIQ4XS::read(b).dequantize(o)),
    }
}

/// An F16 at the start of `bytes`, as it lies in the file.
fn read_f16(bytes: &[u8]) -> f16 {
    f16::from_le_bytes([bytes[0], bytes[1]])
}

/// 32 quants of four bits in 16 bytes: byte `i` holds number `i` in its low half and number
/// `i + 16` in its high half.
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| (bytes[i % 16] >> (4 * (i / 16))) & 15)
}

/// The fifth bits of 32 quants, each worth 16: bit `i` of four bytes belongs to number `i`.
fn fifth_bits(bytes: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| ((bytes[i / 8] >> (i % 8)) & 1) << 4)
}

/// 256 quants of two bits in 64 bytes: 32 bytes hold 128 numbers, the lowest bits the first 32.
fn pairs_of_bits(bytes: &[u8]) -> [u8; 256] {
    std::array::from_fn(|i| (bytes[32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4))) & 3)
}
