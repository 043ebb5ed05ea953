//! Activations as the integer kernels read them: signed bytes with one F32 scale per block.
//!
//! Tokens come in *groups* of 16 (the last may be smaller). Inside a group the bytes are
//! `[n_cols / 64][width][64]`, columns padded with zeros to a multiple of 64: the 16 x 64 bytes of
//! one AMX tile are contiguous, and no power-of-two stride sends tokens to the same cache sets.
//! Scales and sums are `[n_blocks][width]`.
//!
//! A block of 32 (for Q8_0, Q4_0 and their like) or 256 (for the K types) numbers `x` becomes
//! `q = round(x * 127 / max|x|)`, ties to even, and `d = max|x| / 127`. A block with an infinity
//! or a NaN gets `d = NaN`; one whose maximum is below 1e-36 is zero.

use super::buffer::Buffer;
use crate::pool::Pool;
use crate::split::SplitMut;

/// Tokens of a group: rows of an AMX tile.
pub(crate) const GROUP: usize = 16;

/// Smaller maxima count as zero: their reciprocal would overflow.
const TINY: f32 = 1e-36;

/// Quantised activations with blocks of 32 or 256 numbers. See the module's text.
pub(crate) struct Quants {
    block_len: usize,
    n_tokens: usize,
    n_blocks: usize,
    /// Bytes of one token: columns rounded up to 64.
    row: usize,
    q: Buffer,
    d: Vec<f32>,
    /// Blocks of 32: `-8 * sum(q)` and `-128 * sum(q)`, where a dot product with quants whose
    /// zero is at 8 or 128 begins.
    neg8: Vec<i32>,
    neg128: Vec<i32>,
    /// Blocks of 32: `d * sum(q)`, what a minimum is multiplied by.
    dsum: Vec<f32>,
    /// Blocks of 256: `-32 * sum(q)` of each 16, `[n_blocks][width][16]`.
    neg32: Vec<i32>,
    /// Blocks of 256: `sum(q)` of each 32, `[n_blocks][width][8]`, and of each 16.
    sum32: Vec<i16>,
    sum16: Vec<i16>,
}

/// One group's data from one token on. Pointers step by `width` tokens per block (of 64 bytes
/// per token and 64 columns for `q`).
#[derive(Clone, Copy)]
pub(crate) struct Group {
    pub(crate) width: usize,
    pub(crate) q: *const i8,
    pub(crate) d: *const f32,
    pub(crate) neg8: *const i32,
    pub(crate) neg128: *const i32,
    pub(crate) dsum: *const f32,
    pub(crate) neg32: *const i32,
    pub(crate) sum32: *const i16,
    pub(crate) sum16: *const i16,
}

impl Quants {
    /// Nothing yet; reused from call to call for its memory.
    pub(crate) fn new(block_len: usize) -> Quants {
        Quants {
            block_len,
            n_tokens: 0,
            n_blocks: 0,
            row: 0,
            q: Buffer::zeroed(0),
            d: Vec::new(),
            neg8: Vec::new(),
            neg128: Vec::new(),
            dsum: Vec::new(),
            neg32: Vec::new(),
            sum32: Vec::new(),
            sum16: Vec::new(),
        }
    }

    pub(crate) fn block_len(&self) -> usize {
        self.block_len
    }

    /// Quantises `x`, `[n_tokens, n_cols]`, with `row` one of this module's functions compiled
    /// for the instruction set in use.
    pub(crate) fn fill(&mut self, pool: &Pool, x: &[f32], n_tokens: usize, row: QuantizeRow) {
        let n_cols = x.len() / n_tokens;
        self.n_tokens = n_tokens;
        self.n_blocks = n_cols / self.block_len;
        self.row = n_cols.next_multiple_of(64);
        // AMX reads whole tiles: a group narrower than 16 reads past its end, by less than one.
        self.q.reserve(n_tokens * self.row + GROUP * 64);
        let n = n_tokens * self.n_blocks;
        self.d.resize(n, 0.0);
        if self.block_len == 32 {
            self.neg8.resize(n, 0);
            self.neg128.resize(n, 0);
            self.dsum.resize(n, 0.0);
        } else {
            self.neg32.resize(n * 16, 0);
            self.sum32.resize(n * 8, 0);
            self.sum16.resize(n * 16, 0);
        }
        let parts = Parts {
            q: SplitMut::new(&mut self.q),
            d: SplitMut::new(&mut self.d),
            neg8: SplitMut::new(&mut self.neg8),
            neg128: SplitMut::new(&mut self.neg128),
            dsum: SplitMut::new(&mut self.dsum),
            neg32: SplitMut::new(&mut self.neg32),
            sum32: SplitMut::new(&mut self.sum32),
            sum16: SplitMut::new(&mut self.sum16),
        };
        let (row_bytes, n_blocks, block_len) = (self.row, self.n_blocks, self.block_len);
        let grain = (16 * 1024 / n_cols.max(1)).max(1);
        pool.for_each(n_tokens, grain, |tokens| {
            for t in tokens {
                let first = t / GROUP * GROUP;
                let at = Place {
                    block_len,
                    width: GROUP.min(n_tokens - first),
                    token: t - first,
                    first_byte: first * row_bytes,
                    first_block: first * n_blocks,
                };
                // SAFETY: the instruction set of `row` is available (checked when packing), and
                // each token is claimed once.
                unsafe { row(&x[t * n_cols..(t + 1) * n_cols], &at, &parts) }
            }
        });
    }

