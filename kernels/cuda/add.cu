// Residual sums and biases: x[i] += y[i % d].

#include "device.cuh"

struct AddArgs {
    float *x;
    const float *y;  // [d]
    uint64_t n, d;   // d = n: a plain sum
};

KERNEL(add, 256, AddArgs) {
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.n;
         i += step) {
        a.x[i] += a.y[a.d == a.n ? i : i % a.d];
    }
}
