//! From the rows of a GGUF file to the device's order; `kernels/cuda/packed.cuh` describes it.

use crate::quant::{
    BlockIQ4NL, BlockQ3K, BlockQ4_0, BlockQ4K, BlockQ5_0, BlockQ6K, BlockQ8_0, IQ4_VALUES,
    WeightType, dequantize_row,
};
use half::f16;

/// Rows of a panel.
pub(super) const PANEL: usize = 16;
/// Columns of a chunk.
pub(super) const CHUNK: usize = 64;
/// Columns of one lane in a chunk.
const LANE: usize = 16;

/// How a matrix lies on the device. BF16 becomes [`Kind::F16`]: a row's numbers differ by far
/// less than F16's range once a power of two is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Q8_0,
    Q4_0,
    Q4K,
    Q6K,
}

/// Names of a kind's kernels.
pub(super) struct Kernels {
    pub(super) vector: &'static str,
    pub(super) small: &'static str,
    pub(super) large: &'static str,
    pub(super) get_rows: &'static str,
}

macro_rules! kernels {
    ($name:literal) => {
        Kernels {
            vector: concat!("mul_mat_vector_", $name),
            small: concat!("mul_mat_small_", $name),
            large: concat!("mul_mat_large_", $name),
            get_rows: concat!("get_rows_", $name),
        }
    };
}

impl Kind {
    pub(super) const ALL: [Kind; 6] = [
        Kind::F32,
        Kind::F16,
        Kind::Q8_0,
        Kind::Q4_0,
        Kind::Q4K,
        Kind::Q6K,
    ];

    pub(super) fn of(ty: WeightType) -> Kind {
        match ty {
            WeightType::F32 => Kind::F32,
            // All but the first two have no kernel on a card: their numbers are rounded to F16.
            WeightType::F16
            | WeightType::BF16
            | WeightType::Q4_1
            | WeightType::Q5_1
            | WeightType::Q2_K
            | WeightType::Q5_K
            | WeightType::IQ4_XS => Kind::F16,
            // The same numbers in more bytes.
            WeightType::Q8_0 | WeightType::Q5_0 | WeightType::IQ4_NL => Kind::Q8_0,
            WeightType::Q4_0 => Kind::Q4_0,
            WeightType::Q4_K => Kind::Q4K,
            WeightType::Q3_K | WeightType::Q6_K => Kind::Q6K,
        }
    }

    pub(super) fn kernels(self) -> Kernels {
        match self {
            Kind::F32 => kernels!("f32"),
            Kind::F16 => kernels!("f16"),
            Kind::Q8_0 => kernels!("q8_0"),
            Kind::Q4_0 => kernels!("q4_0"),
            Kind::Q4K => kernels!("q4_k"),
            Kind::Q6K => kernels!("q6_k"),
        }
    }

    /// Bytes of a panel of `n_chunks` chunks.
    pub(super) fn panel_bytes(self, n_chunks: u64) -> u64 {
        let (together, chunk_bytes, header) = self.layout();
        let (together, each) = (together as u64, (together * chunk_bytes + header) as u64);
        n_chunks / together * each
    }

    /// Chunks that share a header, bytes of a chunk, bytes of the header.
    fn layout(self) -> (usize, usize, usize) {
        match self {
            Kind::F32 => (1, 4096, 0),
            Kind::F16 => (1, 2048, 0),
            Kind::Q8_0 => (1, 1088, 0),
            Kind::Q4_0 => (1, 576, 0),
            Kind::Q4K => (4, 576, 64),
            Kind::Q6K => (4, 832, 64),
        }
    }
}

/// Panels, and what each row's results are multiplied by.
pub(super) fn pack(
    ty: WeightType,
    n_rows: usize,
    n_cols: usize,
    bytes: &[u8],
) -> (Vec<u8>, Vec<f32>) {
    let n_chunks = n_cols.div_ceil(CHUNK);
    let panel_bytes = Kind::of(ty).panel_bytes(n_chunks as u64) as usize;
    let n_panels = n_rows.div_ceil(PANEL);
    let mut packed = vec![0u8; n_panels * panel_bytes];
    let mut row_scale = vec![1f32; n_rows];
    let row_bytes = ty.row_bytes(n_cols).expect("checked by the caller");
    if n_rows == 0 || row_bytes == 0 {
        return (packed, row_scale);
    }
    // Loading a model is mostly this: panels are shared out among the machine's cores.
    let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = n_panels.div_ceil(n_threads).max(1);
    std::thread::scope(|scope| {
        let panels = packed.chunks_mut(share * panel_bytes);
        let scales = row_scale.chunks_mut(share * PANEL);
        let rows = bytes.chunks(share * PANEL * row_bytes);
        for ((panels, scales), rows) in panels.zip(scales).zip(rows) {
            scope.spawn(move || {
                let panels = panels.chunks_exact_mut(panel_bytes);
                let rows = rows.chunks(PANEL * row_bytes);
                for ((panel, scales), rows) in panels.zip(scales.chunks_mut(PANEL)).zip(rows) {
                    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
                        scales[r] = pack_row(ty, n_cols, row, r, panel);
                    }
                }
            });
        }
    });
    (packed, row_scale)
}

