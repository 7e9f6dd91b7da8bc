// Vectors of floats in the compiler's own vector extension, as wide as the instruction set that this file is compiled for.
// Every function treats each lane alike, so a value's result does not depend on its place in a vector.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "table.h"

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef int8_t v16 __attribute__((vector_size(16)));

struct bf16 {
    uint16_t bits;
};
using headrace::half;

inline vf splat(float value) { return value - vf{}; }

// a * b + c. Rounded once where the processor can; the compiler is told never to fuse by itself, for it would do so in one
// copy of a loop and not in another, and a row's bits would depend on its tile.
inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vf load(const bf16* p) {
    vh half;
    std::memcpy(&half, p, sizeof half);
    // Compilers make two halves and join them.
#if defined(__AVX512F__)
    return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)half) << 16);
#elif defined(__AVX2__)
    return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)half) << 16);
#else
    return (vf)(__builtin_convertvector(half, vu) << 16);
#endif
}

inline vf load(const half* p) {
    vh bits;
    std::memcpy(&bits, p, sizeof bits);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)bits);
#else
    // The exponent, 5 bits of bias 15, becomes one of 8 bits and bias 127 by a product, which takes small numbers along.
    vu wide = __builtin_convertvector(bits, vu);
    vf magnitude = (vf)((wide & 0x7fff) << 13) * 5.192296858534828e33f;
    // What that makes 2^16 and more is infinite, or no number.
    vu endless = (vu)(magnitude >= 65536.0f) & 0x7f800000;
    return (vf)((vu)magnitude | endless | (wide & 0x8000) << 16);
#endif
}

inline vu load(const uint32_t* p) {
    vu v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Floats as bfloat16 has them, in the upper halves: to nearest, ties to even, as torch does; NaN stays NaN.
inline vu round_bits(vf v) {
    vu bits = (vu)v;
    return v == v ? bits + 0x7fff + ((bits >> 16) & 1) : vu{} + 0x7fc00000u;
}

inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    auto half = _mm512_cvtneps_pbh((__m512)v);
#else
    vh half = __builtin_convertvector(round_bits(v) >> 16, vh);
#endif
    std::memcpy(p, &half, sizeof half);
}

// Store two vectors beside each other, and add what they are then, rounded, to sums whose own sum counts.
inline vf add_stored(float* p, vf first, vf second, vf sums) {
    store(p, first);
    store(p + W, second);
    return sums + first + second;
}

inline vf add_stored(bf16* p, vf first, vf second, vf sums) {
#if defined(__AVX512BF16__)
    // Reading them again would wait until they are written.
    auto both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    std::memcpy(p, &both, sizeof both);
    return (vf)_mm512_dpbf16_ps((__m512)sums, both, (__m512bh)(vu{} + 0x3f803f80u));
#else
    store(p, first);
    store(p + W, second);
    return sums + load(p) + load(p + W);
#endif
}

// The first n < W lanes; the others are zero, or not written.
template <class T>
inline auto load(const T* p, int64_t n) {
    if (n >= W) return load(p);
    T padded[W] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T>
inline void store(T* p, vf v, int64_t n) {
    if (n >= W) return store(p, v);
    T padded[W];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
}

// Whole numbers from -128 to 127 as bytes, in the lowest W of 16. Compilers take vectors apart where they need not.
inline v16 narrow(vi v) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
    __m256i picked = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    return (v16)_mm_unpacklo_epi32(_mm256_castsi256_si128(picked), _mm256_extracti128_si256(picked, 1));
#else
    vb bytes = __builtin_convertvector(v, vb);
    v16 found = {};
    std::memcpy(&found, &bytes, W);
    return found;
#endif
}

// 16 of them.
inline v16 narrow(const vi (&v)[16 / W]) {
#if defined(__AVX512F__)
    return narrow(v[0]);
#elif defined(__AVX2__)
    return (v16)_mm_unpacklo_epi64((__m128i)narrow(v[0]), (__m128i)narrow(v[1]));
#else
    v16 found;
    for (int i = 0; i < 16 / W; i++) {
        v16 some = narrow(v[i]);
        std::memcpy((char*)&found + i * W, &some, W);
    }
    return found;
#endif
}

