//! Q5_0: `w[i] = d * (q[i] - 16)`, quants of five bits.

use super::{fifth_bits, nibbles, read_f16};
use half::f16;

/// 32 numbers in 22 bytes: the scale `d`, 32 high bits (bit `i` belongs to number `i`), then 16
/// bytes as in Q4_0.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ5_0 {
    /// Scale.
    pub d: f16,
    /// Quants 0..=31 in the order of the numbers.
    pub q: [u8; 32],
}

impl BlockQ5_0 {
    /// Size in a file.
    pub const BYTES: usize = 22;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        let (high, low) = (fifth_bits(&bytes[2..]), nibbles(&bytes[6..]));
        BlockQ5_0 {
            d: read_f16(bytes),
            q: std::array::from_fn(|i| low[i] | high[i]),
        }
    }

    /// The 32 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (o, &q) in out.iter_mut().zip(&self.q) {
            *o = d * (q as i32 - 16) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ5_0::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[2] = 0b0000_0001; // number 0
        bytes[5] = 0b1000_0000; // number 31
        bytes[6] = 0xF1;
        bytes[21] = 0x20;
        let mut out = [f32::NAN; 32];
        BlockQ5_0::read(&bytes).dequantize(&mut out);
        assert_eq!((out[0], out[16], out[1]), (0.5, -0.5, -8.0));
        assert_eq!((out[15], out[31]), (-8.0, 1.0));
    }
}
