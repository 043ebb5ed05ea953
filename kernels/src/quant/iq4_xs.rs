//! IQ4_XS: `w[i] = d * scale[i / 32] * VALUES[q[i]]`, with IQ4_NL's values.

use super::{iq4_nl::VALUES, nibbles, read_f16};
use half::f16;

/// 256 numbers in 136 bytes: `d`, the high two bits of eight scales in two bytes, their low four
/// bits in four bytes, then eight runs of 16 bytes, each 32 numbers as in Q4_0.
#[derive(Clone, Copy, Debug)]
pub struct BlockIQ4XS {
    /// Scale of the scales.
    pub d: f16,
    /// Scales of the sub-blocks, -32..=31.
    pub scale: [i8; 8],
    /// Quants 0..=15, places in [`VALUES`], in the order of the numbers.
    pub q: [u8; 256],
}

impl BlockIQ4XS {
    /// Size in a file.
    pub const BYTES: usize = 136;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        let runs: [[u8; 32]; 8] = std::array::from_fn(|s| nibbles(&bytes[8 + 16 * s..]));
        BlockIQ4XS {
            d: read_f16(bytes),
            scale: scales(bytes),
            q: std::array::from_fn(|i| runs[i / 32][i % 32]),
        }
    }

    /// The 256 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (i, o) in out.iter_mut().enumerate().take(256) {
            let value = f32::from(VALUES[usize::from(self.q[i])]);
            *o = d * f32::from(self.scale[i / 32]) * value;
        }
    }
}

/// The eight scales of the block `bytes`.
pub(crate) fn scales(bytes: &[u8]) -> [i8; 8] {
    let high = u16::from_le_bytes([bytes[2], bytes[3]]);
    std::array::from_fn(|s| {
        let low = (bytes[4 + s / 2] >> (4 * (s % 2))) & 15;
        (low | (((high >> (2 * s)) & 3) << 4) as u8) as i8 - 32
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0x88u8; BlockIQ4XS::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[2..4].copy_from_slice(&0b11_00_00_00_00_00_00_10u16.to_le_bytes());
        bytes[4] = 0x13; // low bits of scales 0 and 1
        bytes[7] = 0xF0; // and of 6 and 7
        bytes[8] = 0xF0; // numbers 0 and 16
        bytes[8 + 112] = 0x1C; // numbers 224 and 240
        let block = BlockIQ4XS::read(&bytes);
        assert_eq!(block.scale, [3, -31, -24, -24, -24, -24, -32, 31]);
        let mut out = [f32::NAN; 256];
        block.dequantize(&mut out);
        assert_eq!((out[0], out[16], out[1]), (-190.5, 169.5, 1.5));
        assert_eq!((out[224], out[240]), (15.5 * 53.0, 15.5 * -104.0));
    }
}
