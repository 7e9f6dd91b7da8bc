// Ragged paged attention with online softmax (FlashAttention, arXiv 2205.14135, algorithm 1), prefill and decode alike.
//
// A task is a tile of one sequence's query tokens and the query heads that share one kv head, so that keys and values
// are read once for all of them. Spans of a few blocks are taken in ascending order from position 0, and each (query,
// head) does the same arithmetic in the same order as if it were alone: a row's bits do not depend on chunk or batch.
// In bfloat16 queries, keys, values and softmax weights are bfloat16, sums and the softmax float32.
#pragma once

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

struct Task {
    int64_t sequence, head, token, tokens;
};

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

template <class T>
void load_queries(const Rows& queries, const Task& task, int64_t start, int64_t group, T* into) {
    int64_t size = queries.size;
    for (int64_t t = 0; t < task.tokens; t++) {
        const T* row = (const T*)queries.data + (start + task.token + t) * queries.outer_stride + task.head * group * size;
        std::memcpy(into + t * group * size, row, group * size * sizeof(T));
    }
}

// One tile over one span: scores, softmax, values.
template <class T>
struct Tile {
    using Lanes = typename LanesOf<T>::type;
    static constexpr int64_t PAIR = Lanes::GROUP;

    const Attention& spec;
    int64_t group, position, tokens, head, size, span;
    Scratch<T>& s;

    void add_span(const Span& blocks, int64_t begin) {
        // Rows whose query comes before this span, or whose window has left it, have no part in it.
        int64_t low = std::max<int64_t>(0, begin - position);
        int64_t high = spec.window ? std::min(tokens, begin + span - 1 + spec.window - position) : tokens;
        const uint32_t *queries = (const uint32_t*)s.queries.data(), *weights = (const uint32_t*)s.weights.data();
        for (int64_t block = blocks.first; block < blocks.last; block++) {
            for (int64_t r = low * group; r < high * group; r += SCORE_ROWS)
                by_count<SCORE_ROWS>(high * group - r, [&](auto count) {
                    score_rows<Lanes, count>(queries + r * head / PAIR, blocks.keys[block], blocks.values[block], &s.scores[r * span + block * size], span,
                                             head / PAIR, size);
                });
        }
        int64_t from = blocks.first * size, to = blocks.last * size;
        for (int64_t r = low * group; r < high * group; r++) {
            int64_t own = position + r / group;
            Visible visible{spec.window ? std::max<int64_t>(0, own - spec.window + 1 - begin) : 0, own + 1 - begin};
            auto soften = visible.from <= from && visible.to >= to ? soften_row<false, T> : soften_row<true, T>;
            soften(&s.scores[r * span], &s.weights[r * span], &s.outputs[r * head], s.top[r], &s.total[r * W], head, from, to, visible, spec);
        }
        for (int64_t r = low * group; r < high * group; r += OUTPUT_ROWS)
            by_count<OUTPUT_ROWS>(high * group - r, [&](auto count) {
                add_values<Lanes, count>(weights + r * span / PAIR, blocks, &s.outputs[r * head], span / PAIR, head, size / PAIR);
            });
    }
};

template <class T>
void run_task(const Task& task, const Rows& queries, const Cache& cache, const Batch& batch, const Attention& spec, T* y, Scratch<T>& s) {
    int64_t group = queries.inner / cache.kv_heads, rows = task.tokens * group, start = batch.starts[task.sequence];
    int64_t head = cache.head_size, size = cache.block_size, position = batch.positions[start + task.token];
    int64_t blocks = std::max<int64_t>(1, SPAN_TOKENS / size);
    load_queries<T>(queries, task, start, group, s.queries.data());
    std::fill_n(s.outputs.begin(), rows * head, 0.0f);
    std::fill_n(s.top.begin(), rows, -INFINITE);
    std::fill_n(s.total.begin(), rows * W, 0.0f);
    Tile<T> tile{spec, group, position, task.tokens, head, size, blocks * size, s};
    const int32_t* table = batch.tables + task.sequence * batch.table_stride;
    int64_t first = spec.window && position >= spec.window ? position - spec.window + 1 : 0;
    int64_t first_block = first / size, end_block = (position + task.tokens - 1) / size + 1;
    for (int64_t begin = first_block / blocks * blocks; begin < end_block; begin += blocks) {
        int64_t last = std::min(blocks, end_block - begin), written = std::min(size, position + task.tokens - (begin + last - 1) * size);
        Span span{{}, {}, std::max<int64_t>(0, first_block - begin), last, (written + Tile<T>::PAIR - 1) / Tile<T>::PAIR};
        for (int64_t block = span.first; block < span.last; block++) {
            int64_t place = ((int64_t)table[begin + block] * cache.kv_heads + task.head) * head * size;
            span.keys[block] = (const uint32_t*)((const T*)cache.keys + place);
            span.values[block] = (const uint32_t*)((const T*)cache.values + place);
        }
        tile.add_span(span, begin * size);
    }
    for (int64_t r = 0; r < rows; r++) {
        T* into = y + (start + task.token + r / group) * queries.inner * head + (task.head * group + r % group) * head;
        vf total = splat(1.0f / sum(load(&s.total[r * W])));
        for (int64_t d = 0; d < head; d += W) store(into + d, load(&s.outputs[r * head + d], head - d) * total, head - d);
    }
}

// Ask for what a task reads first, while another runs: short contexts are over before the processor has seen a pattern.
template <class T>
void prefetch_task(const Task& task, const Cache& cache, const Batch& batch, const Attention& spec) {
    int64_t size = cache.block_size, position = batch.positions[batch.starts[task.sequence] + task.token];
    int64_t first = (spec.window && position >= spec.window ? position - spec.window + 1 : 0) / size;
    int64_t end = std::min((position + task.tokens - 1) / size + 1, first + std::max<int64_t>(1, SPAN_TOKENS / size));
    for (int64_t block = first; block < end; block++) {
        int64_t row = (int64_t)batch.tables[task.sequence * batch.table_stride + block] * cache.kv_heads + task.head;
        int64_t bytes = cache.head_size * size * sizeof(T);
        for (int64_t at = 0; at < bytes; at += 64) {
            __builtin_prefetch((const char*)cache.keys + row * bytes + at, 0, 2);
            __builtin_prefetch((const char*)cache.values + row * bytes + at, 0, 2);
        }
    }
}

template <class T>
void attention(Rows queries, Cache cache, Batch batch, Attention spec, T* y) {
    int64_t group = queries.inner / cache.kv_heads, tile = std::max<int64_t>(1, TILE_ROWS / group), rows = tile * group;
    int64_t span = std::max(SPAN_TOKENS / cache.block_size, (int64_t)1) * cache.block_size;
    std::vector<Task> tasks;
    for (int64_t s = 0; s < batch.sequences; s++)
        for (int64_t h = 0; h < cache.kv_heads; h++)
            for (int64_t t = 0, n = batch.starts[s + 1] - batch.starts[s]; t < n; t += tile)
                tasks.push_back({s, h, t, std::min(tile, n - t)});
    int64_t threads = Pool::get().threads(), count = (int64_t)tasks.size();
    Pool::get().run(count, [&](int64_t i, int) {
        // Kept between calls: clearing it would take longer than a short context does.
        static thread_local Scratch<T> scratch;
        scratch.fit(rows, span, cache.head_size);
        if (i + threads < count && tasks[i + threads].tokens == 1) prefetch_task<T>(tasks[i + threads], cache, batch, spec);
        run_task<T>(tasks[i], queries, cache, batch, spec, y, scratch);
    });
}

}  // namespace
