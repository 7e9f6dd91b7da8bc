// What a matrix product multiplies its weights with: rows of activations as lanes, rounded to 8 bits for integer weights,
// and what integer sums become.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "norm.h"

namespace {

using namespace headrace;

// Rows of activations as lanes. Integers are summed over parts of the summed dimension, `part` stored vectors of weights
// each, and become numbers with a scale that `ratio` parts of a row share. Floating-point lanes have one part.
struct Operand {
    const uint32_t* lanes;
    int64_t stride, part, parts, ratio;
    const float* scales;        // [rows, groups]
    const uint32_t* additions;  // [rows, parts]: what a part adds besides its products, int or float as its kind has them
    int64_t groups;

    Operand at(int64_t row) const {
        return {lanes + row * stride, stride, part, parts, ratio, scales + row * groups, additions + row * parts, groups};
    }
};

// What integer sums of a part become, for one row and vector of outputs, on top of the sum of the parts before. `addition`
// makes of a row's rounded values, summed, what `add` is given again. What 8-bit weights have added is taken off so; what
// their scales do comes last (finish_sums).
struct Int8Part {
    Int8Part(const Weight&, int64_t) {}
    static uint32_t addition(int32_t total, float) { return -Int8Lanes::ADDED * total; }

    vf add(vf before, vi sum, float scale, uint32_t addition) const {
        return multiply_add(__builtin_convertvector(sum + (int32_t)addition, vf), splat(scale), before);
    }
};

struct Int4Part {
    vf weight_scale, minimum;

    Int4Part(const Weight& weight, int64_t place) : weight_scale(load(weight.group_scales + place)), minimum(load(weight.group_minimums + place)) {}
    static uint32_t addition(int32_t total, float scale) { return std::bit_cast<uint32_t>((float)total * scale); }

    vf add(vf before, vi sum, float scale, uint32_t addition) const {
        before = multiply_add((vf)(vu{} + addition), minimum, before);
        return multiply_add(__builtin_convertvector(sum, vf) * splat(scale), weight_scale, before);
    }
};

template <class Lanes>
using PartOf = std::conditional_t<Lanes::STEPS == 2, Int4Part, Int8Part>;

// Activations as signed 8-bit integers, each group of a row with the scale that takes its largest magnitude to 127.
struct Quantized {
    std::vector<uint32_t> lanes;
    std::vector<float> scales;
    std::vector<uint32_t> additions;
};

template <class T>
float find_magnitude(const T* x, int64_t size) {
    vi top = {};
    for (int64_t i = 0; i < size; i += W) top = maximum_magnitude(top, load(x + i, size - i));
    return largest_magnitude(top);
}

// x times a factor as whole numbers, and their sum.
template <class T>
int32_t round_part(const T* x, int64_t size, float factor, int8_t* into) {
    vi total = {};
    for (int64_t i = 0; i < size; i += W) {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even.
        vi whole = __builtin_convertvector(multiply_add(load(x + i, size - i), splat(factor), splat(12582912.0f)) - 12582912.0f, vi);
        total += whole;
        store(into + i, whole, size - i);
    }
    return sum(total);
}

template <class Part, class T>
void quantize_row(const T* x, const Weight& weight, int64_t part, int8_t* into, float* scales, uint32_t* additions) {
    for (int64_t first = 0; first < weight.in; first += weight.input_group) {
        int64_t end = std::min(first + weight.input_group, weight.in);
        float magnitude = find_magnitude(x + first, end - first), factor = magnitude > 0 ? 127.0f / magnitude : 0.0f;
        // No whole numbers stand for a value that is infinite or none: all that the group meets becomes none.
        bool finite = std::isfinite(magnitude);
        float scale = *scales++ = finite ? magnitude / 127.0f : NAN;
        for (int64_t i = first; i < end; i += part)
            *additions++ = Part::addition(finite ? round_part(x + i, std::min(part, end - i), factor, into + i) : 0, scale);
        if (!finite) std::fill(into + first, into + end, 0);
    }
}

// Where rows come from: memory, or the norm of a residual, which never goes there.
template <class T>
struct PlainRows {
    const T* x;
    int64_t size;

    const T* row(int64_t row) const { return x + row * size; }
};

template <class T>
struct NormedRows {
    const T* x;
    const Norm& norm;
    int64_t size;

    const float* row(int64_t row) const {
        static thread_local std::vector<float> normed;
        normed.resize(size);
        norm_residual(x, norm, row, size, normed.data());
        return normed.data();
    }
};

// Any rows, multiplied by a scale for each input.
template <class Rows>
struct ScaledRows {
    const Rows& rows;
    const float* scales;
    int64_t size;

    const float* row(int64_t row) const {
        static thread_local std::vector<float> scaled;
        scaled.resize(size);
        const auto* x = rows.row(row);
        for (int64_t i = 0; i < size; i += W) store(scaled.data() + i, load(x + i, size - i) * load(scales + i, size - i), size - i);
        return scaled.data();
    }
};

template <class Lanes, class Rows>
Operand quantize(const Rows& x, int64_t rows, const Weight& weight, Quantized& q) {
    // A stored vector of weights meets `held` values of a row.
    int64_t held = Lanes::GROUP * Lanes::STEPS, part = Lanes::STEPS == 1 ? weight.input_group : weight.weight_group;
    int64_t stride = (weight.in + held - 1) / held * Lanes::STEPS, parts = (weight.in + part - 1) / part;
    int64_t groups = (weight.in + weight.input_group - 1) / weight.input_group;
    q.lanes.resize(rows * stride);
    q.scales.resize(rows * groups);
    q.additions.resize(rows * parts);
    Pool::get().run((rows + 15) / 16, [&](int64_t task, int) {
        for (int64_t row = task * 16; row < std::min(rows, task * 16 + 16); row++) {
            uint32_t* lanes = q.lanes.data() + row * stride;
            std::fill(lanes + stride - Lanes::STEPS, lanes + stride, 0);
            quantize_row<PartOf<Lanes>>(x.row(row), weight, part, (int8_t*)lanes, q.scales.data() + row * groups,
                                        q.additions.data() + row * parts);
        }
    });
    return {q.lanes.data(), stride, part / held, parts, weight.input_group / part, q.scales.data(), q.additions.data(), groups};
}

}  // namespace
