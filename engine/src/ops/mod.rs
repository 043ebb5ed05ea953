//! The verbs a model is written in.
//!
//! Models and memories call [`Ops`] and nothing below it, over [`Buffer`]s and [`Page`]s that lie
//! where the verbs run. [`Cpu`] is the implementation on the host; it is also where
//! `mneme_kernels` and `ggml_sys` meet. `Cuda`, with the feature `cuda`, is the one on NVIDIA cards.

mod best;
mod choice;
mod cpu;
#[cfg(feature = "on-card")]
mod cuda;
mod device;
mod room;
mod rows;

pub use best::{MOST_BEST, best_of};
pub use choice::{DeviceChoice, Layers, Placed, Request, Split, open};
pub(crate) use cpu::sigmoid;
pub use cpu::{Cpu, Matrix, Table, copied_bytes};
#[cfg(feature = "on-card")]
pub use cuda::{Cuda, card_bytes};
pub use device::{Buffer, Device, Page, live_page_bytes};
pub use mneme_kernels::recur::Rule;
pub use mneme_kernels::rope::RopeKind;
pub use room::{Bytes, CELLS, Contexts, Room, SPARE};
pub use rows::{Part, Rows};

use crate::error::Result;
use crate::memory::store::Store;
use crate::model::{Forward, Pass};
use mneme_kernels::attend::PageLayout;
use std::ops::Range;

/// A step of a recurrent memory over tokens of one sequence; see [`mneme_kernels::recur`].
pub struct Recurrence<'a> {
    /// Update rule.
    pub rule: Rule,
    /// Rows of `q` whose tokens read the state, one for each token written.
    pub rows: Range<usize>,
    /// Query heads, and states.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
    /// Dimensions of a query, a key and a value.
    pub head_dim: usize,
    /// Queries of the whole pass `[n, n_head, head_dim]`.
    pub q: &'a Buffer,
    /// Keys written `[rows, n_head_kv, head_dim]`.
    pub k: &'a Buffer,
    /// Values written `[rows, n_head_kv, head_dim]`.
    pub v: &'a Buffer,
    /// Write strengths `[rows, n_head]`.
    pub beta: &'a Buffer,
    /// Log decays `[rows, n_head]`; not looked at by [`Rule::Delta`].
    pub g: &'a Buffer,
    /// State before the first token `[n_head, head_dim, head_dim]`.
    pub state: &'a Buffer,
    /// State after the last token.
    pub next: &'a mut Buffer,
    /// What was read `[rows, n_head, head_dim]`.
    pub out: &'a mut Buffer,
}

/// Tokens folded one after the other into the recurrent memories of their sequences by the gated
/// delta rule: however they are cut into calls, and whatever other sequences are in a call, the bits
/// are the same.
pub struct Fold<'a> {
    /// Heads, and states.
    pub n_head: usize,
    /// Dimensions of a query, a key and a value.
    pub head_dim: usize,
    /// Queries, keys and values, not yet normalised `[rows, 3, n_head, head_dim]`.
    pub qkv: &'a Buffer,
    /// Write strengths `[rows, n_head]`.
    pub beta: &'a Buffer,
    /// Log decays `[rows, n_head]`.
    pub g: &'a Buffer,
    /// The sequences, in the order of their rows.
    pub seqs: Vec<FoldSeq<'a>>,
    /// What was read `[rows, n_head, head_dim]`.
    pub out: &'a mut Buffer,
}

/// One sequence of a [`Fold`].
pub struct FoldSeq<'a> {
    /// Its tokens, one row each.
    pub n: usize,
    /// Tokens of its own before which the state starts anew from zero, ascending.
    pub resets: &'a [usize],
    /// State before the first token `[n_head, head_dim, head_dim]`.
    pub state: &'a Buffer,
    /// State after the last token.
    pub next: &'a mut Buffer,
}

/// One sequence of a causal convolution of `w` channels; see [`Ops::conv_silu`].
pub struct ConvSeq<'a> {
    /// Its tokens, one row each.
    pub n: usize,
    /// The three inputs before them `[3, w]`.
    pub past: &'a Buffer,
    /// Becomes the last three inputs.
    pub next: &'a mut Buffer,
}

