//! How a page of cells lies in device memory (`kernels/cuda/cells.cuh` describes it), and its
//! exact exchange with pages of the host.

use crate::attend::{KvType, PAGE_CELLS, PageLayout};

/// Most dimensions of a head.
const MAX_DIM: usize = 256;

/// The kernels' description of a page.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct PageShape {
    n_head_kv: i32,
    dim_k: i32,
    dim_v: i32,
    padded_k: i32,
    padded_v: i32,
    ty_k: i32,
    ty_v: i32,
    k_bytes: i32,
    head_bytes: i32,
    unused: i32,
    page_bytes: u64,
    n_pages: u64,
}

fn type_id(ty: KvType) -> i32 {
    match ty {
        KvType::F32 => 0,
        KvType::F16 => 1,
        KvType::BF16 => 2,
        KvType::Q8_0 => 3,
    }
}

/// Bytes of `n` rows of padded numbers, with their scales.
fn bytes(ty: KvType, n: usize) -> usize {
    n * ty.size() + if ty == KvType::Q8_0 { n / 32 * 2 } else { 0 }
}

/// Bytes of a page on the device.
///
/// # Panics
/// If a head has no or more than 256 dimensions, or there are no heads.
pub fn page_bytes(layout: &PageLayout) -> usize {
    PageShape::new(layout, 0).page_bytes as usize
}

impl PageShape {
    /// For a pool of `pool_bytes`.
    pub(super) fn new(layout: &PageLayout, pool_bytes: usize) -> PageShape {
        let (dim_k, dim_v) = (layout.head_dim_k, layout.head_dim_v);
        assert!(
            layout.n_head_kv > 0
                && (1..=MAX_DIM).contains(&dim_k)
                && (1..=MAX_DIM).contains(&dim_v),
            "{} kv heads of {dim_k} and {dim_v} dimensions; the device takes 1 to {MAX_DIM}",
            layout.n_head_kv
        );
        let (padded_k, padded_v) = (dim_k.next_multiple_of(64), dim_v.next_multiple_of(32));
        let k_bytes = bytes(layout.ty_k, PAGE_CELLS * padded_k).next_multiple_of(16);
        let v_bytes = bytes(layout.ty_v, PAGE_CELLS * padded_v);
        let head_bytes = (k_bytes + v_bytes).next_multiple_of(256);
        let page_bytes = head_bytes * layout.n_head_kv;
        PageShape {
            n_head_kv: layout.n_head_kv as i32,
            dim_k: dim_k as i32,
            dim_v: dim_v as i32,
            padded_k: padded_k as i32,
            padded_v: padded_v as i32,
            ty_k: type_id(layout.ty_k),
            ty_v: type_id(layout.ty_v),
            k_bytes: k_bytes as i32,
            head_bytes: head_bytes as i32,
            unused: 0,
            page_bytes: page_bytes as u64,
            n_pages: (pool_bytes / page_bytes) as u64,
        }
    }

    pub(super) fn padded_k(&self) -> usize {
        self.padded_k as usize
    }

    pub(super) fn padded_v(&self) -> usize {
        self.padded_v as usize
    }

    /// Dimensions of a value that the kernels' registers are laid out for.
    pub(super) fn width(&self) -> usize {
        self.padded_v().next_power_of_two().clamp(64, MAX_DIM)
    }

    fn k_at(&self, size: usize, cell: usize, i: usize) -> usize {
        (cell * self.padded_k() + i) * size
    }

    fn k_scale_at(&self, cell: usize, i: usize) -> usize {
        PAGE_CELLS * self.padded_k() + (cell * (self.padded_k() / 32) + i / 32) * 2
    }

    fn v_at(&self, size: usize, cell: usize, i: usize) -> usize {
        self.k_bytes as usize + (i * PAGE_CELLS + cell) * size
    }

    fn v_scale_at(&self, cell: usize, i: usize) -> usize {
        let scales = self.k_bytes as usize + PAGE_CELLS * self.padded_v();
        scales + (i / 32 * PAGE_CELLS + cell) * 2
    }
}

/// Visits every number (`true`) and scale of a page: where it lies on the host, on the device, its
/// bytes, and what the host adds to it.
fn each(layout: &PageLayout, mut visit: impl FnMut(usize, usize, usize, u8)) {
    let shape = PageShape::new(layout, 0);
    let (size_k, size_v) = (layout.ty_k.size(), layout.ty_v.size());
    // The host keeps 8-bit keys plus 128.
    let bias = if layout.ty_k == KvType::Q8_0 { 128 } else { 0 };
    for head in 0..layout.n_head_kv {
        let keys = head * layout.head_bytes();
        let values = keys + layout.k_bytes();
        let device = head * shape.head_bytes as usize;
        for cell in 0..PAGE_CELLS {
            for i in 0..layout.head_dim_k {
                let to = device + shape.k_at(size_k, cell, i);
                visit(keys + layout.k_at(cell, i), to, size_k, bias);
                if layout.ty_k == KvType::Q8_0 && i % 32 == 0 {
                    let to = device + shape.k_scale_at(cell, i);
                    visit(keys + layout.k_scale_at(cell, i), to, 2, 0);
                }
            }
            for i in 0..layout.head_dim_v {
                let to = device + shape.v_at(size_v, cell, i);
                visit(values + layout.v_at(cell, i), to, size_v, 0);
                if layout.ty_v == KvType::Q8_0 && i % 32 == 0 {
                    let to = device + shape.v_scale_at(cell, i);
                    visit(values + layout.v_scale_at(cell, i), to, 2, 0);
                }
            }
        }
    }
}

fn check(layout: &PageLayout, host: usize, device: usize) {
    assert_eq!(host, layout.page_bytes(), "bytes of the host's page");
    assert_eq!(device, page_bytes(layout), "bytes of the device's page");
}

/// Reorders a page of the host into one of the device. No number changes.
///
/// # Panics
/// If a page has another size.
pub fn page_from_host(layout: &PageLayout, host: &[u8], device: &mut [u8]) {
    check(layout, host.len(), device.len());
    device.fill(0);
    each(layout, |from, to, n, bias| {
        for i in 0..n {
            device[to + i] = host[from + i].wrapping_sub(bias);
        }
    });
}

/// The inverse of [`page_from_host`]; bytes that hold no number become zero.
///
/// # Panics
/// If a page has another size.
pub fn page_to_host(layout: &PageLayout, device: &[u8], host: &mut [u8]) {
    check(layout, host.len(), device.len());
    host.fill(0);
    each(layout, |to, from, n, bias| {
        for i in 0..n {
            host[to + i] = device[from + i].wrapping_add(bias);
        }
    });
}
