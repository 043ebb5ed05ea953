// Runs the kernels of this folder on the host, for tests. See host.h.

#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host {
namespace {

constexpr size_t STACK_BYTES = 256 * 1024;
constexpr size_t MAX_SHARED = 227 * 1024;

#ifdef __x86_64__
// Saves what a called function must preserve and goes on with another stack.
extern "C" void mneme_host_switch(void **save, void *load);
asm(R"(
.text
.globl mneme_host_switch
.type mneme_host_switch, @function
mneme_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size mneme_host_switch, .-mneme_host_switch
)");
#endif

struct Copy {
    void *to;
    const void *from;
    bool wanted;
    unsigned group;
};

enum class State { ready, at_barrier, done };

struct Fiber {
#ifdef __x86_64__
    void *sp;
#else
    ucontext_t context;
#endif
    char *stack = nullptr;
    Index3 index;
    State state;
    std::vector<Copy> copies;
    unsigned group;
};

// What the lanes of a warp exchange. Two places in turn: whoever leaves something for the next
// collective must not overwrite what others still read, and cannot be further ahead than that.
struct Warp {
    char left[2][32][32];
    float *c[32];
    int arrived;
    unsigned round;
    Collective what;
};

struct Block {
    Index3 index, dim, grid;
    const Kernel *kernel;
    const void *args;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned n, current, n_done, n_at_barrier;
    bool backwards;
    std::vector<char> shared;
    char *shared_start;
#ifdef __x86_64__
    void *home;
#else
    ucontext_t home;
#endif
};

thread_local Block block;
Kernel *first_kernel = nullptr;

[[noreturn]] void fail(const char *what) {
    fprintf(stderr, "cuda-host: %s: block (%u, %u, %u), thread %u: %s\n", block.kernel->name,
            block.index.x, block.index.y, block.index.z, block.current, what);
    abort();
}

void go(unsigned from, unsigned to) {
    if (from == to) return;
    block.current = to;
#ifdef __x86_64__
    mneme_host_switch(&block.fibers[from].sp, block.fibers[to].sp);
#else
    swapcontext(&block.fibers[from].context, &block.fibers[to].context);
#endif
}

// The next fiber that can run: of the same warp if there is one, else of another.
unsigned next_ready() {
    const unsigned warp = block.current / 32, n_warps = (block.n + 31) / 32;
    for (unsigned i = 0; i < n_warps; i++) {
        const unsigned w = block.backwards ? (warp + n_warps - i) % n_warps : (warp + i) % n_warps;
        const unsigned first = w * 32, lanes = block.n - first < 32 ? block.n - first : 32;
        const unsigned start = i == 0 ? block.current - first + 1 : 0;
        for (unsigned j = 0; j < lanes; j++) {
            const unsigned f = first + (start + j) % lanes;
            if (block.fibers[f].state == State::ready) return f;
        }
    }
    fail("every thread waits: a barrier is not reached by all");
}

void release_barrier() {
    if (block.n_at_barrier + block.n_done < block.n || block.n_at_barrier == 0) return;
    block.n_at_barrier = 0;
    for (unsigned i = 0; i < block.n; i++) {
        if (block.fibers[i].state == State::at_barrier) block.fibers[i].state = State::ready;
    }
}

void fiber_main() {
    block.kernel->call(block.args);
    Fiber &me = block.fibers[block.current];
    if (!me.copies.empty()) fail("ended with background copies that nobody waited for");
    me.state = State::done;
    block.n_done++;
    release_barrier();
    const unsigned from = block.current;
    if (block.n_done < block.n) {
        go(from, next_ready());
    }
#ifdef __x86_64__
    mneme_host_switch(&block.fibers[from].sp, block.home);
#else
    swapcontext(&block.fibers[from].context, &block.home);
#endif
    abort();
}

void prepare(Fiber &f) {
    if (f.stack == nullptr) {
        void *p = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) abort();
        f.stack = static_cast<char *>(p);
    }
#ifdef __x86_64__
    // Six saved registers, then the address to return to; the stack must be 8 past a multiple of
    // 16 when a function begins.
    uintptr_t top = reinterpret_cast<uintptr_t>(f.stack + STACK_BYTES) & ~uintptr_t{15};
    void **sp = reinterpret_cast<void **>(top);
    *--sp = nullptr;
    *--sp = reinterpret_cast<void *>(fiber_main);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = STACK_BYTES;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
}

