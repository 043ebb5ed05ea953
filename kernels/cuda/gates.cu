// The small ops around the recurrences of AHN and of the nodes trunk.

#include "device.cuh"

// ln(1 + e^x); the identity above 20, where the difference is below F32 rounding.
DEVICE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

struct GateArgs {
    float *x;        // [n, n_head]
    const float *a;  // [n_head]
    const float *bias;
    uint64_t n;  // numbers in x
    int n_head;
};

// x = 1 / (1 + e^-x): write strengths.
KERNEL(sigmoid_gate, 256, GateArgs) {
    const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n) a.x[i] = sigmoid(a.x[i]);
}

// x = a softplus(x + bias): log decays.
KERNEL(decay_gate, 256, GateArgs) {
    const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= a.n) return;
    const int head = static_cast<int>(i % a.n_head);
    a.x[i] = a.a[head] * softplus(a.x[i] + a.bias[head]);
}

struct ConvArgs {
    const float *x;     // [n, w]
    const float *taps;  // [w, 4], the current input last
    const float *past;  // [3, w]: the three inputs before x
    float *next;        // [3, w]: the last three of past and x
    float *out;         // [n, w]
    int n, w;
};

// Tokens that a thread walks.
static constexpr int CONV_TOKENS = 16;

// Input t of channel c, before x if t is negative.
DEVICE float conv_input(const ConvArgs &a, int t, int c) {
    return t < 0 ? a.past[static_cast<size_t>(3 + t) * a.w + c] : a.x[static_cast<size_t>(t) * a.w + c];
}

// silu of the causal convolution over the last four inputs of each channel. Grid [channels, runs of
// tokens]: within a run the inputs that are needed again stay in registers.
KERNEL(conv_silu, 256, ConvArgs) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, first = blockIdx.y * CONV_TOKENS;
    if (c >= a.w) return;
    const float *const taps = a.taps + 4 * static_cast<size_t>(c);
    float x0 = conv_input(a, first - 3, c), x1 = conv_input(a, first - 2, c);
    float x2 = conv_input(a, first - 1, c);
    const int end = min(first + CONV_TOKENS, a.n);
    for (int t = first; t < end; t++) {
        const size_t at = static_cast<size_t>(t) * a.w + c;
        const float x3 = a.x[at];
        a.out[at] = silu(taps[0] * x0 + taps[1] * x1 + taps[2] * x2 + taps[3] * x3);
        x0 = x1;
        x1 = x2;
        x2 = x3;
    }
    if (end == a.n) {
        a.next[c] = x0;
        a.next[a.w + c] = x1;
        a.next[2 * static_cast<size_t>(a.w) + c] = x2;
    }
}

struct GateHeadsArgs {
    float *x;           // [n, d]
    const float *gate;  // [n]
    uint64_t n_numbers;
    int d;
};

// x[i, :] *= silu(gate[i]).
KERNEL(gate_heads, 256, GateHeadsArgs) {
    const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < a.n_numbers) a.x[i] *= silu(a.gate[i / a.d]);
}

struct ProjectHeadsArgs {
    const float *x;  // [n, n_head, d]
    const float *w;  // [n_head, d, d]: from, to
    float *out;      // [n, n_head, d], added to
    int n, n_head, d;
};

// out[t, h, :] += x[t, h, :] w[h]. A block takes one head and eight tokens: a matrix is read once
// for eight rows.
KERNEL(project_heads, 256, ProjectHeadsArgs) {
    constexpr int TOKENS = 8;
    const int head = blockIdx.y, first = blockIdx.x * TOKENS;
    const float *const w = a.w + static_cast<size_t>(head) * a.d * a.d;
    for (int to = threadIdx.x; to < a.d; to += blockDim.x) {
        float sums[TOKENS] = {};
        for (int from = 0; from < a.d; from++) {
            const float factor = w[static_cast<size_t>(from) * a.d + to];
            for (int i = 0; i < TOKENS; i++) {
                const int t = first + i;
                if (t < a.n) {
                    sums[i] += a.x[(static_cast<size_t>(t) * a.n_head + head) * a.d + from] * factor;
                }
            }
        }
        for (int i = 0; i < TOKENS; i++) {
            const int t = first + i;
            if (t < a.n) a.out[(static_cast<size_t>(t) * a.n_head + head) * a.d + to] += sums[i];
        }
    }
}
