//! The chunked form of `recur` with AMX tiles; [`crate::recur::chunk`] has the equations.
//!
//! Matrices of a chunk exist mostly as operands of tiles ([`super::pairs`]): each number is split
//! once, when it is made, in the order in which the next product reads it. All that has to do with
//! values goes through 32 value dimensions at a time, whose part of each matrix stays in the L1
//! cache. The state stays between chunks as tiles of F32. What lies above a diagonal is neither
//! computed nor read.

use super::CONFIG;
use super::invert::invert;
use super::pairs::{DEPTH, PAIR, TILE, four_tiles, left_row, right_row, transpose};
use crate::mul_mat::buffer::Buffer;
use crate::recur::chunk::LEAST;
use crate::recur::{CHUNK, Inputs, Rule, further_scales};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Rows and columns of a tile of F32.
const BLOCK: usize = 16;
/// Tiles of tokens in a chunk.
const BLOCKS: usize = CHUNK / BLOCK;
/// Most heads that go through the tokens together.
pub(crate) const HEADS: usize = 4;
/// Tokens that are normalised side by side.
const GROUP: usize = 8;
/// Value dimensions that go through a chunk together: two tiles.
const SLICE: usize = 2 * BLOCK;
/// F32 numbers of a tile.
const F32_TILE: usize = BLOCK * BLOCK;
/// Tile pairs along a sum over the tokens of a chunk.
const TOKEN_DEPTH: usize = CHUNK / DEPTH;

/// Memory of a thread, reused over heads and calls. Operands are named for their side.
struct Work {
    /// Keys, then queries, `[2 BLOCKS][dim_k / DEPTH]` tile pairs, left.
    kq: Buffer,
    /// `K^T`, `[BLOCKS][dim_k / DEPTH]` tile pairs, right.
    k_right: Buffer,
    /// `K^T`, `[dim_k / BLOCK][TOKEN_DEPTH]` tile pairs, left.
    k_left: Buffer,
    /// The heads' states, each `[dim_v / SLICE][dim_k / BLOCK][2]` tiles of F32.
    s: Buffer,
    /// A slice of the state, `[2][dim_k / DEPTH]` tile pairs, right.
    s_right: Buffer,
    small: Box<Small>,
}

/// What does not depend on the head's dimensions.
#[repr(C, align(64))]
struct Small {
    /// `K K^T` and `Q K^T`, `[CHUNK][CHUNK]`.
    kk: [f32; CHUNK * CHUNK],
    qk: [f32; CHUNK * CHUNK],
    /// `L` and the inverse of `I + L`; zero above the diagonal.
    l: [f32; CHUNK * CHUNK],
    t: [f32; CHUNK * CHUNK],
    /// The inverse and `M`, `[BLOCKS][TOKEN_DEPTH]` tile pairs, left.
    t_left: [u8; BLOCKS * TOKEN_DEPTH * PAIR],
    m_left: [u8; BLOCKS * TOKEN_DEPTH * PAIR],
    /// A slice of `K S` (later of `M E`), then of `Q S`, `[2 BLOCKS][2]` tiles.
    held: [f32; 2 * BLOCKS * 2 * F32_TILE],
    /// A slice of the right side of the triangular system, then of `E`, then of `E` weighted by
    /// the decay to the end of the chunk: `[2][TOKEN_DEPTH]` tile pairs, right.
    r: [u8; 2 * TOKEN_DEPTH * PAIR],
    e_end: [u8; 2 * TOKEN_DEPTH * PAIR],
    /// A slice of `E`, `[BLOCKS][2]` tiles.
    e: [f32; BLOCKS * 2 * F32_TILE],
    /// Sums of log decays.
    g: [f32; CHUNK],
    /// Decay from the state before the chunk to the token, and from the token to the end.
    from_state: [f32; CHUNK],
    to_end: [f32; CHUNK],
    beta: [f32; CHUNK],
    /// First token of the chunk that the token sees; 0 and `sees_state` if none was reset.
    since: [u32; CHUNK],
    sees_state: [bool; CHUNK],
}

thread_local! {
    static WORK: RefCell<Option<Box<Work>>> = const { RefCell::new(None) };
}

