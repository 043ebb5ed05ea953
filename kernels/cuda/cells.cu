// Writing, reading and moving single cells of pages. A cell's address is its page's number times
// 64 plus its place in the page; an address that is not in the pool is passed over.

#include "cells.cuh"

struct CellsArgs {
    PageShape page;
    char *pool;
    const uint32_t *slots;  // [n]
    const uint32_t *to;     // [n], when copying
    float *k;               // [n, n_head_kv, dim_k]
    float *v;               // [n, n_head_kv, dim_v]
};

DEVICE char *cell_head(const CellsArgs &a, uint32_t slot, int head) {
    const uint64_t page = slot / PAGE_CELLS;
    if (page >= a.page.n_pages) return nullptr;
    return a.pool + page * a.page.page_bytes + static_cast<size_t>(head) * a.page.head_bytes;
}

// Stores one number of a block of 32 that a warp holds, lane by lane.
DEVICE void store_number(float x, int ty, char *at, char *scale) {
    if (ty == KV_F32) {
        *reinterpret_cast<float *>(at) = x;
    } else if (ty == KV_F16) {
        *reinterpret_cast<uint16_t *>(at) = static_cast<uint16_t>(f16x2(x, 0.0f));
    } else if (ty == KV_BF16) {
        *reinterpret_cast<uint16_t *>(at) = static_cast<uint16_t>(bf16x2(x, 0.0f));
    } else {
        const float d = warp_max(fabsf(x)) / 127.0f;
        const float inverse = d > 0.0f ? 1.0f / d : 0.0f;
        *reinterpret_cast<int8_t *>(at) = static_cast<int8_t>(static_cast<int>(roundf(x * inverse)));
        if (threadIdx.x % WARP == 0) {
            *reinterpret_cast<uint16_t *>(scale) = static_cast<uint16_t>(f16x2(d, 0.0f));
        }
    }
}

// A block for each cell and head, a warp for each 32 dimensions of its key, then of its value.
KERNEL(write_cells, 512, CellsArgs) {
    const int n = blockIdx.x, head = blockIdx.y;
    const uint32_t slot = a.slots[n];
    char *const to = cell_head(a, slot, head);
    if (to == nullptr) return;
    const PageShape &p = a.page;
    const int cell = slot % PAGE_CELLS, row = n * p.n_head_kv + head, lane = threadIdx.x % WARP;
    int i = threadIdx.x / WARP * WARP + lane;
    if (i < p.padded_k) {
        const float x = i < p.dim_k ? a.k[static_cast<size_t>(row) * p.dim_k + i] : 0.0f;
        store_number(x, p.ty_k, to + k_at(p, cell, i), to + k_scale_at(p, cell, i));
        return;
    }
    i -= p.padded_k;
    const float x = i < p.dim_v ? a.v[static_cast<size_t>(row) * p.dim_v + i] : 0.0f;
    store_number(x, p.ty_v, to + v_at(p, cell, i), to + v_scale_at(p, cell, i));
}

KERNEL(read_cells, 512, CellsArgs) {
    const int n = blockIdx.x, head = blockIdx.y;
    const uint32_t slot = a.slots[n];
    const char *const from = cell_head(a, slot, head);
    if (from == nullptr) return;
    const PageShape &p = a.page;
    const int cell = slot % PAGE_CELLS, row = n * p.n_head_kv + head;
    for (int i = threadIdx.x; i < p.dim_k; i += blockDim.x) {
        a.k[static_cast<size_t>(row) * p.dim_k + i] =
            kv_number(from + k_at(p, cell, i), p.ty_k, from + k_scale_at(p, cell, i));
    }
    for (int i = threadIdx.x; i < p.dim_v; i += blockDim.x) {
        a.v[static_cast<size_t>(row) * p.dim_v + i] =
            kv_number(from + v_at(p, cell, i), p.ty_v, from + v_scale_at(p, cell, i));
    }
}

DEVICE void copy_bytes(char *to, const char *from, int n) {
    for (int i = 0; i < n; i++) to[i] = from[i];
}

// Byte for byte: moving a cell never rounds it again.
KERNEL(copy_cells, 512, CellsArgs) {
    const int n = blockIdx.x, head = blockIdx.y;
    const uint32_t slot = a.slots[n], slot_to = a.to[n];
    const char *const from = cell_head(a, slot, head);
    char *const to = cell_head(a, slot_to, head);
    if (from == nullptr || to == nullptr) return;
    const PageShape &p = a.page;
    const int x = slot % PAGE_CELLS, y = slot_to % PAGE_CELLS;
    for (int i = threadIdx.x; i < p.padded_k; i += blockDim.x) {
        copy_bytes(to + k_at(p, y, i), from + k_at(p, x, i), kv_size(p.ty_k));
        if (p.ty_k == KV_Q8_0 && i % 32 == 0) {
            copy_bytes(to + k_scale_at(p, y, i), from + k_scale_at(p, x, i), 2);
        }
    }
    for (int i = threadIdx.x; i < p.padded_v; i += blockDim.x) {
        copy_bytes(to + v_at(p, y, i), from + v_at(p, x, i), kv_size(p.ty_v));
        if (p.ty_v == KV_Q8_0 && i % 32 == 0) {
            copy_bytes(to + v_scale_at(p, y, i), from + v_scale_at(p, x, i), 2);
        }
    }
}
