//! Deciders: where the stream is cut into segments.
//!
//! A cut after token t is decided when the next token arrives: a rule on text may look at one
//! token ahead that way without anything at or before t depending on it. Every rule gives a
//! boundary probability (0 or 1 where it is a plain rule), and the same dials apply to all.

use std::io;

use super::{Context, MemorySpec, Pieces};
use crate::error::Result;
use crate::session::{Decoder, Encoder};

/// A rule for boundaries.
#[derive(Clone, Debug, PartialEq)]
pub enum Decider {
    /// The trained head of the file, read off the trunk (`linear`, `mlp` or `cosine`).
    Trained,
    /// End of a sentence, by the bytes of tokens.
    Sentence,
    /// Every n tokens.
    Stride(usize),
    /// A coin with this probability of a cut, tossed from (seed, token index).
    Random {
        /// Probability of a cut after each token.
        rate: f64,
        /// Seed of the coin.
        seed: u64,
    },
    /// Surprisal above its running mean by so many standard deviations.
    Entropy {
        /// Standard deviations.
        sigma: f32,
    },
}

impl Decider {
    /// Reads the decider of a description, with the file's own as the default.
    pub fn parse(ctx: &Context, spec: &MemorySpec) -> Result<Decider> {
        let w = &ctx.weights;
        let file = w.memory_file_of("nodes");
        let in_file = file
            .opt_str(&w.memory_key("decider.type"))?
            .unwrap_or("linear");
        let name: String = spec.get("decider", in_file.to_owned())?;
        let number = |suffix: &str| file.opt_u32(&w.memory_key(suffix));
        let trained = w.nodes.as_ref().and_then(|n| n.head.as_ref());
        Ok(match name.as_str() {
            "learned" | "linear" | "mlp" | "cosine" => {
                if trained.is_none() {
                    return Err(spec.refuse(format!(
                        "decider `{name}` is learned and the file has no `mem.decider.*` tensors"
                    )));
                }
                if name != "learned" && name != in_file {
                    return Err(
                        spec.refuse(format!("the file's decider is `{in_file}`, not `{name}`"))
                    );
                }
                Decider::Trained
            }
            "sentence" => Decider::Sentence,
            "stride" => {
                let n = spec.get("stride", number("decider.stride")?.unwrap_or(16) as usize)?;
                if n == 0 {
                    return Err(spec.refuse("`stride` must be at least 1"));
                }
                Decider::Stride(n)
            }
            "random" => {
                let in_file = file
                    .opt_f32(&w.memory_key("decider.rate"))?
                    .unwrap_or(0.0625);
                let rate = spec.get("rate", f64::from(in_file))?;
                if !(0.0..=1.0).contains(&rate) {
                    return Err(spec.refuse(format!("`rate` {rate} is no probability")));
                }
                let seed = number("decider.seed")?.unwrap_or(0);
                Decider::Random {
                    rate,
                    seed: spec.get("seed", u64::from(seed))?,
                }
            }
            "entropy" => Decider::Entropy {
                sigma: spec.get("sigma", 1.5)?,
            },
            other => {
                return Err(spec.refuse(format!(
                    "unknown decider `{other}`; there are learned (the file's linear, mlp or \
                     cosine), sentence, stride, random and entropy"
                )));
            }
        })
    }
}

