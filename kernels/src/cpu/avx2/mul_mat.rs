//! `mul_mat` with `vpmaddubsw`, or with `VNNI` in AVX's encoding `vpdpbusd`: a panel's 16 rows in two
//! vectors of eight.

use crate::cpu::mul_mat::{Panel, Scratch, Tokens, Unpacked, by_chunks};
use crate::mul_mat::activations::{self, Group, Parts, Place};
use crate::mul_mat::layout::{ROWS, VECTOR};
use crate::quant::{IQ4_VALUES, WeightType};
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Tokens of a register tile.
const TILE: usize = 4;
/// Rows of a vector.
const LANES: usize = 8;

/// [`activations::quantize_row`] with this instruction set.
///
/// # Safety
/// The instruction set is available; as the function itself.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn quantize_row(x: &[f32], at: &Place, parts: &Parts<'_>) {
    // SAFETY: passed on.
    unsafe { activations::quantize_row(x, at, parts) }
}

/// One panel times the unit's tokens.
///
/// # Safety
/// The instruction set is available, with `VNNI` that of [`crate::dispatch::Isa::AvxVnni`]; `p`
/// describes live memory (see [`Panel`]).
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn panel<const VNNI: bool>(p: &Panel<'_>, scratch: &mut Scratch) {
    // SAFETY: passed on; the tokens' kind is the type's (`Panel`).
    unsafe {
        match p.x {
            Tokens::F32(x) => match p.ty {
                WeightType::F32 => float::<F32>(p, x),
                WeightType::F16 => float::<F16>(p, x),
                _ => float::<BF16>(p, x),
            },
            Tokens::Quants(x) => {
                by_chunks::<TILE>(p, x, scratch, tile::<VNNI>, look_up, halves);
            }
        }
    }
}

/// Widens 16 F16 scales.
///
/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx2,f16c")]
unsafe fn halves(bytes: &[[u8; 2]; ROWS], out: &mut [f32; ROWS]) {
    for i in 0..2 {
        // SAFETY: eight of sixteen numbers.
        unsafe {
            let half = _mm_loadu_si128(bytes.as_ptr().add(LANES * i).cast());
            _mm256_storeu_ps(out.as_mut_ptr().add(LANES * i), _mm256_cvtph_ps(half));
        }
    }
}

/// Places in IQ4_NL's table become its values.
///
/// # Safety
/// The instruction set is available.
#[target_feature(enable = "avx2")]
unsafe fn look_up(words: &mut [[u8; VECTOR]]) {
    // SAFETY: 16 values; 32 of each vector's bytes at a time.
    unsafe {
        let values = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_VALUES.as_ptr().cast()));
        for q in words.as_flattened_mut().chunks_exact_mut(32) {
            let q = q.as_mut_ptr().cast();
            _mm256_storeu_si256(q, _mm256_shuffle_epi8(values, _mm256_loadu_si256(q)));
        }
    }
}

/// A register tile (see `cpu::mul_mat::Tile`).
///
/// # Safety
/// The instruction set is available; `by_chunks` calls it, with its promises.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const VNNI: bool>(
    ty: WeightType,
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[f32; ROWS]],
) {
    // SAFETY: as `by_chunks` promises.
    unsafe {
        match acc.as_chunks_mut::<TILE>().0.first_mut() {
            Some(acc) => tile_n::<TILE, VNNI>(ty, w, blocks, x, acc),
            None => tile_n::<1, VNNI>(ty, w, blocks, x, &mut acc.as_chunks_mut::<1>().0[0]),
        }
    }
}

