// Soft-max attention over two regions of paged cells, with no mask and no score matrix.
//
// A warp takes 16 rows, which are (query, head) pairs of one kv head, and walks pages of 64 cells:
// scores and weighted values are products of the matrix units, straight from the pages in device
// memory or cache to registers. Visible cells are cut at fixed multiples of PART_CELLS logical
// cells; each part has its own running soft-max, and parts are merged in order. Few queries
// (decode) have their parts spread over the device and merged by a second kernel; many (prefill)
// have a warp for each 16 rows that merges as it goes. The arithmetic of a row is the same in both,
// bit for bit.
//
// Queries enter as two halves, good to 2^-17 or better; weights as one half for F16 and Q8_0
// values (2^-11), as two for BF16 and F32.

#include "cells.cuh"

static constexpr int PART_CELLS = 128;
static constexpr int ROWS = 16;

struct AttendArgs {
    PageShape page;
    const float *q;           // [n_q, n_head, dim_k]
    const uint32_t *seq;      // [n_q]
    const Visible *visible;   // [n_q]
    const char *pool;
    const uint32_t *pages;    // page numbers, all tables'
    const Table *tables;
    const uint32_t *chosen;   // [n_q, n_head_kv, chosen_words]: kept cells that top_k leaves
    float *parts;             // [n_q, n_head, max_parts, padded_v + 2]: sums, largest, total
    float *out;               // [n_q, n_head, dim_v]
    uint32_t n_entries, n_tables;
    int n_q, n_head, chosen_words, max_parts;
    float scale;  // times log2(e)
};

// What a row sees. A row that is none sees nothing.
struct Row {
    int query, head;  // head within the kv head's group; query < 0: no row
    uint32_t seq, n_kept;
    uint64_t raw_begin, raw_end;
};

DEVICE Row attend_row(const AttendArgs &a, int query, int head) {
    Row r = {};
    r.query = -1;
    r.seq = ALL;
    if (query < 0) return r;
    r.query = query;
    r.head = head;
    r.seq = a.seq[query];
    const Visible v = a.visible[query];
    r.n_kept = v.n_kept;
    r.raw_begin = v.raw_begin;
    r.raw_end = v.raw_end;
    if (r.raw_begin >= r.raw_end) r.raw_begin = r.raw_end = 0;
    return r;
}

DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
DEVICE uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

// The bits of cells first .. first + 15 that are in [begin, end).
DEVICE uint32_t range_bits(uint64_t first, uint64_t begin, uint64_t end) {
    begin = larger(begin, first);
    end = smaller(end, first + 16);
    if (begin >= end) return 0;
    const uint32_t low = static_cast<uint32_t>(begin - first), high = static_cast<uint32_t>(end - first);
    return ((1u << high) - 1u) & ~((1u << low) - 1u);
}

// The bits of 16 cells that a row sees of its own sequence.
DEVICE uint32_t row_bits(const AttendArgs &a, const Row &r, const Table &table, int head_kv,
                         bool kept, uint64_t first) {
    if (r.query < 0) return 0;
    if (!kept) return range_bits(first, r.raw_begin, r.raw_end);
    uint32_t bits = range_bits(first, 0, r.n_kept);
    const bool ranked = table.top_k > 0 &&
                        r.n_kept > static_cast<uint64_t>(table.n_always) + table.top_k;
    if (ranked && bits != 0) {
        const size_t row = static_cast<size_t>(r.query) * a.page.n_head_kv + head_kv;
        const uint32_t word = static_cast<uint32_t>(first / 32);
        const bool room = word < static_cast<uint32_t>(a.chosen_words);
        const uint32_t chosen = room ? a.chosen[row * a.chosen_words + word] : 0;
        bits &= chosen >> first % 32;
    }
    return bits;
}

// Words of two neighbouring numbers for the matrix units: the numbers (or their upper halves), and
// for F32 what the upper halves leave.
template <int TYPE>
struct KvWords {
    uint32_t words[8];
    uint32_t rest[TYPE == KV_F32 ? 8 : 1];
};

