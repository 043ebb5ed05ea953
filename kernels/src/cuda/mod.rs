//! The ops on an NVIDIA GPU: buffers of device memory in, buffers out.
//!
//! One op is one file here (its public function, shapes and checks) and one `.cu` file of the
//! same name in `kernels/cuda/`. Ops have the names, the order of arguments and the meaning of
//! those on the host, with a [`Device`] in place of the thread pool. Everything runs in call order
//! on the device's one stream and is only waited for by [`Device::read`] and
//! [`Device::synchronize`]; whatever may differ from step to step (positions, visibility, page
//! tables) is read from device buffers, so that a captured [`Graph`] of a step can be replayed.
//!
//! Whatever the buffers hold, no kernel reads or writes outside of them: indices that come from
//! device memory are checked there.
//!
//! With the feature `cuda-host` the device is an emulation that runs the same kernel sources on
//! the host, thread by thread. It exists for tests on machines without a GPU and is slower than
//! the scalar oracle; nothing chooses it at run time.

pub mod add;
pub mod attend;
mod buffer;
mod device;
pub mod gates;
pub mod get_rows;
pub mod mul_mat;
pub mod peak;
pub mod recur;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
pub mod top_k;

#[cfg(feature = "cuda-host")]
#[path = "host.rs"]
mod driver;
#[cfg(not(feature = "cuda-host"))]
mod driver;

pub use buffer::{Buffer, Plain, View, ViewMut};
pub use device::{Device, Graph};

/// Why a device did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver's library is not on this machine.
    #[error(
        "no NVIDIA driver found (libcuda): this machine has no GPU, or its driver is not installed"
    )]
    NoDriver,
    /// There are fewer devices.
    #[error("no GPU {n}: this machine has {count}")]
    NoDevice {
        /// Device asked for.
        n: usize,
        /// Devices there are.
        count: usize,
    },
    /// The driver refused.
    #[error("{what}: {why}")]
    Driver {
        /// What was being done.
        what: String,
        /// The driver's words.
        why: String,
    },
    /// Device memory is exhausted.
    #[error("out of GPU memory: {asked} bytes asked for, {free} free")]
    OutOfMemory {
        /// Bytes asked for.
        asked: usize,
        /// Bytes the driver says are free.
        free: usize,
    },
    /// Not possible between the beginning and the end of a capture.
    #[error("{what} is not possible while a graph is being captured")]
    Capturing {
        /// What was asked for.
        what: &'static str,
    },
    /// A weight matrix does not fit its description.
    #[error(transparent)]
    Matrix(#[from] crate::mul_mat::Error),
}

/// Blocks of `threads` that cover `n` numbers, at most `most`: the rest is done by striding.
fn blocks(n: usize, threads: usize, most: usize) -> u32 {
    n.div_ceil(threads).clamp(1, most) as u32
}