void run_block() {
    for (unsigned i = 0; i < block.n; i++) {
        Fiber &f = block.fibers[i];
        prepare(f);
        f.index = {i % block.dim.x, i / block.dim.x % block.dim.y, i / block.dim.x / block.dim.y};
        f.state = State::ready;
        f.copies.clear();
        f.group = 0;
    }
    for (Warp &w : block.warps) {
        w.arrived = 0;
        w.round = 0;
    }
    block.n_done = 0;
    block.n_at_barrier = 0;
    block.current = block.backwards ? (block.n - 1) / 32 * 32 : 0;
#ifdef __x86_64__
    mneme_host_switch(&block.home, block.fibers[block.current].sp);
#else
    swapcontext(&block.home, &block.fibers[block.current].context);
#endif
}

// Waits for all 32 lanes; the last one runs `work` before the others go on.
template <typename Work>
void collective(Collective what, Work work) {
    const unsigned me = block.current;
    Warp &w = block.warps[me / 32];
    if ((me / 32 + 1) * 32 > block.n) fail("a collective in a warp of fewer than 32 threads");
    if (w.arrived == 0) w.what = what;
    if (w.what != what) fail("lanes of a warp are in different collectives");
    const unsigned round = w.round;
    if (++w.arrived == 32) {
        work(w);
        w.arrived = 0;
        w.round++;
        return;
    }
    while (w.round == round) {
        const unsigned to = next_ready();
        if (to / 32 != me / 32 || to == me) fail("lanes of a warp never reach a collective");
        go(me, to);
    }
}

const float *f16_table() {
    static const float *table = [] {
        float *t = new float[65536];
        for (uint32_t i = 0; i < 65536; i++) {
            const uint32_t sign = (i & 0x8000u) << 16, e = (i >> 10) & 31, m = i & 1023;
            uint32_t bits;
            if (e == 31) {
                bits = sign | 0x7f800000u | m << 13;
            } else if (e != 0) {
                bits = sign | (e + 112) << 23 | m << 13;
            } else {
                const float x = static_cast<float>(m) * 0x1p-24f;
                memcpy(&bits, &x, 4);
                bits |= sign;
            }
            memcpy(&t[i], &bits, 4);
        }
        return t;
    }();
    return table;
}

}  // namespace

Kernel::Kernel(const char *n, void (*c)(const void *), size_t bytes, unsigned threads)
    : name(n), call(c), args_bytes(bytes), max_threads(threads), next(first_kernel) {
    first_kernel = this;
}

Index3 thread_index() { return block.fibers[block.current].index; }
Index3 block_index() { return block.index; }
Index3 block_dim() { return block.dim; }
Index3 grid_dim() { return block.grid; }
char *shared() { return block.shared_start; }

void sync_block() {
    Fiber &me = block.fibers[block.current];
    me.state = State::at_barrier;
    block.n_at_barrier++;
    release_barrier();
    while (me.state == State::at_barrier) go(block.current, next_ready());
}

Left exchange(Collective what, const void *mine, size_t n) {
    const unsigned me = block.current;
    Warp &w = block.warps[me / 32];
    auto &left = w.left[w.round % 2];
    memcpy(left[me % 32], mine, n);
    collective(what, [](Warp &) {});
    return left;
}

