//! Asking memory for cells before they are used: by the place of the cells in hand ([`Ahead`]), or at the pace of all
//! that is done with a page ([`Pace`]).

#[cfg(target_arch = "x86_64")]
use std::ops::Range;

/// Where a head's cells end on this page, and how far the next page's are from there: what a
/// kernel needs to ask memory for cells before it uses them.
#[derive(Clone, Copy)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "other kernels leave fetching to the processor")
)]
pub(crate) struct Ahead {
    pub(super) end: *const u8,
    pub(super) jump: isize,
}

impl Ahead {
    pub(super) const NOTHING: Ahead = Ahead {
        end: std::ptr::null(),
        jump: 0,
    };

    /// Of `n` steps of `step` bytes from `p` on, those for which what lies `distance` bytes further on is before the
    /// end of this head's cells, and the others; with the bytes from a step to what to ask for. Loops that ask
    /// once a step have no more to do for it than that.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn stretches(
        self,
        p: *const u8,
        n: usize,
        step: usize,
        distance: usize,
    ) -> [(Range<usize>, isize); 2] {
        let room = self.end.addr().saturating_sub(p.addr() + distance);
        let here = room.div_ceil(step).min(n);
        let distance = distance as isize;
        [(0..here, distance), (here..n, distance + self.jump)]
    }

    /// Asks for the cache line `distance` bytes after `p`, on the next page if this head's cells end
    /// before.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn ask(self, p: *const u8, distance: usize) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has it; a prefetch never faults and changes no value.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(self.place(p, distance).cast()) }
    }

    /// Asks for a cache line twice: for the L2 cache `far` bytes before it is used, as [`Ahead::ask`] does, and
    /// for the L1 cache `near` bytes before. Of the requests that lead to the L1 cache a core has too few to wait
    /// for memory with them.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn ask_twice(self, p: *const u8, near: usize, far: usize) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: as above; a line beyond this head's cells is one too many.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(self.place(p, far).cast());
            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(near).cast());
        }
    }

    /// `distance` bytes after `p`, on the next page if this head's cells end before.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    fn place(self, p: *const u8, distance: usize) -> *const u8 {
        let p = p.wrapping_add(distance);
        if p < self.end {
            p
        } else {
            p.wrapping_offset(self.jump)
        }
    }
}

/// Asks for as many lines as a page has, in their order, whatever a kernel does at the time: for kernels that do not
/// go through cells line by line. A core has few requests on their way at once, so that asking must be even over
/// all the work on a page: what is asked for in a burst waits, and where nothing is asked for, memory does
/// nothing.
#[derive(Clone, Copy)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "other kernels leave fetching to the processor")
)]
pub(crate) struct Pace {
    /// The line to ask for next.
    next: *const u8,
    ahead: Ahead,
    /// Lines of the page that none has been asked for yet.
    left: usize,
}

impl Pace {
    /// Bytes from the cell in use to the line asked for.
    const AHEAD: usize = 8192;

    /// For a page of a head whose cells are `cells`.
    pub(super) fn new(cells: &[u8], ahead: Ahead) -> Pace {
        let mut pace = Pace {
            next: cells.as_ptr().wrapping_add(Pace::AHEAD),
            ahead,
            left: cells.len().div_ceil(64),
        };
        pace.turn();
        pace
    }

    /// Goes on to the next page where this head's cells end.
    #[inline(always)]
    fn turn(&mut self) {
        if self.next >= self.ahead.end {
            self.next = self.next.wrapping_offset(self.ahead.jump);
            self.ahead.end = std::ptr::without_provenance(usize::MAX);
        }
    }

    /// Asks for the next line, if one is left: for the L2 cache, where tiles are loaded from it as fast as they
    /// are used, and the L1 cache keeps room for their sums.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn ask(&mut self) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        if self.left > 0 {
            // SAFETY: every x86-64 has it; a prefetch never faults and changes no value.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.take(1).cast()) }
        }
    }

    /// The next `n` lines, for the caller to ask for; it goes on by no more than are left.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn take(&mut self, n: usize) -> *const u8 {
        let lines = self.next;
        let n = n.min(self.left);
        self.left -= n;
        self.next = self.next.wrapping_add(64 * n);
        self.turn();
        lines
    }
}
