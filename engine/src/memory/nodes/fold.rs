//! Consolidation: where more slots are held than `node_max`, the oldest neighbours of one level become
//! one node of the next.

use super::{Cell, Entry, Next, Node, Nodes, Plan, Source};
use crate::error::Result;
use crate::memory::store::Rearrangement;
use crate::ops::Ops;
use mneme_kernels::attend::Visible;

/// Nodes that become one: index of the first, how many, and the kept cells without theirs.
pub(super) struct Folded {
    pub(super) first: usize,
    pub(super) n: usize,
    pub(super) kept: Rearrangement,
}

impl Nodes {
    /// Whether more slots are held than the bound allows.
    pub(super) fn is_full(&self) -> bool {
        let n = self.nodes.len() * self.tensors().n_slots;
        self.cfg.node_max > 0 && n > self.cfg.node_max && self.nodes.len() > 1
    }

    /// A pass that folds the oldest neighbours of the fullest level into one node.
    pub(super) fn plan_fold(&mut self, ops: &dyn Ops) -> Result<Plan> {
        let mut spare = self.take_spare();
        let levels = self.nodes.iter().map(|n| n.level).max().unwrap_or(0);
        let count = |level| self.nodes.iter().filter(|n| n.level == level).count();
        let fullest = (0..=levels).rev().max_by_key(|&l| count(l)).unwrap_or(0);
        let (first, n) = match count(fullest) {
            0 | 1 => (0, self.cfg.fanin.min(self.nodes.len())),
            n => {
                let first = self.nodes.iter().position(|n| n.level == fullest);
                (first.unwrap_or(0), n.min(self.cfg.fanin))
            }
        };
        let children = &self.nodes[first..first + n];
        let tensors = self.tensors();
        let rs: Vec<f32> = children.iter().flat_map(|n| n.r.iter().copied()).collect();
        let r = tensors.fold_readouts(ops, &mut tensors.scratch(), &mut spare, &rs)?;
        let last = &children[n - 1];
        let n_kept = self.store.n_kept();
        let raw_end = self.store.raw_end();
        let entries = (0..tensors.n_slots).map(|j| Entry {
            source: Source::Slot,
            token: None,
            pos: last.pos + j as u32,
            cell: Cell::Kept(j),
            visible: Visible {
                n_kept: (n_kept + j + 1) as u32,
                raw_begin: raw_end,
                raw_end,
            },
        });
        let plan = Plan {
            entries: entries.collect(),
            readouts: r.to_vec(),
            ..Plan::default()
        };
        // The new slots lie behind all others and take their children's place.
        let n_cells = |nodes: &[Node]| nodes.iter().map(|n| n.n_cells).sum::<usize>();
        let hole = self.n_sinks() + n_cells(&self.nodes[..first]);
        let order: Vec<usize> = (0..hole)
            .chain(n_kept..n_kept + tensors.n_slots)
            .chain(hole + n_cells(children)..n_kept)
            .collect();
        let kept = self.store.rearrangement(order)?;
        let mut state = self.state.clone();
        state.n_entries += tensors.n_slots;
        let folded = Node {
            id: state.next_id,
            level: children.iter().map(|n| n.level).max().unwrap_or(0) + 1,
            start: children[0].start,
            end: last.end,
            p: last.p,
            children: children.iter().map(|n| n.id).collect(),
            r,
            pos: last.pos,
            n_cells: tensors.n_slots,
        };
        state.next_id += 1;
        self.next = Some(Next {
            state,
            new_nodes: vec![folded],
            folded: Some(Folded { first, n, kept }),
            step: None,
            n_kept: tensors.n_slots,
            n_raw: 0,
        });
        self.spare = Some(spare);
        Ok(plan)
    }
}
