// How key and value cells lie in a page of device memory.
//
// A page is 64 cells of all kv heads, head after head. A head's keys are cell-major, dimensions
// padded with zeros to a multiple of 64; its values are dimension-major, padded to a multiple of
// 32: so both are read by the matrix units' lanes as they lie, 16 neighbouring dimensions of a
// cell's key, 16 neighbouring cells of a dimension of the values. Q8_0 is one signed byte for each
// number, followed by an F16 scale for 32 dimensions of a cell, keys [64][dim / 32], values
// [dim / 32][64].
#pragma once

#include "device.cuh"

static constexpr int PAGE_CELLS = 64;

enum KvType { KV_F32, KV_F16, KV_BF16, KV_Q8_0 };

struct PageShape {
    int n_head_kv, dim_k, dim_v;  // as the model has them
    int padded_k, padded_v;       // as stored
    int ty_k, ty_v;
    int k_bytes;     // of a head's keys in a page, values follow
    int head_bytes;  // of a head in a page
    int unused;
    uint64_t page_bytes;
    uint64_t n_pages;  // in the pool
};

struct Table {
    uint32_t kept, n_kept, raw, n_raw;  // first entries and numbers of pages
    uint64_t raw_base;
    uint32_t n_always, top_k;
};

struct Visible {
    uint32_t n_kept;
    uint64_t raw_begin, raw_end;
};

DEVICE int kv_size(int ty) { return ty == KV_F32 ? 4 : ty == KV_Q8_0 ? 1 : 2; }

// One number as stored; `scale` is the block's, Q8_0 only.
DEVICE float kv_number(const char *at, int ty, const char *scale) {
    switch (ty) {
        case KV_F32: return *reinterpret_cast<const float *>(at);
        case KV_F16: return f16_f32(*reinterpret_cast<const uint16_t *>(at));
        case KV_BF16:
            return bits_f32(static_cast<uint32_t>(*reinterpret_cast<const uint16_t *>(at)) << 16);
        default:
            return f16_f32(*reinterpret_cast<const uint16_t *>(scale)) *
                   static_cast<float>(*reinterpret_cast<const int8_t *>(at));
    }
}

// Offsets in a head of a page.
DEVICE int k_at(const PageShape &p, int cell, int i) {
    return (cell * p.padded_k + i) * kv_size(p.ty_k);
}
DEVICE int k_scale_at(const PageShape &p, int cell, int i) {
    return PAGE_CELLS * p.padded_k + (cell * (p.padded_k / 32) + i / 32) * 2;
}
DEVICE int v_at(const PageShape &p, int cell, int i) {
    return p.k_bytes + (i * PAGE_CELLS + cell) * kv_size(p.ty_v);
}
DEVICE int v_scale_at(const PageShape &p, int cell, int i) {
    return p.k_bytes + PAGE_CELLS * p.padded_v + (i / 32 * PAGE_CELLS + cell) * 2;
}