/// `2^-k` for the `k` that brings `largest` to between 2^12 and 2^13, and `2^k`.
fn powers(largest: f32) -> (f32, f64) {
    if largest == 0.0 || !largest.is_finite() {
        return (1.0, 1.0);
    }
    let exponent = (f64::from(largest).log2().floor() as i32) + 1;
    let k = (13 - exponent).clamp(-126, 126);
    (2f32.powi(-k), 2f64.powi(k))
}

/// A scale of a block times a row's power of two. Exact unless far below the row's largest.
fn scaled(d: f16, power: f64) -> [u8; 2] {
    f16::from_f64(d.to_f64() * power).to_le_bytes()
}

/// Writes one row into its panel; returns what undoes its power of two.
fn pack_row(ty: WeightType, n_cols: usize, row: &[u8], r: usize, panel: &mut [u8]) -> f32 {
    let (together, chunk_bytes, header) = Kind::of(ty).layout();
    let (g, below) = (r % 8, r / 8);
    // First byte of a chunk, and of what its group shares.
    let chunk_at = |chunk: usize| {
        let group = chunk / together * (together * chunk_bytes + header);
        group + chunk % together * chunk_bytes
    };
    let shared_at = |chunk: usize| {
        chunk / together * (together * chunk_bytes + header) + together * chunk_bytes
    };
    let blocks = row.chunks_exact(ty.block_bytes());
    match Kind::of(ty) {
        Kind::F32 | Kind::F16 => {
            let mut numbers = vec![0f32; n_cols];
            dequantize_row(ty, row, &mut numbers);
            let largest = numbers.iter().fold(0f32, |m, x| m.max(x.abs()));
            // F16 keeps its bits.
            let (undo, power) = match ty {
                WeightType::F16 => (1.0, 1.0),
                _ => powers(largest),
            };
            for (c, &x) in numbers.iter().enumerate() {
                let (t, i) = (c % CHUNK / LANE, c % LANE);
                let word = (2 * below + i / 8) * 32 + 4 * g + t;
                let at = chunk_at(c / CHUNK) + word * 16 + i % 8 * 2;
                let x = f64::from(x) * power;
                let high = f16::from_f64(x);
                panel[at..at + 2].copy_from_slice(&high.to_le_bytes());
                if ty == WeightType::F32 {
                    let rest = f16::from_f64(if high.is_finite() {
                        x - high.to_f64()
                    } else {
                        0.0
                    });
                    let at = at + 4 * 32 * 16;
                    panel[at..at + 2].copy_from_slice(&rest.to_le_bytes());
                }
            }
            undo
        }
        kind @ (Kind::Q8_0 | Kind::Q4_0) => {
            let d = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]);
            let largest = blocks.clone().fold(0f32, |m, b| m.max(d(b).to_f32().abs()));
            let steps = if kind == Kind::Q8_0 { 128.0 } else { 8.0 };
            let (undo, power) = powers(largest * steps);
            for (b, block) in blocks.enumerate() {
                let (chunk, half) = (b / 2, b % 2);
                let at = chunk_at(chunk);
                let scales = at + chunk_bytes - 64;
                let place = scales + (half * 8 + g) * 4 + 2 * below;
                panel[place..place + 2].copy_from_slice(&scaled(d(block), power));
                for t in 0..2 {
                    let lane = 4 * g + 2 * half + t;
                    if kind == Kind::Q8_0 {
                        let q = signed_bytes(ty, block);
                        let to = &mut panel[at + (below * 32 + lane) * 16..][..16];
                        for (to, &q) in to.iter_mut().zip(&q[t * LANE..]) {
                            *to = (q as u8).wrapping_add(128);
                        }
                    } else {
                        let q = BlockQ4_0::read(block).q;
                        let to = &mut panel[at + lane * 16 + below * 8..][..8];
                        nibbles(&q[t * LANE..][..LANE], to);
                    }
                }
            }
            // The scale of a last half chunk that the row does not have stays zero, and so does
            // what it would multiply.
            undo
        }
        Kind::Q4K => {
            let blocks: Vec<BlockQ4K> = blocks.map(BlockQ4K::read).collect();
            let largest = blocks.iter().fold(0f32, |m, b| {
                let d = b.d.to_f32().abs() * 63.0 * 15.0;
                m.max(d).max(b.dmin.to_f32().abs() * 63.0)
            });
            let (undo, power) = powers(largest);
            for (b, block) in blocks.iter().enumerate() {
                let shared = shared_at(4 * b) + g * 8 + below * 4;
                panel[shared..shared + 2].copy_from_slice(&scaled(block.d, power));
                panel[shared + 2..shared + 4].copy_from_slice(&scaled(block.dmin, power));
                for i in 0..8 {
                    let at = chunk_at(4 * b + i / 2);
                    let scales = at + 512 + (i % 2 * 8 + g) * 4 + 2 * below;
                    panel[scales] = block.scale[i];
                    panel[scales + 1] = block.min[i];
                    for t in 0..2 {
                        let lane = 4 * g + i % 2 * 2 + t;
                        let to = &mut panel[at + lane * 16 + below * 8..][..8];
                        nibbles(&block.q[32 * i + LANE * t..][..LANE], to);
                    }
                }
            }
            undo
        }
        Kind::Q6K => {
            let blocks: Vec<BlockQ6K> = blocks.map(|block| six_bits(ty, block)).collect();
            let largest = blocks.iter().fold(0f32, |m, b| {
                let steps = b.scale.iter().map(|s| s.unsigned_abs()).max();
                m.max(b.d.to_f32().abs() * 32.0 * f32::from(steps.unwrap_or(0)))
            });
            let (undo, power) = powers(largest);
            for (b, block) in blocks.iter().enumerate() {
                let shared = shared_at(4 * b) + g * 4 + below * 2;
                panel[shared..shared + 2].copy_from_slice(&scaled(block.d, power));
                for i in 0..16 {
                    let at = chunk_at(4 * b + i / 4);
                    let lane = 4 * g + i % 4;
                    let q = &block.q[LANE * i..][..LANE];
                    let low: [u8; LANE] = std::array::from_fn(|j| q[j] & 15);
                    nibbles(&low, &mut panel[at + lane * 16 + below * 8..][..8]);
                    let high = q.iter().enumerate().fold(0u32, |word, (j, &q)| {
                        word | u32::from(q >> 4) << (j / 2 * 2 + j % 2 * 16)
                    });
                    let to = at + 512 + lane * 8 + below * 4;
                    panel[to..to + 4].copy_from_slice(&high.to_le_bytes());
                    panel[at + 768 + lane * 2 + below] = block.scale[i] as u8;
                }
            }
            undo
        }
    }
}