DEVICE uint32_t bf16_rest(float low, float high, uint32_t taken) {
    return bf16x2(low - low_bf16(taken), high - high_bf16(taken));
}

// 16 neighbouring numbers. Q8_0: `scales` are words of two neighbours' scales, `step` apart.
template <int TYPE>
DEVICE void load_kv(KvWords<TYPE> &to, const char *from, const uint32_t *scales, int step) {
    const Words4 *const p = reinterpret_cast<const Words4 *>(from);
    if (TYPE == KV_F32) {
        constexpr int LAST = TYPE == KV_F32 ? 1 : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Words4 x = p[i];
            to.words[2 * i] = bf16x2(bits_f32(x.x), bits_f32(x.y));
            to.words[2 * i + 1] = bf16x2(bits_f32(x.z), bits_f32(x.w));
            to.rest[2 * i * LAST] = bf16_rest(bits_f32(x.x), bits_f32(x.y), to.words[2 * i]);
            to.rest[(2 * i + 1) * LAST] = bf16_rest(bits_f32(x.z), bits_f32(x.w), to.words[2 * i + 1]);
        }
    } else if (TYPE == KV_Q8_0) {
        const Words4 x = p[0];
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // A signed byte plus 128 under 0x64 is 1024 + 128 + byte.
            const uint32_t y = words[i] ^ 0x80808080u;
            const uint32_t u = sub_f16x2(bytes_of(y, 0x64646464u, 0x4140u), 0x64806480u);
            const uint32_t v = sub_f16x2(bytes_of(y, 0x64646464u, 0x4342u), 0x64806480u);
            to.words[2 * i] = mul_f16x2(u, scales[2 * i * step]);
            to.words[2 * i + 1] = mul_f16x2(v, scales[(2 * i + 1) * step]);
        }
    } else {
        const Words4 x = p[0], y = p[1];
        to.words[0] = x.x, to.words[1] = x.y, to.words[2] = x.z, to.words[3] = x.w;
        to.words[4] = y.x, to.words[5] = y.y, to.words[6] = y.z, to.words[7] = y.w;
    }
}

template <int TYPE>
DEVICE void mma_kv(float (&c)[4], const uint32_t (&x)[4], uint32_t b0, uint32_t b1) {
    if (TYPE == KV_F16 || TYPE == KV_Q8_0) {
        mma_f16(c, x, b0, b1);
    } else {
        mma_bf16(c, x, b0, b1);
    }
}

// c += (x + x_rest) (b + b_rest), without the product of the rests.
template <int TYPE>
DEVICE void mma_terms(float (&c)[4], const uint32_t (&x)[4], const uint32_t (&x_rest)[4],
                      const KvWords<TYPE> &b, int i) {
    mma_kv<TYPE>(c, x, b.words[2 * i], b.words[2 * i + 1]);
    mma_kv<TYPE>(c, x_rest, b.words[2 * i], b.words[2 * i + 1]);
    if (TYPE == KV_F32) {
        constexpr int LAST = TYPE == KV_F32 ? 1 : 0;
        mma_kv<TYPE>(c, x, b.rest[2 * i * LAST], b.rest[(2 * i + 1) * LAST]);
    }
}

// A lane's queries in shared memory, as operands: [chunk of 64][term][step of 16][lane].
struct Queries {
    Words4 *words;
    int lane;
    MEMBER Words4 &at(int chunk, int term, int step) const {
        return words[((chunk * 2 + term) * 4 + step) * WARP + lane];
    }
};

DEVICE void split_query(float low, float high, bool f16, uint32_t &word, uint32_t &rest) {
    if (f16) {
        word = f16x2(low, high);
        rest = f16x2(low - low_f16(word), high - high_f16(word));
    } else {
        word = bf16x2(low, high);
        rest = bf16_rest(low, high, word);
    }
}

