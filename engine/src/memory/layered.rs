//! `layered`: some layers keep every key and value, the others `sinks` and a `window`; models that
//! mix local and global attention are built so, and others can be read so.
//!
//! A layer named by `full` sees as [`super::full`] does, any other as [`super::window`] does. Cells
//! are freed layer by layer: the price is that of `full` times the share of full layers, plus a
//! window.

use super::store::Store;
use super::window::Span;
use super::{Context, Memory, MemorySpec, Plan, Stats};
use crate::error::Result;
use crate::ops::Ops;
use crate::session::{Decoder, Encoder};
use std::io;

#[derive(Clone)]
struct Layered {
    ctx: Context,
    store: Store,
    span: Span,
    full_layers: Vec<bool>,
}

/// Layers named by `text`, such as `0-3+8+12-15`, of `n_layer`.
fn parse_layers(spec: &MemorySpec, text: &str, n_layer: usize) -> Result<Vec<bool>> {
    let mut layers = vec![false; n_layer];
    for part in text.split('+').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let bounds = first.trim().parse::<usize>().ok();
        let bounds = bounds.zip(last.trim().parse::<usize>().ok());
        let Some((first, last)) = bounds.filter(|(first, last)| first <= last) else {
            return Err(spec.refuse(format!("`full` expects layers such as 0-3+8, got `{part}`")));
        };
        match layers.get_mut(first..=last) {
            Some(named) => named.fill(true),
            None => {
                return Err(spec.refuse(format!(
                    "`full` names layer {last}, the model has 0 to {}",
                    n_layer.saturating_sub(1)
                )));
            }
        }
    }
    Ok(layers)
}

pub(super) fn build(ctx: &Context, spec: &MemorySpec) -> Result<Box<dyn Memory>> {
    if !spec.has("full") {
        return Err(spec.refuse(
            "`full` is missing: the layers that keep everything, such as full=0-3+8; with none of \
             them this is `window`",
        ));
    }
    let layers: String = spec.get("full", String::new())?;
    Ok(Box::new(Layered {
        full_layers: parse_layers(spec, &layers, ctx.weights.hparams.n_layer)?,
        store: ctx.store(),
        ctx: ctx.clone(),
        span: Span::parse(spec, 4096, 4)?,
    }))
}

impl Memory for Layered {
    fn name(&self) -> &'static str {
        "layered"
    }

    fn plan(&mut self, _ops: &dyn Ops, tokens: &[u32], _wanted: bool) -> Result<Plan> {
        if self.full_layers.contains(&true) {
            self.ctx.check_room(&self.store, tokens.len())?;
        }
        Ok(self.span.plan(tokens))
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    fn sees_all(&self, layer: usize) -> bool {
        self.full_layers[layer]
    }

    fn commit(&mut self, _: &dyn Ops, plan: &Plan, _: &[u32], _: Option<&[f32]>) -> Result<usize> {
        self.span.advance(&mut self.store, plan);
        let full = &self.full_layers;
        self.store
            .release_raw(self.span.first_seen(), |il| !full[il]);
        Ok(plan.n_tokens)
    }

    fn truncate(&mut self, _: &dyn Ops, _: &[u32], n: usize) -> usize {
        self.span.truncate(&mut self.store, n)
    }

    fn fork(&self) -> Box<dyn Memory> {
        Box::new(self.clone())
    }

    fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        self.span.save(out)?;
        self.store.save(out)
    }

    fn restore(&mut self, from: &mut Decoder<'_>) -> io::Result<()> {
        self.span.restore(from)?;
        self.store.restore(from, self.ctx.n_ctx)?;
        self.span.check(&self.store)?;
        let n_full = self.full_layers.iter().filter(|f| **f).count();
        if n_full > 0 && self.store.first_raw(&self.full_layers) > 0 {
            return Err(io::Error::other(
                "a layer that keeps everything has lost cells: the file was saved with other full layers",
            ));
        }
        Ok(())
    }

    fn stats(&self) -> Stats {
        let n_tokens = self.span.n_tokens;
        let n_full = self.full_layers.iter().filter(|f| **f).count();
        let n_layer = self.full_layers.len();
        let n_seen = n_tokens.min(self.span.window + self.span.sinks);
        // Bounds are linear in the layers of each kind.
        let bound = |cells, layers| self.ctx.page_bound(cells, 2) / n_layer.max(1) * layers;
        Stats {
            name: "layered",
            n_tokens,
            n_entries: n_tokens,
            n_cells: self.store.n_cells(),
            n_dropped: if n_full == n_layer {
                0
            } else {
                n_tokens - n_seen
            },
            cell_bytes: self.store.bytes(),
            card_bytes: self.store.card_bytes(),
            full_bytes: n_tokens * self.ctx.cell_bytes(),
            bound_bytes: bound(n_tokens + 1, n_full) + bound(n_seen + 1, n_layer - n_full),
            ..Stats::default()
        }
    }
}
