// Sealed blocks that attention cannot read as they are (vectors.py says how they lie): made exact again, as a cache has them.
#pragma once

#include <vector>

#include "lanes.h"
#include "pool.h"
#include "sealed.h"

namespace {

using namespace headrace;

// count codes of a row, neighbours in different bytes, or numbers, as floats.
template <int BITS>
void spread_codes(const char* row, int64_t count, float* x) {
    int64_t length = count * BITS / 8;
    for (int64_t i = 0; i < length; i += W) {
        vi bytes = widen((const uint8_t*)row + i, length - i);
        for (int part = 0; part < 8 / BITS; part++)
            store(x + part * length + i, __builtin_convertvector(bytes >> (part * BITS) & ((1 << BITS) - 1), vf), length - i);
    }
}

inline void spread(const char* row, int64_t bits, int64_t count, float* x) {
    if (bits == 32) std::memcpy(x, row, count * sizeof(float));
    else if (bits == 16)
        for (int64_t i = 0; i < count; i += W) store(x + i, load((const half*)row + i, count - i), count - i);
    else if (bits == 8) spread_codes<8>(row, count, x);
    else if (bits == 4) spread_codes<4>(row, count, x);
    else spread_codes<2>(row, count, x);
}

// What codes are multiplied by, and what is added to them before. From the start of a block's scales.
struct Scales {
    const char* data;
    int64_t count, bits;
    bool exponents;

    // Of W neighbours, and of one.
    vf steps(int64_t i, int64_t n = W) const {
        if (!exponents) return load((const half*)data + i, n);
        vi exponent = widen((const uint8_t*)data + i, n) << 24 >> 24;
        return (vf)((exponent - (int32_t)bits + 2 + 127) << 23);
    }
    vf step(int64_t i) const { return splat(steps(i, 1)[0]); }

    // What is added to codes before, likewise: those with exponents have no middle of their own.
    vf starts(int64_t i, int64_t n = W) const {
        if (exponents) return splat(-(float)(1 << (bits - 1)));
        return load_starts((const uint8_t*)data + 2 * count + i, bits, n);
    }
    vf start(int64_t i) const { return splat(starts(i, 1)[0]); }
};

// A row of a block, floats [columns]. factors: one a token; null: none.
inline void read_row(const Vectors& form, const char* block, int64_t row, const float* factors, float* x) {
    int64_t columns = form.columns(), codes = form.rows() * columns * form.bits / 8;
    spread(block + row * columns * form.bits / 8, form.bits, columns, x);
    if (form.bits <= 8) {
        Scales scales{block + codes, form.tokens * form.width / form.group, form.bits, form.exponents};
        if (form.by_channel) {
            int64_t first = row / form.group * columns;
            for (int64_t i = 0; i < columns; i += W) store(x + i, (load(x + i) + scales.starts(first + i)) * scales.steps(first + i));
        } else {
            int64_t first = row * (columns / form.group);
            for (int64_t from = 0; from < columns; from += form.group, first++) {
                vf step = scales.step(first), start = scales.start(first);
                for (int64_t i = from; i < from + form.group; i += W) store(x + i, (load(x + i) + start) * step);
            }
        }
    }
    if (!factors) return;
    for (int64_t i = 0; i < columns; i += W) {
        vf factor = form.by_channel ? load(factors + i, columns - i) : splat(factors[row]);
        store(x + i, load(x + i, columns - i) * factor, columns - i);
    }
}

// Rows that share their lanes, as they lie in a cache: one of floats, or two of bfloat16.
inline void store_lanes(float* into, const float* x, int64_t, int64_t count) { std::memcpy(into, x, count * sizeof(float)); }

inline void store_lanes(bf16* into, const float* x, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        vu lanes = round_bits(load(x + i, count - i)) >> 16 | (round_bits(load(x + stride + i, count - i)) & 0xffff0000u);
        std::memcpy(into + 2 * i, &lanes, std::min<int64_t>(W, count - i) * sizeof(uint32_t));
    }
}

// Blocks as exact keys (by_channel) or values of heads of so many elements, one after the other.
template <class T>
void unpack(const Vectors& form, const Unpacked& wanted, int64_t head, T* into) {
    constexpr int64_t PAIR = LanesOf<T>::type::GROUP;
    int64_t columns = form.columns();
    Pool::get().run(wanted.count, [&](int64_t i, int) {
        const char* block = form.data + wanted.blocks[i] * form.stride;
        const float* factors = wanted.factors ? wanted.factors + i * form.tokens : nullptr;
        T* at = into + i * form.tokens * form.width;
        std::vector<float> x(PAIR * columns);
        for (int64_t row = 0; row < form.rows(); row += PAIR) {
            for (int64_t p = 0; p < PAIR; p++) read_row(form, block, wanted.order ? wanted.order[row + p] : row + p, factors, &x[p * columns]);
            if (form.by_channel)
                store_lanes(at + row * columns, x.data(), columns, columns);
            else
                for (int64_t h = 0; h < form.width / head; h++) store_lanes(at + (h * form.tokens + row) * head, &x[h * head], columns, head);
        }
    });
}

}  // namespace
