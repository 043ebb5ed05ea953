//! `attend` on Q8_0 cells with AMX tiles; everything else is [`crate::cpu::avx512::attend`].
//!
//! Eight rows, each with the high and the low bytes of its 16-bit integers, fill the sixteen rows
//! of a tile. The integer sums are exact and what follows them is done in the same order, so results
//! have the bits of the vector form.

use super::TileConfig;
use crate::attend::layout::{BLOCK, HALF_CELLS, K_BLOCK_BYTES, KvType, PAGE_CELLS, V_BLOCK_BYTES};
use crate::attend::tile::{PageKernels, ROWS, Tile, half_seen};
use crate::cpu::avx512::attend::{self as vectors, Steps};
use std::arch::asm;
use std::arch::x86_64::*;

/// The kernels of this instruction set.
pub(crate) const KERNELS: PageKernels = PageKernels {
    scores,
    soft_max,
    weigh,
    enter,
    leave,
    integer_q: true,
    byte_q: true,
};

/// Numbers of a tile of sums.
const SUMS: usize = 256;

/// Sums (tiles 0 to 3), queries of 32 columns (4) and keys (6 and 7), weights of 64 cells (5) and their
/// values (2 and 3).
const CONFIG: TileConfig = TileConfig {
    row_bytes: [64, 64, 64, 64, 32, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0],
    ..super::CONFIG
};

/// Configuring takes as long as a few products: once for a partition.
unsafe fn enter() {
    // SAFETY: tiles are there, by the caller's promise.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly)) };
}

unsafe fn leave() {
    // SAFETY: as above.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
}

/// See [`PageKernels::scores`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn scores(tile: &mut Tile, keys: *const u8, seen: u64) {
    // SAFETY: `keys` are a page's of this type and dimension, by the caller's promise; tiles are
    // configured ([`enter`]).
    unsafe {
        if tile.ty_k != KvType::Q8_0 {
            return (vectors::KERNELS.scores)(tile, keys, seen);
        }
        let n_blocks = tile.dim_k.div_ceil(BLOCK);
        tile.sums.room((n_blocks + 1) * 2 * SUMS);
        for half in (0..2).filter(|&half| half_seen(seen, half)) {
            let keys = keys.add(half * n_blocks * K_BLOCK_BYTES);
            for row in (0..tile.n_rows).step_by(ROWS) {
                score_rows(tile, row, keys, half);
            }
        }
    }
}

