//! The verbs on an NVIDIA card, by the kernels of `mneme_kernels::cuda`.
//!
//! Weights, activations, cells and recurrent states live on the card; plans and page tables stay
//! with the host. Of a model that is split they are those of the last layers; the others are the
//! host's, and what comes of them is sent once a pass. Before the layers of a pass run, what its
//! rows have of their own is sent in one go, so passes of one shape differ in nothing that a launch
//! carries: short ones are recorded the second time they come and replayed from then on.

mod card;
mod graphs;
mod rows;

use card::Pool;
pub use card::{Card, CardBuffer, CardPage};
pub use rows::CardRows;

use super::cpu::weight_type;
use super::{
    Buffer, ConvSeq, Cpu, Device, Fold, Matrix, Ops, Page, Peak, Recurrence, RopeKind, Rows, Rule,
    Table,
};
use crate::error::{Error, Result};
use crate::gguf::TensorInfo;
use crate::memory::store::Store;
use crate::model::{Forward, Pass};
use card::lock;
use graphs::{Graphs, Key, Known};
use mneme_kernels::attend::{PAGE_CELLS, PageLayout};
use mneme_kernels::cuda::mul_mat::Packed;
use mneme_kernels::cuda::{self, ViewMut, attend, gates, recur, top_k};
use mneme_kernels::mul_mat::WeightType;
use mneme_kernels::recur::Form;
use rows::Arena;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// Most rows of a pass worth recording: above, launching costs little beside computing.
const RECORDED_ROWS: usize = 16;
/// Bytes copied to measure bandwidth: several times any second-level cache.
const PEAK_BYTES: usize = 512 << 20;
/// Most heads of a recurrent memory.
const MOST_HEADS: usize = 4096;

/// A card, and the host's threads for what stays there.
pub struct Cuda {
    card: Arc<Card>,
    device: Device,
    host: Cpu,
    n: usize,
    /// First layer that runs here.
    first: usize,
    /// Pages that are there before any sequence asks for them.
    _held: Option<Arc<Pool>>,
    arena: Mutex<Arena>,
    graphs: Mutex<Graphs>,
    /// Where rows that go on are gathered.
    gathered: Mutex<CardBuffer>,
    /// Where the likeliest tokens of rows are put.
    best: Mutex<Option<cuda::Buffer<u32>>>,
    /// Before which tokens a recurrence starts anew.
    resets: Mutex<Option<cuda::Buffer<u32>>>,
    ones: CardBuffer,
    /// What went wrong first since it was last asked for.
    failed: Mutex<Option<cuda::Error>>,
}

type Done = std::result::Result<(), cuda::Error>;

impl Cuda {
    /// The verbs on card `n`, with `host` for what stays on the host.
    pub fn open(n: usize, host: Cpu) -> Result<Cuda> {
        let card = Card::open(n)?;
        let mut ones = card.buffer(MOST_HEADS)?;
        ones.write(&[1.0; MOST_HEADS])?;
        Ok(Cuda {
            device: Device::Cuda(Arc::clone(&card)),
            host,
            n,
            first: 0,
            _held: None,
            arena: Mutex::default(),
            graphs: Mutex::default(),
            gathered: Mutex::new(card.buffer(1)?),
            best: Mutex::default(),
            resets: Mutex::default(),
            ones,
            failed: Mutex::default(),
            card,
        })
    }

    /// The same for a model whose layers before `first` run on the host. `first` is below the number
    /// of layers.
    pub fn from_layer(self, first: usize) -> Cuda {
        Cuda { first, ..self }
    }

    /// Bytes of the card's memory that nobody uses.
    pub fn free_bytes(&self) -> Result<u64> {
        let free = self.card.dev.free_bytes();
        let error = |e| self.card.error("asking for free memory", e);
        Ok(free.map_err(error)? as u64)
    }

    /// Takes memory for `n` pages of cells at once, so that they need not move while a context
    /// grows to that.
    pub fn hold_pages(self, layout: &PageLayout, n: usize) -> Result<Cuda> {
        let _held = Some(self.card.pool(layout, n)?);
        Ok(Cuda { _held, ..self })
    }

    /// Keeps the first error until [`Cuda::check`].
    fn keep(&self, done: Done) {
        if let Err(e) = done {
            lock(&self.failed).get_or_insert(e);
        }
    }