impl Work {
    fn new() -> Work {
        let empty = || Buffer::zeroed(0);
        Work {
            kq: empty(),
            k_right: empty(),
            k_left: empty(),
            s: empty(),
            s_right: empty(),
            small: Box::new(Small {
                kk: [0.0; CHUNK * CHUNK],
                qk: [0.0; CHUNK * CHUNK],
                l: [0.0; CHUNK * CHUNK],
                t: [0.0; CHUNK * CHUNK],
                t_left: [0; BLOCKS * TOKEN_DEPTH * PAIR],
                m_left: [0; BLOCKS * TOKEN_DEPTH * PAIR],
                held: [0.0; 2 * BLOCKS * 2 * F32_TILE],
                r: [0; 2 * TOKEN_DEPTH * PAIR],
                e_end: [0; 2 * TOKEN_DEPTH * PAIR],
                e: [0.0; BLOCKS * 2 * F32_TILE],
                g: [0.0; CHUNK],
                from_state: [0.0; CHUNK],
                to_end: [0.0; CHUNK],
                beta: [0.0; CHUNK],
                since: [0; CHUNK],
                sees_state: [false; CHUNK],
            }),
        }
    }
}

/// A head's chunk: dimensions padded to whole tile pairs, and where its matrices lie.
struct Chunk<'w> {
    dim_k: usize,
    dim_v: usize,
    kq: *mut u8,
    k_right: *mut u8,
    k_left: *mut u8,
    s: *mut f32,
    s_right: *mut u8,
    w: &'w mut Small,
}

/// The chunked form of some neighbouring heads, chunk by chunk: their rows lie side by side, on the
/// same pages of memory. `state` is theirs.
///
/// # Safety
/// As [`crate::cpu::avx512::recur::recurrent`]; `out` is the first head's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(crate) unsafe fn chunked(
    x: &Inputs<'_>,
    heads: Range<usize>,
    state: &mut [f32],
    out: *mut f32,
) {
    // Taken out, not borrowed: code in a closure would not be compiled for this caller's vectors.
    let mut work = WORK.take().unwrap_or_else(|| Box::new(Work::new()));
    let dim_k = x.head_dim_k.next_multiple_of(DEPTH);
    let dim_v = x.head_dim_v.next_multiple_of(SLICE);
    let room = |buffer: &mut Buffer, bytes: usize| {
        buffer.reserve(bytes);
        buffer.as_mut_ptr()
    };
    let states: *mut f32 = room(&mut work.s, heads.len() * dim_k * dim_v * 4).cast();
    // A tile pair of BF16 takes as many bytes as its numbers in F32.
    let mut c = Chunk {
        dim_k,
        dim_v,
        kq: room(&mut work.kq, 2 * CHUNK * dim_k * 4),
        k_right: room(&mut work.k_right, CHUNK * dim_k * 4),
        k_left: room(&mut work.k_left, CHUNK * dim_k * 4),
        s: states,
        s_right: room(&mut work.s_right, dim_k * SLICE * 4),
        w: &mut work.small,
    };
    let len = x.head_dim_k * x.head_dim_v;
    // SAFETY: the buffers have the shapes that `Work` states; tiles are configured before and
    // released after their use; rows of `out` are the heads', by the caller's promise.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly));
        for i in 0..heads.len() {
            c.s = states.add(i * dim_k * dim_v);
            c.load_state(x, &state[i * len..(i + 1) * len]);
        }
        for start in (0..x.n_tokens).step_by(CHUNK) {
            let n = CHUNK.min(x.n_tokens - start);
            for (i, head) in heads.clone().enumerate() {
                c.s = states.add(i * dim_k * dim_v);
                c.gather(x, head, start, n);
                let at = |head: usize, start: usize| {
                    out.wrapping_add(start * x.out_stride + (head - heads.start) * x.head_dim_v)
                };
                let next = if head + 1 < heads.end {
                    (head + 1, start)
                } else {
                    (heads.start, start + CHUNK)
                };
                let ahead = c.ahead(x, next.0, next.1, at(next.0, next.1));
                c.step(x, head, start, n, at(head, start), ahead);
            }
        }
        for i in 0..heads.len() {
            c.s = states.add(i * dim_k * dim_v);
            c.store_state(x, &mut state[i * len..(i + 1) * len]);
        }
        asm!("tilerelease", options(nostack, nomem));
    }
    WORK.set(Some(work));
}

/// The first `n` of sixteen lanes.
fn mask(n: usize) -> u16 {
    if n >= BLOCK { u16::MAX } else { (1 << n) - 1 }
}

/// Sixteen lanes, those from `n` on zero.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const f32, n: usize) -> __m512 {
    // SAFETY: masked lanes are not read.
    unsafe { _mm512_maskz_loadu_ps(mask(n), from) }
}

