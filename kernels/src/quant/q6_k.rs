//! Q6_K: `w[i] = d * scale[i / 16] * (q[i] - 32)`.

use super::read_f16;
use half::f16;

/// 256 numbers in 210 bytes: 128 bytes of low four bits, 64 bytes of high two bits, 16 signed
/// scales, `d`. Each half of 128 numbers uses 64 low and 32 high bytes.
#[derive(Clone, Copy, Debug)]
pub struct BlockQ6K {
    /// Scale of the scales.
    pub d: f16,
    /// Scales of the sub-blocks.
    pub scale: [i8; 16],
    /// Quants 0..=63 in the order of the numbers.
    pub q: [u8; 256],
}

impl BlockQ6K {
    /// Size in a file.
    pub const BYTES: usize = 210;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        let (low, high) = (&bytes[..128], &bytes[128..192]);
        BlockQ6K {
            d: read_f16(&bytes[208..]),
            scale: std::array::from_fn(|j| bytes[192 + j] as i8),
            q: std::array::from_fn(|i| {
                // Within a half, the four runs of 32 numbers share the 32 high bytes; runs 0 and
                // 2 (1 and 3) share the low bytes 0..32 (32..64).
                let (half, run, k) = (i / 128, (i / 32) % 4, i % 32);
                let low = (low[64 * half + 32 * (run % 2) + k] >> (4 * (run / 2))) & 15;
                let high = (high[32 * half + k] >> (2 * run)) & 3;
                low | (high << 4)
            }),
        }
    }

    /// The 256 numbers.
    pub fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (i, o) in out.iter_mut().enumerate().take(256) {
            *o = d * self.scale[i / 16] as f32 * (self.q[i] as i32 - 32) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ6K::BYTES];
        bytes[208..].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[192] = 2;
        bytes[192 + 4] = (-4i8) as u8; // numbers 64..80
        bytes[0] = 0x9F; // low bits of 0 and of 64
        bytes[128] = 0b00_11_00_10; // high bits: 2 for 0, 0 for 32, 3 for 64
        let block = BlockQ6K::read(&bytes);
        assert_eq!((block.q[0], block.q[64], block.q[32]), (47, 57, 0));
        let mut out = [f32::NAN; 256];
        block.dequantize(&mut out);
        assert_eq!((out[0], out[1], out[64]), (15.0, -32.0, -50.0));
        assert_eq!(out[32], 0.0);
    }
}
