//! From hidden states to one vector per text: pooling, scaling, and the scores of rerankers.

use crate::error::{Error, Result};
use crate::gguf::{Gguf, TensorInfo};
use crate::hparams::Hparams;
use crate::ops::Table;
use crate::weights::Weights;

/// How the final hidden states of a text's tokens become its embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// One vector per token.
    None,
    /// Their mean.
    Mean,
    /// The first token's.
    Cls,
    /// The last token's.
    Last,
    /// The last token's, read by the model's classifier.
    Rank,
}

/// Names as `--pooling` takes them, in the order of the numbers in `<arch>.pooling_type`.
pub const POOLINGS: &[(&str, Pooling)] = &[
    ("none", Pooling::None),
    ("mean", Pooling::Mean),
    ("cls", Pooling::Cls),
    ("last", Pooling::Last),
    ("rank", Pooling::Rank),
];

impl Pooling {
    /// The pooling called `name`.
    pub fn named(name: &str) -> Option<Pooling> {
        POOLINGS.iter().find(|row| row.0 == name).map(|row| row.1)
    }

    /// What a model file says in `<arch>.pooling_type`.
    pub fn of_model(gguf: &Gguf, hp: &Hparams) -> Result<Option<Pooling>> {
        let key = format!("{}.pooling_type", hp.arch);
        let Some(n) = gguf.opt_u32(&key)? else {
            return Ok(None);
        };
        match POOLINGS.get(n as usize) {
            Some(row) => Ok(Some(row.1)),
            None => Err(Error::Key {
                key,
                what: format!("expected 0 to {}, got {n}", POOLINGS.len() - 1),
            }),
        }
    }

    /// Whether hidden states before the last token's matter.
    pub fn needs_all(self) -> bool {
        matches!(self, Pooling::None | Pooling::Mean | Pooling::Cls)
    }
}

/// Takes the hidden states of a text in pieces and pools them.
#[derive(Clone, Debug)]
pub struct Pooler {
    pooling: Pooling,
    n_embd: usize,
    /// Rows taken in.
    n: usize,
    sum: Vec<f64>,
    kept: Vec<f32>,
}

impl Pooler {
    /// A pooler of vectors of `n_embd`.
    pub fn new(pooling: Pooling, n_embd: usize) -> Pooler {
        Pooler {
            pooling,
            n_embd,
            n: 0,
            sum: vec![0.0; n_embd],
            kept: Vec::new(),
        }
    }

    /// How it pools.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Takes in the next rows, `[n, n_embd]`.
    pub fn push(&mut self, rows: &[f32]) {
        for row in rows.chunks_exact(self.n_embd) {
            match self.pooling {
                Pooling::None => self.kept.extend_from_slice(row),
                Pooling::Cls if self.n > 0 => {}
                Pooling::Cls | Pooling::Last | Pooling::Rank => {
                    self.kept.clear();
                    self.kept.extend_from_slice(row);
                }
                Pooling::Mean => {
                    for (sum, x) in self.sum.iter_mut().zip(row) {
                        *sum += f64::from(*x);
                    }
                }
            }
            self.n += 1;
        }
    }

    /// The embedding: one vector, or one per row with [`Pooling::None`]; none when nothing came.
    pub fn finish(self) -> Vec<Vec<f32>> {
        if self.n == 0 {
            return Vec::new();
        }
        match self.pooling {
            Pooling::Mean => {
                let n = self.n as f64;
                vec![self.sum.iter().map(|s| (s / n) as f32).collect()]
            }
            _ => self
                .kept
                .chunks_exact(self.n_embd)
                .map(<[f32]>::to_vec)
                .collect(),
        }
    }
}

/// Scales `v` in place as llama.cpp's `--embd-normalize` numbers it: below 0 not at all, 0 so that
/// the largest component is 32760, 2 to Euclidean length 1, otherwise to p-norm 1.
pub fn normalise(v: &mut [f32], p: i32) {
    let size = match p {
        ..0 => return,
        0 => v.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max) / 32760.0,
        p => {
            let sum: f64 = v.iter().map(|x| f64::from(x.abs()).powi(p)).sum::<f64>();
            sum.powf(1.0 / f64::from(p))
        }
    };
    if size > 0.0 && size.is_finite() {
        v.iter_mut()
            .for_each(|x| *x = (f64::from(*x) / size) as f32);
    }
}

/// The head of a reranker: `cls.output.weight` `[n_out, n_embd]` and its bias.
#[derive(Clone, Debug)]
pub struct Classifier {
    weight: Vec<f32>,
    bias: Vec<f32>,
    n_embd: usize,
    /// Whether outputs compete (Qwen3 rerankers: yes against no).
    softmax: bool,
}

