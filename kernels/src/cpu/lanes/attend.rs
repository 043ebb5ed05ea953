//! `attend` page by page in sixteen lanes, cells of every type as F32; the order of work is that
//! of the AVX-512 form. Compiled for sets without an `attend` of their own, and for its test.

use super::LANES;
use crate::attend::layout::{BLOCK, HALF_CELLS, K_BLOCK_BYTES, KvType, PAGE_CELLS, V_BLOCK_BYTES};
use crate::attend::tile::{PageKernels, ROWS, Tile, half_seen, runs};

/// Rows whose sums stay in registers together.
const R: usize = 4;

type Lanes = [f32; LANES];

/// The kernels in plain arrays.
pub(crate) const KERNELS: PageKernels = PageKernels {
    scores,
    soft_max,
    weigh,
    integer_q: false,
    byte_q: false,
};

/// 2^x for x <= 0, to 3e-7 relative; exactly 1 at 0, and 0 below -126.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let y = x.max(-126.0);
    let shifted = y + MAGIC;
    let f = y - (shifted - MAGIC);
    // Minimax over [-1/2, 1/2] with the constant term held at 1.
    let p = 0.001_326_472f32.mul_add(f, 0.009_671_513);
    let p = p.mul_add(f, 0.055_507_336);
    let p = p.mul_add(f, 0.240_222_42);
    let p = p.mul_add(f, std::f32::consts::LN_2);
    let p = p.mul_add(f, 1.0);
    let power = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) << 23;
    if x < -126.0 {
        0.0
    } else {
        f32::from_bits(p.to_bits().wrapping_add(power))
    }
}

/// An F16 number, without a branch: numbers below its normal range come out right because the
/// product restores their exponent.
#[inline(always)]
fn f16(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff);
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
    let not_finite = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | not_finite | u32::from(bits & 0x8000) << 16)
}

/// Sixteen numbers from the `i`-th after `p`, of a type without scales.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn load(ty: KvType, p: *const u8, i: usize) -> Lanes {
    // SAFETY: readable by the caller's promise.
    unsafe {
        match ty {
            KvType::F16 => p
                .add(2 * i)
                .cast::<[u16; LANES]>()
                .read_unaligned()
                .map(f16),
            KvType::BF16 => p
                .add(2 * i)
                .cast::<[u16; LANES]>()
                .read_unaligned()
                .map(|bits| f32::from_bits(u32::from(bits) << 16)),
            KvType::F32 | KvType::Q8_0 => p.add(4 * i).cast::<Lanes>().read_unaligned(),
        }
    }
}

/// Four dimensions (keys) or cells (values) from sixteen words of four bytes each.
#[inline(always)]
fn bytes_of(words: [[u8; 4]; LANES], bias: u8, byte: usize) -> Lanes {
    words.map(|word| f32::from(word[byte].wrapping_sub(bias) as i8))
}

/// See [`PageKernels::scores`].
unsafe fn scores(tile: &mut Tile, keys: *const u8, seen: u64) {
    let (dim, n_rows, ty) = (tile.dim_k, tile.n_rows, tile.ty_k);
    let (q, s, wide) = (tile.q.ptr(), tile.s.ptr(), tile.wide.ptr());
    for half in (0..2).filter(|&half| half_seen(seen, half)) {
        for lane in (0..HALF_CELLS).step_by(LANES) {
            // SAFETY: half a page of keys of this type and dimension; `q`, `s` and `wide` are
            // sized for the tile's rows and dimensions (`Tile::shape`, `Tile::start`).
            unsafe {
                if ty == KvType::Q8_0 {
                    for block in 0..dim.div_ceil(BLOCK) {
                        let at = half * dim.div_ceil(BLOCK) + block;
                        let keys = keys.add(at * K_BLOCK_BYTES);
                        let scale = load(KvType::F16, keys.add(HALF_CELLS * BLOCK), lane);
                        for i in block * BLOCK..dim.min((block + 1) * BLOCK) {
                            let word = i % BLOCK / 4;
                            let words = keys.add(word * 128 + lane * 4).cast();
                            let x = bytes_of(*words, 128, i % 4);
                            let to = wide.add(i * LANES).cast::<Lanes>();
                            *to = std::array::from_fn(|c| x[c] * scale[c]);
                        }
                    }
                } else {
                    let keys = keys.add(half * dim * HALF_CELLS * ty.size());
                    for i in 0..dim {
                        let k = load(ty, keys, i * HALF_CELLS + lane);
                        *wide.add(i * LANES).cast::<Lanes>() = k;
                    }
                }
                for row in (0..n_rows).step_by(R) {
                    let q = q.add(row / ROWS * ROWS * dim + row % ROWS);
                    let s = s.add(row * PAGE_CELLS + half * HALF_CELLS + lane);
                    match n_rows - row {
                        1 => score_rows::<1>(q, dim, wide, s),
                        2 => score_rows::<2>(q, dim, wide, s),
                        3 => score_rows::<3>(q, dim, wide, s),
                        _ => score_rows::<R>(q, dim, wide, s),
                    }
                }
            }
        }
    }
}

