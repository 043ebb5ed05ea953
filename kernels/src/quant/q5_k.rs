//! Q5_K: `w[i] = d * scale[i / 32] * q[i] - dmin * min[i / 32]`, quants of five bits.

use super::{q4_k, read_f16};
use half::f16;

/// 256 numbers in 176 bytes: as Q4_K, with 32 bytes of high bits before the quants; bit `s` of
/// byte `k` belongs to number `32 s + k`.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ5K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minima.
    pub dmin: f16,
    /// Scales of the sub-blocks, 0..=63.
    pub scale: [u8; 8],
    /// Minima of the sub-blocks, 0..=63.
    pub min: [u8; 8],
    /// Quants 0..=31 in the order of the numbers.
    pub q: [u8; 256],
}

impl BlockQ5K {
    /// Size in a file.
    pub const BYTES: usize = 176;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        let (scale, min) = q4_k::scales_and_minima(&bytes[4..16]);
        let (high, low) = (&bytes[16..48], &bytes[48..]);
        BlockQ5K {
            d: read_f16(bytes),
            dmin: read_f16(&bytes[2..]),
            scale,
            min,
            q: std::array::from_fn(|i| {
                let (s, k) = (i / 32, i % 32);
                let low = (low[32 * (s / 2) + k] >> (4 * (s % 2))) & 15;
                low | ((high[k] >> s) & 1) << 4
            }),
        }
    }

    /// The 256 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for (i, o) in out.iter_mut().enumerate().take(256) {
            let scale = d * self.scale[i / 32] as f32;
            let min = dmin * self.min[i / 32] as f32;
            *o = scale * self.q[i] as f32 - min;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ5K::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
        bytes[2..4].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[4] = 3; // scale[0]
        bytes[8] = 6; // min[0]
        bytes[16] = 0b1000_0001; // high bits of numbers 0 and 224
        bytes[48] = 0x7F; // q[0] = 15 + 16, q[32] = 7
        let block = BlockQ5K::read(&bytes);
        assert_eq!((block.q[0], block.q[32], block.q[224]), (31, 7, 16));
        let mut out = [f32::NAN; 256];
        block.dequantize(&mut out);
        assert_eq!((out[0], out[1], out[224]), (90.0, -3.0, 0.0));
    }
}
