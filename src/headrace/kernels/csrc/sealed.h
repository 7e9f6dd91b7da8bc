// Sealed blocks: keys and values as codes of 2, 4 or 8 bits, after KIVI (arXiv 2402.02750, section 3): keys share a scale and a
// middle by channel over 32 tokens, values by token over 32 channels; vectors.py says what they mean. Nothing is
// unpacked into memory: scales go into the queries and the softmax weights, middles into one number a row, and codes become
// floats in registers, or are multiplied as whole numbers (sealed_integers.h).
//
// A block holds, kv head by kv head, units of 32 tokens; a unit holds
//   key codes    [planes][head * bits / 32][32 tokens]     words of 32 / bits neighbouring channels
//   key scales   [head]                                    half precision
//   key middles  [head]                                    8 bits
//   value codes  [planes][bits][head]                      words of 32 / bits neighbouring tokens
//   value scales [head / 32][32 tokens], value middles likewise
// where 8 bits are two planes of 4, the lower halves first.
#pragma once

#include "attention_span.h"

namespace {

using namespace headrace;

constexpr int64_t UNIT = 32;

// Where the parts of a unit begin, in bytes.
struct UnitShape {
    int64_t head, key_bits, value_bits;

    int64_t key_scales() const { return head * UNIT * key_bits / 8; }
    int64_t key_middles() const { return key_scales() + head * 2; }
    int64_t values() const { return key_middles() + head; }
    int64_t value_scales() const { return values() + head * UNIT * value_bits / 8; }
    int64_t value_middles() const { return value_scales() + head * 2; }
    int64_t bytes() const { return value_middles() + head; }
};

// Middles count so many codes each, a 256th of what the bits tell apart.
inline float grain_of(int64_t bits) { return (float)(1 << bits) / 256; }

// The middles of W neighbouring groups, or of the first n, from their bytes: see `encode_middles` in vectors.py.
inline vf load_middles(const uint8_t* p, int64_t n) {
    vi bytes = widen(p, n);
    // Three bits of exponent and four of mantissa have their places in a float from 16 on.
    vf magnitude = (vf)(((vu)(bytes & 0x7f) << 19) + (131u << 23)) - 16.0f;
    return (vf)((vu)magnitude | (vu)(bytes & 0x80) << 24);
}

// What is added to such groups' codes of so many bits before they are multiplied by the scale.
inline vf load_starts(const uint8_t* middles, int64_t bits, int64_t n = W) {
    return load_middles(middles, n) * grain_of(bits) - (float)((1 << bits) - 1) / 2;
}

// The scales and middles of neighbouring numbers, of a unit's keys or of a group of its values.
struct Grid {
    const half* scales;
    const uint8_t* middles;
    int64_t bits;

    vf scale(int64_t i) const { return load(scales + i); }
    // What a code of 0 means.
    vf least(int64_t i) const { return scale(i) * load_starts(middles + i, bits); }
};

inline Grid key_grid(const char* unit, const UnitShape& shape) {
    return {(const half*)(unit + shape.key_scales()), (const uint8_t*)(unit + shape.key_middles()), shape.key_bits};
}

inline Grid value_grid(const char* unit, const UnitShape& shape, int64_t group) {
    return {(const half*)(unit + shape.value_scales()) + group * UNIT, (const uint8_t*)(unit + shape.value_middles()) + group * UNIT, shape.value_bits};
}

// The units of a span that a tile sees, of one kv head.
struct SealedSpan {
    const char* units[SPAN_TOKENS / UNIT];
    const char* ahead[SPAN_TOKENS / UNIT];  // what is read after each of them, to be fetched meanwhile
    const float* bias[SPAN_TOKENS / UNIT];  // of a block's scores; null if there is none
    int64_t first, last;  // in blocks
    int64_t from, to;     // in units
    UnitShape shape;
};

// Codes of BITS bits as lanes of T, plus OFFSET each: a number with OFFSET's exponent has its code in the highest bits of its
// mantissa. Step i of a word gives neighbours GROUP * i and on.
template <class T, int BITS>
struct Codes {
    using Lanes = typename LanesOf<T>::type;
    static constexpr float OFFSET = 1 << BITS;
    static constexpr int STEPS = 32 / BITS / Lanes::GROUP;

