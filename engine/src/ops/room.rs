//! What a model and its contexts take, layer by layer, and how many of the layers a card has room
//! for.

use super::copied_bytes;
use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorInfo};
use crate::hparams::Hparams;
use crate::weights::layer_of;
use mneme_kernels::attend::{KvType, PAGE_CELLS, PageLayout};

/// Cells of a context that nobody gave a length.
pub const CELLS: usize = 4096;
/// Bytes left alone when the number of layers is not given: for other programs, recordings, and
/// what the driver keeps for itself.
pub const SPARE: u64 = 512 << 20;

/// The contexts that will be held beside the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contexts {
    /// How many there are.
    pub n: usize,
    /// Cells per layer that each one holds at most; 0 for as many as the model was trained with, but
    /// no more than [`CELLS`].
    pub n_cells: usize,
    /// Type of keys.
    pub type_k: KvType,
    /// Type of values.
    pub type_v: KvType,
    /// Most rows of a pass; 0 for what suits the device.
    pub n_ubatch: usize,
    /// Whether logits of every row are wanted, not only of the last one of each context.
    pub all_logits: bool,
}

impl Default for Contexts {
    fn default() -> Contexts {
        Contexts {
            n: 1,
            n_cells: 0,
            type_k: KvType::F16,
            type_v: KvType::F16,
            n_ubatch: 0,
            all_logits: false,
        }
    }
}

impl Contexts {
    /// Cells per layer of one context of a model.
    pub fn cells(&self, hp: &Hparams) -> usize {
        match self.n_cells {
            0 => CELLS.min(hp.n_ctx_train),
            n => n,
        }
    }

    /// Pages of one layer that hold the cells of all contexts: each of the two regions may leave
    /// one partly filled.
    pub fn pages(&self, hp: &Hparams) -> u64 {
        let pages = self.cells(hp).div_ceil(PAGE_CELLS) as u64 + 2;
        pages.saturating_mul(self.n as u64)
    }

    /// How keys and values are laid out.
    pub fn layout(&self, hp: &Hparams) -> PageLayout {
        PageLayout {
            n_head_kv: hp.n_head_kv,
            head_dim_k: hp.head_dim,
            head_dim_v: hp.head_dim,
            ty_k: self.type_k,
            ty_v: self.type_v,
        }
    }
}

/// Bytes on one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Bytes {
    /// Tensors as the device holds them.
    pub weights: u64,
    /// Keys, values and recurrent states of all contexts.
    pub cells: u64,
    /// Activations and logits of one pass.
    pub work: u64,
}

impl Bytes {
    /// All of it.
    pub fn total(&self) -> u64 {
        let both = self.weights.saturating_add(self.cells);
        both.saturating_add(self.work)
    }
}

/// What there must be room for, by layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Weights of each layer on a card.
    pub on_card: Vec<u64>,
    /// The same on the host.
    pub on_host: Vec<u64>,
    /// The last norm, the head and the map of `concepts`, which are on the card when any layer is.
    pub head: u64,
    /// The compressor of `nodes`, which is where the first layer is.
    pub compressor: u64,
    /// Keys, values and states of all contexts in one layer.
    pub cells: u64,
    /// Activations and logits of one pass of a split model, and of one that is all on a card.
    pub work: [u64; 2],
}