/// `s[r][c] = sum_i q[i][r] keys[i][c]` for `N` rows and 16 cells.
unsafe fn score_rows<const N: usize>(q: *const f32, dim: usize, keys: *const f32, s: *mut f32) {
    let mut sum = [[0f32; LANES]; N];
    for i in 0..dim {
        // SAFETY: `dim` rows of 16 keys' numbers and of `ROWS` queries.
        let k = unsafe { *keys.add(i * LANES).cast::<Lanes>() };
        for (r, sum) in sum.iter_mut().enumerate() {
            // SAFETY: as above.
            let q = unsafe { *q.add(i * ROWS + r) };
            for c in 0..LANES {
                sum[c] = q.mul_add(k[c], sum[c]);
            }
        }
    }
    for (r, sum) in sum.into_iter().enumerate() {
        // SAFETY: `s` has `N` rows of `PAGE_CELLS`.
        unsafe { *s.add(r * PAGE_CELLS).cast::<Lanes>() = sum }
    }
}

/// See [`PageKernels::soft_max`].
unsafe fn soft_max(tile: &mut Tile) {
    let n = tile.n_rows;
    let scores = tile.s.slice(n * PAGE_CELLS).chunks_exact_mut(PAGE_CELLS);
    let sums = tile.l.slice(n * LANES).as_chunks_mut::<LANES>().0;
    for (row, (s, l)) in scores.zip(sums).enumerate() {
        let seen = tile.seen[row];
        if seen == 0 {
            s.fill(0.0);
            tile.alpha[row] = 1.0;
            tile.beta[row] = 0.0;
            continue;
        }
        let mut largest = f32::NEG_INFINITY;
        for (c, s) in s.iter_mut().enumerate() {
            *s = if seen >> c & 1 == 1 {
                *s
            } else {
                f32::NEG_INFINITY
            };
            largest = largest.max(*s);
        }
        for s in s.iter_mut() {
            *s = exp2(*s - largest);
        }
        let old = tile.m[row];
        let new = old.max(largest);
        let (alpha, beta) = (exp2(old - new), exp2(largest - new));
        tile.m[row] = new;
        tile.alpha[row] = alpha;
        tile.beta[row] = beta;
        for (c, l) in l.iter_mut().enumerate() {
            let sum = (s[c] + s[c + 16]) + (s[c + 32] + s[c + 48]);
            *l = sum.mul_add(beta, *l * alpha);
        }
    }
}

/// See [`PageKernels::weigh`].
unsafe fn weigh(tile: &mut Tile, values: *const u8, seen: u64) {
    let (n_rows, dim, ty) = (tile.n_rows, tile.dim_v, tile.ty_v);
    let (s, acc, wide) = (tile.s.ptr(), tile.acc.ptr(), tile.wide.ptr());
    for lane in (0..dim).step_by(LANES) {
        let (first, width) = tile.v_chunk(lane / BLOCK);
        for c in runs(seen).flatten() {
            // SAFETY: the chunk holds 64 cells of `width` numbers; `wide` has room for 64 x 16.
            unsafe {
                let x = if ty == KvType::Q8_0 {
                    let values = values.add(lane / BLOCK * V_BLOCK_BYTES);
                    let at = c / 4 * 128 + lane % BLOCK * 4;
                    let x = bytes_of(*values.add(at).cast(), 0, c % 4);
                    let scale = values.add(PAGE_CELLS * BLOCK + c * 2).cast::<u16>();
                    let scale = f16(scale.read_unaligned());
                    x.map(|x| x * scale)
                } else {
                    let values = values.add(first * ty.size());
                    load(ty, values, c * width + lane % BLOCK)
                };
                *wide.add(c * LANES).cast::<Lanes>() = x;
            }
        }
        for row in (0..n_rows).step_by(R) {
            // SAFETY: `s` and `acc` have `n_rows` rows.
            unsafe {
                let (s, acc) = (s.add(row * PAGE_CELLS), acc.add(row * dim + lane));
                let factors = (&tile.alpha[row..], &tile.beta[row..]);
                match n_rows - row {
                    1 => weigh_rows::<1>(s, wide, seen, factors, acc, dim),
                    2 => weigh_rows::<2>(s, wide, seen, factors, acc, dim),
                    3 => weigh_rows::<3>(s, wide, seen, factors, acc, dim),
                    _ => weigh_rows::<R>(s, wide, seen, factors, acc, dim),
                }
            }
        }
    }
}

