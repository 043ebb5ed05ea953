//! Recordings of passes: a step of the same shape as one before is one launch.

use mneme_kernels::cuda::Graph;

/// Recordings kept; all go when one more is made.
const MOST: usize = 64;

/// What tells two passes apart whose rows alone differ: numbers of rows, bounds, addresses.
pub(super) type Key = Vec<u64>;

/// What is known of a kind of pass.
pub(super) enum Known {
    /// It has run once: everything it needs is allocated.
    Seen,
    /// It is recorded.
    Recorded(Graph),
}

/// Kinds of passes met since a buffer moved last.
#[derive(Default)]
pub(super) struct Graphs {
    epoch: u64,
    known: Vec<(Key, Known)>,
}

impl Graphs {
    /// What is known of passes like `key`; forgets what holds addresses older than `epoch`.
    pub(super) fn find(&mut self, key: &Key, epoch: u64) -> Option<&Known> {
        if epoch != self.epoch {
            self.known.clear();
            self.epoch = epoch;
        }
        let at = self.known.iter().position(|(k, _)| k == key)?;
        // The one used last comes first.
        self.known[..=at].rotate_right(1);
        Some(&self.known[0].1)
    }

    /// Notes what is known of passes like `key`.
    pub(super) fn insert(&mut self, key: Key, known: Known) {
        self.known.retain(|(k, _)| *k != key);
        self.known.truncate(MOST - 1);
        self.known.insert(0, (key, known));
    }
}