// Rows g and g + 8 of the tile, dimensions 16t .. 16t + 15 of each 64.
DEVICE void load_queries(const AttendArgs &a, const Queries &to, const Row &up, const Row &down,
                         int head_kv, int t) {
    const int group = a.n_head / a.page.n_head_kv;
    const bool f16 = a.page.ty_k == KV_F16 || a.page.ty_k == KV_Q8_0;
    const auto number = [&](const Row &r, int i) {
        if (r.query < 0 || i >= a.page.dim_k) return 0.0f;
        const size_t row = static_cast<size_t>(r.query) * a.n_head + head_kv * group + r.head;
        return a.q[row * a.page.dim_k + i] * a.scale;
    };
    for (int chunk = 0; chunk < a.page.padded_k / 64; chunk++) {
        for (int step = 0; step < 4; step++) {
            const int i = chunk * 64 + 16 * t + 4 * step;
            Words4 word, rest;
            split_query(number(up, i), number(up, i + 1), f16, word.x, rest.x);
            split_query(number(down, i), number(down, i + 1), f16, word.y, rest.y);
            split_query(number(up, i + 2), number(up, i + 3), f16, word.z, rest.z);
            split_query(number(down, i + 2), number(down, i + 3), f16, word.w, rest.w);
            to.at(chunk, 0, step) = word;
            to.at(chunk, 1, step) = rest;
        }
    }
}

