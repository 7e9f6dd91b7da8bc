// Ragged paged attention with online softmax (FlashAttention, arXiv 2205.14135, algorithm 1), prefill and decode alike.
//
// A task is a tile of one sequence's query tokens and the query heads that share one kv head, so that keys and values
// are read once for all of them. Blocks of the cache are taken in ascending order from position 0, and each (query,
// head) does the same arithmetic in the same order as if it were alone: a row's bits do not depend on chunk or batch.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "table.h"
#include "vec.h"

namespace {

using namespace headrace;

constexpr int64_t TILE_ROWS = 48;
constexpr int SCORE_ROWS = W == 16 ? 8 : 3;   // rows of scores in registers at once, two vectors of keys each
constexpr int OUTPUT_ROWS = W == 16 ? 6 : 2;  // rows of outputs in registers at once, four vectors each

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

// Working memory of one thread.
struct Scratch {
    std::vector<float> queries, scores, outputs, top, total;
};

// scores [rows, block_size] = queries [rows, head_size] times keys [head_size, block_size].
template <int ROWS, class T>
void score_rows(const float* queries, const T* keys, float* scores, int64_t head_size, int64_t block_size) {
    for (int64_t j = 0; j < block_size; j += 2 * W) {
        int64_t left = block_size - j;
        vf sums[ROWS][2] = {};
        for (int64_t d = 0; d < head_size; d++) {
            vf first = load(keys + d * block_size + j, left), second = left > W ? load(keys + d * block_size + j + W, left - W) : vf{};
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                sums[r][0] += queries[r * head_size + d] * first;
                sums[r][1] += queries[r * head_size + d] * second;
            }
        }
        for (int r = 0; r < ROWS; r++) {
            store(scores + r * block_size + j, sums[r][0], left);
            if (left > W) store(scores + r * block_size + j + W, sums[r][1], left - W);
        }
    }
}

// outputs [rows, head_size] += weights [rows, block_size] times values [from..to, head_size].
template <int ROWS, class T>
void add_values(const float* weights, const T* values, float* outputs, int64_t head_size, int64_t block_size, int64_t from, int64_t to) {
    constexpr int V = 4;
    for (int64_t d = 0; d < head_size; d += V * W) {
        int count = head_size - d >= V * W ? V : int((head_size - d + W - 1) / W);
        vf sums[ROWS][V];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < count; v++) sums[r][v] = load(outputs + r * head_size + d + v * W, head_size - d - v * W);
        if (count == V && head_size - d >= V * W) {
            for (int64_t j = from; j < to; j++) {
                vf row[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) row[v] = load(values + j * head_size + d + v * W);
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) sums[r][v] += weights[r * block_size + j] * row[v];
            }
        } else {
            for (int64_t j = from; j < to; j++)
                for (int v = 0; v < count; v++) {
                    vf row = load(values + j * head_size + d + v * W, head_size - d - v * W);
                    for (int r = 0; r < ROWS; r++) sums[r][v] += weights[r * block_size + j] * row;
                }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < count; v++) store(outputs + r * head_size + d + v * W, sums[r][v], head_size - d - v * W);
    }
}

// Turn a row's scores into weights: exp(score - largest so far) where visible, zero elsewhere. Rescales what was summed.
inline void soften_row(float* scores, float* output, float& top, float& total, int64_t head_size, int64_t block_size, int64_t from,
                       int64_t to, float soft_cap) {
    vf best = splat(-std::numeric_limits<float>::infinity());
    vi lanes;
    for (int i = 0; i < W; i++) lanes[i] = i;
    for (int64_t j = 0; j < block_size; j += W) {
        vf s = load(scores + j);
        if (soft_cap > 0) s = soft_cap * hyperbolic_tangent(s / soft_cap);
        vi place = lanes + (int32_t)j;
        s = (place >= (int32_t)from) & (place < (int32_t)to) ? s : splat(-std::numeric_limits<float>::infinity());
        store(scores + j, s);
        best = maximum(best, s);
    }
    float now = std::fmax(top, largest(best));
    vf kept = exponential(splat(top - now));
    vf added = {};
    for (int64_t j = 0; j < block_size; j += W) {
        vi place = lanes + (int32_t)j;
        vf weight = exponential(load(scores + j) - now);
        weight = (place >= (int32_t)from) & (place < (int32_t)to) ? weight : vf{};
        store(scores + j, weight);
        added += weight;
    }
    // The first visible block replaces nothing: what was summed is zero, and exp(-inf) is clamped above zero.
    total = total * kept[0] + sum(added);
    if (now != top)
        for (int64_t d = 0; d < head_size; d += W) store(output + d, load(output + d, head_size - d) * kept, head_size - d);
    top = now;
}

