//! Nodes and the state between two tokens, as session files hold them.

use super::{Context, Controller, Last, Node, State};
use crate::session::{Decoder, Encoder};
use std::io;

impl Node {
    pub(super) fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        out.u64(self.id)?;
        out.u32(self.level)?;
        out.u64(self.start as u64)?;
        out.u64(self.end as u64)?;
        out.f32(self.p)?;
        out.u32(self.pos)?;
        out.u64(self.n_cells as u64)?;
        out.f32s(&self.r)?;
        out.u64(self.children.len() as u64)?;
        self.children.iter().try_for_each(|&c| out.u64(c))
    }

    pub(super) fn restore(from: &mut Decoder<'_>, width: usize) -> io::Result<Node> {
        let mut node = Node {
            id: from.u64()?,
            level: from.u32()?,
            start: from.u64()? as usize,
            end: from.u64()? as usize,
            p: from.f32()?,
            pos: from.u32()?,
            n_cells: from.u64()? as usize,
            r: vec![0.0; width].into(),
            children: Vec::new(),
        };
        from.f32s_into(&mut node.r)?;
        for _ in 0..from.u64()? {
            node.children.push(from.u64()?);
        }
        Ok(node)
    }
}

impl State {
    pub(super) fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        for n in [
            self.n_tokens,
            self.n_entries,
            self.seg_start,
            self.seg_longest,
        ] {
            out.u64(n as u64)?;
        }
        for n in [self.seg_raw, self.next_id, self.seg_count] {
            out.u64(n)?;
        }
        for n in [self.pos, self.seg_pos, self.seg_sinks] {
            out.u32(n)?;
        }
        for x in [self.seg_sum, self.seg_squares] {
            out.u64(x.to_bits())?;
        }
        self.trunk.save(out)?;
        out.u32(self.before.map_or(0, |b| b + 1))?;
        match &self.last {
            None => out.u32(0)?,
            Some(last) => {
                out.u32(1)?;
                out.u32(last.id)?;
                out.u32(last.before.map_or(0, |b| b + 1))?;
                out.f32(last.p)?;
                out.f32s(&last.r)?;
            }
        }
        match &self.control {
            None => out.u32(0)?,
            Some(c) => {
                out.u32(1)?;
                c.save(out)?;
            }
        }
        out.f32(self.surprisal.0)?;
        out.f32(self.surprisal.1)?;
        out.f32s(&self.logits)
    }

    pub(super) fn restore(
        &mut self,
        from: &mut Decoder<'_>,
        ctx: &Context,
        width: usize,
    ) -> io::Result<()> {
        self.n_tokens = from.u64()? as usize;
        self.n_entries = from.u64()? as usize;
        self.seg_start = from.u64()? as usize;
        self.seg_longest = from.u64()? as usize;
        self.seg_raw = from.u64()?;
        self.next_id = from.u64()?;
        self.seg_count = from.u64()?;
        self.pos = from.u32()?;
        self.seg_pos = from.u32()?;
        self.seg_sinks = from.u32()?;
        self.seg_sum = f64::from_bits(from.u64()?);
        self.seg_squares = f64::from_bits(from.u64()?);
        let w = &ctx.weights;
        let n_vocab = w.hparams.n_vocab;
        self.trunk.restore(from, width, &w.layers[0].device)?;
        let token = |n: u32| -> io::Result<Option<u32>> {
            match n {
                0 => Ok(None),
                n if (n as usize) <= n_vocab => Ok(Some(n - 1)),
                n => Err(io::Error::other(format!(
                    "token id {} is outside the vocabulary",
                    n - 1
                ))),
            }
        };
        self.before = token(from.u32()?)?;
        self.last = match from.u32()? {
            0 => None,
            _ => {
                let mut last = Last {
                    id: from.u32()?,
                    before: token(from.u32()?)?,
                    p: from.f32()?,
                    r: vec![0.0; width].into(),
                };
                token(last.id.saturating_add(1))?;
                from.f32s_into(&mut last.r)?;
                Some(last)
            }
        };
        self.control = match from.u32()? {
            0 => None,
            _ => Some(Controller::restore(from)?),
        };
        self.surprisal = (from.f32()?, from.f32()?);
        self.logits = from.f32s()?;
        if !self.logits.is_empty() && self.logits.len() != n_vocab {
            return Err(io::Error::other("the logits have another vocabulary"));
        }
        Ok(())
    }
}
