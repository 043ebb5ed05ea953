// The device as seen by the kernel sources when they are compiled as C++ for tests.
//
// Threads of a block are fibers of one host thread. A fiber runs until it reaches a collective
// (barrier, shuffle, matrix product) and then lets the next one run; the last to arrive does the
// collective's work. A collective that some threads never reach ends the process with a message.
// Background copies really happen only when they are waited for, shared memory starts as NaN, and
// warps run first to last in one block and last to first in the next: missing waits and barriers
// give wrong numbers instead of luck.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define KERNEL(name, threads, Args)                                                        \
    static void name(const Args &a);                                                       \
    static void name##_call(const void *args) { name(*static_cast<const Args *>(args)); }  \
    static host::Kernel name##_kernel{#name, name##_call, sizeof(Args), (threads)};        \
    static void name(const Args &a)
#define DEVICE static inline
#define MEMBER inline
#define SHARED(type, name) type *const name = reinterpret_cast<type *>(host::shared())
#define __shared__ static thread_local
#define __restrict__
#define INFINITY_F32 INFINITY

struct Index3 {
    unsigned x, y, z;
};

namespace host {
// A kernel by name; constructed before main, one for each KERNEL.
struct Kernel {
    Kernel(const char *name, void (*call)(const void *), size_t args_bytes, unsigned max_threads);
    const char *name;
    void (*call)(const void *);
    size_t args_bytes;
    unsigned max_threads;
    Kernel *next;
};

enum class Collective { shuffle, vote, mma_f16, mma_bf16, sync_warp };

Index3 thread_index();
Index3 block_index();
Index3 block_dim();
Index3 grid_dim();
char *shared();
void sync_block();
// What each lane of a warp left for the others, at most 32 bytes.
using Left = const char (*)[32];
// Leaves `mine` where the others see it and waits for the warp. The result is good until the
// thread's next collective has ended.
Left exchange(Collective what, const void *mine, size_t n);
void mma(bool bf16, float *c, const uint32_t *a, uint32_t b0, uint32_t b1);
void copy_async(void *to, const void *from, bool wanted);
void copy_commit();
void copy_wait(int n);
uint16_t f32_to_f16(float x);
float f16_to_f32(uint16_t x);
uint16_t f32_to_bf16(float x);
}  // namespace host

#define threadIdx (host::thread_index())
#define blockIdx (host::block_index())
#define blockDim (host::block_dim())
#define gridDim (host::grid_dim())

static inline void __syncthreads() { host::sync_block(); }
static inline void __syncwarp() {
    host::exchange(host::Collective::sync_warp, "", 0);
}
template <typename T>
static inline T __shfl_sync(uint32_t, T x, int lane) {
    const host::Left all = host::exchange(host::Collective::shuffle, &x, sizeof x);
    memcpy(&x, all[lane & 31], sizeof x);
    return x;
}
template <typename T>
static inline T __shfl_xor_sync(uint32_t mask, T x, int step) {
    return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ step);
}
template <typename T>
static inline T __shfl_up_sync(uint32_t, T x, int step) {
    const host::Left all = host::exchange(host::Collective::shuffle, &x, sizeof x);
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane >= step) memcpy(&x, all[lane - step], sizeof x);
    return x;
}
static inline uint32_t __reduce_or_sync(uint32_t, uint32_t x) {
    const host::Left all = host::exchange(host::Collective::vote, &x, sizeof x);
    for (int lane = 0; lane < 32; lane++) {
        uint32_t y;
        memcpy(&y, all[lane], sizeof y);
        x |= y;
    }
    return x;
}
static inline uint32_t __ballot_sync(uint32_t mask, bool x) {
    return __reduce_or_sync(mask, x ? 1u << (threadIdx.x % 32) : 0u);
}
static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline uint32_t atomicAdd(uint32_t *p, uint32_t x) {
    const uint32_t old = *p;
    *p = old + x;
    return old;
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned long long __cvta_global(const void *p) {
    return reinterpret_cast<unsigned long long>(p);
}

static inline float bits_f32(uint32_t x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline uint32_t f32_bits(float x) {
    uint32_t y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float f16_f32(uint16_t x) { return host::f16_to_f32(x); }
static inline uint32_t f16x2(float low, float high) {
    return host::f32_to_f16(low) | static_cast<uint32_t>(host::f32_to_f16(high)) << 16;
}
static inline uint32_t bf16x2(float low, float high) {
    return host::f32_to_bf16(low) | static_cast<uint32_t>(host::f32_to_bf16(high)) << 16;
}
// Arithmetic on halves rounds once: products and sums of two halves are exact in F64.
template <typename Op>
static inline uint32_t each_half(uint32_t a, uint32_t b, uint32_t c, Op op) {
    const auto half = [&](int at) {
        const auto get = [&](uint32_t x) {
            return static_cast<double>(host::f16_to_f32(static_cast<uint16_t>(x >> at)));
        };
        return static_cast<uint32_t>(
                   host::f32_to_f16(static_cast<float>(op(get(a), get(b), get(c)))))
               << at;
    };
    return half(0) | half(16);
}
static inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
    return each_half(a, b, 0, [](double a, double b, double) { return a * b; });
}
static inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
    return each_half(a, b, 0, [](double a, double b, double) { return a - b; });
}
static inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    return each_half(a, b, c, [](double a, double b, double c) { return a * b + c; });
}
static inline uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = a | static_cast<uint64_t>(b) << 32;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t byte = (selector >> 4 * i) & 7;
        d |= static_cast<uint32_t>((both >> 8 * byte) & 255) << 8 * i;
    }
    return d;
}
static inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::mma(false, c, a, b0, b1);
}
static inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::mma(true, c, a, b0, b1);
}
static inline void copy_async(void *shared, const void *global, bool wanted) {
    host::copy_async(shared, global, wanted);
}
static inline void copy_commit() { host::copy_commit(); }
template <int N>
static inline void copy_wait() {
    host::copy_wait(N);
}
struct Words4;
struct Words2;
template <typename T>
static inline T load_once(const T *p) {
    return *p;
}
