// A sequence of the recurrences, and how keys and queries are normalised.
#pragma once

#include "device.cuh"

enum Rule { RULE_GATED_DELTA, RULE_DELTA, RULE_SSD };

struct RecurSequence {
    const float *q;          // token t at t * q_stride: [n_head, dim_k]
    const float *k;          // [n_head_k, dim_k]
    const float *v;          // [n_head_k, dim_v]
    const float *g;          // [n_tokens, n_head]; null for delta
    const float *beta;       // [n_tokens, n_head]
    const uint32_t *resets;  // [n_tokens]; null: none
    const float *from;       // [n_head, dim_k, dim_v]: before the first token; may be `state`
    float *state;            // [n_head, dim_k, dim_v]: after the last
    float *out;              // [n_tokens, n_head, dim_v]
    uint64_t q_stride, k_stride, v_stride;
    int n_tokens, n_head, n_head_k, dim_k, dim_v, rule;
    int first;  // number of its first block
    int unused;
};

// 1 / |z| as the rule defines it.
DEVICE float inverse_norm(int rule, float squares) {
    return rule == RULE_SSD ? 1.0f / fmaxf(sqrtf(squares), 1e-12f) : 1.0f / sqrtf(squares + 1e-6f);
}
