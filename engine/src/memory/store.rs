//! Where keys and values live: pages of 64 cells, per layer, shared between forks until written.
//!
//! Two regions. *Kept* cells (sinks, node slots) are an append-only sequence numbered from 0.
//! *Raw* cells are numbered from 0 as they come and are freed from the front; a page goes back
//! to the allocator as soon as its last cell is freed. A cell's key carries its rotation, hence
//! its position, with it: the number of a cell says nothing about the position.

use crate::session::{Decoder, Encoder};
use mneme_kernels::attend::{PAGE_CELLS, PageLayout};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Bytes of all pages alive in this process, shared ones counted once.
pub fn live_page_bytes() -> usize {
    LIVE_BYTES.load(Ordering::Relaxed)
}

/// One page: a 64-byte aligned buffer.
struct Page {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: a page owns its memory alone; shared access is read only, through `Arc`.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(64), 64).expect("a page is far below isize::MAX")
    }

    fn new(len: usize) -> Page {
        let layout = Page::layout(len);
        // SAFETY: the layout has a non-zero size.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        LIVE_BYTES.fetch_add(len, Ordering::Relaxed);
        Page { ptr, len }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `len` initialised bytes while self lives.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl Clone for Page {
    fn clone(&self) -> Page {
        let mut page = Page::new(self.len);
        page.bytes_mut().copy_from_slice(self.bytes());
        page
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.ptr, Page::layout(self.len)) };
        LIVE_BYTES.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// Cells of one layer.
#[derive(Clone, Default)]
struct LayerCells {
    kept: Vec<Arc<Page>>,
    raw: VecDeque<Arc<Page>>,
    /// Number of the first raw cell still held; everything below is freed.
    raw_begin: u64,
}

impl LayerCells {
    /// Number of cell 0 of `raw[0]`: pages stay aligned to multiples of 64.
    fn raw_base(&self) -> u64 {
        self.raw_begin / PAGE_CELLS as u64 * PAGE_CELLS as u64
    }
}

/// The cells of one sequence in all layers. `clone` shares pages; a shared page is copied by
/// whoever writes to it first.
#[derive(Clone)]
pub struct Store {
    layout: PageLayout,
    layers: Vec<LayerCells>,
    n_kept: usize,
    raw_end: u64,
    /// Cells are never freed: what tests compare freeing with. Visibility is unchanged.
    hold: bool,
}

/// Where the cell of one new entry goes, as an offset from the region's end at plan time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// The i-th new kept cell.
    Kept(usize),
    /// The i-th new raw cell.
    Raw(usize),
}

/// What `attend` reads of one layer.
pub struct View<'a> {
    /// Kept pages, cell i in page i / 64.
    pub kept: Vec<&'a [u8]>,
    /// Raw pages.
    pub raw: Vec<&'a [u8]>,
    /// Number of cell 0 of `raw[0]`.
    pub raw_base: u64,
}

impl Store {
    /// An empty store of `n_layer` layers.
    pub fn new(layout: PageLayout, n_layer: usize) -> Store {
        Store {
            layout,
            layers: vec![LayerCells::default(); n_layer],
            n_kept: 0,
            raw_end: 0,
            hold: false,
        }
    }

    /// The page layout, the same in all layers.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Number of layers.
    pub fn n_layer(&self) -> usize {
        self.layers.len()
    }

    /// Kept cells per layer.
    pub fn n_kept(&self) -> usize {
        self.n_kept
    }

    /// Number the next raw cell will get.
    pub fn raw_end(&self) -> u64 {
        self.raw_end
    }

    /// Raw cells still held in the layer that holds most.
    pub fn n_raw(&self) -> usize {
        let begin = self.layers.iter().map(|l| l.raw_begin).min().unwrap_or(0);
        (self.raw_end - begin) as usize
    }

    /// Cells held in the layer that holds most.
    pub fn n_cells(&self) -> usize {
        self.n_kept + self.n_raw()
    }

    /// Bytes of the pages held, pages shared with a fork included.
    pub fn bytes(&self) -> usize {
        let pages: usize = self.layers.iter().map(|l| l.kept.len() + l.raw.len()).sum();
        pages * self.layout.page_bytes()
    }

