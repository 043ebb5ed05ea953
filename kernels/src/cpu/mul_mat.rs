//! What every vector instruction set's `mul_mat` works on: one panel, some tokens.

use crate::mul_mat::activations::{GROUP, Group, Quants};
use crate::mul_mat::buffer::Buffer;
use crate::mul_mat::layout::{
    IQ4_XS_BLOCK, IQ4_XS_SCALES, Q2_K_BLOCK, Q2_K_D, Q2_K_SCALES, Q3_K_BLOCK, Q3_K_HIGH,
    Q3_K_SCALES, Q4_1_BLOCK, Q4_K_BLOCK, Q4_K_D, Q4_K_SCALES, Q5_0_BLOCK, Q5_0_HIGH, Q5_1_BLOCK,
    Q5_K_BLOCK, Q5_K_HIGH, Q6_K_BLOCK, Q6_K_HIGH, Q6_K_SCALES, ROWS, VECTOR, scales_offset,
    scales_step,
};
use crate::quant::WeightType;
use half::f16;
use std::ops::Range;

/// Activations of all tokens, in the form the weight type calls for.
#[derive(Clone, Copy)]
pub(crate) enum Tokens<'a> {
    /// `[n_tokens, n_cols]`, for F32, F16 and BF16 weights.
    F32(&'a [f32]),
    /// With the weight type's block length.
    Quants(&'a Quants),
}

/// The work of one thread at a time: 16 rows of weights, or two such panels one after the other,
/// times a run of tokens.
pub(crate) struct Panel<'a> {
    pub(crate) ty: WeightType,
    pub(crate) n_cols: usize,
    /// The panels' bytes (`mul_mat::layout`), all of them readable.
    pub(crate) bytes: *const u8,
    pub(crate) x: Tokens<'a>,
    /// Which tokens of `x`.
    pub(crate) tokens: Range<usize>,
    /// The panel's first row of token 0; token `t` is `t * stride` numbers on.
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
    /// Rows to write: up to 16, or up to 32 of two panels.
    pub(crate) rows: usize,
}

impl Panel<'_> {
    /// Whether there are two panels.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_pair(&self) -> bool {
        self.rows > ROWS
    }

    /// One panel of a pair: the first or the second.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn of_pair(&self, i: usize) -> Self {
        let bytes = crate::mul_mat::layout::panel_bytes(self.ty, self.n_cols).unwrap_or(0);
        Panel {
            bytes: self.bytes.wrapping_add(i * bytes),
            out: self.out.wrapping_add(i * ROWS),
            rows: (self.rows - i * ROWS).min(ROWS),
            tokens: self.tokens.clone(),
            ..*self
        }
    }

    /// The same panel times other tokens.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn with_tokens(&self, tokens: Range<usize>) -> Self {
        Panel { tokens, ..*self }
    }

    /// The panel's F16 scales.
    pub(crate) fn scales(&self) -> *const u8 {
        self.bytes.wrapping_add(scales_offset(self.ty, self.n_cols))
    }
}

/// 256 columns of a panel, unpacked.
#[repr(C, align(64))]
pub(crate) struct Unpacked {
    /// `[64][16]` words of four quants: signed for Q8_0, Q5_0 and the IQ4 types, else unsigned.
    /// (AVX-512 unpacks by itself, all types into unsigned bytes.)
    pub(crate) words: [[u8; VECTOR]; 64],
    /// Blocks of 256: scales of the sub-blocks.
    pub(crate) scales: [[i32; ROWS]; 16],
    /// Q2_K, Q4_K, Q5_K: minima of sub-blocks `2i` and `2i + 1`, side by side for each row.
    pub(crate) mins: [[i16; 2 * ROWS]; 8],
    /// Scale of each block; types with blocks of 256 have one.
    pub(crate) d: [[f32; ROWS]; 8],
    /// Q2_K, Q4_K, Q5_K: scale of the minima.
    pub(crate) dmin: [f32; ROWS],
    /// Q4_1, Q5_1: minimum of each block.
    pub(crate) m: [[f32; ROWS]; 8],
}

