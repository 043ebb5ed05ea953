//! Q4_1: `w[i] = d * q[i] + m`.

use super::{nibbles, read_f16};
use half::f16;

/// 32 numbers in 20 bytes: the scale `d`, the minimum `m`, then 16 bytes as in Q4_0.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ4_1 {
    /// Scale.
    pub d: f16,
    /// What is added to every number.
    pub m: f16,
    /// Quants 0..=15 in the order of the numbers.
    pub q: [u8; 32],
}

impl BlockQ4_1 {
    /// Size in a file.
    pub const BYTES: usize = 20;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        BlockQ4_1 {
            d: read_f16(bytes),
            m: read_f16(&bytes[2..]),
            q: nibbles(&bytes[4..]),
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
        let mut bytes = vec![0u8; BlockQ4_1::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        bytes[2..4].copy_from_slice(&f16::from_f32(-3.0).to_le_bytes());
        bytes[4] = 0xF1;
        bytes[19] = 0x20;
        let mut out = [f32::NAN; 32];
        BlockQ4_1::read(&bytes).dequantize(&mut out);
        assert_eq!((out[0], out[16], out[1]), (-1.0, 27.0, -3.0));
        assert_eq!((out[15], out[31]), (-3.0, 1.0));
    }
}
