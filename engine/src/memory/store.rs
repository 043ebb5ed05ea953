//! Where keys and values live: pages of 64 cells, per layer, shared between forks until written.
//!
//! Two regions. *Kept* cells (sinks, node slots) are an append-only sequence numbered from 0.
//! *Raw* cells are numbered from 0 as they come and are freed from the front; a page goes back
//! to the allocator as soon as its last cell is freed. A cell's key carries its rotation, hence
//! its position, with it: the number of a cell says nothing about the position. Beside a raw cell
//! may stand its gates, which a recurrent memory needs when it takes the cell in.
//!
//! A layer's pages lie where the layer runs; this file only keeps the books.

use crate::error::Result;
use crate::ops::{Device, Ops, Page};
use crate::session::{Decoder, Encoder};
use mneme_kernels::attend::{KvType, PAGE_CELLS, PageLayout};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

/// Cells of one layer.
#[derive(Clone)]
struct LayerCells {
    /// Where the layer runs.
    device: Device,
    kept: Vec<Arc<Page>>,
    raw: VecDeque<Arc<Page>>,
    /// Gates of the raw cells, page by page beside `raw`; none in layers without.
    gates: VecDeque<Arc<Page>>,
    /// Whether this layer keeps gates.
    has_gates: bool,
    /// Number of the first raw cell still held; everything below is freed.
    raw_begin: u64,
}

impl LayerCells {
    /// No cells yet.
    fn new(device: Device, has_gates: bool) -> LayerCells {
        LayerCells {
            device,
            kept: Vec::new(),
            raw: VecDeque::new(),
            gates: VecDeque::new(),
            has_gates,
            raw_begin: 0,
        }
    }

    /// Number of cell 0 of `raw[0]`: pages stay aligned to multiples of 64.
    fn raw_base(&self) -> u64 {
        self.raw_begin / PAGE_CELLS as u64 * PAGE_CELLS as u64
    }

    /// Index of the page of raw cell `at`.
    fn raw_page(&self, at: u64) -> usize {
        ((at - self.raw_base()) / PAGE_CELLS as u64) as usize
    }
}

/// The cells of one sequence in all layers. `clone` shares pages; a shared page is copied by
/// whoever writes to it first.
#[derive(Clone)]
pub struct Store {
    layout: PageLayout,
    /// Gates beside a raw cell: write strengths where keys would be, log decays as values.
    gates: Option<PageLayout>,
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

/// Which of a cell's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Keys and values.
    Cells,
    /// Gates.
    Gates,
}

/// A new order of the kept cells, and the pages it takes; see [`Store::rearrangement`].
pub struct Rearrangement {
    order: Vec<usize>,
    /// Pages at the front that stay as they are.
    keep_pages: usize,
    /// The other pages, of each layer.
    fresh: Vec<Vec<Page>>,
}

/// What `attend` reads of one layer on the host.
pub struct View<'a> {
    /// Kept pages, cell i in page i / 64.
    pub kept: Vec<&'a [u8]>,
    /// Raw pages.
    pub raw: Vec<&'a [u8]>,
    /// Number of cell 0 of `raw[0]`.
    pub raw_base: u64,
}

impl Store {
    /// An empty store of a layer on each of `devices`.
    pub fn new(layout: PageLayout, devices: impl Iterator<Item = Device>) -> Store {
        let layer = |device| LayerCells::new(device, false);
        Store {
            layout,
            gates: None,
            layers: devices.map(layer).collect(),
            n_kept: 0,
            raw_end: 0,
            hold: false,
        }
    }

    /// Keeps `n_head` write strengths and log decays beside every raw cell of the layers for which
    /// `layer` is true. The store is empty.
    pub fn keep_gates(&mut self, n_head: usize, layer: impl Fn(usize) -> bool) {
        self.gates = Some(PageLayout {
            n_head_kv: 1,
            head_dim_k: n_head,
            head_dim_v: n_head,
            ty_k: KvType::F32,
            ty_v: KvType::F32,
        });
        for (i, cells) in self.layers.iter_mut().enumerate() {
            cells.has_gates = layer(i);
        }
    }

    /// Forgets every cell.
    pub fn clear(&mut self) {
        for cells in &mut self.layers {
            *cells = LayerCells::new(cells.device.clone(), cells.has_gates);
        }
        (self.n_kept, self.raw_end, self.hold) = (0, 0, false);
    }

