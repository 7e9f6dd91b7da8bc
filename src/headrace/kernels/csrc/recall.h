// What a query chooses of a prompt whose keys are a product of small matrices (shadows.py says how they lie): chunks of tokens
// by their landmarks, each kv head its own; their keys are made again, their values fetched, into exact slots for attention.
// Chunks lie there in the order of the text, so what is summed does not depend on what was chosen before. Work does: a chunk
// that is there already is moved.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "heads.h"
#include "pool.h"
#include "unpack.h"

namespace {

using namespace headrace;

constexpr int64_t CHUNK = 8;
// Chunks that a task scores, and that it restores.
constexpr int64_t SCORED = 128, RESTORED = 8;
// The largest bfloat16: a landmark that begins with no less is of a chunk that is not to be chosen.
constexpr float MARK = 3.3895313892515355e38f;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline int64_t count_parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A layer's shadow as rows of head_size numbers.
template <class T>
struct ShadowRows {
    const Cache& cache;
    const Shadow& shadow;
    int64_t heads = cache.kv_heads, size = cache.head_size, in_block = 2 * heads * cache.block_size;
    int64_t in_row = size * (int64_t)sizeof(T) / 4, in_chunk = count_parts(CHUNK * shadow.rank, size);
    int64_t landmarks = count_parts(heads * shadow.count, in_row), directions = landmarks + shadow.chunks * heads;
    int64_t coordinates = directions + heads * shadow.rank, values = coordinates + shadow.chunks * in_chunk;

    T* row(int64_t i) const { return (T*)(cache.keys + shadow.blocks[i / in_block] * cache.stride) + i % in_block * size; }

    // One more than the chunk in each place of each head; 0 where nothing is yet.
    int32_t read_place(int64_t i) const {
        int32_t chunk;
        std::memcpy(&chunk, (char*)row(i / in_row) + i % in_row * 4, 4);
        return chunk;
    }
    void write_place(int64_t i, int32_t chunk) const { std::memcpy((char*)row(i / in_row) + i % in_row * 4, &chunk, 4); }

    const T* value(int64_t head, int64_t chunk, int64_t token) const {
        if (!shadow.values) return row(values + (chunk * heads + head) * CHUNK + token);
        return (const T*)shadow.values + ((head * shadow.chunks + chunk) * CHUNK + token) * size;
    }

