// Matrix products with packed weights, in float32, bfloat16 and 8-bit integers, and what follows them in the same pass:
// scales, bias, a gated activation. Every output element is one running sum over the input features in ascending order,
// whatever tile it falls into: a row's result has the same bits for any number of rows and threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "pool.h"
#include "table.h"

namespace {

using namespace headrace;

constexpr int PANEL = 32;
constexpr int VECTORS = PANEL / W;
constexpr int TILES_PER_TASK = 8;

// sums [ROWS, SPAN] += rows of x times a slice of SPAN vectors of a panel, over the lanes from..to. Meanwhile a cache line
// of what comes `ahead` is fetched with each lane: few enough that arithmetic hides them, unlike all at once.
template <class Lanes, int ROWS, int SPAN>
inline void accumulate(const uint32_t* x, int64_t stride, const uint32_t* panel, const uint32_t* ahead, int64_t from, int64_t to,
                       typename Lanes::Sum (&sums)[ROWS][SPAN]) {
    // Three rows share a pointer: [p], [p + stride], [p + 2 stride] are addresses of one instruction, and the processor
    // has not registers enough for a pointer each.
    const uint32_t* rows[(ROWS + 2) / 3];
    for (int i = 0; i < (ROWS + 2) / 3; i++) rows[i] = x + 3 * i * stride + from;
    panel += from * PANEL;
    ahead += from * 16;
    for (int64_t k = from; k < to; k++) {
        __builtin_prefetch(ahead, 0, 2);
        vu w[SPAN];
#pragma GCC unroll 8
        for (int v = 0; v < SPAN; v++) w[v] = load(panel + v * W);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
            for (int v = 0; v < SPAN; v++) sums[r][v] = Lanes::step(sums[r][v], rows[r / 3][r % 3 * stride], w[v]);
#pragma GCC unroll 4
        for (int i = 0; i < (ROWS + 2) / 3; i++) rows[i]++;
        panel += PANEL;
        ahead += 16;
    }
}

// Rows of activations as lanes. For integers also what turns sums into numbers: a scale for each row and group of lanes,
// and 128 times the sum of the group's values, for weights are stored with 128 added.
struct Operand {
    const uint32_t* lanes;
    int64_t stride, group, groups;
    const float* scales;
    const int32_t* offsets;

    Operand at(int64_t row) const { return {lanes + row * stride, stride, group, groups, scales + row * groups, offsets + row * groups}; }
};

// result [ROWS, PANEL] = rows of x times a panel.
template <class Lanes, int ROWS>
void multiply_tile(const Operand& x, const uint32_t* panel, const uint32_t* ahead, float* result) {
    constexpr int SPAN = Lanes::SPAN;
    for (int first = 0; first < VECTORS; first += SPAN) {
        float* into = result + first * W;
        for (int64_t group = 0; group < x.groups; group++) {
            typename Lanes::Sum sums[ROWS][SPAN] = {};
            accumulate<Lanes>(x.lanes, x.stride, panel + first * W, ahead, group * x.group, std::min((group + 1) * x.group, x.stride), sums);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                for (int v = 0; v < SPAN; v++) {
                    if constexpr (Lanes::GROUP == 4) {
                        int64_t place = r * x.groups + group;
                        vf before = group > 0 ? load(into + r * PANEL + v * W) : vf{};
                        vf sum = __builtin_convertvector(sums[r][v] - x.offsets[place], vf);
                        store(into + r * PANEL + v * W, multiply_add(sum, splat(x.scales[place]), before));
                    } else {
                        store(into + r * PANEL + v * W, sums[r][v]);
                    }
                }
        }
    }
}

template <class Lanes, int ROWS>
void multiply_rows(int64_t rows, const Operand& x, const uint32_t* panel, const uint32_t* ahead, float* result) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply_tile<Lanes, ROWS>(x, panel, ahead, result);
        multiply_rows<Lanes, ROWS - 1>(rows, x, panel, ahead, result);
    }
}

inline vf activate(vf gate, Gate kind) {
    // gelu by tanh: 0.5 (1 + tanh u) is the sigmoid of 2 u.
    return gate * sigmoid(kind == Gate::gelu ? 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate) : gate);
}

// A row's sums of one panel into its place in y [out]: scaled, with bias, and gated if the panel is half gates, half values.
template <class T>
void finish_row(const float* sums, const Weight& weight, int64_t panel, T* y) {
    vf values[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        values[v] = load(sums + v * W);
        if (weight.scales) values[v] *= load(weight.scales + panel * PANEL + v * W);
        if (weight.bias) values[v] += load(weight.bias + panel * PANEL + v * W);
    }
    int width = weight.gate == Gate::none ? PANEL : PANEL / 2;
    for (int v = 0; v < width / W; v++) {
        int64_t column = panel * width + v * W;
        if (column >= weight.out) return;
        vf value = weight.gate == Gate::none ? values[v] : activate(values[v], weight.gate) * values[v + VECTORS / 2];
        store(y + column, value, weight.out - column);
    }
}

