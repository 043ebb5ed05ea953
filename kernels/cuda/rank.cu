// Which kept cells a query reads under `top_k`: for each query and kv head the cells after the
// sinks with the largest sum of q k over the head's queries, of equals the older.

#include "cells.cuh"

struct RankArgs {
    PageShape page;
    const float *q;          // [n_q, n_head, dim_k]
    const uint32_t *seq;     // [n_q]
    const Visible *visible;  // [n_q]
    const char *pool;
    const uint32_t *pages;
    const Table *tables;
    float *ranks;      // [n_q, n_head_kv, 32 chosen_words]
    uint32_t *chosen;  // [n_q, n_head_kv, chosen_words]
    uint32_t n_entries, n_tables;
    int n_q, n_head, chosen_words;
};

// Whether a query's kept cells are ranked, and between which numbers.
DEVICE bool rank_range(const RankArgs &a, int query, Table &table, uint32_t &n_kept) {
    const uint32_t seq = a.seq[query];
    if (seq >= a.n_tables) return false;
    table = a.tables[seq];
    n_kept = a.visible[query].n_kept;
    return table.top_k > 0 && n_kept > static_cast<uint64_t>(table.n_always) + table.top_k &&
           n_kept <= static_cast<uint64_t>(a.chosen_words) * 32;
}

// Grid [pages, n_q, n_head_kv]; a thread for each cell. The sum over heads is taken of the queries
// first: it is linear.
KERNEL(rank_cells, 64, RankArgs) {
    SHARED(float, sum);
    const int query = blockIdx.y, head_kv = blockIdx.z, group = a.n_head / a.page.n_head_kv;
    Table table;
    uint32_t n_kept;
    if (!rank_range(a, query, table, n_kept)) return;
    if (blockIdx.x * PAGE_CELLS >= n_kept) return;
    for (int i = threadIdx.x; i < a.page.dim_k; i += blockDim.x) {
        float x = 0.0f;
        for (int h = 0; h < group; h++) {
            const size_t row = static_cast<size_t>(query) * a.n_head + head_kv * group + h;
            x += a.q[row * a.page.dim_k + i];
        }
        sum[i] = x;
    }
    __syncthreads();
    const uint32_t cell = blockIdx.x * PAGE_CELLS + threadIdx.x;
    if (cell >= n_kept) return;
    const uint64_t entry = static_cast<uint64_t>(table.kept) + blockIdx.x;
    const bool there = blockIdx.x < table.n_kept && entry < a.n_entries;
    const uint64_t page = there ? a.pages[entry] : a.page.n_pages;
    float rank = -INFINITY_F32;
    if (page < a.page.n_pages) {
        const char *const head = a.pool + page * a.page.page_bytes +
                                 static_cast<size_t>(head_kv) * a.page.head_bytes;
        rank = 0.0f;
        for (int i = 0; i < a.page.dim_k; i++) {
            const float k = kv_number(head + k_at(a.page, threadIdx.x, i), a.page.ty_k,
                                      head + k_scale_at(a.page, threadIdx.x, i));
            rank = fmaf(sum[i], k, rank);
        }
    }
    const size_t row = static_cast<size_t>(query) * a.page.n_head_kv + head_kv;
    a.ranks[row * a.chosen_words * 32 + cell] = rank;
}

// Grid [n_q, n_head_kv], 256 threads: finds the top_k-th key byte by byte, then marks the cells
// above it and the oldest of its equals.
KERNEL(choose_cells, 256, RankArgs) {
    __shared__ uint32_t counts[256];
    __shared__ uint32_t found[2];
    __shared__ uint32_t equal_before[WARP];
    const int query = blockIdx.x, head_kv = blockIdx.y;
    Table table;
    uint32_t n_kept;
    if (!rank_range(a, query, table, n_kept)) return;
    const size_t row = static_cast<size_t>(query) * a.page.n_head_kv + head_kv;
    const float *const ranks = a.ranks + row * a.chosen_words * 32;
    uint32_t key = 0, wanted = table.top_k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        counts[threadIdx.x] = 0;
        __syncthreads();
        for (uint32_t i = table.n_always + threadIdx.x; i < n_kept; i += blockDim.x) {
            const uint32_t k = order_key(ranks[i]);
            // Shifts by 32 are not defined: the first round takes every key.
            if (shift == 24 || k >> (shift + 8) == key >> (shift + 8)) {
                atomicAdd(&counts[k >> shift & 255], 1u);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int byte = 255;
            uint32_t left = wanted;
            while (byte > 0 && counts[byte] < left) left -= counts[byte--];
            found[0] = static_cast<uint32_t>(byte);
            found[1] = left;
        }
        __syncthreads();
        key |= found[0] << shift;
        wanted = found[1];
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint32_t equal_so_far = 0;
    for (uint32_t first = 0; first < n_kept; first += blockDim.x) {
        const uint32_t i = first + threadIdx.x;
        const bool ranked = i >= table.n_always && i < n_kept;
        const uint32_t k = ranked ? order_key(ranks[i]) : 0;
        const bool equal = ranked && k == key;
        const uint32_t equals = __ballot_sync(ALL, equal);
        __syncthreads();
        if (lane == 0) equal_before[warp] = static_cast<uint32_t>(__popc(equals));
        __syncthreads();
        uint32_t before = equal_so_far + static_cast<uint32_t>(__popc(equals & ((1u << lane) - 1u)));
        for (int w = 0; w < static_cast<int>(blockDim.x / WARP); w++) {
            if (w < warp) before += equal_before[w];
            equal_so_far += equal_before[w];
        }
        const bool keep = i < table.n_always || (ranked && (k > key || (equal && before < wanted)));
        const uint32_t word = __ballot_sync(ALL, keep);
        const uint32_t at = (first + warp * WARP) / 32;
        if (lane == 0 && at < static_cast<uint32_t>(a.chosen_words)) {
            a.chosen[row * a.chosen_words + at] = word;
        }
    }
}