void mma(bool bf16, float *c, const uint32_t *a, uint32_t b0, uint32_t b1) {
    const unsigned me = block.current;
    Warp &w = block.warps[me / 32];
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(w.left[w.round % 2][me % 32], mine, sizeof mine);
    w.c[me % 32] = c;
    collective(bf16 ? Collective::mma_bf16 : Collective::mma_f16, [bf16](Warp &w) {
        const float *table = f16_table();
        const auto value = [&](uint32_t h) {
            if (!bf16) return table[h & 0xffff];
            float x;
            h <<= 16;
            memcpy(&x, &h, 4);
            return x;
        };
        float am[16][16], bm[16][8], cm[16][8];
        for (int lane = 0; lane < 32; lane++) {
            uint32_t r[6];
            memcpy(r, w.left[w.round % 2][lane], sizeof r);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2; i++) {
                am[g][2 * t + i] = value(r[0] >> 16 * i);
                am[g + 8][2 * t + i] = value(r[1] >> 16 * i);
                am[g][2 * t + 8 + i] = value(r[2] >> 16 * i);
                am[g + 8][2 * t + 8 + i] = value(r[3] >> 16 * i);
                bm[2 * t + i][g] = value(r[4] >> 16 * i);
                bm[2 * t + 8 + i][g] = value(r[5] >> 16 * i);
                cm[g][2 * t + i] = w.c[lane][i];
                cm[g + 8][2 * t + i] = w.c[lane][2 + i];
            }
        }
        for (int i = 0; i < 16; i++) {
            for (int k = 0; k < 16; k++) {
                for (int j = 0; j < 8; j++) cm[i][j] += am[i][k] * bm[k][j];
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2; i++) {
                w.c[lane][i] = cm[g][2 * t + i];
                w.c[lane][2 + i] = cm[g + 8][2 * t + i];
            }
        }
    });
}

void copy_async(void *to, const void *from, bool wanted) {
    Fiber &me = block.fibers[block.current];
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
        fail("a background copy is not aligned to 16 bytes");
    }
    me.copies.push_back({to, from, wanted, me.group});
}

void copy_commit() { block.fibers[block.current].group++; }

void copy_wait(int n) {
    Fiber &me = block.fibers[block.current];
    std::vector<Copy> rest;
    for (const Copy &c : me.copies) {
        if (c.group + static_cast<unsigned>(n) >= me.group) {
            rest.push_back(c);
        } else if (c.wanted) {
            memcpy(c.to, c.from, 16);
        } else {
            memset(c.to, 0, 16);
        }
    }
    me.copies.swap(rest);
}

float f16_to_f32(uint16_t x) { return f16_table()[x]; }

// Rounds to nearest, ties to even.
uint16_t f32_to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (rest < 0x38800000u) {
        // Below 2^-14 the steps are 2^-24: let an F32 sum round to them.
        float y;
        memcpy(&y, &rest, 4);
        y += 0.5f;
        uint32_t steps;
        memcpy(&steps, &y, 4);
        return static_cast<uint16_t>(sign | (steps - 0x3f000000u));
    }
    const uint32_t odd = rest >> 13 & 1;
    return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + odd) >> 13));
}

uint16_t f32_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace host

// Runs one kernel to its end. 0: done; 1: no such kernel; 2: its arguments have another size;
// 3: a grid, block or shared memory no device would accept.
extern "C" int mneme_cuda_host_launch(const char *name, const uint32_t *grid, const uint32_t *dim,
                                      uint32_t shared, const void *args, size_t args_bytes) {
    using namespace host;
    const Kernel *k = first_kernel;
    while (k != nullptr && strcmp(k->name, name) != 0) k = k->next;
    if (k == nullptr) return 1;
    if (k->args_bytes != args_bytes) return 2;
    const uint64_t n = static_cast<uint64_t>(dim[0]) * dim[1] * dim[2];
    if (n == 0 || n > k->max_threads || shared > MAX_SHARED || grid[0] == 0 || grid[1] == 0 ||
        grid[2] == 0 || grid[1] > 65535 || grid[2] > 65535) {
        return 3;
    }
    block.kernel = k;
    block.args = args;
    block.n = static_cast<unsigned>(n);
    block.dim = {dim[0], dim[1], dim[2]};
    block.grid = {grid[0], grid[1], grid[2]};
    if (block.fibers.size() < n) block.fibers.resize(n);
    block.warps.resize((n + 31) / 32);
    // The end of the room asked for is the end of the buffer, whose rest stays NaN.
    block.shared.resize(MAX_SHARED + 16);
    char *start = block.shared.data();
    start += -reinterpret_cast<uintptr_t>(start) & 15;
    block.shared_start = start;
    for (uint32_t z = 0; z < grid[2]; z++) {
        for (uint32_t y = 0; y < grid[1]; y++) {
            for (uint32_t x = 0; x < grid[0]; x++) {
                block.index = {x, y, z};
                block.backwards = ((x ^ y ^ z) & 1) != 0;
                memset(start, 0xff, shared);
                run_block();
            }
        }
    }
    return 0;
}
