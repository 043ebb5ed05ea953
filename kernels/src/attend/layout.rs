//! How a page of key and value cells lies in memory.
//!
//! A page is 64 cells of all kv heads, head after head, a head's keys before its values. Keys lie
//! dimension-major in two halves of 32 cells, so that the lanes of a vector are cells and a dot
//! product needs no sum across lanes. Values lie cell-major in chunks of 32 dimensions, so that
//! lanes are dimensions. Both halves and chunks are read front to back. 8-bit blocks hold four
//! neighbouring dimensions (keys) or cells (values) side by side, as byte dot products want them.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Cells in a page.
pub const PAGE_CELLS: usize = 64;
/// Cells in the half of a page whose keys lie together.
pub(crate) const HALF_CELLS: usize = 32;
/// Dimensions that share a scale in [`KvType::Q8_0`], and lie together in values of any type.
pub(crate) const BLOCK: usize = 32;
/// Bytes of an 8-bit block of keys: 32 cells x 32 dimensions, then 32 F16 scales.
pub(crate) const K_BLOCK_BYTES: usize = HALF_CELLS * BLOCK + HALF_CELLS * 2;
/// Bytes of an 8-bit block of values: 64 cells x 32 dimensions, then 64 F16 scales.
pub(crate) const V_BLOCK_BYTES: usize = PAGE_CELLS * BLOCK + PAGE_CELLS * 2;

/// Number format of stored keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// IEEE single.
    F32,
    /// IEEE half; what is beyond its range becomes infinite.
    F16,
    /// The upper half of a single, rounded to nearest even.
    BF16,
    /// Signed bytes with one F16 scale for 32 dimensions of a cell; the arithmetic of GGUF's Q8_0.
    Q8_0,
}

impl KvType {
    /// Name as GGUF spells it.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "F32",
            KvType::F16 => "F16",
            KvType::BF16 => "BF16",
            KvType::Q8_0 => "Q8_0",
        }
    }

    /// Bytes of one number; 1 for Q8_0, whose scales come on top.
    pub(crate) fn size(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 | KvType::BF16 => 2,
            KvType::Q8_0 => 1,
        }
    }
}

/// Shapes and types of the cells of a page. Two pages of equal layout can exchange cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Key/value heads.
    pub n_head_kv: usize,
    /// Dimensions of a key.
    pub head_dim_k: usize,
    /// Dimensions of a value.
    pub head_dim_v: usize,
    /// Type of keys.
    pub ty_k: KvType,
    /// Type of values.
    pub ty_v: KvType,
}

impl PageLayout {
    /// Bytes of a page: `PAGE_CELLS` cells of all kv heads.
    pub fn page_bytes(&self) -> usize {
        self.n_head_kv * self.head_bytes()
    }

    /// Bytes of one kv head in a page.
    pub(crate) fn head_bytes(&self) -> usize {
        self.k_bytes() + self.v_bytes()
    }

    /// Bytes of one kv head's keys in a page.
    pub(crate) fn k_bytes(&self) -> usize {
        match self.ty_k {
            KvType::Q8_0 => 2 * self.head_dim_k.div_ceil(BLOCK) * K_BLOCK_BYTES,
            ty => PAGE_CELLS * self.head_dim_k * ty.size(),
        }
    }

    /// Bytes of one kv head's values in a page.
    pub(crate) fn v_bytes(&self) -> usize {
        match self.ty_v {
            KvType::Q8_0 => self.head_dim_v.div_ceil(BLOCK) * V_BLOCK_BYTES,
            ty => PAGE_CELLS * self.dim_v_padded() * ty.size(),
        }
    }

    /// Dimensions of a value as stored: whole vectors of 16, whole blocks in Q8_0.
    pub(crate) fn dim_v_padded(&self) -> usize {
        match self.ty_v {
            KvType::Q8_0 => self.head_dim_v.next_multiple_of(BLOCK),
            _ => self.head_dim_v.next_multiple_of(16),
        }
    }

    /// Byte of dimension `i` of `cell`'s key, counted from the head's keys.
    pub(crate) fn k_at(&self, cell: usize, i: usize) -> usize {
        let (half, lane) = (cell / HALF_CELLS, cell % HALF_CELLS);
        match self.ty_k {
            KvType::Q8_0 => {
                let block = half * self.head_dim_k.div_ceil(BLOCK) + i / BLOCK;
                block * K_BLOCK_BYTES + (i % BLOCK) / 4 * (4 * HALF_CELLS) + lane * 4 + i % 4
            }
            ty => ((half * self.head_dim_k + i) * HALF_CELLS + lane) * ty.size(),
        }
    }

