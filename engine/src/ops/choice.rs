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
        let name = text.to_ascii_lowercase();
        // llama.cpp's names, `none` and `CUDA0`, mean the same.
        match &name[..] {
            "auto" => return Ok(DeviceChoice::Auto),
            "cpu" | "none" => return Ok(DeviceChoice::Cpu),
            "cuda" => return Ok(DeviceChoice::Cuda(0)),
            _ => {}
        }
        let n = name.strip_prefix("cuda:").or(name.strip_prefix("cuda"));
        match n.map(str::parse::<u16>) {
            Some(Ok(n)) => Ok(DeviceChoice::Cuda(n.into())),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("none", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:1", DeviceChoice::Cuda(1)),
            ("CUDA2", DeviceChoice::Cuda(2)),
        ] {
            assert_eq!(text.parse::<DeviceChoice>().ok(), Some(choice), "{text}");
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text}");
        }
    }
}
