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

static constexpr int CONV_SEQUENCES = 64;

struct ConvSequence {
    const float *past;  // [3, w]: the three inputs before its rows
    float *next;        // [3, w]: the last three of past and its rows
    int row, n;         // its first row, and how many
    int first;          // number of its first run of tokens
    int unused;
};

struct ConvArgs {
    const float *x;     // [rows, w], of all sequences
    const float *taps;  // [w, 4], the current input last
    float *out;         // [rows, w]
    int w, n_sequences;
    ConvSequence sequences[CONV_SEQUENCES];
};

// Tokens that a thread walks.
static constexpr int CONV_TOKENS = 16;

// silu of the causal convolution over the last four inputs of each channel. Grid [channels, runs of
// tokens of all sequences]: within a run the inputs that are needed again stay in registers.
KERNEL(conv_silu, 256, ConvArgs) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x, run = blockIdx.y;
    if (c >= a.w) return;
    int which = 0;
    while (which + 1 < a.n_sequences && run >= a.sequences[which + 1].first) which++;
    const ConvSequence &s = a.sequences[which];
    const int first = (run - s.first) * CONV_TOKENS;
    const float *const x = a.x + static_cast<size_t>(s.row) * a.w + c;
    float *const out = a.out + static_cast<size_t>(s.row) * a.w + c;
    // Input t of the channel, before its rows if t is negative.
    const auto input = [&](int t) {
        return t < 0 ? s.past[static_cast<size_t>(3 + t) * a.w + c] : x[static_cast<size_t>(t) * a.w];
    };
    const float *const taps = a.taps + 4 * static_cast<size_t>(c);
    float x0 = input(first - 3), x1 = input(first - 2), x2 = input(first - 1);
    const int end = min(first + CONV_TOKENS, s.n);
    for (int t = first; t < end; t++) {
        const size_t at = static_cast<size_t>(t) * a.w;
        const float x3 = x[at];
        out[at] = silu(taps[0] * x0 + taps[1] * x1 + taps[2] * x2 + taps[3] * x3);
        x0 = x1;
        x1 = x2;
        x2 = x3;
    }
    if (end == s.n) {
        s.next[c] = x0;
        s.next[a.w + c] = x1;
        s.next[2 * static_cast<size_t>(a.w) + c] = x2;
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
