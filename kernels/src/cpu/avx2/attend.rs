//! `attend` page by page with 8 lanes, the layout and order of work of the AVX-512 form. Cells of
//! every type are converted to F32 first, half a page or a chunk of values at a time.

use crate::attend::layout::{BLOCK, HALF_CELLS, K_BLOCK_BYTES, KvType, PAGE_CELLS, V_BLOCK_BYTES};
use crate::attend::tile::{PageKernels, ROWS, Tile, half_seen, runs};
use std::arch::x86_64::*;

/// Rows that the registers hold beside two vectors of cells.
const R: usize = 4;

/// The kernels of this instruction set.
pub(crate) const KERNELS: PageKernels = PageKernels {
    scores,
    soft_max,
    weigh,
    integer_q: false,
    byte_q: false,
};

/// 2^x for x <= 0, to 3e-7 relative; exactly 1 at 0, and 0 below -126.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp2(x: __m256) -> __m256 {
    let least = _mm256_set1_ps(-126.0);
    let some = _mm256_cmp_ps::<_CMP_GE_OQ>(x, least);
    let x = _mm256_max_ps(x, least);
    let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let f = _mm256_sub_ps(x, whole);
    // Minimax over [-1/2, 1/2] with the constant term held at 1.
    let p = _mm256_set1_ps(0.001_326_472);
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.009_671_513));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.055_507_336));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.240_222_42));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(std::f32::consts::LN_2));
    let p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0));
    let power = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(whole));
    let y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
    _mm256_and_ps(y, some)
}

/// Eight F16 numbers.
///
/// # Safety
/// They must be readable.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load_f16(p: *const u8) -> __m256 {
    // SAFETY: readable by the caller's promise.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
}

/// Converts `n` numbers, a multiple of 8, of a type without scales.
///
/// # Safety
/// `from` and `to` must hold `n` numbers.
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen(ty: KvType, from: *const u8, to: *mut f32, n: usize) {
    for i in (0..n).step_by(8) {
        // SAFETY: within the `n` numbers.
        unsafe {
            let x = match ty {
                KvType::F16 => load_f16(from.add(2 * i)),
                KvType::BF16 => {
                    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(2 * i).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                }
                KvType::F32 | KvType::Q8_0 => _mm256_loadu_ps(from.add(4 * i).cast()),
            };
            _mm256_storeu_ps(to.add(i), x);
        }
    }
}

/// Four dimensions (keys) or cells (values) in the bytes of eight words, each times its scale.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes_of(words: __m256i) -> [__m256; 4] {
    let sign = |x| _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(x));
    [
        sign(_mm256_slli_epi32::<24>(words)),
        sign(_mm256_slli_epi32::<16>(words)),
        sign(_mm256_slli_epi32::<8>(words)),
        sign(words),
    ]
}

/// Half a page of Q8_0 keys as F32, `[dim][32]`.
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen_keys_q8_0(keys: *const u8, to: *mut f32, dim: usize) {
    let bias = _mm256_set1_epi8(-128);
    for block in 0..dim.div_ceil(BLOCK) {
        for lane in (0..HALF_CELLS).step_by(8) {
            // SAFETY: `dim / 32` blocks; dimensions beyond `dim` are not written.
            unsafe {
                let keys = keys.add(block * K_BLOCK_BYTES);
                let scale = load_f16(keys.add(HALF_CELLS * BLOCK + lane * 2));
                for word in 0..BLOCK / 4 {
                    let words = _mm256_loadu_si256(keys.add(word * 128 + lane * 4).cast());
                    let x = bytes_of(_mm256_xor_si256(words, bias));
                    for (byte, x) in x.into_iter().enumerate() {
                        let i = block * BLOCK + word * 4 + byte;
                        if i < dim {
                            let to = to.add(i * HALF_CELLS + lane);
                            _mm256_storeu_ps(to, _mm256_mul_ps(x, scale));
                        }
                    }
                }
            }
        }
    }
}

/// The seen groups of four cells of a block of Q8_0 values as F32, `[64][32]`.
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen_values_q8_0(values: *const u8, to: *mut f32, seen: u64) {
    for group in (0..PAGE_CELLS / 4).filter(|group| seen >> (4 * group) & 0xf != 0) {
        // SAFETY: 16 groups of 4 cells x 32 dimensions, 64 scales.
        unsafe {
            let scales = values.add(PAGE_CELLS * BLOCK + group * 8);
            let mut scale = [0f32; 4];
            for (byte, scale) in scale.iter_mut().enumerate() {
                let bits = scales.add(2 * byte).cast::<half::f16>().read_unaligned();
                *scale = bits.to_f32();
            }
            for lane in (0..BLOCK).step_by(8) {
                let words = _mm256_loadu_si256(values.add(group * 128 + lane * 4).cast());
                for (byte, x) in bytes_of(words).into_iter().enumerate() {
                    let to = to.add((group * 4 + byte) * BLOCK + lane);
                    _mm256_storeu_ps(to, _mm256_mul_ps(x, _mm256_set1_ps(scale[byte])));
                }
            }
        }
    }
}

