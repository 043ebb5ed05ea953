//! Types that another type can state exactly.
//!
//! Q5_0 and IQ4_NL are an F16 scale and 32 small integers per block, and so is Q8_0: the same
//! numbers in other bytes. Matrices of these types are restated when they are loaded and run on
//! Q8_0's kernels, at the price of 34 bytes a block instead of 22 or 18.

use super::BlockQ8_0;

/// Bytes of a Q5_0 block: the scale, 32 high bits, 32 nibbles.
pub const Q5_0_BYTES: usize = 22;
/// Bytes of an IQ4_NL block: the scale, 32 nibbles.
pub const IQ4_NL_BYTES: usize = 18;

/// The 16 values an IQ4_NL nibble stands for (the format's table).
const IQ4_NL: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Q5_0 blocks as Q8_0 blocks, number for number.
///
/// # Panics
/// If `bytes` are not whole blocks.
pub fn q5_0_to_q8_0(bytes: &[u8]) -> Vec<u8> {
    restate(bytes, Q5_0_BYTES, |block, q| {
        let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        for i in 0..16 {
            let nibbles = block[6 + i];
            let bit = |i: usize| ((high >> i) & 1) as u8;
            q[i] = ((nibbles & 15) | bit(i) << 4).wrapping_sub(16);
            q[i + 16] = ((nibbles >> 4) | bit(i + 16) << 4).wrapping_sub(16);
        }
    })
}

/// IQ4_NL blocks as Q8_0 blocks, number for number.
///
/// # Panics
/// If `bytes` are not whole blocks.
pub fn iq4_nl_to_q8_0(bytes: &[u8]) -> Vec<u8> {
    restate(bytes, IQ4_NL_BYTES, |block, q| {
        for i in 0..16 {
            q[i] = IQ4_NL[usize::from(block[2 + i] & 15)] as u8;
            q[i + 16] = IQ4_NL[usize::from(block[2 + i] >> 4)] as u8;
        }
    })
}

/// Copies the scale of each block and lets `quants` fill in its 32 bytes.
fn restate(bytes: &[u8], block_bytes: usize, quants: impl Fn(&[u8], &mut [u8])) -> Vec<u8> {
    assert!(
        bytes.len().is_multiple_of(block_bytes),
        "{} bytes are not blocks of {block_bytes}",
        bytes.len()
    );
    let mut out = vec![0; bytes.len() / block_bytes * BlockQ8_0::BYTES];
    let blocks = bytes.chunks_exact(block_bytes);
    for (block, out) in blocks.zip(out.chunks_exact_mut(BlockQ8_0::BYTES)) {
        out[..2].copy_from_slice(&block[..2]);
        quants(block, &mut out[2..]);
    }
    out
}
