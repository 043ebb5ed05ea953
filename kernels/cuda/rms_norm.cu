// Root-mean-square normalisation: out[i, :] = x[i, :] / sqrt(mean(x[i, :]^2) + eps) w.
// Reads and writes each number once from device memory; the second reading comes from cache.

#include "device.cuh"

struct RmsNormArgs {
    float *x;        // [n, d]
    const float *y;  // [n, d], added to x first; null: nothing is, and x is not written
    const float *w;  // [d]
    float *out;      // [n, d]; may be x
    int n, d;
    float eps;
};

// A block for each row: the residual stream.
KERNEL(rms_norm_rows, 1024, RmsNormArgs) {
    __shared__ float room[WARP];
    const size_t row = static_cast<size_t>(blockIdx.x) * a.d;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < a.d; i += blockDim.x) {
        float x = a.x[row + i];
        if (a.y != nullptr) {
            x += a.y[row + i];
            a.x[row + i] = x;
        }
        squares += x * x;
    }
    squares = block_sum(squares, room);
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(a.d) + a.eps);
    for (int i = threadIdx.x; i < a.d; i += blockDim.x) {
        a.out[row + i] = a.x[row + i] * scale * a.w[i];
    }
}

// A warp for each row: the many short rows of heads.
KERNEL(rms_norm_heads, 256, RmsNormArgs) {
    const int row_index = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row_index >= a.n) return;
    const size_t row = static_cast<size_t>(row_index) * a.d;
    const int lane = threadIdx.x % WARP;
    float squares = 0.0f;
    for (int i = lane; i < a.d; i += WARP) {
        float x = a.x[row + i];
        if (a.y != nullptr) {
            x += a.y[row + i];
            a.x[row + i] = x;
        }
        squares += x * x;
    }
    squares = warp_sum(squares);
    const float scale = 1.0f / sqrtf(squares / static_cast<float>(a.d) + a.eps);
    for (int i = lane; i < a.d; i += WARP) a.out[row + i] = a.x[row + i] * scale * a.w[i];
}