/// The last number is how many words' pairs of products fit into 16 bits together: two products of
/// an activation of 127 and the type's largest quant each.
///
/// # Safety
/// As [`tile`]; `acc` are the sums of `T` tokens of the group.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_n<const T: usize, const VNNI: bool>(
    ty: WeightType,
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[f32; ROWS]; T],
) {
    let b = blocks.start;
    // SAFETY: as `by_chunks` promises.
    unsafe {
        match ty {
            WeightType::Q8_0 | WeightType::IQ4_NL => {
                dot32::<T, VNNI, SIGNED, 1>(w, blocks, x, acc);
            }
            WeightType::Q5_0 => dot32::<T, VNNI, SIGNED, 8>(w, blocks, x, acc),
            WeightType::Q4_0 => dot32::<T, VNNI, ZERO_AT_8, 8>(w, blocks, x, acc),
            WeightType::Q4_1 => dot32::<T, VNNI, MINIMA, 8>(w, blocks, x, acc),
            WeightType::Q5_1 => dot32::<T, VNNI, MINIMA, 4>(w, blocks, x, acc),
            WeightType::IQ4_XS => dot256::<T, VNNI, SIGNED, 1>(w, b, x, acc),
            WeightType::Q2_K => dot256::<T, VNNI, MINIMA_OF_16, 4>(w, b, x, acc),
            WeightType::Q4_K => dot256::<T, VNNI, MINIMA, 8>(w, b, x, acc),
            WeightType::Q5_K => dot256::<T, VNNI, MINIMA, 4>(w, b, x, acc),
            _ => dot256::<T, VNNI, ZERO_AT_32, 1>(w, b, x, acc),
        }
    }
}

/// What [`Unpacked`]'s words are: signed, or unsigned with zero at 8 or 32, or with minima of 32 or of
/// 16 columns.
const SIGNED: u8 = 0;
const ZERO_AT_8: u8 = 1;
const ZERO_AT_32: u8 = 2;
const MINIMA: u8 = 3;
const MINIMA_OF_16: u8 = 4;

/// Rows `8 * half..` of a vector of words.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(words: *const u8, half: usize) -> __m256i {
    // SAFETY: a whole vector of 64 bytes by the caller's promise.
    unsafe { _mm256_loadu_si256(words.add(half * VECTOR / 2).cast()) }
}

/// Four neighbouring bytes in every lane.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four(q: *const i8) -> __m256i {
    // SAFETY: the caller has these four bytes.
    unsafe { _mm256_set1_epi32(q.cast::<i32>().read_unaligned()) }
}

/// `sum` plus each lane's four products of unsigned and signed bytes.
///
/// # Safety
/// The processor has AVX-VNNI.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dpbusd(mut sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: registers only; the instruction is there.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sum}, {w}, {x}",
            sum = inout(ymm_reg) sum,
            w = in(ymm_reg) w,
            x = in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// `sum` plus each lane's four products, in two pairs of 16 bits or, as `WHOLE`, in one of 32. Signed
/// quants `w` go as magnitude `size` times signed activation; no pair of products leaves 16 bits, as
/// activations stop at 127. By name, as compilers would bring the sums of a block into an order that
/// needs more registers than there are.
#[inline]
#[target_feature(enable = "avx2")]
fn maddubs<const WORDS: u8, const WHOLE: bool>(
    mut sum: __m256i,
    w: __m256i,
    size: __m256i,
    x: __m256i,
) -> __m256i {
    let one = _mm256_set1_epi16(1);
    macro_rules! add {
        ($($line:literal),*; $($name:ident = $value:expr),*) => {
            asm!(
                $($line,)*
                sum = inout(ymm_reg) sum,
                x = in(ymm_reg) x,
                t = out(ymm_reg) _,
                $($name = in(ymm_reg) $value,)*
                options(pure, nomem, nostack, preserves_flags),
            )
        };
    }
    // SAFETY: registers only.
    unsafe {
        match (WORDS == SIGNED, WHOLE) {
            (true, true) => add!(
                "vpsignb {t}, {x}, {w}",
                "vpmaddubsw {t}, {size}, {t}",
                "vpmaddwd {t}, {t}, {one}",
                "vpaddd {sum}, {sum}, {t}";
                w = w, size = size, one = one
            ),
            (true, false) => add!(
                "vpsignb {t}, {x}, {w}",
                "vpmaddubsw {t}, {size}, {t}",
                "vpaddw {sum}, {sum}, {t}";
                w = w, size = size
            ),
            (false, true) => add!(
                "vpmaddubsw {t}, {w}, {x}",
                "vpmaddwd {t}, {t}, {one}",
                "vpaddd {sum}, {sum}, {t}";
                w = w, one = one
            ),
            (false, false) => {
                add!("vpmaddubsw {t}, {w}, {x}", "vpaddw {sum}, {sum}, {t}"; w = w);
            }
        }
    }
    sum
}