/// A thread's working memory, kept from call to call.
pub(crate) struct Scratch {
    /// `[n_tokens][16]` running sums.
    acc: Buffer,
    unpacked: Buffer,
}

impl Scratch {
    pub(crate) fn new() -> Scratch {
        Scratch {
            acc: Buffer::zeroed(0),
            unpacked: Buffer::zeroed(0),
        }
    }

    /// Sums of `P` panels for `n` tokens, contents undefined, and room for unpacked weights of
    /// type `W`.
    ///
    /// # Safety
    /// `W` is plain numbers, at most 64-byte aligned: any bytes are a value of it.
    pub(crate) unsafe fn parts<const P: usize, W>(
        &mut self,
        n: usize,
    ) -> (&mut [[[f32; ROWS]; P]], &mut W) {
        const { assert!(align_of::<W>() <= VECTOR) };
        self.acc.reserve(n * P * VECTOR);
        self.unpacked.reserve(size_of::<W>());
        // SAFETY: both are large enough, aligned to 64, and hold plain numbers.
        unsafe {
            (
                std::slice::from_raw_parts_mut(self.acc.as_mut_ptr().cast(), n),
                &mut *self.unpacked.as_mut_ptr().cast(),
            )
        }
    }
}

/// A register tile: adds some blocks of 32 or one of 256 for `acc.len()` tokens of a group.
pub(crate) type Tile = unsafe fn(WeightType, &Unpacked, Range<usize>, Group, &mut [[f32; ROWS]]);

/// Turns places in IQ4_NL's table into its values.
pub(crate) type LookUp = unsafe fn(&mut [[u8; VECTOR]]);

/// Widens 16 F16 scales.
pub(crate) type Halves = unsafe fn(&[[u8; 2]; ROWS], &mut [f32; ROWS]);

/// [`Halves`] of instruction sets without a form of their own.
///
/// # Safety
/// None to keep: it is one of a kind that others must not call everywhere.
#[cfg(target_arch = "aarch64")]
pub(crate) unsafe fn halves(bytes: &[[u8; 2]; ROWS], out: &mut [f32; ROWS]) {
    for r in 0..ROWS {
        out[r] = f16::from_le_bytes(bytes[r]).to_f32();
    }
}

/// A panel times its tokens for instruction sets without forms of their own for few and many
/// tokens: 256 columns at a time, unpacked, `TOKENS` tokens by `tile`.
///
/// # Safety
/// `p` describes live memory; `tile`, `look_up` and `halves` may be called on this machine.
#[inline(always)]
pub(crate) unsafe fn by_chunks<const TOKENS: usize>(
    p: &Panel<'_>,
    x: &Quants,
    scratch: &mut Scratch,
    tile: Tile,
    look_up: LookUp,
    halves: Halves,
) {
    // SAFETY: Unpacked is plain numbers.
    let (acc, unpacked) = unsafe { scratch.parts::<1, Unpacked>(p.tokens.len()) };
    let acc = acc.as_flattened_mut();
    acc.fill([0.0; ROWS]);
    let block_len = p.ty.block_len();
    let n_blocks = p.n_cols / block_len;
    // With a single token memory is asked for the next blocks while some are multiplied: few at a time.
    let some = if p.tokens.len() == 1 && block_len == 32 {
        4
    } else {
        256 / block_len
    };
    for b in (0..n_blocks).step_by(some) {
        let blocks = b..(b + some).min(n_blocks);
        #[cfg(target_arch = "x86_64")]
        crate::cpu::fetch::fetch_blocks(p, blocks.clone(), 0, 0);
        // SAFETY: the panel has these blocks.
        unsafe { unpack(p, blocks.clone(), unpacked, look_up, halves) };
        #[cfg(target_arch = "x86_64")]
        crate::cpu::fetch::fetch_blocks(p, blocks.clone(), 1, 0);
        let mut t = p.tokens.start;
        while t < p.tokens.end {
            let in_group = t % GROUP;
            let n = (p.tokens.end - t).min(GROUP - in_group).min(TOKENS);
            let n = if n < TOKENS { 1 } else { n };
            let acc = &mut acc[t - p.tokens.start..][..n];
            // SAFETY: the group has these tokens and blocks.
            unsafe {
                let x = x.group(t / GROUP).at_token(in_group);
                tile(p.ty, unpacked, blocks.clone(), x, acc);
            }
            t += n;
        }
    }
    for (t, acc) in p.tokens.clone().zip(acc) {
        // SAFETY: the panel's own rows of this token.
        unsafe {
            let out = p.out.add(t * p.stride);
            std::ptr::copy_nonoverlapping(acc.as_ptr(), out, p.rows);
        }
    }
}

