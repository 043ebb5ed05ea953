// Activations times weight matrices, out[t, r] = sum_c w[r, c] x[t, c].
//
// Both forms do the same arithmetic in the same order, so a token's numbers do not depend on its
// company: F16 products with F32 sums inside one of eight runs of columns, then the runs' sums in
// order. The vector form (up to eight tokens) gives each run to a warp of its own, because a step
// of one token must read the weights from all of the device at once; the tile form walks the runs
// one after another for many tokens, weights from memory through registers into the matrix units,
// activations through shared memory.

#include "packed.cuh"

static constexpr int N_RUNS = 8;
static constexpr int MAX_MATRICES = 8;

struct PrepareArgs {
    const float *x;  // [n_tokens, n_cols]
    uint32_t *high;  // [n_tokens, n_chunks * 64] halves
    uint32_t *low;   // the same: what F16 leaves of each number; null: not wanted
    float *scale;    // [n_tokens]
    int n_cols, n_chunks;
};

// Activations as halves. A token is scaled by a power of two such that its largest number is near
// 2^13: F16 then loses nothing to its range, only 2^-11 of each number to rounding.
KERNEL(mul_mat_prepare, 1024, PrepareArgs) {
    __shared__ float room[WARP];
    const size_t t = blockIdx.x;
    const float *const x = a.x + t * a.n_cols;
    float largest = 0.0f;
    for (int c = threadIdx.x; c < a.n_cols; c += blockDim.x) largest = fmaxf(largest, fabsf(x[c]));
    largest = block_max(largest, room);
    int exponent = 0;
    if (largest > 0.0f && largest < INFINITY_F32) exponent = 13 - ilogbf(largest);
    // In two steps: 2^140 is no F32.
    const float first = ldexpf(1.0f, exponent / 2), second = ldexpf(1.0f, exponent - exponent / 2);
    if (threadIdx.x == 0) a.scale[t] = ldexpf(1.0f, -exponent);
    const size_t row = t * a.n_chunks * (CHUNK / 2);
    for (int c = threadIdx.x; c < a.n_chunks * (CHUNK / 2); c += blockDim.x) {
        const float u = 2 * c < a.n_cols ? x[2 * c] * first * second : 0.0f;
        const float v = 2 * c + 1 < a.n_cols ? x[2 * c + 1] * first * second : 0.0f;
        const uint32_t high = f16x2(u, v);
        a.high[row + c] = high;
        if (a.low != nullptr) a.low[row + c] = f16x2(u - low_f16(high), v - high_f16(high));
    }
}

struct Matrix {
    const char *bytes;       // panels
    const float *row_scale;  // [n_rows]
    float *out;              // [n_tokens, n_rows]
    int n_rows;
    int first;  // number of its first block of rows among those of all matrices
};

struct MulMatArgs {
    const Words4 *high, *low;  // activations, [n_tokens, n_chunks * 64] halves
    const float *scale;        // [n_tokens]
    int n_tokens, n_chunks, n_matrices, unused;
    Matrix matrices[MAX_MATRICES];
};

DEVICE const Matrix &matrix_of(const MulMatArgs &a, int block) {
    int i = 0;
    while (i + 1 < a.n_matrices && block >= a.matrices[i + 1].first) i++;
    return a.matrices[i];
}

// First chunk of a run.
DEVICE int run_begin(int run, int n_chunks) { return run * n_chunks / N_RUNS; }

// sums += one chunk. `x` are the lane's eight words of a token's 16 columns.
template <int TYPE>
DEVICE void chunk_product(float (&sums)[4], const uint32_t (&row_g)[8], const uint32_t (&row_g8)[8],
                          const uint32_t (&rest_g)[8], const uint32_t (&rest_g8)[8],
                          const uint32_t (&x)[8], const uint32_t (&x_rest)[8]) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint32_t w[4] = {row_g[2 * j], row_g8[2 * j], row_g[2 * j + 1], row_g8[2 * j + 1]};
        mma_f16(sums, w, x[2 * j], x[2 * j + 1]);
        if (TYPE == PACKED_F32) {
            mma_f16(sums, w, x_rest[2 * j], x_rest[2 * j + 1]);
            const uint32_t r[4] = {rest_g[2 * j], rest_g8[2 * j], rest_g[2 * j + 1],
                                   rest_g8[2 * j + 1]};
            mma_f16(sums, r, x[2 * j], x[2 * j + 1]);
        }
    }
}

