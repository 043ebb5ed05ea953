// The recurrences in chunks of 64 tokens, whose inside is matrix products (the WY form of Yang et
// al., arXiv 2406.06484; with decay arXiv 2412.06464).
//
// With G the running sum of log decays in a chunk (anew after a reset), rows i, j its tokens:
//
//   L_ij = beta_i exp(G_i - G_j) k_i k_j for j < i,   T = (I + L)^-1,
//   M_ij = exp(G_i - G_j) q_i k_j for j <= i,
//   E = T (beta (V - exp(G) K S)),   out = exp(G) Q S + M E,   S = exp(G_end) S + K'^T E
//
// where K' are the keys times exp(G_end - G_j). What does not need S (K, Q, T, M, K') is made for
// all chunks side by side by the first kernel; the second walks the chunks, a block for 32 columns
// of a head's state. Every number enters the products as two BF16 halves, three products each:
// 2^-16, in F32's range.

#include "recur.cuh"

static constexpr int STEP = 64;
// Sums of log decays below this are a decay to nothing: a reset.
static constexpr float LEAST = -87.0f;
// Numbers of a chunk of a head: exp(G) (0 after a reset), beta, exp(G_end).
static constexpr int FACTORS = 2 * STEP + 4;

struct RecurChunkArgs {
    RecurSequence s;
    uint32_t *operands;  // [chunks, n_head, operand_words]
    float *factors;      // [chunks, n_head, FACTORS]
    int first_chunk, n_chunks;
};

// Operands of a chunk of a head, words of two halves, each as two planes (upper, lower halves):
// keys and queries [64][KP], keys to the end [KP][64], T and M [64][64].
template <int KP>
struct Operands {
    static constexpr int KEYS = 0, QUERIES = 64 * KP, TO_END = 128 * KP, T = 192 * KP,
                         M = 192 * KP + 4096, WORDS = 192 * KP + 8192;
};

DEVICE void split(float low, float high, uint32_t &word, uint32_t &rest) {
    word = bf16x2(low, high);
    rest = bf16x2(low - low_bf16(word), high - high_bf16(word));
}

// 16 columns of a row: upper halves, lower halves.
struct Halves {
    uint32_t high[8], low[8];
};

DEVICE void load_halves(Halves &to, const uint32_t *high, const uint32_t *low) {
    const Words4 *const h = reinterpret_cast<const Words4 *>(high);
    const Words4 *const l = reinterpret_cast<const Words4 *>(low);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Words4 x = h[i], y = l[i];
        to.high[4 * i] = x.x, to.high[4 * i + 1] = x.y, to.high[4 * i + 2] = x.z,
                  to.high[4 * i + 3] = x.w;
        to.low[4 * i] = y.x, to.low[4 * i + 1] = y.y, to.low[4 * i + 2] = y.z,
                 to.low[4 * i + 3] = y.w;
    }
}

// sums += A B over 64 columns of A, rows g and g + 8 of which are `up` and `down`.
DEVICE void product_64(float (&sums)[4], const Halves &up, const Halves &down, const Halves &b) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t x[4] = {up.high[2 * i], down.high[2 * i], up.high[2 * i + 1],
                               down.high[2 * i + 1]};
        const uint32_t y[4] = {up.low[2 * i], down.low[2 * i], up.low[2 * i + 1],
                               down.low[2 * i + 1]};
        mma_bf16(sums, x, b.high[2 * i], b.high[2 * i + 1]);
        mma_bf16(sums, x, b.low[2 * i], b.low[2 * i + 1]);
        mma_bf16(sums, y, b.high[2 * i], b.high[2 * i + 1]);
    }
}

