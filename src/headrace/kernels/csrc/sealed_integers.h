// Sealed blocks where the processor has no products of bfloat16: queries and softmax weights, times their scales, are rounded
// to whole numbers beside one number a row and unit, of 8 bits for codes of at most 4 and of 16 for codes of 8, and codes are
// multiplied as the whole numbers that they are. What rounding leaves of a row counts as if it met the middle code: small
// weights, all rounded to nothing, would otherwise pull what they weigh to its least code. Each product is wrong by 1/254 of the
// row's largest at most, where a code of 4 bits is by 1/30; with 16 bits by 1/32766.
#pragma once

#include "sealed.h"

namespace {

using namespace headrace;

constexpr int INTEGER_ROWS = W == 16 ? 6 : 3;  // rows in registers at once
constexpr int64_t SUMMED_WORDS = 4;            // in so many words no sum of 16 bits overflows

// Whether codes are multiplied as whole numbers.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool TAKES_INTEGERS = false;
#else
template <class T>
constexpr bool TAKES_INTEGERS = std::is_same_v<T, bf16>;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Sums of 16 bits: eight products of two bytes with codes of 4 bits, 8 * 2 * 127 * 15, fit.
typedef int16_t vs __attribute__((vector_size(W * 4)));

inline vs add_byte_products(vs sum, uint32_t row, vu codes) {
    return sum + (vs)_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32((int32_t)row));
}

inline vi add_sums(vi total, vs sum) { return total + (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#else
typedef vi vs;

inline vs add_byte_products(vs sum, uint32_t row, vu codes) { return Int8Lanes::step(sum, row, codes); }
#endif

inline vi add_sums(vi total, vi sum) { return total + sum; }

// The row's two are signed, the codes' two are not negative.
inline vi add_pair_products(vi sum, uint32_t row, vu codes) {
#if defined(__AVX512F__)
    return sum + (vi)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32((int32_t)row));
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32((int32_t)row));
#else
    return sum + (vi)(codes & 0xffff) * (int32_t)(int16_t)row + (vi)(codes >> 16) * ((int32_t)row >> 16);
#endif
}

// Codes of 2 or 4 bits as bytes: each step of a word gives four.
template <int BITS>
struct IntegerCodes {
    using Number = int8_t;  // what a row is rounded to
    using Sum = vs;
    static constexpr int STEPS = 8 / BITS, WORD_BITS = BITS;
    static constexpr float MOST = 127, MIDDLE = ((1 << BITS) - 1) / 2.0f;

    vu words;

    IntegerCodes(const uint32_t* from, int64_t) : words(load(from)) {}

    vu expand(int step) const { return words >> (step * BITS) & 0x01010101u * ((1u << BITS) - 1); }

    static Sum add_products(Sum sum, uint32_t row, vu codes) { return add_byte_products(sum, row, codes); }

    // Put down 16 neighbours in the order in which the steps of their words give them.
    static void put(const vi (&numbers)[16 / W], int8_t* into) {
        v16 order = {}, bytes = narrow(numbers);
        for (int i = 0; i < 16; i++) {
            int word = i / 4 / STEPS, step = i / 4 % STEPS, byte = i % 4;
            order[i] = (int8_t)(word * 4 * STEPS + 2 * (step + byte % 2 * STEPS) + byte / 2);
        }
#if defined(__clang__)
        v16 found;
        for (int i = 0; i < 16; i++) found[i] = bytes[order[i]];
#else
        v16 found = __builtin_shuffle(bytes, order);
#endif
        std::memcpy(into, &found, 16);
    }
};

// Codes of 8 bits as pairs of 16: two planes of words hold their halves, each step of both gives two. With 16383 for the
// largest, 32 bits hold the products of a head of 512.
template <>
struct IntegerCodes<8> {
    using Number = int16_t;
    using Sum = vi;
    static constexpr int STEPS = 4, WORD_BITS = 4;
    static constexpr float MOST = 16383, MIDDLE = 127.5f;

    vu low, high;

    IntegerCodes(const uint32_t* from, int64_t plane) : low(load(from)), high(load(from + plane)) {}

    vu expand(int step) const {
        vu upper = step ? high >> (4 * step - 4) : high << 4;
        return (low >> (4 * step) & 0x000f000fu) | (upper & 0x00f000f0u);
    }

    static Sum add_products(Sum sum, uint32_t row, vu codes) { return add_pair_products(sum, row, codes); }

    static void put(const vi (&numbers)[16 / W], int16_t* into) {
        for (int part = 0; part < 16 / W; part++) store(into + part * W, numbers[part]);
    }
};