    /// Layout of the pages of gates, where there are any.
    pub fn gates_layout(&self) -> Option<&PageLayout> {
        self.gates.as_ref()
    }

    fn gate_bytes(&self) -> usize {
        self.gates.map_or(0, |gates| gates.page_bytes())
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

    /// Bytes of the pages of keys and values held, pages shared with a fork included.
    pub fn bytes(&self) -> usize {
        let pages: usize = self.layers.iter().map(|l| l.kept.len() + l.raw.len()).sum();
        pages * self.layout.page_bytes()
    }

    /// Bytes of the pages of gates held.
    pub fn bytes_of_gates(&self) -> usize {
        let pages: usize = self.layers.iter().map(|l| l.gates.len()).sum();
        pages * self.gate_bytes()
    }

    /// Bytes of the pages held in a card's memory, those of gates included.
    pub fn card_bytes(&self) -> usize {
        let there = self.layers.iter().filter(|l| !l.device.is_host());
        let bytes = |l: &LayerCells| {
            (l.kept.len() + l.raw.len()) * self.layout.page_bytes()
                + l.gates.len() * self.gate_bytes()
        };
        there.map(bytes).sum()
    }

    /// Upper bound on [`Store::bytes_of_gates`] after one more cell.
    pub fn gates_bound(&self) -> usize {
        let layers = self.layers.iter().filter(|l| l.has_gates);
        let pages: usize = layers.map(|l| l.gates.len() + 1).sum();
        pages * self.gate_bytes()
    }

    /// Never free a cell from now on (visibility does not change): the mask that dropping is
    /// tested against.
    pub fn hold_all(&mut self) {
        self.hold = true;
    }

    /// Allocates pages for `n_kept` and `n_raw` new cells in every layer and makes those that will
    /// be written this store's own. On an error nothing has changed.
    pub fn reserve(&mut self, n_kept: usize, n_raw: usize) -> Result<()> {
        let result = self.try_reserve(n_kept, n_raw);
        if result.is_err() {
            self.trim();
        }
        result
    }

    /// Returns what [`Store::reserve`] allocated when the pass is not run after all.
    pub fn unreserve(&mut self) {
        self.trim();
    }

    fn try_reserve(&mut self, n_kept: usize, n_raw: usize) -> Result<()> {
        let page_of = |at: u64| (at / PAGE_CELLS as u64) as usize;
        for cells in &mut self.layers {
            if n_kept > 0 {
                let (first, last) = (self.n_kept, self.n_kept + n_kept - 1);
                let last = page_of(last as u64);
                while cells.kept.len() <= last {
                    let page = cells.device.page(&self.layout)?;
                    cells.kept.push(Arc::new(page));
                }
                let pages = &mut cells.kept[page_of(first as u64)..=last];
                pages.iter_mut().try_for_each(own)?;
            }
            if n_raw > 0 {
                let first = cells.raw_page(self.raw_end);
                let last = cells.raw_page(self.raw_end + n_raw as u64 - 1);
                while cells.raw.len() <= last {
                    let page = cells.device.page(&self.layout)?;
                    cells.raw.push_back(Arc::new(page));
                }
                cells.raw.range_mut(first..=last).try_for_each(own)?;
                if let (Some(layout), true) = (&self.gates, cells.has_gates) {
                    while cells.gates.len() <= last {
                        let page = cells.device.page(layout)?;
                        cells.gates.push_back(Arc::new(page));
                    }
                    cells.gates.range_mut(first..=last).try_for_each(own)?;
                }
            }
        }
        Ok(())
    }

    /// Number of a new entry's cell in its region.
    fn number(&self, cell: Cell) -> u64 {
        match cell {
            Cell::Kept(c) => (self.n_kept + c) as u64,
            Cell::Raw(c) => self.raw_end + c as u64,
        }
    }

    /// Page and place in the page of a new entry's cell, once reserved, or of its gates.
    pub fn place(&self, layer: usize, cell: Cell, region: Region) -> Option<(&Page, usize)> {
        let cells = &self.layers[layer];
        let at = self.number(cell);
        let page = match (cell, region) {
            (Cell::Kept(_), Region::Gates) => return None,
            (Cell::Kept(_), Region::Cells) => &cells.kept[(at / PAGE_CELLS as u64) as usize],
            (Cell::Raw(_), Region::Cells) => &cells.raw[cells.raw_page(at)],
            (Cell::Raw(_), Region::Gates) => cells.gates.get(cells.raw_page(at))?,
        };
        Some((page, (at % PAGE_CELLS as u64) as usize))
    }

    /// Page and place in the page of raw cell `at`, or of its gates.
    ///
    /// # Panics
    /// When the cell is freed or was never reserved.
    pub fn raw_place(&self, layer: usize, at: u64, region: Region) -> Option<(&Page, usize)> {
        let cells = &self.layers[layer];
        assert!(at >= cells.raw_begin, "raw cell {at} is freed");
        let pages = match region {
            Region::Cells => &cells.raw,
            Region::Gates if !cells.has_gates => return None,
            Region::Gates => &cells.gates,
        };
        let page = &pages[cells.raw_page(at)];
        Some((page, (at % PAGE_CELLS as u64) as usize))
    }

    /// Writes keys and values `[n, n_head_kv, head_dim]` of new entries of one layer, or their
    /// gates, to pages of the host that [`Store::reserve`] has made. The cells count only once
    /// [`Store::commit`] has been called; until then writing again overwrites.
    pub fn write(&mut self, layer: usize, cells: &[Cell], region: Region, k: &[f32], v: &[f32]) {
        let layout = match region {
            Region::Cells => self.layout,
            Region::Gates => self.gates.expect("the memory keeps gates"),
        };
        let row = layout.n_head_kv * layout.head_dim_k;
        let mut i = 0;
        while i < cells.len() {
            // A run of entries that land side by side in one page is written at once.
            let kept = matches!(cells[i], Cell::Kept(_));
            let at = self.number(cells[i]);
            let in_page = (at % PAGE_CELLS as u64) as usize;
            let mut n = 1;
            while i + n < cells.len()
                && in_page + n < PAGE_CELLS
                && matches!(cells[i + n], Cell::Kept(_)) == kept
                && self.number(cells[i + n]) == at + n as u64
            {
                n += 1;
            }
            let cells_of = &mut self.layers[layer];
            let page = match (kept, region) {
                (true, Region::Cells) => {
                    Some(&mut cells_of.kept[(at / PAGE_CELLS as u64) as usize])
                }
                (true, Region::Gates) => None,
                (false, _) => {
                    let index = cells_of.raw_page(at);
                    Some(match region {
                        Region::Cells => &mut cells_of.raw[index],
                        Region::Gates => &mut cells_of.gates[index],
                    })
                }
            };
            if let Some(page) = page {
                let rows = i * row..(i + n) * row;
                let page = reserved(page).host_mut();
                layout.write(page, in_page, n, &k[rows.clone()], &v[rows]);
            }
            i += n;
        }
    }

    /// Kept and raw pages of one layer, and the number of cell 0 of the first raw page.
    pub fn pages(
        &self,
        layer: usize,
    ) -> (
        impl Iterator<Item = &Page>,
        impl Iterator<Item = &Page>,
        u64,
    ) {
        let cells = &self.layers[layer];
        let kept = cells.kept.iter().map(|page| &**page);
        let raw = cells.raw.iter().map(|page| &**page);
        (kept, raw, cells.raw_base())
    }

    /// The pages of one layer, written but uncommitted cells included.
    pub fn view(&self, layer: usize) -> View<'_> {
        let cells = &self.layers[layer];
        View {
            kept: cells.kept.iter().map(|p| p.host()).collect(),
            raw: cells.raw.iter().map(|p| p.host()).collect(),
            raw_base: cells.raw_base(),
        }
    }

