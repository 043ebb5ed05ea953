//! The interleaved order of a packed matrix, the same for every vector instruction set.
//!
//! A *panel* is 16 rows (missing ones are zero). Its quants are cut into 32-bit words as they
//! lie in the file, and word `i` of all 16 rows makes vector `i` of 64 bytes: one 512-bit load
//! then gives each row four neighbouring columns, which is what VNNI, AMX and NEON dot products
//! and AVX2's `maddubs` want. 4- and 6-bit quants stay packed and are unpacked in registers.
//!
//! Bytes of a panel, each part on a 64-byte bound, `n` blocks per row:
//! - F32, F16: `[n_cols][16]` numbers. BF16: `[n_cols / 2][16][2]`, columns rounded up to even.
//! - Q8_0: `[n][8][16]` words of 4 signed quants, then `[n][16]` F16 scales.
//! - Q4_0: `[n][4][16]` words; word `j` has columns `4j..` low and `16 + 4j..` high; then scales.
//! - IQ4_NL: as Q4_0.
//! - Q5_0: per block Q4_0's words, then `[16]` words of high bits: bit `j` of byte `k` belongs to
//!   column `4j + k`; after all blocks `[n][16]` F16 scales.
//! - Q4_1: per block Q4_0's words, `[16]` F16 `d`, `[16]` F16 `m`. Q5_1: the same with Q5_0's high
//!   bits after the words.
//! - Q2_K: per block `[16][16]` words of quants, `[4][16]` words of scales and minima as in the file,
//!   `[16]` F16 `d`, `[16]` F16 `dmin`.
//! - Q3_K: per block `[16][16]` words of low bits, `[8][16]` of high bits, `[4][16]` of signed scales;
//!   after all blocks `[n][16]` F16 `d`.
//! - Q4_K: per block `[32][16]` words of quants (word `8p + j`: columns `64p + 4j..` low and
//!   `64p + 32 + 4j..` high), `[3][16]` words of 6-bit scales and minima as in the file,
//!   `[16]` F16 `d`, `[16]` F16 `dmin`.
//! - Q5_K: per block what Q4_K has, then `[8][16]` words of high bits as in the file: bit `s` of
//!   word `j` belongs to columns `32s + 4j..`.
//! - Q6_K: per block `[32][16]` words of low bits, `[16][16]` words of high bits, `[4][16]` words
//!   of signed scales; after all blocks `[n][16]` F16 `d`.
//! - IQ4_XS: per block Q4_0's words eight times, `[2][16]` words of signed scales; after all blocks
//!   `[n][16]` F16 `d`.

use crate::quant::{WeightType, iq4_xs, q3_k};
use std::ops::Range;

/// Rows of a panel: 32-bit lanes of a 512-bit vector.
pub(crate) const ROWS: usize = 16;
/// Bytes of one vector.
pub(crate) const VECTOR: usize = 64;
/// Q4_K block of a panel: quants, scales and minima, `d` and `dmin`.
pub(crate) const Q4_K_BLOCK: usize = (32 + 3 + 1) * VECTOR;
/// Q5_K block of a panel: a block of Q4_K, then the high bits.
pub(crate) const Q5_K_BLOCK: usize = Q4_K_BLOCK + 8 * VECTOR;
pub(crate) const Q5_K_HIGH: usize = Q4_K_BLOCK;
/// Q6_K block of a panel without its `d`.
pub(crate) const Q6_K_BLOCK: usize = (32 + 16 + 4) * VECTOR;
/// Where a Q6_K block keeps its high bits, and its scales.
pub(crate) const Q6_K_HIGH: usize = 32 * VECTOR;
pub(crate) const Q6_K_SCALES: usize = 48 * VECTOR;
/// Where a Q4_K block keeps its scales, and `d`.
pub(crate) const Q4_K_SCALES: usize = 32 * VECTOR;
pub(crate) const Q4_K_D: usize = 35 * VECTOR;

/// Q4_1 and Q5_1 blocks of a panel; the last vector is `d` and `m`.
pub(crate) const Q4_1_BLOCK: usize = 5 * VECTOR;
pub(crate) const Q5_1_BLOCK: usize = 6 * VECTOR;
/// Q5_0 block of a panel without its scales.
pub(crate) const Q5_0_BLOCK: usize = 5 * VECTOR;
/// Where Q5_0 and Q5_1 blocks keep their high bits.
pub(crate) const Q5_0_HIGH: usize = 4 * VECTOR;
/// Q2_K block of a panel, and where it keeps its scales and minima, and `d` and `dmin`.
pub(crate) const Q2_K_BLOCK: usize = 21 * VECTOR;
pub(crate) const Q2_K_SCALES: usize = 16 * VECTOR;
pub(crate) const Q2_K_D: usize = 20 * VECTOR;
/// Q3_K block of a panel without its `d`, and where it keeps its high bits and its scales.
pub(crate) const Q3_K_BLOCK: usize = 28 * VECTOR;
pub(crate) const Q3_K_HIGH: usize = 16 * VECTOR;
pub(crate) const Q3_K_SCALES: usize = 24 * VECTOR;
/// IQ4_XS block of a panel without its `d`, and where it keeps its scales.
pub(crate) const IQ4_XS_BLOCK: usize = 34 * VECTOR;
pub(crate) const IQ4_XS_SCALES: usize = 32 * VECTOR;