// Scores of a page: s[j] are cells 16t + 2j and 16t + 2j + 1 of rows g (two) and g + 8 (two).
template <int TYPE>
DEVICE void page_scores(float (&s)[8][4], const PageShape &p, const Queries &q, const char *keys,
                        int g, int t) {
#pragma unroll
    for (int j = 0; j < 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
    for (int chunk = 0; chunk < p.padded_k / 64; chunk++) {
        uint32_t x[4][4], x_rest[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Words4 u = q.at(chunk, 0, i), v = q.at(chunk, 1, i);
            x[i][0] = u.x, x[i][1] = u.y, x[i][2] = u.z, x[i][3] = u.w;
            x_rest[i][0] = v.x, x_rest[i][1] = v.y, x_rest[i][2] = v.z, x_rest[i][3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            // Column n of product j is this cell, so that a lane's results are neighbours.
            const int cell = 16 * (g / 2) + 2 * j + g % 2, dim = chunk * 64 + 16 * t;
            KvWords<TYPE> k;
            uint32_t scale = 0;
            if (TYPE == KV_Q8_0) {
                const char *const at = keys + k_scale_at(p, cell, dim);
                scale = twice(*reinterpret_cast<const uint16_t *>(at));
            }
            load_kv<TYPE>(k, keys + k_at(p, cell, dim), &scale, 0);
#pragma unroll
            for (int i = 0; i < 4; i++) mma_terms<TYPE>(s[j], x[i], x_rest[i], k, i);
        }
    }
}

// o += w V: w as scores are, o[n] dimensions 8n + 2t and 8n + 2t + 1. `seen`: bits of the lane's 16
// cells that any row of the tile sees; what nobody sees may be anything, even NaN.
template <int TYPE, int DIM>
DEVICE void page_values(float (&o)[DIM / 8][4], const float (&w)[8][4], const PageShape &p,
                        const char *head, uint32_t seen, int g, int t) {
    uint32_t x[4][4], x_rest[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float low = w[2 * i + k / 2][k % 2 * 2], high = w[2 * i + k / 2][k % 2 * 2 + 1];
            if (TYPE == KV_F16 || TYPE == KV_Q8_0) {
                x[i][k] = f16x2(low, high);
                x_rest[i][k] = 0;
            } else {
                x[i][k] = bf16x2(low, high);
                x_rest[i][k] = bf16_rest(low, high, x[i][k]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
        if (8 * n >= p.padded_v) break;
        KvWords<TYPE> v;
        const uint32_t *scales = nullptr;
        if (TYPE == KV_Q8_0) {
            scales = reinterpret_cast<const uint32_t *>(head + v_scale_at(p, 16 * t, 8 * n));
        }
        load_kv<TYPE>(v, head + v_at(p, 16 * t, 8 * n + g), scales, 1);
        if (seen != 0xffffu) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t keep = (seen >> 2 * i & 1 ? 0xffffu : 0u) |
                                      (seen >> (2 * i + 1) & 1 ? 0xffff0000u : 0u);
                v.words[i] &= keep;
                if (TYPE == KV_F32) v.rest[TYPE == KV_F32 ? i : 0] &= keep;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (TYPE == KV_F16 || TYPE == KV_Q8_0) {
                mma_kv<TYPE>(o[n], x[i], v.words[2 * i], v.words[2 * i + 1]);
            } else {
                mma_terms<TYPE>(o[n], x[i], x_rest[i], v, i);
            }
        }
    }
}

// The running soft-max of a part: rows g (0) and g + 8 (1).
template <int DIM>
struct Running {
    float sums[DIM / 8][4];
    float largest[2], total[2];
};

template <int DIM>
DEVICE void running_start(Running<DIM> &r) {
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) r.sums[n][0] = r.sums[n][1] = r.sums[n][2] = r.sums[n][3] = 0.0f;
    r.largest[0] = r.largest[1] = -INFINITY_F32;
    r.total[0] = r.total[1] = 0.0f;
}

// The cells of one page, of which the rows see `bits`.
template <int DIM>
DEVICE void attend_page(Running<DIM> &r, const PageShape &p, const Queries &q, const char *head,
                        const uint32_t (&bits)[2], uint32_t seen, int g, int t) {
    float s[8][4];
    switch (p.ty_k) {
        case KV_F32: page_scores<KV_F32>(s, p, q, head, g, t); break;
        case KV_F16: page_scores<KV_F16>(s, p, q, head, g, t); break;
        case KV_BF16: page_scores<KV_BF16>(s, p, q, head, g, t); break;
        default: page_scores<KV_Q8_0>(s, p, q, head, g, t); break;
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float largest = -INFINITY_F32;
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[j][2 * row + e];
                x = bits[row] >> (2 * j + e) & 1 ? x : -INFINITY_F32;
                largest = fmaxf(largest, x);
            }
        }
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
        largest = fmaxf(largest, r.largest[row]);
        // A row that has seen nothing yet: weights of zero, not NaN from infinities.
        const float at = largest == -INFINITY_F32 ? 0.0f : largest;
        const float shrink = exp2_fast(r.largest[row] - at);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &x = s[j][2 * row + e];
                x = exp2_fast(x - at);
                sum += x;
            }
        }
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        r.total[row] = fmaf(r.total[row], shrink, sum);
        r.largest[row] = largest;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            r.sums[n][2 * row] *= shrink;
            r.sums[n][2 * row + 1] *= shrink;
        }
    }
    switch (p.ty_v) {
        case KV_F32: page_values<KV_F32, DIM>(r.sums, s, p, head, seen, g, t); break;
        case KV_F16: page_values<KV_F16, DIM>(r.sums, s, p, head, seen, g, t); break;
        case KV_BF16: page_values<KV_BF16, DIM>(r.sums, s, p, head, seen, g, t); break;
        default: page_values<KV_Q8_0, DIM>(r.sums, s, p, head, seen, g, t); break;
    }
}

