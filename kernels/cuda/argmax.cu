// The index of the largest number of each row, the lowest of equals. NaN never wins; a row of
// nothing but NaN gives 0.

#include "device.cuh"

struct ArgmaxArgs {
    const float *x;  // [n, n_cols]
    uint32_t *out;   // [n]
    int n_cols;
};

// Of two candidates the larger, then the earlier.
DEVICE void argmax_take(float &best, uint32_t &at, float x, uint32_t i) {
    if (x > best || (x == best && i < at)) {
        best = x;
        at = i;
    }
}

KERNEL(argmax, 1024, ArgmaxArgs) {
    __shared__ float bests[WARP];
    __shared__ uint32_t places[WARP];
    const float *const row = a.x + static_cast<size_t>(blockIdx.x) * a.n_cols;
    float best = -INFINITY_F32;
    uint32_t at = ALL;
    for (int i = threadIdx.x; i < a.n_cols; i += blockDim.x) argmax_take(best, at, row[i], i);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int round = 0; round < 2; round++) {
        for (int step = WARP / 2; step > 0; step /= 2) {
            const float x = __shfl_xor_sync(ALL, best, step);
            const uint32_t i = __shfl_xor_sync(ALL, at, step);
            argmax_take(best, at, x, i);
        }
        if (round == 0) {
            if (lane == 0) {
                bests[warp] = best;
                places[warp] = at;
            }
            __syncthreads();
            const bool mine = lane < static_cast<int>(blockDim.x / WARP);
            best = mine ? bests[lane] : -INFINITY_F32;
            at = mine ? places[lane] : ALL;
        }
    }
    if (threadIdx.x == 0) a.out[blockIdx.x] = at == ALL ? 0 : at;
}
