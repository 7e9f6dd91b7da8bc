// A tile of attention over one span of blocks: scores, softmax, values. attention.h says which tiles and spans there are.
#pragma once

#include <algorithm>
#include <cmath>
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
// (total: W sums a row, added up at the end).
template <class T>
struct Scratch {
    std::vector<T> queries, weights;
    std::vector<float> scores, outputs, top, total;

    void fit(int64_t rows, int64_t span, int64_t head) {
        queries.resize(rows * head);
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
    int64_t first, last, written;

    int64_t lanes(int64_t block, int64_t all) const { return block + 1 == last ? written : all; }
};

// outputs [rows, size] += weights [rows, span] times the span's values, lanes of neighbouring tokens [block_lanes, size].
template <class Lanes, int ROWS>
void add_values(const uint32_t* weights, const Span& span, float* outputs, int64_t span_lanes, int64_t size, int64_t block_lanes) {
    constexpr int V = 4;
    int64_t d = 0;
    for (; d + V * W <= size; d += V * W) {
        vf sums[ROWS][V];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) sums[r][v] = load(outputs + r * size + d + v * W);
        for (int64_t block = span.first; block < span.last; block++) {
            const uint32_t *values = span.values[block] + d, *lanes = weights + block * block_lanes;
            for (int64_t j = 0, end = span.lanes(block, block_lanes); j < end; j++) {
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

// What a row sees of a span: tokens from..to.
struct Visible {
    int64_t from, to;

    vf hide(vf values, int64_t j, float otherwise) const {
        vi place = (int32_t)j + vi{};
        for (int i = 0; i < W; i++) place[i] += i;
        return (place >= (int32_t)from) & (place < (int32_t)to) ? values : splat(otherwise);
    }
};

// Turn a row's scores of the tokens begin..end of a span into weights: exp(scale * (score - largest so far)) where visible,
// zero elsewhere. Rescales what was summed. top is -inf before the first span.
template <bool PARTLY, class T>
void soften_row(float* scores, T* weights, float* output, float& top, float* total, int64_t size, int64_t begin, int64_t end,
                Visible visible, const Attention& spec) {
    vf best = splat(-INFINITE);
    for (int64_t j = begin; j < end; j += W) {
        vf s = load(scores + j);
        if (spec.soft_cap > 0) s = spec.soft_cap / spec.scale * hyperbolic_tangent(s * (spec.scale / spec.soft_cap));
        if (PARTLY) s = visible.hide(s, j, -INFINITE);
        if (PARTLY || spec.soft_cap > 0) store(scores + j, s);
        best = maximum(best, s);
    }
    float now = std::fmax(top, largest(best)), factor = spec.scale * 1.44269504088896341f;
    vf shift = splat(-now * factor), added = {};
    for (int64_t j = begin; j < end; j += W) {
        vf weight = power_of_two(multiply_add(load(scores + j), splat(factor), shift));
        if (PARTLY) weight = visible.hide(weight, j, 0.0f);
        store(weights + j, weight);
        added += weight;
    }
    if (now == top) return store(total, load(total) + added);
    // Before the first span all sums are zero.
    vf kept = power_of_two(splat((top - now) * factor));
    store(total, multiply_add(load(total), kept, added));
    for (int64_t d = 0; d < size; d += W) store(output + d, load(output + d, size - d) * kept, size - d);
    top = now;
}

// One tile over one span: scores, softmax, values.
template <class T>
struct Tile {
    using Lanes = typename LanesOf<T>::type;
    static constexpr int64_t PAIR = Lanes::GROUP;

    const Attention& spec;
    int64_t group, position, tokens, head, size, span, base;
    Scratch<T>& s;

    void add_span(const Span& blocks, int64_t begin) {
        // Rows whose query comes before this span, or whose window has left it, have no part in it.
        int64_t low = std::max<int64_t>(0, begin - position);
        int64_t high = spec.window ? std::min(tokens, begin + span - 1 + spec.window - position) : tokens;
        const uint32_t* queries = (const uint32_t*)(s.queries.data() + base * head);
        const uint32_t* weights = (const uint32_t*)(s.weights.data() + base * span);
        float *scores = &s.scores[base * span], *outputs = &s.outputs[base * head];
        for (int64_t block = blocks.first; block < blocks.last; block++) {
            for (int64_t r = low * group; r < high * group; r += SCORE_ROWS)
                by_count<SCORE_ROWS>(high * group - r, [&](auto count) {
                    score_rows<Lanes, count>(queries + r * head / PAIR, blocks.keys[block], blocks.values[block], scores + r * span + block * size, span,
                                             head / PAIR, size);
                });
        }
        int64_t from = blocks.first * size, to = blocks.last * size;
        for (int64_t r = low * group; r < high * group; r++) {
            int64_t own = position + r / group;
            Visible visible{spec.window ? std::max<int64_t>(0, own - spec.window + 1 - begin) : 0, own + 1 - begin};
            auto soften = visible.from <= from && visible.to >= to ? soften_row<false, T> : soften_row<true, T>;
            soften(scores + r * span, &s.weights[(base + r) * span], outputs + r * head, s.top[base + r], &s.total[(base + r) * W], head, from, to,
                   visible, spec);
        }
        for (int64_t r = low * group; r < high * group; r += OUTPUT_ROWS)
            by_count<OUTPUT_ROWS>(high * group - r, [&](auto count) {
                add_values<Lanes, count>(weights + r * span / PAIR, blocks, outputs + r * head, span / PAIR, head, size / PAIR);
            });
    }
};

}  // namespace