    /// Byte of the scale of `cell`'s key dimensions `i..`, `i` a multiple of 32; Q8_0 only.
    pub(crate) fn k_scale_at(&self, cell: usize, i: usize) -> usize {
        let (half, lane) = (cell / HALF_CELLS, cell % HALF_CELLS);
        let block = half * self.head_dim_k.div_ceil(BLOCK) + i / BLOCK;
        block * K_BLOCK_BYTES + HALF_CELLS * BLOCK + lane * 2
    }

    /// Byte of dimension `i` of `cell`'s value, counted from the head's values.
    pub(crate) fn v_at(&self, cell: usize, i: usize) -> usize {
        let (chunk, lane) = (i / BLOCK, i % BLOCK);
        match self.ty_v {
            KvType::Q8_0 => chunk * V_BLOCK_BYTES + cell / 4 * (4 * BLOCK) + lane * 4 + cell % 4,
            ty => {
                let width = BLOCK.min(self.dim_v_padded() - chunk * BLOCK);
                (chunk * BLOCK * PAGE_CELLS + cell * width + lane) * ty.size()
            }
        }
    }

    /// Byte of the scale of `cell`'s value dimensions `i..`, `i` a multiple of 32; Q8_0 only.
    pub(crate) fn v_scale_at(&self, cell: usize, i: usize) -> usize {
        i / BLOCK * V_BLOCK_BYTES + PAGE_CELLS * BLOCK + cell * 2
    }

    /// Writes cells `cell..cell + n` from `k` `[n, n_head_kv, head_dim_k]` and `v`
    /// `[n, n_head_kv, head_dim_v]`.
    ///
    /// # Panics
    /// If a length differs or the cells pass the end of the page.
    pub fn write(&self, page: &mut [u8], cell: usize, n: usize, k: &[f32], v: &[f32]) {
        let (width_k, width_v) = (
            self.n_head_kv * self.head_dim_k,
            self.n_head_kv * self.head_dim_v,
        );
        assert_eq!(page.len(), self.page_bytes(), "write: bytes of the page");
        assert!(
            cell <= PAGE_CELLS && n <= PAGE_CELLS - cell,
            "write: cells {cell}..{cell}+{n} of a page of {PAGE_CELLS}"
        );
        assert_eq!(k.len(), n * width_k, "write: numbers in k");
        assert_eq!(v.len(), n * width_v, "write: numbers in v");
        for head in 0..self.n_head_kv {
            let bytes = &mut page[head * self.head_bytes()..][..self.head_bytes()];
            let (keys, values) = bytes.split_at_mut(self.k_bytes());
            for c in 0..n {
                let row = &k[c * width_k + head * self.head_dim_k..][..self.head_dim_k];
                store(
                    self.ty_k,
                    row,
                    keys,
                    |i| self.k_at(cell + c, i),
                    |i| self.k_scale_at(cell + c, i),
                    // Keys are stored plus 128: the byte dot product multiplies an unsigned by a
                    // signed operand, and queries keep the sign.
                    128,
                );
                let row = &v[c * width_v + head * self.head_dim_v..][..self.head_dim_v];
                store(
                    self.ty_v,
                    row,
                    values,
                    |i| self.v_at(cell + c, i),
                    |i| self.v_scale_at(cell + c, i),
                    0,
                );
            }
        }
    }

    /// Reads one cell as stored into `k` `[n_head_kv, head_dim_k]` and `v`
    /// `[n_head_kv, head_dim_v]`.
    ///
    /// # Panics
    /// If a length differs or `cell` is not of the page.
    pub fn read(&self, page: &[u8], cell: usize, k: &mut [f32], v: &mut [f32]) {
        assert_eq!(page.len(), self.page_bytes(), "read: bytes of the page");
        assert!(
            cell < PAGE_CELLS,
            "read: cell {cell} of a page of {PAGE_CELLS}"
        );
        assert_eq!(
            k.len(),
            self.n_head_kv * self.head_dim_k,
            "read: numbers in k"
        );
        assert_eq!(
            v.len(),
            self.n_head_kv * self.head_dim_v,
            "read: numbers in v"
        );
        for head in 0..self.n_head_kv {
            let k = &mut k[head * self.head_dim_k..][..self.head_dim_k];
            let v = &mut v[head * self.head_dim_v..][..self.head_dim_v];
            self.read_head(page, head, cell, k, v);
        }
    }

    /// One kv head of [`PageLayout::read`].
    pub(crate) fn read_head(
        &self,
        page: &[u8],
        head: usize,
        cell: usize,
        k: &mut [f32],
        v: &mut [f32],
    ) {
        let bytes = &page[head * self.head_bytes()..][..self.head_bytes()];
        let (keys, values) = bytes.split_at(self.k_bytes());
        load(
            self.ty_k,
            keys,
            k,
            |i| self.k_at(cell, i),
            |i| self.k_scale_at(cell, i),
            128,
        );
        load(
            self.ty_v,
            values,
            v,
            |i| self.v_at(cell, i),
            |i| self.v_scale_at(cell, i),
            0,
        );
    }