/// See [`PageKernels::scores`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scores(tile: &mut Tile, keys: *const u8, seen: u64) {
    let (dim, n_rows, ty) = (tile.dim_k, tile.n_rows, tile.ty_k);
    let (q, s, wide) = (tile.q.ptr(), tile.s.ptr(), tile.wide.ptr());
    let len = dim * HALF_CELLS;
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        // SAFETY: half a page of keys of this type and dimension; `q`, `s` and `wide` are sized
        // for the tile's rows and dimensions (`Tile::shape`, `Tile::start`).
        unsafe {
            if ty == KvType::Q8_0 {
                let bytes = dim.div_ceil(BLOCK) * K_BLOCK_BYTES;
                widen_keys_q8_0(keys.add(half * bytes), wide, dim);
            } else {
                widen(ty, keys.add(half * len * ty.size()), wide, len);
            }
            for row in (0..n_rows).step_by(R) {
                let q = q.add(row / ROWS * ROWS * dim + row % ROWS);
                let s = s.add(row * PAGE_CELLS + half * HALF_CELLS);
                for cell in (0..HALF_CELLS).step_by(16) {
                    let (k, s) = (wide.add(cell), s.add(cell));
                    match n_rows - row {
                        1 => score_rows::<1>(q, dim, k, s),
                        2 => score_rows::<2>(q, dim, k, s),
                        3 => score_rows::<3>(q, dim, k, s),
                        _ => score_rows::<R>(q, dim, k, s),
                    }
                }
            }
        }
    }
}

/// `s[r][c] = sum_i q[i][r] keys[i][c]` for `N` rows and 16 cells.
#[target_feature(enable = "avx2,fma")]
unsafe fn score_rows<const N: usize>(q: *const f32, dim: usize, keys: *const f32, s: *mut f32) {
    let mut sum = [[_mm256_setzero_ps(); 2]; N];
    for i in 0..dim {
        // SAFETY: `dim` rows of 32 keys' numbers and of `ROWS` queries.
        unsafe {
            let k = keys.add(i * HALF_CELLS);
            let k = [_mm256_loadu_ps(k), _mm256_loadu_ps(k.add(8))];
            for r in 0..N {
                let q = _mm256_set1_ps(*q.add(i * ROWS + r));
                sum[r][0] = _mm256_fmadd_ps(q, k[0], sum[r][0]);
                sum[r][1] = _mm256_fmadd_ps(q, k[1], sum[r][1]);
            }
        }
    }
    for r in 0..N {
        // SAFETY: `s` has `N` rows of `PAGE_CELLS`.
        unsafe {
            _mm256_storeu_ps(s.add(r * PAGE_CELLS), sum[r][0]);
            _mm256_storeu_ps(s.add(r * PAGE_CELLS + 8), sum[r][1]);
        }
    }
}

/// See [`PageKernels::soft_max`].
#[target_feature(enable = "avx2,fma")]
unsafe fn soft_max(tile: &mut Tile) {
    let (s, l) = (tile.s.ptr(), tile.l.ptr());
    let hidden = _mm256_set1_ps(f32::NEG_INFINITY);
    let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for row in 0..tile.n_rows {
        let seen = tile.seen[row];
        // SAFETY: `s` has `PAGE_CELLS` and `l` 16 numbers for each row.
        unsafe {
            let s = s.add(row * PAGE_CELLS);
            let l = l.add(row * 16);
            let mut x = [hidden; 8];
            let mut largest = hidden;
            for i in 0..8 {
                let bits = _mm256_set1_epi32((seen >> (8 * i)) as i32);
                let mask = _mm256_cmpeq_epi32(_mm256_and_si256(bits, bit), bit);
                let score = _mm256_loadu_ps(s.add(8 * i));
                x[i] = _mm256_blendv_ps(hidden, score, _mm256_castsi256_ps(mask));
                largest = _mm256_max_ps(largest, x[i]);
            }
            if seen == 0 {
                for i in 0..8 {
                    _mm256_storeu_ps(s.add(8 * i), _mm256_setzero_ps());
                }
                tile.alpha[row] = 1.0;
                tile.beta[row] = 0.0;
                continue;
            }
            let mut lanes = [0f32; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), largest);
            let largest = lanes.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
            let m = _mm256_set1_ps(largest);
            let mut sums = [_mm256_setzero_ps(); 2];
            for i in 0..8 {
                let weight = exp2(_mm256_sub_ps(x[i], m));
                _mm256_storeu_ps(s.add(8 * i), weight);
                sums[i % 2] = _mm256_add_ps(sums[i % 2], weight);
            }
            let old = tile.m[row];
            let new = old.max(largest);
            tile.m[row] = new;
            let to = _mm256_blend_ps::<2>(_mm256_set1_ps(old), m);
            let factor = exp2(_mm256_sub_ps(to, _mm256_set1_ps(new)));
            let alpha = _mm256_cvtss_f32(factor);
            let beta = _mm256_cvtss_f32(_mm256_permute_ps::<1>(factor));
            tile.alpha[row] = alpha;
            tile.beta[row] = beta;
            for (i, sum) in sums.into_iter().enumerate() {
                let l = l.add(8 * i);
                let old = _mm256_mul_ps(_mm256_loadu_ps(l), _mm256_set1_ps(alpha));
                _mm256_storeu_ps(l, _mm256_fmadd_ps(sum, _mm256_set1_ps(beta), old));
            }
        }
    }
}