/// Best rates of a device, measured.
#[derive(Clone, Debug)]
pub struct Peak {
    /// Bytes per second read from its memory; on a card, read and written in a copy.
    pub read: f64,
    /// Operations per second of its fastest matrix or vector units that weights run on.
    pub matrix: f64,
    /// Their number format.
    pub format: &'static str,
    /// Everything that was measured, by name, per second.
    pub rates: Vec<(&'static str, f64)>,
}

/// The verbs. Shapes are checked by each; a buffer of another device is a broken invariant.
///
/// Verbs return before a device other than the host has run them, in the order they were called;
/// what goes wrong there comes back from [`Ops::run`] or from reading a buffer.
pub trait Ops: Send + Sync {
    /// The device in words, for people.
    fn name(&self) -> String;

    /// What the device can do at most, measured now.
    fn peak(&self) -> Result<Peak>;

    /// Where the buffers, matrices and pages of these verbs live.
    fn device(&self) -> &Device;

    /// The host's threads: for loading, and for the small parts of a memory that run there.
    fn host(&self) -> &Cpu;

    /// First layer of a model that these verbs run, 0 unless the model is split: the layers before
    /// it run on [`Ops::host`]. The head is always these verbs'.
    fn first_layer(&self) -> usize;

    /// Refuses weights of `n_bytes` that the device has no room for.
    fn check_room(&self, n_bytes: u64) -> Result<()>;

    /// Makes `table` ready for [`Ops::mul_mat`].
    fn matrix(&self, table: Table) -> Result<Matrix>;

    /// Sends what the rows of a pass have of their own to where the verbs read it.
    fn begin(&self, rows: &mut Rows, stores: &[&Store]) -> Result<()>;

    /// Runs the layers that a pass is at, all of which are these verbs', by [`Pass::run_here`] or a
    /// recording of it; its rows have begun.
    fn run(&self, pass: &mut Pass<'_>, forward: Forward) -> Result<()>;

    /// `out_m[t, r] = sum_c w_m[r, c] x[t, c]` for several matrices over the same `rows` of `x`
    /// `[n, n_cols]`.
    fn mul_mat(&self, x: &Buffer, rows: Range<usize>, mats: &mut [(&Matrix, &mut Buffer)]);

    /// `x / rms(x) * w` per row of `w.len()` values.
    fn rms_norm(&self, x: &Buffer, w: &Buffer, eps: f32, out: &mut Buffer);

    /// [`Ops::rms_norm`] over `x` itself.
    fn rms_norm_in_place(&self, x: &mut Buffer, w: &Buffer, eps: f32);

    /// Rotates the first `2 * inv_freq.len()` values of each head of `x` `[n, n_head, head_dim]`
    /// to the positions of `rows`.
    fn rope(
        &self,
        kind: RopeKind,
        x: &mut Buffer,
        n_head: usize,
        head_dim: usize,
        rows: &Rows,
        inv_freq: &Buffer,
        mscale: f32,
    );

    /// `silu(gate) * up`.
    fn swiglu(&self, gate: &Buffer, up: &Buffer, out: &mut Buffer);

    /// `x += y`.
    fn add(&self, x: &mut Buffer, y: &Buffer);

    /// `x[t] += b` for every row.
    fn add_bias(&self, x: &mut Buffer, b: &Buffer);

    /// Keeps the rows of `x` `[n, width]` whose logits are wanted.
    fn keep_rows(&self, x: &mut Buffer, width: usize, rows: &Rows);

    /// `out[i] = x[rows.steps[i]]` for rows of `x` `[n, width]`.
    fn take_rows(&self, x: &Buffer, width: usize, rows: &Rows, out: &mut Buffer);

    /// `x[rows.node_slots[i]] = from[i]` for rows of `x` `[n, width]`.
    fn put_rows(&self, from: &Buffer, width: usize, rows: &Rows, x: &mut Buffer);

    /// The `k` largest numbers of some `rows` of `x` `[n, n_cols]`, ascending, with their places:
    /// largest first, of equals the lowest place. NaN and minus infinity do not count, so a row may
    /// have fewer. `k` is in `1..=`[`MOST_BEST`]; waits for the device.
    fn best(
        &self,
        x: &Buffer,
        rows: &[usize],
        n_cols: usize,
        k: usize,
    ) -> Result<Vec<Vec<(u32, f32)>>>;

    /// Writes keys and values `[n, n_head_kv, head_dim]` of one layer to the cells of `rows`, whose
    /// sequences' cells are `stores`.
    fn write_cells(
        &self,
        layer: usize,
        rows: &Rows,
        k: &Buffer,
        v: &Buffer,
        stores: &mut [&mut Store],
    );

    /// Soft-max attention of `q` `[n, n_head, head_dim]` over what each row sees of one layer; see
    /// [`mneme_kernels::attend`].
    fn attend(
        &self,
        layer: usize,
        rows: &Rows,
        n_head: usize,
        q: &Buffer,
        stores: &[&Store],
        out: &mut Buffer,
    );

    /// Projections of one token row each to its gates, in place: write strength from `beta`
    /// `[n, n_head]` and log decay from `g` `[n, n_head]`, with `dt_bias` and `a` `[n_head]` where
    /// the rule has them.
    ///
    /// Gated delta: `sigmoid(beta)`, `a softplus(g + dt_bias)`. Delta: `sigmoid(beta)`, 0. Ssd
    /// (Mamba2): `delta = softplus(beta + dt_bias)`, `a delta`.
    fn gates(&self, rule: Rule, beta: &mut Buffer, g: &mut Buffer, a: &Buffer, dt_bias: &Buffer);

    /// Keeps the gates `[rows of the part, n_head]` beside the raw cells that the rows of `part`
    /// are written to.
    fn write_gates(
        &self,
        layer: usize,
        rows: &Rows,
        part: usize,
        beta: &Buffer,
        g: &Buffer,
        store: &mut Store,
    );

    /// Reads the cells that `part` recalls, with their gates.
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
    );