// A row's numbers times `factor`, which makes the largest MOST, as whole numbers, arranged for words. Returns the sum of what
// rounding left.
template <class C>
vf round_row(const float* x, int64_t size, float factor, typename C::Number* into) {
    vf rest = {};
    for (int64_t d = 0; d < size; d += 16) {
        vi numbers[16 / W];
        for (int part = 0; part < 16 / W; part++) {
            // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even.
            vf exact = load(x + d + part * W) * factor, whole = (exact + 12582912.0f) - 12582912.0f;
            rest += exact - whole;
            numbers[part] = __builtin_convertvector(whole, vi);
        }
        C::put(numbers, into + d);
    }
    return rest;
}

// rounded [rows][size] = x [rows, stride] * scales in steps of a row's own; added to the sum of bases what x has of codes of 0,
// and what rounding left. numbers: working memory [3][size].
template <class C, int ROWS, class T>
void round_rows(const T* x, int64_t stride, const Grid& grid, int64_t size, float* numbers, typename C::Number* rounded, float (&steps)[ROWS],
                vf (&bases)[ROWS]) {
    float *wide = numbers + size, *least = wide + size;
    for (int64_t d = 0; d < size; d += W) store(wide + d, grid.scale(d)), store(least + d, grid.least(d));
    for (int r = 0; r < ROWS; r++) {
        vi top = {};
        for (int64_t d = 0; d < size; d += W) {
            vf one = load(x + r * stride + d), product = one * load(wide + d);
            bases[r] = multiply_add(one, load(least + d), bases[r]);
            top = maximum_magnitude(top, product);
            store(numbers + d, product);
        }
        float most = largest_magnitude(top);
        // Of what is infinite or no number the sum of bases is none already, and with it all that they are added to.
        if (!std::isfinite(most)) bases[r] = splat(NAN), most = 0;
        steps[r] = most * (1 / C::MOST);
        // The softmax gives no less than 2^-126: what is next to nothing is taken for nothing, for its factor would be infinite.
        vf rest = round_row<C>(numbers, size, most > 1e-30f ? C::MOST / most : 0, rounded + r * size);
        bases[r] = multiply_add(rest, splat(steps[r] * C::MIDDLE), bases[r]);
    }
}

// totals [rows, 2 vectors] += rounded rows, `stride` lanes apart, times rows of words, of which the second plane lies `plane`
// words after the first.
template <class C, int ROWS>
inline __attribute__((always_inline)) void add_integer_words(vi (&totals)[ROWS][2], const uint32_t* words, int64_t count, int64_t word_stride, int64_t plane,
                                                             const uint32_t* rounded, int64_t stride) {
    typename C::Sum sums[ROWS][2] = {};
    // Of unrolled words the compiler makes all products before it adds them, and keeps them in memory.
#pragma GCC unroll 1
    for (int64_t w = 0; w < count; w++) {
        C first(words + w * word_stride, plane), second(words + w * word_stride + W, plane);
#pragma GCC unroll 4
        for (int i = 0; i < C::STEPS; i++) {
            vu one = first.expand(i), two = second.expand(i);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                uint32_t row = rounded[r * stride + w * C::STEPS + i];
                sums[r][0] = C::add_products(sums[r][0], row, one);
                sums[r][1] = C::add_products(sums[r][1], row, two);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) totals[r][v] = add_sums(totals[r][v], sums[r][v]);
}

inline vf scale_sums(vi totals, float step) { return __builtin_convertvector(totals, vf) * step; }

// scores [rows, 32] of a unit: see score_unit. Asks for `bytes` of keys that lie ahead, a few lines at a time: many at once wait
// for each other.
template <class C, int ROWS>
void score_unit_integers(const uint32_t* rounded, const float (&steps)[ROWS], const vf (&bases)[ROWS], const char* unit, float* scores, int64_t span, int64_t head,
                         const char* ahead, int64_t bytes) {
    constexpr int64_t LANE = 4 / sizeof(typename C::Number);
    int64_t words = head * C::WORD_BITS / 32, parts = (words + SUMMED_WORDS - 1) / SUMMED_WORDS;
    int64_t share = (bytes / parts * 2 * W / UNIT + 63) / 64 * 64;
    for (int64_t j = 0; j < UNIT; j += 2 * W) {
        vi totals[ROWS][2] = {};
        for (int64_t part = 0; part < parts; part++) {
            for (int64_t line = 0; line < share; line += 64, ahead += 64) __builtin_prefetch(ahead);
            int64_t w = part * SUMMED_WORDS;
            add_integer_words<C, ROWS>(totals, (const uint32_t*)unit + w * UNIT + j, std::min(SUMMED_WORDS, words - w), UNIT, words * UNIT,
                                       rounded + w * C::STEPS, head / LANE);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            float base = sum(bases[r]);
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) store(scores + r * span + j + v * W, scale_sums(totals[r][v], steps[r]) + base);
        }
    }
}

