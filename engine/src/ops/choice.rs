//! Which device runs a model.

use super::{Cpu, Ops};
use crate::error::{Error, Result};
use std::str::FromStr;

/// A device as `--device` names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first NVIDIA card if there is one, else the host.
    #[default]
    Auto,
    /// The host.
    Cpu,
    /// This NVIDIA card.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeviceChoice> {
        match text.split_once(':').unwrap_or((text, "0")) {
            ("auto", "0") => Ok(DeviceChoice::Auto),
            ("cpu", "0") => Ok(DeviceChoice::Cpu),
            ("cuda", n) if n.parse::<u16>().is_ok() => {
                Ok(DeviceChoice::Cuda(n.parse().unwrap_or(0)))
            }
            _ => Err(Error::DeviceName(text.into())),
        }
    }
}

/// Opens the verbs on the device of `choice`, with `n_threads` threads for what runs on the host.
///
/// # Errors
/// When a card is asked for that is not there, or that this build has no code for.
pub fn open(choice: DeviceChoice, n_threads: usize) -> Result<Box<dyn Ops>> {
    let host = Cpu::new(n_threads);
    match choice {
        DeviceChoice::Cpu => Ok(Box::new(host)),
        // The emulated card of tests is for whoever asks for it.
        #[cfg(all(feature = "cuda", not(feature = "cuda-host")))]
        DeviceChoice::Auto if mneme_kernels::cuda::Device::count() > 0 => {
            Ok(Box::new(super::Cuda::open(0, host)?))
        }
        DeviceChoice::Auto => Ok(Box::new(host)),
        #[cfg(feature = "on-card")]
        DeviceChoice::Cuda(n) => Ok(Box::new(super::Cuda::open(n, host)?)),
        #[cfg(not(feature = "on-card"))]
        DeviceChoice::Cuda(n) => Err(Error::NoCuda(n)),
    }
}
