// A tile of attention over one span of blocks: scores, softmax, values. attention.h says which tiles and spans there are.
#pragma once

#include <cmath>

#include "attention_span.h"
#include "sealed_integers.h"

namespace {

using namespace headrace;

// What a row sees of a span: tokens from..to.
struct Visible {
    int64_t from, to;

    bool empty() const { return to <= from; }

    vf hide(vf values, int64_t j, float otherwise) const {
        vi place = (int32_t)j + vi{};
        for (int i = 0; i < W; i++) place[i] += i;
        return (place >= (int32_t)from) & (place < (int32_t)to) ? values : splat(otherwise);
    }
};

// Turn a row's scores of the tokens begin..end of a span into weights: exp(scale * (score - largest so far)) where visible,
// zero elsewhere. Rescales what was summed. top is -inf before the first span.
template <bool PARTLY, class T>
void soften_row(float* scores, T* weights, float* output, float& top, float* total, int64_t size, int64_t begin, int64_t end,
                Visible visible, const Attention& spec) {
    vf best = splat(-INFINITE);
    for (int64_t j = begin; j < end; j += W) {
        vf s = load(scores + j);
        if (spec.soft_cap > 0) s = spec.soft_cap / spec.scale * hyperbolic_tangent(s * (spec.scale / spec.soft_cap));
        if (PARTLY) s = visible.hide(s, j, -INFINITE);
        if (PARTLY || spec.soft_cap > 0) store(scores + j, s);
        best = maximum(best, s);
    }
    float now = std::fmax(top, largest(best)), factor = spec.scale * 1.44269504088896341f;
    vf shift = splat(-now * factor), added = {};
    for (int64_t j = begin; j < end; j += W) {
        vf weight = power_of_two(multiply_add(load(scores + j), splat(factor), shift));
        if (PARTLY) weight = visible.hide(weight, j, 0.0f);
        store(weights + j, weight);
        added += weight;
    }
    if (now == top) return store(total, load(total) + added);
    // Before the first span all sums are zero.
    vf kept = power_of_two(splat((top - now) * factor));
    store(total, multiply_add(load(total), kept, added));
    for (int64_t d = 0; d < size; d += W) store(output + d, load(output + d, size - d) * kept, size - d);
    top = now;
}

// What queries at a position see: tokens from `begin` on, those before `first` exactly, then sealed ones, and exact ones
// again from `find_exact` up to their own.
struct Sight {
    int64_t begin, window, residual, first, size;

    int64_t find_exact(int64_t position) const {
        int64_t from = window ? std::max(begin, position - window + 1) : begin;
        return residual ? std::max(from, std::max<int64_t>(0, position - residual + 1) / size * size) : from;
    }
};

// The first blocks of a span of which others are sealed.
struct HeadSpan : Span {};

// One tile over one span of blocks, exact (Span, HeadSpan) or sealed (SealedSpan): scores, softmax, values.
template <class T>
struct Tile {
    static constexpr int64_t PAIR = LanesOf<T>::type::GROUP;

    const Attention& spec;
    Sight sight;
    int64_t group, position, tokens, head, size, span, base;
    Scratch<T>& s;

    // What the i-th token's rows see of the span that begins at `begin`.
    template <class Blocks>
    Visible see(int64_t i, int64_t begin) const {
        int64_t own = position + i, exact = sight.find_exact(own);
        if (std::is_same_v<Blocks, Span>) return {std::max<int64_t>(0, exact - begin), own + 1 - begin};
        if (std::is_same_v<Blocks, HeadSpan>) return {std::max<int64_t>(0, sight.begin - begin), std::min(sight.first, exact) - begin};
        return {std::max<int64_t>(0, std::max(sight.begin, sight.first) - begin), exact - begin};
    }

    template <class Blocks>
    void add_span(const Blocks& blocks, int64_t begin) {
        // Rows whose query comes before this span, or that do not see it any more, have no part in it.
        int64_t low = 0, high = tokens;
        for (; low < high && see<Blocks>(low, begin).empty(); low++) {}
        for (; high > low && see<Blocks>(high - 1, begin).from >= span; high--) {}
        float* outputs = &s.outputs[base * head];
        SpanRows rows{(const uint32_t*)(s.queries.data() + base * head), (const uint32_t*)(s.weights.data() + base * span), &s.scores[base * span], outputs,
                      low * group, high * group, head, span};
        score(blocks, rows);
        int64_t from = blocks.first * size, to = blocks.last * size;
        for (int64_t r = low * group; r < high * group; r++) {
            Visible visible = see<Blocks>(r / group, begin);
            auto soften = visible.from <= from && visible.to >= to ? soften_row<false, T> : soften_row<true, T>;
            soften(rows.scores + r * span, &s.weights[(base + r) * span], outputs + r * head, s.top[base + r], &s.total[(base + r) * W], head, from, to,
                   visible, spec);
        }
        add(blocks, rows);
    }

    void score(const Span& blocks, const SpanRows& rows) {
        score_span<T>(blocks, rows, size);
        if (blocks.bias[blocks.first]) add_bias(blocks, rows, size, spec.scale);
    }
    void add(const Span& blocks, const SpanRows& rows) { add_span_values<T>(blocks, rows, size); }
    void score(const SealedSpan& blocks, const SpanRows& rows) {
        if constexpr (TAKES_INTEGERS<T>)
            score_integers(blocks, rows, s);
        else
            score_sealed(blocks, rows, s);
        if (blocks.bias[blocks.first]) add_bias(blocks, rows, size, spec.scale);
    }
    void add(const SealedSpan& blocks, const SpanRows& rows) {
        if constexpr (TAKES_INTEGERS<T>)
            add_integers(blocks, rows, s);
        else
            add_sealed_values(blocks, rows, s);
    }
};

}  // namespace
