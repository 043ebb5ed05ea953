// Weight matrices as they lie in device memory, in the order in which matrix instructions read.
//
// A *panel* is 16 rows, a *chunk* 64 columns (columns are padded with zeros to whole chunks). Of a
// panel's chunk, lane (g, t) = (lane / 4, lane % 4) of a warp owns columns 16t .. 16t+15 of rows g
// and g + 8: as 16-byte words side by side for the 32 lanes, so that a chunk is read in whole
// lines and needs no shared memory. A product over 64 columns is four instructions over 16: the
// j-th takes columns 4j .. 4j+3 of every lane. Which column stands where is free, as long as the
// activations use the same order.
//
// All types become halves in registers and are multiplied in F16 with F32 sums. A row is scaled
// by a power of two, which `row_scale` undoes, so that its numbers fit F16's range: 2^13 at most.
//
//   F16 (BF16 too)  4 words: columns 0..7 and 8..15 of row g, the same of row g + 8
//   F32             F16 of the number, then F16 of the rest: 8 words
//   Q8_0            2 words of bytes plus 128, rows g and g + 8; scales
//   Q4_0            1 word of nibbles: two 32-bit words for row g, two for g + 8; scales
//   Q4_K            as Q4_0; 6-bit scales and minima
//   Q6_K            as Q4_0, then half a word of two bits each; 8-bit scales
//
// Scales of Q8_0 and Q4_0 are words (row g, row g + 8), eight for each of a chunk's two blocks of
// 32. Q4_K has (scale, minimum) of row g and of g + 8 in the same places as bytes; Q6_K has a pair
// of bytes for each lane. What 256 columns share follows their four chunks.
#pragma once

#include "device.cuh"

enum PackedType { PACKED_F32, PACKED_F16, PACKED_Q8_0, PACKED_Q4_0, PACKED_Q4_K, PACKED_Q6_K };

static constexpr int PANEL = 16;
static constexpr int CHUNK = 64;

// Bytes of a chunk of a panel, chunks that share a header, and the bytes of such a group.
template <int TYPE>
struct Packing {
    static constexpr int TERMS = TYPE == PACKED_F32 ? 2 : 1;
    static constexpr int SUPER = TYPE == PACKED_Q4_K || TYPE == PACKED_Q6_K ? 4 : 1;
    static constexpr int CHUNK_BYTES = TYPE == PACKED_F32    ? 4096
                                       : TYPE == PACKED_F16  ? 2048
                                       : TYPE == PACKED_Q8_0 ? 1088
                                       : TYPE == PACKED_Q6_K ? 832
                                                             : 576;
    static constexpr int SUPER_BYTES =
        SUPER * CHUNK_BYTES + (TYPE == PACKED_Q4_K || TYPE == PACKED_Q6_K ? 64 : 0);
    // Bytes of a panel of so many chunks.
    static MEMBER size_t panel_bytes(int n_chunks) {
        return static_cast<size_t>(n_chunks / SUPER) * SUPER_BYTES;
    }
    static MEMBER const char *super(const char *panel, int chunk) {
        return panel + static_cast<size_t>(chunk / SUPER) * SUPER_BYTES;
    }
};

// One lane's share of a chunk, as it is read.
template <int TYPE>
struct PackedChunk {
    Words4 words[TYPE == PACKED_F32 ? 8 : TYPE == PACKED_F16 ? 4 : TYPE == PACKED_Q8_0 ? 2 : 1];
    Words2 high;      // Q6_K
    uint32_t scales;  // quantised types
    Words2 shared;    // Q4_K: (d, dmin) of both rows; Q6_K: x = (d of row g, d of row g + 8)
};

template <int TYPE>
DEVICE void load_chunk(PackedChunk<TYPE> &to, const char *panel, int chunk, int lane) {
    using P = Packing<TYPE>;
    const char *const super = P::super(panel, chunk);
    const char *const from = super + chunk % P::SUPER * P::CHUNK_BYTES;
    const Words4 *const words = reinterpret_cast<const Words4 *>(from);
    constexpr int N = sizeof to.words / sizeof to.words[0];
#pragma unroll
    for (int i = 0; i < N; i++) to.words[i] = load_once(words + i * WARP + lane);
    const int g = lane / 4, t = lane % 4;
    const char *rest = from + N * WARP * 16;
    if (TYPE == PACKED_Q6_K) {
        to.high = load_once(reinterpret_cast<const Words2 *>(rest) + lane);
        rest += WARP * 8;
        to.scales = reinterpret_cast<const uint16_t *>(rest)[lane];
        to.shared.x = reinterpret_cast<const uint32_t *>(super + 4 * P::CHUNK_BYTES)[g];
    }
    if (TYPE == PACKED_Q8_0 || TYPE == PACKED_Q4_0 || TYPE == PACKED_Q4_K) {
        to.scales = reinterpret_cast<const uint32_t *>(rest)[t / 2 * 8 + g];
    }
    if (TYPE == PACKED_Q4_K) {
        to.shared = reinterpret_cast<const Words2 *>(super + 4 * P::CHUNK_BYTES)[g];
    }
}

