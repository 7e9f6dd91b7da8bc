// What the processor can do at most: multiply-adds with operands that are always near, and plain sweeps over memory.
#pragma once

#include <algorithm>

#include "lanes.h"
#include "pool.h"

namespace {

using namespace headrace;

constexpr int64_t PIECE = 1 << 20;

// Every thread does `rounds` times a tile's worth of steps: sums stay in registers, what is multiplied in the nearest cache.
// Multiply-adds in all.
template <class Lanes>
int64_t multiply_registers(int64_t rounds) {
    constexpr int ROWS = Lanes::ROWS, SPAN = Lanes::SPAN;
    int threads = Pool::get().threads();
    Pool::get().run(threads, [&](int64_t, int) {
        // The compiler must not know what is multiplied, nor that any two rows or sums are alike.
        typename Lanes::Sum sums[ROWS][SPAN] = {};
        vu lanes[SPAN] = {};
        uint32_t rows[ROWS] = {};
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < SPAN; v++) asm volatile("" : "+v"(sums[r][v]));
        for (int64_t i = 0; i < rounds; i++) {
            asm volatile("" : "+m"(rows), "+m"(lanes));
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                for (int v = 0; v < SPAN; v++) sums[r][v] = Lanes::step(sums[r][v], rows[r], lanes[v]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < SPAN; v++) asm volatile("" : : "v"(sums[r][v]));
    });
    return rounds * threads * ROWS * SPAN * W * Lanes::GROUP;
}

int64_t multiply_registers_of(Type type, int64_t rounds) {
    if (type == Type::float32) return multiply_registers<FloatLanes>(rounds);
    if (type == Type::bfloat16) return multiply_registers<Bf16Lanes>(rounds);
    return multiply_registers<Int8Lanes>(rounds);
}

// Read, write, or copy (from the first half to the second) `bytes` bytes, a multiple of 2 MiB, all threads together.
void sweep(Sweep kind, char* data, int64_t bytes) {
    int64_t size = kind == Sweep::copy ? bytes / 2 : bytes;
    Pool::get().run(size / PIECE, [&](int64_t piece, int) {
        char* from = data + piece * PIECE;
        if (kind == Sweep::copy) {
            std::memcpy(from + size, from, PIECE);
        } else if (kind == Sweep::write) {
            std::memset(from, (int)piece, PIECE);
        } else {
            vu sums[8] = {};
            for (int64_t i = 0; i < PIECE; i += 8 * sizeof(vu))
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++) sums[j] += load((const uint32_t*)(from + i) + j * W);
            for (int j = 0; j < 8; j++) asm volatile("" : : "v"(sums[j]));
        }
    });
}

}  // namespace
