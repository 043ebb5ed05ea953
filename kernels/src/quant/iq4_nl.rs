//! IQ4_NL: `w[i] = d * VALUES[q[i]]`.

use super::{nibbles, read_f16};
use half::f16;

/// What each quant stands for (the format's table).
pub const VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// 32 numbers in 18 bytes, laid out as in Q4_0.
#[derive(Clone, Copy, Debug)]
pub struct BlockIQ4NL {
    /// Scale.
    pub d: f16,
    /// Quants 0..=15, places in [`VALUES`], in the order of the numbers.
    pub q: [u8; 32],
}

impl BlockIQ4NL {
    /// Size in a file.
    pub const BYTES: usize = 18;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        BlockIQ4NL {
            d: read_f16(bytes),
            q: nibbles(&bytes[2..]),
        }
    }

    /// The 32 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (o, &q) in out.iter_mut().zip(&self.q) {
            *o = d * f32::from(VALUES[usize::from(q)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0x88u8; BlockIQ4NL::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        bytes[2] = 0xF0;
        bytes[17] = 0x1C;
        let mut out = [f32::NAN; 32];
        BlockIQ4NL::read(&bytes).dequantize(&mut out);
        assert_eq!((out[0], out[16], out[1]), (-254.0, 226.0, 2.0));
        assert_eq!((out[15], out[31]), (106.0, -208.0));
    }
}
