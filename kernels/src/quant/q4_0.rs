//! Q4_0: `w[i] = d * (q[i] - 8)`.

use super::{nibbles, read_f16};
use half::f16;

/// 32 numbers in 18 bytes: the scale `d`, then 16 bytes; byte `i` holds number `i` in its low
/// half and number `i + 16` in its high half.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ4_0 {
    /// Scale.
    pub d: f16,
    /// Quants 0..=15 in the order of the numbers.
    pub q: [u8; 32],
}

impl BlockQ4_0 {
    /// Size in a file.
    pub const BYTES: usize = 18;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        BlockQ4_0 {
            d: read_f16(bytes),
            q: nibbles(&bytes[2..]),
        }
    }

    /// The 32 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (o, &q) in out.iter_mut().zip(&self.q) {
            *o = d * (q as i32 - 8) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0x88u8; BlockQ4_0::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        bytes[2] = 0xF0;
        bytes[17] = 0x1C;
        let mut out = [f32::NAN; 32];
        BlockQ4_0::read(&bytes).dequantize(&mut out);
        assert_eq!((out[0], out[16], out[1]), (-16.0, 14.0, 0.0));
        assert_eq!((out[15], out[31]), (8.0, -14.0));
    }
}