template <class T>
void load_queries(const Rows& queries, const Task& task, int64_t start, int64_t group, float scale, float* into) {
    int64_t size = queries.size;
    for (int64_t t = 0; t < task.tokens; t++) {
        const T* row = (const T*)queries.data + (start + task.token + t) * queries.outer_stride + task.head * group * size;
        for (int64_t d = 0; d < group * size; d += W)
            store(into + t * group * size + d, load(row + d, group * size - d) * scale, group * size - d);
    }
}

template <class T>
void run_task(const Task& task, const Rows& queries, const Cache& cache, const Batch& batch, const Attention& spec, T* y, Scratch& s) {
    int64_t group = queries.inner / cache.kv_heads, rows = task.tokens * group;
    int64_t head = cache.head_size, size = cache.block_size, start = batch.starts[task.sequence];
    int64_t position = batch.positions[start + task.token];
    load_queries<T>(queries, task, start, group, spec.scale, s.queries.data());
    std::fill_n(s.outputs.begin(), rows * head, 0.0f);
    std::fill_n(s.top.begin(), rows, -std::numeric_limits<float>::infinity());
    std::fill_n(s.total.begin(), rows, 0.0f);
    int64_t first = spec.window && position >= spec.window ? position - spec.window + 1 : 0, last = position + task.tokens - 1;
    for (int64_t block = first / size; block <= last / size; block++) {
        int64_t begin = block * size, to = std::min(size, last + 1 - begin), from = std::max<int64_t>(0, first - begin);
        // Rows whose query comes before this block, or whose window has left it, have no part in it.
        int64_t low = std::max<int64_t>(0, begin - position);
        int64_t high = spec.window ? std::min(task.tokens, begin + size - 1 + spec.window - position) : task.tokens;
        int64_t row = low * group, end = high * group;
        int64_t place = ((int64_t)batch.tables[task.sequence * batch.table_stride + block] * cache.kv_heads + task.head) * head * size;
        const T *keys = (const T*)cache.keys + place, *values = (const T*)cache.values + place;
        for (int64_t r = row; r < end; r += SCORE_ROWS)
            by_count<SCORE_ROWS>(end - r, [&](auto count) {
                score_rows<count>(&s.queries[r * head], keys, &s.scores[r * size], head, size);
            });
        for (int64_t r = row; r < end; r++) {
            int64_t own = position + r / group;
            int64_t visible = spec.window ? std::max<int64_t>(0, own - spec.window + 1 - begin) : 0;
            soften_row(&s.scores[r * size], &s.outputs[r * head], s.top[r], s.total[r], head, size, visible,
                       std::min(size, own + 1 - begin), spec.soft_cap);
        }
        for (int64_t r = row; r < end; r += OUTPUT_ROWS)
            by_count<OUTPUT_ROWS>(end - r, [&](auto count) {
                add_values<count>(&s.scores[r * size], values, &s.outputs[r * head], head, size, from, to);
            });
    }
    for (int64_t r = 0; r < rows; r++) {
        T* into = y + (start + task.token + r / group) * queries.inner * head + (task.head * group + r % group) * head;
        vf total = splat(1.0f / s.total[r]);
        for (int64_t d = 0; d < head; d += W) store(into + d, load(&s.outputs[r * head + d], head - d) * total, head - d);
    }
}

template <class T>
void attention(Rows queries, Cache cache, Batch batch, Attention spec, T* y) {
    int64_t group = queries.inner / cache.kv_heads, tile = std::max<int64_t>(1, TILE_ROWS / group);
    std::vector<Task> tasks;
    for (int64_t s = 0; s < batch.sequences; s++)
        for (int64_t h = 0; h < cache.kv_heads; h++)
            for (int64_t t = 0, n = batch.starts[s + 1] - batch.starts[s]; t < n; t += tile)
                tasks.push_back({s, h, t, std::min(tile, n - t)});
#pragma omp parallel
    {
        int64_t rows = tile * group;
        Scratch scratch;
        scratch.queries.resize(rows * cache.head_size + W);
        scratch.outputs.resize(rows * cache.head_size + W);
        scratch.scores.resize(rows * cache.block_size + W);
        scratch.top.resize(rows);
        scratch.total.resize(rows);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)tasks.size(); i++) run_task<T>(tasks[i], queries, cache, batch, spec, y, scratch);
    }
}

}  // namespace
