// The k largest numbers of each row with their places, largest first, of equals the lowest place.
//
// A number and its place make one 64-bit key, so the order is total and no two keys are equal. A
// block sorts a tile of keys and keeps the first k; rounds follow until one tile holds all that
// was kept. NaN and minus infinity have key 0, as does what pads a row: they lose to every number.

#include "device.cuh"

static constexpr int TOP_TILE = 4096;

struct TopKArgs {
    const float *x;        // [n, n_in]: the first round's numbers; null afterwards
    const uint64_t *keys;  // [n, n_in]: what the round before kept
    uint64_t *kept;        // [n, tiles, k]; null in the last round
    uint32_t *out;         // [n, 2, k]: places, then the bits of numbers
    int n_in, k;
};

// Key 0 says that there is no such number.
DEVICE uint64_t top_k_key(float x, uint32_t place) {
    if (!(x > -INFINITY_F32)) return 0;
    return static_cast<uint64_t>(order_key(x)) << 32 | (ALL - place);
}

// Grid [tiles, n].
KERNEL(top_k, 1024, TopKArgs) {
    SHARED(uint64_t, keys);
    const int first = blockIdx.x * TOP_TILE, row = blockIdx.y;
    const int count = min(TOP_TILE, a.n_in - first);
    int size = 1;
    while (size < count) size *= 2;
    const size_t from = static_cast<size_t>(row) * a.n_in + first;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        uint64_t key = 0;
        if (i < count) {
            const uint32_t place = static_cast<uint32_t>(first + i);
            key = a.x != nullptr ? top_k_key(a.x[from + i], place) : a.keys[from + i];
        }
        keys[i] = key;
    }
    __syncthreads();
    // Bitonic: runs that fall and rise in turn are merged to runs twice as long.
    for (int run = 2; run <= size; run *= 2) {
        for (int step = run / 2; step > 0; step /= 2) {
            for (int p = threadIdx.x; p < size / 2; p += blockDim.x) {
                const int i = 2 * p - (p & (step - 1)), j = i + step;
                const uint64_t x = keys[i], y = keys[j];
                const bool falls = (i & run) == 0;
                if ((x < y) == falls) {
                    keys[i] = y;
                    keys[j] = x;
                }
            }
            __syncthreads();
        }
    }
    for (int i = threadIdx.x; i < a.k; i += blockDim.x) {
        const uint64_t key = i < size ? keys[i] : 0;
        if (a.kept != nullptr) {
            a.kept[(static_cast<size_t>(row) * gridDim.x + blockIdx.x) * a.k + i] = key;
        } else {
            uint32_t *const out = a.out + 2 * static_cast<size_t>(row) * a.k;
            out[i] = ALL - static_cast<uint32_t>(key);
            out[a.k + i] = f32_bits(key == 0 ? -INFINITY_F32 : key_number(static_cast<uint32_t>(key >> 32)));
        }
    }
}