    /// Key and value rows of raw cell `at` of one layer, dequantised, or its gates, from pages of
    /// the host.
    ///
    /// # Panics
    /// When the cell is freed or was never written.
    pub fn read_raw(&self, layer: usize, at: u64, region: Region, k: &mut [f32], v: &mut [f32]) {
        let layout = match region {
            Region::Cells => self.layout,
            Region::Gates => self.gates.expect("the memory keeps gates"),
        };
        let place = self.raw_place(layer, at, region);
        let (page, in_page) = place.expect("the layer keeps gates");
        layout.read(page.host(), in_page, k, v);
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
            cells.gates.drain(..pages.min(cells.gates.len()));
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

    /// Forgets the newest kept cells and every raw cell; the next raw cell is number `raw_end`. The
    /// numbers of raw cells decide in which order attention adds them up: going back to a number
    /// gives the bits of never having gone on.
    pub fn rewind(&mut self, n_kept: usize, raw_end: u64) {
        assert!(n_kept <= self.n_kept && raw_end <= self.raw_end);
        for cells in &mut self.layers {
            cells.raw.clear();
            cells.gates.clear();
            cells.raw_begin = raw_end;
        }
        self.n_kept = n_kept;
        self.raw_end = raw_end;
        self.trim();
    }

    /// First raw cell that each of the layers marked still holds; 0 if none is marked.
    pub fn first_raw(&self, marked: &[bool]) -> u64 {
        let layers = self.layers.iter().zip(marked).filter(|(_, m)| **m);
        layers.map(|(l, _)| l.raw_begin).max().unwrap_or(0)
    }

    /// First raw cell that every layer still holds.
    pub fn raw_begin(&self) -> u64 {
        self.layers.iter().map(|l| l.raw_begin).max().unwrap_or(0)
    }

    /// Allocates what [`Store::rearrange_kept`] needs for `order`.
    pub fn rearrangement(&self, order: Vec<usize>) -> Result<Rearrangement> {
        let moved = order.iter().enumerate().position(|(new, &old)| new != old);
        let keep_pages = moved.unwrap_or(order.len()) / PAGE_CELLS;
        let n_fresh = order.len().div_ceil(PAGE_CELLS) - keep_pages;
        let mut fresh = Vec::with_capacity(self.layers.len());
        for cells in &self.layers {
            let page = |_| cells.device.page(&self.layout);
            fresh.push((0..n_fresh).map(page).collect::<Result<Vec<_>>>()?);
        }
        Ok(Rearrangement {
            order,
            keep_pages,
            fresh,
        })
    }

    /// Rebuilds the kept region from the cells that the order lists (old numbers), in that order.
    pub fn rearrange_kept(&mut self, ops: &dyn Ops, to: Rearrangement) {
        let moves: Vec<(usize, usize)> = to.order[to.keep_pages * PAGE_CELLS..]
            .iter()
            .enumerate()
            .map(|(new, &old)| (old, new))
            .collect();
        let layout = self.layout;
        let layers = self.layers.iter_mut().zip(to.fresh);
        for (il, (cells, mut fresh)) in layers.enumerate() {
            let from: Vec<&Page> = cells.kept.iter().map(|page| &**page).collect();
            let ops = ops.of_layer(il);
            ops.copy_cells(&layout, &from, &mut fresh, &moves);
            cells.kept.truncate(to.keep_pages);
            cells.kept.extend(fresh.into_iter().map(Arc::new));
        }
        self.n_kept = to.order.len();
    }

    /// Returns pages past the last committed cell.
    fn trim(&mut self) {
        let kept_pages = self.n_kept.div_ceil(PAGE_CELLS);
        for cells in &mut self.layers {
            cells.kept.truncate(kept_pages);
            let raw_pages = (self.raw_end - cells.raw_base()).div_ceil(PAGE_CELLS as u64);
            cells.raw.truncate(raw_pages as usize);
            cells.gates.truncate(raw_pages as usize);
        }
    }

    /// Writes all cells.
    pub fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        out.u64(self.n_kept as u64)?;
        out.u64(self.raw_end)?;
        let mut bytes = vec![0; self.layout.page_bytes()];
        for cells in &self.layers {
            out.u64(cells.raw_begin)?;
            for page in cells.kept.iter().chain(&cells.raw) {
                page.read(&mut bytes).map_err(io::Error::other)?;
                out.bytes(&bytes)?;
            }
        }
        Ok(())
    }

