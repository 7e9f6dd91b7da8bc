// Matrix products with packed weights, in float32, bfloat16 and integers of 8 or 4 bits, and what follows in the same pass:
// scales, bias, a gated activation. Every output element is one running sum over the input features in ascending order,
// whatever tile it falls into: a row's result has the same bits for any number of rows and threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "activations.h"
#include "pack.h"

namespace {

using namespace headrace;

constexpr int VECTORS = PANEL / W;
constexpr int TILES_PER_TASK = 8;

// sums [ROWS, SPAN] += rows of x times a slice of SPAN vectors of a panel, over the stored vectors from..to. Meanwhile a
// cache line of what comes `ahead` is fetched with each: few enough that arithmetic hides them, unlike all at once.
template <class Lanes, int ROWS, int SPAN>
inline void accumulate(const uint32_t* x, int64_t stride, const uint32_t* panel, const uint32_t* ahead, int64_t from, int64_t to,
                       typename Lanes::Sum (&sums)[ROWS][SPAN]) {
    // A tile that is not full is mostly the only one of its panel: it fetches all of the next, where full ones take half.
    constexpr int STEPS = Lanes::STEPS, LINES = ROWS < Lanes::ROWS ? 2 : 1;
    // Three rows share a pointer: [p], [p + stride], [p + 2 stride] are addresses of one instruction, and the processor
    // has not registers enough for a pointer each.
    const uint32_t* rows[(ROWS + 2) / 3];
    for (int i = 0; i < (ROWS + 2) / 3; i++) rows[i] = x + 3 * i * stride + from * STEPS;
    panel += from * PANEL;
    ahead += from * LINES * 16;
    for (int64_t k = from; k < to; k++) {
#pragma GCC unroll 2
        for (int line = 0; line < LINES; line++) __builtin_prefetch(ahead + line * 16, 0, 2);
        vu stored[SPAN], w[SPAN];
#pragma GCC unroll 8
        for (int v = 0; v < SPAN; v++) stored[v] = load(panel + v * W);
#pragma GCC unroll 2
        for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 8
            for (int v = 0; v < SPAN; v++) w[v] = unpack<Lanes>(stored[v], step);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                for (int v = 0; v < SPAN; v++) sums[r][v] = Lanes::step(sums[r][v], rows[r / 3][r % 3 * stride + step], w[v]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < (ROWS + 2) / 3; i++) rows[i] += STEPS;
        panel += PANEL;
        ahead += LINES * 16;
    }
}

// One panel of a weight, and what to fetch meanwhile.
struct Panel {
    const Weight& weight;
    int64_t number;
    const uint32_t *lanes, *ahead;
};

// result [ROWS, PANEL] = rows of x times a panel.
template <class Lanes, int ROWS>
void multiply_tile(const Operand& x, const Panel& panel, float* result) {
    constexpr int SPAN = Lanes::SPAN;
    for (int first = 0; first < PANEL; first += SPAN * W)
        for (int64_t part = 0; part < x.parts; part++) {
            typename Lanes::Sum sums[ROWS][SPAN] = {};
            int64_t to = std::min((part + 1) * x.part, x.stride / Lanes::STEPS);
            accumulate<Lanes>(x.lanes, x.stride, panel.lanes + first, panel.ahead, part * x.part, to, sums);
#pragma GCC unroll 8
            for (int v = 0; v < SPAN; v++) {
                float* into = result + first + v * W;
                if constexpr (Lanes::GROUP < 4) {
#pragma GCC unroll 12
                    for (int r = 0; r < ROWS; r++) store(into + r * PANEL, sums[r][v]);
                } else {
                    PartOf<Lanes> each(panel.weight, (panel.number * x.parts + part) * PANEL + first + v * W);
                    int64_t group = part / x.ratio;
#pragma GCC unroll 12
                    for (int r = 0; r < ROWS; r++) {
                        vf before = part > 0 ? load(into + r * PANEL) : vf{};
                        store(into + r * PANEL, each.add(before, sums[r][v], x.scales[r * x.groups + group], x.additions[r * x.parts + part]));
                    }
                }
            }
        }
}

template <class Lanes, int ROWS>
void multiply_rows(int64_t rows, const Operand& x, const Panel& panel, float* result) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS) return multiply_tile<Lanes, ROWS>(x, panel, result);
        multiply_rows<Lanes, ROWS - 1>(rows, x, panel, result);
    }
}

