//! Which device runs a model, or which two.

#[cfg(feature = "on-card")]
use super::Room;
use super::{Bytes, Contexts, Cpu, Ops};
use crate::error::{Error, Result};
use std::path::Path;
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

/// How many of a model's layers a card runs, counted from the last: `-ngl`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layers {
    /// As many as it has room for.
    #[default]
    Fit,
    /// This many, or all if there are fewer.
    Some(usize),
}

/// A model to find a place for.
pub struct Request<'a> {
    /// The device.
    pub device: DeviceChoice,
    /// Layers on the card.
    pub layers: Layers,
    /// Threads for what runs on the host.
    pub n_threads: usize,
    /// The model's file.
    pub model: &'a Path,
    /// A memory adapter that will be laid over it.
    pub adapter: Option<&'a Path>,
    /// The contexts that will be held beside it.
    pub contexts: Contexts,
}

/// The verbs that run a model.
pub struct Placed {
    /// They.
    pub ops: Box<dyn Ops>,
    /// What lies where, when a card is among them.
    pub split: Option<Split>,
    /// Why the card that is there is not, when nobody asked for it.
    pub no_room: Option<Error>,
}

/// How a model lies on a card and the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Layers on the card: the last ones.
    pub n: usize,
    /// Layers of the model.
    pub n_layer: usize,
    /// Bytes on the card.
    pub card: Bytes,
    /// Bytes on the host.
    pub host: Bytes,
    /// Bytes that were free on the card.
    pub free: u64,
}

/// Opens the verbs for the model of `request`. On a card, memory for the cells of its contexts is
/// taken at once.
///
/// # Errors
/// When a card is asked for that is not there, that this build has no code for, or that has no
/// room; when a card is to be used and the model's file cannot be read.
pub fn open(request: &Request<'_>) -> Result<Placed> {
    let device = match request.layers {
        Layers::Some(0) => DeviceChoice::Cpu,
        _ => request.device,
    };
    match device {
        // The emulated card of tests is for whoever asks for it.
        #[cfg(feature = "on-card")]
        DeviceChoice::Auto
            if !cfg!(feature = "cuda-host") && mneme_kernels::cuda::Device::count() > 0 =>
        {
            match on_card(0, request) {
                Err(full @ Error::DeviceFull { .. }) if request.layers == Layers::Fit => {
                    Ok(Placed {
                        no_room: Some(full),
                        ..on_host(request)
                    })
                }
                placed => placed,
            }
        }
        DeviceChoice::Cpu | DeviceChoice::Auto => Ok(on_host(request)),
        #[cfg(feature = "on-card")]
        DeviceChoice::Cuda(n) => on_card(n, request),
        #[cfg(not(feature = "on-card"))]
        DeviceChoice::Cuda(n) => Err(Error::NoCuda(n)),
    }
}

fn on_host(request: &Request<'_>) -> Placed {
    Placed {
        ops: Box::new(Cpu::new(request.n_threads)),
        split: None,
        no_room: None,
    }
}

#[cfg(feature = "on-card")]
fn on_card(n: usize, request: &Request<'_>) -> Result<Placed> {
    use crate::engine::{N_UBATCH, N_UBATCH_CARD};
    use crate::gguf::Gguf;
    use crate::hparams::Hparams;

    let card = super::Cuda::open(n, Cpu::new(request.n_threads))?;
    let gguf = Gguf::open(request.model)?;
    let adapter = request.adapter.map(Gguf::open).transpose()?;
    let known: Vec<_> = crate::model::ARCHS.iter().map(|a| a.name).collect();
    let hp = Hparams::from_gguf(&gguf, request.model, &known)?;
    let rows = [N_UBATCH, N_UBATCH_CARD];
    let contexts = &request.contexts;
    let room = Room::of(
        &gguf,
        adapter.as_ref(),
        &hp,
        contexts,
        rows,
        super::card_bytes,
    );
    let free = card.free_bytes()?;
    let asked = match request.layers {
        Layers::Fit => None,
        Layers::Some(n) => Some(n),
    };
    let n = room.place(asked, &card.name(), free)?;
    let pages = (contexts.pages(&hp) as usize).saturating_mul(n);
    let card = card.from_layer(hp.n_layer - n);
    Ok(Placed {
        ops: Box::new(card.hold_pages(&contexts.layout(&hp), pages)?),
        split: Some(Split {
            n,
            n_layer: hp.n_layer,
            card: room.card(n),
            host: room.host(n),
            free,
        }),
        no_room: None,
    })
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