DEVICE void load_words(uint32_t (&to)[8], const Words4 *from, int stride) {
    const Words4 u = from[0], v = from[stride];
    to[0] = u.x, to[1] = u.y, to[2] = u.z, to[3] = u.w;
    to[4] = v.x, to[5] = v.y, to[6] = v.z, to[7] = v.w;
}

// Up to eight tokens, which are the columns of the products. A block is one panel; a warp is one
// run of its columns. Several chunks are asked for before the first is used.
template <int TYPE>
DEVICE void mul_mat_vector(const MulMatArgs &a) {
    constexpr int AHEAD = TYPE == PACKED_F32 ? 1 : TYPE == PACKED_F16 ? 2 : 4;
    const Matrix &m = matrix_of(a, blockIdx.x);
    const int panel = blockIdx.x - m.first;
    const int run = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const char *const bytes = m.bytes + panel * Packing<TYPE>::panel_bytes(a.n_chunks);
    const bool wanted = g < a.n_tokens;
    const size_t token = static_cast<size_t>(g) * a.n_chunks * 8 + 2 * t;
    float sums[4] = {};
    const int end = run_begin(run + 1, a.n_chunks);
    for (int c = run_begin(run, a.n_chunks); c < end; c += AHEAD) {
        PackedChunk<TYPE> chunks[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (c + i < end) load_chunk<TYPE>(chunks[i], bytes, c + i, lane);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (c + i >= end) break;
            uint32_t x[8] = {}, x_rest[8] = {};
            if (wanted) {
                load_words(x, a.high + token + (c + i) * 8, 1);
                if (TYPE == PACKED_F32) load_words(x_rest, a.low + token + (c + i) * 8, 1);
            }
            uint32_t row_g[8], row_g8[8], rest_g[8], rest_g8[8];
            decode_chunk<TYPE>(chunks[i], row_g, row_g8, rest_g, rest_g8);
            chunk_product<TYPE>(sums, row_g, row_g8, rest_g, rest_g8, x, x_rest);
        }
    }
    __shared__ float parts[N_RUNS][8][PANEL];
    parts[run][2 * t][g] = sums[0];
    parts[run][2 * t + 1][g] = sums[1];
    parts[run][2 * t][g + 8] = sums[2];
    parts[run][2 * t + 1][g + 8] = sums[3];
    __syncthreads();
    const int n = threadIdx.x / PANEL, r = threadIdx.x % PANEL, row = panel * PANEL + r;
    if (n < a.n_tokens && row < m.n_rows) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < N_RUNS; i++) total += parts[i][n][r];
        m.out[static_cast<size_t>(n) * m.n_rows + row] = total * m.row_scale[row] * a.scale[n];
    }
}