/// Unpacks blocks of a panel that make up to 256 columns.
///
/// # Safety
/// The panel has these blocks; `look_up` and `widen` may be called.
#[inline(always)]
unsafe fn unpack(
    p: &Panel<'_>,
    blocks: Range<usize>,
    to: &mut Unpacked,
    look_up: LookUp,
    widen: Halves,
) {
    let vector = |at: *const u8| -> &[u8; VECTOR] {
        // SAFETY: only vectors of the panel's blocks are asked for.
        unsafe { &*at.cast() }
    };
    let halves = |at: *const u8, out: &mut [f32; ROWS]| {
        // SAFETY: only scales of the panel's blocks are asked for.
        unsafe { widen(&*at.cast(), out) }
    };
    for (i, b) in blocks.enumerate() {
        if p.ty.sub_minima() == 0 {
            let scales = p.scales().wrapping_add(scales_step(p.ty) * b);
            halves(scales, &mut to.d[i]);
            if p.ty.has_minima() {
                halves(scales.wrapping_add(2 * ROWS), &mut to.m[i]);
            }
        }
        match p.ty {
            WeightType::Q8_0 => {
                for j in 0..8 {
                    to.words[8 * i + j] = *vector(p.bytes.wrapping_add((8 * b + j) * VECTOR));
                }
            }
            WeightType::Q4_0 => {
                let block = p.bytes.wrapping_add(4 * b * VECTOR);
                unpack_nibbles(block, &mut to.words[8 * i..], vector);
            }
            WeightType::Q4_1 => {
                let block = p.bytes.wrapping_add(b * Q4_1_BLOCK);
                unpack_nibbles(block, &mut to.words[8 * i..], vector);
            }
            WeightType::Q5_0 | WeightType::Q5_1 => {
                let (bytes, zero) = if p.ty == WeightType::Q5_0 {
                    (Q5_0_BLOCK, 16)
                } else {
                    (Q5_1_BLOCK, 0)
                };
                let block = p.bytes.wrapping_add(b * bytes);
                let words = &mut to.words[8 * i..8 * (i + 1)];
                unpack_nibbles(block, words, vector);
                let high = vector(block.wrapping_add(Q5_0_HIGH));
                for (j, words) in words.iter_mut().enumerate() {
                    for (w, h) in words.iter_mut().zip(high) {
                        *w = (*w | ((h >> j) & 1) << 4).wrapping_sub(zero);
                    }
                }
            }
            WeightType::IQ4_NL => {
                let words = &mut to.words[8 * i..8 * (i + 1)];
                unpack_nibbles(p.bytes.wrapping_add(4 * b * VECTOR), words, vector);
                // SAFETY: passed on.
                unsafe { look_up(words) };
            }
            WeightType::IQ4_XS => {
                let block = p.bytes.wrapping_add(b * IQ4_XS_BLOCK);
                for s in 0..8 {
                    let words = &mut to.words[8 * s..8 * (s + 1)];
                    unpack_nibbles(block.wrapping_add(4 * s * VECTOR), words, vector);
                    // SAFETY: passed on.
                    unsafe { look_up(words) };
                    let scales = lanes(vector(block.wrapping_add(IQ4_XS_SCALES + s / 4 * VECTOR)));
                    for r in 0..ROWS {
                        to.scales[s][r] = (scales[r] << (24 - s % 4 * 8)) as i32 >> 24;
                    }
                }
            }
            WeightType::Q2_K => {
                let block = p.bytes.wrapping_add(b * Q2_K_BLOCK);
                unpack_pairs(block, to, vector);
                for s in 0..16 {
                    let bytes = lanes(vector(block.wrapping_add(Q2_K_SCALES + s / 4 * VECTOR)));
                    for r in 0..ROWS {
                        let byte = bytes[r] >> (s % 4 * 8);
                        to.scales[s][r] = (byte & 15) as i32;
                        to.mins[s / 2][2 * r + s % 2] = (byte >> 4 & 15) as i16;
                    }
                }
                halves(block.wrapping_add(Q2_K_D), &mut to.d[0]);
                halves(block.wrapping_add(Q2_K_D + 2 * ROWS), &mut to.dmin);
            }
            WeightType::Q3_K => {
                let block = p.bytes.wrapping_add(b * Q3_K_BLOCK);
                unpack_pairs(block, to, vector);
                for j in 0..8 {
                    let high = vector(block.wrapping_add(Q3_K_HIGH + j * VECTOR));
                    for s in 0..8 {
                        for (w, h) in to.words[8 * s + j].iter_mut().zip(high) {
                            *w += 28 + (((h >> s) & 1) << 2);
                        }
                    }
                }
                signed_scales(block.wrapping_add(Q3_K_SCALES), to, vector);
            }
            WeightType::Q4_K => {
                unpack_q4_k(p.bytes.wrapping_add(b * Q4_K_BLOCK), to, vector, halves)
            }
            WeightType::Q5_K => {
                let block = p.bytes.wrapping_add(b * Q5_K_BLOCK);
                unpack_q4_k(block, to, vector, halves);
                for j in 0..8 {
                    let high = vector(block.wrapping_add(Q5_K_HIGH + j * VECTOR));
                    for s in 0..8 {
                        for (w, h) in to.words[8 * s + j].iter_mut().zip(high) {
                            *w |= ((h >> s) & 1) << 4;
                        }
                    }
                }
            }
            _ => unpack_q6_k(p.bytes.wrapping_add(b * Q6_K_BLOCK), to, vector),
        }
    }
}

