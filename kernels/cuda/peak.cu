// Nothing but matrix products in registers: what the other kernels' rates are compared with.

#include "device.cuh"

struct PeakArgs {
    float *out;  // [blocks * 256]: keeps the products from being optimised away
    int n_rounds;
};

// Eight independent sums for each warp, 16 products a round; 4096 operations a product.
KERNEL(peak_mma, 256, PeakArgs) {
    float sums[8][4] = {};
    const uint32_t x[4] = {threadIdx.x, threadIdx.x + 1, threadIdx.x + 2, threadIdx.x + 3};
    for (int i = 0; i < a.n_rounds; i++) {
#pragma unroll
        for (int j = 0; j < 16; j++) mma_f16(sums[j % 8], x, x[0] + j, x[1] + j);
    }
    float total = 0.0f;
    for (int j = 0; j < 8; j++) total += sums[j][0] + sums[j][1] + sums[j][2] + sums[j][3];
    a.out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