/// Where the F16 scales of a panel begin (all types but Q2_K, Q4_K and Q5_K).
pub(crate) fn scales_offset(ty: WeightType, n_cols: usize) -> usize {
    match ty {
        WeightType::Q8_0 => n_cols / 32 * 8 * VECTOR,
        WeightType::Q4_0 | WeightType::IQ4_NL => n_cols / 32 * 4 * VECTOR,
        WeightType::Q5_0 => n_cols / 32 * Q5_0_BLOCK,
        WeightType::Q4_1 => Q4_1_BLOCK - VECTOR,
        WeightType::Q5_1 => Q5_1_BLOCK - VECTOR,
        WeightType::Q3_K => n_cols / 256 * Q3_K_BLOCK,
        WeightType::Q6_K => n_cols / 256 * Q6_K_BLOCK,
        WeightType::IQ4_XS => n_cols / 256 * IQ4_XS_BLOCK,
        _ => 0,
    }
}

/// Bytes from one block's F16 scales to the next one's.
pub(crate) fn scales_step(ty: WeightType) -> usize {
    match ty {
        WeightType::Q4_1 => Q4_1_BLOCK,
        WeightType::Q5_1 => Q5_1_BLOCK,
        _ => 2 * ROWS,
    }
}

/// Bytes of a panel; `None` if that overflows.
pub(crate) fn panel_bytes(ty: WeightType, n_cols: usize) -> Option<usize> {
    let per_block = match ty {
        WeightType::F32 => ROWS * 4,
        WeightType::F16 => ROWS * 2,
        WeightType::BF16 => {
            return n_cols.div_ceil(2).checked_mul(VECTOR);
        }
        WeightType::Q8_0 => 8 * VECTOR + 2 * ROWS,
        WeightType::Q4_0 | WeightType::IQ4_NL => 4 * VECTOR + 2 * ROWS,
        WeightType::Q4_1 => Q4_1_BLOCK,
        WeightType::Q5_0 => Q5_0_BLOCK + 2 * ROWS,
        WeightType::Q5_1 => Q5_1_BLOCK,
        WeightType::Q2_K => Q2_K_BLOCK,
        WeightType::Q3_K => Q3_K_BLOCK + 2 * ROWS,
        WeightType::Q4_K => Q4_K_BLOCK,
        WeightType::Q5_K => Q5_K_BLOCK,
        WeightType::Q6_K => Q6_K_BLOCK + 2 * ROWS,
        WeightType::IQ4_XS => IQ4_XS_BLOCK + 2 * ROWS,
    };
    (n_cols / ty.block_len())
        .checked_mul(per_block)?
        .checked_next_multiple_of(VECTOR)
}

/// Columns of all 16 rows that are interleaved before the next ones: what they become stays in the
/// first-level cache, where a whole row at a time would miss it with every word.
const COLUMNS: usize = 256;

/// Interleaves up to 16 rows, `row_bytes` each and one after the other in `rows`, into `panel`,
/// which is zero.
pub(crate) fn pack_panel(ty: WeightType, n_cols: usize, rows: &[u8], panel: &mut [u8]) {
    let row_bytes = ty.row_bytes(n_cols).expect("checked by pack");
    let n_blocks = n_cols / ty.block_len();
    let step = COLUMNS / ty.block_len();
    for first in (0..n_blocks).step_by(step) {
        let blocks = first..(first + step).min(n_blocks);
        for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
            pack_blocks(ty, n_cols, r, row, blocks.clone(), panel);
        }
    }
}