    /// Group `g`, from its first token.
    pub(crate) fn group(&self, g: usize) -> Group {
        let first = g * GROUP;
        assert!(first < self.n_tokens);
        let block = first * self.n_blocks;
        let of32 = if self.block_len == 32 { block } else { 0 };
        let of256 = if self.block_len == 32 { 0 } else { block };
        Group {
            width: GROUP.min(self.n_tokens - first),
            q: self.q[first * self.row..].as_ptr().cast(),
            d: self.d[block..].as_ptr(),
            neg8: self.neg8[of32..].as_ptr(),
            neg128: self.neg128[of32..].as_ptr(),
            dsum: self.dsum[of32..].as_ptr(),
            neg32: self.neg32[16 * of256..].as_ptr(),
            sum32: self.sum32[8 * of256..].as_ptr(),
            sum16: self.sum16[16 * of256..].as_ptr(),
        }
    }
}

impl Group {
    /// The same group seen from `t` tokens on.
    ///
    /// # Safety
    /// `t` is below `width`.
    #[inline(always)]
    pub(crate) unsafe fn at_token(&self, t: usize) -> Group {
        // SAFETY: each array holds `width` tokens per block; the arrays of the other block
        // length are empty and their pointers only moved, never read.
        unsafe {
            Group {
                width: self.width,
                q: self.q.add(64 * t),
                d: self.d.add(t),
                neg8: self.neg8.wrapping_add(t),
                neg128: self.neg128.wrapping_add(t),
                dsum: self.dsum.wrapping_add(t),
                neg32: self.neg32.wrapping_add(16 * t),
                sum32: self.sum32.wrapping_add(8 * t),
                sum16: self.sum16.wrapping_add(16 * t),
            }
        }
    }
}

/// What [`Quants::fill`] writes, shared between threads.
pub(crate) struct Parts<'a> {
    q: SplitMut<'a, u8>,
    d: SplitMut<'a, f32>,
    neg8: SplitMut<'a, i32>,
    neg128: SplitMut<'a, i32>,
    dsum: SplitMut<'a, f32>,
    neg32: SplitMut<'a, i32>,
    sum32: SplitMut<'a, i16>,
    sum16: SplitMut<'a, i16>,
}

/// Where one token's blocks go.
pub(crate) struct Place {
    pub(crate) block_len: usize,
    width: usize,
    token: usize,
    first_byte: usize,
    first_block: usize,
}