    // Where a place's keys, block_size from lane to lane, and its values are.
    uint32_t* key_lanes(int64_t head, int64_t place) const {
        int64_t slot = place * CHUNK, block = shadow.into[slot / cache.block_size] * cache.stride;
        return (uint32_t*)(cache.keys + block + head * size * cache.block_size * (int64_t)sizeof(T)) + slot % cache.block_size;
    }
    T* value_lanes(int64_t head, int64_t place) const {
        int64_t slot = place * CHUNK, block = shadow.into[slot / cache.block_size] * cache.stride;
        return (T*)(cache.values + block) + (head * cache.block_size + slot % cache.block_size) * size;
    }
};

// A row as floats.
template <class T>
void spread_row(const T* row, int64_t size, float* into) {
    for (int64_t i = 0; i < size; i += W) store(into + i, load(row + i, size - i), size - i);
}

// Scores [query heads, stride] that queries [query heads, wide], padded with zeros, give to chunks from `first` to `last`.
template <class T>
void score_chunks(const ShadowRows<T>& rows, const float* queries, int64_t wide, int64_t group, int64_t first, int64_t last,
                  float* scores, int64_t stride) {
    std::vector<float> landmark(wide);
    for (int64_t chunk = first; chunk < last; chunk++)
        for (int64_t head = 0; head < rows.heads; head++) {
            spread_row(rows.row(rows.landmarks + chunk * rows.heads + head), rows.size, landmark.data());
            for (int64_t query = head * group; query < (head + 1) * group; query++) {
                vf sums = {};
                for (int64_t i = 0; i < wide; i += W) sums = multiply_add(load(&landmark[i]), load(queries + query * wide + i), sums);
                scores[query * stride + chunk] = landmark[0] >= MARK ? NEVER : sum(sums) * rows.shadow.scale;
            }
        }
}

// The chunks that any query of a kv head gives the most weight, ascending; of equal ones the first. Scores [group, stride] end
// with -inf, and become logarithms of weights.
inline std::vector<int32_t> choose_chunks(float* scores, int64_t group, int64_t stride, int64_t chunks, int64_t count) {
    for (int64_t query = 0; query < group; query++) {
        float* own = scores + query * stride;
        vf top = splat(NEVER), total = {};
        for (int64_t i = 0; i < stride; i += W) top = maximum(top, load(own + i));
        vf most = splat(largest(top));
        for (int64_t i = 0; i < stride; i += W) total += exponential(load(own + i) - most);
        vf all = most + std::log(sum(total));
        for (int64_t i = 0; i < stride; i += W) {
            vf weights = load(own + i) - all;
            store(scores + i, query == 0 ? weights : maximum(load(scores + i), weights));
        }
    }
    // A number's bits, turned so that whole numbers descend as it ascends, before the chunk's place: all are different.
    std::vector<uint64_t> order(chunks);
    for (int64_t i = 0; i < chunks; i++) {
        uint32_t bits;
        std::memcpy(&bits, scores + i, sizeof bits);
        order[i] = (uint64_t)(bits >> 31 ? bits : ~bits & 0x7fffffffu) << 32 | (uint64_t)i;
    }
    if (count < chunks) std::nth_element(order.begin(), order.begin() + count, order.end());
    std::vector<int32_t> chosen(order.begin(), order.begin() + count);
    std::sort(chosen.begin(), chosen.end());
    return chosen;
}

template <class T>
void move_chunk(const ShadowRows<T>& rows, int64_t head, int64_t from, int64_t to) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP;
    const uint32_t* old = rows.key_lanes(head, from);
    uint32_t* keys = rows.key_lanes(head, to);
    for (int64_t i = 0; i < rows.size / PAIR * rows.cache.block_size; i += rows.cache.block_size) std::memcpy(keys + i, old + i, CHUNK * 4);
    std::memcpy(rows.value_lanes(head, to), rows.value_lanes(head, from), CHUNK * rows.size * sizeof(T));
}

// Move what is there already of a head's chosen chunks, and say of all which are where. Returns the places of the others.
template <class T>
std::vector<int32_t> keep_chunks(const ShadowRows<T>& rows, int64_t head, const std::vector<int32_t>& chosen) {
    int64_t count = rows.shadow.count, first = head * count;
    std::vector<int32_t> from(count, -1), missing;
    for (int64_t place = 0, old = 0; place < count; place++) {
        while (old < count && rows.read_place(first + old) <= chosen[place]) old++;
        if (old < count && rows.read_place(first + old) == chosen[place] + 1) from[place] = (int32_t)old;
        else missing.push_back((int32_t)place);
    }
    // Both orders are the text's, so those that move down make room for each other in this order, the others in the other.
    for (int64_t place = 0; place < count; place++)
        if (from[place] > place) move_chunk(rows, head, from[place], place);
    for (int64_t place = count - 1; place >= 0; place--)
        if (from[place] >= 0 && from[place] < place) move_chunk(rows, head, from[place], place);
    for (int64_t place = 0; place < count; place++) rows.write_place(first + place, chosen[place] + 1);
    return missing;
}

// y [CHUNK, wide] = x [CHUNK, rank] times directions [rank, wide]; wide is a multiple of two vectors.
inline void multiply_chunk(const float* x, int64_t rank, const float* directions, int64_t wide, float* y) {
    constexpr int TILE = 4;
    for (int64_t column = 0; column < wide; column += 2 * W)
        for (int64_t token = 0; token < CHUNK; token += TILE) {
            vf sums[TILE][2] = {};
            for (int64_t k = 0; k < rank; k++) {
                vf left = load(directions + k * wide + column), right = load(directions + k * wide + column + W);
                for (int i = 0; i < TILE; i++) {
                    vf coordinate = splat(x[(token + i) * rank + k]);
                    sums[i][0] = multiply_add(coordinate, left, sums[i][0]);
                    sums[i][1] = multiply_add(coordinate, right, sums[i][1]);
                }
            }
            for (int i = 0; i < TILE; i++) {
                store(y + (token + i) * wide + column, sums[i][0]);
                store(y + (token + i) * wide + column + W, sums[i][1]);
            }
        }
}

// Room for one chunk: coordinates, keys and values as floats, and keys as they are written.
template <class T>
struct ChunkRoom {
    std::vector<float> x, y, values;
    std::vector<T> keys;

