//! What comes next from memory, asked for while there is arithmetic to do: a head's rows lie a page apart,
//! which no processor foresees.

use super::chunk::prefetch_to_write;
use super::numbers::Stored;
use std::cell::Cell;
use std::ops::Range;

/// The inputs of the head and the tokens after these, and the rows of these tokens' output.
pub(crate) struct Ahead<'a> {
    pub(super) stored: &'a Stored<'a>,
    /// Whose inputs come next; no tokens if none do.
    pub(super) head: usize,
    pub(super) tokens: Range<usize>,
    /// The first row of the output of the work in hand, and how many rows.
    pub(super) out: *mut f32,
    pub(super) n_rows: usize,
    /// Calls of [`Ahead::ask`] so far.
    pub(super) asked: Cell<usize>,
}

impl Ahead<'_> {
    /// Some more lines. Kernels call it for every token of every strip or slice, which is a token's
    /// rows for every 64 columns.
    #[inline]
    pub(crate) fn ask(&self) {
        let asked = self.asked.get();
        self.asked.set(asked + 1);
        let x = self.stored;
        let every = x.head_dim_v.div_ceil(64);
        if !asked.is_multiple_of(every) {
            return;
        }
        let i = asked / every;
        if i < self.tokens.len() {
            x.fetch(self.head, self.tokens.start + i);
        }
        if i < self.n_rows {
            let row = self.out.wrapping_add(i * x.n_head * x.head_dim_v);
            prefetch_to_write(row, x.head_dim_v);
        }
    }
}