// Grid [chunks, n_head]. Shared memory: keys, queries [2][2 planes][64][KP / 2 + 4 words], then
// L, later T [64][68], then per token: log decay, its running sum, beta, and segment.
template <int KP>
DEVICE void chunk_prepare(const RecurChunkArgs &a) {
    using O = Operands<KP>;
    constexpr int ROW = KP / 2 + 4, L_ROW = 68;
    SHARED(uint32_t, words);
    float *const l = reinterpret_cast<float *>(words + 4 * STEP * ROW);
    float *const gate = l + STEP * L_ROW, *const sum = gate + STEP, *const beta = sum + STEP;
    int *const segment = reinterpret_cast<int *>(beta + STEP);
    const RecurSequence &s = a.s;
    const int head = blockIdx.y, head_k = head / (s.n_head / s.n_head_k);
    const int start = (a.first_chunk + blockIdx.x) * STEP, n = min(STEP, s.n_tokens - start);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const size_t place = static_cast<size_t>(blockIdx.x) * s.n_head + head;
    uint32_t *const out = a.operands + place * O::WORDS;
    float *const factors = a.factors + place * FACTORS;
    const float query_scale = s.rule == RULE_SSD ? 1.0f : 1.0f / sqrtf(static_cast<float>(s.dim_k));

    for (int i = warp; i < STEP; i += 8) {
        const size_t token = start + (i < n ? i : 0);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            const float *const x =
                which == 0 ? s.k + token * s.k_stride + static_cast<size_t>(head_k) * s.dim_k
                           : s.q + token * s.q_stride + static_cast<size_t>(head) * s.dim_k;
            float squares = 0.0f;
            for (int d = lane; d < s.dim_k; d += WARP) squares = fmaf(x[d], x[d], squares);
            float scale = inverse_norm(s.rule, warp_sum(squares));
            if (which == 1) scale *= query_scale;
            for (int w = lane; w < KP / 2; w += WARP) {
                const float u = i < n && 2 * w < s.dim_k ? x[2 * w] * scale : 0.0f;
                const float v = i < n && 2 * w + 1 < s.dim_k ? x[2 * w + 1] * scale : 0.0f;
                uint32_t high, low;
                split(u, v, high, low);
                words[(2 * which * STEP + i) * ROW + w] = high;
                words[((2 * which + 1) * STEP + i) * ROW + w] = low;
                uint32_t *const to = out + (which == 0 ? O::KEYS : O::QUERIES) + i * (KP / 2) + w;
                to[0] = high;
                to[STEP * KP / 2] = low;
            }
        }
    }
    const int me = threadIdx.x;
    if (me < STEP) {
        const size_t token = start + me, at = token * s.n_head + head;
        const bool real = me < n;
        float x = real && s.rule != RULE_DELTA ? s.g[at] : 0.0f;
        if (real && s.resets != nullptr && s.resets[token] != 0) x = -INFINITY_F32;
        gate[me] = x;
        beta[me] = real ? s.beta[at] : 0.0f;
    }
    __syncthreads();
    if (me < STEP) {
        float x = 0.0f;
        int resets = 0;
        for (int j = 0; j <= me; j++) {
            // Summing on from a decay to nothing would round away all smaller ones after it.
            const bool reset = gate[j] < LEAST;
            resets += reset;
            x = reset ? 0.0f : x + gate[j];
        }
        sum[me] = x;
        segment[me] = resets;
        factors[me] = resets == 0 ? expf(x) : 0.0f;
        factors[STEP + me] = beta[me];
        // The padding goes on with the last token's sum and segment: its last one is the end.
        if (me == STEP - 1) factors[2 * STEP] = resets == 0 ? expf(x) : 0.0f;
    }
    __syncthreads();
    {
        // Four warps take rows of keys, four rows of queries, times all keys.
        const int which = warp / 4, row = warp % 4 * 16 + g;
        float products[8][4] = {};
        for (int c = 0; c < KP / 64; c++) {
            const int at = 32 * c + 8 * t;
            const uint32_t *const high = words + 2 * which * STEP * ROW + at;
            Halves up, down;
            load_halves(up, high + row * ROW, high + (STEP + row) * ROW);
            load_halves(down, high + (row + 8) * ROW, high + (STEP + row + 8) * ROW);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                Halves b;
                const uint32_t *const key = words + (8 * j + g) * ROW + at;
                load_halves(b, key, key + STEP * ROW);
                product_64(products[j], up, down, b);
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = row + 8 * half;
                float x[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 8 * j + 2 * t + e;
                    const bool past = column <= i && segment[column] == segment[i];
                    x[e] = past ? expf(sum[i] - sum[column]) * products[j][2 * half + e] : 0.0f;
                }
                if (which == 1) {
                    uint32_t high, low;
                    split(x[0], x[1], high, low);
                    uint32_t *const to = out + O::M + i * (STEP / 2) + 4 * j + t;
                    to[0] = high;
                    to[STEP * STEP / 2] = low;
                } else {
                    const bool writes = s.rule != RULE_SSD;
                    for (int e = 0; e < 2; e++) {
                        const int column = 8 * j + 2 * t + e;
                        l[i * L_ROW + column] = writes && column < i ? beta[i] * x[e] : 0.0f;
                    }
                }
            }
        }
    }
    __syncthreads();
    // Column `me` of the inverse, row by row, in registers.
    float column[STEP];
    if (me < STEP) {
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            float x = i == me ? 1.0f : 0.0f;
#pragma unroll
            for (int j = 0; j < i; j++) x = fmaf(-l[i * L_ROW + j], column[j], x);
            column[i] = x;
        }
    } else {
        // Keys times the decay to the end, transposed.
        for (int i = me - STEP; i < KP * STEP / 2; i += blockDim.x - STEP) {
            const int dim = i / (STEP / 2), w = i % (STEP / 2);
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int token = 2 * w + e;
                const uint32_t high = words[token * ROW + dim / 2];
                const uint32_t low = words[(STEP + token) * ROW + dim / 2];
                const float k = dim % 2 == 0 ? low_bf16(high) + low_bf16(low)
                                             : high_bf16(high) + high_bf16(low);
                const bool same = segment[token] == segment[STEP - 1];
                x[e] = same ? k * expf(sum[STEP - 1] - sum[token]) : 0.0f;
            }
            uint32_t high, low;
            split(x[0], x[1], high, low);
            out[O::TO_END + i] = high;
            out[O::TO_END + KP * STEP / 2 + i] = low;
        }
    }
    __syncthreads();
    if (me < STEP) {
#pragma unroll
        for (int i = 0; i < STEP; i++) l[i * L_ROW + me] = column[i];
    }
    __syncthreads();
    for (int i = me; i < STEP * STEP / 2; i += blockDim.x) {
        const float *const x = l + i / (STEP / 2) * L_ROW + i % (STEP / 2) * 2;
        uint32_t high, low;
        split(x[0], x[1], high, low);
        out[O::T + i] = high;
        out[O::T + STEP * STEP / 2 + i] = low;
    }
}

