// Norms, gated activations, rotary embedding and cache writes: row by row, float32 arithmetic, any order of rows.
#pragma once

#include <cmath>

#include "table.h"
#include "vec.h"

namespace {

using namespace headrace;

// Below this many elements a second thread costs more than it brings: a step of 64 decodes stays on one.
constexpr int64_t PARALLEL = 131072;

template <class T>
void norm_row(const T* x, const float* weight, float eps, T* y, int64_t size) {
    vf squares = {};
    for (int64_t i = 0; i < size; i += W) {
        vf v = load(x + i, size - i);
        squares += v * v;
    }
    vf factor = splat(1.0f / std::sqrt(sum(squares) / size + eps));
    for (int64_t i = 0; i < size; i += W) store(y + i, load(x + i, size - i) * factor * load(weight + i, size - i), size - i);
}

template <class T>
void rms_norm(Rows x, const float* weight, float eps, T* y) {
    int64_t rows = x.outer * x.inner;
#pragma omp parallel for schedule(static) if (rows * x.size > PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = (const T*)x.data + row / x.inner * x.outer_stride + row % x.inner * x.size;
        norm_row(from, weight, eps, y + row * x.size, x.size);
    }
}

template <class T>
void add_rms_norm(Rows x, T* residual, const float* weight, float eps, T* y) {
#pragma omp parallel for schedule(static) if (x.outer * x.size > PARALLEL)
    for (int64_t row = 0; row < x.outer; row++) {
        const T* from = (const T*)x.data + row * x.outer_stride;
        T* into = residual + row * x.size;
        for (int64_t i = 0; i < x.size; i += W)
            store(into + i, load(into + i, x.size - i) + load(from + i, x.size - i), x.size - i);
        norm_row(into, weight, eps, y + row * x.size, x.size);
    }
}

template <class T>
void gated(const T* gate_up, T* y, int64_t rows, int64_t size, bool gelu) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += W) {
            vf g = load(gate + i, size - i);
            // gelu by tanh: 0.5 (1 + tanh u) is the sigmoid of 2 u.
            vf open = gelu ? sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g)) : sigmoid(g);
            store(y + row * size + i, g * open * load(up + i, size - i), size - i);
        }
    }
}

template <class T>
void rotate(Rows heads, const float* cos, const float* sin) {
    int64_t half = heads.size / 2;
#pragma omp parallel for schedule(static) if (heads.outer * heads.inner * heads.size > PARALLEL)
    for (int64_t token = 0; token < heads.outer; token++)
        for (int64_t head = 0; head < heads.inner; head++) {
            T* first = (T*)heads.data + token * heads.outer_stride + head * heads.size;
            T* second = first + half;
            for (int64_t i = 0; i < half; i += W) {
                int64_t n = half - i;
                vf a = load(first + i, n), b = load(second + i, n);
                vf c = load(cos + token * half + i, n), s = load(sin + token * half + i, n);
                store(first + i, a * c - b * s, n);
                store(second + i, b * c + a * s, n);
            }
        }
}

template <class T>
void write_kv(Rows keys, Rows values, Cache cache, const int64_t* slots) {
    int64_t head = cache.head_size, size = cache.block_size;
#pragma omp parallel for schedule(static) if (keys.outer * keys.inner * head > PARALLEL)
    for (int64_t token = 0; token < keys.outer; token++) {
        int64_t block = slots[token] / size, offset = slots[token] % size;
        const T* k = (const T*)keys.data + token * keys.outer_stride;
        const T* v = (const T*)values.data + token * values.outer_stride;
        for (int64_t h = 0; h < cache.kv_heads; h++) {
            int64_t start = (block * cache.kv_heads + h) * head * size;
            for (int64_t i = 0; i < head; i++) ((T*)cache.keys)[start + i * size + offset] = k[h * head + i];
            std::memcpy((T*)cache.values + start + offset * head, v + h * head, head * sizeof(T));
        }
    }
}

}  // namespace
