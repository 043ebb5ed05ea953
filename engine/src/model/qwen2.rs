//! Qwen2 and Qwen2.5: biased q/k/v, NeoX rotary pairs (arXiv 2407.10671).

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
        if let Some(bias) = &layer.attn_q_bias {
            ops.add_bias(&mut s.q, bias);
        }
        if let Some(bias) = &layer.attn_k_bias {
            ops.add_bias(&mut s.k, bias);
        }
        if let Some(bias) = &layer.attn_v_bias {
            ops.add_bias(&mut s.v, bias);
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