    /// Copies a cell byte for byte: moving cells never quantises them again.
    ///
    /// # Panics
    /// If a page is not of this layout or a cell not of its page.
    pub fn copy_cell(&self, src: &[u8], src_cell: usize, dst: &mut [u8], dst_cell: usize) {
        let n = self.page_bytes();
        assert!(
            src.len() == n && dst.len() == n,
            "copy_cell: pages of {} and {} bytes, expected {n}",
            src.len(),
            dst.len()
        );
        assert!(
            src_cell < PAGE_CELLS && dst_cell < PAGE_CELLS,
            "copy_cell: cells {src_cell} and {dst_cell} of a page of {PAGE_CELLS}"
        );
        for head in 0..self.n_head_kv {
            let keys = head * self.head_bytes();
            let values = keys + self.k_bytes();
            let size = self.ty_k.size();
            for i in 0..self.head_dim_k {
                let (from, to) = (self.k_at(src_cell, i), self.k_at(dst_cell, i));
                dst[keys + to..][..size].copy_from_slice(&src[keys + from..][..size]);
            }
            let size = self.ty_v.size();
            for i in 0..self.head_dim_v {
                let (from, to) = (self.v_at(src_cell, i), self.v_at(dst_cell, i));
                dst[values + to..][..size].copy_from_slice(&src[values + from..][..size]);
            }
            if self.ty_k == KvType::Q8_0 {
                for i in (0..self.head_dim_k).step_by(BLOCK) {
                    let (from, to) = (self.k_scale_at(src_cell, i), self.k_scale_at(dst_cell, i));
                    dst[keys + to..][..2].copy_from_slice(&src[keys + from..][..2]);
                }
            }
            if self.ty_v == KvType::Q8_0 {
                for i in (0..self.head_dim_v).step_by(BLOCK) {
                    let (from, to) = (self.v_scale_at(src_cell, i), self.v_scale_at(dst_cell, i));
                    dst[values + to..][..2].copy_from_slice(&src[values + from..][..2]);
                }
            }
        }
    }
}

/// Scatters one row to the bytes `at(dimension)`; `bias` is added to 8-bit numbers.
fn store(
    ty: KvType,
    row: &[f32],
    bytes: &mut [u8],
    at: impl Fn(usize) -> usize,
    scale_at: impl Fn(usize) -> usize,
    bias: u8,
) {
    for (b, block) in row.chunks(BLOCK).enumerate() {
        let first = b * BLOCK;
        match ty {
            KvType::F32 => {
                for (i, x) in block.iter().enumerate() {
                    bytes[at(first + i)..][..4].copy_from_slice(&x.to_le_bytes());
                }
            }
            KvType::F16 => {
                let mut narrow = [f16::ZERO; BLOCK];
                narrow[..block.len()].convert_from_f32_slice(block);
                for (i, x) in narrow[..block.len()].iter().enumerate() {
                    bytes[at(first + i)..][..2].copy_from_slice(&x.to_le_bytes());
                }
            }
            KvType::BF16 => {
                for (i, x) in block.iter().enumerate() {
                    bytes[at(first + i)..][..2].copy_from_slice(&bf16::from_f32(*x).to_le_bytes());
                }
            }
            KvType::Q8_0 => {
                let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
                let scale = largest / 127.0;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                bytes[scale_at(first)..][..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                for (i, x) in block.iter().enumerate() {
                    let quant = (x * inverse).round() as i8;
                    bytes[at(first + i)] = (quant as u8).wrapping_add(bias);
                }
            }
        }
    }
}

/// The inverse of [`store`].
fn load(
    ty: KvType,
    bytes: &[u8],
    row: &mut [f32],
    at: impl Fn(usize) -> usize,
    scale_at: impl Fn(usize) -> usize,
    bias: u8,
) {
    let two = |at: usize| [bytes[at], bytes[at + 1]];
    for (i, x) in row.iter_mut().enumerate() {
        let at = at(i);
        *x = match ty {
            KvType::F32 => {
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
            KvType::F16 => f16::from_le_bytes(two(at)).to_f32(),
            KvType::BF16 => bf16::from_le_bytes(two(at)).to_f32(),
            KvType::Q8_0 => {
                let scale = f16::from_le_bytes(two(scale_at(i / BLOCK * BLOCK))).to_f32();
                scale * f32::from(bytes[at].wrapping_sub(bias) as i8)
            }
        };
    }
}