/// Output `t` of SplitMix64 (Steele et al., 2014) as a number in `[0, 1)`: a coin that depends on
/// nothing but the seed and the position.
pub fn splitmix64(seed: u64, t: u64) -> f64 {
    let mut z = seed.wrapping_add(t.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

fn is_space(b: u8) -> bool {
    matches!(b, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

/// The white space a piece ends with.
fn tail(piece: &[u8]) -> &[u8] {
    let body = piece
        .iter()
        .rposition(|&b| !is_space(b))
        .map_or(0, |i| i + 1);
    &piece[body..]
}

fn has_blank_line(space: &[u8]) -> bool {
    space.windows(2).any(|w| w == b"\n\n")
}

/// Whether a sentence ends with the token of bytes `piece`, given its neighbours' bytes: `. ? !`
/// followed by white space in this token or the next or by a control token (whose bytes are
/// empty), `。？！`, or a blank line.
pub fn sentence_ends(before: Option<&[u8]>, piece: &[u8], after: &[u8]) -> bool {
    let space = tail(piece);
    let body = &piece[..piece.len() - space.len()];
    let stop = |s: &[u8]| matches!(s.last(), Some(b'.' | b'?' | b'!'));
    let wide = ["。", "？", "！"];
    if stop(body) && !space.is_empty()
        || wide.iter().any(|s| body.ends_with(s.as_bytes()))
        || has_blank_line(space)
    {
        return true;
    }
    if stop(piece) && after.first().is_none_or(|&b| is_space(b)) {
        return true;
    }
    // A blank line made of two tokens.
    let Some(before) = before else { return false };
    let earlier = tail(before);
    !piece.is_empty()
        && body.is_empty()
        && piece[0] == b'\n'
        && earlier.ends_with(b"\n")
        && !has_blank_line(earlier)
}

/// [`sentence_ends`] by token ids.
pub fn sentence_ends_at(pieces: &dyn Pieces, before: Option<u32>, id: u32, after: u32) -> bool {
    sentence_ends(
        before.map(|b| pieces.piece(b)),
        pieces.piece(id),
        pieces.piece(after),
    )
}

/// Moves tau so that tokens per slot approach a target: the further the slots so far are ahead of
/// what the target allows, and the longer they have been, the higher the bar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Controller {
    /// Tokens per slot aimed at.
    pub target: f64,
    /// Tokens read and slots made under control.
    n_tokens: u64,
    n_slots: u64,
    /// Shift of tau's logit that the deviations of all tokens so far have added up to. Where p is
    /// far from tau a text needs such a standing shift, which the deviation of the moment alone
    /// could hold up only by staying large.
    shift: f64,
}

/// Tokens of deviation that move tau's logit by one.
const CONTROL_TOKENS: f64 = 96.0;
/// Tokens after which a deviation that lasts has moved tau's logit once more by as much.
const CONTROL_LAG: f64 = 768.0;
/// How far tau's logit is ever moved by either term.
const CONTROL_RANGE: f64 = 12.0;

impl Controller {
    /// A controller that has seen nothing.
    pub fn new(target: f64) -> Controller {
        Controller {
            target,
            n_tokens: 0,
            n_slots: 0,
            shift: 0.0,
        }
    }

    /// Counts a cut that made `n` slots.
    pub fn cut(&mut self, n: usize) {
        self.n_slots += n as u64;
    }

    /// Counts a token. One at a time, so that any chunking gives the same sum.
    pub fn token(&mut self) {
        self.n_tokens += 1;
        let moved = self.shift + self.ahead() / CONTROL_LAG;
        self.shift = moved.clamp(-CONTROL_RANGE, CONTROL_RANGE);
    }

    /// Deviation in logits of tau: slots made beyond what the target allows.
    fn ahead(&self) -> f64 {
        (self.n_slots as f64 * self.target - self.n_tokens as f64) / CONTROL_TOKENS
    }

    /// The threshold to use now, around the file's own `tau`.
    pub fn tau(&self, tau: f32) -> f32 {
        let tau = f64::from(tau).clamp(1e-6, 1.0 - 1e-6);
        let moved = self.ahead().clamp(-CONTROL_RANGE, CONTROL_RANGE) + self.shift;
        let logit = (tau / (1.0 - tau)).ln() + moved;
        (1.0 / (1.0 + (-logit).exp())) as f32
    }

    /// Writes everything `restore` needs.
    pub fn save(&self, out: &mut Encoder<'_>) -> io::Result<()> {
        out.u64(self.target.to_bits())?;
        out.u64(self.n_tokens)?;
        out.u64(self.n_slots)?;
        out.u64(self.shift.to_bits())
    }

    /// The inverse of `save`.
    pub fn restore(from: &mut Decoder<'_>) -> io::Result<Controller> {
        Ok(Controller {
            target: f64::from_bits(from.u64()?),
            n_tokens: from.u64()?,
            n_slots: from.u64()?,
            shift: f64::from_bits(from.u64()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_where_people_say() {
        let ends = |b: &str, s: &str, a: &str| {
            sentence_ends(Some(b.as_bytes()), s.as_bytes(), a.as_bytes())
        };
        assert!(ends("a", ".", " B"));
        assert!(ends("a", ".\n", "B"));
        assert!(ends("a", "? ", "B"));
        assert!(ends("a", "。", "B"));
        assert!(ends("a", "\n\n", "B"));
        assert!(ends("a\n", "\n", "B"));
        assert!(!ends("a", "\n", "B"));
        assert!(!ends("a\n\n", "\n", "B"), "one blank line, one cut");
        assert!(
            ends("a", ".", ""),
            "a turn ends and a control token follows"
        );
        assert!(!ends("3", ".", "14"));
        assert!(!ends("a", "b", " c"));
        assert!(!ends("a", "", " c"));
    }

    #[test]
    fn the_controller_pushes_towards_its_target() {
        let at = |n_slots| {
            Controller {
                n_tokens: 1600,
                n_slots,
                ..Controller::new(16.0)
            }
            .tau(0.5)
        };
        assert!(at(120) > at(100) && at(100) > at(80));
        assert!((at(100) - 0.5).abs() < 1e-6);
    }

    /// A saturated decider: one token in 8 has p near 0.97, one in 64 more, and the target lies
    /// where the bar has to stand five logits above the file's tau.
    #[test]
    fn a_standing_shift_leaves_no_standing_deviation() {
        for target in [16.0, 24.0, 40.0] {
            let mut control = Controller::new(target);
            let mut counts = (0u64, 0u64);
            for t in 0..4096u64 {
                let noise = splitmix64(7, t);
                let logit = if t % 8 == 7 { 3.0 + 4.0 * noise } else { -6.0 };
                let p = (1.0 / (1.0 + (-logit).exp())) as f32;
                if p > control.tau(0.5) {
                    control.cut(1);
                    counts.1 += 1;
                }
                control.token();
                counts.0 += 1;
            }
            let rate = counts.0 as f64 / counts.1 as f64;
            assert!((rate / target - 1.0).abs() < 0.03, "{target}: {rate}");
        }
    }
}