    fn failure(&self) -> Done {
        lock(&self.failed).take().map_or(Ok(()), Err)
    }

    /// The error of whatever failed since the last time.
    fn check(&self) -> Result<()> {
        self.failure()
            .map_err(|e| self.card.error("running a pass", e))
    }

    fn try_fold(&self, step: Fold<'_>) -> Done {
        let dev = &self.card.dev;
        let (n_head, c) = (step.n_head, step.n_head * step.head_dim);
        let n = step.beta.len() / n_head;
        let mut place = lock(&self.resets);
        let resets = match step.seqs.iter().any(|seq| !seq.resets.is_empty()) {
            false => None,
            true => {
                let (mut flags, mut row) = (vec![0; n], 0);
                for seq in &step.seqs {
                    seq.resets.iter().for_each(|token| flags[row + token] = 1);
                    row += seq.n;
                }
                let place = room(dev, &mut place, n)?;
                dev.write(place.slice_mut(0..n), &flags)?;
                Some(place.slice(0..n))
            }
        };
        let qkv = step.qkv.card().view();
        let (beta, g) = (step.beta.card().view(), step.g.card().view());
        let (mut out, mut row) = (step.out.card_mut().view_mut(), 0);
        let mut seqs = Vec::with_capacity(step.seqs.len());
        for seq in step.seqs {
            let rows = row..row + seq.n;
            row = rows.end;
            let (mine, rest) = out.split_at_mut(seq.n * c);
            out = rest;
            // A third of its rows: from its first number to its last.
            let numbers = |i: usize| match seq.n {
                0 => qkv.slice(0..0),
                _ => qkv.slice((3 * rows.start + i) * c..(3 * rows.end - 2 + i) * c),
            };
            seqs.push(recur::Recur {
                rule: Rule::GatedDelta,
                n_tokens: seq.n,
                n_head,
                n_head_k: n_head,
                head_dim_k: step.head_dim,
                head_dim_v: step.head_dim,
                q: numbers(0),
                k: numbers(1),
                v: numbers(2),
                q_stride: 3 * c,
                k_stride: 3 * c,
                v_stride: 3 * c,
                g: Some(g.slice(rows.start * n_head..rows.end * n_head)),
                beta: beta.slice(rows.start * n_head..rows.end * n_head),
                resets: resets.map(|flags| flags.slice(rows.clone())),
                from: Some(seq.state.card().view()),
                state: seq.next.card_mut().view_mut(),
                out: mine,
            });
        }
        recur::recur(dev, Form::Recurrent, &mut seqs)
    }

    /// What a recording of `pass` would hold beside the rows; `None` when it is not worth one.
    fn key(&self, pass: &Pass<'_>) -> Option<Key> {
        let (rows, at) = (&pass.rows, pass.rows.card()?);
        if rows.n() > RECORDED_ROWS || pass.hidden {
            return None;
        }
        let mut key = vec![
            rows.n() as u64,
            rows.out.len() as u64,
            rows.steps.len() as u64,
            rows.node_slots.len() as u64,
            at.max_cells as u64,
            at.max_ranked as u64,
        ];
        for part in &rows.parts {
            key.extend([
                part.rows.len() as u64,
                part.recalls.end - part.recalls.start,
            ]);
        }
        // What lies on the host belongs to layers that run there, or to the compressor with them.
        let here = pass.buffers().into_iter().filter(|b| !b.is_host());
        key.extend(here.map(|buffer| buffer.card().id));
        Some(key)
    }
}

/// Room for at least `n` words, kept between calls.
fn room<'a>(
    dev: &cuda::Device,
    place: &'a mut Option<cuda::Buffer<u32>>,
    n: usize,
) -> std::result::Result<&'a mut cuda::Buffer<u32>, cuda::Error> {
    if place.as_ref().is_none_or(|place| place.len() < n) {
        *place = Some(dev.alloc(n.next_power_of_two())?);
    }
    Ok(place.as_mut().expect("made above"))
}

/// Bytes that a weight matrix takes on a card.
pub fn card_bytes(tensor: &TensorInfo) -> u64 {
    // What has no kernel there is held in F16.
    let ty = weight_type(tensor.ty).unwrap_or(WeightType::F16);
    Packed::bytes_of(ty, tensor.n_rows(), tensor.n_cols())
}

