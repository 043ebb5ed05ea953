//! Types that another type can state exactly.
//!
//! Q3_K is Q6_K with integers of three bits. The same numbers in other bytes: matrices of such types
//! are restated when they are loaded and run on the other type's kernels, at the price of its bytes.

use super::{BlockQ6K, WeightType};

/// A type that is restated as a [`WeightType`].
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restated {
    /// As Q6_K.
    Q3_K,
}

impl Restated {
    /// What it becomes: a type of the same numbers per block.
    pub fn weight_type(self) -> WeightType {
        match self {
            Restated::Q3_K => WeightType::Q6_K,
        }
    }

    /// Bytes of a block in a file.
    pub fn block_bytes(self) -> usize {
        match self {
            Restated::Q3_K => 110, // 256 high bits, 256 pairs of low bits, 16 scales of 6 bits, d
        }
    }

    /// Writes whole blocks into `out` as blocks of [`Restated::weight_type`], number for number.
    ///
    /// # Panics
    /// If `bytes` are not whole blocks, or `out` is not as many.
    pub fn restate(self, bytes: &[u8], out: &mut [u8]) {
        let (from, to) = (self.block_bytes(), self.weight_type().block_bytes());
        assert!(
            bytes.len().is_multiple_of(from) && out.len() == bytes.len() / from * to,
            "{} bytes of {self:?} into {} bytes",
            bytes.len(),
            out.len()
        );
        let blocks = bytes.chunks_exact(from).zip(out.chunks_exact_mut(to));
        match self {
            Restated::Q3_K => blocks.for_each(|(block, out)| q3_k(block, out)),
        }
    }
}

/// `w[i] = d * (scale[i / 16] - 32) * (q[i] - 4)` with quants of three bits, as Q6_K's
/// `d * scale[i / 16] * (q[i] - 32)`.
fn q3_k(block: &[u8], out: &mut [u8]) {
    const { assert!(BlockQ6K::BYTES == 210) };
    let (high, low, scales, d) = (&block[..32], &block[32..96], &block[96..108], &block[108..]);
    // Number 128 half + 32 run + k, from -4..=3 to 28..=35.
    let quant = |half: usize, run: usize, k: usize| {
        let bit = (high[k] >> (4 * half + run)) & 1;
        28 + ((low[32 * half + k] >> (2 * run)) & 3) + 4 * bit
    };
    for half in 0..2 {
        for k in 0..32 {
            let [a, b, c, d] = std::array::from_fn(|run| quant(half, run, k));
            out[64 * half + k] = (a & 15) | (c << 4);
            out[64 * half + 32 + k] = (b & 15) | (d << 4);
            out[128 + 32 * half + k] = (a >> 4) | (b >> 4 << 2) | (c >> 4 << 4) | (d >> 4 << 6);
        }
    }
    for s in 0..16 {
        let scale = (scales[s % 8] >> (4 * (s / 8))) & 15;
        let top = (scales[8 + s % 4] >> (2 * (s / 4))) & 3;
        out[192 + s] = (scale | top << 4).wrapping_sub(32);
    }
    out[208..].copy_from_slice(d);
}