    ChunkRoom(const ShadowRows<T>& rows, int64_t wide) : x(rows.in_chunk * rows.size), y(CHUNK * wide), values(2 * rows.size), keys(CHUNK * rows.size) {}
};

// Make a head's chunk again from coordinates and directions [rank, wide], in its place.
template <class T>
void restore_chunk(const ShadowRows<T>& rows, int64_t head, int64_t chunk, int64_t place, const float* directions, int64_t wide,
                   ChunkRoom<T>& room) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP;
    int64_t size = rows.size, length = rows.cache.block_size;
    for (int64_t i = 0; i < rows.in_chunk; i++) spread_row(rows.row(rows.coordinates + chunk * rows.in_chunk + i), size, &room.x[i * size]);
    multiply_chunk(room.x.data(), rows.shadow.rank, directions, wide, room.y.data());
    for (int64_t token = 0; token < CHUNK; token++) {
        int64_t position = (chunk * CHUNK + token) * (size / 2);
        float* key = &room.y[token * wide];
        rotate(key, rows.shadow.cos + position, rows.shadow.sin + position, size / 2);
        for (int64_t i = 0; i < size; i += W) store(&room.keys[token * size + i], load(key + i), size - i);
    }
    uint32_t* keys = rows.key_lanes(head, place);
    for (int64_t i = 0; i < size / PAIR; i++) {
        uint32_t lanes[CHUNK];
        for (int64_t token = 0; token < CHUNK; token++) std::memcpy(lanes + token, &room.keys[token * size + i * PAIR], 4);
        std::memcpy(keys + i * length, lanes, sizeof lanes);
    }
    T* values = rows.value_lanes(head, place);
    for (int64_t token = 0; token < CHUNK; token += PAIR) {
        for (int64_t p = 0; p < PAIR; p++) spread_row(rows.value(head, chunk, token + p), size, &room.values[p * size]);
        store_lanes(values + token * size, room.values.data(), size, size);
    }
}

// queries [query heads, head_size] of one token.
template <class T>
void recall(const Rows& queries, const Cache& cache, const Shadow& shadow) {
    ShadowRows<T> rows{cache, shadow};
    int64_t size = rows.size, wide = count_parts(size, 2 * W) * 2 * W, group = queries.inner / rows.heads;
    std::vector<float> wanted(queries.inner * wide), directions(rows.heads * shadow.rank * wide);
    for (int64_t query = 0; query < queries.inner; query++) spread_row((const T*)queries.data + query * size, size, &wanted[query * wide]);
    int64_t stride = count_parts(shadow.chunks, W) * W, parts = count_parts(shadow.chunks, SCORED);
    std::vector<float> scores(queries.inner * stride, NEVER);
    Pool::get().run(parts + rows.heads, [&](int64_t part, int) {
        int64_t first = part * SCORED;
        if (part < parts)
            return score_chunks(rows, wanted.data(), wide, group, first, std::min(shadow.chunks, first + SCORED), scores.data(), stride);
        for (int64_t i = (part - parts) * shadow.rank; i < (part - parts + 1) * shadow.rank; i++)
            spread_row(rows.row(rows.directions + i), size, &directions[i * wide]);
    });
    std::vector<std::vector<int32_t>> chosen(rows.heads), missing(rows.heads);
    Pool::get().run(rows.heads, [&](int64_t head, int) {
        chosen[head] = choose_chunks(&scores[head * group * stride], group, stride, shadow.chunks, shadow.count);
        missing[head] = keep_chunks(rows, head, chosen[head]);
    });
    std::vector<std::pair<int32_t, int32_t>> left;
    for (int64_t head = 0; head < rows.heads; head++)
        for (int32_t place : missing[head]) left.push_back({(int32_t)head, place});
    Pool::get().run(count_parts((int64_t)left.size(), RESTORED), [&](int64_t part, int) {
        ChunkRoom<T> room(rows, wide);
        for (int64_t i = part * RESTORED; i < std::min((int64_t)left.size(), (part + 1) * RESTORED); i++) {
            auto [head, place] = left[i];
            restore_chunk(rows, head, chosen[head][place], place, &directions[head * shadow.rank * wide], wide, room);
        }
    });
}

}  // namespace