    /// Never free a cell from now on (visibility does not change): the mask that dropping is
    /// tested against.
    pub fn hold_all(&mut self) {
        self.hold = true;
    }

    /// Writes keys and values `[n, n_head_kv, head_dim]` of new entries of one layer. The cells
    /// count only once [`Store::commit`] has been called; until then writing again overwrites.
    pub fn write(&mut self, layer: usize, cells: &[Cell], k: &[f32], v: &[f32]) {
        let row = self.layout.n_head_kv * self.layout.head_dim_k;
        let (n_kept, raw_end) = (self.n_kept as u64, self.raw_end);
        let cells_of = &mut self.layers[layer];
        let base = cells_of.raw_base();
        let mut i = 0;
        while i < cells.len() {
            // A run of entries that land side by side in one page is written at once.
            let (kept, at) = match cells[i] {
                Cell::Kept(c) => (true, n_kept + c as u64),
                Cell::Raw(c) => (false, raw_end + c as u64),
            };
            let in_page = (at % PAGE_CELLS as u64) as usize;
            let mut n = 1;
            while i + n < cells.len() && in_page + n < PAGE_CELLS {
                let next = match cells[i + n] {
                    Cell::Kept(c) if kept => n_kept + c as u64,
                    Cell::Raw(c) if !kept => raw_end + c as u64,
                    _ => break,
                };
                if next != at + n as u64 {
                    break;
                }
                n += 1;
            }
            let page_bytes = self.layout.page_bytes();
            let page = if kept {
                let index = (at / PAGE_CELLS as u64) as usize;
                while cells_of.kept.len() <= index {
                    cells_of.kept.push(Arc::new(Page::new(page_bytes)));
                }
                &mut cells_of.kept[index]
            } else {
                let index = ((at - base) / PAGE_CELLS as u64) as usize;
                while cells_of.raw.len() <= index {
                    cells_of.raw.push_back(Arc::new(Page::new(page_bytes)));
                }
                &mut cells_of.raw[index]
            };
            self.layout.write(
                Arc::make_mut(page).bytes_mut(),
                in_page,
                n,
                &k[i * row..(i + n) * row],
                &v[i * row..(i + n) * row],
            );
            i += n;
        }
    }