/// Scores of up to eight rows from `first` on and 32 cells: the sums of all blocks, then what
/// follows from them, so that nothing waits for a single product.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn score_rows(tile: &mut Tile, first: usize, keys: *const u8, half: usize) {
    let n_blocks = tile.dim_k.div_ceil(BLOCK);
    let n_rows = ROWS.min(tile.n_rows - first);
    let sums = tile.sums.ptr().cast::<i32>();
    let mut pace = tile.pace;
    for b in (0..n_blocks).step_by(2) {
        // Two blocks side by side; where there is no second one, the first again, to a place of its own.
        let other = (b + 1).min(n_blocks - 1);
        // SAFETY: `q8` has whole groups of eight rows of `n_blocks` blocks, `sums` two tiles for
        // each block and one more; `keys` has `n_blocks` blocks.
        unsafe {
            let q = |b: usize| {
                tile.q8
                    .as_ptr()
                    .add((first * n_blocks + b * ROWS) * 2 * BLOCK)
            };
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "prefetcht1 [{ask}]",
                "tileloadd tmm4, [{q} + {q_line}*1]",
                "prefetcht1 [{ask} + 64]",
                "tileloadd tmm6, [{k} + {k_line}*1]",
                "prefetcht1 [{ask} + 2*64]",
                "tdpbsud tmm0, tmm4, tmm6",
                "prefetcht1 [{ask} + 3*64]",
                "tileloadd tmm7, [{k} + {k_line}*1 + 64]",
                "prefetcht1 [{ask} + 4*64]",
                "tdpbsud tmm1, tmm4, tmm7",
                "prefetcht1 [{ask} + 5*64]",
                "tileloadd tmm4, [{other_q} + {q_line}*1]",
                "prefetcht1 [{ask} + 6*64]",
                "tileloadd tmm6, [{other_k} + {k_line}*1]",
                "prefetcht1 [{ask} + 7*64]",
                "tdpbsud tmm2, tmm4, tmm6",
                "prefetcht1 [{ask} + 8*64]",
                "tileloadd tmm7, [{other_k} + {k_line}*1 + 64]",
                "prefetcht1 [{ask} + 9*64]",
                "tdpbsud tmm3, tmm4, tmm7",
                "prefetcht1 [{ask} + 10*64]",
                "tilestored [{sums} + {line}*1], tmm0",
                "prefetcht1 [{ask} + 11*64]",
                "tilestored [{sums} + {line}*1 + 1024], tmm1",
                "prefetcht1 [{ask} + 12*64]",
                "tilestored [{sums} + {line}*1 + 2048], tmm2",
                "prefetcht1 [{ask} + 13*64]",
                "tilestored [{sums} + {line}*1 + 3072], tmm3",
                "prefetcht1 [{ask} + 14*64]",
                "prefetcht1 [{ask} + 15*64]",
                ask = in(reg) pace.take(16),
                q = in(reg) q(b),
                other_q = in(reg) q(other),
                q_line = in(reg) BLOCK,
                k = in(reg) keys.add(b * K_BLOCK_BYTES),
                other_k = in(reg) keys.add(other * K_BLOCK_BYTES),
                k_line = in(reg) 4 * HALF_CELLS,
                sums = in(reg) sums.add(b * 2 * SUMS),
                line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
    let mut score = [[_mm512_setzero_ps(); 2]; ROWS];
    let bias = tile.q16_bias.as_ptr();
    for b in 0..n_blocks {
        // SAFETY: as above; `q16_bias` has the tile's rows.
        unsafe {
            let (keys, sums) = (keys.add(b * K_BLOCK_BYTES), sums.add(b * 2 * SUMS));
            let scales = keys.add(HALF_CELLS * BLOCK).cast::<__m256i>();
            let scale = [0, 1].map(|j| _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(j))));
            for r in 0..ROWS {
                // Rows beyond the last repeat it; a constant number keeps `score` in registers.
                let row = first + r.min(n_rows - 1);
                pace.ask();
                let bias = _mm512_set1_epi32(*bias.add(row * n_blocks + b));
                for j in 0..2 {
                    let high = sums.add(j * SUMS + r * 16);
                    let low = _mm512_load_si512(high.add(ROWS * 16).cast());
                    let high = _mm512_slli_epi32::<8>(_mm512_load_si512(high.cast()));
                    let x = _mm512_add_epi32(_mm512_add_epi32(high, low), bias);
                    score[r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), scale[j], score[r][j]);
                }
            }
        }
    }
    tile.pace = pace;
    let s = tile.s.ptr();
    for r in 0..ROWS {
        if r == n_rows {
            break;
        }
        let step = _mm512_set1_ps(tile.q16_step[first + r]);
        for j in 0..2 {
            // SAFETY: row `first + r` of `s`.
            unsafe {
                let to = s.add((first + r) * PAGE_CELLS + half * HALF_CELLS + j * 16);
                _mm512_storeu_ps(to, _mm512_mul_ps(score[r][j], step));
            }
        }
    }
}

/// See [`PageKernels::soft_max`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn soft_max(tile: &mut Tile) {
    // SAFETY: by the caller's promise.
    unsafe {
        match tile.ty_k {
            KvType::Q8_0 => vectors::soft_max::<true>(tile),
            _ => vectors::soft_max::<false>(tile),
        }
    }
}

/// See [`PageKernels::weigh`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi")]
unsafe fn weigh(tile: &mut Tile, values: *const u8, seen: u64) {
    // SAFETY: `values` are a page's of this type and dimension, by the caller's promise; tiles are
    // configured ([`enter`]).
    unsafe {
        if tile.ty_v != KvType::Q8_0 {
            return (vectors::KERNELS.weigh)(tile, values, seen);
        }
        let n_groups = tile.n_rows.div_ceil(ROWS);
        let n_chunks = tile.dim_v / BLOCK;
        tile.sums.room(2 * n_groups * 2 * SUMS);
        // The sums of a chunk, then what follows from those of the one before: nothing waits.
        for chunk in 0..=n_chunks {
            if chunk < n_chunks {
                let values = values.add(chunk * V_BLOCK_BYTES);
                let steps = tile.wide.ptr().add(chunk % 2 * tile.n_rows);
                let scales = values.add(PAGE_CELLS * BLOCK);
                let first = vectors::steps_of(scales, tile.seen[0]);
                byte_weights(tile, scales, &first, steps);
                for group in 0..n_groups {
                    let sums = (chunk % 2 * n_groups + group) * 2 * SUMS;
                    sum_values(tile, group, values, sums);
                }
            }
            if chunk > 0 {
                for group in 0..n_groups {
                    let sums = ((chunk - 1) % 2 * n_groups + group) * 2 * SUMS;
                    weigh_rows(tile, group * ROWS, chunk - 1, sums);
                }
            }
        }
    }
}