    static vu expand(vu word, int step) {
        if constexpr (Lanes::GROUP == 1) {
            int shift = step % 2 * 16 + step / 2 * BITS;
            return (word >> shift & ((1u << BITS) - 1)) << (23 - BITS) | (uint32_t)(127 + BITS) << 23;
        } else {
            constexpr uint32_t MASK = ((1u << BITS) - 1) << (7 - BITS), MAGIC = (uint32_t)(127 + BITS) << 7;
            int shift = step * BITS - (7 - BITS);
            return (shift < 0 ? word << -shift : word >> shift) & (MASK | MASK << 16) | (MAGIC | MAGIC << 16);
        }
    }
};

// What a code counts beside one of the first plane: the second plane holds the upper half of 8 bits.
inline float plane_weight(int64_t plane) { return plane ? 16.0f : 1.0f; }

inline float sum_plane_weights(int64_t planes) { return planes == 2 ? 17.0f : 1.0f; }

// scaled [planes][rows][SIZE] = x [rows, stride] * scales, rounded to T; added to the sum of bases [rows]: what x has of codes
// of 0, less what OFFSET adds to every code.
template <class T, int ROWS>
void scale_rows(const T* x, int64_t stride, const Grid& grid, int64_t size, float offset, int64_t planes, int64_t plane_size, T* scaled, vf (&bases)[ROWS]) {
    vf rounded[ROWS] = {};
    for (int64_t d = 0; d < size; d += 2 * W) {
        vf scale[2] = {grid.scale(d), grid.scale(d + W)}, least[2] = {grid.least(d), grid.least(d + W)};
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            vf first = load(x + r * stride + d), second = load(x + r * stride + d + W);
            bases[r] = multiply_add(second, least[1], multiply_add(first, least[0], bases[r]));
            T* into = scaled + r * size + d;
            rounded[r] = add_stored(into, first * scale[0], second * scale[1], rounded[r]);
            if (planes == 2) {
                store(into + plane_size, first * scale[0] * plane_weight(1));
                store(into + plane_size + W, second * scale[1] * plane_weight(1));
            }
        }
    }
    vf less = splat(-offset * sum_plane_weights(planes));
    for (int r = 0; r < ROWS; r++) bases[r] = multiply_add(rounded[r], less, bases[r]);
}

// sums [rows, 2 vectors] += scaled rows, `stride` lanes apart, times one row of words. As a call of its own it
// would keep the sums in memory: 8 bits took a quarter longer.
template <class C, int ROWS>
inline __attribute__((always_inline)) void add_words(vf (&sums)[ROWS][2], const uint32_t* words, const uint32_t* scaled, int64_t stride) {
    vu first = load(words), second = load(words + W);
#pragma GCC unroll 16
    for (int i = 0; i < C::STEPS; i++) {
        vu one = C::expand(first, i), two = C::expand(second, i);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            sums[r][0] = C::Lanes::step(sums[r][0], scaled[r * stride + i], one);
            sums[r][1] = C::Lanes::step(sums[r][1], scaled[r * stride + i], two);
        }
    }
}

// scores [rows, 32] of a unit = scaled queries [planes][rows][head] times its codes, plus a base each. Asks for `bytes` that lie
// ahead meanwhile, some with each word: scattered units are over before the processor has seen a pattern.
template <class T, int BITS, int ROWS>
void score_unit(const uint32_t* scaled, int64_t plane_lanes, const vf (&bases)[ROWS], const char* unit, float* scores, int64_t span, int64_t head, int64_t planes,
                const char* ahead, int64_t bytes) {
    using C = Codes<T, BITS>;
    int64_t words = head * BITS / 32, share = (bytes / planes / words + 63) / 64 * 64;
    for (int64_t j = 0; j < UNIT; j += 2 * W) {
        vf sums[ROWS][2] = {};
        for (int64_t plane = 0; plane < planes; plane++)
            for (int64_t w = 0; w < words; w++) {
                int64_t row = plane * words + w;
                for (int64_t line = 0; line < share; line += 64) __builtin_prefetch(ahead + row * share + line);
                add_words<C, ROWS>(sums, (const uint32_t*)unit + row * UNIT + j, scaled + plane * plane_lanes + w * C::STEPS, head / C::Lanes::GROUP);
            }
        for (int r = 0; r < ROWS; r++) {
            float base = sum(bases[r]);
            store(scores + r * span + j, sums[r][0] + base);
            store(scores + r * span + j + W, sums[r][1] + base);
        }
    }
}

