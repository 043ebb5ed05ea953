// Rotary position embedding in place: pairs of the first n_rot numbers of every head are turned
// by pos[t] inv_freq[i].

#include "device.cuh"

struct RopeArgs {
    float *x;               // [n_tokens, n_head, head_dim]
    const uint32_t *pos;    // [n_tokens]
    const float *inv_freq;  // [n_rot / 2]
    int n_head, head_dim, n_rot;
    int neox;  // pairs (i, i + n_rot / 2) instead of (2i, 2i + 1)
    float mscale;
};

// A block for each token. The angle is formed and reduced in F64: at position one million an F32
// product would be off by up to 0.03. A turn is computed once and used for all heads.
KERNEL(rope, 256, RopeArgs) {
    const int half = a.n_rot / 2;
    float *const token = a.x + static_cast<size_t>(blockIdx.x) * a.n_head * a.head_dim;
    const double pos = static_cast<double>(a.pos[blockIdx.x]);
    // Threads of a row take neighbouring pairs, rows take heads.
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        const double turns = pos * static_cast<double>(a.inv_freq[i]) * 0.15915494309189533577;
        const double part = turns - floor(turns + 0.5);
        float sin, cos;
        const float angle = static_cast<float>(part * 6.28318530717958647693);
        sin = sinf(angle) * a.mscale;
        cos = cosf(angle) * a.mscale;
        const int first = a.neox ? i : 2 * i, second = a.neox ? i + half : 2 * i + 1;
        for (int head = threadIdx.y; head < a.n_head; head += blockDim.y) {
            float *const h = token + static_cast<size_t>(head) * a.head_dim;
            const float u = h[first], v = h[second];
            h[first] = u * cos - v * sin;
            h[second] = u * sin + v * cos;
        }
    }
}