// One part: cells part * PART_CELLS and on of a region of sequence `seq`, for the rows that belong
// to it.
template <int DIM>
DEVICE void attend_part(Running<DIM> &r, const AttendArgs &a, const Queries &q, const Row (&rows)[2],
                        uint32_t seq, int head_kv, bool kept, uint64_t part, int g, int t) {
    running_start(r);
    const Table table = a.tables[seq];
    for (int i = 0; i < PART_CELLS / PAGE_CELLS; i++) {
        const uint64_t first = part * PART_CELLS + i * PAGE_CELLS;
        uint32_t bits[2];
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const bool mine = rows[row].seq == seq;
            bits[row] = mine ? row_bits(a, rows[row], table, head_kv, kept, first + 16 * t) : 0;
        }
        uint32_t seen = bits[0] | bits[1];
        for (int step = 4; step < WARP; step *= 2) seen |= __shfl_xor_sync(ALL, seen, step);
        if (__ballot_sync(ALL, seen != 0) == 0) continue;
        uint64_t page = ~uint64_t{0};
        const uint64_t index = (kept ? first : first - table.raw_base) / PAGE_CELLS;
        const bool there = kept ? index < table.n_kept
                                : first >= table.raw_base && index < table.n_raw;
        if (there) {
            const uint64_t entry = (kept ? table.kept : table.raw) + index;
            if (entry < a.n_entries) page = a.pages[entry];
        }
        if (page >= a.page.n_pages) {
            // A cell is to be seen that no page holds: NaN says so.
            r.total[0] = r.total[1] = bits_f32(0x7fc00000u);
            r.largest[0] = r.largest[1] = 0.0f;
            continue;
        }
        const char *const head = a.pool + page * a.page.page_bytes +
                                 static_cast<size_t>(head_kv) * a.page.head_bytes;
        attend_page<DIM>(r, a.page, q, head, bits, seen, g, t);
    }
}

// The factors of what has been gathered and of one more part.
DEVICE void merge_factors(float &largest, float more, float &old_factor, float &factor) {
    const float m = fmaxf(largest, more);
    old_factor = exp2_fast(largest - m);
    factor = exp2_fast(more - m);
    largest = m;
}

// Parts of a region that begins at `begin` and ends at `end`.
DEVICE uint64_t part_begin(uint64_t begin) { return begin / PART_CELLS; }
DEVICE uint64_t part_end(uint64_t begin, uint64_t end) {
    return begin < end ? (end + PART_CELLS - 1) / PART_CELLS : begin / PART_CELLS;
}

