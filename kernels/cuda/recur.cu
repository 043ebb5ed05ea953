// The gated delta rule and its siblings, token by token. With k, q normalised and a = exp(g):
//
//   e = beta (v - a S^T k)   (Ssd: e = beta v),   S = a S + k e^T,   out = S^T q
//
// A block holds 32 columns of one head's state in registers, eight warps a share of the rows each,
// from the first token to the last. Columns never meet, so heads and columns are independent
// blocks. A token needs one pass over the state: out = a S^T q + e (k q) with the old S gives both
// sums at once, and one barrier.

#include "recur.cuh"

static constexpr int MAX_SEQUENCES = 16;
static constexpr int COLUMNS = 32;
static constexpr int SHARES = 8;
// Tokens whose keys and queries are normalised together.
static constexpr int TOKENS = 8;

struct RecurArgs {
    RecurSequence sequences[MAX_SEQUENCES];
    int n_sequences;
};

// N: rows of the state that a thread holds.
template <int N>
DEVICE void recur(const RecurArgs &a) {
    constexpr int DIM = N * SHARES;
    alignas(16) __shared__ float keys[TOKENS][DIM], queries[TOKENS][DIM];
    __shared__ float key_query[TOKENS];
    __shared__ float parts[2][SHARES][2][COLUMNS];
    int which = 0;
    while (which + 1 < a.n_sequences && static_cast<int>(blockIdx.x) >= a.sequences[which + 1].first) {
        which++;
    }
    const RecurSequence &s = a.sequences[which];
    const int n_slices = ceil_div(s.dim_v, COLUMNS);
    const int block = static_cast<int>(blockIdx.x) - s.first;
    const int head = block / n_slices, head_k = head / (s.n_head / s.n_head_k);
    const int share = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int column = block % n_slices * COLUMNS + lane;
    const bool real = column < s.dim_v;
    const size_t place = (static_cast<size_t>(head) * s.dim_k + share * N) * s.dim_v + column;
    const float *const from = s.from + place;
    float *const state = s.state + place;

    float rows[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        rows[i] = real && share * N + i < s.dim_k ? from[static_cast<size_t>(i) * s.dim_v] : 0.0f;
    }
    const float query_scale = s.rule == RULE_SSD ? 1.0f : 1.0f / sqrtf(static_cast<float>(s.dim_k));
    for (int first = 0; first < s.n_tokens; first += TOKENS) {
        const int n = min(TOKENS, s.n_tokens - first);
        __syncthreads();
        if (share < n) {
            // A warp normalises the key and the query of one token.
            const size_t token = first + share;
            const float *const k = s.k + token * s.k_stride + static_cast<size_t>(head_k) * s.dim_k;
            const float *const q = s.q + token * s.q_stride + static_cast<size_t>(head) * s.dim_k;
            float kk = 0.0f, qq = 0.0f;
            for (int i = lane; i < s.dim_k; i += WARP) {
                kk = fmaf(k[i], k[i], kk);
                qq = fmaf(q[i], q[i], qq);
            }
            const float k_scale = inverse_norm(s.rule, warp_sum(kk));
            const float q_scale = inverse_norm(s.rule, warp_sum(qq)) * query_scale;
            float kq = 0.0f;
            for (int i = lane; i < DIM; i += WARP) {
                const float x = i < s.dim_k ? k[i] * k_scale : 0.0f;
                const float y = i < s.dim_k ? q[i] * q_scale : 0.0f;
                keys[share][i] = x;
                queries[share][i] = y;
                kq = fmaf(x, y, kq);
            }
            kq = warp_sum(kq);
            if (lane == 0) key_query[share] = kq;
        }
        __syncthreads();
        for (int i = 0; i < n; i++) {
            const size_t token = first + i, gate = token * s.n_head + head;
            if (s.resets != nullptr && s.resets[token] != 0) {
#pragma unroll
                for (int j = 0; j < N; j++) rows[j] = 0.0f;
            }
            const float decay = s.rule == RULE_DELTA ? 1.0f : expf(s.g[gate]);
            const float beta = s.beta[gate];
            const float v =
                real ? s.v[token * s.v_stride + static_cast<size_t>(head_k) * s.dim_v + column] : 0.0f;
            const float *const k = keys[i] + share * N, *const q = queries[i] + share * N;
            float by_key = 0.0f, by_query = 0.0f;
#pragma unroll
            for (int j = 0; j < N; j++) {
                by_key = fmaf(rows[j], k[j], by_key);
                by_query = fmaf(rows[j], q[j], by_query);
            }
            // Two buffers in turn: whoever is a token ahead writes to the other one.
            parts[i % 2][share][0][lane] = by_key;
            parts[i % 2][share][1][lane] = by_query;
            __syncthreads();
            by_key = by_query = 0.0f;
#pragma unroll
            for (int j = 0; j < SHARES; j++) {
                by_key += parts[i % 2][j][0][lane];
                by_query += parts[i % 2][j][1][lane];
            }
            const float e = beta * (s.rule == RULE_SSD ? v : v - decay * by_key);
            if (share == i && real) {
                s.out[(token * s.n_head + head) * s.dim_v + column] =
                    fmaf(e, key_query[i], decay * by_query);
            }
#pragma unroll
            for (int j = 0; j < N; j++) rows[j] = fmaf(k[j], e, decay * rows[j]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (real && share * N + i < s.dim_k) state[static_cast<size_t>(i) * s.dim_v] = rows[i];
    }
}

KERNEL(recur_64, 256, RecurArgs) { recur<8>(a); }
KERNEL(recur_128, 256, RecurArgs) { recur<16>(a); }
KERNEL(recur_256, 256, RecurArgs) { recur<32>(a); }