/// Blocks `blocks` of `row` become lane `r` of the panel.
fn pack_blocks(
    ty: WeightType,
    n_cols: usize,
    r: usize,
    row: &[u8],
    blocks: Range<usize>,
    panel: &mut [u8],
) {
    let block_bytes = ty.block_bytes();
    let part = &row[blocks.start * block_bytes..blocks.end * block_bytes];
    let scales = scales_offset(ty, n_cols);
    let blocks = blocks.zip(part.chunks_exact(block_bytes));
    match ty {
        WeightType::F32 => blocks.for_each(|(k, b)| words(b, r, &mut panel[k * VECTOR..])),
        WeightType::F16 => blocks.for_each(|(k, b)| half_at(b, k, r, panel)),
        WeightType::BF16 => blocks.for_each(|(k, b)| {
            let at = k / 2 * VECTOR + 4 * r + k % 2 * 2;
            panel[at..at + 2].copy_from_slice(b);
        }),
        WeightType::Q8_0 => blocks.for_each(|(i, b)| {
            words(&b[2..], r, &mut panel[i * 8 * VECTOR..]);
            half_at(b, i, r, &mut panel[scales..]);
        }),
        WeightType::Q4_0 | WeightType::IQ4_NL => blocks.for_each(|(i, b)| {
            words(&b[2..], r, &mut panel[i * 4 * VECTOR..]);
            half_at(b, i, r, &mut panel[scales..]);
        }),
        WeightType::Q4_1 => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q4_1_BLOCK..(i + 1) * Q4_1_BLOCK];
            words(&b[4..], r, out);
            half_at(b, 0, r, &mut out[scales..]);
            half_at(&b[2..], 1, r, &mut out[scales..]);
        }),
        WeightType::Q5_0 => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q5_0_BLOCK..];
            words(&b[6..], r, out);
            words(&by_column(&b[2..6]), r, &mut out[Q5_0_HIGH..]);
            half_at(b, i, r, &mut panel[scales..]);
        }),
        WeightType::Q5_1 => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q5_1_BLOCK..(i + 1) * Q5_1_BLOCK];
            words(&b[8..], r, out);
            words(&by_column(&b[4..8]), r, &mut out[Q5_0_HIGH..]);
            half_at(b, 0, r, &mut out[scales..]);
            half_at(&b[2..], 1, r, &mut out[scales..]);
        }),
        WeightType::Q2_K => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q2_K_BLOCK..(i + 1) * Q2_K_BLOCK];
            words(&b[16..80], r, out);
            words(&b[..16], r, &mut out[Q2_K_SCALES..]);
            half_at(&b[80..], 0, r, &mut out[Q2_K_D..]);
            half_at(&b[82..], 1, r, &mut out[Q2_K_D..]);
        }),
        WeightType::Q3_K => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q3_K_BLOCK..];
            words(&b[32..96], r, out);
            words(&b[..32], r, &mut out[Q3_K_HIGH..]);
            let steps = q3_k::scales(b).map(|scale| scale as u8);
            words(&steps, r, &mut out[Q3_K_SCALES..]);
            half_at(&b[108..], i, r, &mut panel[scales..]);
        }),
        WeightType::Q4_K => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q4_K_BLOCK..(i + 1) * Q4_K_BLOCK];
            words(&b[16..], r, out);
            words(&b[4..16], r, &mut out[Q4_K_SCALES..]);
            half_at(b, 0, r, &mut out[Q4_K_D..]);
            half_at(&b[2..], 1, r, &mut out[Q4_K_D..]);
        }),
        WeightType::Q5_K => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q5_K_BLOCK..(i + 1) * Q5_K_BLOCK];
            words(&b[48..], r, out);
            words(&b[4..16], r, &mut out[Q4_K_SCALES..]);
            half_at(b, 0, r, &mut out[Q4_K_D..]);
            half_at(&b[2..], 1, r, &mut out[Q4_K_D..]);
            words(&b[16..48], r, &mut out[Q5_K_HIGH..]);
        }),
        WeightType::Q6_K => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * Q6_K_BLOCK..];
            words(&b[..128], r, out);
            words(&b[128..192], r, &mut out[Q6_K_HIGH..]);
            words(&b[192..208], r, &mut out[Q6_K_SCALES..]);
            half_at(&b[208..], i, r, &mut panel[scales..]);
        }),
        WeightType::IQ4_XS => blocks.for_each(|(i, b)| {
            let out = &mut panel[i * IQ4_XS_BLOCK..];
            words(&b[8..], r, out);
            let steps = iq4_xs::scales(b).map(|scale| scale as u8);
            words(&steps, r, &mut out[IQ4_XS_SCALES..]);
            half_at(b, i, r, &mut panel[scales..]);
        }),
    }
}

/// Word `i` of `row` becomes lane `r` of vector `i`.
fn words(row: &[u8], r: usize, out: &mut [u8]) {
    for (word, vector) in row.chunks_exact(4).zip(out.chunks_exact_mut(VECTOR)) {
        vector[4 * r..4 * r + 4].copy_from_slice(word);
    }
}

/// The 32 high bits of a block of Q5_0 or Q5_1, bit `4j + k` moved to bit `j` of byte `k`.
fn by_column(high: &[u8]) -> [u8; 4] {
    std::array::from_fn(|k| {
        (0..8).fold(0, |byte, j| {
            let i = 4 * j + k;
            byte | ((high[i / 8] >> (i % 8)) & 1) << j
        })
    })
}

/// The two bytes at the start of `block` become lane `r` of the `i`-th run of 16 halves.
fn half_at(block: &[u8], i: usize, r: usize, out: &mut [u8]) {
    let at = 2 * (i * ROWS + r);
    out[at..at + 2].copy_from_slice(&block[..2]);
}
