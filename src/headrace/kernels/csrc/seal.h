// From exact blocks to sealed ones: round to nearest between a group's least and largest, scales rounded first.
#pragma once

#include <algorithm>

#include "pool.h"
#include "sealed.h"

namespace {

using namespace headrace;

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

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// A group of `count` numbers x[i * stride] as codes, handed to put(i, code), with the scale and the minimum they mean.
template <class Get, class Put>
void round_group(int64_t count, int64_t bits, half& scale, half& minimum, Get get, Put put) {
    float least = get(0), most = least;
    for (int64_t i = 1; i < count; i++) least = std::min(least, get(i)), most = std::max(most, get(i));
    float levels = (float)((1 << bits) - 1);
    scale = to_half((most - least) / levels), minimum = to_half(least);
    float step = to_float(scale), start = to_float(minimum);
    for (int64_t i = 0; i < count; i++) {
        float place = step > 0 ? (get(i) - start) / step : 0.0f;
        // Adding 1.5 * 2^23 leaves the nearest whole number in the lowest bits.
        float nearest = (std::min(std::max(place, 0.0f), levels) + 12582912.0f) - 12582912.0f;
        put(i, (uint32_t)nearest);
    }
}

// Where the code of place i (a channel of a word of keys, a token of a word of values) lies in its word.
inline int shift_of(int64_t i, int bits) { return (int)(i % 2 * 16 + i / 2 * bits); }

// One kv head of one unit.
template <class T>
void seal_unit(const T* keys, const T* values, int64_t block_size, const UnitShape& shape, char* into) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP;
    int64_t head = shape.head;
    std::fill_n(into, shape.bytes(), 0);
    auto put = [&](uint32_t* words, int64_t plane_words, int64_t bits, int64_t row_words, int64_t place, int64_t column, uint32_t code) {
        int plane_bits = bits == 2 ? 2 : 4, codes = 32 / plane_bits;
        for (int plane = 0; plane < (bits == 8 ? 2 : 1); plane++, code >>= 4)
            words[plane * plane_words + place / codes * row_words + column] |= (code & ((1u << plane_bits) - 1)) << shift_of(place % codes, plane_bits);
    };
    half* scales = (half*)(into + shape.key_scales());
    int64_t plane_bits = shape.key_bits == 2 ? 2 : 4;
    for (int64_t d = 0; d < head; d++)
        round_group(
            UNIT, shape.key_bits, scales[d], scales[head + d], [&](int64_t t) { return to_float(keys[(d / PAIR * block_size + t) * PAIR + d % PAIR]); },
            [&](int64_t t, uint32_t code) { put((uint32_t*)into, head * plane_bits, shape.key_bits, UNIT, d, t, code); });
    scales = (half*)(into + shape.value_scales());
    plane_bits = shape.value_bits == 2 ? 2 : 4;
    for (int64_t t = 0; t < UNIT; t++)
        for (int64_t g = 0; g < head / UNIT; g++)
            round_group(
                UNIT, shape.value_bits, scales[g * UNIT + t], scales[head + g * UNIT + t],
                [&](int64_t i) { return to_float(values[(t / PAIR * head + g * UNIT + i) * PAIR + t % PAIR]); },
                [&](int64_t i, uint32_t code) {
                    put((uint32_t*)(into + shape.values()), plane_bits * head, shape.value_bits, head, t, g * UNIT + i, code);
                });
}

template <class T>
void seal(const Cache& cache, const Sealed& sealed, const int32_t* from, const int32_t* into, int64_t count) {
    UnitShape shape{cache.head_size, sealed.key_bits, sealed.value_bits};
    int64_t units = cache.block_size / UNIT, plane = cache.head_size * cache.block_size;
    Pool::get().run(count * cache.kv_heads, [&](int64_t task, int) {
        int64_t block = task / cache.kv_heads, head = task % cache.kv_heads;
        const T* keys = (const T*)(cache.keys + from[block] * cache.stride) + head * plane;
        const T* values = (const T*)(cache.values + from[block] * cache.stride) + head * plane;
        char* at = sealed.data + into[block] * sealed.stride + head * units * shape.bytes();
        for (int64_t unit = 0; unit < units; unit++)
            seal_unit(keys + unit * UNIT * LanesOf<T>::type::GROUP, values + unit * UNIT * cache.head_size, cache.block_size, shape,
                      at + unit * shape.bytes());
    });
}

}  // namespace