/// See [`PageKernels::weigh`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh(tile: &mut Tile, values: *const u8, seen: u64) {
    let (n_rows, dim, ty) = (tile.n_rows, tile.dim_v, tile.ty_v);
    let (s, acc, wide) = (tile.s.ptr(), tile.acc.ptr(), tile.wide.ptr());
    for chunk in 0..dim.div_ceil(BLOCK) {
        let (first, width) = tile.v_chunk(chunk);
        // SAFETY: the chunk holds 64 cells of `width` numbers, `wide` has room for them, `s` and
        // `acc` have `n_rows` rows, `alpha` and `beta` as many numbers.
        unsafe {
            if ty == KvType::Q8_0 {
                widen_values_q8_0(values.add(chunk * V_BLOCK_BYTES), wide, seen);
            } else {
                for run in runs(seen) {
                    let at = run.start * width;
                    let from = values.add((first + at) * ty.size());
                    widen(ty, from, wide.add(at), run.len() * width);
                }
            }
            for row in (0..n_rows).step_by(R) {
                for lane in (0..width).step_by(16) {
                    let rows = Rows {
                        s: s.add(row * PAGE_CELLS),
                        acc: acc.add(row * dim + chunk * BLOCK + lane),
                        dim,
                        alpha: tile.alpha.as_ptr().add(row),
                        beta: tile.beta.as_ptr().add(row),
                    };
                    let v = wide.add(lane);
                    match n_rows - row {
                        1 => weigh_rows::<1>(&rows, v, width, seen),
                        2 => weigh_rows::<2>(&rows, v, width, seen),
                        3 => weigh_rows::<3>(&rows, v, width, seen),
                        _ => weigh_rows::<R>(&rows, v, width, seen),
                    }
                }
            }
        }
    }
}

/// Up to four rows of a tile, at 16 of their values.
struct Rows {
    s: *const f32,
    acc: *mut f32,
    /// Numbers from a row of `acc` to the next.
    dim: usize,
    alpha: *const f32,
    beta: *const f32,
}

/// `acc[r] = alpha[r] acc[r] + beta[r] sum_c s[r][c] values[c]` for 16 values.
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh_rows<const N: usize>(rows: &Rows, values: *const f32, width: usize, seen: u64) {
    let mut sum = [[_mm256_setzero_ps(); 2]; N];
    for run in runs(seen) {
        for c in run {
            // SAFETY: 64 cells of `width` values, `N` rows of 64 weights.
            unsafe {
                let v = values.add(c * width);
                let v = [_mm256_loadu_ps(v), _mm256_loadu_ps(v.add(8))];
                for r in 0..N {
                    let weight = _mm256_set1_ps(*rows.s.add(r * PAGE_CELLS + c));
                    sum[r][0] = _mm256_fmadd_ps(weight, v[0], sum[r][0]);
                    sum[r][1] = _mm256_fmadd_ps(weight, v[1], sum[r][1]);
                }
            }
        }
    }
    for r in 0..N {
        // SAFETY: `N` rows of `acc`, `alpha` and `beta`.
        unsafe {
            let alpha = _mm256_set1_ps(*rows.alpha.add(r));
            let beta = _mm256_set1_ps(*rows.beta.add(r));
            for j in 0..2 {
                let acc = rows.acc.add(r * rows.dim + j * 8);
                let old = _mm256_mul_ps(_mm256_loadu_ps(acc), alpha);
                _mm256_storeu_ps(acc, _mm256_fmadd_ps(beta, sum[r][j], old));
            }
        }
    }
}