/// A vector as a word of four bytes for each row.
#[inline(always)]
fn lanes(vector: &[u8; VECTOR]) -> [u32; ROWS] {
    let (words, _) = vector.as_chunks::<4>();
    std::array::from_fn(|r| u32::from_le_bytes(words[r]))
}

/// Four vectors of Q4_0's words become eight of one quant a byte.
#[inline(always)]
fn unpack_nibbles<'a>(
    block: *const u8,
    to: &mut [[u8; VECTOR]],
    vector: impl Fn(*const u8) -> &'a [u8; VECTOR],
) {
    for j in 0..4 {
        let v = vector(block.wrapping_add(j * VECTOR));
        to[j] = v.map(|v| v & 15);
        to[j + 4] = v.map(|v| v >> 4);
    }
}

#[inline(always)]
fn unpack_q4_k<'a>(
    block: *const u8,
    to: &mut Unpacked,
    vector: impl Fn(*const u8) -> &'a [u8; VECTOR],
    halves: impl Fn(*const u8, &mut [f32; ROWS]),
) {
    // Runs of a length known here keep the loop's arithmetic out of it.
    let (runs, _) = to.words.as_chunks_mut::<16>();
    for (pair, words) in runs.iter_mut().enumerate() {
        for j in 0..8 {
            let v = vector(block.wrapping_add((8 * pair + j) * VECTOR));
            words[j] = v.map(|v| v & 15);
            words[j + 8] = v.map(|v| v >> 4);
        }
    }
    let [scale, min, top] =
        std::array::from_fn(|i| vector(block.wrapping_add(Q4_K_SCALES + i * VECTOR)));
    let (scale, min, top) = (lanes(scale), lanes(min), lanes(top));
    let mut mins = [[0; ROWS]; 4];
    for r in 0..ROWS {
        // Of sub-blocks 0 to 3 and 4 to 7, a byte each.
        let low = scale[r] & 0x3f3f_3f3f;
        let high = (top[r] & 0x0f0f_0f0f) | ((scale[r] >> 2) & 0x3030_3030);
        for s in 0..4 {
            to.scales[s][r] = (low >> (8 * s) & 255) as i32;
            to.scales[s + 4][r] = (high >> (8 * s) & 255) as i32;
        }
        let low = min[r] & 0x3f3f_3f3f;
        let high = ((top[r] >> 4) & 0x0f0f_0f0f) | ((min[r] >> 2) & 0x3030_3030);
        for (i, word) in [low, low >> 16, high, high >> 16].into_iter().enumerate() {
            mins[i][r] = (word & 255) | ((word & 0xff00) << 8);
        }
    }
    for (to, pairs) in to.mins.iter_mut().zip(mins) {
        let (to, _) = to.as_chunks_mut::<2>();
        for r in 0..ROWS {
            to[r] = [pairs[r] as i16, (pairs[r] >> 16) as i16];
        }
    }
    halves(block.wrapping_add(Q4_K_D), &mut to.d[0]);
    halves(block.wrapping_add(Q4_K_D + 2 * ROWS), &mut to.dmin);
}

