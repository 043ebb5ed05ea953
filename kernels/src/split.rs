//! A mutable slice that several threads write disjoint parts of.

use std::marker::PhantomData;

/// Shares `&mut [T]` between the threads of a region, each of which takes its own rows.
pub(crate) struct SplitMut<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out only by `part`, whose caller promises that they do not overlap.
unsafe impl<T: Send> Send for SplitMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SplitMut<'_, T> {}

impl<'a, T> SplitMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        SplitMut {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            _slice: PhantomData,
        }
    }

    /// The elements `range`.
    ///
    /// # Safety
    /// No other live part may overlap `range`.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, not aliased by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start)
        }
    }

    /// Address of element `i`, for kernels that write columns of rows with a stride.
    pub(crate) fn at(&self, i: usize) -> *mut T {
        assert!(i < self.len);
        // SAFETY: in bounds.
        unsafe { self.start.add(i) }
    }
}
