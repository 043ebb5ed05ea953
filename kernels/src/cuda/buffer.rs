//! Typed pieces of device memory.

use super::device::Shared;
use super::driver::Allocation;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

mod sealed {
    pub trait Sealed {}
}

/// Numbers and structs that mean the same on the host and on the device, in any bit pattern.
pub trait Plain: Copy + 'static + sealed::Sealed {}

macro_rules! plain {
    ($($ty:ty)*) => {$(
        impl sealed::Sealed for $ty {}
        impl Plain for $ty {}
    )*};
}
plain!(u8 u32 i32 u64 f32 crate::attend::Visible super::attend::Table);

/// Memory of the device with the device it belongs to: freed when the last user is gone.
pub(crate) struct Memory {
    pub(crate) allocation: Allocation,
    pub(crate) device: Arc<Shared>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by this device, and nothing refers to it any more: recorded graphs
        // hold what they touch, and the driver waits for work that is still under way.
        unsafe { self.device.driver.free(&self.allocation) }
    }
}

/// `len` numbers of device memory.
pub struct Buffer<T> {
    pub(crate) memory: Arc<Memory>,
    len: usize,
    _of: PhantomData<T>,
}

/// Part of a buffer, to be read by the device.
pub struct View<'a, T> {
    memory: &'a Arc<Memory>,
    start: usize,
    len: usize,
    _of: PhantomData<T>,
}

/// Part of a buffer, to be written by the device.
pub struct ViewMut<'a, T> {
    memory: &'a Arc<Memory>,
    start: usize,
    len: usize,
    _of: PhantomData<&'a mut T>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for View<'_, T> {}

impl<T: Plain> Buffer<T> {
    pub(crate) fn new(memory: Arc<Memory>, len: usize) -> Buffer<T> {
        Buffer {
            memory,
            len,
            _of: PhantomData,
        }
    }

    /// Numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The whole buffer, to be read.
    pub fn all(&self) -> View<'_, T> {
        View {
            memory: &self.memory,
            start: 0,
            len: self.len,
            _of: PhantomData,
        }
    }

    /// The whole buffer, to be written.
    pub fn all_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut {
            memory: &self.memory,
            start: 0,
            len: self.len,
            _of: PhantomData,
        }
    }

    /// Numbers `range`, to be read.
    ///
    /// # Panics
    /// If the range is not of this buffer.
    pub fn slice(&self, range: Range<usize>) -> View<'_, T> {
        self.all().slice(range)
    }

    /// Numbers `range`, to be written.
    ///
    /// # Panics
    /// If the range is not of this buffer.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        self.all_mut().slice_mut(range)
    }
}

fn check(range: &Range<usize>, len: usize) {
    assert!(
        range.start <= range.end && range.end <= len,
        "numbers {}..{} of a device buffer of {len}",
        range.start,
        range.end
    );
}

impl<'a, T: Plain> View<'a, T> {
    /// Numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Numbers `range` of these.
    ///
    /// # Panics
    /// If the range is not of this view.
    pub fn slice(&self, range: Range<usize>) -> View<'a, T> {
        check(&range, self.len);
        View {
            start: self.start + range.start,
            len: range.end - range.start,
            ..*self
        }
    }

    /// The first `n` numbers and the rest.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn split_at(&self, n: usize) -> (View<'a, T>, View<'a, T>) {
        (self.slice(0..n), self.slice(n..self.len))
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        self.memory
    }

    /// Address on the device; meaningful only while the memory is held.
    pub(crate) fn address(&self) -> u64 {
        self.memory.allocation.address() + (self.start * size_of::<T>()) as u64
    }
}

impl<'a, T: Plain> ViewMut<'a, T> {
    /// Numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Numbers `range` of these.
    ///
    /// # Panics
    /// If the range is not of this view.
    pub fn slice_mut(self, range: Range<usize>) -> ViewMut<'a, T> {
        check(&range, self.len);
        ViewMut {
            start: self.start + range.start,
            len: range.end - range.start,
            ..self
        }
    }

    /// The first `n` numbers and the rest.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn split_at_mut(self, n: usize) -> (ViewMut<'a, T>, ViewMut<'a, T>) {
        check(&(0..n), self.len);
        let rest = ViewMut {
            start: self.start + n,
            len: self.len - n,
            ..self
        };
        (ViewMut { len: n, ..self }, rest)
    }

    /// The same numbers for a shorter while.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { ..*self }
    }

    /// The same numbers, to be read.
    pub fn as_view(&self) -> View<'_, T> {
        View {
            memory: self.memory,
            start: self.start,
            len: self.len,
            _of: PhantomData,
        }
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        self.memory
    }

    /// As [`View::address`].
    pub(crate) fn address(&self) -> u64 {
        self.as_view().address()
    }
}
