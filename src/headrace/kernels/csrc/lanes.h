// The one step that every product is made of: sum += a row's 32 bits, spread over a vector, times a vector of 32-bit lanes.
// A lane holds GROUP neighbours along the summed dimension: one float32, two bfloat16 or four 8-bit integers. What lies in
// memory holds STEPS vectors of such lanes in one: 4-bit integers lie two by two.
#pragma once

#include "vec.h"

namespace {

// Row tiles as high as the registers allow: ROWS x SPAN sums and a few for the operands.
struct FloatLanes {
    using Sum = vf;
    static constexpr int STEPS = 1;
    static constexpr int GROUP = 1, ROWS = W == 16 ? 12 : W == 8 ? 3 : 1, SPAN = W == 16 ? 2 : W == 8 ? 4 : 8;

    static vf step(vf sum, uint32_t row, vu lanes) {
        float value;
        std::memcpy(&value, &row, sizeof value);
        return multiply_add(splat(value), (vf)lanes, sum);
    }
};

struct Bf16Lanes {
    using Sum = vf;
    static constexpr int STEPS = 1;
    static constexpr int GROUP = 2, ROWS = W == 16 ? 12 : W == 8 ? 4 : 2, SPAN = 2;

    static vf step(vf sum, uint32_t row, vu lanes) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(vu{} + row), (__m512bh)lanes);
#else
        vu spread = vu{} + row;
        sum = multiply_add((vf)(spread << 16), (vf)(lanes << 16), sum);
        return multiply_add((vf)(spread & 0xffff0000u), (vf)(lanes & 0xffff0000u), sum);
#endif
    }
};

// The row's four are signed and no less than -127, the lanes' four unsigned: weights with 128 added. The 32-bit sum is exact.
struct Int8Lanes {
    using Sum = vi;
    static constexpr int STEPS = 1;
    static constexpr int GROUP = 4, ROWS = W == 16 ? 12 : W == 8 ? 4 : 2, SPAN = 2;
    // What weights still have added when they are multiplied.
    static constexpr int32_t ADDED = W == 8 ? 0 : 128;

    static vi step(vi sum, uint32_t row, vu lanes) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)lanes, (__m512i)(vu{} + row));
#elif defined(__AVX2__) && !defined(__AVX512F__)
        // Magnitudes of weights times the row with the weights' signs: two such products, of at most 128 * 127, fit 16 bits.
        __m256i weights = _mm256_xor_si256((__m256i)lanes, _mm256_set1_epi8(-128));
        __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32((int32_t)row), weights);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), turned);
        return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
        for (int i = 0; i < 4; i++) sum += (vi)(lanes >> (8 * i) & 0xff) * (int32_t)(int8_t)(row >> (8 * i));
        return sum;
#endif
    }
};

// Unsigned 4-bit weights. A byte holds in its lower half the weight of the first step, in its upper half that of the second.
struct Int4Lanes {
    using Sum = vi;
    static constexpr int GROUP = 4, STEPS = 2, ROWS = Int8Lanes::ROWS, SPAN = Int8Lanes::SPAN;

    static vi step(vi sum, uint32_t row, vu lanes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        // Two products of at most 15 * 127 fit 16 bits.
        __m256i pairs = _mm256_maddubs_epi16((__m256i)lanes, _mm256_set1_epi32((int32_t)row));
        return sum + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
        return Int8Lanes::step(sum, row, lanes);
#endif
    }
};

// The lanes of one of the steps that a vector from memory holds.
template <class Lanes>
inline vu unpack(vu stored, int step) {
    if constexpr (Lanes::STEPS == 1) return stored;
    return stored >> (4 * step) & 0x0f0f0f0fu;
}

// Lanes of a floating-point element type.
template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
    using type = FloatLanes;
};
template <>
struct LanesOf<bf16> {
    using type = Bf16Lanes;
};

}  // namespace