// Eight unsigned nibbles as halves, with `zero` taken away; all steps are exact. Column c is
// nibble c / 2 + 4 (c % 2), so that neighbours come out side by side.
DEVICE void nibbles(uint32_t x, int zero, uint32_t (&to)[4]) {
    // 0x6400 is 1024, whose last bit is worth 1. A nibble one place up counts sixteenfold.
    const uint32_t zero_low = zero == 8 ? 0x64086408u : 0x64006400u;
    const uint32_t zero_high = zero == 8 ? 0xd480d480u : 0xd400d400u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint32_t y = x >> 8 * i;
        to[2 * i] = sub_f16x2((y & 0x000f000fu) | 0x64006400u, zero_low);
        to[2 * i + 1] = fma_f16x2((y & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, zero_high);
    }
}

// The same with two more bits above each nibble, zero at 32; `high` holds those of columns 2p at
// bit 2p and of 2p + 1 at bit 16 + 2p, from bit `first` on.
DEVICE void six_bits(uint32_t x, uint32_t high, uint32_t (&to)[4]) {
#pragma unroll
    for (int p = 0; p < 4; p++) {
        const uint32_t low = (x >> 4 * p) & 0x000f000fu;
        const uint32_t top = ((p < 2 ? high << (4 - 2 * p) : high >> (2 * p - 4)) & 0x00300030u);
        to[p] = sub_f16x2(low | top | 0x64006400u, 0x64206420u);
    }
}

// A lane's halves of rows g and g + 8: words of two neighbouring columns. `rest`: F32 only.
template <int TYPE>
DEVICE void decode_chunk(const PackedChunk<TYPE> &x, uint32_t (&row_g)[8], uint32_t (&row_g8)[8],
                         uint32_t (&rest_g)[8], uint32_t (&rest_g8)[8]) {
    if (TYPE == PACKED_F16 || TYPE == PACKED_F32) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Words4 &a = x.words[i], &b = x.words[2 + i];
            row_g[4 * i] = a.x, row_g[4 * i + 1] = a.y, row_g[4 * i + 2] = a.z,
                      row_g[4 * i + 3] = a.w;
            row_g8[4 * i] = b.x, row_g8[4 * i + 1] = b.y, row_g8[4 * i + 2] = b.z,
                       row_g8[4 * i + 3] = b.w;
            if (TYPE == PACKED_F32) {
                constexpr int LAST = TYPE == PACKED_F32 ? 4 : 0;
                const Words4 &c = x.words[LAST + i], &d = x.words[LAST + 2 + i > 7 ? 0 : LAST + 2 + i];
                rest_g[4 * i] = c.x, rest_g[4 * i + 1] = c.y, rest_g[4 * i + 2] = c.z,
                           rest_g[4 * i + 3] = c.w;
                rest_g8[4 * i] = d.x, rest_g8[4 * i + 1] = d.y, rest_g8[4 * i + 2] = d.z,
                            rest_g8[4 * i + 3] = d.w;
            }
        }
    }
    if (TYPE == PACKED_Q8_0) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            constexpr int SECOND = TYPE == PACKED_Q8_0 ? 1 : 0;
            const Words4 &w = x.words[row * SECOND];
            const uint32_t words[4] = {w.x, w.y, w.z, w.w};
            const uint32_t d = row == 0 ? twice(x.scales) : twice(x.scales >> 16);
            uint32_t(&to)[8] = row == 0 ? row_g : row_g8;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Bytes above 0x64 make 1024 + byte; 1152 is 1024 + 128.
                const uint32_t a = bytes_of(words[i], 0x64646464u, 0x4140u);
                const uint32_t b = bytes_of(words[i], 0x64646464u, 0x4342u);
                to[2 * i] = mul_f16x2(sub_f16x2(a, 0x64806480u), d);
                to[2 * i + 1] = mul_f16x2(sub_f16x2(b, 0x64806480u), d);
            }
        }
    }
    if (TYPE == PACKED_Q4_0 || TYPE == PACKED_Q4_K || TYPE == PACKED_Q6_K) {
        const Words4 &w = x.words[0];
#pragma unroll
        for (int row = 0; row < 2; row++) {
            uint32_t(&to)[8] = row == 0 ? row_g : row_g8;
            uint32_t scale, minus = 0;
            if (TYPE == PACKED_Q4_0) {
                scale = row == 0 ? twice(x.scales) : twice(x.scales >> 16);
            } else if (TYPE == PACKED_Q4_K) {
                const uint32_t both = row == 0 ? x.shared.x : x.shared.y;
                const uint32_t s = x.scales >> 16 * row;
                const float d = low_f16(both) * static_cast<float>(s & 255);
                const float m = high_f16(both) * static_cast<float>((s >> 8) & 255);
                scale = f16x2(d, d);
                minus = f16x2(-m, -m);
            } else {
                const float d = row == 0 ? low_f16(x.shared.x) : high_f16(x.shared.x);
                const int s = static_cast<int8_t>(x.scales >> 8 * row);
                scale = f16x2(d * static_cast<float>(s), d * static_cast<float>(s));
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t word = row == 0 ? (i == 0 ? w.x : w.y) : (i == 0 ? w.z : w.w);
                uint32_t q[4];
                if (TYPE == PACKED_Q6_K) {
                    six_bits(word, (row == 0 ? x.high.x : x.high.y) >> 8 * i, q);
                } else {
                    nibbles(word, TYPE == PACKED_Q4_0 ? 8 : 0, q);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    to[4 * i + j] = TYPE == PACKED_Q4_K ? fma_f16x2(q[j], scale, minus)
                                                        : mul_f16x2(q[j], scale);
                }
            }
        }
    }
}