/// Sum of squares of `n` numbers.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn squares(z: *const f32, n: usize) -> f32 {
    let mut sums = [_mm512_setzero_ps(); 2];
    // SAFETY: `n` numbers, masked at their end.
    unsafe {
        for i in (0..n / DEPTH * DEPTH).step_by(DEPTH) {
            for u in 0..2 {
                let z = _mm512_loadu_ps(z.add(i + u * BLOCK));
                sums[u] = _mm512_fmadd_ps(z, z, sums[u]);
            }
        }
        for i in (n / DEPTH * DEPTH..n).step_by(BLOCK) {
            let z = load(z.add(i), n - i);
            sums[0] = _mm512_fmadd_ps(z, z, sums[0]);
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

/// Eight rows of `dim` numbers, normalised, as rows of left tile pairs; rows from `n` on become
/// zero. They lie far apart and fill few sets of the L1 cache: no more at a time.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn scaled_rows(
    rule: Rule,
    row: impl Fn(usize) -> *const f32,
    dim: usize,
    further: f32,
    n: usize,
    to: *mut u8,
    depth: usize,
) {
    let mut scales = [0f32; BLOCK];
    // SAFETY: only lanes below `dim` are read; each row has `depth` tile pairs.
    unsafe {
        for u in 0..GROUP {
            scales[u] = squares(row(u), dim);
        }
        let squares = _mm512_loadu_ps(scales.as_ptr());
        let norm = match rule {
            Rule::Ssd => _mm512_max_ps(_mm512_sqrt_ps(squares), _mm512_set1_ps(1e-12)),
            Rule::GatedDelta | Rule::Delta => {
                _mm512_sqrt_ps(_mm512_add_ps(squares, _mm512_set1_ps(1e-6)))
            }
        };
        let scale = _mm512_maskz_div_ps(mask(n), _mm512_set1_ps(further), norm);
        _mm512_storeu_ps(scales.as_mut_ptr(), scale);
        for u in 0..GROUP {
            let (z, scale) = (row(u), _mm512_set1_ps(scales[u]));
            for d in 0..depth {
                let first = d * DEPTH;
                let row = if dim - first >= DEPTH {
                    [
                        _mm512_loadu_ps(z.add(first)),
                        _mm512_loadu_ps(z.add(first + BLOCK)),
                    ]
                } else {
                    let rest = (dim - first).saturating_sub(BLOCK);
                    let second = z.wrapping_add(first + BLOCK);
                    [load(z.add(first), dim - first), load(second, rest)]
                };
                let row = row.map(|x| _mm512_mul_ps(x, scale));
                left_row(row, to.add(d * PAIR + u * 64));
            }
        }
    }
}

/// e^x for x <= 0 as [`crate::recur::chunk::exp`] computes it; 0 below [`LEAST`].
#[inline]
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    let some = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(LEAST));
    let set = |x: f32| _mm512_set1_ps(x);
    let y = _mm512_mul_ps(x, set(std::f32::consts::LOG2_E));
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(y);
    // ln 2 in two parts: `x - whole ln 2` without the rounding of `y`.
    let f = _mm512_fnmadd_ps(whole, set(0.693_359_4), x);
    let f = _mm512_fmadd_ps(whole, set(2.121_944_4e-4), f);
    let p = _mm512_fmadd_ps(set(1.0 / 720.0), f, set(1.0 / 120.0));
    let p = _mm512_fmadd_ps(p, f, set(1.0 / 24.0));
    let p = _mm512_fmadd_ps(p, f, set(1.0 / 6.0));
    let p = _mm512_fmadd_ps(p, f, set(0.5));
    let p = _mm512_fmadd_ps(p, f, set(1.0));
    let p = _mm512_fmadd_ps(p, f, set(1.0));
    _mm512_maskz_scalef_ps(some, p, whole)
}

/// A bit for each of the chunk's tokens `from..to`.
fn tokens(from: usize, to: usize) -> u64 {
    let below = |n: usize| if n < CHUNK { (1 << n) - 1 } else { u64::MAX };
    below(to) & !below(from)
}

/// The bits of token block `block`.
fn lanes(tokens: u64, block: usize) -> u16 {
    (tokens >> (block * BLOCK)) as u16
}