DEVICE void store_half(uint16_t *high, uint16_t *low, float x) {
    uint32_t word, rest;
    split(x, 0.0f, word, rest);
    *high = static_cast<uint16_t>(word);
    *low = static_cast<uint16_t>(rest);
}

// Grid [slices of 32 columns, n_head], eight warps. The state stays in registers as sums of
// products: a warp holds rows 16 (warp + 8 i) and on. Shared memory, all transposed so that what
// is multiplied along lies side by side, two planes each: S [32][KP / 2 + 4 words], the right side
// and E [32][36 words].
template <int KP>
DEVICE void chunk_walk(const RecurChunkArgs &a) {
    using O = Operands<KP>;
    constexpr int S_ROW = KP / 2 + 4, E_ROW = STEP / 2 + 4, SLICE = 32;
    constexpr int TILES = KP < 128 ? 1 : KP / 128;
    SHARED(uint32_t, state_words);
    uint32_t *const right_words = state_words + 2 * SLICE * S_ROW;
    uint32_t *const e_words = right_words + 2 * SLICE * E_ROW;
    const auto halves = [](uint32_t *w) { return reinterpret_cast<uint16_t *>(w); };
    const RecurSequence &s = a.s;
    const int head = blockIdx.y, head_k = head / (s.n_head / s.n_head_k), first = blockIdx.x * SLICE;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const size_t place_of_head = static_cast<size_t>(head) * s.dim_k * s.dim_v;
    const float *const from = (a.first_chunk == 0 ? s.from : s.state) + place_of_head;
    float *const state = s.state + place_of_head;

    // Element k of product j: row g + 8 (k / 2), column 8j + 2t + k % 2.
    float sums[TILES][4][4];
    const auto tile_row = [&](int i, int k) { return 16 * (warp + 8 * i) + g + 8 * (k / 2); };
    const auto column = [&](int j, int k) { return 8 * j + 2 * t + k % 2; };
    const auto share_state = [&]() {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            if (16 * (warp + 8 * i) >= KP) break;
#pragma unroll
            for (int j = 0; j < 4; j++) {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int at = column(j, k) * 2 * S_ROW + tile_row(i, k);
                    store_half(halves(state_words) + at, halves(state_words + SLICE * S_ROW) + at,
                               sums[i][j][k]);
                }
            }
        }
    };
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int row = tile_row(i, k), c = first + column(j, k);
                const bool real = row < s.dim_k && c < s.dim_v;
                sums[i][j][k] = real ? from[static_cast<size_t>(row) * s.dim_v + c] : 0.0f;
            }
        }
    }
    share_state();
    __syncthreads();
    for (int chunk = 0; chunk < a.n_chunks; chunk++) {
        const size_t place = static_cast<size_t>(chunk) * s.n_head + head;
        const uint32_t *const operands = a.operands + place * O::WORDS;
        const float *const factors = a.factors + place * FACTORS;
        const int start = (a.first_chunk + chunk) * STEP, n = min(STEP, s.n_tokens - start);
        const int row = warp % 4 * 16 + g;
        const auto load_rows = [&](Halves &up, Halves &down, int operand, int at_row, int width,
                                   int plane, int c) {
            const uint32_t *const from = operands + operand + at_row * (width / 2) + 32 * c + 8 * t;
            load_halves(up, from, from + plane);
            load_halves(down, from + 8 * (width / 2), from + 8 * (width / 2) + plane);
        };

        // K S in four warps, Q S in the other four.
        float from_state[4][4] = {};
        for (int c = 0; c < KP / 64; c++) {
            Halves up, down;
            load_rows(up, down, warp < 4 ? O::KEYS : O::QUERIES, row, KP, STEP * KP / 2, c);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Halves b;
                const uint32_t *const column_words = state_words + (8 * j + g) * S_ROW + 32 * c + 8 * t;
                load_halves(b, column_words, column_words + SLICE * S_ROW);
                product_64(from_state[j], up, down, b);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int i = row + 8 * (k / 2), c = first + column(j, k);
                const float factor = factors[i];
                // A state that is forgotten may be infinite: nothing times it is nothing.
                const float x = factor == 0.0f ? 0.0f : factor * from_state[j][k];
                from_state[j][k] = x;
                if (warp >= 4) continue;
                const size_t token = start + i;
                const float v =
                    i < n && c < s.dim_v
                        ? s.v[token * s.v_stride + static_cast<size_t>(head_k) * s.dim_v + c]
                        : 0.0f;
                const int at = column(j, k) * 2 * E_ROW + i;
                store_half(halves(right_words) + at, halves(right_words + SLICE * E_ROW) + at,
                           factors[STEP + i] * (s.rule == RULE_SSD ? v : v - x));
            }
        }
        __syncthreads();
        // E = T times the right side: 16 rows and 16 columns a warp.
        {
            Halves up, down;
            load_rows(up, down, O::T, row, STEP, STEP * STEP / 2, 0);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int group = warp / 4 * 2 + j;
                Halves b;
                const uint32_t *const column_words = right_words + (8 * group + g) * E_ROW + 8 * t;
                load_halves(b, column_words, column_words + SLICE * E_ROW);
                float e[4] = {};
                product_64(e, up, down, b);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int at = column(group, k) * 2 * E_ROW + row + 8 * (k / 2);
                    store_half(halves(e_words) + at, halves(e_words + SLICE * E_ROW) + at, e[k]);
                }
            }
        }
        __syncthreads();
        if (warp >= 4) {
            Halves up, down;
            load_rows(up, down, O::M, row, STEP, STEP * STEP / 2, 0);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Halves b;
                const uint32_t *const column_words = e_words + (8 * j + g) * E_ROW + 8 * t;
                load_halves(b, column_words, column_words + SLICE * E_ROW);
                product_64(from_state[j], up, down, b);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int i = row + 8 * (k / 2), c = first + column(j, k);
                    const size_t token = start + i;
                    if (i < n && c < s.dim_v) {
                        s.out[(token * s.n_head + head) * s.dim_v + c] = from_state[j][k];
                    }
                }
            }
        }
        const float end = factors[2 * STEP];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            if (16 * (warp + 8 * i) >= KP) break;
            Halves up, down;
            load_rows(up, down, O::TO_END, 16 * (warp + 8 * i) + g, STEP, KP * STEP / 2, 0);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                Halves b;
                const uint32_t *const column_words = e_words + (8 * j + g) * E_ROW + 8 * t;
                load_halves(b, column_words, column_words + SLICE * E_ROW);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    sums[i][j][k] = end == 0.0f ? 0.0f : end * sums[i][j][k];
                }
                product_64(sums[i][j], up, down, b);
            }
        }
        // The old state was last read two barriers ago.
        share_state();
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int row = tile_row(i, k), c = first + column(j, k);
                if (row < s.dim_k && c < s.dim_v) {
                    state[static_cast<size_t>(row) * s.dim_v + c] = sums[i][j][k];
                }
            }
        }
    }
}

KERNEL(recur_prepare_64, 256, RecurChunkArgs) { chunk_prepare<64>(a); }
KERNEL(recur_prepare_128, 256, RecurChunkArgs) { chunk_prepare<128>(a); }
KERNEL(recur_prepare_256, 256, RecurChunkArgs) { chunk_prepare<256>(a); }
KERNEL(recur_walk_64, 256, RecurChunkArgs) { chunk_walk<64>(a); }
KERNEL(recur_walk_128, 256, RecurChunkArgs) { chunk_walk<128>(a); }
KERNEL(recur_walk_256, 256, RecurChunkArgs) { chunk_walk<256>(a); }
