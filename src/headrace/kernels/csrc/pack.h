// Weights into panels of 32 outputs (table.h has the layout).
#pragma once

#include "pool.h"
#include "table.h"

namespace {

using namespace headrace;

constexpr int PANEL = 32;

// A weight [out, in] of the given type (8-bit integers signed) into panels. A gated one holds out gates, then out values.
template <class E>
void pack_type(const E* from, const Weight& weight, E* into) {
    constexpr int64_t GROUP = 4 / sizeof(E);
    bool gated = weight.gate != Gate::none;
    int64_t width = gated ? PANEL / 2 : PANEL, lanes = (weight.in + GROUP - 1) / GROUP;
    Pool::get().run((weight.out + width - 1) / width, [&](int64_t panel, int) {
        for (int64_t j = 0; j < PANEL; j++) {
            int64_t column = panel * width + j % width;
            const E* row = column < weight.out ? from + (column + j / width * weight.out) * weight.in : nullptr;
            for (int64_t k = 0; k < lanes * GROUP; k++) {
                E value = row && k < weight.in ? row[k] : E{};
                if constexpr (sizeof(E) == 1) value ^= 0x80;
                into[((panel * lanes + k / GROUP) * PANEL + j) * GROUP + k % GROUP] = value;
            }
        }
    });
}

// 4-bit numbers, one a byte, two by two: a byte of a lane has an input of one step below, of the next step above.
void pack_int4(const uint8_t* from, const Weight& weight, uint8_t* into) {
    bool gated = weight.gate != Gate::none;
    int64_t width = gated ? PANEL / 2 : PANEL, lanes = (weight.in + 7) / 8;
    Pool::get().run((weight.out + width - 1) / width, [&](int64_t panel, int) {
        for (int64_t j = 0; j < PANEL; j++) {
            int64_t column = panel * width + j % width;
            const uint8_t* row = column < weight.out ? from + (column + j / width * weight.out) * weight.in : nullptr;
            auto at = [&](int64_t k) { return row && k < weight.in ? row[k] : 0; };
            for (int64_t k = 0; k < lanes * 4; k++)
                into[((panel * lanes + k / 4) * PANEL + j) * 4 + k % 4] = at(k / 4 * 8 + k % 4) | at(k / 4 * 8 + 4 + k % 4) << 4;
        }
    });
}

void pack(const void* from, const Weight& weight, void* into) {
    if (weight.type == Type::float32)
        pack_type((const uint32_t*)from, weight, (uint32_t*)into);
    else if (weight.type == Type::bfloat16)
        pack_type((const uint16_t*)from, weight, (uint16_t*)into);
    else if (weight.type == Type::int8)
        pack_type((const uint8_t*)from, weight, (uint8_t*)into);
    else
        pack_int4((const uint8_t*)from, weight, (uint8_t*)into);
}

}  // namespace
