//! Q2_K: `w[i] = d * scale[i / 16] * q[i] - dmin * min[i / 16]`.

use super::{pairs_of_bits, read_f16};
use half::f16;

/// 256 numbers in 84 bytes: 16 bytes of a 4-bit scale (low) and a 4-bit minimum, 64 bytes of 2-bit
/// quants (32 bytes hold 128 numbers, the lowest bits the first 32), `d`, `dmin`.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ2K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minima.
    pub dmin: f16,
    /// Scales of the sub-blocks, 0..=15.
    pub scale: [u8; 16],
    /// Minima of the sub-blocks, 0..=15.
    pub min: [u8; 16],
    /// Quants 0..=3 in the order of the numbers.
    pub q: [u8; 256],
}

impl BlockQ2K {
    /// Size in a file.
    pub const BYTES: usize = 84;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        BlockQ2K {
            d: read_f16(&bytes[80..]),
            dmin: read_f16(&bytes[82..]),
            scale: std::array::from_fn(|s| bytes[s] & 15),
            min: std::array::from_fn(|s| bytes[s] >> 4),
            q: pairs_of_bits(&bytes[16..80]),
        }
    }

    /// The 256 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for (i, o) in out.iter_mut().enumerate().take(256) {
            let scale = d * f32::from(self.scale[i / 16]);
            let min = dmin * f32::from(self.min[i / 16]);
            *o = scale * f32::from(self.q[i]) - min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ2K::BYTES];
        bytes[80..82].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
        bytes[82..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[0] = 0x65; // numbers 0..16: scale 5, minimum 6
        bytes[2] = 0x21; // numbers 32..48
        bytes[9] = 0x13; // numbers 144..160
        bytes[16] = 0b00_00_11_10; // numbers 0 and 32
        bytes[16 + 32 + 16] = 0b00_00_00_01; // number 144
        let mut out = [f32::NAN; 256];
        BlockQ2K::read(&bytes).dequantize(&mut out);
        assert_eq!((out[0], out[1], out[32], out[33]), (7.0, -3.0, 2.0, -1.0));
        assert_eq!((out[144], out[145], out[255]), (2.5, -0.5, 0.0));
    }
}
