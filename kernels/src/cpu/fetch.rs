//! Asking memory for weights before they are used, on x86-64: for one token a matrix is read as fast as
//! memory gives it, and the processor's own prefetch is not enough.

use crate::cpu::mul_mat::Panel;
use crate::dispatch::roomy_l1;
use crate::mul_mat::layout::{ROWS, VECTOR, panel_bytes, scales_offset, scales_step};
use std::arch::x86_64::*;
use std::ops::Range;

/// How far ahead of the vector form weights are fetched into a large L1 cache, in bytes.
const AHEAD_L1: usize = 4096;
/// How far ahead they are fetched into the L2 cache, where L1 is small.
const AHEAD_L2: usize = 8192;

/// Asks for `n` lines of weights some way behind `bytes`: into the L1 cache if it is large, else into
/// the L2 cache, since blocks of the K types are not read in order and 32 KiB lose what comes too
/// early.
#[inline(always)]
pub(crate) fn fetch(bytes: *const u8, n: usize) {
    // SAFETY: every x86-64 has it; a prefetch never faults and changes no value.
    unsafe {
        if roomy_l1() {
            for i in 0..n {
                _mm_prefetch::<_MM_HINT_T0>(bytes.wrapping_add(AHEAD_L1 + i * VECTOR).cast());
            }
        } else {
            for i in 0..n {
                _mm_prefetch::<_MM_HINT_T1>(bytes.wrapping_add(AHEAD_L2 + i * VECTOR).cast());
            }
        }
    }
}

/// Asks for the F16 scales of the block `ahead` blocks on, of the next panel after the last of
/// this one's `n`: they are a stream of their own, too thin for the hardware to follow.
#[inline(always)]
pub(crate) fn fetch_scales(
    scales: *const u8,
    b: usize,
    ahead: usize,
    n: usize,
    panel_bytes: usize,
) {
    let next = b + ahead;
    let at = if next < n {
        2 * ROWS * next
    } else {
        panel_bytes + 2 * ROWS * (next - n)
    };
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(scales.wrapping_add(at).cast()) }
}

/// Asks for what is some way behind half `half` of `blocks` of a panel: whole panels are asked for in
/// order, what is at their ends included, and behind a panel the one `skip` bytes further on. A core
/// has a few dozen requests on their way at once, so that asking for much at a time waits.
#[inline(always)]
pub(crate) fn fetch_blocks(p: &Panel<'_>, blocks: Range<usize>, half: usize, skip: usize) {
    let n = p.n_cols / p.ty.block_len();
    let bytes = panel_bytes(p.ty, p.n_cols).unwrap_or(0);
    let first = bytes * blocks.start / n / VECTOR;
    let end = (bytes * blocks.end / n).div_ceil(VECTOR);
    let middle = usize::midpoint(first, end);
    let lines = if half == 0 {
        first..middle
    } else {
        middle..end
    };
    let roomy = roomy_l1();
    for line in lines {
        let at = line * VECTOR + if roomy { AHEAD_L1 } else { AHEAD_L2 };
        let at = if at < bytes { at } else { at + skip };
        let at = p.bytes.wrapping_add(at).cast();
        // SAFETY: as above.
        unsafe {
            if roomy {
                _mm_prefetch::<_MM_HINT_T0>(at);
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at);
            }
        }
    }
    if half == 0 {
        return;
    }
    if scales_offset(p.ty, p.n_cols) > 0 && scales_step(p.ty) == 2 * ROWS {
        let ahead = if p.ty.block_len() == 32 { 16 } else { 3 };
        for b in blocks.step_by(VECTOR / (2 * ROWS)) {
            fetch_scales(p.scales(), b, ahead, n, bytes + skip);
        }
    }
}
