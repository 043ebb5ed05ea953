//! `--device` and `-ngl`: what runs the model.

use crate::bytes::human_bytes;
use anyhow::{Result, anyhow};
use mneme_engine::Error;
use mneme_engine::ops::{self, Bytes, Contexts, DeviceChoice, Layers, Ops, Request, Split};
use std::path::Path;

/// `auto`, `all`, or a number; a negative one is `auto`.
pub fn parse_layers(text: &str) -> std::result::Result<Layers, String> {
    match text {
        "auto" => Ok(Layers::Fit),
        "all" => Ok(Layers::Some(usize::MAX)),
        _ => match text.parse::<i64>() {
            Ok(n) => Ok(usize::try_from(n).map_or(Layers::Fit, Layers::Some)),
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
    /// Layers on the GPU, counted from the last and with the head; the CPU runs the others. 0: none,
    /// all: all, auto: as many as fit with their part of the context (short: -ngl) [default: auto]
    #[arg(
        long,
        value_name = "N",
        alias = "gpu-layers",
        allow_hyphen_values = true,
        value_parser = parse_layers
    )]
    pub n_gpu_layers: Option<Layers>,
}

impl DeviceArgs {
    /// Opens what will run the model in the file `model`, and says what goes where when that was
    /// not given.
    pub fn open(
        &self,
        model: &Path,
        adapter: Option<&Path>,
        n_threads: usize,
        contexts: Contexts,
    ) -> Result<Box<dyn Ops>> {
        let refuse = |e: Error| match e {
            Error::DeviceFull { .. } => anyhow!("{e}; fewer layers (-ngl) or cells (-c) take less"),
            // Of which file a key is missing.
            Error::Key { .. } => anyhow::Error::new(e).context(model.display().to_string()),
            e => e.into(),
        };
        let placed = ops::open(&Request {
            device: self.device,
            layers: self.n_gpu_layers.unwrap_or_default(),
            n_threads,
            model,
            adapter,
            contexts,
        });
        let placed = placed.map_err(refuse)?;
        let named = self.device != DeviceChoice::Auto;
        match (&placed.split, &placed.no_room, self.n_gpu_layers) {
            (Some(_), _, Some(Layers::Some(_))) if named => {}
            (Some(split), ..) => eprintln!("device: {}", describe(&placed.ops.name(), split)),
            (None, Some(no_room), _) => eprintln!("device: cpu, everything runs there: {no_room}"),
            (None, None, Some(Layers::Some(0)) | None) => {}
            (None, None, Some(_)) if named => {}
            (None, None, Some(_)) => eprintln!("-ngl: no GPU to use, everything runs on the CPU"),
        }
        Ok(placed.ops)
    }
}

/// What lies on one device, for people.
pub fn describe_bytes(b: &Bytes) -> String {
    format!(
        "weights {}, cells {}, work space {}",
        human_bytes(b.weights as f64),
        human_bytes(b.cells as f64),
        human_bytes(b.work as f64)
    )
}

/// What goes where, for people.
fn describe(name: &str, split: &Split) -> String {
    let mut text = format!(
        "{name}: {} of {} layers on the GPU: {} of {} free",
        split.n,
        split.n_layer,
        describe_bytes(&split.card),
        human_bytes(split.free as f64)
    );
    if split.n < split.n_layer {
        text += &format!("; on the CPU: {}", describe_bytes(&split.host));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_as_llama_cpp_reads_them() {
        assert_eq!(parse_layers("0"), Ok(Layers::Some(0)));
        assert_eq!(parse_layers("99"), Ok(Layers::Some(99)));
        assert_eq!(parse_layers("-1"), Ok(Layers::Fit));
        assert_eq!(parse_layers("auto"), Ok(Layers::Fit));
        assert_eq!(parse_layers("all"), Ok(Layers::Some(usize::MAX)));
        assert!(parse_layers("some").is_err());
    }

    #[test]
    fn what_goes_where_is_said_in_bytes() {
        let split = Split {
            n: 20,
            n_layer: 32,
            card: Bytes {
                weights: 3 << 30,
                cells: 320 << 20,
                work: 130 << 20,
            },
            host: Bytes {
                weights: 1 << 30,
                cells: 192 << 20,
                work: 130 << 20,
            },
            free: 5 << 30,
        };
        let text = describe("cuda:0 X", &split);
        assert_eq!(
            text,
            "cuda:0 X: 20 of 32 layers on the GPU: weights 3.0 GiB, cells 320.0 MiB, work space \
             130.0 MiB of 5.0 GiB free; on the CPU: weights 1.0 GiB, cells 192.0 MiB, work space \
             130.0 MiB"
        );
        let all = Split { n: 32, ..split };
        assert!(!describe("cuda:0 X", &all).contains("CPU"));
    }
}
