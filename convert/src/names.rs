//! Tensors: Hugging Face names to GGUF names, with the shape that the config asks for.

use crate::Error;
use crate::config::{Arch, Config};
use crate::plan::{Layout, PlannedTensor, Role};
use crate::source::Source;

/// One kind of tensor of a layer: suffix in the Hugging Face name, suffix in the GGUF name, shape.
struct Row {
    from: &'static str,
    to: &'static str,
    shape: Vec<usize>,
    required: bool,
    layout: Layout,
}

/// The tensors of one layer, in the order in which they are written.
fn layer_rows(config: &Config) -> Vec<Row> {
    let (n_embd, n_ff) = (config.n_embd, config.n_ff);
    let n_q = config.n_head * config.head_dim;
    let n_kv = config.n_head_kv * config.head_dim;
    let mut rows = Vec::new();
    let mut row = |from, to, shape: &[usize], required, layout| {
        rows.push(Row {
            from,
            to,
            shape: shape.to_vec(),
            required,
            layout,
        });
    };
    // The NORM rope turns pairs (2i, 2i+1) where the checkpoint turns (i, i + d/2).
    let permuted = |n_head| match config.arch {
        Arch::Llama => Layout::RopePairs { n_head },
        Arch::Qwen2 | Arch::Qwen3 => Layout::AsIs,
    };
    let bias = config.arch == Arch::Qwen2;
    let as_is = Layout::AsIs;
    row(
        "input_layernorm.weight",
        "attn_norm.weight",
        &[n_embd],
        true,
        as_is,
    );
    row(
        "self_attn.q_proj.weight",
        "attn_q.weight",
        &[n_q, n_embd],
        true,
        permuted(config.n_head),
    );
    row(
        "self_attn.q_proj.bias",
        "attn_q.bias",
        &[n_q],
        bias,
        permuted(config.n_head),
    );
    row(
        "self_attn.k_proj.weight",
        "attn_k.weight",
        &[n_kv, n_embd],
        true,
        permuted(config.n_head_kv),
    );
    row(
        "self_attn.k_proj.bias",
        "attn_k.bias",
        &[n_kv],
        bias,
        permuted(config.n_head_kv),
    );
    row(
        "self_attn.v_proj.weight",
        "attn_v.weight",
        &[n_kv, n_embd],
        true,
        as_is,
    );
    row("self_attn.v_proj.bias", "attn_v.bias", &[n_kv], bias, as_is);
    if config.arch == Arch::Qwen3 {
        row(
            "self_attn.q_norm.weight",
            "attn_q_norm.weight",
            &[config.head_dim],
            true,
            as_is,
        );
        row(
            "self_attn.k_norm.weight",
            "attn_k_norm.weight",
            &[config.head_dim],
            true,
            as_is,
        );
    }
    row(
        "self_attn.o_proj.weight",
        "attn_output.weight",
        &[n_embd, n_q],
        true,
        as_is,
    );
    row(
        "self_attn.o_proj.bias",
        "attn_output.bias",
        &[n_embd],
        false,
        as_is,
    );
    row(
        "post_attention_layernorm.weight",
        "ffn_norm.weight",
        &[n_embd],
        true,
        as_is,
    );
    row(
        "mlp.gate_proj.weight",
        "ffn_gate.weight",
        &[n_ff, n_embd],
        true,
        as_is,
    );
    row(
        "mlp.up_proj.weight",
        "ffn_up.weight",
        &[n_ff, n_embd],
        true,
        as_is,
    );
    row(
        "mlp.down_proj.weight",
        "ffn_down.weight",
        &[n_embd, n_ff],
        true,
        as_is,
    );
    rows
}

/// Buffers that old checkpoints carry and nobody needs.
fn is_buffer(name: &str) -> bool {
    [
        ".rotary_emb.inv_freq",
        ".attention.bias",
        ".attention.masked_bias",
    ]
    .iter()
    .any(|suffix| name.ends_with(suffix))
}

/// Whether a name belongs to a memory and not to the base model.
pub fn is_memory(name: &str) -> bool {
    name.starts_with("mem.") || name.contains(".ahn.") || name.contains(".ahn_router.")
}

/// The tensors of the base model, checked for presence and shape, and for strangers among them.
pub fn base_tensors(config: &Config, source: &Source) -> Result<Vec<PlannedTensor>, Error> {
    // Exports of the bare decoder lack the prefix.
    let prefix = match source.tensors().contains_key("embed_tokens.weight") {
        true => "",
        false => "model.",
    };
    let mut planned = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    let mut take = |from: String, to: String, shape: &[usize], layout| {
        let tensor = source.tensor(&from)?;
        tensor.expect_shape(shape)?;
        known.insert(from);
        planned.push(PlannedTensor::from_source(to, tensor, layout, Role::Base));
        Ok::<_, Error>(())
    };
    let embedding = [config.n_vocab, config.n_embd];
    take(
        format!("{prefix}embed_tokens.weight"),
        "token_embd.weight".into(),
        &embedding,
        Layout::AsIs,
    )?;
    let rows = layer_rows(config);
    for il in 0..config.n_layer {
        for row in &rows {
            let from = format!("{prefix}layers.{il}.{}", row.from);
            if row.required || source.tensors().contains_key(&from) {
                take(from, format!("blk.{il}.{}", row.to), &row.shape, row.layout)?;
            }
        }
    }
    take(
        format!("{prefix}norm.weight"),
        "output_norm.weight".into(),
        &[config.n_embd],
        Layout::AsIs,
    )?;
    let has_head = source.tensors().contains_key("lm_head.weight");
    if !config.tied.unwrap_or(!has_head) {
        take(
            "lm_head.weight".into(),
            "output.weight".into(),
            &embedding,
            Layout::AsIs,
        )?;
    }
    for name in source.tensors().keys() {
        if !known.contains(name) && !is_memory(name) && !is_buffer(name) && name != "lm_head.weight"
        {
            return Err(Error::UnknownTensor {
                tensor: name.clone(),
                arch: config.arch.name(),
                n_layer: config.n_layer,
            });
        }
    }
    if let Some(freqs) = config.rope_freqs() {
        planned.push(PlannedTensor::from_values("rope_freqs.weight", freqs));
    }
    Ok(planned)
}