impl Place {
    /// The token's bytes of `n` columns from `column` on, which lie within 64 columns.
    ///
    /// # Safety
    /// Only one thread has the token, and only one such slice.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(crate) unsafe fn bytes<'a>(
        &self,
        parts: &'a Parts<'_>,
        column: usize,
        n: usize,
    ) -> &'a mut [u8] {
        let at = self.first_byte + (column / 64 * self.width + self.token) * 64 + column % 64;
        // SAFETY: passed on.
        unsafe { parts.q.part(at..at + n) }
    }

    /// Sets scale and sum of block `b` of 32. (Sums are small; those of a block with a NaN may be
    /// anything, and its scale makes nothing of them.)
    ///
    /// # Safety
    /// Only one thread has the token.
    #[inline(always)]
    pub(crate) unsafe fn end_32(&self, parts: &Parts<'_>, b: usize, d: f32, sum: i32) {
        let i = self.first_block + b * self.width + self.token;
        // SAFETY: passed on.
        unsafe {
            parts.d.part(i..i + 1)[0] = d;
            parts.neg8.part(i..i + 1)[0] = sum.wrapping_mul(-8);
            parts.neg128.part(i..i + 1)[0] = sum.wrapping_mul(-128);
            parts.dsum.part(i..i + 1)[0] = d * sum as f32;
        }
    }

    /// Sets scale and sums (of each 16 columns) of block `b` of 256.
    ///
    /// # Safety
    /// Only one thread has the token.
    #[inline(always)]
    pub(crate) unsafe fn end_256(&self, parts: &Parts<'_>, b: usize, d: f32, sums: &[i32; 16]) {
        let i = self.first_block + b * self.width + self.token;
        // SAFETY: passed on.
        unsafe {
            parts.d.part(i..i + 1)[0] = d;
            let neg32 = parts.neg32.part(16 * i..16 * (i + 1));
            let sum32 = parts.sum32.part(8 * i..8 * (i + 1));
            let sum16 = parts.sum16.part(16 * i..16 * (i + 1));
            for j in 0..16 {
                neg32[j] = sums[j].wrapping_mul(-32);
                sum16[j] = sums[j] as i16;
            }
            for j in 0..8 {
                sum32[j] = sums[2 * j].wrapping_add(sums[2 * j + 1]) as i16;
            }
        }
    }
}

/// [`quantize_row`] compiled for an instruction set, or one that does the same.
pub(crate) type QuantizeRow = unsafe fn(&[f32], &Place, &Parts<'_>);

/// Quantises one token. Inlined into an instruction set's own function, where the loops of
/// fixed length become its vectors; the arithmetic is exact or singly rounded, hence the same.
///
/// # Safety
/// No other thread writes the same token.
#[inline(always)]
pub(crate) unsafe fn quantize_row(x: &[f32], at: &Place, parts: &Parts<'_>) {
    if at.block_len == 32 {
        for (b, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let (d, inverse) = scale(max_abs_bits(x));
            // SAFETY: passed on. Of a last half of 64 bytes nobody reads the other half.
            unsafe {
                let sum = round(x, inverse, at.bytes(parts, 32 * b, 32));
                at.end_32(parts, b, d, sum);
            }
        }
    } else {
        for (b, x) in x.as_chunks::<256>().0.iter().enumerate() {
            let (d, inverse) = scale(max_abs_bits(x));
            let mut sums = [0; 16];
            for i in 0..16 {
                let run: &[f32; 16] = &x.as_chunks().0[i];
                // SAFETY: passed on.
                sums[i] = unsafe { round(run, inverse, at.bytes(parts, 256 * b + 16 * i, 16)) };
            }
            // SAFETY: passed on.
            unsafe { at.end_256(parts, b, d, &sums) }
        }
    }
}

/// Largest magnitude, as bits: those of a NaN are above those of infinity, above all numbers'.
#[inline(always)]
fn max_abs_bits<const N: usize>(x: &[f32; N]) -> u32 {
    let mut lanes = [0u32; 16];
    for i in 0..N {
        lanes[i % 16] = lanes[i % 16].max(x[i].to_bits() & 0x7FFF_FFFF);
    }
    let mut max = 0;
    for lane in lanes {
        max = max.max(lane);
    }
    max
}

/// The scale of a block and what its numbers are multiplied by before rounding.
#[inline(always)]
pub(crate) fn scale(max_abs_bits: u32) -> (f32, f32) {
    let max = f32::from_bits(max_abs_bits);
    if !max.is_finite() {
        (f32::NAN, 0.0)
    } else if max < TINY {
        (0.0, 0.0)
    } else {
        (max / 127.0, 127.0 / max)
    }
}

/// Rounds a block into `q` and returns the sum of its quants.
#[inline(always)]
fn round<const N: usize>(x: &[f32; N], inverse: f32, q: &mut [u8]) -> i32 {
    // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits; it turns a NaN
    // (infinity times zero) into some number, and is one instruction everywhere.
    const MAGIC: f32 = 12_582_912.0;
    let q = &mut q[..N];
    let mut sum = 0;
    for i in 0..N {
        let v = (x[i] * inverse + MAGIC).to_bits() as i8;
        q[i] = v as u8;
        sum += i32::from(v);
    }
    sum
}