/// Row-major GGUF bytes of `table` in a type the kernels have, in F16 where they have not.
fn bytes_of(table: &Table) -> (WeightType, std::borrow::Cow<'_, [u8]>) {
    let bytes = table.bytes();
    match weight_type(table.ty()) {
        Some(ty) => (ty, bytes.into()),
        None => {
            let mut row = vec![0.0; table.n_cols()];
            let mut halves = Vec::with_capacity(table.n_rows() * table.n_cols() * 2);
            for r in 0..table.n_rows() {
                table.read_row(r, &mut row);
                let half = |x: &f32| half::f16::from_f32(*x).to_le_bytes();
                halves.extend(row.iter().flat_map(half));
            }
            (WeightType::F16, halves.into())
        }
    }
}

impl Ops for Cuda {
    fn name(&self) -> String {
        let mut name = format!("cuda:{} {}", self.n, self.card.dev.name());
        if self.first > 0 {
            let host = self.host.name();
            name += &format!(" from layer {} on, before it {host}", self.first);
        }
        name
    }

    fn peak(&self) -> Result<Peak> {
        let dev = &self.card.dev;
        let error = |e| self.card.error("measuring peaks", e);
        let free = dev.free_bytes().map_err(error)?;
        let peak = cuda::peak::Peak::measure(dev, PEAK_BYTES.min(free / 4)).map_err(error)?;
        Ok(Peak {
            read: peak.copy,
            matrix: peak.mma,
            format: "f16",
            rates: vec![("copy", peak.copy), ("mma", peak.mma)],
        })
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn host(&self) -> &Cpu {
        &self.host
    }

    fn first_layer(&self) -> usize {
        self.first
    }

    fn check_room(&self, n_bytes: u64) -> Result<()> {
        let free = self.free_bytes()?;
        if n_bytes <= free {
            return Ok(());
        }
        Err(Error::DeviceFull {
            device: self.name(),
            what: "the weights".into(),
            needed: n_bytes,
            free,
        })
    }

    fn matrix(&self, table: Table) -> Result<Matrix> {
        // Refuses types that cannot be read at all.
        let table = self.host.table(table)?;
        let (ty, bytes) = bytes_of(&table);
        let packed = Packed::pack(&self.card.dev, ty, table.n_rows(), table.n_cols(), &bytes);
        let packed =
            packed.map_err(|e| self.card.error(format!("tensor `{}`", table.name()), e))?;
        drop(bytes);
        table.release();
        Ok(Matrix::Cuda(packed))
    }

    fn begin(&self, rows: &mut Rows, stores: &[&Store]) -> Result<()> {
        let at = lock(&self.arena).send(&self.card, rows, stores, self.first)?;
        rows.set_card(at);
        Ok(())
    }

    fn run(&self, pass: &mut Pass<'_>, forward: Forward) -> Result<()> {
        // What failed while the pass was planned.
        self.check()?;
        let Some(key) = self.key(pass) else {
            pass.run_here(forward);
            return self.check();
        };
        let mut graphs = lock(&self.graphs);
        let launched = match graphs.find(&key, self.card.epoch()) {
            None => {
                pass.run_here(forward);
                graphs.insert(key, Known::Seen);
                self.failure()
            }
            Some(Known::Recorded(graph)) => {
                self.card.replays.fetch_add(1, Ordering::Relaxed);
                graph.launch()
            }
            Some(Known::Seen) => {
                let graph = self.card.dev.capture(|| {
                    pass.run_here(forward);
                    self.failure()
                });
                graph.and_then(|graph| {
                    let launched = graph.launch();
                    graphs.insert(key, Known::Recorded(graph));
                    launched
                })
            }
        };
        launched.map_err(|e| self.card.error("running a pass", e))
    }

    fn mul_mat(&self, x: &Buffer, rows: Range<usize>, mats: &mut [(&Matrix, &mut Buffer)]) {
        let n_cols = mats.first().map_or(0, |(m, _)| m.n_cols());
        let x = x
            .card()
            .view()
            .slice(rows.start * n_cols..rows.end * n_cols);
        let mut mats: Vec<(&Packed, ViewMut<'_, f32>)> = mats
            .iter_mut()
            .map(|(matrix, out)| match matrix {
                Matrix::Cuda(packed) => (packed, out.card_mut().view_mut()),
                _ => panic!("a matrix of the host on a card"),
            })
            .collect();
        self.keep(cuda::mul_mat::mul_mat(
            &self.card.dev,
            x,
            rows.len(),
            &mut mats,
        ));
    }

    fn rms_norm(&self, x: &Buffer, w: &Buffer, eps: f32, out: &mut Buffer) {
        let (x, w, out) = (x.card().view(), w.card().view(), out.card_mut().view_mut());
        self.keep(cuda::rms_norm::rms_norm(&self.card.dev, x, w, eps, out));
    }

    fn rms_norm_in_place(&self, x: &mut Buffer, w: &Buffer, eps: f32) {
        let (x, w) = (x.card_mut().view_mut(), w.card().view());
        self.keep(cuda::rms_norm::rms_norm_in_place(&self.card.dev, x, w, eps));
    }

    fn rope(
        &self,
        kind: RopeKind,
        x: &mut Buffer,
        n_head: usize,
        head_dim: usize,
        rows: &Rows,
        inv_freq: &Buffer,
        mscale: f32,
    ) {
        let arena = lock(&self.arena);
        self.keep(cuda::rope::rope(
            &self.card.dev,
            kind,
            x.card_mut().view_mut(),
            n_head,
            head_dim,
            2 * inv_freq.len(),
            arena.pos(rows.on_card()),
            inv_freq.card().view(),
            mscale,
        ));
    }

    fn swiglu(&self, gate: &Buffer, up: &Buffer, out: &mut Buffer) {
        let (gate, up) = (gate.card().view(), up.card().view());
        let out = out.card_mut().view_mut();
        self.keep(cuda::swiglu::swiglu(&self.card.dev, gate, up, out));
    }

    fn add(&self, x: &mut Buffer, y: &Buffer) {
        let (x, y) = (x.card_mut().view_mut(), y.card().view());
        self.keep(cuda::add::add(&self.card.dev, x, y));
    }

    fn add_bias(&self, x: &mut Buffer, b: &Buffer) {
        let (x, b) = (x.card_mut().view_mut(), b.card().view());
        self.keep(cuda::add::add_bias(&self.card.dev, x, b));
    }

    fn keep_rows(&self, x: &mut Buffer, width: usize, rows: &Rows) {
        let dev = &self.card.dev;
        let n = rows.out.len() * width;
        let x = x.card_mut();
        if n > 0 {
            let mut gathered = lock(&self.gathered);
            if gathered.capacity() < n {
                match self.card.buffer(n) {
                    Ok(larger) => *gathered = larger,
                    Err(Error::Device { source, .. }) => return self.keep(Err(source)),
                    Err(_) => unreachable!("buffers fail by the device"),
                }
                self.card.moved();
            }
            gathered.set_len(n);
            let arena = lock(&self.arena);
            let wanted = arena.out(rows.on_card());
            let copied =
                cuda::get_rows::copy_rows(dev, x.view(), width, wanted, gathered.view_mut());
            let copied =
                copied.and_then(|()| dev.copy(gathered.view(), x.view_mut().slice_mut(0..n)));
            self.keep(copied);
        }
        x.set_len(n);
    }

    fn take_rows(&self, x: &Buffer, width: usize, rows: &Rows, out: &mut Buffer) {
        let arena = lock(&self.arena);
        let (x, steps) = (x.card().view(), arena.steps(rows.on_card()));
        let out = out.card_mut().view_mut();
        let dev = &self.card.dev;
        self.keep(cuda::get_rows::copy_rows(dev, x, width, steps, out));
    }

    fn put_rows(&self, from: &Buffer, width: usize, rows: &Rows, x: &mut Buffer) {
        let arena = lock(&self.arena);
        let (from, slots) = (from.card().view(), arena.node_slots(rows.on_card()));
        let x = x.card_mut().view_mut();
        let dev = &self.card.dev;
        self.keep(cuda::get_rows::put_rows(dev, from, width, slots, x));
    }

    fn best(
        &self,
        x: &Buffer,
        rows: &[usize],
        n_cols: usize,
        k: usize,
    ) -> Result<Vec<Vec<(u32, f32)>>> {
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else {
            return Ok(Vec::new());
        };
        let (dev, n) = (&self.card.dev, last + 1 - first);
        let error = |e| self.card.error("choosing the likeliest tokens", e);
        // All rows between: what few of them are not asked for costs less than a second launch.
        let x = x.card().view().slice(first * n_cols..(last + 1) * n_cols);
        let mut place = lock(&self.best);
        let place = room(dev, &mut place, n * 2 * k).map_err(error)?;
        let mut words = vec![0; n * 2 * k];
        top_k::top_k(dev, x, n_cols, k, place.slice_mut(0..words.len()))
            .and_then(|()| dev.read(place.slice(0..words.len()), &mut words))
            .map_err(error)?;
        let best = rows.iter().map(|row| {
            let (places, numbers) = words[(row - first) * 2 * k..][..2 * k].split_at(k);
            let pairs = places.iter().zip(numbers);
            let pairs = pairs.take_while(|(place, _)| **place != top_k::NONE);
            pairs.map(|(&at, &x)| (at, f32::from_bits(x))).collect()
        });
        Ok(best.collect())
    }

    fn write_cells(&self, layer: usize, rows: &Rows, k: &Buffer, v: &Buffer, s: &mut [&mut Store]) {
        let (arena, at) = (lock(&self.arena), rows.on_card());
        let slots = arena.slots(at, layer);
        let (k, v) = (k.card().view(), v.card().view());
        self.keep(at.pool.with(|pool| {
            let pool = pool.all_mut();
            attend::write_cells(&self.card.dev, s[0].layout(), pool, slots, k, v)
        }));
    }

    fn attend(
        &self,
        layer: usize,
        rows: &Rows,
        n_head: usize,
        q: &Buffer,
        stores: &[&Store],
        out: &mut Buffer,
    ) {
        let (arena, at) = (lock(&self.arena), rows.on_card());
        let layout = stores[0].layout();
        let scale = 1.0 / (layout.head_dim_k as f32).sqrt();
        let queries = attend::Queries {
            q: q.card().view(),
            seq: arena.seq(at),
            visible: arena.visible(at, layer),
        };
        self.keep(at.pool.with(|pool| {
            let cells = attend::Cells {
                pool: pool.all(),
                pages: arena.pages(at),
                tables: arena.tables(at, layer),
            };
            attend::attend(
                &self.card.dev,
                layout,
                n_head,
                scale,
                &queries,
                &cells,
                at.max_cells,
                at.max_ranked,
                out.card_mut().view_mut(),
            )
        }));
    }

    fn gates(&self, rule: Rule, beta: &mut Buffer, g: &mut Buffer, a: &Buffer, dt_bias: &Buffer) {
        let dev = &self.card.dev;
        let (beta, g) = (beta.card_mut(), g.card_mut());
        if rule == Rule::Delta {
            return self.keep(gates::sigmoid(dev, beta.view_mut()));
        }
        let (a, dt_bias) = (a.card().view(), dt_bias.card().view());
        let done = match rule {
            Rule::Ssd => {
                let ones = self.ones.view().slice(0..a.len());
                dev.copy(beta.view(), g.view_mut())
                    .and_then(|()| gates::decay(dev, beta.view_mut(), ones, dt_bias))
            }
            _ => gates::sigmoid(dev, beta.view_mut()),
        };
        self.keep(done.and_then(|()| gates::decay(dev, g.view_mut(), a, dt_bias)));
    }

    fn write_gates(
        &self,
        layer: usize,
        rows: &Rows,
        part: usize,
        beta: &Buffer,
        g: &Buffer,
        store: &mut Store,
    ) {
        let (arena, at) = (lock(&self.arena), rows.on_card());
        let (Some(pool), Some(layout)) = (&at.gate_pool, store.gates_layout()) else {
            return; // none of the rows has gates: all are sinks
        };
        let slots = arena.gates(at, layer, rows.parts[part].rows.clone());
        let (beta, g) = (beta.card().view(), g.card().view());
        self.keep(pool.with(|pool| {
            let pool = pool.all_mut();
            attend::write_cells(&self.card.dev, layout, pool, slots, beta, g)
        }));
    }

    fn read_cells(
        &self,
        layer: usize,
        rows: &Rows,
        part: usize,
        store: &Store,
        k: &mut Buffer,
        v: &mut Buffer,
        beta: &mut Buffer,
        g: &mut Buffer,
    ) {
        let (arena, at) = (lock(&self.arena), rows.on_card());
        let n = rows.parts[part].n_recalls();
        let (cells, gates) = arena.recalls(at, layer, part, n);
        let (k, v) = (k.card_mut().view_mut(), v.card_mut().view_mut());
        let (beta, g) = (beta.card_mut().view_mut(), g.card_mut().view_mut());
        let dev = &self.card.dev;
        let read = at
            .pool
            .with(|pool| attend::read_cells(dev, store.layout(), pool.all(), cells, k, v));
        let pool = at.gate_pool.as_ref().expect("cells recalled have gates");
        let layout = store.gates_layout().expect("cells recalled have gates");
        self.keep(read.and_then(|()| {
            pool.with(|pool| attend::read_cells(dev, layout, pool.all(), gates, beta, g))
        }));
    }

    fn recur(&self, step: Recurrence<'_>) {
        let dev = &self.card.dev;
        let width = step.n_head * step.head_dim;
        let q = step.q.card().view();
        let seq = recur::Recur {
            rule: step.rule,
            n_tokens: step.rows.len(),
            n_head: step.n_head,
            n_head_k: step.n_head_kv,
            head_dim_k: step.head_dim,
            head_dim_v: step.head_dim,
            q: q.slice(step.rows.start * width..step.rows.end * width),
            k: step.k.card().view(),
            v: step.v.card().view(),
            g: (step.rule != Rule::Delta).then(|| step.g.card().view()),
            beta: step.beta.card().view(),
            resets: None,
            from: Some(step.state.card().view()),
            state: step.next.card_mut().view_mut(),
            out: step.out.card_mut().view_mut(),
            q_stride: 0,
            k_stride: 0,
            v_stride: 0,
        };
        self.keep(recur::recur(dev, Form::Auto, &mut [seq]));
    }

    fn fold(&self, step: Fold<'_>) {
        self.keep(self.try_fold(step));
    }

    fn conv_silu(&self, x: &Buffer, taps: &Buffer, seqs: Vec<ConvSeq<'_>>, out: &mut Buffer) {
        let (x, taps, out) = (
            x.card().view(),
            taps.card().view(),
            out.card_mut().view_mut(),
        );
        let seqs = seqs.into_iter().map(|seq| gates::Conv {
            n: seq.n,
            past: seq.past.card().view(),
            next: seq.next.card_mut().view_mut(),
        });
        let mut seqs: Vec<_> = seqs.collect();
        self.keep(gates::conv_silu(&self.card.dev, x, taps, &mut seqs, out));
    }

    fn gate_heads(&self, x: &mut Buffer, gate: &Buffer, head_dim: usize) {
        let (x, gate) = (x.card_mut().view_mut(), gate.card().view());
        self.keep(gates::gate_heads(&self.card.dev, x, gate, head_dim));
    }

    fn add_heads(
        &self,
        x: &Buffer,
        w: &Buffer,
        n_head: usize,
        head_dim: usize,
        out: &mut Buffer,
        first: usize,
    ) {
        let (x, w) = (x.card().view(), w.card().view());
        let first = first * n_head * head_dim;
        let out = out.card_mut().view_mut();
        let out = out.slice_mut(first..first + x.len());
        self.keep(gates::project_heads(&self.card.dev, x, w, head_dim, out));
    }

    fn copy_cells(
        &self,
        layout: &PageLayout,
        from: &[&Page],
        to: &mut [Page],
        cells: &[(usize, usize)],
    ) {
        let slot = |page: &Page, cell: usize| {
            page.card().number * PAGE_CELLS as u32 + (cell % PAGE_CELLS) as u32
        };
        let slots = |f: &dyn Fn(&(usize, usize)) -> u32| -> std::result::Result<_, _> {
            let slots: Vec<u32> = cells.iter().map(f).collect();
            self.card.dev.upload(&slots)
        };
        let Some(first) = to.first() else { return };
        let pool = Arc::clone(&first.card().pool);
        let old = slots(&|&(old, _)| slot(from[old / PAGE_CELLS], old));
        let new = slots(&|&(_, new)| slot(&to[new / PAGE_CELLS], new));
        self.keep(old.and_then(|old| {
            let new = new?;
            pool.with(|pool| {
                let pool = pool.all_mut();
                attend::copy_cells(&self.card.dev, layout, pool, old.all(), new.all())
            })
        }));
    }
}
