//! Zeroed memory on cache-line bounds, on huge pages when it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Size and alignment of a huge page on x86-64 and AArch64 Linux.
const HUGE_PAGE: usize = 2 << 20;
/// The largest ordinary page of the systems we map on.
#[cfg(target_os = "linux")]
const SYSTEM_PAGE: usize = 64 << 10;

/// A fixed number of bytes, aligned to 64 (to 2 MiB from 4 MiB on, where the kernel is asked
/// for huge pages: reading weights at full bandwidth otherwise misses the TLB every 4 KiB).
pub(crate) struct Buffer {
    start: *mut u8,
    layout: Layout,
    /// Whose memory it is a piece of; `None` if it is its own.
    slab: Option<Arc<Buffer>>,
}

/// Memory that [`Buffer::in_slab`] cuts pieces from.
const SLAB: usize = 16 * HUGE_PAGE;

/// The newest slab and how much of it is taken. Nothing is taken twice; a slab lives as long as
/// its pieces.
static NEWEST: Mutex<Option<(Arc<Buffer>, usize)>> = Mutex::new(None);

// SAFETY: a Buffer owns its memory like a Box<[u8]>.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Buffer {
        let align = if len >= 2 * HUGE_PAGE { HUGE_PAGE } else { 64 };
        let layout = Layout::from_size_align(len.max(64), align).expect("buffer length");
        let start = if align == HUGE_PAGE {
            huge(layout)
        } else {
            // SAFETY: the size is not zero.
            unsafe { alloc_zeroed(layout) }
        };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Buffer {
            start,
            layout,
            slab: None,
        }
    }

    /// `len` zero bytes for weights: small matrices lie side by side in a slab, so that they too
    /// are on huge pages.
    pub(crate) fn in_slab(len: usize) -> Buffer {
        if len > SLAB / 2 {
            return Buffer::zeroed(len);
        }
        let layout = Layout::from_size_align(len.max(64), 64).expect("buffer length");
        let size = layout.size().next_multiple_of(64);
        let mut newest = NEWEST.lock().unwrap_or_else(PoisonError::into_inner);
        let (slab, taken) = match newest.take() {
            Some((slab, taken)) if taken + size <= slab.len() => (slab, taken),
            _ => (Arc::new(Buffer::zeroed(SLAB)), 0),
        };
        // SAFETY: within the slab.
        let start = unsafe { slab.start.add(taken) };
        *newest = Some((Arc::clone(&slab), taken + size));
        Buffer {
            start,
            layout,
            slab: Some(slab),
        }
    }

    /// At least `len` bytes; contents are kept only if no growth was needed.
    pub(crate) fn reserve(&mut self, len: usize) {
        if self.len() < len {
            *self = Buffer::zeroed(len.next_power_of_two());
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.slab.is_none() {
            if self.layout.align() == HUGE_PAGE {
                free_huge(self.start, self.layout);
            } else {
                // SAFETY: allocated with this layout.
                unsafe { dealloc(self.start, self.layout) }
            }
        }
    }
}

/// Zeroed memory on huge pages; null where there is none. It is the system's own: nothing has
/// touched it yet, so that whoever writes it first, on whatever thread, brings its pages in.
#[cfg(target_os = "linux")]
fn huge(layout: Layout) -> *mut u8 {
    let kept = layout.size().next_multiple_of(SYSTEM_PAGE);
    let Some(with_margin) = kept.checked_add(HUGE_PAGE) else {
        return std::ptr::null_mut();
    };
    // SAFETY: a new private mapping. What lies before the first bound of a huge page and after
    // the last page is given back; the advice changes no contents, and its refusal is harmless.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let map = libc::mmap(std::ptr::null_mut(), with_margin, protection, flags, -1, 0);
        if map == libc::MAP_FAILED {
            return std::ptr::null_mut();
        }
        let map = map.cast::<u8>();
        let before = map.align_offset(HUGE_PAGE);
        let start = map.add(before);
        if before > 0 {
            libc::munmap(map.cast(), before);
        }
        libc::munmap(start.add(kept).cast(), HUGE_PAGE - before);
        libc::madvise(start.cast(), kept, libc::MADV_HUGEPAGE);
        start
    }
}

#[cfg(target_os = "linux")]
fn free_huge(start: *mut u8, layout: Layout) {
    // SAFETY: mapped by `huge`.
    unsafe { libc::munmap(start.cast(), layout.size().next_multiple_of(SYSTEM_PAGE)) };
}

#[cfg(not(target_os = "linux"))]
fn huge(layout: Layout) -> *mut u8 {
    // SAFETY: the size is not zero.
    unsafe { alloc_zeroed(layout) }
}

#[cfg(not(target_os = "linux"))]
fn free_huge(start: *mut u8, layout: Layout) {
    // SAFETY: allocated with this layout.
    unsafe { dealloc(start, layout) }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: initialised when allocated, alive as long as self.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `deref`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Buffer {
        let mut copy = Buffer::in_slab(self.layout.size());
        copy.copy_from_slice(self);
        copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_slabs_are_zero_apart_and_outlive_each_other() {
        let mut pieces: Vec<Buffer> = (0..40).map(|i| Buffer::in_slab(i * 100_003)).collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.as_ptr() as usize % 64, 0);
            assert!(piece.len() >= i * 100_003);
            assert!(piece.iter().all(|&b| b == 0));
            piece.fill(i as u8);
        }
        pieces.retain(|piece| piece[0] % 2 == 1);
        for piece in &pieces {
            assert!(piece.iter().all(|&b| b == piece[0]));
            assert_eq!(**piece, *piece.clone());
        }
    }
}