// outputs [rows, head] += weights [rows, span] times the values that 32 channels have in a span's units. The first rows ask for
// their part of the values that lie ahead.
template <class C, int ROWS, class T>
void add_unit_integers(const SealedSpan& blocks, const SpanRows& rows, int64_t r, int64_t group, float* numbers, typename C::Number* rounded) {
    constexpr int64_t LANE = 4 / sizeof(typename C::Number);
    vf found[UNIT / W][ROWS] = {}, bases[ROWS] = {};
    int64_t groups = rows.head / UNIT, fetched = r == rows.low ? (blocks.shape.bytes() - blocks.shape.values()) / groups : 0;
    for (int64_t unit = blocks.from; unit < blocks.to; unit++) {
        float steps[ROWS];
        round_rows<C, ROWS>((const T*)rows.weights + r * rows.span + unit * UNIT, rows.span, value_grid(blocks.units[unit], blocks.shape, group), UNIT, numbers,
                            rounded, steps, bases);
        const uint32_t* codes = (const uint32_t*)(blocks.units[unit] + blocks.shape.values()) + group * UNIT;
        const char* ahead = blocks.ahead[unit] + blocks.shape.values() + group * fetched;
        for (int64_t part = 0; part < UNIT / W; part += 2) {
            for (int64_t line = 0; line < fetched * 2 * W / UNIT; line += 64, ahead += 64) __builtin_prefetch(ahead);
            vi totals[ROWS][2] = {};
            add_integer_words<C, ROWS>(totals, codes + part * W, C::WORD_BITS, rows.head, C::WORD_BITS * rows.head, (const uint32_t*)rounded, UNIT / LANE);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++) found[part + v][i] += scale_sums(totals[i][v], steps[i]);
        }
    }
    for (int i = 0; i < ROWS; i++) {
        float base = sum(bases[i]);
        for (int64_t part = 0; part < UNIT / W; part++) {
            float* output = rows.outputs + (r + i) * rows.head + group * UNIT + part * W;
            store(output, load(output) + (found[part][i] + base));
        }
    }
}

// Call a function with the codes of so many bits, as an object of no contents.
template <class Function>
void by_codes(int64_t bits, Function function) {
    if (bits == 2) return function(std::type_identity<IntegerCodes<2>>{});
    if (bits == 4) return function(std::type_identity<IntegerCodes<4>>{});
    function(std::type_identity<IntegerCodes<8>>{});
}

template <class T>
void score_integers(const SealedSpan& blocks, const SpanRows& rows, Scratch<T>& s) {
    by_codes(blocks.shape.key_bits, [&]<class C>(std::type_identity<C>) {
        for (int64_t r = rows.low; r < rows.high; r += INTEGER_ROWS)
            by_count<INTEGER_ROWS>(rows.high - r, [&](auto count) {
                for (int64_t unit = blocks.from; unit < blocks.to; unit++) {
                    vf bases[count()] = {};
                    float steps[count()];
                    round_rows<C, count>((const T*)rows.queries + r * rows.head, rows.head, key_grid(blocks.units[unit], blocks.shape), rows.head,
                                         s.numbers.data(), (typename C::Number*)s.scaled.data(), steps, bases);
                    score_unit_integers<C, count>((const uint32_t*)s.scaled.data(), steps, bases, blocks.units[unit], rows.scores + r * rows.span + unit * UNIT,
                                                  rows.span, rows.head, blocks.ahead[unit], r == rows.low ? blocks.shape.values() : 0);
                }
            });
    });
}

template <class T>
void add_integers(const SealedSpan& blocks, const SpanRows& rows, Scratch<T>& s) {
    by_codes(blocks.shape.value_bits, [&]<class C>(std::type_identity<C>) {
        for (int64_t r = rows.low; r < rows.high; r += INTEGER_ROWS)
            by_count<INTEGER_ROWS>(rows.high - r, [&](auto count) {
                for (int64_t group = 0; group < rows.head / UNIT; group++)
                    add_unit_integers<C, count, T>(blocks, rows, r, group, s.numbers.data(), (typename C::Number*)s.scaled.data());
            });
    });
}

}  // namespace
