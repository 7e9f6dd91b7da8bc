// What happens to queries, keys and values between their product and attention: norms, rotary embedding, cache writes.
// Float32 arithmetic, any order of rows.
#pragma once

#include "lanes.h"
#include "norm.h"
#include "table.h"

namespace {

using namespace headrace;

template <class T>
void rotate(T* head, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i += W) {
        int64_t n = half - i;
        vf a = load(head + i, n), b = load(head + half + i, n), c = load(cos + i, n), s = load(sin + i, n);
        store(head + i, multiply_add(a, c, -(b * s)), n);
        store(head + half + i, multiply_add(b, c, a * s), n);
    }
}

// Write one token's key and value of one kv head into its slot. A lane's later token, not written yet, must not be read as
// what another sequence left there: `alone` says that this call does not write it, and then it becomes zero.
template <class T>
void write_slot(const T* key, const T* value, const Cache& cache, int64_t slot, int64_t kv_head, bool alone) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP;
    int64_t size = cache.head_size, length = cache.block_size, offset = slot % length;
    int64_t start = slot / length * cache.stride + kv_head * size * length * (int64_t)sizeof(T);
    uint32_t* lanes = (uint32_t*)(cache.keys + start);
    for (int64_t i = 0; i < size / PAIR; i++) std::memcpy(lanes + i * length + offset, key + i * PAIR, sizeof *lanes);
    T* into = (T*)(cache.values + start) + offset / PAIR * size * PAIR + offset % PAIR;
    for (int64_t i = 0; i < size; i++) into[i * PAIR] = value[i];
    if (PAIR == 2 && offset % 2 == 0 && alone)
        for (int64_t i = 0; i < size; i++) into[i * PAIR + 1] = T{};
}

// A key's lanes lie a block apart, each in a cache line of its own: ask for all of them before they are written.
template <class T>
void prefetch_slot(const Cache& cache, int64_t slot, int64_t kv_head) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP;
    int64_t length = cache.block_size;
    int64_t start = slot / length * cache.stride + kv_head * cache.head_size * length * (int64_t)sizeof(T);
    const uint32_t* lanes = (const uint32_t*)(cache.keys + start) + slot % length;
    for (int64_t i = 0; i < cache.head_size / PAIR; i++) __builtin_prefetch(lanes + i * length, 1);
    __builtin_prefetch((const T*)(cache.values + start) + slot % length / PAIR * PAIR * cache.head_size, 1);
}

// Norm and rotate queries and keys in place, and write keys and values into the cache.
template <class T>
void place_heads(const Heads& h, const Cache& cache, const int64_t* slots) {
    int64_t size = cache.head_size, all = h.heads + 2 * cache.kv_heads;
    for_rows(h.tokens, all * size, [&](int64_t token) {
        for (int64_t i = 0; i < cache.kv_heads; i++) prefetch_slot<T>(cache, slots[token], i);
        T* heads = (T*)h.data + token * all * size;
        const float *cos = h.cos + token * (size / 2), *sin = h.sin + token * (size / 2);
        for (int64_t i = 0; i < h.heads + cache.kv_heads; i++) {
            const float* weight = i < h.heads ? h.query_norm : h.key_norm;
            if (weight) norm_row(heads + i * size, weight, h.eps, heads + i * size, size);
            rotate(heads + i * size, cos, sin, size / 2);
        }
        bool alone = token + 1 == h.tokens || slots[token + 1] != slots[token] + 1;
        T *keys = heads + h.heads * size, *values = keys + cache.kv_heads * size;
        for (int64_t i = 0; i < cache.kv_heads; i++) write_slot(keys + i * size, values + i * size, cache, slots[token], i, alone);
    });
}

}  // namespace
