// Vectors of floats in the compiler's own vector extension, as wide as the instruction set that this file is compiled for.
// Every function treats each lane alike, so a value's result does not depend on its place in a vector.
#pragma once

#include <cstdint>
#include <cstring>

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

struct bf16 {
    uint16_t bits;
};

inline vf splat(float value) { return value - vf{}; }

inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vf load(const bf16* p) {
    vh half;
    std::memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest, ties to even, as torch does; NaN stays NaN.
inline void store(bf16* p, vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = v == v ? rounded : vu{} + 0x7fc0;
    vh half = __builtin_convertvector(rounded, vh);
    std::memcpy(p, &half, sizeof half);
}

// The first n < W lanes; the others are zero, or not written.
template <class T>
inline vf load(const T* p, int64_t n) {
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

inline vf maximum(vf a, vf b) { return a > b ? a : b; }
inline vf minimum(vf a, vf b) { return a < b ? a : b; }

inline float sum(vf v) {
    float lanes[W], total = 0;
    store(lanes, v);
    for (int stride = W / 2; stride > 0; stride /= 2)
        for (int i = 0; i < stride; i++) lanes[i] += lanes[i + stride];
    total = lanes[0];
    return total;
}

inline float largest(vf v) {
    float lanes[W];
    store(lanes, v);
    float top = lanes[0];
    for (int i = 1; i < W; i++) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// e^x to about 1e-7 relative: x = n ln 2 + r, a polynomial in r (Cephes), n added to the exponent.
inline vf exponential(vf x) {
    x = minimum(maximum(x, splat(-87.0f)), splat(88.0f));
    vf scaled = x * 1.44269504088896341f;
    vi n = __builtin_convertvector(scaled + (scaled < 0 ? splat(-0.5f) : splat(0.5f)), vi);
    vf whole = __builtin_convertvector(n, vf);
    vf r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vf)((n + 127) << 23);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
inline vf hyperbolic_tangent(vf x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

}  // namespace
