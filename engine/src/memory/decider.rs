//! Deciders: where the stream is cut into segments.
//!
//! A cut after token t is decided when the next token arrives: a rule on text may look at one
//! token ahead that way without anything at or before t depending on it. Every rule gives a
//! boundary probability (0 or 1 where it is a plain rule), and the same dials apply to all.

use super::{Context, MemorySpec, Pieces};
use crate::error::Result;

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
        let file = w.memory_file();
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
/// what the target allows, the higher the bar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Controller {
    /// Tokens per slot aimed at.
    pub target: f64,
    /// Tokens read and slots made under control.
    pub n_tokens: u64,
    /// See `n_tokens`.
    pub n_slots: u64,
}

/// Tokens of deviation that move tau's logit by one.
const CONTROL_TOKENS: f64 = 48.0;

impl Controller {
    /// The same aim at the start of a text.
    pub fn anew(self) -> Controller {
        Controller {
            n_tokens: 0,
            n_slots: 0,
            ..self
        }
    }

    /// The threshold to use now, around the file's own `tau`.
    pub fn tau(&self, tau: f32) -> f32 {
        let ahead = self.n_slots as f64 * self.target - self.n_tokens as f64;
        let tau = f64::from(tau).clamp(1e-6, 1.0 - 1e-6);
        let logit = (tau / (1.0 - tau)).ln() + (ahead / CONTROL_TOKENS).clamp(-12.0, 12.0);
        (1.0 / (1.0 + (-logit).exp())) as f32
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
                target: 16.0,
                n_tokens: 1600,
                n_slots,
            }
            .tau(0.5)
        };
        assert!(at(120) > at(100) && at(100) > at(80));
        assert!((at(100) - 0.5).abs() < 1e-6);
    }
}
