// out = silu(gate) up, element by element.

#include "device.cuh"

struct SwigluArgs {
    const float *gate, *up;
    float *out;  // may be up
    uint64_t n;
};

KERNEL(swiglu, 256, SwigluArgs) {
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.n;
         i += step) {
        a.out[i] = silu(a.gate[i]) * a.up[i];
    }
}
