//! `--device` and `-ngl`: what runs the model.

use anyhow::{Result, bail};
use mneme_engine::gguf::Gguf;
use mneme_engine::ops::{self, DeviceChoice, Ops};
use std::path::Path;

/// Layers on the card, llama.cpp's `-ngl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuLayers {
    /// As many as there are.
    All,
    /// This many.
    Some(usize),
}

/// `auto`, `all`, or a number; a negative one is `auto`.
pub fn parse_layers(text: &str) -> std::result::Result<GpuLayers, String> {
    match text {
        "auto" | "all" => Ok(GpuLayers::All),
        _ => match text.parse::<i64>() {
            Ok(n) => Ok(usize::try_from(n).map_or(GpuLayers::All, GpuLayers::Some)),
            Err(_) => Err(format!(
                "expected a number of layers, auto or all, got `{text}`"
            )),
        },
    }
}

/// Which device, and how much of the model on it.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Model")]
pub struct DeviceArgs {
    /// What runs the model: auto, cpu, cuda or cuda:N (short: -dev); auto is the first NVIDIA GPU
    /// where this build can drive one and there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Layers on the GPU: 0 for none, all for all (short: -ngl)
    #[arg(
        long,
        value_name = "N",
        alias = "gpu-layers",
        allow_hyphen_values = true,
        value_parser = parse_layers
    )]
    pub n_gpu_layers: Option<GpuLayers>,
}

impl DeviceArgs {
    /// Opens the device for the model in the file `model`, and says so when it was not named.
    pub fn open(&self, model: &Path, n_threads: usize) -> Result<Box<dyn Ops>> {
        let choice = match self.n_gpu_layers {
            Some(GpuLayers::Some(0)) => DeviceChoice::Cpu,
            _ => self.device,
        };
        let ops = ops::open(choice, n_threads)?;
        if ops.device().is_host() {
            if choice == DeviceChoice::Auto && self.n_gpu_layers.is_some() {
                eprintln!("-ngl: no GPU to use, everything runs on the CPU");
            }
            return Ok(ops);
        }
        if let Some(GpuLayers::Some(n)) = self.n_gpu_layers {
            let gguf = Gguf::open(model)?;
            let arch = gguf.str("general.architecture")?;
            let n_layer = gguf.u32(&format!("{arch}.block_count"))? as usize;
            if n < n_layer {
                bail!(
                    "-ngl {n}: the model has {n_layer} layers, and a model is run by one device; \
                     expected 0 or at least {n_layer}"
                );
            }
        }
        if choice == DeviceChoice::Auto {
            eprintln!("device: {}", ops.name());
        }
        Ok(ops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_as_llama_cpp_reads_them() {
        assert_eq!(parse_layers("0"), Ok(GpuLayers::Some(0)));
        assert_eq!(parse_layers("99"), Ok(GpuLayers::Some(99)));
        assert_eq!(parse_layers("-1"), Ok(GpuLayers::All));
        assert_eq!(parse_layers("all"), Ok(GpuLayers::All));
        assert!(parse_layers("some").is_err());
    }
}
