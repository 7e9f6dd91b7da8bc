// Scores and values of the exact blocks of a span, for some rows at once: a thread's working memory and the inner loops.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "pool.h"
#include "table.h"

namespace {

using namespace headrace;

constexpr int64_t TILE_ROWS = 48;
constexpr int64_t SPAN_TOKENS = 128;  // the softmax is brought up to date once in so many
constexpr int SCORE_ROWS = W == 16 ? 12 : 3;  // rows of scores in registers at once, two vectors of keys each
constexpr int OUTPUT_ROWS = W == 16 ? 6 : 2;  // rows of outputs in registers at once, four vectors each
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Call a function with min(count, MOST) as a constant of the compiler's, so that as many rows stay in registers.
template <int MOST, class Function>
void by_count(int64_t count, Function function) {
    if constexpr (MOST > 1) {
        if (count < MOST) return by_count<MOST - 1>(count, function);
    }
    function(std::integral_constant<int, MOST>{});
}

// Working memory of one thread: a tile's queries, scores of one span and the softmax weights they become, what is summed
// (total: W sums a row, added up at the end). `scaled` and `numbers` are of one unit of sealed tokens.
template <class T>
struct Scratch {
    std::vector<T> queries, weights, scaled;
    std::vector<float> scores, outputs, top, total, numbers;

    void fit(int64_t rows, int64_t span, int64_t head) {
        queries.resize(rows * head);
        scaled.resize(2 * rows * std::max<int64_t>(head, 32));
        numbers.resize(3 * std::max<int64_t>(head, 32));
        weights.resize(rows * span);
        scores.resize(rows * span);
        outputs.resize(rows * head + W);
        top.resize(rows);
        total.resize(rows * W);
    }
};

// scores [rows, block_size] of a span's rows = queries [rows, lanes] times keys [lanes, block_size].
template <class Lanes, int ROWS>
void score_rows(const uint32_t* queries, const uint32_t* keys, const uint32_t* values, float* scores, int64_t span, int64_t lanes,
                int64_t block_size) {
    for (int64_t j = 0; j < block_size; j += 2 * W) {
        bool both = block_size - j > W;
        vf sums[ROWS][2] = {};
        for (int64_t d = 0; d < lanes; d++) {
            // A block of values is as large as one of keys: fetch it meanwhile, a line or two with each lane.
            for (int64_t at = j; at < std::min(block_size, j + 2 * W); at += 16) __builtin_prefetch(values + d * block_size + at);
            vu first = load(keys + d * block_size + j), second = both ? load(keys + d * block_size + j + W) : vu{};
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                sums[r][0] = Lanes::step(sums[r][0], queries[r * lanes + d], first);
                sums[r][1] = Lanes::step(sums[r][1], queries[r * lanes + d], second);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            store(scores + r * span + j, sums[r][0]);
            if (both) store(scores + r * span + j + W, sums[r][1]);
        }
    }
}

// The blocks of a span that a tile sees: where their keys and values begin, and how many lanes of tokens are written in the
// last one. What lies beyond them may be anything.
struct Span {
    const uint32_t* keys[SPAN_TOKENS / 16];
    const uint32_t* values[SPAN_TOKENS / 16];
    const uint32_t* ahead[SPAN_TOKENS / 16];  // keys that are read after each block's values; null if there are none
    const float* bias[SPAN_TOKENS / 16];  // of a block's scores; null if there is none
    int64_t first, last, written;

    int64_t lanes(int64_t block, int64_t all) const { return block + 1 == last ? written : all; }
};

// outputs [rows, size] += weights [rows, span] times the span's values, lanes of neighbouring tokens [block_lanes, size].
// With `fetch`, asks for the keys that are read next, as many as there are values.
template <class Lanes, int ROWS>
void add_values(const uint32_t* weights, const Span& span, float* outputs, int64_t span_lanes, int64_t size, int64_t block_lanes, bool fetch) {
    constexpr int V = 4;
    int64_t d = 0;
    for (; d + V * W <= size; d += V * W) {
        vf sums[ROWS][V];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) sums[r][v] = load(outputs + r * size + d + v * W);
        for (int64_t block = span.first; block < span.last; block++) {
            const uint32_t *values = span.values[block] + d, *lanes = weights + block * block_lanes;
            const uint32_t* ahead = fetch && span.ahead[block] ? span.ahead[block] + d : nullptr;
            for (int64_t j = 0, end = span.lanes(block, block_lanes); j < end; j++) {
                for (int at = 0; ahead && at < V * W; at += 16) __builtin_prefetch(ahead + j * size + at);
                vu row[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) row[v] = load(values + j * size + v * W);
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) sums[r][v] = Lanes::step(sums[r][v], lanes[r * span_lanes + j], row[v]);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) store(outputs + r * size + d + v * W, sums[r][v]);
    }
    for (; d < size; d += W)
        for (int r = 0; r < ROWS; r++) {
            vf sum = load(outputs + r * size + d, size - d);
            for (int64_t block = span.first; block < span.last; block++)
                for (int64_t j = 0, end = span.lanes(block, block_lanes); j < end; j++)
                    sum = Lanes::step(sum, weights[r * span_lanes + block * block_lanes + j], load(span.values[block] + j * size + d, size - d));
            store(outputs + r * size + d, sum, size - d);
        }
}

// Some rows of a tile over one span: queries and weights as lanes, scores and outputs, each row's beside the other's.
struct SpanRows {
    const uint32_t* queries;
    const uint32_t* weights;
    float *scores, *outputs;
    int64_t low, high, head, span;
};

// scores [rows, span] += bias [size] / scale, for softening will multiply them by the scale.
template <class Blocks>
void add_bias(const Blocks& blocks, const SpanRows& rows, int64_t size, float scale) {
    for (int64_t block = blocks.first; block < blocks.last; block++)
        for (int64_t j = 0; j < size; j += W) {
            vf added = load(blocks.bias[block] + j) / scale;
            for (int64_t r = rows.low; r < rows.high; r++) {
                float* score = rows.scores + r * rows.span + block * size + j;
                store(score, load(score) + added);
            }
        }
}

// The scores of a span's exact blocks, and its values.
template <class T>
void score_span(const Span& blocks, const SpanRows& rows, int64_t size) {
    using Lanes = typename LanesOf<T>::type;
    int64_t lanes = rows.head / Lanes::GROUP;
    for (int64_t block = blocks.first; block < blocks.last; block++)
        for (int64_t r = rows.low; r < rows.high; r += SCORE_ROWS)
            by_count<SCORE_ROWS>(rows.high - r, [&](auto count) {
                score_rows<Lanes, count>(rows.queries + r * lanes, blocks.keys[block], blocks.values[block], rows.scores + r * rows.span + block * size,
                                         rows.span, lanes, size);
            });
}

template <class T>
void add_span_values(const Span& blocks, const SpanRows& rows, int64_t size) {
    using Lanes = typename LanesOf<T>::type;
    constexpr int64_t PAIR = Lanes::GROUP;
    for (int64_t r = rows.low; r < rows.high; r += OUTPUT_ROWS)
        by_count<OUTPUT_ROWS>(rows.high - r, [&](auto count) {
            add_values<Lanes, count>(rows.weights + r * rows.span / PAIR, blocks, rows.outputs + r * rows.head, rows.span / PAIR, rows.head, size / PAIR,
                                     r == rows.low);
        });
}

}  // namespace
