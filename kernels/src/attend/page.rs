//! Memory of pages: slots of slabs that lie on huge pages, so that reading cells at full bandwidth
//! does not miss the TLB every 4 KiB. A slab goes back to the allocator with its last page.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Bytes and alignment of a slab: one huge page of x86-64 and AArch64 Linux.
const SLAB: usize = 2 << 20;
/// Larger pages are allocated by themselves: a slab would hold few and waste its end.
const LARGEST: usize = SLAB / 8;
/// Alignment of a page.
const LINE: usize = 64;

/// The bytes of a page, aligned to 64.
pub struct Page {
    start: *mut u8,
    len: usize,
}

// SAFETY: a page owns its bytes like a Box<[u8]>.
unsafe impl Send for Page {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Page {}

impl Page {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Page {
        let size = slot(len);
        let start = if size > LARGEST {
            allocate(size, LINE)
        } else {
            slabs(|slabs| slabs.take(size))
        };
        // SAFETY: a slot or an allocation of `size` bytes that nobody else has.
        unsafe { start.write_bytes(0, size) };
        Page { start, len }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let size = slot(self.len);
        if size > LARGEST {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start, layout(size, LINE)) }
        } else {
            slabs(|slabs| slabs.give_back(size, self.start));
        }
    }
}

impl Deref for Page {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: initialised in `zeroed`, alive as long as self.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Page {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `deref`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

/// Bytes a page of `len` takes.
fn slot(len: usize) -> usize {
    len.max(1).next_multiple_of(LINE)
}

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).expect("a page is far below isize::MAX")
}

fn allocate(size: usize, align: usize) -> *mut u8 {
    let layout = layout(size, align);
    // SAFETY: the size is not zero.
    let start = unsafe { alloc(layout) };
    if start.is_null() {
        handle_alloc_error(layout);
    }
    start
}

/// All slabs of the process.
struct Slabs {
    /// Free slots of each slab, by the slab's address.
    free: BTreeMap<usize, Vec<*mut u8>>,
    /// Slabs with a free slot: size of their slots, address.
    open: BTreeSet<(usize, usize)>,
}

// SAFETY: the pointers are to slots nobody uses.
unsafe impl Send for Slabs {}

fn slabs<T>(f: impl FnOnce(&mut Slabs) -> T) -> T {
    static SLABS: Mutex<Slabs> = Mutex::new(Slabs {
        free: BTreeMap::new(),
        open: BTreeSet::new(),
    });
    f(&mut SLABS.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Slabs {
    /// A slot of the first slab with room, so that later ones empty.
    fn take(&mut self, size: usize) -> *mut u8 {
        let with_room = self.open.range((size, 0)..=(size, usize::MAX)).next();
        let slab = match with_room {
            Some(&(_, slab)) => slab,
            None => self.open_slab(size),
        };
        let free = self.free.get_mut(&slab).expect("an open slab is known");
        let slot = free.pop().expect("an open slab has a free slot");
        if free.is_empty() {
            self.open.remove(&(size, slab));
        }
        slot
    }

    fn open_slab(&mut self, size: usize) -> usize {
        let start = allocate(SLAB, SLAB);
        #[cfg(target_os = "linux")]
        // SAFETY: the range is ours; the advice changes no contents. Refusal is harmless.
        unsafe {
            libc::madvise(start.cast(), SLAB, libc::MADV_HUGEPAGE);
        }
        // The first slot is the last, which is the next to be taken.
        let slots = (0..SLAB / size).rev();
        let free = slots.map(|i| start.wrapping_add(i * size)).collect();
        self.free.insert(start as usize, free);
        self.open.insert((size, start as usize));
        start as usize
    }

    fn give_back(&mut self, size: usize, slot: *mut u8) {
        let slab = slot as usize & !(SLAB - 1);
        let free = self.free.get_mut(&slab).expect("a slot lies in a slab");
        free.push(slot);
        if free.len() < SLAB / size {
            self.open.insert((size, slab));
            return;
        }
        self.free.remove(&slab);
        self.open.remove(&(size, slab));
        let start = slot.wrapping_sub(slot as usize - slab);
        // SAFETY: allocated in `open_slab` with this layout; all its slots are free.
        unsafe { dealloc(start, layout(SLAB, SLAB)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slabs that hold pages of `size`. Other tests use other sizes.
    fn count(size: usize, pages: &[Page]) -> (usize, usize) {
        let held: BTreeSet<usize> = pages
            .iter()
            .map(|page| page.start as usize & !(SLAB - 1))
            .collect();
        let known = slabs(|slabs| held.iter().filter(|s| slabs.free.contains_key(s)).count());
        assert_eq!(held.len(), known, "pages of {size} in unknown slabs");
        let open = slabs(|slabs| slabs.open.range((size, 0)..=(size, usize::MAX)).count());
        (held.len(), open)
    }

    #[test]
    fn pages_are_zero_apart_and_their_slabs_go_with_them() {
        let size = 99 * LINE;
        let per_slab = SLAB / size;
        let fresh = |n: usize| -> Vec<Page> { (0..n).map(|_| Page::zeroed(size - 3)).collect() };
        let mut pages = fresh(3 * per_slab + 1);
        for (i, page) in pages.iter_mut().enumerate() {
            assert_eq!(page.as_ptr() as usize % LINE, 0);
            assert_eq!(page.len(), size - 3);
            assert!(page.iter().all(|&b| b == 0));
            page.fill(i as u8 | 1);
        }
        assert_eq!(count(size, &pages), (4, 1));
        for (i, page) in pages.iter().enumerate() {
            assert!(page.iter().all(|&b| b == i as u8 | 1), "page {i}");
        }
        // What was freed is taken again before a new slab is opened, and is zero.
        pages.drain(..per_slab / 2);
        let again = fresh(per_slab / 2);
        assert!(again.iter().all(|page| page.iter().all(|&b| b == 0)));
        pages.extend(again);
        assert!(count(size, &pages).0 <= 4);
        pages.clear();
        assert_eq!(count(size, &pages), (0, 0));
    }

    #[test]
    fn large_pages_stand_alone() {
        for len in [0, 1, LARGEST, LARGEST + 1, 3 * SLAB] {
            let mut page = Page::zeroed(len);
            assert_eq!(page.len(), len);
            assert_eq!(page.as_ptr() as usize % LINE, 0);
            assert!(page.iter().all(|&b| b == 0));
            page.fill(7);
        }
    }
}
