//! The same shapes through ggml's own ops, all nodes of a bench in one graph, so that starting its
//! threads is paid once.

use ggml_sys::raw::*;
use mneme_kernels::attend::KvType;

/// A graph and the memory of its tensors.
pub struct Graph {
    ctx: *mut ggml_context,
    graph: *mut ggml_cgraph,
    n_threads: i32,
}

impl Graph {
    /// Room for `bytes` of tensors; `build` returns the results.
    pub fn new(
        bytes: usize,
        n_threads: usize,
        build: impl FnOnce(*mut ggml_context) -> Vec<*mut ggml_tensor>,
    ) -> Graph {
        ggml_sys::init();
        // SAFETY: a context that owns its memory; the results belong to it.
        unsafe {
            let ctx = ggml_init(ggml_init_params {
                mem_size: bytes + (512 << 20),
                mem_buffer: std::ptr::null_mut(),
                no_alloc: false,
            });
            // Some ten tensors a node.
            let graph = ggml_new_graph_custom(ctx, 1 << 14, false);
            for result in build(ctx) {
                ggml_build_forward_expand(graph, result);
            }
            Graph {
                ctx,
                graph,
                n_threads: n_threads as i32,
            }
        }
    }

    /// Computes all of it once.
    pub fn run(&self) {
        // SAFETY: the context lives; its memory has room for the work buffer.
        unsafe {
            let used = ggml_used_mem(self.ctx);
            let status = ggml_graph_compute_with_ctx(self.ctx, self.graph, self.n_threads);
            assert_eq!(
                status, GGML_STATUS_SUCCESS,
                "ggml: compute, {used} bytes used"
            );
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_init`, freed once.
        unsafe { ggml_free(self.ctx) }
    }
}

/// A tensor of `ne` filled with small numbers of its type.
///
/// # Safety
/// `ctx` must live and have room.
unsafe fn tensor(ctx: *mut ggml_context, ty: u32, ne: [i64; 4], value: f32) -> *mut ggml_tensor {
    // SAFETY: passed on; the data has `ggml_nbytes`.
    unsafe {
        let t = ggml_new_tensor_4d(ctx, ty, ne[0], ne[1], ne[2], ne[3]);
        let bytes = ggml_nbytes(t);
        let data = ggml_get_data(t).cast::<u8>();
        if ty == GGML_TYPE_F32 {
            for (i, x) in std::slice::from_raw_parts_mut(data.cast::<f32>(), bytes / 4)
                .iter_mut()
                .enumerate()
            {
                *x = value * ((i % 61) as f32 / 61.0 + 0.2);
            }
        } else if ty == GGML_TYPE_F16 {
            let x = half::f16::from_f32(value).to_bits();
            std::slice::from_raw_parts_mut(data.cast::<u16>(), bytes / 2).fill(x);
        } else {
            // Q8_0: every scale 0x2020 (0.008), every quant 32.
            std::slice::from_raw_parts_mut(data, bytes).fill(0x20);
        }
        t
    }
}

/// `FLASH_ATTN_EXT`: `n_seqs` nodes of `n_q` queries on `cells` each, head shape `(n_head,
/// n_head_kv, dim)`; more than one query takes a causal mask.
pub fn flash_attn(
    ty: KvType,
    (n_head, n_head_kv, dim): (usize, usize, usize),
    n_q: usize,
    cells: usize,
    n_seqs: usize,
    n_threads: usize,
) -> Graph {
    let ty = if ty == KvType::Q8_0 {
        GGML_TYPE_Q8_0
    } else {
        GGML_TYPE_F16
    };
    let kv = cells * n_head_kv * dim * 4;
    Graph::new(
        n_seqs * (kv + n_q * n_head * dim * 8) + n_q * cells * 2,
        n_threads,
        |ctx| {
            // SAFETY: shapes fit each other as ggml asks.
            unsafe {
                let mask = if n_q == 1 {
                    std::ptr::null_mut()
                } else {
                    let mask = tensor(ctx, GGML_TYPE_F16, [cells as i64, n_q as i64, 1, 1], 0.0);
                    let data = ggml_get_data(mask).cast::<u16>();
                    for i in 0..n_q {
                        for c in cells - n_q + i + 1..cells {
                            *data.add(i * cells + c) = half::f16::NEG_INFINITY.to_bits();
                        }
                    }
                    mask
                };
                (0..n_seqs)
                    .map(|_| {
                        let kv = [dim as i64, cells as i64, n_head_kv as i64, 1];
                        let k = tensor(ctx, ty, kv, 0.1);
                        let v = tensor(ctx, ty, kv, 0.1);
                        let q = [dim as i64, n_q as i64, n_head as i64, 1];
                        let q = tensor(ctx, GGML_TYPE_F32, q, 0.1);
                        ggml_flash_attn_ext(ctx, q, k, v, mask, 0.088, 0.0, 0.0)
                    })
                    .collect()
            }
        },
    )
}

/// `GATED_DELTA_NET`: `n_seqs` nodes of `n_tokens` on `n_head` states of `dim` squared.
pub fn gated_delta_net(
    dim: usize,
    n_head: usize,
    n_tokens: usize,
    n_seqs: usize,
    n_threads: usize,
) -> Graph {
    let bytes = n_head * dim * (n_tokens * 4 + dim * 2) * 4 + n_tokens * n_head * 8;
    Graph::new(n_seqs * bytes, n_threads, |ctx| {
        let (d, h, t) = (dim as i64, n_head as i64, n_tokens as i64);
        let f32 = GGML_TYPE_F32;
        // SAFETY: shapes fit each other as ggml asks.
        unsafe {
            (0..n_seqs)
                .map(|_| {
                    let q = tensor(ctx, f32, [d, h, t, 1], 0.1);
                    let k = tensor(ctx, f32, [d, h, t, 1], 0.1);
                    let v = tensor(ctx, f32, [d, h, t, 1], 0.1);
                    let g = tensor(ctx, f32, [1, h, t, 1], -0.1);
                    let beta = tensor(ctx, f32, [1, h, t, 1], 0.5);
                    let state = tensor(ctx, f32, [d, d, h, 1], 0.1);
                    ggml_gated_delta_net(ctx, q, k, v, g, beta, state, 1)
                })
                .collect()
        }
    })
}

/// `SSM_SCAN` of Mamba2 shape: a scalar decay per head, one group per head.
pub fn ssm_scan(
    dim: usize,
    n_head: usize,
    n_tokens: usize,
    n_seqs: usize,
    n_threads: usize,
) -> Graph {
    let bytes = n_head * dim * (n_tokens * 4 + dim * 2) * 4 + n_tokens * n_head * 4;
    Graph::new(n_seqs * bytes, n_threads, |ctx| {
        let (d, h, t) = (dim as i64, n_head as i64, n_tokens as i64);
        let f32 = GGML_TYPE_F32;
        // SAFETY: shapes fit each other as ggml asks.
        unsafe {
            (0..n_seqs)
                .map(|_| {
                    let s = tensor(ctx, f32, [d, d, h, 1], 0.1);
                    let x = tensor(ctx, f32, [d, h, t, 1], 0.1);
                    let dt = tensor(ctx, f32, [h, t, 1, 1], 0.1);
                    let a = tensor(ctx, f32, [1, h, 1, 1], -0.1);
                    let b = tensor(ctx, f32, [d, h, t, 1], 0.1);
                    let c = tensor(ctx, f32, [d, h, t, 1], 0.1);
                    let ids = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, 1, 1, 1, 1);
                    *ggml_get_data(ids).cast::<i32>() = 0;
                    ggml_ssm_scan(ctx, s, x, dt, a, b, c, ids, 1)
                })
                .collect()
        }
    })
}
