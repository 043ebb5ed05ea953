// What every kernel of this folder includes: the few device primitives they use, each once.
//
// A kernel takes one struct of arguments by value, declared with KERNEL. The same source compiles
// as C++ under `host/`, where a block's threads are fibers; that is how the kernels are tested on
// machines without a GPU. So only what this header offers may be used: no CUDA library types.
//
// Halves travel as 32-bit words of two, the lower half first, as the matrix instructions want.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define KERNEL(name, threads, Args) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args a)
#define DEVICE static __device__ __forceinline__
#define MEMBER __device__ __forceinline__
// Dynamic shared memory, 16-byte aligned.
#define SHARED(type, name)                          \
    extern __shared__ __align__(16) char _shared[]; \
    type *const name = reinterpret_cast<type *>(_shared)
#define INFINITY_F32 __int_as_float(0x7f800000)
#else
#include "host/host.h"
#endif

struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
    uint32_t x, y;
};

static constexpr int WARP = 32;
static constexpr uint32_t ALL = 0xffffffffu;

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

#ifdef __CUDACC__

DEVICE float bits_f32(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t f32_bits(float x) { return __float_as_uint(x); }

// 2^x to 2 ulp; 0 for minus infinity.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE uint32_t f16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE uint32_t bf16x2(float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE float f16_f32(uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// c += A B for A [16, 16], B [16, 8], products of halves summed in F32. Lane (g, t) = (lane / 4,
// lane % 4) holds of A: a[0] row g, columns 2t and 2t+1; a[1] row g+8; a[2], a[3] the same rows
// at columns +8; of B: b[0] rows 2t and 2t+1 of column g, b[1] rows +8; of C: rows g (c[0], c[1])
// and g+8 (c[2], c[3]) at columns 2t and 2t+1.
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with BF16 halves.
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies 16 bytes from global to shared memory in the background; zeros if `wanted` is false.
DEVICE void copy_async(void *shared, const void *global, bool wanted) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int n = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(n)
                 : "memory");
}
// Closes a group of background copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way.
template <int N>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Weights are read once per step: past the first-level cache, which the activations need.
DEVICE Words4 load_once(const Words4 *p) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
DEVICE Words2 load_once(const Words2 *p) {
    Words2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p));
    return v;
}
#endif

// Lower and upper half of a word as F32.
DEVICE float low_f16(uint32_t x) { return f16_f32(static_cast<uint16_t>(x)); }
DEVICE float high_f16(uint32_t x) { return f16_f32(static_cast<uint16_t>(x >> 16)); }
DEVICE float low_bf16(uint32_t x) { return bits_f32(x << 16); }
DEVICE float high_bf16(uint32_t x) { return bits_f32(x & 0xffff0000u); }
DEVICE uint32_t twice(uint32_t half) { return (half & 0xffffu) | half << 16; }

// Sum over a warp: every lane gets the same bits, whatever the lanes' order of arrival.
DEVICE float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}
DEVICE float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// Sum (largest) over a block of whole warps; `room` is shared memory of 32 numbers. Every thread
// gets the same bits.
DEVICE float block_sum(float x, float *room) {
    x = warp_sum(x);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) room[warp] = x;
    __syncthreads();
    return warp_sum(lane < static_cast<int>(blockDim.x / WARP) ? room[lane] : 0.0f);
}
DEVICE float block_max(float x, float *room) {
    x = warp_max(x);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) room[warp] = x;
    __syncthreads();
    return warp_max(lane < static_cast<int>(blockDim.x / WARP) ? room[lane] : -INFINITY_F32);
}

// 1 / (1 + e^-x), good to 4e-7; the limits at infinity.
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
// x sigmoid(x), zero at minus infinity.
DEVICE float silu(float x) { return x < -88.0f ? -0.0f : x / (1.0f + expf(-x)); }

// Order of numbers as order of unsigned integers: minus zero before zero, no NaN.
DEVICE uint32_t order_key(float x) {
    const uint32_t bits = f32_bits(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
// The number of a key.
DEVICE float key_number(uint32_t key) {
    return bits_f32(key >> 31 ? key & 0x7fffffffu : ~key);
}
