//! Zeroed memory on cache-line bounds, on huge pages when it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};

/// Size and alignment of a huge page on x86-64 and AArch64 Linux.
const HUGE_PAGE: usize = 2 << 20;

/// A fixed number of bytes, aligned to 64 (to 2 MiB from 4 MiB on, where the kernel is asked
/// for huge pages: reading weights at full bandwidth otherwise misses the TLB every 4 KiB).
pub(crate) struct Buffer {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: a Buffer owns its memory like a Box<[u8]>.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Buffer {
        let align = if len >= 2 * HUGE_PAGE { HUGE_PAGE } else { 64 };
        let layout = Layout::from_size_align(len.max(64), align).expect("buffer length");
        // SAFETY: the size is not zero.
        let start = unsafe {
            if align == HUGE_PAGE {
                // Not alloc_zeroed: with a large alignment it would touch every page before the
                // advice below. Fresh memory of this size is not always zero, so clear it after.
                std::alloc::alloc(layout)
            } else {
                alloc_zeroed(layout)
            }
        };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        if align == HUGE_PAGE {
            #[cfg(target_os = "linux")]
            // SAFETY: the range is ours; the advice changes no contents. Refusal is harmless.
            unsafe {
                libc::madvise(start.cast(), layout.size(), libc::MADV_HUGEPAGE);
            }
            // SAFETY: the whole allocation is ours to write.
            unsafe { start.write_bytes(0, layout.size()) };
        }
        Buffer { start, layout }
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
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) }
    }
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
        let mut copy = Buffer::zeroed(self.layout.size());
        copy.copy_from_slice(self);
        copy
    }
}