    /// The gated delta rule and its relatives.
    fn recur(&self, step: Recurrence<'_>);

    /// The recurrence of the compressor of `nodes`.
    fn fold(&self, step: Fold<'_>);

    /// `silu` of the causal convolution of each of the `w` channels of `x` `[rows, w]`, the rows of
    /// `seqs` one after the other, over its sequence's last four inputs, with `taps` `[w, 4]`, the
    /// current input's last.
    fn conv_silu(&self, x: &Buffer, taps: &Buffer, seqs: Vec<ConvSeq<'_>>, out: &mut Buffer);

    /// `x[t, h] *= silu(gate[t, h])` for every head of `head_dim` values.
    fn gate_heads(&self, x: &mut Buffer, gate: &Buffer, head_dim: usize);

    /// `out[t, h] += x[t, h] w[h]` with `w` `[n_head, in, out]`, for heads of `head_dim` values;
    /// `out` from row `first` on.
    fn add_heads(
        &self,
        x: &Buffer,
        w: &Buffer,
        n_head: usize,
        head_dim: usize,
        out: &mut Buffer,
        first: usize,
    );

    /// Copies cells between pages, bytes as they are: from cell `old` of `from` to cell `new` of
    /// `to` for each `(old, new)`, counted over pages.
    fn copy_cells(
        &self,
        layout: &PageLayout,
        from: &[&Page],
        to: &mut [Page],
        cells: &[(usize, usize)],
    );
}

impl dyn Ops + '_ {
    /// The verbs that run `layer`, and that its weights, cells and states lie with.
    pub fn of_layer(&self, layer: usize) -> &dyn Ops {
        match layer < self.first_layer() {
            true => self.host(),
            false => self,
        }
    }
}

impl<T: Ops + 'static> From<T> for Box<dyn Ops> {
    fn from(ops: T) -> Box<dyn Ops> {
        Box::new(ops)
    }
}
