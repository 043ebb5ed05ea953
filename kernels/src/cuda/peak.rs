//! What a device can do at most, as kernels of this crate could reach it; see [`crate::peak`].

use super::device::Shape;
use super::{Device, Error};
use std::time::Instant;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    out: u64,
    n_rounds: i32,
}

/// Rates of a device, measured.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Bytes per second that a copy inside device memory reads and writes together.
    pub copy: f64,
    /// F16 operations per second of the matrix units through the instructions used here
    /// (`mma.sync`), sums in F32, operands in registers.
    pub mma: f64,
}

impl Peak {
    /// Measures, best of five rounds each, with buffers of `bytes` (several times the
    /// second-level cache).
    ///
    /// # Errors
    /// If memory is short or the driver refuses.
    pub fn measure(dev: &Device, bytes: usize) -> Result<Peak, Error> {
        let from = dev.zeroed::<u8>(bytes)?;
        let mut to = dev.zeroed::<u8>(bytes)?;
        let n_blocks = 4 * dev.n_multiprocessors();
        let mut out = dev.alloc::<f32>(256 * n_blocks)?;
        let args = Args {
            out: dev.output(&out.all_mut()),
            n_rounds: 4096,
        };
        let shape = Shape::row(n_blocks as u32, 256);
        // Eight warps a block, 16 products a round, 2 * 16 * 8 * 16 operations a product.
        let operations = (n_blocks * 8 * 16 * 4096) as f64 * f64::from(args.n_rounds);
        let mut peak = Peak {
            copy: 0.0,
            mma: 0.0,
        };
        for _ in 0..5 {
            let rate = |work: f64, f: &mut dyn FnMut() -> Result<(), Error>| {
                dev.synchronize()?;
                let start = Instant::now();
                f()?;
                dev.synchronize()?;
                Ok::<f64, Error>(work / start.elapsed().as_secs_f64())
            };
            let copy = rate(2.0 * bytes as f64, &mut || {
                dev.copy(from.all(), to.all_mut())
            })?;
            // SAFETY: the struct is the kernel's, `out` has a number for each thread.
            let mma = rate(operations, &mut || unsafe {
                dev.launch("peak_mma", shape, &args)
            })?;
            peak = Peak {
                copy: peak.copy.max(copy),
                mma: peak.mma.max(mma),
            };
        }
        Ok(peak)
    }
}