#[inline(always)]
fn unpack_q6_k<'a>(
    block: *const u8,
    to: &mut Unpacked,
    vector: impl Fn(*const u8) -> &'a [u8; VECTOR],
) {
    for half in 0..2 {
        for j in 0..8 {
            let low = |i: usize| vector(block.wrapping_add((16 * half + 8 * i + j) * VECTOR));
            let (low0, low1) = (low(0), low(1));
            let high = vector(block.wrapping_add(Q6_K_HIGH + (8 * half + j) * VECTOR));
            let at = 32 * half + j;
            for i in 0..VECTOR {
                to.words[at][i] = (low0[i] & 15) | ((high[i] & 3) << 4);
                to.words[at + 8][i] = (low1[i] & 15) | ((high[i] & 12) << 2);
                to.words[at + 16][i] = (low0[i] >> 4) | (high[i] & 48);
                to.words[at + 24][i] = (low1[i] >> 4) | ((high[i] & 192) >> 2);
            }
        }
    }
    signed_scales(block.wrapping_add(Q6_K_SCALES), to, vector);
}

/// Four vectors of 16 signed scales a row.
#[inline(always)]
fn signed_scales<'a>(
    words: *const u8,
    to: &mut Unpacked,
    vector: impl Fn(*const u8) -> &'a [u8; VECTOR],
) {
    for s in 0..16 {
        let scales = lanes(vector(words.wrapping_add(s / 4 * VECTOR)));
        for r in 0..ROWS {
            to.scales[s][r] = (scales[r] << (24 - s % 4 * 8)) as i32 >> 24;
        }
    }
}

/// 16 vectors of words of four pairs of bits become 64 of one quant a byte.
#[inline(always)]
fn unpack_pairs<'a>(
    block: *const u8,
    to: &mut Unpacked,
    vector: impl Fn(*const u8) -> &'a [u8; VECTOR],
) {
    for i in 0..16 {
        let v = vector(block.wrapping_add(i * VECTOR));
        for run in 0..4 {
            to.words[i / 8 * 32 + 8 * run + i % 8] = v.map(|v| (v >> (2 * run)) & 3);
        }
    }
}

/// Weights of one column of a panel of F32, F16 or BF16.
#[inline(always)]
pub(crate) unsafe fn column(ty: WeightType, bytes: *const u8, k: usize) -> [f32; ROWS] {
    // SAFETY: the caller has this column.
    unsafe {
        match ty {
            WeightType::F32 => *bytes.add(k * VECTOR).cast(),
            WeightType::F16 => {
                let halves: &[[u8; 2]; ROWS] = &*bytes.add(k * 2 * ROWS).cast();
                halves.map(|h| f16::from_le_bytes(h).to_f32())
            }
            _ => {
                let words: &[[u8; 4]; ROWS] = &*bytes.add(k / 2 * VECTOR).cast();
                words.map(|w| {
                    let w = u32::from_le_bytes(w);
                    f32::from_bits(if k.is_multiple_of(2) {
                        w << 16
                    } else {
                        w & 0xFFFF_0000
                    })
                })
            }
        }
    }
}