impl Room {
    /// What the model `gguf` with its `adapter` takes. `card_bytes` says what a matrix takes on a
    /// card.
    pub fn of(
        gguf: &Gguf,
        adapter: Option<&Gguf>,
        hp: &Hparams,
        contexts: &Contexts,
        n_ubatch: [usize; 2],
        card_bytes: impl Fn(&TensorInfo) -> u64,
    ) -> Room {
        let mut room = Room {
            on_card: vec![0; hp.n_layer],
            on_host: vec![0; hp.n_layer],
            ..Room::default()
        };
        let tied = gguf.tensor("output.weight").is_none();
        let (mut recurs, mut adapts) = (false, false);
        let files = std::iter::once(gguf).chain(adapter);
        for tensor in files.flat_map(|file| file.tensors()) {
            let name = tensor.name.as_str();
            // Vectors become F32, as does what AHN projects heads by.
            let values = tensor.dims.len() < 2 || name.ends_with(".ahn_out.weight");
            let [card, host] = match values {
                true => [4 * tensor.n_elements(); 2],
                false => {
                    let (rows, cols) = (tensor.n_rows() as usize, tensor.n_cols() as usize);
                    let host = copied_bytes(tensor.ty, rows, cols).map(|n| n as u64);
                    [card_bytes(tensor), host.unwrap_or(tensor.n_bytes)]
                }
            };
            match layer_of(name) {
                Some(il) if il < hp.n_layer => {
                    room.on_card[il] += card;
                    room.on_host[il] += host;
                    recurs |= name.ends_with(".ahn_out.weight");
                }
                _ if name == "output.weight" || name == "output_norm.weight" => room.head += card,
                _ if tied && name == "token_embd.weight" => room.head += card,
                _ if name == "mem.query.weight" => {}
                _ if name.starts_with("mem.ce_proj.") => {
                    adapts = true;
                    room.head += card;
                }
                _ if name.starts_with("mem.") && !name.starts_with("mem.decider.") => {
                    room.compressor += card;
                }
                _ => {}
            }
        }
        let page = contexts.layout(hp).page_bytes() as u64;
        room.cells = contexts.pages(hp).saturating_mul(page);
        if recurs {
            // A state, the one after the pass, and the gates of every cell.
            let state = (hp.n_head * hp.head_dim * hp.head_dim) as u64;
            let states = (contexts.n as u64).saturating_mul(2 * 4 * state);
            let page = (PAGE_CELLS * 2 * 4 * hp.n_head) as u64;
            let gates = contexts.pages(hp).saturating_mul(page);
            room.cells = room.cells.saturating_add(states).saturating_add(gates);
        }
        // Residual stream, block input, queries, attention output, keys, values, feed-forward, and
        // what products are computed from.
        let mut row = 4 * hp.n_embd + 4 * hp.n_ff + 2 * (hp.n_head + hp.n_head_kv) * hp.head_dim;
        if adapts {
            // What a compressor of contexts adds to products.
            row += hp.n_ff.max(hp.n_embd).max(hp.n_head * hp.head_dim);
        }
        room.work = n_ubatch.map(|n| {
            let n = match contexts.n_ubatch {
                0 => n,
                given => given,
            };
            let n_out = match contexts.all_logits {
                true => n,
                false => contexts.n,
            };
            4 * (n * row + n_out * hp.n_vocab) as u64
        });
        room
    }

    /// Layers of the model.
    pub fn n_layer(&self) -> usize {
        self.on_card.len()
    }

    /// Bytes on the card when it runs the last `n` layers.
    pub fn card(&self, n: usize) -> Bytes {
        let n = n.min(self.n_layer());
        if n == 0 {
            return Bytes::default();
        }
        let all = n == self.n_layer();
        let layers: u64 = self.on_card[self.n_layer() - n..].iter().sum();
        Bytes {
            weights: self.head + layers + if all { self.compressor } else { 0 },
            cells: self.cells.saturating_mul(n as u64),
            work: self.work[usize::from(all)],
        }
    }

    /// Bytes on the host when a card runs the last `n` layers. The vocabulary's rows stay in the
    /// file.
    pub fn host(&self, n: usize) -> Bytes {
        let n = self.n_layer() - n.min(self.n_layer());
        if n == 0 {
            return Bytes::default();
        }
        let layers: u64 = self.on_host[..n].iter().sum();
        let head = if n == self.n_layer() { self.head } else { 0 };
        Bytes {
            weights: layers + self.compressor + head,
            cells: self.cells.saturating_mul(n as u64),
            work: self.work[0],
        }
    }

    /// Most of the last layers that fit `free` bytes, with [`SPARE`] left.
    pub fn n_fit(&self, free: u64) -> usize {
        let fits = |n: &usize| self.card(*n).total().saturating_add(SPARE) <= free;
        (1..=self.n_layer()).rev().find(fits).unwrap_or(0)
    }