// Lanes of one panel.
inline int64_t panel_lanes(const Weight& weight) {
    int64_t group = weight.type == Type::float32 ? 1 : weight.type == Type::bfloat16 ? 2 : 4;
    return (weight.in + group - 1) / group * PANEL;
}

template <class Lanes, class T>
void multiply(const Operand& x, int64_t rows, const Weight& weight, T* y) {
    int64_t width = weight.gate == Gate::none ? PANEL : PANEL / 2, panels = (weight.out + width - 1) / width;
    int64_t height = TILES_PER_TASK * Lanes::ROWS, chunks = (rows + height - 1) / height;
    // Enough tasks that the threads end together, few enough that taking one costs nothing.
    int64_t threads = Pool::get().threads(), together = chunks > 1 ? 1 : std::max<int64_t>(1, panels / (64 * threads));
    int64_t size = panel_lanes(weight);
    int64_t strips = (panels + together - 1) / together;
    Pool::get().run(strips * chunks, [&](int64_t task, int) {
        float result[Lanes::ROWS * PANEL];
        int64_t chunk = task % chunks, end = std::min((chunk + 1) * height, rows);
        for (int64_t panel = task / chunks * together; panel < std::min((task / chunks + 1) * together, panels); panel++)
            for (int64_t row = chunk * height; row < end; row += Lanes::ROWS) {
                int64_t count = std::min<int64_t>(end - row, Lanes::ROWS);
                const uint32_t* lanes = (const uint32_t*)weight.panels + panel * size;
                // While few rows use a panel, memory is slower than arithmetic: the first two tiles fetch the panel that
                // this thread will probably take next, half of it each.
                bool fetch = chunks == 1 && row < 2 * Lanes::ROWS && panel + threads * together < panels;
                const uint32_t* ahead = fetch ? lanes + threads * together * size + row / Lanes::ROWS * size / 2 : lanes;
                multiply_rows<Lanes, Lanes::ROWS>(count, x.at(row), lanes, ahead, result);
                for (int64_t r = 0; r < count; r++) finish_row(result + r * PANEL, weight, panel, y + (row + r) * weight.out);
            }
    });
}

// Activations as signed 8-bit integers, each group of a row with the scale that takes its largest magnitude to 127.
struct Quantized {
    std::vector<uint32_t> lanes;
    std::vector<float> scales;
    std::vector<int32_t> offsets;
};

template <class T>
void quantize_group(const T* x, int64_t size, int8_t* into, float& scale, int32_t& offset) {
    vf top = {};
    for (int64_t i = 0; i < size; i += W) {
        vf v = load(x + i, size - i);
        top = maximum(top, maximum(v, -v));
    }
    float magnitude = largest(top), inverse = magnitude > 0 ? 127.0f / magnitude : 0.0f;
    scale = magnitude / 127.0f;
    vi total = {};
    for (int64_t i = 0; i < size; i += W) {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even.
        vi whole = __builtin_convertvector(multiply_add(load(x + i, size - i), splat(inverse), splat(12582912.0f)) - 12582912.0f, vi);
        total += whole;
        store(into + i, whole, size - i);
    }
    offset = 128 * sum(total);
}

template <class T>
Operand quantize(const T* x, int64_t rows, const Weight& weight, Quantized& q) {
    int64_t stride = (weight.in + 3) / 4, groups = (weight.in + weight.group - 1) / weight.group;
    q.lanes.resize(rows * stride);
    q.scales.resize(rows * groups);
    q.offsets.resize(rows * groups);
    Pool::get().run((rows + 15) / 16, [&](int64_t task, int) {
        for (int64_t row = task * 16; row < std::min(rows, task * 16 + 16); row++) {
            q.lanes[row * stride + stride - 1] = 0;
            for (int64_t group = 0; group < groups; group++) {
                int64_t first = group * weight.group, place = row * groups + group;
                quantize_group(x + row * weight.in + first, std::min(weight.group, weight.in - first),
                               (int8_t*)(q.lanes.data() + row * stride) + first, q.scales[place], q.offsets[place]);
            }
        }
    });
    return {q.lanes.data(), stride, weight.group / 4, groups, q.scales.data(), q.offsets.data()};
}

// y [rows, out] = x [rows, in] times the packed weight. x is of the weight's type, or of any for integer weights.
template <class T, class Y>
void linear(const T* x, int64_t rows, const Weight& weight, Y* y) {
    if (weight.type == Type::int8) {
        static thread_local Quantized quantized;
        multiply<Int8Lanes>(quantize(x, rows, weight, quantized), rows, weight, y);
    } else {
        using Lanes = typename LanesOf<T>::type;
        int64_t stride = weight.in / Lanes::GROUP;
        multiply<Lanes>(Operand{(const uint32_t*)x, stride, stride, 1, nullptr, nullptr}, rows, weight, y);
    }
}

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

void pack(const void* from, const Weight& weight, void* into) {
    if (weight.type == Type::float32)
        pack_type((const uint32_t*)from, weight, (uint32_t*)into);
    else if (weight.type == Type::bfloat16)
        pack_type((const uint16_t*)from, weight, (uint16_t*)into);
    else
        pack_type((const uint8_t*)from, weight, (uint8_t*)into);
}

}  // namespace