// A block of eight warps, four by rows and two by tokens; a warp takes PANELS panels and COLUMNS
// groups of eight tokens.
template <int TYPE, int PANELS, int COLUMNS>
DEVICE void mul_mat_tile(const MulMatArgs &a) {
    constexpr int TERMS = Packing<TYPE>::TERMS, STAGES = 3;
    constexpr int TOKENS = 2 * COLUMNS * 8;
    // Shared memory: [STAGES][TERMS][TOKENS][8 words of 16 bytes]. Word u of a token stands at
    // u ^ (token % 8), so that eight lanes read eight different groups of banks.
    SHARED(Words4, shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const Matrix &m = matrix_of(a, blockIdx.y);
    const int n_panels = ceil_div(m.n_rows, PANEL);
    const int panel = (blockIdx.y - m.first) * 4 * PANELS + warp / 2 * PANELS;
    const int first_token = blockIdx.x * TOKENS, my_tokens = warp % 2 * COLUMNS * 8;
    const size_t panel_bytes = Packing<TYPE>::panel_bytes(a.n_chunks);

    const auto fetch = [&](int c) {
        if (c < a.n_chunks) {
            Words4 *const stage = shared + c % STAGES * TERMS * TOKENS * 8;
            for (int i = threadIdx.x; i < TERMS * TOKENS * 8; i += blockDim.x) {
                const int term = i / (TOKENS * 8), token = i / 8 % TOKENS, u = i % 8;
                const bool wanted = first_token + token < a.n_tokens;
                const size_t row = wanted ? first_token + token : 0;
                const Words4 *const from = term == 0 ? a.high : a.low;
                copy_async(stage + (term * TOKENS + token) * 8 + (u ^ (token % 8)),
                           from + (row * a.n_chunks + c) * 8 + u, wanted);
            }
        }
        copy_commit();
    };
    PackedChunk<TYPE> next[PANELS];
    const auto load = [&](int c) {
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            // Past the last panel another one is multiplied for nothing.
            const int p = min(panel + i, n_panels - 1);
            load_chunk<TYPE>(next[i], m.bytes + p * panel_bytes, c, lane);
        }
    };

    float sums[PANELS][COLUMNS][4] = {}, totals[PANELS][COLUMNS][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) fetch(s);
    load(0);
    int run = 0;
    for (int c = 0; c < a.n_chunks; c++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        fetch(c + STAGES - 1);
        uint32_t row_g[PANELS][8], row_g8[PANELS][8], rest_g[PANELS][8], rest_g8[PANELS][8];
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            decode_chunk<TYPE>(next[i], row_g[i], row_g8[i], rest_g[i], rest_g8[i]);
        }
        if (c + 1 < a.n_chunks) load(c + 1);
        const Words4 *const stage = shared + c % STAGES * TERMS * TOKENS * 8;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const int token = my_tokens + j * 8 + g;
            // Word 2t + 1 stands beside word 2t, on the side that the swizzle decides.
            const int u = (2 * t) ^ (token % 8), v = (2 * t + 1) ^ (token % 8);
            uint32_t x[8], x_rest[8];
            load_words(x, stage + token * 8 + u, v - u);
            if (TYPE == PACKED_F32) {
                load_words(x_rest, stage + ((TERMS - 1) * TOKENS + token) * 8 + u, v - u);
            }
#pragma unroll
            for (int i = 0; i < PANELS; i++) {
                chunk_product<TYPE>(sums[i][j], row_g[i], row_g8[i], rest_g[i], rest_g8[i], x,
                                    x_rest);
            }
        }
        // Runs without chunks end here too: they add nothing.
        while (run < N_RUNS && run_begin(run + 1, a.n_chunks) <= c + 1) {
            run++;
#pragma unroll
            for (int i = 0; i < PANELS; i++) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        totals[i][j][k] += sums[i][j][k];
                        sums[i][j][k] = 0.0f;
                    }
                }
            }
        }
    }
    copy_wait<0>();
#pragma unroll
    for (int i = 0; i < PANELS; i++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int row = (panel + i) * PANEL + g + (k / 2) * 8;
            if (row >= m.n_rows) continue;
            const float row_scale = m.row_scale[row];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                const int token = first_token + my_tokens + j * 8 + 2 * t + k % 2;
                if (token < a.n_tokens) {
                    m.out[static_cast<size_t>(token) * m.n_rows + row] =
                        totals[i][j][k] * row_scale * a.scale[token];
                }
            }
        }
    }
}

#define MUL_MAT(type, TYPE)                                                                \
    KERNEL(mul_mat_vector_##type, 256, MulMatArgs) { mul_mat_vector<TYPE>(a); }            \
    KERNEL(mul_mat_small_##type, 256, MulMatArgs) { mul_mat_tile<TYPE, 1, 2>(a); }         \
    KERNEL(mul_mat_large_##type, 256, MulMatArgs) {                                        \
        mul_mat_tile<TYPE, 2, (TYPE == PACKED_F32 ? 4 : 8)>(a);                            \
    }

MUL_MAT(f32, PACKED_F32)
MUL_MAT(f16, PACKED_F16)
MUL_MAT(q8_0, PACKED_Q8_0)
MUL_MAT(q4_0, PACKED_Q4_0)
MUL_MAT(q4_k, PACKED_Q4_K)
MUL_MAT(q6_k, PACKED_Q6_K)