impl Classifier {
    /// The classifier of a model file, if it has one. A further layer before it (`cls.weight`) is
    /// refused: no supported architecture has one.
    pub fn of_model(weights: &Weights) -> Result<Option<Classifier>> {
        let (gguf, hp) = (&weights.gguf, &weights.hparams);
        let Some(info) = gguf.tensor("cls.output.weight") else {
            return Ok(None);
        };
        if gguf.tensor("cls.weight").is_some() {
            return Err(Error::TensorType {
                name: "cls.weight".into(),
                ty: "classifier layer".into(),
                role: "in a decoder model",
            });
        }
        let n_out = info.dims.get(1).copied().unwrap_or(1);
        if info.dims.first() != Some(&(hp.n_embd as u64)) || info.dims.len() > 2 || n_out == 0 {
            return Err(Error::TensorShape {
                name: info.name.clone(),
                expected: vec![hp.n_embd as u64, n_out],
                got: info.dims.clone(),
            });
        }
        let readable = |info: &TensorInfo| match ggml_sys::Type::from_id(info.ty.id()) {
            Some(_) => Ok(()),
            None => Err(Error::TensorType {
                name: info.name.clone(),
                ty: info.ty.name().into(),
                role: "as a classifier",
            }),
        };
        readable(info)?;
        let n_out = n_out as usize;
        let table = Table::new(gguf, info, n_out, hp.n_embd);
        let mut weight = vec![0.0; n_out * hp.n_embd];
        for (i, row) in weight.chunks_exact_mut(hp.n_embd).enumerate() {
            table.read_row(i, row);
        }
        let mut bias = vec![0.0; n_out];
        if let Some(info) = gguf.tensor("cls.output.bias") {
            if info.dims != [n_out as u64] {
                return Err(Error::TensorShape {
                    name: info.name.clone(),
                    expected: vec![n_out as u64],
                    got: info.dims.clone(),
                });
            }
            readable(info)?;
            Table::new(gguf, info, 1, n_out).read_row(0, &mut bias);
        }
        Ok(Some(Classifier {
            weight,
            bias,
            n_embd: hp.n_embd,
            softmax: hp.arch == "qwen3",
        }))
    }

    /// Outputs for one pooled vector; the first is the score of relevance.
    pub fn scores(&self, v: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(self.n_embd).zip(&self.bias);
        let mut out: Vec<f64> = rows
            .map(|(w, b)| {
                let dot: f64 = (w.iter().zip(v))
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum();
                dot + f64::from(*b)
            })
            .collect();
        if self.softmax {
            let max = out.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            out.iter_mut().for_each(|x| *x = (*x - max).exp());
            let sum: f64 = out.iter().sum();
            out.iter_mut().for_each(|x| *x /= sum);
        }
        out.into_iter().map(|x| x as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pooled(pooling: Pooling, pieces: &[&[f32]]) -> Vec<Vec<f32>> {
        let mut pooler = Pooler::new(pooling, 2);
        pieces.iter().for_each(|rows| pooler.push(rows));
        pooler.finish()
    }

    #[test]
    fn pieces_do_not_matter() {
        let whole: &[&[f32]] = &[&[1.0, 2.0, 3.0, 5.0, 8.0, -1.0]];
        let cut: &[&[f32]] = &[&[1.0, 2.0], &[], &[3.0, 5.0, 8.0, -1.0]];
        for (pooling, expected) in [
            (
                Pooling::None,
                vec![vec![1.0, 2.0], vec![3.0, 5.0], vec![8.0, -1.0]],
            ),
            (Pooling::Mean, vec![vec![4.0, 2.0]]),
            (Pooling::Cls, vec![vec![1.0, 2.0]]),
            (Pooling::Last, vec![vec![8.0, -1.0]]),
            (Pooling::Rank, vec![vec![8.0, -1.0]]),
        ] {
            assert_eq!(pooled(pooling, whole), expected, "{pooling:?}");
            assert_eq!(pooled(pooling, cut), expected, "{pooling:?}");
            assert!(pooled(pooling, &[]).is_empty());
        }
    }

    #[test]
    fn norms_are_those_of_their_numbers() {
        for (p, expected) in [
            (-1, [3.0, -4.0]),
            (0, [24570.0, -32760.0]),
            (1, [3.0 / 7.0, -4.0 / 7.0]),
            (2, [0.6, -0.8]),
        ] {
            let mut v = [3.0f32, -4.0];
            normalise(&mut v, p);
            for (x, y) in v.iter().zip(expected) {
                assert!((x - y).abs() <= 1e-6 * y.abs(), "{p}: {v:?}");
            }
        }
        let mut zero = [0.0f32; 2];
        normalise(&mut zero, 2);
        assert_eq!(zero, [0.0; 2]);
    }
}
