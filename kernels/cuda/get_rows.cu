// Rows of packed weight matrices (embeddings) and of activations, picked by number.

#include "packed.cuh"

struct GetRowsArgs {
    const char *bytes;       // panels of a packed matrix
    const float *row_scale;  // [n_rows]
    const uint32_t *ids;     // [n]
    float *out;              // [n, n_cols]
    uint32_t n_rows;
    int n_cols, n_chunks;
};

// Number c of row r exactly as the file has it, but for the row's power of two.
template <int TYPE>
DEVICE float packed_number(const char *panel, int r, int c) {
    using P = Packing<TYPE>;
    const int g = r % 8, below = r / 8, chunk = c / CHUNK, t = c % CHUNK / 16, i = c % 16;
    const int lane = 4 * g + t;
    const char *const super = P::super(panel, chunk);
    const char *const from = super + chunk % P::SUPER * P::CHUNK_BYTES;
    const auto half_at = [](const char *p) {
        return f16_f32(*reinterpret_cast<const uint16_t *>(p));
    };
    if (TYPE == PACKED_F16 || TYPE == PACKED_F32) {
        const char *const at = from + ((2 * below + i / 8) * WARP + lane) * 16 + i % 8 * 2;
        const float x = half_at(at);
        return TYPE == PACKED_F32 ? x + half_at(at + 4 * WARP * 16) : x;
    }
    if (TYPE == PACKED_Q8_0) {
        const int q = static_cast<uint8_t>(from[(below * WARP + lane) * 16 + i]) - 128;
        return half_at(from + 2 * WARP * 16 + (t / 2 * 8 + g) * 4 + 2 * below) *
               static_cast<float>(q);
    }
    // Nibbles: column c of eight is nibble c / 2 + 4 (c % 2) of a word.
    const int place = i % 8 / 2 + 4 * (i % 2);
    const uint32_t word = *reinterpret_cast<const uint32_t *>(from + lane * 16 + below * 8 + i / 8 * 4);
    const int q = static_cast<int>(word >> 4 * place & 15);
    const char *const rest = from + WARP * 16;
    if (TYPE == PACKED_Q4_0) {
        return half_at(rest + (t / 2 * 8 + g) * 4 + 2 * below) * static_cast<float>(q - 8);
    }
    const char *const shared = super + 4 * P::CHUNK_BYTES;
    if (TYPE == PACKED_Q4_K) {
        const uint8_t *const s =
            reinterpret_cast<const uint8_t *>(rest) + (t / 2 * 8 + g) * 4 + 2 * below;
        const float d = half_at(shared + g * 8 + below * 4) * static_cast<float>(s[0]);
        const float m = half_at(shared + g * 8 + below * 4 + 2) * static_cast<float>(s[1]);
        return d * static_cast<float>(q) - m;
    }
    const uint32_t high = *reinterpret_cast<const uint32_t *>(rest + lane * 8 + below * 4);
    const int top = static_cast<int>(high >> (i / 2 * 2 + i % 2 * 16) & 3);
    const int s = static_cast<int8_t>(rest[WARP * 8 + lane * 2 + below]);
    return half_at(shared + g * 4 + 2 * below) * static_cast<float>(s) *
           static_cast<float>((q | top << 4) - 32);
}

template <int TYPE>
DEVICE void get_rows(const GetRowsArgs &a) {
    const uint32_t id = a.ids[blockIdx.y];
    float *const out = a.out + static_cast<size_t>(blockIdx.y) * a.n_cols;
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.n_cols) return;
    if (id >= a.n_rows) {
        out[c] = bits_f32(0x7fc00000u);
        return;
    }
    const char *const panel = a.bytes + id / PANEL * Packing<TYPE>::panel_bytes(a.n_chunks);
    out[c] = packed_number<TYPE>(panel, static_cast<int>(id % PANEL), c) * a.row_scale[id];
}

KERNEL(get_rows_f32, 256, GetRowsArgs) { get_rows<PACKED_F32>(a); }
KERNEL(get_rows_f16, 256, GetRowsArgs) { get_rows<PACKED_F16>(a); }
KERNEL(get_rows_q8_0, 256, GetRowsArgs) { get_rows<PACKED_Q8_0>(a); }
KERNEL(get_rows_q4_0, 256, GetRowsArgs) { get_rows<PACKED_Q4_0>(a); }
KERNEL(get_rows_q4_k, 256, GetRowsArgs) { get_rows<PACKED_Q4_K>(a); }
KERNEL(get_rows_q6_k, 256, GetRowsArgs) { get_rows<PACKED_Q6_K>(a); }

struct CopyRowsArgs {
    const float *x;       // copy: [n_rows, n_cols]; put: [n, n_cols]
    const uint32_t *ids;  // [n]
    float *out;           // copy: [n, n_cols]; put: [n_rows, n_cols]
    uint32_t n_rows;
    int n_cols;
};

// out[i, :] = x[ids[i], :]; NaN for a row that is not there.
KERNEL(copy_rows, 256, CopyRowsArgs) {
    const uint32_t id = a.ids[blockIdx.y];
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.n_cols) return;
    a.out[static_cast<size_t>(blockIdx.y) * a.n_cols + c] =
        id < a.n_rows ? a.x[static_cast<size_t>(id) * a.n_cols + c] : bits_f32(0x7fc00000u);
}

// out[ids[i], :] = x[i, :]; nothing for a row that is not there.
KERNEL(put_rows, 256, CopyRowsArgs) {
    const uint32_t id = a.ids[blockIdx.y];
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= a.n_cols || id >= a.n_rows) return;
    a.out[static_cast<size_t>(id) * a.n_cols + c] =
        a.x[static_cast<size_t>(blockIdx.y) * a.n_cols + c];
}