// Whole numbers that 16 bits hold.
inline void store(int16_t* p, vi v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
    auto narrow = __builtin_convertvector(v, vh);
#endif
    std::memcpy(p, &narrow, sizeof narrow);
}

// W bytes, or the first n < W, as whole numbers.
inline vi widen(const uint8_t* p, int64_t n = W) {
    v16 bytes = {};
#if defined(__AVX2__) && !defined(__AVX512F__)
    if (n >= W) return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
    std::memcpy(&bytes, p, n >= W ? W : n);
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32((__m128i)bytes);
#else
    vi found;
    for (int i = 0; i < W; i++) found[i] = (uint8_t)bytes[i];
    return found;
#endif
}

// The first n of them if n < W.
inline void store(int8_t* p, vi v, int64_t n) {
    v16 bytes = narrow(v);
    if (n >= W)
        std::memcpy(p, &bytes, W);
    else
        std::memcpy(p, &bytes, n);
}

// Where either is no number, they give b, as the processor's own instructions do.
inline vf maximum(vf a, vf b) { return a > b ? a : b; }
inline vf minimum(vf a, vf b) { return a < b ? a : b; }

// The larger of known magnitudes' bits and those of v's: whole numbers order them as the numbers themselves, with infinity
// above all and what is no number above that.
inline vi maximum_magnitude(vi known, vf v) {
    vi bits = (vi)v & 0x7fffffff;
    return known > bits ? known : bits;
}

inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lanes[W];
    store(lanes, v);
    for (int stride = W / 2; stride > 0; stride /= 2)
        for (int i = 0; i < stride; i++) lanes[i] += lanes[i + stride];
    return lanes[0];
#endif
}

inline int32_t sum(vi v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
#endif
}

// Whether any lane of a comparison is true.
inline bool any(vi truth) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)truth, (__m512i)truth);
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)truth, (__m256i)truth);
#else
    int32_t found = 0;
    for (int i = 0; i < W; i++) found |= truth[i];
    return found;
#endif
}

inline float largest(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
    __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#else
    float lanes[W];
    store(lanes, v);
    float top = lanes[0];
    for (int i = 1; i < W; i++) top = lanes[i] > top ? lanes[i] : top;
    return top;
#endif
}

inline float largest_magnitude(vi bits) {
#if defined(__AVX512F__)
    int32_t top = _mm512_reduce_max_epi32((__m512i)bits);
#else
    int32_t top = bits[0];
    for (int i = 1; i < W; i++) top = bits[i] > top ? bits[i] : top;
#endif
    return std::bit_cast<float>(top);
}

// 2^x to about 1e-7 relative, x from -126 to 126 and 2^-126 for less: the nearest whole number goes to the exponent, a
// polynomial (Taylor's, of (ln 2)^k / k!) takes the rest. What is no number stays none.
inline vf power_of_two(vf x) {
    x = maximum(splat(-126.0f), x);
    // Adding 1.5 * 2^23 leaves the nearest whole number in the lowest bits; taking it away again gives it as a number.
    vf shifted = x + 12582912.0f;
    vf r = x - (shifted - 12582912.0f);
    vf p = multiply_add(splat(1.5403530e-4f), r, splat(1.3333558e-3f));
    p = multiply_add(p, r, splat(9.6181291e-3f));
    p = multiply_add(p, r, splat(5.5504109e-2f));
    p = multiply_add(p, r, splat(2.4022651e-1f));
    p = multiply_add(p, r, splat(6.9314718e-1f));
    p = multiply_add(p, r, splat(1.0f));
    return (vf)((vi)p + ((vi)shifted << 23));
}

inline vf exponential(vf x) { return power_of_two(minimum(splat(126.0f), x * 1.44269504088896341f)); }

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
inline vf hyperbolic_tangent(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

}  // namespace
