// How much attention tokens get: the softmax of some queries over the exact tokens that they see, added up token by token.
//
// A task is one kv head of a sequence. Its queries are taken a tile at a time, in ascending order, each adding what its
// heads give in one number: sums have the same bits in whatever chunks the queries come.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_tile.h"

namespace {

using namespace headrace;

constexpr int64_t OBSERVED_SCORES = 1 << 20;  // of a tile: with fewer queries, keys would be read more often than scores

template <class T>
struct Observer {
    using Lanes = typename LanesOf<T>::type;

    const Rows& queries;
    const Cache& cache;
    const Batch& batch;
    const Attention& spec;
    const Observed& observed;
    int64_t sequence, head;
    std::vector<T>& rows;
    std::vector<float>& scores;

    int64_t size = cache.block_size, group = queries.inner / cache.kv_heads;
    int64_t start = batch.positions[batch.starts[sequence]], end = start + batch.starts[sequence + 1] - batch.starts[sequence];
    int64_t begin = batch.begins ? batch.begins[sequence] : 0;

    int64_t block(int64_t index) const { return batch.tables[sequence * batch.table_stride + index] * cache.stride; }
    float* mass(int64_t index) const { return (float*)(observed.mass + block(index)) + head * size; }

    void clear(int64_t from) {
        for (int64_t slot = from; slot < end; slot++) mass(slot / size)[slot % size] = 0.0f;
    }

    void run() {
        int64_t first = observed.firsts[sequence];
        if (first < 0 || first >= end) return;
        // Tokens start from nothing when the first query that counts comes, and those that come later when they come.
        clear(first >= start ? begin : start);
        int64_t most = OBSERVED_SCORES / (group * (end - begin)), tile = std::max<int64_t>(1, std::min(most, TILE_ROWS / group));
        for (int64_t at = std::max(first, start); at < end; at += tile) add(at, std::min(at + tile, end));
    }

    // The queries at positions from..to.
    void add(int64_t from, int64_t to) {
        int64_t count = (to - from) * group, low = begin / size, high = (to - 1) / size + 1, width = (high - low) * size;
        int64_t lanes = cache.head_size / Lanes::GROUP;
        rows.resize(count * cache.head_size);
        scores.resize(count * width);
        for (int64_t i = 0; i < to - from; i++) {
            const T* row = (const T*)queries.data + (batch.starts[sequence] + from - start + i) * queries.outer_stride;
            std::memcpy(&rows[i * group * cache.head_size], row + head * group * cache.head_size, group * cache.head_size * sizeof(T));
        }
        for (int64_t index = low; index < high; index++) score(index, count, lanes, &scores[(index - low) * size], width, std::min(index + 1, high - 1));
        for (int64_t r = 0; r < count; r++) soften(&scores[r * width], width, {0, from + r / group + 1 - begin});
        for (int64_t i = 0; i < to - from; i++)
            for (int64_t index = low; index < high; index++)
                add_query(mass(index), &scores[i * group * width + (index - low) * size], width, (float)(from + i + 1 - begin));
    }

    // Scores of all rows with one block, while the next one is fetched.
    void score(int64_t index, int64_t count, int64_t lanes, float* into, int64_t width, int64_t next) {
        auto keys = [&](int64_t each) { return (const uint32_t*)(cache.keys + block(each)) + head * lanes * size; };
        const uint32_t* own = (const uint32_t*)rows.data();
        for (int64_t r = 0; r < count; r += SCORE_ROWS)
            by_count<SCORE_ROWS>(count - r, [&](auto some) {
                score_rows<Lanes, some>(own + r * lanes, keys(index), keys(next), into + r * width, width, lanes, size);
            });
        if (!cache.bias) return;
        const float* bias = (const float*)(cache.bias + block(index)) + head * size;
        for (int64_t j = 0; j < size; j += W)
            for (int64_t r = 0; r < count; r++) store(into + r * width + j, load(into + r * width + j) + load(bias + j) / spec.scale);
    }

    // From a row's scores to its weights.
    void soften(float* row, int64_t width, Visible visible) const {
        vf best = splat(-INFINITE), total = {};
        for (int64_t j = 0; j < width; j += W) {
            vf s = load(row + j);
            if (spec.soft_cap > 0) s = spec.soft_cap / spec.scale * hyperbolic_tangent(s * (spec.scale / spec.soft_cap));
            s = visible.hide(s, j, -INFINITE);
            store(row + j, s);
            best = maximum(best, s);
        }
        float factor = spec.scale * 1.44269504088896341f;
        vf shift = splat(-largest(best) * factor);
        for (int64_t j = 0; j < width; j += W) {
            vf weight = visible.hide(power_of_two(multiply_add(load(row + j), splat(factor), shift)), j, 0.0f);
            store(row + j, weight);
            total += weight;
        }
        vf share = splat(1.0f / sum(total));
        for (int64_t j = 0; j < width; j += W) store(row + j, load(row + j) * share);
    }

    // One query's weights, those of its heads one row after the other, of one block; it sees so many tokens.
    void add_query(float* into, const float* weights, int64_t width, float seen) const {
        for (int64_t j = 0; j < size; j += W) {
            vf given = {};
            for (int64_t h = 0; h < group; h++) {
                vf weight = load(weights + h * width + j);
                given += observed.share > 0 ? (weight * seen < 1.0f ? splat(0.0f) : splat(1.0f)) + weight * observed.share : weight;
            }
            store(into + j, load(into + j) + given);
        }
    }
};

template <class T>
void observe(const Rows& queries, const Cache& cache, const Batch& batch, const Attention& spec, const Observed& observed) {
    Pool::get().run(batch.sequences * cache.kv_heads, [&](int64_t task, int) {
        static thread_local std::vector<T> rows;
        static thread_local std::vector<float> scores;
        Observer<T>{queries, cache, batch, spec, observed, task / cache.kv_heads, task % cache.kv_heads, rows, scores}.run();
    });
}

}  // namespace
