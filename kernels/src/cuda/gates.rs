//! The small ops around the recurrences of AHN and of the nodes trunk, on the device.

use super::device::Shape;
use super::{Device, Error, View, ViewMut, blocks};

#[repr(C)]
#[derive(Clone, Copy)]
struct GateArgs {
    x: u64,
    a: u64,
    bias: u64,
    n: u64,
    n_head: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ConvSequence {
    past: u64,
    next: u64,
    row: i32,
    n: i32,
    first: i32,
    unused: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ConvArgs {
    x: u64,
    taps: u64,
    out: u64,
    w: i32,
    n_sequences: i32,
    sequences: [ConvSequence; CONV_SEQUENCES],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GateHeadsArgs {
    x: u64,
    gate: u64,
    n_numbers: u64,
    d: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ProjectHeadsArgs {
    x: u64,
    w: u64,
    out: u64,
    n: i32,
    n_head: i32,
    d: i32,
}

const THREADS: usize = 256;
/// Tokens that a thread of the convolution walks.
const CONV_TOKENS: usize = 16;
/// Sequences of one launch of the convolution.
const CONV_SEQUENCES: usize = 64;

/// One thread for each of `n` numbers.
fn each(n: usize) -> Shape {
    Shape::row(blocks(n, THREADS, u32::MAX as usize), THREADS as u32)
}

/// `x[i] = 1 / (1 + exp(-x[i]))`.
///
/// # Errors
/// If the driver refuses.
pub fn sigmoid(dev: &Device, x: ViewMut<'_, f32>) -> Result<(), Error> {
    let args = GateArgs {
        x: dev.output(&x),
        a: 0,
        bias: 0,
        n: x.len() as u64,
        n_head: 1,
    };
    // SAFETY: the struct is the kernel's; it reads neither `a` nor `bias`.
    unsafe { dev.launch("sigmoid_gate", each(x.len()), &args) }
}

/// `x[t, h] = a[h] * ln(1 + exp(x[t, h] + bias[h]))`: log decays from their projections.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn decay(
    dev: &Device,
    x: ViewMut<'_, f32>,
    a: View<'_, f32>,
    bias: View<'_, f32>,
) -> Result<(), Error> {
    assert_eq!(a.len(), bias.len(), "decay: a and bias differ in length");
    assert!(
        !a.is_empty() && x.len().is_multiple_of(a.len()),
        "decay: {} numbers are not rows of {}",
        x.len(),
        a.len()
    );
    let args = GateArgs {
        x: dev.output(&x),
        a: dev.input(&a),
        bias: dev.input(&bias),
        n: x.len() as u64,
        n_head: a.len() as i32,
    };
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch("decay_gate", each(x.len()), &args) }
}

/// One sequence of a convolution.
pub struct Conv<'a> {
    /// Rows that are its own.
    pub n: usize,
    /// The three inputs before them `[3, w]`.
    pub past: View<'a, f32>,
    /// Becomes the last three of `past` and the rows `[3, w]`.
    pub next: ViewMut<'a, f32>,
}

/// `out = silu(conv(x))`: the causal convolution of each of `w` channels over its last four
/// inputs. `x` and `out` are `[rows, w]`, the rows of `seqs` one after the other; `taps` is
/// `[w, 4]` with the current input last.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn conv_silu(
    dev: &Device,
    x: View<'_, f32>,
    taps: View<'_, f32>,
    seqs: &mut [Conv<'_>],
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    let w = taps.len() / 4;
    assert!(
        w > 0 && taps.len() == 4 * w,
        "conv_silu: taps are not [w, 4]"
    );
    let rows: usize = seqs.iter().map(|s| s.n).sum();
    assert_eq!(x.len(), rows * w, "conv_silu: x is not [{rows}, {w}]");
    assert_eq!(x.len(), out.len(), "conv_silu: x and out differ in length");
    for s in seqs.iter_mut() {
        assert_eq!(s.past.len(), 3 * w, "conv_silu: past is not [3, {w}]");
        assert_eq!(s.next.len(), 3 * w, "conv_silu: next is not [3, {w}]");
        if s.n == 0 {
            dev.copy(s.past, s.next.reborrow())?;
        }
    }
    let mut row = 0;
    for seqs in seqs.chunks(CONV_SEQUENCES) {
        let mut args = ConvArgs {
            x: dev.input(&x),
            taps: dev.input(&taps),
            out: dev.output(&out),
            w: w as i32,
            n_sequences: 0,
            sequences: [ConvSequence::default(); CONV_SEQUENCES],
        };
        let mut runs = 0;
        for s in seqs.iter().filter(|s| s.n > 0) {
            args.sequences[args.n_sequences as usize] = ConvSequence {
                past: dev.input(&s.past),
                next: dev.output(&s.next),
                row: row as i32,
                n: s.n as i32,
                first: runs as i32,
                unused: 0,
            };
            args.n_sequences += 1;
            row += s.n;
            runs += s.n.div_ceil(CONV_TOKENS);
        }
        assert!(runs < 1 << 16, "conv_silu: {row} rows");
        let shape = Shape {
            grid: [w.div_ceil(THREADS) as u32, runs as u32, 1],
            block: [THREADS as u32, 1, 1],
            shared_bytes: 0,
        };
        // SAFETY: the struct is the kernel's, lengths are checked above.
        unsafe { dev.launch("conv_silu", shape, &args)? };
    }
    Ok(())
}

/// `x[i, :] *= silu(gate[i])` for rows of `d` numbers.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn gate_heads(
    dev: &Device,
    x: ViewMut<'_, f32>,
    gate: View<'_, f32>,
    d: usize,
) -> Result<(), Error> {
    assert_eq!(
        x.len(),
        gate.len() * d,
        "gate_heads: x is not [{}, {d}]",
        gate.len()
    );
    if x.is_empty() {
        return Ok(());
    }
    let args = GateHeadsArgs {
        x: dev.output(&x),
        gate: dev.input(&gate),
        n_numbers: x.len() as u64,
        d: d as i32,
    };
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch("gate_heads", each(x.len()), &args) }
}

/// `out[t, h, :] += x[t, h, :] w[h]`: a matrix of its own for every head. `x` and `out` are
/// `[n, n_head, d]`, `w` is `[n_head, d, d]`, from times to.
///
/// # Errors
/// If the driver refuses.
///
/// # Panics
/// If the lengths do not fit together.
pub fn project_heads(
    dev: &Device,
    x: View<'_, f32>,
    w: View<'_, f32>,
    d: usize,
    out: ViewMut<'_, f32>,
) -> Result<(), Error> {
    assert_eq!(x.len(), out.len(), "project_heads: x and out differ");
    assert!(
        d > 0 && !w.is_empty() && w.len().is_multiple_of(d * d),
        "project_heads: {} numbers are not matrices of {d} x {d}",
        w.len()
    );
    let n_head = w.len() / (d * d);
    assert!(
        x.len().is_multiple_of(n_head * d),
        "project_heads: {} numbers are not rows of {n_head} heads of {d}",
        x.len()
    );
    let n = x.len() / (n_head * d);
    let args = ProjectHeadsArgs {
        x: dev.input(&x),
        w: dev.input(&w),
        out: dev.output(&out),
        n: n as i32,
        n_head: n_head as i32,
        d: d as i32,
    };
    let shape = Shape {
        grid: [n.div_ceil(8) as u32, n_head as u32, 1],
        block: [d.next_multiple_of(32).min(THREADS) as u32, 1, 1],
        shared_bytes: 0,
    };
    // SAFETY: the struct is the kernel's, lengths are checked above.
    unsafe { dev.launch("project_heads", shape, &args) }
}
