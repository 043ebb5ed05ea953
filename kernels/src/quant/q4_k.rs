//! Q4_K: `w[i] = d * scale[i / 32] * q[i] - dmin * min[i / 32]`.

use super::read_f16;
use half::f16;

/// 256 numbers in 144 bytes: `d`, `dmin`, 12 bytes of 6-bit scales and minima, 128 bytes of
/// 4-bit quants (32 bytes hold 64 numbers: low halves the first 32, high halves the next).
#[derive(Clone, Copy, Debug)]
pub struct BlockQ4K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minima.
    pub dmin: f16,
    /// Scales of the sub-blocks, 0..=63.
    pub scale: [u8; 8],
    /// Minima of the sub-blocks, 0..=63.
    pub min: [u8; 8],
    /// Quants 0..=15 in the order of the numbers.
    pub q: [u8; 256],
}

impl BlockQ4K {
    /// Size in a file.
    pub const BYTES: usize = 144;

    /// Reads a block from its [`Self::BYTES`] bytes.
    pub fn read(bytes: &[u8]) -> Self {
        let (scale, min) = scales_and_minima(&bytes[4..16]);
        let qs = &bytes[16..];
        BlockQ4K {
            d: read_f16(bytes),
            dmin: read_f16(&bytes[2..]),
            scale,
            min,
            q: std::array::from_fn(|i| {
                let (pair, half, k) = (i / 64, (i / 32) % 2, i % 32);
                (qs[32 * pair + k] >> (4 * half)) & 15
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

/// The eight scales and eight minima of six bits in 12 bytes `s`: those of sub-blocks 0..4 are the
/// low six bits of whole bytes; those of 4..8 have four bits in bytes 8..12 and the two bits left
/// over at the top of bytes 0..8.
pub(super) fn scales_and_minima(s: &[u8]) -> ([u8; 8], [u8; 8]) {
    let scale = |j: usize| match j {
        0..4 => s[j] & 63,
        _ => (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4),
    };
    let min = |j: usize| match j {
        0..4 => s[j + 4] & 63,
        _ => (s[j + 4] >> 4) | ((s[j] >> 6) << 4),
    };
    (std::array::from_fn(scale), std::array::from_fn(min))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_format_says() {
        let mut bytes = vec![0u8; BlockQ4K::BYTES];
        bytes[..2].copy_from_slice(&f16::from_f32(1.0).to_le_bytes());
        bytes[2..4].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[4] = 0b10_000011; // scale[0] = 3, top bits of scale[4] = 2
        bytes[8] = 0b01_000110; // min[0] = 6, top bits of min[4] = 1
        bytes[12] = 0x5A; // scale[4] = 2<<4 | 10, min[4] = 1<<4 | 5
        bytes[16] = 0x7F; // q[0] = 15, q[32] = 7
        bytes[16 + 64] = 0x04; // q[128] = 4
        let block = BlockQ4K::read(&bytes);
        assert_eq!((block.scale[0], block.scale[4]), (3, 42));
        assert_eq!((block.min[0], block.min[4]), (6, 21));
        let mut out = [f32::NAN; 256];
        block.dequantize(&mut out);
        assert_eq!((out[0], out[1], out[32]), (42.0, -3.0, 0.0));
        assert_eq!((out[128], out[129]), (42.0 * 4.0 - 10.5, -10.5));
    }
}