    /// Reads what [`Store::save`] wrote into an empty store of the same shape. `n_ctx` bounds the
    /// number of cells believed.
    pub fn restore(&mut self, from: &mut Decoder<'_>, n_ctx: usize) -> io::Result<()> {
        let n_kept = from.u64()?;
        let raw_end = from.u64()?;
        let mut bytes = vec![0; self.layout.page_bytes()];
        let mut read = |from: &mut Decoder<'_>, device: &Device| -> io::Result<Arc<Page>> {
            from.bytes_into(&mut bytes)?;
            let mut page = device.page(&self.layout).map_err(io::Error::other)?;
            page.write(&bytes).map_err(io::Error::other)?;
            Ok(Arc::new(page))
        };
        let mut layers = Vec::with_capacity(self.layers.len());
        for old in &self.layers {
            let raw_begin = from.u64()?;
            let held = raw_end
                .checked_sub(raw_begin)
                .and_then(|n| n.checked_add(n_kept));
            if held.is_none_or(|n| n > n_ctx as u64) {
                return Err(io::Error::other(format!(
                    "{n_kept} kept and {raw_begin}..{raw_end} raw cells do not fit a context of {n_ctx}"
                )));
            }
            let device = &old.device;
            let mut cells = LayerCells::new(device.clone(), old.has_gates);
            cells.raw_begin = raw_begin;
            for _ in 0..n_kept.div_ceil(PAGE_CELLS as u64) {
                cells.kept.push(read(from, device)?);
            }
            for _ in 0..(raw_end - cells.raw_base()).div_ceil(PAGE_CELLS as u64) {
                cells.raw.push_back(read(from, device)?);
                if let (Some(layout), true) = (&self.gates, cells.has_gates) {
                    let page = device.page(layout).map_err(io::Error::other)?;
                    cells.gates.push_back(Arc::new(page));
                }
            }
            layers.push(cells);
        }
        self.layers = layers;
        self.n_kept = n_kept as usize;
        self.raw_end = raw_end;
        Ok(())
    }

    /// Gates `[n, 2, n_head]` of the raw cells from `begin` on of one layer.
    pub fn save_gates(&self, layer: usize, begin: u64, out: &mut Encoder<'_>) -> io::Result<()> {
        let layout = self.gates.expect("the memory keeps gates");
        let n = layout.head_dim_k;
        let cells = &self.layers[layer];
        let mut bytes = vec![0; layout.page_bytes()];
        let mut gates = vec![0.0; (self.raw_end - begin) as usize * 2 * n];
        let mut held = None;
        for (cell, gates) in (begin..self.raw_end).zip(gates.chunks_exact_mut(2 * n)) {
            let index = cells.raw_page(cell);
            if held != Some(index) {
                cells.gates[index]
                    .read(&mut bytes)
                    .map_err(io::Error::other)?;
                held = Some(index);
            }
            let (beta, g) = gates.split_at_mut(n);
            layout.read(&bytes, (cell % PAGE_CELLS as u64) as usize, beta, g);
        }
        out.f32s(&gates)
    }

    /// Reads what [`Store::save_gates`] wrote, once the cells are restored.
    pub fn restore_gates(
        &mut self,
        layer: usize,
        begin: u64,
        from: &mut Decoder<'_>,
    ) -> io::Result<()> {
        let layout = self.gates.expect("the memory keeps gates");
        let n = layout.head_dim_k;
        let cells = &mut self.layers[layer];
        let mut gates = vec![0.0; (self.raw_end - begin) as usize * 2 * n];
        from.f32s_into(&mut gates)?;
        let base = cells.raw_base();
        let mut bytes = vec![0; layout.page_bytes()];
        for (index, page) in cells.gates.iter_mut().enumerate() {
            let first = base + (index * PAGE_CELLS) as u64;
            let last = (first + PAGE_CELLS as u64).min(self.raw_end);
            for cell in first.max(begin)..last {
                let at = (cell - begin) as usize * 2 * n;
                let (beta, g) = gates[at..at + 2 * n].split_at(n);
                layout.write(&mut bytes, (cell - first) as usize, 1, beta, g);
            }
            reserved(page).write(&bytes).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// Makes a page this store's own, copying it if another shares it.
fn own(page: &mut Arc<Page>) -> Result<()> {
    if Arc::get_mut(page).is_none() {
        *page = Arc::new(page.copy()?);
    }
    Ok(())
}

/// A page that [`Store::reserve`] has made this store's own.
fn reserved(page: &mut Arc<Page>) -> &mut Page {
    Arc::get_mut(page).expect("pages are reserved before they are written")
}
