//! Q8_0: `w[i] = d * q[i]`.

use super::read_f16;
use half::f16;

/// 32 numbers in 34 bytes: the scale `d`, then 32 signed bytes.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ8_0 {
    /// Scale.
    pub d: f16,
    /// Quants.
    pub q: [i8; 32],
}

impl BlockQ8_0 {
    /// Size in a file.
    pub const BYTES: usize = 34;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        BlockQ8_0 {
            d: read_f16(bytes),
            q: std::array::from_fn(|i| bytes[2 + i] as i8),
        }
    }

    /// The 32 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (o, &q) in out.iter_mut().zip(&self.q) {
            *o = d * q as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ8_0::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[2] = 127;
        bytes[3] = (-128i8) as u8;
        bytes[33] = (-1i8) as u8;
        let mut out = [f32::NAN; 32];
        BlockQ8_0::read(&bytes).dequantize(&mut out);
        assert_eq!((out[0], out[1], out[2], out[31]), (63.5, -64.0, 0.0, -0.5));
    }
}
