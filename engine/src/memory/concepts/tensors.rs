//! The compressor of `concepts`: learned queries behind a segment's tokens, low-rank additions to
//! the model's matrices while it reads them, and one linear map from the queries' last hidden states to
//! input embeddings.

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::hparams::Hparams;
use crate::ops::{Buffer, Matrix, Ops};
use crate::weights::Loader;
use std::sync::Arc;

/// `B (A x)`, added to a matrix' product (LoRA, arXiv 2106.09685); its factor is part of B.
pub struct LowRank {
    /// r.
    pub rank: usize,
    /// `a.weight` `[r, n_in]`.
    pub a: Matrix,
    /// `b.weight` `[n_out, r]`.
    pub b: Matrix,
}

/// The additions to a layer's matrices, `mem.lora.N.*`; those the file has.
#[derive(Default)]
pub struct LayerLora {
    /// To `attn_q`.
    pub attn_q: Option<LowRank>,
    /// To `attn_k`.
    pub attn_k: Option<LowRank>,
    /// To `attn_v`.
    pub attn_v: Option<LowRank>,
    /// To `attn_output`.
    pub attn_output: Option<LowRank>,
    /// To `ffn_gate`.
    pub ffn_gate: Option<LowRank>,
    /// To `ffn_up`.
    pub ffn_up: Option<LowRank>,
    /// To `ffn_down`.
    pub ffn_down: Option<LowRank>,
}

impl LayerLora {
    /// What the file adds to layer `il`, ready for the layer's verbs.
    fn load(from: &mut Loader<'_>, il: usize, hp: &Hparams) -> Result<LayerLora> {
        let (e, n_q, n_kv) = (
            hp.n_embd,
            hp.n_head * hp.head_dim,
            hp.n_head_kv * hp.head_dim,
        );
        let mut one = |name: &str, n_out: usize, n_in: usize| {
            let [a, b] = ["a", "b"].map(|half| format!("mem.lora.{il}.{name}.{half}.weight"));
            let Some(rank) = from.n_rows(&a) else {
                return match from.has(&b) {
                    true => Err(Error::TensorMissing(a)),
                    false => Ok(None),
                };
            };
            if rank == 0 {
                return Err(Error::TensorShape {
                    name: a,
                    expected: vec![n_in as u64, 1],
                    got: vec![n_in as u64, 0],
                });
            }
            Ok(Some(LowRank {
                rank,
                a: from.matrix(&a, rank, n_in)?,
                b: from.matrix(&b, n_out, rank)?,
            }))
        };
        Ok(LayerLora {
            attn_q: one("attn_q", n_q, e)?,
            attn_k: one("attn_k", n_kv, e)?,
            attn_v: one("attn_v", n_kv, e)?,
            attn_output: one("attn_output", e, n_q)?,
            ffn_gate: one("ffn_gate", hp.n_ff, e)?,
            ffn_up: one("ffn_up", hp.n_ff, e)?,
            ffn_down: one("ffn_down", e, hp.n_ff)?,
        })
    }
}

/// Everything of the compressor.
pub struct ConceptTensors {
    /// Most tokens of a segment, `memory.concepts.segment`.
    pub segment: usize,
    /// Tokens an embedding stands for, `memory.concepts.ratio`: those it was trained for, the usual one first.
    pub ratios: Vec<usize>,
    /// Tokens before and after a context, `tokenizer.ggml.context_token_ids`.
    pub tokens: [u32; 2],
    /// `mem.query.weight` `[n, n_embd]`: a segment of many tokens has the first of them behind it.
    pub queries: Vec<f32>,
    /// `mem.ce_proj.weight` `[n_embd, n_embd]`.
    pub proj: Matrix,
    /// `mem.ce_proj.bias` `[n_embd]`, where the file has one.
    pub proj_bias: Option<Buffer>,
    /// Additions to each layer.
    pub lora: Vec<LayerLora>,
    /// Largest rank of any.
    pub rank: usize,
}

impl ConceptTensors {
    /// The compressor of the file or its adapter, where there is one. `ops` are those of the whole
    /// model: every layer's additions lie with the layer, the map with the head.
    pub fn load(from: &mut Loader<'_>, hp: &Hparams) -> Result<Option<ConceptTensors>> {
        let Some(file) = from.file_of("mem.ce_proj.weight").map(Arc::clone) else {
            return Ok(None);
        };
        let file = &file;
        let key = |suffix: &str| format!("{}.memory.concepts.{suffix}", hp.arch);
        let segment = number(file, &key("segment"))?;
        let ratios = match file.opt_arr_u32(&key("ratios"))? {
            None => vec![number(file, &key("ratio"))?],
            Some(ratios) => ratios.into_iter().map(|n| n as usize).collect(),
        };
        if ratios.is_empty() || ratios.iter().any(|&n| n == 0 || n > segment) {
            return Err(Error::Key {
                key: key("ratios"),
                what: format!("expected numbers of 1 to {segment} (the segment), got {ratios:?}"),
            });
        }
        let tokens = context_tokens(file, hp)?;
        let most = segment.div_ceil(*ratios.iter().min().expect("not empty"));
        let n_queries = from.n_rows("mem.query.weight").unwrap_or(most);
        if n_queries < most {
            return Err(Error::Key {
                key: key("segment"),
                what: format!(
                    "a segment of {segment} tokens takes {most} queries, `mem.query.weight` has {n_queries}"
                ),
            });
        }
        let queries = from.values("mem.query.weight", n_queries, hp.n_embd)?;
        let proj = from.matrix("mem.ce_proj.weight", hp.n_embd, hp.n_embd)?;
        let proj_bias = from.buffer_if("mem.ce_proj.bias", hp.n_embd)?;
        let ops: &dyn Ops = from.ops;
        let mut lora = Vec::with_capacity(hp.n_layer);
        for il in 0..hp.n_layer {
            from.ops = ops.of_layer(il);
            lora.push(LayerLora::load(from, il, hp)?);
        }
        from.ops = ops;
        let all = lora.iter().flat_map(|l| {
            let attn = [&l.attn_q, &l.attn_k, &l.attn_v, &l.attn_output];
            let ffn = [&l.ffn_gate, &l.ffn_up, &l.ffn_down];
            attn.into_iter().chain(ffn).flatten()
        });
        let rank = all.map(|low| low.rank).max().unwrap_or(0);
        Ok(Some(ConceptTensors {
            segment,
            ratios,
            tokens,
            queries,
            proj,
            proj_bias,
            lora,
            rank,
        }))
    }
}

/// A key that must be there, of 1 to 65,536.
fn number(file: &Gguf, key: &str) -> Result<usize> {
    match file.opt_u32(key)? {
        Some(n @ 1..=65_536) => Ok(n as usize),
        other => Err(Error::Key {
            key: key.into(),
            what: match other {
                None => "not found".into(),
                Some(n) => format!("{n} is outside 1..=65536"),
            },
        }),
    }
}

fn context_tokens(file: &Gguf, hp: &Hparams) -> Result<[u32; 2]> {
    let key = "tokenizer.ggml.context_token_ids";
    let ids = file.opt_arr_u32(key)?.unwrap_or_default();
    let fine = |id: &u32| (*id as usize) < hp.n_vocab;
    match ids[..] {
        [begin, end] if begin != end && fine(&begin) && fine(&end) => Ok([begin, end]),
        _ => Err(Error::Key {
            key: key.into(),
            what: format!(
                "expected two different tokens below {}, got {ids:?}",
                hp.n_vocab
            ),
        }),
    }
}