impl Chunk<'_> {
    /// Row `i` of the state, 16 numbers from column `j` on.
    fn state_row(&self, i: usize, j: usize) -> *mut f32 {
        let tile = j / SLICE * (self.dim_k / BLOCK) * 2 + i / BLOCK * 2 + j % SLICE / BLOCK;
        self.s.wrapping_add(tile * F32_TILE + i % BLOCK * BLOCK)
    }

    /// The state as tiles, what pads it zero.
    #[target_feature(enable = "avx512f")]
    unsafe fn load_state(&mut self, x: &Inputs<'_>, state: &[f32]) {
        for i in 0..self.dim_k {
            for j in (0..self.dim_v).step_by(BLOCK) {
                let n = x.head_dim_v.saturating_sub(j);
                let n = if i < x.head_dim_k { n } else { 0 };
                // SAFETY: a row of a tile; only lanes of the state are read.
                unsafe {
                    let from = load(state.as_ptr().wrapping_add(i * x.head_dim_v + j), n);
                    _mm512_store_ps(self.state_row(i, j), from);
                }
            }
        }
    }

    unsafe fn store_state(&mut self, x: &Inputs<'_>, state: &mut [f32]) {
        for (i, row) in state.chunks_exact_mut(x.head_dim_v).enumerate() {
            for (j, to) in row.chunks_mut(BLOCK).enumerate() {
                // SAFETY: a row of a tile, of which `to` takes the first numbers.
                unsafe {
                    let from = self.state_row(i, j * BLOCK);
                    to.as_mut_ptr().copy_from_nonoverlapping(from, to.len());
                }
            }
        }
    }

    /// Takes in the tokens `start..start + n`; the rest of the chunk becomes tokens that write
    /// nothing.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn gather(&mut self, x: &Inputs<'_>, head: usize, start: usize, n: usize) {
        let head_k = head / (x.n_head / x.n_head_k);
        let dim = x.head_dim_k;
        let depth = self.dim_k / DEPTH;
        let (further_k, further_q) = further_scales(x);
        let key = |i: usize| &x.k[((start + i) * x.n_head_k + head_k) * dim..][..dim];
        let query = |i: usize| &x.q[((start + i) * x.n_head + head) * dim..][..dim];
        for first in (0..n).step_by(DEPTH) {
            for i in (first..first + DEPTH).step_by(GROUP) {
                // A token beyond the last is the last with a factor of zero.
                let at = |u: usize| (i + u).min(n - 1);
                // SAFETY: rows of `depth` tile pairs, eight of a tile.
                unsafe {
                    let to = self.kq.add(i / BLOCK * depth * PAIR + i % BLOCK * 64);
                    let n = n.saturating_sub(i);
                    let keys = |u| key(at(u)).as_ptr();
                    scaled_rows(x.rule, keys, dim, further_k, n, to, depth);
                    let to = to.add(BLOCKS * depth * PAIR);
                    let queries = |u| query(at(u)).as_ptr();
                    scaled_rows(x.rule, queries, dim, further_q, n, to, depth);
                }
            }
            // SAFETY: tiles of the operands' shapes.
            unsafe {
                for i in 0..2 * depth {
                    let at = (first / BLOCK * depth + i) * PAIR;
                    let (from, to) = (self.kq.add(at), self.k_right.add(at));
                    transpose(from, to);
                    transpose(from.add(TILE), to.add(TILE));
                }
                self.turn_keys(first / DEPTH);
            }
        }
        self.decays(x, head, start, n);
    }

    /// `K^T` of 32 tokens as a left operand from `K^T` as a right one: there two neighbouring
    /// dimensions of 16 tokens lie side by side, here one dimension of 32.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn turn_keys(&mut self, tokens: usize) {
        let depth = self.dim_k / DEPTH;
        let even = _mm512_set_epi16(
            62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20,
            18, 16, 14, 12, 10, 8, 6, 4, 2, 0,
        );
        let odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
        for d in 0..depth {
            for half in [0, TILE] {
                for r in 0..BLOCK {
                    // SAFETY: tile pairs of the operands' shapes, rows of 64 bytes.
                    unsafe {
                        let a = self
                            .k_right
                            .add((2 * tokens * depth + d) * PAIR + half + r * 64);
                        let b = _mm512_load_si512(a.add(depth * PAIR).cast());
                        let a = _mm512_load_si512(a.cast());
                        let block = 2 * d + r / 8;
                        let to = self
                            .k_left
                            .add((block * TOKEN_DEPTH + tokens) * PAIR + half);
                        let to = to.add(r % 8 * 128);
                        _mm512_store_si512(to.cast(), _mm512_permutex2var_epi16(a, even, b));
                        let x = _mm512_permutex2var_epi16(a, odd, b);
                        _mm512_store_si512(to.add(64).cast(), x);
                    }
                }
            }
        }
    }

    /// Sums of log decays and what follows from them, resets included.
    #[target_feature(enable = "avx512f")]
    fn decays(&mut self, x: &Inputs<'_>, head: usize, start: usize, n: usize) {
        let w = &mut *self.w;
        let (mut sum, mut since, mut sees_state) = (0.0, 0, true);
        let mut resets = x.resets[x.resets.partition_point(|&r| r < start)..].iter();
        let mut reset = resets.next();
        for i in 0..CHUNK {
            let t = start + i;
            let g = match x.rule {
                _ if i >= n => 0.0,
                Rule::Delta => 0.0,
                Rule::GatedDelta | Rule::Ssd => x.g[t * x.n_head + head],
            };
            w.beta[i] = if i < n {
                x.beta[t * x.n_head + head]
            } else {
                0.0
            };
            let fresh = i < n && reset == Some(&t);
            if fresh {
                reset = resets.next();
            }
            // A decay to nothing is a reset too. Summing on from such a step would round away all
            // smaller ones after it.
            if fresh || g < LEAST {
                (sum, since, sees_state) = (0.0, i as u32, false);
            } else {
                sum += g;
            }
            (w.g[i], w.since[i], w.sees_state[i]) = (sum, since, sees_state);
        }
        let end = _mm512_set1_ps(w.g[CHUNK - 1]);
        let since = w.since[CHUNK - 1] as usize;
        for block in 0..BLOCKS {
            let at = block * BLOCK;
            let sees: u16 = (0..BLOCK)
                .map(|i| u16::from(w.sees_state[at + i]) << i)
                .sum();
            // SAFETY: 16 numbers of each array.
            unsafe {
                let g = _mm512_load_ps(w.g.as_ptr().add(at));
                let from = _mm512_maskz_mov_ps(sees, exp(g));
                _mm512_store_ps(w.from_state.as_mut_ptr().add(at), from);
                let seen = lanes(tokens(since, CHUNK), block);
                let to = _mm512_maskz_mov_ps(seen, exp(_mm512_sub_ps(end, g)));
                _mm512_store_ps(w.to_end.as_mut_ptr().add(at), to);
            }
        }
    }

    /// The chunk of tokens `start..start + n`, gathered; `out` is the first one's row.
    ///
    /// Tiles and vectors work side by side where the processor finds both within its reach, so
    /// products alternate with vector work that does not wait for them.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn step(
        &mut self,
        x: &Inputs<'_>,
        head: usize,
        start: usize,
        n: usize,
        out: *mut f32,
        mut ahead: Ahead,
    ) {
        let depth = self.dim_k / DEPTH;
        let pairs = n.div_ceil(DEPTH);
        let ssd = x.rule == Rule::Ssd;
        // SAFETY: operands and results have the shapes that `Work` and `Small` state.
        unsafe {
            let queries = self.kq.add(BLOCKS * depth * PAIR);
            let mut state_in = 0..depth;
            for i in 0..pairs {
                for j in 0..=i {
                    let at = 2 * i * BLOCK * CHUNK + 2 * j * BLOCK;
                    let b = two(self.k_right, j, depth);
                    let square = |to: &mut [f32; CHUNK * CHUNK]| {
                        let to = to.as_mut_ptr().add(at);
                        let below = to.add(BLOCK * CHUNK);
                        [to, to.add(BLOCK), below, below.add(BLOCK)]
                    };
                    let c = square(&mut self.w.qk);
                    four_tiles(depth, two(queries, i, depth), b, c, CHUNK * 4, false);
                    ahead.ask();
                    if let Some(d) = state_in.next() {
                        self.state_in(0, d);
                    }
                    if !ssd {
                        let c = square(&mut self.w.kk);
                        four_tiles(depth, two(self.kq, i, depth), b, c, CHUNK * 4, false);
                        ahead.ask();
                        if let Some(d) = state_in.next() {
                            self.state_in(0, d);
                        }
                    }
                }
            }
            state_in.for_each(|d| self.state_in(0, d));
            let held = self.w.held.as_mut_ptr();
            let from_state = held.add(BLOCKS * 2 * F32_TILE);
            let e = self.w.e.as_mut_ptr();
            let state = two(self.s_right, 0, depth);
            let r = two(self.w.r.as_ptr(), 0, TOKEN_DEPTH);
            let e_end = two(self.w.e_end.as_ptr(), 0, TOKEN_DEPTH);
            for first in (0..self.dim_v).step_by(SLICE) {
                for i in 0..pairs {
                    if !ssd {
                        let a = two(self.kq, i, depth);
                        four_tiles(depth, a, state, four(held, i), 64, false);
                        ahead.ask();
                    }
                    if first == 0 {
                        self.triangles(2 * i, ssd);
                        self.triangles(2 * i + 1, ssd);
                    }
                }
                for i in 0..pairs {
                    let a = two(queries, i, depth);
                    four_tiles(depth, a, state, four(from_state, i), 64, false);
                    ahead.ask();
                    if first == 0 && i == 0 && !ssd {
                        self.invert(2 * pairs);
                    }
                    let tokens = i * DEPTH..(i + 1) * DEPTH;
                    if ssd {
                        self.right_side::<true>(x, head, start, n, first, tokens);
                    } else {
                        self.right_side::<false>(x, head, start, n, first, tokens);
                    }
                }
                if !ssd {
                    for i in 0..pairs {
                        let a = two(self.w.t_left.as_ptr(), i, TOKEN_DEPTH);
                        four_tiles(i + 1, a, r, four(e, i), 64, false);
                        ahead.ask();
                    }
                }
                for i in 0..pairs {
                    if !ssd {
                        self.written(i * DEPTH..(i + 1) * DEPTH);
                    }
                    // `K S` has been used: its place takes `M E`.
                    let a = two(self.w.m_left.as_ptr(), i, TOKEN_DEPTH);
                    four_tiles(i + 1, a, r, four(held, i), 64, false);
                    ahead.ask();
                }
                let mut rows = (0..n).step_by(BLOCK);
                for d in 0..depth {
                    let c = four(self.state_row(0, first), d);
                    four_tiles(pairs, two(self.k_left, d, TOKEN_DEPTH), e_end, c, 64, true);
                    ahead.ask();
                    if let Some(i) = rows.next() {
                        self.write_out(x, first, i..n.min(i + BLOCK), out);
                    }
                    if first + SLICE < self.dim_v {
                        self.state_in(first + SLICE, d);
                    }
                }
                rows.for_each(|i| self.write_out(x, first, i..n.min(i + BLOCK), out));
            }
        }
    }

    /// What to ask for before the chunk of a head from token `start` on, whose output is at `out`.
    fn ahead(&self, x: &Inputs<'_>, head: usize, start: usize, out: *const f32) -> Ahead {
        let head_k = head / (x.n_head / x.n_head_k);
        let (dim_k, dim_v) = (x.head_dim_k, x.head_dim_v);
        let row = |x: &[f32], n_head: usize, head: usize, dim: usize| {
            let first = (start * n_head + head) * dim;
            x.as_ptr().wrapping_add(first).cast::<u8>()
        };
        let rows = 4 * CHUNK.min(x.n_tokens.saturating_sub(start));
        // Products of a chunk: `K K^T` and `Q K^T`, then those of each slice.
        let products = 6 + self.dim_v / SLICE * (4 * TOKEN_DEPTH + self.dim_k / DEPTH);
        Ahead {
            first: [
                row(x.k, x.n_head_k, head_k, dim_k),
                row(x.q, x.n_head, head, dim_k),
                row(x.v, x.n_head_k, head_k, dim_v),
                out.cast(),
            ],
            stride: [
                x.n_head_k * dim_k * 4,
                x.n_head * dim_k * 4,
                x.n_head_k * dim_v * 4,
                x.out_stride * 4,
            ],
            bytes: [dim_k * 4, dim_k * 4, dim_v * 4, dim_v * 4],
            asked: 0,
            rows,
            step: rows.div_ceil(products),
        }
    }

    /// `out = exp(G) Q S + M E` for a slice of some rows.
    #[target_feature(enable = "avx512f")]
    unsafe fn write_out(&self, x: &Inputs<'_>, first: usize, rows: Range<usize>, out: *mut f32) {
        let n_v = x.head_dim_v - first;
        for i in rows {
            let factor = _mm512_set1_ps(self.w.from_state[i]);
            let row = i / BLOCK * 2 * F32_TILE + i % BLOCK * BLOCK;
            for j in 0..2 {
                // SAFETY: rows of tiles; row `i` of the head's output, masked at its end.
                unsafe {
                    let inside = self.w.held.as_ptr().add(row + j * F32_TILE);
                    let from_state = _mm512_load_ps(inside.add(BLOCKS * 2 * F32_TILE));
                    let o = _mm512_fmadd_ps(from_state, factor, _mm512_load_ps(inside));
                    let to = out.add(i * x.out_stride + first);
                    let mask = mask(n_v.saturating_sub(j * BLOCK));
                    _mm512_mask_storeu_ps(to.wrapping_add(j * BLOCK), mask, o);
                }
            }
        }
    }

    /// 32 rows of the slice of the state at value `first` as an operand, then decayed to the end
    /// of the chunk.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn state_in(&mut self, first: usize, d: usize) {
        let depth = self.dim_k / DEPTH;
        let decay = _mm512_set1_ps(self.w.from_state[CHUNK - 1]);
        // A state that nobody sees may hold anything: zeros, not a factor of zero.
        let seen = if self.w.sees_state[0] { u16::MAX } else { 0 };
        for j in 0..2 {
            for r in 0..BLOCK {
                // SAFETY: rows `2 r` and `2 r + 1` of two tiles below each other.
                unsafe {
                    let s = self.state_row(d * DEPTH + 2 * r, first + j * BLOCK);
                    let even = _mm512_maskz_loadu_ps(seen, s);
                    let odd = _mm512_maskz_loadu_ps(seen, s.add(BLOCK));
                    let to = self.s_right.add((j * depth + d) * PAIR + r * 64);
                    right_row(even, odd, to);
                    _mm512_store_ps(s, _mm512_mul_ps(even, decay));
                    _mm512_store_ps(s.add(BLOCK), _mm512_mul_ps(odd, decay));
                }
            }
        }
    }

    /// `M` as an operand, and `L`: the rows of a block.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn triangles(&mut self, block: usize, ssd: bool) {
        let w = &mut *self.w;
        let least = _mm512_set1_ps(LEAST);
        {
            let base = block * BLOCK;
            let g_base = _mm512_set1_ps(w.g[base]);
            // exp(g_i - g_j) = exp(g_i - g_base) exp(g_base - g_j) for j before the block.
            let mut to_base = [_mm512_setzero_ps(); BLOCKS];
            // SAFETY: whole vectors of the arrays; tile pairs of 64 bytes a row.
            unsafe {
                let g = w.g.as_ptr();
                for j in 0..block {
                    let g = _mm512_load_ps(g.add(j * BLOCK));
                    to_base[j] = exp(_mm512_sub_ps(g_base, g));
                }
                let mut after = [0f32; BLOCK];
                let own = _mm512_load_ps(g.add(base));
                _mm512_storeu_ps(after.as_mut_ptr(), exp(_mm512_sub_ps(own, g_base)));
                for r in 0..BLOCK {
                    let i = base + r;
                    let seen = tokens(w.since[i] as usize, i + 1);
                    let g_i = _mm512_set1_ps(*g.add(i));
                    let after = _mm512_set1_ps(after[r]);
                    let beta = _mm512_set1_ps(w.beta[i]);
                    let mut m = [_mm512_setzero_ps(); BLOCKS];
                    for j in 0..=block {
                        let past = _mm512_sub_ps(g_i, _mm512_load_ps(g.add(j * BLOCK)));
                        let seen = lanes(seen, j);
                        let decay = if j < block {
                            // What falls below the least is left out, as `exp` does.
                            let seen = _mm512_mask_cmp_ps_mask::<_CMP_GE_OQ>(seen, past, least);
                            _mm512_maskz_mul_ps(seen, after, to_base[j])
                        } else {
                            _mm512_maskz_mov_ps(seen, exp(past))
                        };
                        let at = i * CHUNK + j * BLOCK;
                        m[j] = _mm512_mul_ps(decay, _mm512_load_ps(w.qk.as_ptr().add(at)));
                        if !ssd {
                            let kk = _mm512_load_ps(w.kk.as_ptr().add(at));
                            let l = _mm512_mul_ps(_mm512_mul_ps(decay, beta), kk);
                            let l = _mm512_maskz_mov_ps(lanes(tokens(0, i), j), l);
                            _mm512_store_ps(w.l.as_mut_ptr().add(at), l);
                        }
                    }
                    for d in 0..=block / 2 {
                        let to = w.m_left.as_mut_ptr();
                        let to = to.add((block * TOKEN_DEPTH + d) * PAIR + r * 64);
                        left_row([m[2 * d], m[2 * d + 1]], to);
                    }
                }
            }
        }
    }

    /// The inverse of `I + L` as an operand.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn invert(&mut self, blocks: usize) {
        let w = &mut *self.w;
        // SAFETY: whole vectors of the arrays; tile pairs of 64 bytes a row.
        unsafe {
            invert(blocks, &w.l, &mut w.t);
            for i in 0..blocks * BLOCK {
                let (block, r) = (i / BLOCK, i % BLOCK);
                for d in 0..=block / 2 {
                    let row = w.t.as_ptr().add(i * CHUNK + d * DEPTH);
                    let to = w.t_left.as_mut_ptr();
                    let to = to.add((block * TOKEN_DEPTH + d) * PAIR + r * 64);
                    left_row([_mm512_load_ps(row), _mm512_load_ps(row.add(BLOCK))], to);
                }
            }
        }
    }

    /// A slice of `beta (V - exp(G) K S)` as an operand; for Ssd, `beta V` is already `E`.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn right_side<const SSD: bool>(
        &mut self,
        x: &Inputs<'_>,
        head: usize,
        start: usize,
        n: usize,
        first: usize,
        tokens: Range<usize>,
    ) {
        let head_k = head / (x.n_head / x.n_head_k);
        let set = |x: f32| _mm512_set1_ps(x);
        let n_v = x.head_dim_v - first;
        let w = &mut *self.w;
        for i in tokens.step_by(2) {
            // Beyond the last token: anything finite, `beta` is zero.
            let v = [i.min(n - 1), (i + 1).min(n - 1)].map(|i| {
                let row = ((start + i) * x.n_head_k + head_k) * x.head_dim_v;
                x.v[row + first..row + x.head_dim_v].as_ptr()
            });
            let beta = [set(w.beta[i]), set(w.beta[i + 1])];
            let held = [set(w.from_state[i]), set(w.from_state[i + 1])];
            let end = [set(w.to_end[i]), set(w.to_end[i + 1])];
            for j in 0..2 {
                // SAFETY: two rows of `v`, of `held` and of tile pairs.
                unsafe {
                    let mut r = [_mm512_setzero_ps(); 2];
                    for u in 0..2 {
                        r[u] = load(v[u].wrapping_add(j * BLOCK), n_v.saturating_sub(j * BLOCK));
                        if !SSD {
                            let row = (i / BLOCK * 2 + j) * F32_TILE + (i + u) % BLOCK * BLOCK;
                            let ks = _mm512_load_ps(w.held.as_ptr().add(row));
                            r[u] = _mm512_fnmadd_ps(ks, held[u], r[u]);
                        }
                        r[u] = _mm512_mul_ps(r[u], beta[u]);
                    }
                    let at = (j * TOKEN_DEPTH + i / DEPTH) * PAIR + i % DEPTH / 2 * 64;
                    right_row(r[0], r[1], w.r.as_mut_ptr().add(at));
                    if SSD {
                        let (even, odd) =
                            (_mm512_mul_ps(r[0], end[0]), _mm512_mul_ps(r[1], end[1]));
                        right_row(even, odd, w.e_end.as_mut_ptr().add(at));
                    }
                }
            }
        }
    }

    /// A slice of `E`, as it is and weighted by the decay to the end of the chunk, as operands.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn written(&mut self, tokens: Range<usize>) {
        let w = &mut *self.w;
        for i in tokens.step_by(2) {
            let weights = [0, 1].map(|u| _mm512_set1_ps(w.to_end[i + u]));
            for j in 0..2 {
                // SAFETY: two rows of a tile of `e`, one of a tile pair.
                unsafe {
                    let row = (i / BLOCK * 2 + j) * F32_TILE + i % BLOCK * BLOCK;
                    let e = w.e.as_ptr().add(row);
                    let (even, odd) = (_mm512_load_ps(e), _mm512_load_ps(e.add(BLOCK)));
                    let at = (j * TOKEN_DEPTH + i / DEPTH) * PAIR + i % DEPTH / 2 * 64;
                    right_row(even, odd, w.r.as_mut_ptr().add(at));
                    let even = _mm512_mul_ps(even, weights[0]);
                    let odd = _mm512_mul_ps(odd, weights[1]);
                    right_row(even, odd, w.e_end.as_mut_ptr().add(at));
                }
            }
        }
    }
}