/// Adds the products of `N` words with `T` tokens' activations at `q` to `sums`, halves of the rows
/// side by side. Signed quants must begin at -128 times the activations' sum with `VNNI`, which takes
/// them 128 higher.
///
/// # Safety
/// `words` are `N` vectors; `q` has `4 N` bytes of each token, 64 apart.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot<
    const T: usize,
    const N: usize,
    const VNNI: bool,
    const WORDS: u8,
    const RUN: usize,
>(
    words: *const u8,
    q: *const i8,
    sums: &mut [[__m256i; 2]; T],
) {
    let up = _mm256_set1_epi8(-128);
    let one = _mm256_set1_epi16(1);
    // SAFETY: passed on.
    unsafe {
        if VNNI {
            for j in 0..N {
                let mut w = [
                    load(words.add(j * VECTOR), 0),
                    load(words.add(j * VECTOR), 1),
                ];
                if WORDS == SIGNED {
                    w = [_mm256_xor_si256(w[0], up), _mm256_xor_si256(w[1], up)];
                }
                for t in 0..T {
                    let x = four(q.add(64 * t + 4 * j));
                    sums[t][0] = dpbusd(sums[t][0], w[0], x);
                    sums[t][1] = dpbusd(sums[t][1], w[1], x);
                }
            }
            return;
        }
        for run in (0..N).step_by(RUN) {
            let mut sum = [[_mm256_setzero_si256(); 2]; T];
            for j in run..run + RUN {
                let w = [
                    load(words.add(j * VECTOR), 0),
                    load(words.add(j * VECTOR), 1),
                ];
                let size = [_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])];
                for t in 0..T {
                    let x = four(q.add(64 * t + 4 * j));
                    for i in 0..2 {
                        if RUN == 1 {
                            let sum = &mut sums[t][i];
                            *sum = maddubs::<WORDS, true>(*sum, w[i], size[i], x);
                        } else {
                            let sum = &mut sum[t][i];
                            *sum = maddubs::<WORDS, false>(*sum, w[i], size[i], x);
                        }
                    }
                }
            }
            if RUN == 1 {
                continue;
            }
            for t in 0..T {
                for i in 0..2 {
                    let whole = _mm256_madd_epi16(sum[t][i], one);
                    sums[t][i] = _mm256_add_epi32(sums[t][i], whole);
                }
            }
        }
    }
}

/// Adds a block: `sum * (weights' scale * activations' scale)`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn end(acc: &mut [f32; ROWS], half: usize, sum: __m256i, d: &[f32; ROWS], dx: f32) {
    // SAFETY: eight of sixteen numbers each.
    unsafe {
        let acc = acc.as_mut_ptr().add(LANES * half);
        let d = _mm256_loadu_ps(d.as_ptr().add(LANES * half));
        let scale = _mm256_mul_ps(d, _mm256_set1_ps(dx));
        let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(acc));
        _mm256_storeu_ps(acc, sum);
    }
}