/// The quants of a block of Q8_0, or of a type that is Q8_0 with fewer values.
fn signed_bytes(ty: WeightType, block: &[u8]) -> [i8; 32] {
    match ty {
        WeightType::Q5_0 => BlockQ5_0::read(block).q.map(|q| q as i8 - 16),
        WeightType::IQ4_NL => {
            let q = BlockIQ4NL::read(block).q;
            q.map(|q| IQ4_VALUES[usize::from(q)])
        }
        _ => BlockQ8_0::read(block).q,
    }
}

/// A block of Q6_K, or of Q3_K, which is Q6_K with fewer values.
fn six_bits(ty: WeightType, block: &[u8]) -> BlockQ6K {
    if ty == WeightType::Q6_K {
        return BlockQ6K::read(block);
    }
    let block = BlockQ3K::read(block);
    BlockQ6K {
        d: block.d,
        scale: block.scale,
        q: block.q.map(|q| q + 28),
    }
}

/// 16 nibbles in two words: of every eight, number `c` is nibble `c / 2 + 4 (c % 2)`.
fn nibbles(q: &[u8], to: &mut [u8]) {
    for (q, to) in q.chunks_exact(8).zip(to.chunks_exact_mut(4)) {
        let word = q.iter().enumerate().fold(0u32, |word, (c, &q)| {
            word | u32::from(q) << (4 * (c / 2 + 4 * (c % 2)))
        });
        to.copy_from_slice(&word.to_le_bytes());
    }
}
