// From exact blocks to sealed ones: round to nearest between a group's least and largest, scales and middles rounded first.
#pragma once

#include <cmath>

#include "pool.h"
#include "sealed.h"

namespace {

using namespace headrace;

constexpr float FARTHEST = 3900, LEAST_SCALE = 1e-30f;  // as in vectors.py
constexpr half NO_SCALE = {0x7e00};  // no number: of a group that has such a one, or infinity, nothing else is left

inline half to_half(float value) {
    half result;
#if defined(__F16C__)
    result.bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    // Round to nearest, ties to even, among the numbers that half precision has at this magnitude.
    uint32_t bits, sign;
    std::memcpy(&bits, &value, sizeof bits);
    sign = bits >> 16 & 0x8000, bits &= 0x7fffffff;
    float magnitude, grain;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    uint32_t step = std::max(bits & 0x7f800000, (uint32_t)113 << 23) + (13u << 23);
    std::memcpy(&grain, &step, sizeof grain);
    float rounded = magnitude + grain;  // its lowest bit is that of half precision
    std::memcpy(&bits, &rounded, sizeof bits);
    uint32_t exponent = (step - (13u << 23)) >> 23;
    uint32_t whole = bits - step;
    result.bits = (uint16_t)(sign | (magnitude >= 65520.0f ? 0x7c00 : (exponent - 113) * 1024 + whole));
#endif
    return result;
}

inline float to_float(half value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    float result[W];
    half from[W] = {value};
    store(result, load(from));
    return result[0];
#endif
}

// How far apart a group's codes are, and where their middle is, in the steps of round_groups (vectors.py).
inline void choose_grid(float least, float most, int64_t bits, half& scale, uint8_t& middle) {
    const float grain = grain_of(bits), levels = (float)((1 << bits) - 1);
    float centre = (least + most) / 2, spread = most - least, far = std::fabs(centre) / (FARTHEST * grain);
    float narrow = std::max(spread / levels, far);
    int exponent = 5;
    if (narrow > LEAST_SCALE) std::frexp(std::fabs(centre) / narrow / grain + 16, &exponent);
    float slack = std::max(std::ldexp(grain, exponent - 5) - 1, 0.0f);
    scale = to_half(std::max(spread / (levels - slack), far));
    float step = to_float(scale), in_grains = step > 0 ? centre / step / grain : 0, magnitude = std::fabs(in_grains) + 16;
    std::frexp(magnitude, &exponent);
    float code = (float)(exponent - 5) * 16 + std::nearbyint(std::ldexp(magnitude, 5 - exponent)) - 16;
    middle = (uint8_t)((code < 127 ? (int)code : 127) | (in_grains < 0 ? 128 : 0));
}

// Rows of 32 numbers, each with a scale and a middle of its own, as words: row i * codes + k of a word row i is its k-th code.
// A row of numbers lies in one half of a row of lanes; neighbouring rows share their lanes in bfloat16.
template <class T>
void seal_rows(const uint32_t* lanes, int64_t stride, int64_t rows, int64_t bits, uint32_t* words, int64_t word_stride, half* scales, uint8_t* middles) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP, V = UNIT / W;
    const int plane_bits = bits == 2 ? 2 : 4, codes = 32 / plane_bits, planes = bits == 8 ? 2 : 1;
    const float levels = (float)((1 << bits) - 1);
    for (int64_t first = 0; first < rows; first += codes) {
        vu packed[2][V] = {};
        for (int64_t place = 0; place < codes; place++) {
            int64_t row = first + place;
            vf x[V], least, most;
            vi magnitude = {};
            for (int v = 0; v < V; v++) {
                vu both = load(lanes + row / PAIR * stride + v * W);
                x[v] = (vf)(PAIR == 1 ? both : row % 2 ? both & 0xffff0000u : both << 16);
                least = v ? minimum(least, x[v]) : x[v], most = v ? maximum(most, x[v]) : x[v];
                magnitude = maximum_magnitude(magnitude, x[v]);
            }
            if (std::isfinite(largest_magnitude(magnitude)))
                choose_grid(-largest(-least), largest(most), bits, scales[row], middles[row]);
            else
                scales[row] = NO_SCALE, middles[row] = 0;
            float step = to_float(scales[row]), start = load_starts(middles + row, bits, 1)[0];
            for (int v = 0; v < V; v++) {
                vf level = step > 0 ? x[v] / step - start : splat(0.0f);
                // Adding 1.5 * 2^23 leaves the nearest whole number in the lowest bits.
                vu code = (vu)(minimum(maximum(level, splat(0.0f)), splat(levels)) + 12582912.0f) & 0xff;
                int shift = (int)(place % 2 * 16 + place / 2 * plane_bits);
                for (int plane = 0; plane < planes; plane++) packed[plane][v] |= (code >> (4 * plane) & ((1u << plane_bits) - 1)) << shift;
            }
        }
        for (int plane = 0; plane < planes; plane++)
            for (int v = 0; v < V; v++)
                std::memcpy(words + (plane * rows / codes + first / codes) * word_stride + v * W, &packed[plane][v], sizeof(vu));
    }
}

// One kv head of one unit.
template <class T>
void seal_unit(const uint32_t* keys, const uint32_t* values, int64_t block_size, const UnitShape& shape, char* into) {
    int64_t head = shape.head;
    seal_rows<T>(keys, block_size, head, shape.key_bits, (uint32_t*)into, UNIT, (half*)(into + shape.key_scales()), (uint8_t*)(into + shape.key_middles()));
    half* scales = (half*)(into + shape.value_scales());
    uint8_t* middles = (uint8_t*)(into + shape.value_middles());
    for (int64_t from = 0; from < head; from += UNIT)
        seal_rows<T>(values + from, head, UNIT, shape.value_bits, (uint32_t*)(into + shape.values()) + from, head, scales + from, middles + from);
}

template <class T>
void seal(const Cache& cache, const Sealed& sealed, const int32_t* from, const int32_t* into, int64_t count) {
    UnitShape shape{cache.head_size, sealed.key_bits, sealed.value_bits};
    int64_t units = cache.block_size / UNIT, lanes = cache.head_size * cache.block_size / LanesOf<T>::type::GROUP;
    Pool::get().run(count * cache.kv_heads, [&](int64_t task, int) {
        int64_t block = task / cache.kv_heads, head = task % cache.kv_heads;
        const uint32_t* keys = (const uint32_t*)(cache.keys + from[block] * cache.stride) + head * lanes;
        const uint32_t* values = (const uint32_t*)(cache.values + from[block] * cache.stride) + head * lanes;
        char* at = sealed.data + into[block] * sealed.stride + head * units * shape.bytes();
        for (int64_t unit = 0; unit < units; unit++)
            seal_unit<T>(keys + unit * UNIT, values + unit * lanes / units, cache.block_size, shape, at + unit * shape.bytes());
    });
}

}  // namespace