/// Adds a block's minimum: `m * (activations' scale * sum)`.
///
/// # Safety
/// The instruction set is available; `half` is 0 or 1.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_minimum(acc: &mut [f32; ROWS], half: usize, m: &[f32; ROWS], dsum: f32) {
    // SAFETY: eight of sixteen numbers each.
    unsafe {
        let acc = acc.as_mut_ptr().add(LANES * half);
        let m = _mm256_loadu_ps(m.as_ptr().add(LANES * half));
        let sum = _mm256_fmadd_ps(m, _mm256_set1_ps(dsum), _mm256_loadu_ps(acc));
        _mm256_storeu_ps(acc, sum);
    }
}

/// Adds `blocks` of 32 columns for `T` tokens.
///
/// # Safety
/// The instruction set must be there; the blocks must be of panel and tokens.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot32<const T: usize, const VNNI: bool, const WORDS: u8, const RUN: usize>(
    w: &Unpacked,
    blocks: Range<usize>,
    x: Group,
    acc: &mut [[f32; ROWS]; T],
) {
    for (i, b) in blocks.enumerate() {
        // SAFETY: as `by_chunks` promises.
        unsafe {
            let q = x.q.add(b / 2 * x.width * 64 + b % 2 * 32);
            let mut sums = [[_mm256_setzero_si256(); 2]; T];
            for t in 0..T {
                let at = b * x.width + t;
                if WORDS == ZERO_AT_8 {
                    sums[t] = [_mm256_set1_epi32(*x.neg8.add(at)); 2];
                } else if WORDS == SIGNED && VNNI {
                    sums[t] = [_mm256_set1_epi32(*x.neg128.add(at)); 2];
                }
            }
            dot::<T, 8, VNNI, WORDS, RUN>(w.words[8 * i].as_ptr(), q, &mut sums);
            for t in 0..T {
                let at = b * x.width + t;
                for half in 0..2 {
                    end(&mut acc[t], half, sums[t][half], &w.d[i], *x.d.add(at));
                    if WORDS == MINIMA {
                        add_minimum(&mut acc[t], half, &w.m[i], *x.dsum.add(at));
                    }
                }
            }
        }
    }
}