inline vf activate(vf gate, Gate kind) {
    // gelu by tanh: 0.5 (1 + tanh u) is the sigmoid of 2 u.
    return gate * sigmoid(kind == Gate::gelu ? 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate) : gate);
}

// A row's sums of one panel, scaled and with bias.
inline void finish_sums(const float* sums, const Weight& weight, int64_t panel, vf (&values)[VECTORS]) {
    for (int v = 0; v < VECTORS; v++) {
        values[v] = load(sums + v * W);
        if (weight.scales) values[v] *= load(weight.scales + panel * PANEL + v * W);
        if (weight.bias) values[v] += load(weight.bias + panel * PANEL + v * W);
    }
}

// What becomes of a product's rows: they are written to y [rows, out], gated if a panel is half gates, half values.
template <class T>
struct WriteRows {
    const Weight& weight;
    T* y;
    int64_t threads = Pool::get().threads();

    void operator()(const float* sums, int64_t row, int64_t panel, int) const {
        vf values[VECTORS];
        finish_sums(sums, weight, panel, values);
        int width = weight.gate == Gate::none ? PANEL : PANEL / 2;
        for (int v = 0; v < width / W; v++) {
            int64_t column = panel * width + v * W;
            if (column >= weight.out) return;
            vf value = weight.gate == Gate::none ? values[v] : activate(values[v], weight.gate) * values[v + VECTORS / 2];
            store(y + row * weight.out + column, value, weight.out - column);
        }
    }
};

struct Largest {
    float value = -std::numeric_limits<float>::infinity();
    int64_t column = 0;

    // Before all others, and never behind one.
    static Largest none() { return {std::numeric_limits<float>::infinity(), -1}; }

    bool before(float other, int64_t place) const { return other > value || (other == value && place < column); }
};

// Or only the column of each row's largest element is kept, the first of equal ones: by thread, found [threads][rows].
// A row with an element that is no number has none that is largest.
struct KeepLargest {
    const Weight& weight;
    Largest* found;
    int64_t rows;
    int64_t threads;

    void operator()(const float* sums, int64_t row, int64_t panel, int thread) const {
        vf values[VECTORS];
        finish_sums(sums, weight, panel, values);
        int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, weight.out - first);
        float plain[PANEL];
        vf best = splat(-std::numeric_limits<float>::infinity());
        vi unordered = {};
        for (int v = 0; v < VECTORS; v++) {
            store(plain + v * W, values[v]);
            if ((v + 1) * W <= count) {
                best = maximum(best, values[v]);
                unordered |= values[v] != values[v];
            }
        }
        float top = largest(best);
        bool some = any(unordered);
        for (int64_t j = count / W * W; j < count; j++) {
            top = std::fmax(top, plain[j]);
            some |= std::isnan(plain[j]);
        }
        Largest& known = found[thread * rows + row];
        if (some) {
            known = Largest::none();
            return;
        }
        // Of this panel nothing stands before its first column.
        if (!known.before(top, first)) return;
        for (int64_t j = 0; j < count; j++)
            if (plain[j] == top) {
                if (known.before(top, first + j)) known = {top, first + j};
                return;
            }
    }
};

// Lanes of one panel.
inline int64_t panel_lanes(const Weight& weight) {
    int64_t held = weight.type == Type::float32 ? 1 : weight.type == Type::bfloat16 ? 2 : weight.type == Type::int8 ? 4 : 8;
    return (weight.in + held - 1) / held * PANEL;
}

