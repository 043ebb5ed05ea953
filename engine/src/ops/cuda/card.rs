//! A graphics card's memory: buffers of numbers, and pools of pages of cells.

use crate::error::{Error, Result};
use mneme_kernels::attend::PageLayout;
use mneme_kernels::cuda::{self, attend};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Bytes a pool of pages begins with.
const POOL_BYTES: usize = 4 << 20;

/// An opened card and the pools of pages on it.
pub struct Card {
    pub(super) dev: cuda::Device,
    pools: Mutex<Vec<Weak<Pool>>>,
    /// Goes up when a buffer or a pool moves: what was recorded before holds old addresses.
    epoch: AtomicU64,
    next_id: AtomicU64,
    pub(super) replays: AtomicU64,
}

/// F32 numbers on a card.
pub struct CardBuffer {
    card: Arc<Card>,
    mem: cuda::Buffer<f32>,
    len: usize,
    /// Tells buffers apart: two of equal id lie at the same address.
    pub(super) id: u64,
}

/// Pages of one layout, in one piece of memory that grows.
pub struct Pool {
    card: Arc<Card>,
    layout: PageLayout,
    page_bytes: usize,
    pages: Mutex<Pages>,
}

struct Pages {
    mem: cuda::Buffer<u8>,
    n: usize,
    free: Vec<u32>,
}

/// A page of a pool; returned to it when dropped.
pub struct CardPage {
    pub(super) pool: Arc<Pool>,
    pub(super) number: u32,
}

/// The lock's content, whatever happened to the thread that held it last.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Card {
    /// Opens card `n`.
    pub fn open(n: usize) -> Result<Arc<Card>> {
        let dev = cuda::Device::open(n).map_err(|source| Error::Device {
            what: format!("device cuda:{n}"),
            source,
        })?;
        Ok(Arc::new(Card {
            dev,
            pools: Mutex::default(),
            epoch: AtomicU64::new(0),
            next_id: AtomicU64::new(0),
            replays: AtomicU64::new(0),
        }))
    }

    /// Passes that were one launch of a recording.
    pub fn n_replays(&self) -> u64 {
        self.replays.load(Ordering::Relaxed)
    }

    /// An error in what was being done.
    pub(super) fn error(&self, what: impl Into<String>, source: cuda::Error) -> Error {
        Error::Device {
            what: format!("{}: {}", self.dev.name(), what.into()),
            source,
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Notes that something lies elsewhere now.
    pub fn moved(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// Room for `n` numbers.
    pub fn buffer(self: &Arc<Card>, n: usize) -> Result<CardBuffer> {
        let mem = self.dev.alloc(n);
        Ok(CardBuffer {
            card: Arc::clone(self),
            mem: mem.map_err(|e| self.error(format!("a buffer of {n} numbers"), e))?,
            len: n,
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// The pool of pages of `layout`; a new one has room for `n` of them.
    pub(super) fn pool(self: &Arc<Card>, layout: &PageLayout, n: usize) -> Result<Arc<Pool>> {
        let mut pools = lock(&self.pools);
        pools.retain(|pool| pool.strong_count() > 0);
        let known = pools.iter().filter_map(Weak::upgrade);
        if let Some(pool) = known.into_iter().find(|pool| pool.layout == *layout) {
            return Ok(pool);
        }
        let page_bytes = attend::page_bytes(layout);
        let n = (POOL_BYTES / page_bytes).max(4).max(n);
        let mem = self.dev.alloc(n * page_bytes);
        let pool = Arc::new(Pool {
            card: Arc::clone(self),
            layout: *layout,
            page_bytes,
            pages: Mutex::new(Pages {
                mem: mem.map_err(|e| self.error(format!("{n} pages of cells"), e))?,
                n,
                free: (0..n as u32).rev().collect(),
            }),
        });
        pools.push(Arc::downgrade(&pool));
        self.moved();
        Ok(pool)
    }

    /// A page of unspecified content.
    pub fn page(self: &Arc<Card>, layout: &PageLayout) -> Result<CardPage> {
        self.pool(layout, 0)?.page()
    }
}

impl CardBuffer {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Numbers there is room for.
    pub fn capacity(&self) -> usize {
        self.mem.len()
    }

    /// Holds `n` numbers from now on.
    ///
    /// # Panics
    /// If there is no room.
    pub fn set_len(&mut self, n: usize) {
        assert!(n <= self.mem.len(), "{n} numbers in {}", self.mem.len());
        self.len = n;
    }

    pub(super) fn view(&self) -> cuda::View<'_, f32> {
        self.mem.slice(0..self.len)
    }

    pub(super) fn view_mut(&mut self) -> cuda::ViewMut<'_, f32> {
        self.mem.slice_mut(0..self.len)
    }

    pub fn read(&self, out: &mut [f32]) -> Result<()> {
        let read = self.card.dev.read(self.view(), out);
        read.map_err(|e| self.card.error("reading results", e))
    }

    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        let card = Arc::clone(&self.card);
        let write = card.dev.write(self.view_mut(), values);
        write.map_err(|e| card.error("sending numbers", e))
    }

    pub fn zero(&mut self) -> Result<()> {
        let card = Arc::clone(&self.card);
        let zero = card.dev.zero(self.view_mut());
        zero.map_err(|e| card.error("clearing a buffer", e))
    }
}

impl Pool {
    fn page(self: &Arc<Pool>) -> Result<CardPage> {
        let mut pages = lock(&self.pages);
        if pages.free.is_empty() {
            self.grow(&mut pages)?;
        }
        let number = pages.free.pop().expect("the pool has grown");
        Ok(CardPage {
            pool: Arc::clone(self),
            number,
        })
    }

    /// Moves the pages to a larger piece of memory: twice as large, or what there is room for.
    fn grow(&self, pages: &mut Pages) -> Result<()> {
        let card = &self.card;
        let error = |e| card.error(format!("{} pages of cells", pages.n + 1), e);
        let sizes = [2 * pages.n, pages.n + pages.n / 4 + 1];
        let larger = |n: usize| Ok((n, card.dev.alloc::<u8>(n * self.page_bytes)?));
        let (n, mut mem) = larger(sizes[0])
            .or_else(|_| larger(sizes[1]))
            .map_err(error)?;
        let used = pages.n * self.page_bytes;
        card.dev
            .copy(pages.mem.all(), mem.slice_mut(0..used))
            .map_err(error)?;
        pages.free.extend((pages.n as u32..n as u32).rev());
        (pages.mem, pages.n) = (mem, n);
        card.moved();
        Ok(())
    }

    /// Runs `f` over the pool's memory.
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut cuda::Buffer<u8>) -> T) -> T {
        f(&mut lock(&self.pages).mem)
    }

    fn range(&self, number: u32) -> std::ops::Range<usize> {
        let start = number as usize * self.page_bytes;
        start..start + self.page_bytes
    }
}

