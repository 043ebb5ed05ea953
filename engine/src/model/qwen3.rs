//! Qwen3: no biases, an RMS norm on each query and key head, a head width of its own, NeoX rotary
//! pairs (arXiv 2505.09388).

use super::Pass;
use crate::ops::RopeKind;

/// The layers that `pass` is at, and after the last one the head, over its rows.
pub fn forward(pass: &mut Pass<'_>) {
    let (ops, w) = (pass.ops, pass.w);
    let hp = &w.hparams;
    for (il, layer) in pass.layers() {
        let (inv_freq, mscale) = (&layer.rope_inv_freq, w.rope_mscale);
        let s = &mut *pass.s;
        ops.rms_norm(&s.x, &layer.attn_norm, hp.rms_eps, &mut s.h);
        pass.project_qkv(il, layer);
        let s = &mut *pass.s;
        if let Some(norm) = &layer.attn_q_norm {
            ops.rms_norm_in_place(&mut s.q, norm, hp.rms_eps);
        }
        if let Some(norm) = &layer.attn_k_norm {
            ops.rms_norm_in_place(&mut s.k, norm, hp.rms_eps);
        }
        let rope = RopeKind::Neox;
        ops.rope(
            rope,
            &mut s.q,
            hp.n_head,
            hp.head_dim,
            &pass.rows,
            inv_freq,
            mscale,
        );
        ops.rope(
            rope,
            &mut s.k,
            hp.n_head_kv,
            hp.head_dim,
            &pass.rows,
            inv_freq,
            mscale,
        );

        pass.attend(il);
        pass.keep_wanted_rows(il);
        pass.project_output(il, layer);
        let s = &mut *pass.s;
        ops.add(&mut s.x, &s.h);

        pass.feed_forward(il, layer);
    }
    pass.head();
}
