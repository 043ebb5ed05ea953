//! What the rows of a pass have of their own.

use crate::memory::store::Cell;
use mneme_kernels::attend::Visible;
use std::ops::Range;

/// The rows of all sequences of a pass, stacked.
#[derive(Default)]
pub struct Rows {
    /// Rotary position of each row.
    pub pos: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub out: Vec<usize>,
    /// Rows of tokens that a compressor steps over in the pass, ascending.
    pub steps: Vec<usize>,
    /// Rows of the slots of nodes made in the pass, ascending.
    pub node_slots: Vec<usize>,
    /// One sequence's rows each.
    pub parts: Vec<Part>,
    /// Where a card finds all this.
    #[cfg(feature = "on-card")]
    card: Option<super::cuda::CardRows>,
}

/// One sequence's rows.
pub struct Part {
    /// Which they are.
    pub rows: Range<usize>,
    /// Where their keys and values go.
    pub cells: Vec<Cell>,
    /// What they see.
    pub visible: Vec<Visible>,
    /// Layers in which they see every raw cell; empty where there is none.
    pub full_layers: Vec<bool>,
    /// What they see there.
    pub everything: Vec<Visible>,
    /// Kept cells that are always read.
    pub n_always: u32,
    /// How many of the other kept cells each row reads; 0 for all.
    pub top_k: u32,
    /// Raw cells that a recurrent memory takes in during the pass.
    pub recalls: Range<u64>,
}

impl Part {
    /// What the rows see in `layer`.
    pub fn visible(&self, layer: usize) -> &[Visible] {
        match self.full_layers.get(layer) {
            Some(true) => &self.everything,
            _ => &self.visible,
        }
    }

    /// Number of cells recalled.
    pub fn n_recalls(&self) -> usize {
        (self.recalls.end - self.recalls.start) as usize
    }
}

impl Rows {
    /// No rows yet, of which `out` will be wanted.
    pub fn new(out: Vec<usize>) -> Rows {
        Rows {
            out,
            ..Rows::default()
        }
    }

    /// Number of rows.
    pub fn n(&self) -> usize {
        self.pos.len()
    }

    /// Where the card finds them, once they have begun there.
    #[cfg(feature = "on-card")]
    pub(super) fn card(&self) -> Option<&super::cuda::CardRows> {
        self.card.as_ref()
    }

    /// As [`Rows::card`], of rows that have begun.
    #[cfg(feature = "on-card")]
    pub(super) fn on_card(&self) -> &super::cuda::CardRows {
        self.card.as_ref().expect("a pass begins before its layers")
    }

    #[cfg(feature = "on-card")]
    pub(super) fn set_card(&mut self, at: super::cuda::CardRows) {
        self.card = Some(at);
    }
}
