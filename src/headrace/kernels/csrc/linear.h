// Float32 matrix product with packed weights. Each output element is one running sum over the input features in
// ascending order, whatever tile it falls into: a row's result has the same bits for any number of rows.
#pragma once

#include "vec.h"

namespace {

constexpr int PANEL = 32;
constexpr int VECTORS = PANEL / W;
// Row tiles as high as the registers allow: VECTORS accumulators a row and a few for the operands.
constexpr int TILE = W == 16 ? 12 : W == 8 ? 3 : 1;
constexpr int64_t CHUNK = 8 * TILE;

void pack(const float* weight, float* packed, int64_t out, int64_t in) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < out; first += PANEL) {
        float* panel = packed + first * in;
        for (int64_t k = 0; k < in; k++)
            for (int64_t j = 0; j < PANEL; j++) panel[k * PANEL + j] = first + j < out ? weight[(first + j) * in + k] : 0.0f;
    }
}

template <int ROWS>
void multiply_tile(const float* x, const float* panel, const float* bias, float* y, int64_t in, int64_t out, int64_t columns) {
    vf sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < in; k++) {
        vf w[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) w[v] = load(panel + k * PANEL + v * W);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[r][v] += x[r * in + k] * w[v];
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            int64_t left = columns - v * W;
            if (left <= 0) continue;
            if (bias) sums[r][v] += load(bias + v * W, left);
            store(y + r * out + v * W, sums[r][v], left);
        }
}

template <int ROWS>
void multiply_rows(int64_t rows, const float* x, const float* panel, const float* bias, float* y, int64_t in, int64_t out,
                   int64_t columns) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply_tile<ROWS>(x, panel, bias, y, in, out, columns);
        multiply_rows<ROWS - 1>(rows, x, panel, bias, y, in, out, columns);
    }
}

void linear(const float* x, const float* packed, const float* bias, float* y, int64_t rows, int64_t out, int64_t in) {
    int64_t panels = (out + PANEL - 1) / PANEL, chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t c = 0; c < chunks; c++) {
            int64_t column = p * PANEL, end = (c + 1) * CHUNK < rows ? (c + 1) * CHUNK : rows;
            for (int64_t row = c * CHUNK; row < end; row += TILE)
                multiply_rows<TILE>(end - row < TILE ? end - row : TILE, x + row * in, packed + column * in,
                                    bias ? bias + column : nullptr, y + row * out + column, in, out, out - column);
        }
}

}  // namespace