// Few queries: grid [parts / warps, query and its tiles of 16 heads, kv head]. A warp does one part
// for the heads of one query.
template <int DIM>
DEVICE void attend_split(const AttendArgs &a) {
    SHARED(Words4, shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int group = a.n_head / a.page.n_head_kv, tiles = ceil_div(group, ROWS);
    const int query = blockIdx.y / tiles, first = blockIdx.y % tiles * ROWS, head_kv = blockIdx.z;
    const int part = blockIdx.x * (blockDim.x / WARP) + warp;
    const auto row_of = [&](int r) {
        return first + r < group ? attend_row(a, query, first + r) : attend_row(a, -1, 0);
    };
    const Row rows[2] = {row_of(g), row_of(g + 8)};
    // Row 0 of a tile always is one; all rows are of one query and see the same cells.
    const uint32_t seq = __shfl_sync(ALL, rows[0].seq, 0);
    const Row any = attend_row(a, query, first);
    const uint64_t n_kept = part_end(0, any.n_kept), begin = part_begin(any.raw_begin);
    const uint64_t n = n_kept + part_end(any.raw_begin, any.raw_end) - begin;
    if (seq >= a.n_tables || static_cast<uint64_t>(part) >= n || part >= a.max_parts) return;
    const Queries q = {shared + static_cast<size_t>(warp) * (a.page.padded_k / 64) * 8 * WARP, lane};
    load_queries(a, q, rows[0], rows[1], head_kv, t);
    const bool kept = static_cast<uint64_t>(part) < n_kept;
    Running<DIM> r;
    attend_part<DIM>(r, a, q, rows, seq, head_kv, kept, kept ? part : begin + (part - n_kept), g, t);
#pragma unroll
    for (int row = 0; row < 2; row++) {
        if (rows[row].query < 0) continue;
        const size_t at = static_cast<size_t>(query) * a.n_head + head_kv * group + rows[row].head;
        float *const to = a.parts + (at * a.max_parts + part) * (a.page.padded_v + 2);
#pragma unroll
        for (int d = 0; d < DIM / 8; d++) {
            if (8 * d >= a.page.padded_v) break;
            to[8 * d + 2 * t] = r.sums[d][2 * row];
            to[8 * d + 2 * t + 1] = r.sums[d][2 * row + 1];
        }
        if (t == 0) {
            to[a.page.padded_v] = r.largest[row];
            to[a.page.padded_v + 1] = r.total[row];
        }
    }
}

// The second kernel for few queries: grid [n_q, n_head], a thread for each dimension.
KERNEL(attend_merge, 256, AttendArgs) {
    const int query = blockIdx.x, head = blockIdx.y, i = threadIdx.x;
    const Row r = attend_row(a, query, head);
    const uint64_t begin = part_begin(r.raw_begin);
    const uint64_t n = part_end(0, r.n_kept) + part_end(r.raw_begin, r.raw_end) - begin;
    const size_t row = static_cast<size_t>(query) * a.n_head + head;
    float largest = -INFINITY_F32, total = 0.0f, sum = 0.0f;
    // More parts than the caller said there would be, or no such sequence: NaN, not a wrong answer.
    const bool wrong = n > static_cast<uint64_t>(a.max_parts) || r.seq >= a.n_tables;
    for (uint64_t p = 0; p < (wrong ? 0 : n); p++) {
        const float *const from = a.parts + (row * a.max_parts + p) * (a.page.padded_v + 2);
        const float more = from[a.page.padded_v];
        if (more == -INFINITY_F32) continue;
        float old_factor, factor;
        merge_factors(largest, more, old_factor, factor);
        total = fmaf(total, old_factor, from[a.page.padded_v + 1] * factor);
        if (i < a.page.dim_v) sum = fmaf(sum, old_factor, from[i] * factor);
    }
    if (wrong) total = bits_f32(0x7fc00000u);
    if (i < a.page.dim_v) a.out[row * a.page.dim_v + i] = total == 0.0f ? 0.0f : sum / total;
}

// Many queries: grid [blocks of 16 rows a warp, kv head]. Rows are (query, head) pairs in order.
template <int DIM>
DEVICE void attend_rows(const AttendArgs &a) {
    SHARED(Words4, shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int group = a.n_head / a.page.n_head_kv, head_kv = blockIdx.y;
    const int64_t n_rows = static_cast<int64_t>(a.n_q) * group;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp) * ROWS;
    if (first >= n_rows) return;
    const auto row_of = [&](int64_t r) {
        return r < n_rows ? attend_row(a, static_cast<int>(r / group), static_cast<int>(r % group))
                          : attend_row(a, -1, 0);
    };
    const Row rows[2] = {row_of(first + g), row_of(first + g + 8)};
    const int query_words = a.page.padded_k / 64 * 8 * WARP;
    Words4 *const mine = shared + static_cast<size_t>(warp) * (query_words + DIM / 8 * WARP);
    const Queries q = {mine, lane};
    // What has been gathered of all parts so far; a lane's own, like the queries.
    Words4 *const gathered = mine + query_words + lane;
    load_queries(a, q, rows[0], rows[1], head_kv, t);
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) gathered[n * WARP] = Words4{0, 0, 0, 0};
    float largest[2] = {-INFINITY_F32, -INFINITY_F32}, total[2] = {0.0f, 0.0f};

    // Sequence after sequence, as far as the tile's rows go; equal ones stand side by side.
    uint32_t done = ALL;
    const int last_row = static_cast<int>(smaller(ROWS, static_cast<uint64_t>(n_rows - first))) - 1;
    for (int i = 0; i <= last_row; i++) {
        const uint32_t seq = __shfl_sync(ALL, i < 8 ? rows[0].seq : rows[1].seq, i % 8 * 4);
        if (seq == done) continue;
        done = seq;
        if (seq >= a.n_tables) {
            for (int row = 0; row < 2; row++) {
                if (rows[row].seq == seq) total[row] = bits_f32(0x7fc00000u);
            }
            continue;
        }
        // The cells that any row of this sequence sees.
        uint64_t n_kept = 0, begin = ~uint64_t{0}, end = 0;
        for (int row = 0; row < 2; row++) {
            const Row &r = rows[row];
            if (r.query < 0 || r.seq != seq) continue;
            n_kept = larger(n_kept, r.n_kept);
            if (r.raw_begin < r.raw_end) {
                begin = smaller(begin, r.raw_begin);
                end = larger(end, r.raw_end);
            }
        }
        for (int step = 4; step < WARP; step *= 2) {
            n_kept = larger(n_kept, __shfl_xor_sync(ALL, n_kept, step));
            begin = smaller(begin, __shfl_xor_sync(ALL, begin, step));
            end = larger(end, __shfl_xor_sync(ALL, end, step));
        }
        const uint64_t kept_parts = part_end(0, n_kept);
        const uint64_t first_raw = begin < end ? part_begin(begin) : 0;
        const uint64_t raw_parts = begin < end ? part_end(begin, end) - first_raw : 0;
        for (uint64_t p = 0; p < kept_parts + raw_parts; p++) {
            const bool kept = p < kept_parts;
            Running<DIM> r;
            attend_part<DIM>(r, a, q, rows, seq, head_kv, kept, kept ? p : first_raw + (p - kept_parts),
                             g, t);
            const float most = fmaxf(r.largest[0], r.largest[1]);
            if (__ballot_sync(ALL, most != -INFINITY_F32) == 0) continue;
            float old_factor[2] = {1.0f, 1.0f}, factor[2] = {0.0f, 0.0f};
            for (int row = 0; row < 2; row++) {
                if (r.largest[row] == -INFINITY_F32 || rows[row].seq != seq) continue;
                merge_factors(largest[row], r.largest[row], old_factor[row], factor[row]);
                total[row] = fmaf(total[row], old_factor[row], r.total[row] * factor[row]);
            }
            // A row that sees nothing of this part keeps its bits: factors one and zero.
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                Words4 w = gathered[n * WARP];
                w.x = f32_bits(fmaf(bits_f32(w.x), old_factor[0], r.sums[n][0] * factor[0]));
                w.y = f32_bits(fmaf(bits_f32(w.y), old_factor[0], r.sums[n][1] * factor[0]));
                w.z = f32_bits(fmaf(bits_f32(w.z), old_factor[1], r.sums[n][2] * factor[1]));
                w.w = f32_bits(fmaf(bits_f32(w.w), old_factor[1], r.sums[n][3] * factor[1]));
                gathered[n * WARP] = w;
            }
        }
    }
#pragma unroll
    for (int row = 0; row < 2; row++) {
        if (rows[row].query < 0) continue;
        const size_t at =
            static_cast<size_t>(rows[row].query) * a.n_head + head_kv * group + rows[row].head;
        float *const out = a.out + at * a.page.dim_v;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            const Words4 w = gathered[n * WARP];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int i = 8 * n + 2 * t + e;
                const float sum = bits_f32(row == 0 ? (e == 0 ? w.x : w.y) : (e == 0 ? w.z : w.w));
                if (i < a.page.dim_v) out[i] = total[row] == 0.0f ? 0.0f : sum / total[row];
            }
        }
    }
}

KERNEL(attend_split_64, 128, AttendArgs) { attend_split<64>(a); }
KERNEL(attend_split_128, 128, AttendArgs) { attend_split<128>(a); }
KERNEL(attend_split_256, 128, AttendArgs) { attend_split<256>(a); }
KERNEL(attend_rows_64, 128, AttendArgs) { attend_rows<64>(a); }
KERNEL(attend_rows_128, 128, AttendArgs) { attend_rows<128>(a); }
KERNEL(attend_rows_256, 128, AttendArgs) { attend_rows<256>(a); }