/// Of 32 words of two vectors: their second bytes, then their first ones.
const BYTES: [u8; 64] = {
    let mut order = [0; 64];
    let mut i = 0;
    while i < 32 {
        order[i] = 4 * i as u8 + 1;
        order[32 + i] = 4 * i as u8;
        i += 1;
    }
    order
};

/// The integers of [`vectors::integer_weights`] as rows of high bytes of 64 cells and then of low bytes.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
unsafe fn byte_weights(tile: &mut Tile, scales: *const u8, first: &Steps, worth: *mut f32) {
    let s = tile.s.ptr();
    // SAFETY: 64 bytes.
    let order = unsafe { _mm512_loadu_si512(BYTES.as_ptr().cast()) };
    let mut steps = *first;
    let mut pace = tile.pace;
    // An integer up to 2^22 is what is in the low bits then, rounded as conversion would.
    let magic = _mm512_set1_ps(12_582_912.0);
    for row in 0..tile.n_rows {
        pace.ask();
        // SAFETY: 64 scales; `w16` has 128 bytes, `s` `PAGE_CELLS` and `worth` one number a row.
        unsafe {
            if tile.seen[row] != steps.seen {
                steps = vectors::steps_of(scales, tile.seen[row]);
            }
            let s = s.add(row * PAGE_CELLS);
            let mut w = [_mm512_setzero_si512(); 4];
            for i in 0..4 {
                let weight = _mm512_mul_ps(_mm512_loadu_ps(s.add(16 * i)), steps.per_weight[i]);
                w[i] = _mm512_castps_si512(_mm512_add_ps(weight, magic));
            }
            let a = _mm512_permutex2var_epi8(w[0], order, w[1]);
            let b = _mm512_permutex2var_epi8(w[2], order, w[3]);
            let to = tile.w16.as_mut_ptr().add(row * 2 * PAGE_CELLS);
            _mm512_storeu_si512(to.cast(), _mm512_shuffle_i64x2::<0x44>(a, b));
            let low = _mm512_shuffle_i64x2::<0xee>(a, b);
            _mm512_storeu_si512(to.add(PAGE_CELLS).cast(), low);
            worth.add(row).write(steps.worth);
        }
    }
    tile.pace = pace;
}

/// 32 dimensions of a page's values times the integer weights of eight rows, to `sums`.
unsafe fn sum_values(tile: &mut Tile, group: usize, values: *const u8, sums: usize) {
    // SAFETY: `w16` has whole groups of eight rows of high and low bytes, `sums` room for two
    // tiles; the block has 64 cells of 32 dimensions.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "prefetcht1 [{ask}]",
            "tileloadd tmm5, [{w} + {line}*1]",
            "prefetcht1 [{ask} + 64]",
            "prefetcht1 [{ask} + 2*64]",
            "tileloadd tmm2, [{v} + {v_line}*1]",
            "prefetcht1 [{ask} + 3*64]",
            "prefetcht1 [{ask} + 4*64]",
            "tdpbusd tmm0, tmm5, tmm2",
            "prefetcht1 [{ask} + 5*64]",
            "prefetcht1 [{ask} + 6*64]",
            "tileloadd tmm3, [{v} + {v_line}*1 + 64]",
            "prefetcht1 [{ask} + 7*64]",
            "prefetcht1 [{ask} + 8*64]",
            "tdpbusd tmm1, tmm5, tmm3",
            "prefetcht1 [{ask} + 9*64]",
            "tilestored [{sums} + {line}*1], tmm0",
            "prefetcht1 [{ask} + 10*64]",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            "prefetcht1 [{ask} + 11*64]",
            ask = in(reg) tile.pace.take(12),
            w = in(reg) tile.w16.as_ptr().add(group * ROWS * 2 * PAGE_CELLS),
            v = in(reg) values,
            v_line = in(reg) 4 * BLOCK,
            sums = in(reg) tile.sums.ptr().add(sums),
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm5") _,
            options(nostack),
        );
    }
}