template <class Lanes, class Sink>
void multiply(const Operand& x, int64_t rows, const Weight& weight, const Sink& sink) {
    int64_t width = weight.gate == Gate::none ? PANEL : PANEL / 2, panels = (weight.out + width - 1) / width;
    int64_t height = TILES_PER_TASK * Lanes::ROWS, chunks = (rows + height - 1) / height;
    // Enough tasks that the threads end together, few enough that taking one costs nothing.
    int64_t threads = sink.threads, together = chunks > 1 ? 1 : std::max<int64_t>(1, panels / (64 * threads));
    int64_t size = panel_lanes(weight);
    int64_t strips = (panels + together - 1) / together;
    Pool::get().run(strips * chunks, [&](int64_t task, int thread) {
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
                multiply_rows<Lanes, Lanes::ROWS>(count, x.at(row), Panel{weight, panel, lanes, ahead}, result);
                for (int64_t r = 0; r < count; r++) sink(result + r * PANEL, row + r, panel, thread);
            }
    }, threads);
}

template <class Lanes, class T, class Sink>
void multiply_integers(const T* x, int64_t rows, const Norm& norm, const Weight& weight, const Sink& sink) {
    static thread_local Quantized quantized;
    auto multiply_rows_of = [&](const auto& x) {
        if (weight.input_scales)
            multiply<Lanes>(quantize<Lanes>(ScaledRows{x, weight.input_scales, weight.in}, rows, weight, quantized), rows, weight, sink);
        else
            multiply<Lanes>(quantize<Lanes>(x, rows, weight, quantized), rows, weight, sink);
    };
    if (norm.weight)
        multiply_rows_of(NormedRows<T>{x, norm, weight.in});
    else
        multiply_rows_of(PlainRows<T>{x, weight.in});
}

template <class T, class Sink>
void multiply_floats(const T* x, int64_t rows, const Norm& norm, const Weight& weight, const Sink& sink) {
    using Lanes = typename LanesOf<T>::type;
    static thread_local std::vector<T> normed;
    if (norm.weight) {
        normed.resize(rows * weight.in);
        T* into = normed.data();
        for_rows(rows, weight.in, [&](int64_t row) { norm_residual(x, norm, row, weight.in, into + row * weight.in); });
        x = into;
    }
    int64_t stride = weight.in / Lanes::GROUP;
    multiply<Lanes>(Operand{(const uint32_t*)x, stride, stride, 1, 1, nullptr, nullptr, 0}, rows, weight, sink);
}

// What the sink makes of x [rows, in], or of the norm of what it is added to, times the packed weight. x is of the weight's
// type, or of any for integer weights.
template <class T, class Sink>
void multiply_any(const T* x, int64_t rows, const Norm& norm, const Weight& weight, const Sink& sink) {
    Pool::get().expect(weight.next, weight.next_bytes);
    if (weight.type == Type::int8) return multiply_integers<Int8Lanes>(x, rows, norm, weight, sink);
    if (weight.type == Type::int4) return multiply_integers<Int4Lanes>(x, rows, norm, weight, sink);
    multiply_floats(x, rows, norm, weight, sink);
}

template <class T, class Y>
void linear(const T* x, int64_t rows, const Norm& norm, const Weight& weight, Y* y) {
    multiply_any(x, rows, norm, weight, WriteRows<Y>{weight, y});
}

// y [rows]: the column of each row's largest element, without writing the rows; -1 for a row with what is no number.
template <class T>
void find_largest(const T* x, int64_t rows, const Weight& weight, int64_t* y) {
    int64_t threads = Pool::get().threads();
    std::vector<Largest> found(threads * rows);
    multiply_any(x, rows, Norm{}, weight, KeepLargest{weight, found.data(), rows, threads});
    for (int64_t row = 0; row < rows; row++) {
        Largest best;
        for (int64_t t = 0; t < threads; t++) {
            const Largest& one = found[t * rows + row];
            if (best.before(one.value, one.column)) best = one;
        }
        y[row] = best.column;
    }
}

}  // namespace
