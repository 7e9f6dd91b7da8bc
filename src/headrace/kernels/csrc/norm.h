// Norms of rows, and sums that they are taken of. Float32 arithmetic, any order of rows.
#pragma once

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "table.h"
#include "vec.h"

namespace {

using namespace headrace;

// Elements a task: fewer would not pay for waking another thread.
constexpr int64_t ELEMENTS_PER_TASK = 8192;

// Call function(row) for every row, a few thousand elements a task.
template <class Function>
void for_rows(int64_t rows, int64_t size, Function function) {
    int64_t together = std::max<int64_t>(1, ELEMENTS_PER_TASK / size);
    Pool::get().run((rows + together - 1) / together, [&](int64_t task, int) {
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++) function(row);
    });
}

// y = x's norm times a weight.
template <class T, class Y>
void norm_row(const T* x, const float* weight, float eps, Y* y, int64_t size) {
    vf squares = {};
    for (int64_t i = 0; i < size; i += W) {
        vf v = load(x + i, size - i);
        squares = multiply_add(v, v, squares);
    }
    vf factor = splat(1.0f / std::sqrt(sum(squares) / size + eps));
    for (int64_t i = 0; i < size; i += W) store(y + i, load(x + i, size - i) * factor * load(weight + i, size - i), size - i);
}

template <class T>
void rms_norm(const T* x, const float* weight, float eps, int64_t rows, int64_t size, T* y) {
    for_rows(rows, size, [&](int64_t row) { norm_row(x + row * size, weight, eps, y + row * size, size); });
}

template <class T>
void add_row(const T* x, T* residual, int64_t size) {
    for (int64_t i = 0; i < size; i += W) store(residual + i, load(residual + i, size - i) + load(x + i, size - i), size - i);
}

// y = the norm of a residual's row, after x's row has been added to it if there is an x (Norm in table.h).
template <class T, class Y>
void norm_residual(const T* x, const Norm& norm, int64_t row, int64_t size, Y* y) {
    T* residual = (T*)norm.residual + row * size;
    if (x) add_row(x + row * size, residual, size);
    norm_row(residual, norm.weight, norm.eps, y, size);
}

template <class T>
void add_rms_norm(const T* x, T* residual, const float* weight, float eps, int64_t rows, int64_t size, T* y) {
    for_rows(rows, size, [&](int64_t row) { norm_residual(x, Norm{residual, weight, eps}, row, size, y + row * size); });
}

}  // namespace