/// `acc[r] = alpha[r] acc[r] + beta[r] sum_c s[r][c] values[c]` for `N` rows and 16 values.
unsafe fn weigh_rows<const N: usize>(
    s: *const f32,
    values: *const f32,
    seen: u64,
    (alpha, beta): (&[f32], &[f32]),
    acc: *mut f32,
    dim: usize,
) {
    let mut sum = [[0f32; LANES]; N];
    for c in runs(seen).flatten() {
        // SAFETY: 64 cells of 16 values, `N` rows of 64 weights.
        let v = unsafe { *values.add(c * LANES).cast::<Lanes>() };
        for (r, sum) in sum.iter_mut().enumerate() {
            // SAFETY: as above.
            let weight = unsafe { *s.add(r * PAGE_CELLS + c) };
            for i in 0..LANES {
                sum[i] = weight.mul_add(v[i], sum[i]);
            }
        }
    }
    for (r, sum) in sum.into_iter().enumerate() {
        // SAFETY: `acc` has `N` rows of `dim`, of which 16 are this lane's.
        let acc = unsafe { &mut *acc.add(r * dim).cast::<Lanes>() };
        for i in 0..LANES {
            acc[i] = beta[r].mul_add(sum[i], acc[i] * alpha[r]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attend::{PageLayout, Sequence, Visible, attend_with, tile};
    use crate::dispatch::Isa;
    use crate::pool::Pool;

    #[test]
    fn f16_as_the_format_says() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            let got = f16(bits);
            assert!(
                got == expected || got.is_nan() && expected.is_nan(),
                "{bits:x}: {got} for {expected}"
            );
        }
    }

    /// On x86-64 no instruction set uses these kernels; this is where they meet the oracle.
    #[test]
    fn agrees_with_scalar() {
        let noise = |n: usize, seed: usize| -> Vec<f32> {
            (0..n)
                .map(|i| ((i + seed) * 7919 % 2003) as f32 / 1001.0 - 1.0)
                .collect()
        };
        for ty in [KvType::F32, KvType::F16, KvType::BF16, KvType::Q8_0] {
            let layout = PageLayout {
                n_head_kv: 2,
                head_dim_k: 40,
                head_dim_v: 56,
                ty_k: ty,
                ty_v: ty,
            };
            let mut pages = vec![vec![0xffu8; layout.page_bytes()]; 3];
            for cell in 0..150 {
                let (k, v) = (noise(80, cell * 31), noise(112, cell * 17));
                layout.write(&mut pages[cell / 64], cell % 64, 1, &k, &v);
            }
            let pages: Vec<&[u8]> = pages.iter().map(|p| &p[..]).collect();
            let visible: Vec<Visible> = (0..7)
                .map(|i| Visible {
                    n_kept: 60 + i,
                    raw_begin: 3 * u64::from(i),
                    raw_end: 120 + 5 * u64::from(i),
                })
                .collect();
            let q = noise(7 * 6 * 40, 5);
            let run = |kernels: Option<PageKernels>| {
                let mut out = vec![f32::NAN; 7 * 6 * 56];
                let seq = Sequence {
                    q: &q,
                    visible: &visible,
                    kept: &pages,
                    n_always: 2,
                    top_k: 20,
                    raw: &pages,
                    raw_base: 0,
                    out: &mut out,
                };
                let pool = Pool::new(1);
                match kernels {
                    Some(kernels) => tile::attend(kernels, &pool, &layout, 6, 0.2, &mut [seq]),
                    None => attend_with(Isa::Scalar, &pool, &layout, 6, 0.2, &mut [seq]),
                }
                out
            };
            for (e, g) in run(None).iter().zip(run(Some(KERNELS))) {
                assert!((e - g).abs() < 1e-5, "{ty:?}: {g}, expected {e}");
            }
        }
    }
}
