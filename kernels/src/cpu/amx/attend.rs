//! `attend` on Q8_0 cells with AMX tiles; everything else is [`crate::cpu::avx512::attend`].
//!
//! Eight rows, each with the high and the low bytes of its 16-bit integers, fill the sixteen rows
//! of a tile. The integer sums are exact and what follows them is done in the same order, so results
//! have the bits of the vector form.

use super::{CONFIG, CONFIG_32};
use crate::attend::layout::{BLOCK, HALF_CELLS, K_BLOCK_BYTES, KvType, PAGE_CELLS, V_BLOCK_BYTES};
use crate::attend::tile::{PageKernels, ROWS, Tile, half_seen};
use crate::cpu::avx512::attend::{self as vectors, AHEAD};
use std::arch::asm;
use std::arch::x86_64::*;

/// The kernels of this instruction set.
pub(crate) const KERNELS: PageKernels = PageKernels {
    scores,
    soft_max: vectors::KERNELS.soft_max,
    weigh,
    integer_q: true,
    byte_q: true,
};

/// Numbers of a tile of sums.
const SUMS: usize = 256;

/// See [`PageKernels::scores`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn scores(tile: &mut Tile, keys: *const u8, seen: u64) {
    // SAFETY: `keys` are a page's of this type and dimension, by the caller's promise; tiles are
    // configured before and released after their use.
    unsafe {
        if tile.ty_k != KvType::Q8_0 {
            return (vectors::KERNELS.scores)(tile, keys, seen);
        }
        let n_blocks = tile.dim_k.div_ceil(BLOCK);
        tile.sums.room(n_blocks * 2 * SUMS);
        asm!("ldtilecfg [{}]", in(reg) &CONFIG_32, options(nostack, readonly));
        for half in (0..2).filter(|&half| half_seen(seen, half)) {
            let keys = keys.add(half * n_blocks * K_BLOCK_BYTES);
            for row in (0..tile.n_rows).step_by(ROWS) {
                score_rows(tile, row, keys, half);
            }
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Asks memory for the bytes as far ahead as the vector form does.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask(tile: &Tile, from: *const u8, n_bytes: usize) {
    for line in (0..n_bytes).step_by(64) {
        tile.ahead.ask(from.wrapping_add(line), AHEAD);
    }
}

/// Scores of up to eight rows from `first` on and 32 cells: the sums of all blocks, then what
/// follows from them, so that nothing waits for a single product.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn score_rows(tile: &mut Tile, first: usize, keys: *const u8, half: usize) {
    let n_blocks = tile.dim_k.div_ceil(BLOCK);
    let n_rows = ROWS.min(tile.n_rows - first);
    let sums = tile.sums.ptr().cast::<i32>();
    for b in 0..n_blocks {
        // SAFETY: `q8` has whole groups of eight rows of `n_blocks` blocks, `sums` two tiles for
        // each block; `keys` has `n_blocks` blocks.
        unsafe {
            let q = (first * n_blocks + b * ROWS) * 2 * BLOCK;
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tileloadd tmm4, [{q} + {q_line}*1]",
                "tileloadd tmm6, [{k} + {k_line}*1]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{k} + {k_line}*1 + 64]",
                "tdpbsud tmm1, tmm4, tmm7",
                "tilestored [{sums} + {line}*1], tmm0",
                "tilestored [{sums} + {line}*1 + 1024], tmm1",
                q = in(reg) tile.q8.as_ptr().add(q),
                q_line = in(reg) BLOCK,
                k = in(reg) keys.add(b * K_BLOCK_BYTES),
                k_line = in(reg) 4 * HALF_CELLS,
                sums = in(reg) sums.add(b * 2 * SUMS),
                line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
    let mut score = [[_mm512_setzero_ps(); 2]; ROWS];
    for b in 0..n_blocks {
        // SAFETY: as above; `q16_bias` has the tile's rows.
        unsafe {
            let (keys, sums) = (keys.add(b * K_BLOCK_BYTES), sums.add(b * 2 * SUMS));
            if first == 0 {
                ask(tile, keys, K_BLOCK_BYTES);
            }
            let scales = keys.add(HALF_CELLS * BLOCK).cast::<__m256i>();
            let scale = [0, 1].map(|j| _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(j))));
            for r in 0..ROWS {
                // Rows beyond the last repeat it; a constant number keeps `score` in registers.
                let row = first + r.min(n_rows - 1);
                let bias = _mm512_set1_epi32(*tile.q16_bias.as_ptr().add(row * n_blocks + b));
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

/// See [`PageKernels::weigh`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn weigh(tile: &mut Tile, values: *const u8, seen: u64) {
    // SAFETY: `values` are a page's of this type and dimension, by the caller's promise; tiles are
    // configured before and released after their use.
    unsafe {
        if tile.ty_v != KvType::Q8_0 {
            return (vectors::KERNELS.weigh)(tile, values, seen);
        }
        let n_groups = tile.n_rows.div_ceil(ROWS);
        let n_chunks = tile.dim_v / BLOCK;
        tile.sums.room(2 * n_groups * 2 * SUMS);
        asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly));
        // The sums of a chunk, then what follows from those of the one before: nothing waits.
        for chunk in 0..=n_chunks {
            if chunk < n_chunks {
                let values = values.add(chunk * V_BLOCK_BYTES);
                let steps = tile.wide.ptr().add(chunk % 2 * tile.n_rows);
                ask(tile, values, V_BLOCK_BYTES / 2);
                let scales = values.add(PAGE_CELLS * BLOCK);
                let first = vectors::steps_of(scales, tile.seen[0]);
                vectors::integer_weights::<true>(tile, scales, &first, steps);
                for group in 0..n_groups {
                    let sums = (chunk % 2 * n_groups + group) * 2 * SUMS;
                    sum_values(tile, group, values, sums);
                }
                ask(tile, values.add(V_BLOCK_BYTES / 2), V_BLOCK_BYTES / 2);
            }
            if chunk > 0 {
                for group in 0..n_groups {
                    let sums = ((chunk - 1) % 2 * n_groups + group) * 2 * SUMS;
                    weigh_rows(tile, group * ROWS, chunk - 1, sums);
                }
            }
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// 32 dimensions of a page's values times the integer weights of eight rows, to `sums`.
unsafe fn sum_values(tile: &mut Tile, group: usize, values: *const u8, sums: usize) {
    // SAFETY: `w16` has whole groups of eight rows of high and low bytes, `sums` room for two
    // tiles; the block has 64 cells of 32 dimensions.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tileloadd tmm4, [{w} + {line}*1]",
            "tileloadd tmm6, [{v} + {v_line}*1]",
            "tdpbusd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{v} + {v_line}*1 + 64]",
            "tdpbusd tmm1, tmm4, tmm7",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            w = in(reg) tile.w16.as_ptr().add(group * ROWS * 2 * PAGE_CELLS),
            v = in(reg) values,
            v_line = in(reg) 4 * BLOCK,
            sums = in(reg) tile.sums.ptr().add(sums),
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
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
    for r in 0..n_rows {
        let row = first + r;
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
}