    /// The pages of one layer, written but uncommitted cells included.
    pub fn view(&self, layer: usize) -> View<'_> {
        let cells = &self.layers[layer];
        View {
            kept: cells.kept.iter().map(|p| p.bytes()).collect(),
            raw: cells.raw.iter().map(|p| p.bytes()).collect(),
            raw_base: cells.raw_base(),
        }
    }

    /// Key and value rows of raw cell `at` of one layer, dequantised.
    ///
    /// # Panics
    /// When the cell is freed or was never written.
    pub fn read_raw(&self, layer: usize, at: u64, k: &mut [f32], v: &mut [f32]) {
        let cells = &self.layers[layer];
        assert!(at >= cells.raw_begin, "raw cell {at} is freed");
        let index = ((at - cells.raw_base()) / PAGE_CELLS as u64) as usize;
        let in_page = (at % PAGE_CELLS as u64) as usize;
        self.layout.read(cells.raw[index].bytes(), in_page, k, v);
    }

    /// Makes the first new `n_kept` kept and `n_raw` raw cells part of the store.
    pub fn commit(&mut self, n_kept: usize, n_raw: usize) {
        self.n_kept += n_kept;
        self.raw_end += n_raw as u64;
        self.trim();
    }

    /// Frees raw cells below `begin` in the layers for which `layer` is true.
    pub fn release_raw(&mut self, begin: u64, layer: impl Fn(usize) -> bool) {
        if self.hold {
            return;
        }
        let begin = begin.min(self.raw_end);
        for (i, cells) in self.layers.iter_mut().enumerate() {
            if begin <= cells.raw_begin || !layer(i) {
                continue;
            }
            let pages = (begin / PAGE_CELLS as u64 - cells.raw_base() / PAGE_CELLS as u64) as usize;
            cells.raw.drain(..pages.min(cells.raw.len()));
            cells.raw_begin = begin;
        }
        self.trim();
    }

    /// Forgets the newest cells: `n_kept` and `raw_end` become the given values.
    ///
    /// # Panics
    /// When a cell that must remain is freed already; see [`Store::raw_begin`].
    pub fn truncate(&mut self, n_kept: usize, raw_end: u64) {
        assert!(n_kept <= self.n_kept && raw_end <= self.raw_end);
        assert!(raw_end >= self.raw_begin(), "raw cells are freed");
        self.n_kept = n_kept;
        self.raw_end = raw_end;
        self.trim();
    }

    /// First raw cell that every layer still holds.
    pub fn raw_begin(&self) -> u64 {
        self.layers.iter().map(|l| l.raw_begin).max().unwrap_or(0)
    }

    /// Rebuilds the kept region from the cells `order` lists (old numbers), in that order.
    pub fn rearrange_kept(&mut self, order: &[usize]) {
        let same = order
            .iter()
            .enumerate()
            .position(|(new, &old)| new != old)
            .unwrap_or(order.len());
        let keep_pages = same / PAGE_CELLS;
        for cells in &mut self.layers {
            let mut pages: Vec<Arc<Page>> = cells.kept[..keep_pages].to_vec();
            let mut fresh = Vec::new();
            for (new, &old) in order.iter().enumerate().skip(keep_pages * PAGE_CELLS) {
                if new % PAGE_CELLS == 0 {
                    fresh.push(Page::new(self.layout.page_bytes()));
                }
                let page = fresh.last_mut().expect("a page begins at every 64th cell");
                self.layout.copy_cell(
                    cells.kept[old / PAGE_CELLS].bytes(),
                    old % PAGE_CELLS,
                    page.bytes_mut(),
                    new % PAGE_CELLS,
                );
            }
            pages.extend(fresh.into_iter().map(Arc::new));
            cells.kept = pages;
        }
        self.n_kept = order.len();
    }

    /// Returns pages past the last committed cell.
    fn trim(&mut self) {
        let kept_pages = self.n_kept.div_ceil(PAGE_CELLS);
        for cells in &mut self.layers {
            cells.kept.truncate(kept_pages);
            let raw_pages = (self.raw_end - cells.raw_base()).div_ceil(PAGE_CELLS as u64);
            cells.raw.truncate(raw_pages as usize);
        }
    }

    /// Writes all cells.
    pub fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        out.u64(self.n_kept as u64)?;
        out.u64(self.raw_end)?;
        for cells in &self.layers {
            out.u64(cells.raw_begin)?;
            for page in cells.kept.iter().chain(&cells.raw) {
                out.bytes(page.bytes())?;
            }
        }
        Ok(())
    }

    /// Reads what [`Store::save`] wrote into an empty store of the same shape. `n_ctx` bounds the
    /// number of cells believed.
    pub fn restore(&mut self, from: &mut Decoder<'_>, n_ctx: usize) -> io::Result<()> {
        let n_kept = from.u64()?;
        let raw_end = from.u64()?;
        let page_bytes = self.layout.page_bytes();
        let mut layers = Vec::with_capacity(self.layers.len());
        for _ in 0..self.layers.len() {
            let raw_begin = from.u64()?;
            let held = raw_end
                .checked_sub(raw_begin)
                .and_then(|n| n.checked_add(n_kept));
            if held.is_none_or(|n| n > n_ctx as u64) {
                return Err(io::Error::other(format!(
                    "{n_kept} kept and {raw_begin}..{raw_end} raw cells do not fit a context of {n_ctx}"
                )));
            }
            let mut cells = LayerCells {
                raw_begin,
                ..LayerCells::default()
            };
            for _ in 0..n_kept.div_ceil(PAGE_CELLS as u64) {
                let mut page = Page::new(page_bytes);
                from.bytes_into(page.bytes_mut())?;
                cells.kept.push(Arc::new(page));
            }
            for _ in 0..(raw_end - cells.raw_base()).div_ceil(PAGE_CELLS as u64) {
                let mut page = Page::new(page_bytes);
                from.bytes_into(page.bytes_mut())?;
                cells.raw.push_back(Arc::new(page));
            }
            layers.push(cells);
        }
        self.layers = layers;
        self.n_kept = n_kept as usize;
        self.raw_end = raw_end;
        Ok(())
    }
}