impl CardPage {
    /// A second page of the same content.
    pub fn copy(&self) -> Result<CardPage> {
        let pool = &self.pool;
        let page = pool.page()?;
        let copied = pool.with(|mem| {
            let (low, high) = (self.number.min(page.number), self.number.max(page.number));
            let (first, second) = mem.all_mut().split_at_mut(pool.range(high).start);
            let first = first.slice_mut(pool.range(low));
            let second = second.slice_mut(0..pool.page_bytes);
            let (from, to) = match self.number == low {
                true => (first, second),
                false => (second, first),
            };
            pool.card.dev.copy(from.as_view(), to)
        });
        copied.map_err(|e| pool.card.error("copying a page", e))?;
        Ok(page)
    }

    /// Copies the bytes to the host, in its order.
    pub fn read(&self, out: &mut [u8]) -> Result<()> {
        let pool = &self.pool;
        let mut bytes = vec![0; pool.page_bytes];
        pool.with(|mem| {
            let page = mem.slice(pool.range(self.number));
            pool.card.dev.read(page, &mut bytes)
        })
        .map_err(|e| pool.card.error("reading a page", e))?;
        attend::page_to_host(&pool.layout, &bytes, out);
        Ok(())
    }

    /// Replaces the bytes by the host's.
    pub fn write(&mut self, from: &[u8]) -> Result<()> {
        let pool = &self.pool;
        let mut bytes = vec![0; pool.page_bytes];
        attend::page_from_host(&pool.layout, from, &mut bytes);
        pool.with(|mem| {
            let page = mem.slice_mut(pool.range(self.number));
            pool.card.dev.write(page, &bytes)
        })
        .map_err(|e| pool.card.error("sending a page", e))
    }
}

impl Drop for CardPage {
    fn drop(&mut self) {
        // Work that still reads the page is before any that the next owner gives.
        lock(&self.pool.pages).free.push(self.number);
    }
}