/// Tile rows or columns `2 i` and `2 i + 1` of an operand.
fn two(operand: *const u8, i: usize, depth: usize) -> [*const u8; 2] {
    [0, 1].map(|u| operand.wrapping_add((2 * i + u) * depth * PAIR))
}

/// The tiles of rows `2 i` and `2 i + 1` of a slice.
fn four(slice: *mut f32, i: usize) -> [*mut f32; 4] {
    [0, 1, 2, 3].map(|u| slice.wrapping_add((4 * i + u) * F32_TILE))
}

/// Asks memory for the rows of a chunk's tokens, some at a time: they lie far apart, so that the
/// processor does not foresee them, and come at the pace of all the work of the chunk before.
struct Ahead {
    /// First row of each of keys, queries, values and outputs, and the bytes to the next token's.
    first: [*const u8; 4],
    stride: [usize; 4],
    bytes: [usize; 4],
    /// Rows asked for and rows there are, counted over all four.
    asked: usize,
    rows: usize,
    /// Rows to ask for after each product.
    step: usize,
}

impl Ahead {
    /// Asks for the next rows.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn ask(&mut self) {
        let end = self.rows.min(self.asked + self.step);
        for row in self.asked..end {
            let (token, of) = (row / 4, row % 4);
            let from = self.first[of].wrapping_add(token * self.stride[of]);
            for line in (0..self.bytes[of]).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(line).cast());
            }
        }
        self.asked = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_the_tokens_of_a_block() {
        for from in 0..=CHUNK {
            for to in from..=CHUNK {
                for i in 0..CHUNK {
                    let set = lanes(tokens(from, to), i / BLOCK) >> (i % BLOCK) & 1 == 1;
                    assert_eq!(set, (from..to).contains(&i));
                }
            }
        }
    }
}
