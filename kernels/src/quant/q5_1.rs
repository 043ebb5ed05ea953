//! Q5_1: `w[i] = d * q[i] + m`, quants of five bits.

use super::{fifth_bits, nibbles, read_f16};
use half::f16;

/// 32 numbers in 24 bytes: the scale `d`, the minimum `m`, 32 high bits (bit `i` belongs to number
/// `i`), then 16 bytes as in Q4_0.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ5_1 {
    /// Scale.
    pub d: f16,
    /// What is added to every number.
    pub m: f16,
    /// Quants 0..=31 in the order of the numbers.
    pub q: [u8; 32],
}

impl BlockQ5_1 {
    /// Size in a file.
    pub const BYTES: usize = 24;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        let (high, low) = (fifth_bits(&bytes[4..]), nibbles(&bytes[8..]));
        BlockQ5_1 {
            d: read_f16(bytes),
            m: read_f16(&bytes[2..]),
            q: std::array::from_fn(|i| low[i] | high[i]),
        }
    }

    /// The 32 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        for (o, &q) in out.iter_mut().zip(&self.q) {
            *o = d * f32::from(q) + m;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ5_1::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[2..4].copy_from_slice(&f16::from_f32(-8.0).to_le_bytes());
        bytes[4] = 0b0000_0001; // number 0
        bytes[7] = 0b1000_0000; // number 31
        bytes[8] = 0xF1;
        bytes[23] = 0x20;
        let mut out = [f32::NAN; 32];
        BlockQ5_1::read(&bytes).dequantize(&mut out);
        assert_eq!((out[0], out[16], out[1]), (0.5, -0.5, -8.0));
        assert_eq!((out[15], out[31]), (-8.0, 1.0));
    }
}
