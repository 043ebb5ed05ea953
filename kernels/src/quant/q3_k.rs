//! Q3_K: `w[i] = d * scale[i / 16] * (q[i] - 4)`, quants of three bits.

use super::{pairs_of_bits, read_f16};
use half::f16;

/// 256 numbers in 110 bytes: 32 bytes of high bits (bit `s` of byte `k` belongs to number
/// `32 s + k`), 64 bytes of low bits as in Q2_K, 12 bytes of 6-bit scales, `d`.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ3K {
    /// Scale of the scales.
    pub d: f16,
    /// Scales of the sub-blocks, -32..=31.
    pub scale: [i8; 16],
    /// Quants 0..=7 in the order of the numbers.
    pub q: [u8; 256],
}

impl BlockQ3K {
    /// Size in a file.
    pub const BYTES: usize = 110;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        let low = pairs_of_bits(&bytes[32..96]);
        BlockQ3K {
            d: read_f16(&bytes[108..]),
            scale: scales(bytes),
            q: std::array::from_fn(|i| low[i] | ((bytes[i % 32] >> (i / 32)) & 1) << 2),
        }
    }

    /// The 256 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (i, o) in out.iter_mut().enumerate().take(256) {
            *o = d * f32::from(self.scale[i / 16]) * (i32::from(self.q[i]) - 4) as f32;
        }
    }
}

/// The 16 scales of the block `bytes`: low four bits in eight bytes, those of 0..8 in the low
/// halves, then high two bits in four bytes, those of 0..4 lowest.
pub(crate) fn scales(bytes: &[u8]) -> [i8; 16] {
    let bytes = &bytes[96..108];
    std::array::from_fn(|s| {
        let low = (bytes[s % 8] >> (4 * (s / 8))) & 15;
        let high = (bytes[8 + s % 4] >> (2 * (s / 4))) & 3;
        (low | high << 4) as i8 - 32
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ3K::BYTES];
        bytes[108..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[0] = 0b1000_0001; // high bits of numbers 0 and 224
        bytes[32] = 0b00_00_01_10; // low bits of numbers 0 and 32
        bytes[96] = 0x21; // scales 0 and 8
        bytes[104] = 0b11_00_00_10; // high bits of scales 0 and 12
        let block = BlockQ3K::read(&bytes);
        assert_eq!(
            (block.scale[0], block.scale[8], block.scale[12]),
            (1, -30, 16)
        );
        let mut out = [f32::NAN; 256];
        block.dequantize(&mut out);
        assert_eq!((out[0], out[1], out[32]), (1.0, -2.0, 48.0));
        assert_eq!((out[224], out[225]), (0.0, 64.0));
    }
}
