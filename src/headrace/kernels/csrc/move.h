// Tokens of a sequence that stay, moved together: exact keys and values, each kv head its own tokens.
#pragma once

#include <vector>

#include "lanes.h"
#include "pool.h"

namespace {

using namespace headrace;

template <class T>
void move_tokens(const Cache& cache, const Moved& moved) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP;
    int64_t size = cache.block_size, head = cache.head_size, lanes = head / PAIR;
    Pool::get().run(cache.kv_heads, [&](int64_t h, int) {
        // All are read before any is written: one may lie where another goes.
        std::vector<uint32_t> keys(moved.count * lanes);
        std::vector<T> values(moved.count * head);
        auto key = [&](int64_t slot) { return (uint32_t*)(cache.keys + moved.blocks[slot / size] * cache.stride) + h * lanes * size + slot % size; };
        auto value = [&](int64_t slot) {
            int64_t place = slot % size;
            return (T*)(cache.values + moved.blocks[slot / size] * cache.stride) + (h * size + place / PAIR * PAIR) * head + place % PAIR;
        };
        const int64_t* slots = moved.slots + h * moved.count;
        for (int64_t i = 0; i < moved.count; i++) {
            const uint32_t* from = key(slots[i]);
            for (int64_t lane = 0; lane < lanes; lane++) keys[i * lanes + lane] = from[lane * size];
            const T* own = value(slots[i]);
            for (int64_t d = 0; d < head; d++) values[i * head + d] = own[d * PAIR];
        }
        for (int64_t i = 0; i < moved.count; i++) {
            uint32_t* into = key(moved.into + i);
            for (int64_t lane = 0; lane < lanes; lane++) into[lane * size] = keys[i * lanes + lane];
            T* own = value(moved.into + i);
            for (int64_t d = 0; d < head; d++) own[d * PAIR] = values[i * head + d];
        }
    });
}

}  // namespace