/// Adds the sums of 32 dimensions of a page's values to up to eight rows from `first` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn weigh_rows(tile: &mut Tile, first: usize, chunk: usize, sums: usize) {
    let n_rows = ROWS.min(tile.n_rows - first);
    let (sums, steps) = (tile.sums.ptr().wrapping_add(sums), tile.wide.ptr());
    let sums = sums.cast::<i32>();
    let (acc, dim) = (tile.acc.ptr(), tile.dim_v);
    let mut pace = tile.pace;
    for r in 0..n_rows {
        let row = first + r;
        pace.ask();
        // SAFETY: two tiles of sums, two steps for each row in `wide`, the tile's rows of `acc`.
        unsafe {
            let step = *steps.add(chunk % 2 * tile.n_rows + row);
            let alpha = _mm512_set1_ps(tile.alpha[row]);
            let beta = _mm512_set1_ps(tile.beta[row] * step);
            for j in 0..2 {
                let high = sums.add(j * SUMS + 2 * r * 16);
                let low = _mm512_load_si512(high.add(16).cast());
                let high = _mm512_slli_epi32::<8>(_mm512_load_si512(high.cast()));
                let x = _mm512_cvtepi32_ps(_mm512_add_epi32(high, low));
                let acc = acc.add(row * dim + chunk * BLOCK + j * 16);
                let old = _mm512_mul_ps(_mm512_loadu_ps(acc), alpha);
                _mm512_storeu_ps(acc, _mm512_fmadd_ps(beta, x, old));
            }
        }
    }
    tile.pace = pace;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::avx512::attend::{integer_weights, steps_of, word_at};
    use crate::dispatch::{Isa, available};
    use half::f16;

    /// The order for tiles of bytes says the same as the one for vectors of words.
    #[test]
    fn integer_weights_are_the_same_in_both_orders() {
        if !available().contains(&Isa::Amx) {
            println!("skipped: this machine has no AMX");
            return;
        }
        let n_rows = 9;
        let mut tile = Tile::new();
        tile.n_rows = n_rows;
        for (i, s) in tile.s.slice(n_rows * PAGE_CELLS).iter_mut().enumerate() {
            *s = ((i as f32 * 0.37).sin() + 1.0) / 2.0;
        }
        // Rows of three queries that see different cells.
        tile.seen = (0..n_rows).map(|row| u64::MAX << (5 * (row / 3))).collect();
        tile.w16
            .resize(n_rows.next_multiple_of(ROWS) * 2 * PAGE_CELLS, 0);
        let scales: Vec<u8> = (0..PAGE_CELLS)
            .flat_map(|c| f16::from_f32(0.01 + c as f32 * 0.003).to_le_bytes())
            .collect();
        let mut worth = [[0f32; 9]; 2];
        let mut weights = [[[0u16; PAGE_CELLS]; 9]; 2];
        // SAFETY: the instruction set is there; the tile has these rows, `scales` 64 numbers.
        unsafe {
            let first = steps_of(scales.as_ptr(), tile.seen[0]);
            byte_weights(&mut tile, scales.as_ptr(), &first, worth[0].as_mut_ptr());
            for row in 0..n_rows {
                let w = &tile.w16[row * 2 * PAGE_CELLS..][..2 * PAGE_CELLS];
                for c in 0..PAGE_CELLS {
                    weights[0][row][c] = u16::from_be_bytes([w[c], w[PAGE_CELLS + c]]);
                }
            }
            integer_weights(&mut tile, scales.as_ptr(), &first, worth[1].as_mut_ptr());
            for row in 0..n_rows {
                let w = &tile.w16[row * 2 * PAGE_CELLS..][..2 * PAGE_CELLS];
                for c in 0..PAGE_CELLS {
                    // Even cells of a group in its first word.
                    let at = 4 * (word_at(c / 4) + c % 2) + c % 4 / 2 * 2;
                    weights[1][row][c] = u16::from_le_bytes([w[at], w[at + 1]]);
                }
            }
        }
        assert_eq!(worth[0], worth[1]);
        assert_eq!(weights[0], weights[1]);
        for row in 0..n_rows {
            let seen = |c: usize| tile.seen[row] >> c & 1 == 1;
            let largest = weights[0][row].iter().max().copied();
            assert!((1..=32767).contains(&largest.unwrap_or(0)), "row {row}");
            assert!((0..PAGE_CELLS).all(|c| seen(c) || weights[0][row][c] == 0));
        }
    }
}