/// Adds block `b` of 256 columns for `T` tokens.
///
/// # Safety
/// The instruction set must be there; the block must be one of panel and tokens.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot256<const T: usize, const VNNI: bool, const WORDS: u8, const RUN: usize>(
    w: &Unpacked,
    b: usize,
    x: Group,
    acc: &mut [[f32; ROWS]; T],
) {
    let of_16 = matches!(WORDS, ZERO_AT_32 | MINIMA_OF_16);
    let words_per_sub = if of_16 { 4 } else { 8 };
    // SAFETY: as `by_chunks` promises.
    unsafe {
        let mut total = [[_mm256_setzero_si256(); 2]; T];
        for s in 0..64 / words_per_sub {
            let first = s * words_per_sub;
            let q =
                x.q.add((4 * b + first / 16) * x.width * 64 + first % 16 * 4);
            let mut sums = [[_mm256_setzero_si256(); 2]; T];
            for t in 0..T {
                let at = b * x.width + t;
                if WORDS == ZERO_AT_32 {
                    sums[t] = [_mm256_set1_epi32(*x.neg32.add(16 * at + s)); 2];
                } else if WORDS == SIGNED && VNNI {
                    let sum = i32::from(*x.sum32.add(8 * at + s));
                    sums[t] = [_mm256_set1_epi32(-128 * sum); 2];
                }
            }
            let words = w.words[first].as_ptr();
            if of_16 {
                dot::<T, 4, VNNI, WORDS, RUN>(words, q, &mut sums);
            } else {
                dot::<T, 8, VNNI, WORDS, RUN>(words, q, &mut sums);
            }
            for half in 0..2 {
                let scale = load(w.scales[s].as_ptr().cast(), half);
                for t in 0..T {
                    let scaled = _mm256_mullo_epi32(sums[t][half], scale);
                    total[t][half] = _mm256_add_epi32(total[t][half], scaled);
                }
            }
        }
        for t in 0..T {
            let at = b * x.width + t;
            let dx = *x.d.add(at);
            for half in 0..2 {
                end(&mut acc[t], half, total[t][half], &w.d[0], dx);
                if matches!(WORDS, MINIMA | MINIMA_OF_16) {
                    let (n, sums) = if WORDS == MINIMA {
                        (8, x.sum32)
                    } else {
                        (16, x.sum16)
                    };
                    let mut sum = _mm256_setzero_si256();
                    for i in 0..n / 2 {
                        let min = load(w.mins[i].as_ptr().cast(), half);
                        let pair = four(sums.add(n * at + 2 * i).cast());
                        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(min, pair));
                    }
                    // Taking away is adding the negated integer, to the bit.
                    let sum = _mm256_sub_epi32(_mm256_setzero_si256(), sum);
                    end(&mut acc[t], half, sum, &w.dmin, dx);
                }
            }
        }
    }
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Rows `8 * half..` of columns `2 * pair` and `2 * pair + 1`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn pair_of<const TY: u8>(bytes: *const u8, pair: usize, half: usize) -> [__m256; 2] {
    // SAFETY: the caller has both columns; BF16 pads its last pair.
    unsafe {
        match TY {
            F32 => [0, 1].map(|i| {
                let column = bytes.add((2 * pair + i) * VECTOR + half * VECTOR / 2);
                _mm256_loadu_ps(column.cast())
            }),
            F16 => [0, 1].map(|i| {
                let column = bytes.add(((2 * pair + i) * ROWS + LANES * half) * 2);
                _mm256_cvtph_ps(_mm_loadu_si128(column.cast()))
            }),
            _ => {
                let v = load(bytes.add(pair * VECTOR), half);
                let high = _mm256_set1_epi32(0xFFFF_0000u32 as i32);
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(v, high)),
                ]
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float<const TY: u8>(p: &Panel<'_>, x: &[f32]) {
    let mut t = p.tokens.start;
    while t < p.tokens.end {
        // SAFETY: that many tokens are left.
        unsafe {
            t += match p.tokens.end - t {
                4.. => dot_float::<4, TY>(p, x, t),
                _ => dot_float::<1, TY>(p, x, t),
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_float<const T: usize, const TY: u8>(p: &Panel<'_>, x: &[f32], t: usize) -> usize {
    let n_cols = p.n_cols;
    let x = &x[t * n_cols..(t + T) * n_cols];
    for half in 0..2 {
        let mut even = [_mm256_setzero_ps(); T];
        let mut odd = [_mm256_setzero_ps(); T];
        // SAFETY: columns below n_cols of the panel and of T tokens; rows below the panel's.
        unsafe {
            let at = |t: usize, k: usize| _mm256_set1_ps(*x.get_unchecked(t * n_cols + k));
            for pair in 0..n_cols / 2 {
                let [w0, w1] = pair_of::<TY>(p.bytes, pair, half);
                for t in 0..T {
                    even[t] = _mm256_fmadd_ps(w0, at(t, 2 * pair), even[t]);
                    odd[t] = _mm256_fmadd_ps(w1, at(t, 2 * pair + 1), odd[t]);
                }
            }
            if n_cols % 2 == 1 {
                let last = crate::cpu::mul_mat::column(p.ty, p.bytes, n_cols - 1);
                let w = _mm256_loadu_ps(last.as_ptr().add(LANES * half));
                for t in 0..T {
                    even[t] = _mm256_fmadd_ps(w, at(t, n_cols - 1), even[t]);
                }
            }
            for i in 0..T {
                let mut rows = [0.0f32; LANES];
                _mm256_storeu_ps(rows.as_mut_ptr(), _mm256_add_ps(even[i], odd[i]));
                let n = p.rows.saturating_sub(LANES * half).min(LANES);
                let out = p.out.wrapping_add((t + i) * p.stride + LANES * half);
                std::ptr::copy_nonoverlapping(rows.as_ptr(), out, n);
            }
        }
    }
    T
}