// outputs [rows, head] += weights [rows, span] times the values that 32 channels have in a span's units.
template <class T, int BITS, int ROWS>
void add_unit_values(const SealedSpan& blocks, const SpanRows& rows, int64_t r, int64_t group, int64_t planes, T* scaled) {
    using C = Codes<T, BITS>;
    constexpr int64_t STRIDE = UNIT / C::Lanes::GROUP;
    vf sums[UNIT / (2 * W)][ROWS][2] = {}, bases[ROWS] = {};
    int64_t plane_size = ROWS * UNIT;
    for (int64_t unit = blocks.from; unit < blocks.to; unit++) {
        scale_rows<T, ROWS>((const T*)rows.weights + r * rows.span + unit * UNIT, rows.span, value_grid(blocks.units[unit], blocks.shape, group), UNIT, C::OFFSET,
                            planes, plane_size, scaled, bases);
        const uint32_t* codes = (const uint32_t*)(blocks.units[unit] + blocks.shape.values()) + group * UNIT;
        for (int64_t part = 0; part < UNIT / (2 * W); part++)
            for (int64_t plane = 0; plane < planes; plane++)
                for (int64_t w = 0; w < BITS; w++)
                    add_words<C, ROWS>(sums[part], codes + (plane * BITS + w) * rows.head + part * 2 * W,
                                       (const uint32_t*)scaled + plane * plane_size / C::Lanes::GROUP + w * C::STEPS, STRIDE);
    }
    for (int i = 0; i < ROWS; i++) {
        float base = sum(bases[i]);
        for (int64_t part = 0; part < UNIT / W; part++) {
            float* output = rows.outputs + (r + i) * rows.head + group * UNIT + part * W;
            store(output, load(output) + (sums[part / 2][i][part % 2] + base));
        }
    }
}

// Call a function with the bits of a plane, 2 or 4, as a constant of the compiler's, and the number of planes.
template <class Function>
void by_bits(int64_t bits, Function function) {
    if (bits == 2)
        function(std::integral_constant<int, 2>{}, 1);
    else
        function(std::integral_constant<int, 4>{}, bits / 4);
}

template <class T>
void score_sealed(const SealedSpan& blocks, const SpanRows& rows, Scratch<T>& s) {
    by_bits(blocks.shape.key_bits, [&](auto bits, int64_t planes) {
        using C = Codes<T, decltype(bits)::value>;
        int64_t head = rows.head, plane_size = SCORE_ROWS * head;
        for (int64_t r = rows.low; r < rows.high; r += SCORE_ROWS)
            by_count<SCORE_ROWS>(rows.high - r, [&](auto count) {
                for (int64_t unit = blocks.from; unit < blocks.to; unit++) {
                    vf bases[count()] = {};
                    scale_rows<T, count>((const T*)rows.queries + r * head, head, key_grid(blocks.units[unit], blocks.shape), head, C::OFFSET, planes, plane_size,
                                         s.scaled.data(), bases);
                    score_unit<T, decltype(bits)::value, count>((const uint32_t*)s.scaled.data(), plane_size / C::Lanes::GROUP, bases,
                                                                blocks.units[unit], rows.scores + r * rows.span + unit * UNIT, rows.span, head, planes,
                                                                blocks.ahead[unit], blocks.shape.bytes());
                }
            });
    });
}

template <class T>
void add_sealed_values(const SealedSpan& blocks, const SpanRows& rows, Scratch<T>& s) {
    by_bits(blocks.shape.value_bits, [&](auto bits, int64_t planes) {
        for (int64_t r = rows.low; r < rows.high; r += OUTPUT_ROWS)
            by_count<OUTPUT_ROWS>(rows.high - r, [&](auto count) {
                for (int64_t group = 0; group < rows.head / UNIT; group++)
                    add_unit_values<T, decltype(bits)::value, count>(blocks, rows, r, group, planes, s.scaled.data());
            });
    });
}

}  // namespace