    /// How many of the last layers the card called `device` runs: as many as are `asked` for, else
    /// as many as fit its `free` bytes.
    ///
    /// # Errors
    /// [`Error::DeviceFull`] when they do not fit, or not even one does.
    pub fn place(&self, asked: Option<usize>, device: &str, free: u64) -> Result<usize> {
        let n = match asked {
            Some(n) => n.min(self.n_layer()),
            None => self.n_fit(free),
        };
        let (tried, spare) = match asked {
            Some(_) => (n, 0),
            None => (n.max(1), SPARE),
        };
        let bytes = self.card(tried);
        if n > 0 && bytes.total() <= free {
            return Ok(n);
        }
        Err(Error::DeviceFull {
            device: device.into(),
            what: format!(
                "{tried} of {} layers with the head (weights {}, cells {}, work space {}{})",
                self.n_layer(),
                bytes.weights,
                bytes.cells,
                bytes.work,
                match spare {
                    0 => String::new(),
                    n => format!(", left alone {n}"),
                }
            ),
            needed: bytes.total().saturating_add(spare),
            free,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    /// An 8B model in 4 bits: 32 layers of 130 MiB, the last two larger.
    fn room() -> Room {
        let mut on_card = vec![130 * MIB; 32];
        on_card[30..].fill(150 * MIB);
        Room {
            on_host: on_card.clone(),
            on_card,
            head: 420 * MIB,
            compressor: 20 * MIB,
            cells: 16 * MIB,
            work: [120 * MIB, 480 * MIB],
        }
    }

    #[test]
    fn bytes_of_both_devices_add_up() {
        let room = room();
        for n in 1..32 {
            let (card, host) = (room.card(n), room.host(n));
            let weights = 30 * 130 * MIB + 2 * 150 * MIB + 440 * MIB;
            assert_eq!(card.weights + host.weights, weights, "{n}");
            assert_eq!(card.cells + host.cells, 32 * 16 * MIB, "{n}");
        }
        assert_eq!(room.card(0), Bytes::default());
        assert_eq!(room.host(32), Bytes::default());
        assert_eq!(room.host(99), Bytes::default());
        assert_eq!(room.card(99), room.card(32));
        assert_eq!(room.card(32).weights, room.host(0).weights);
    }

    #[test]
    fn as_many_layers_as_fit() {
        let room = room();
        // All of it: 4,200 + 440 MiB of weights, 512 of cells, 480 of work space, 512 left alone.
        let all = (4200 + 440 + 512 + 480) * MIB + SPARE;
        assert_eq!(room.n_fit(8 * GIB), 32);
        assert_eq!(room.n_fit(all), 32);
        assert_eq!(room.n_fit(all - 1), 31);
        // Head, work space, and of layers the last two and twenty others.
        let n = 22;
        let some = (420 + 120 + 2 * 166 + 20 * 146) * MIB + SPARE;
        assert_eq!(room.n_fit(some), n);
        assert_eq!(room.n_fit(some + 146 * MIB - 1), n);
        assert_eq!(room.n_fit(some - 1), n - 1);
        let one = (420 + 120 + 166) * MIB + SPARE;
        assert_eq!(room.n_fit(one), 1);
        assert_eq!(room.n_fit(one - 1), 0);
        assert_eq!(room.n_fit(0), 0);
    }

    #[test]
    fn long_contexts_leave_room_for_fewer_layers() {
        let mut room = room();
        room.cells = 512 * MIB;
        // 8,192 MiB less 420, 120 and 512 are 7,140: two of 662 and nine of 642.
        assert_eq!(room.n_fit(8 * GIB), 11);
        room.cells = u64::MAX / 4;
        assert_eq!(room.n_fit(8 * GIB), 0);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let room = room();
        let place = |asked, free| room.place(asked, "cuda:0 X", free);
        assert_eq!(place(None, 8 * GIB).ok(), Some(32));
        assert_eq!(place(Some(99), 8 * GIB).ok(), Some(32));
        // What is asked for may take what is otherwise left alone.
        let two = (420 + 120 + 2 * 166) * MIB;
        assert_eq!(place(Some(2), two).ok(), Some(2));
        let words = place(Some(2), two - 1).err().map(|e| e.to_string());
        let words = words.expect("one byte is missing");
        for part in [
            "cuda:0 X",
            "2 of 32 layers",
            &two.to_string(),
            &(two - 1).to_string(),
            &(32 * MIB).to_string(),
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
        let words = place(None, GIB).err().map(|e| e.to_string());
        let words = words.expect("not even one layer");
        assert!(words.contains("1 of 32 layers"), "{words}");
        assert!(words.contains(&SPARE.to_string()), "{words}");
    }
}
