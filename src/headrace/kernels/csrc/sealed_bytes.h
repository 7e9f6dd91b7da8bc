// Sealed blocks of at most 4 bits where the processor has no products of bfloat16: queries and softmax weights, times their
// scales, are rounded to 8 bits beside one number a row and unit, and codes are multiplied as the bytes that they are. What
// rounding leaves of a row counts as if it met the middle code: small weights, all rounded to nothing, would otherwise pull
// what they weigh to its minimum. Each product is wrong by 1/254 of the row's largest at most, where a code of 4 bits is by 1/30.
#pragma once

#include "sealed.h"

namespace {

using namespace headrace;

constexpr int BYTE_ROWS = W == 16 ? 6 : 3;  // rows in registers at once
constexpr int64_t SUMMED_WORDS = 4;         // in so many words no sum of 16 bits overflows

// Whether codes of so many bits are multiplied as bytes.
template <class T>
constexpr bool takes_bytes(int64_t bits) {
#if defined(__AVX512BF16__)
    return false;
#else
    return std::is_same_v<T, bf16> && bits <= 4;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Sums of 16 bits: eight products of two bytes with codes of 4 bits, 8 * 2 * 127 * 15, fit.
typedef int16_t vs __attribute__((vector_size(W * 4)));

inline vs add_products(vs sum, uint32_t row, vu codes) {
    return sum + (vs)_mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32((int32_t)row));
}

inline vi add_sums(vi total, vs sum) { return total + (vi)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#else
typedef vi vs;

inline vs add_products(vs sum, uint32_t row, vu codes) { return Int8Lanes::step(sum, row, codes); }

inline vi add_sums(vi total, vs sum) { return total + sum; }
#endif

// Codes of BITS bits as bytes: each step of a word gives four.
template <int BITS>
struct ByteCodes {
    static constexpr int STEPS = 8 / BITS;
    static constexpr float MIDDLE = ((1 << BITS) - 1) / 2.0f;

    static vu expand(vu word, int step) { return word >> (step * BITS) & 0x01010101u * ((1u << BITS) - 1); }

    // 16 neighbours in the order in which the steps of their words give them.
    static v16 arrange(v16 x) {
        v16 order = {};
        for (int i = 0; i < 16; i++) {
            int word = i / 4 / STEPS, step = i / 4 % STEPS, byte = i % 4;
            order[i] = (int8_t)(word * 4 * STEPS + 2 * (step + byte % 2 * STEPS) + byte / 2);
        }
#if defined(__clang__)
        v16 found;
        for (int i = 0; i < 16; i++) found[i] = x[order[i]];
        return found;
#else
        return __builtin_shuffle(x, order);
#endif
    }
};

// A row's numbers in whole steps of `step`, the largest 127 of them: bytes, arranged for words. Returns the sum of what is left,
// in steps.
template <int BITS>
vf round_row(const float* x, int64_t size, float factor, int8_t* into) {
    vf rest = {};
    for (int64_t d = 0; d < size; d += 16) {
        vi numbers[16 / W];
        for (int part = 0; part < 16 / W; part++) {
            // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even.
            vf exact = load(x + d + part * W) * factor, whole = (exact + 12582912.0f) - 12582912.0f;
            rest += exact - whole;
            numbers[part] = __builtin_convertvector(whole, vi);
        }
        v16 bytes = ByteCodes<BITS>::arrange(narrow(numbers));
        std::memcpy(into + d, &bytes, 16);
    }
    return rest;
}

// rounded [rows][size] = x [rows, stride] * scales in steps of a row's own; added to the sum of bases what x has of the minimums,
// and what rounding left. numbers: working memory [3][size].
template <int BITS, int ROWS, class T>
void round_rows(const T* x, int64_t stride, const half* scales, const half* minimums, int64_t size, float* numbers, int8_t* rounded, float (&steps)[ROWS],
                vf (&bases)[ROWS]) {
    float *wide = numbers + size, *least = wide + size;
    for (int64_t d = 0; d < size; d += W) store(wide + d, load(scales + d)), store(least + d, load(minimums + d));
    for (int r = 0; r < ROWS; r++) {
        vf top = {};
        for (int64_t d = 0; d < size; d += W) {
            vf one = load(x + r * stride + d), product = one * load(wide + d);
            bases[r] = multiply_add(one, load(least + d), bases[r]);
            top = maximum(top, maximum(product, -product));
            store(numbers + d, product);
        }
        float most = largest(top);
        steps[r] = most / 127;
        // The softmax gives no less than 2^-126: what is next to nothing is taken for nothing, for its factor would be infinite.
        vf rest = round_row<BITS>(numbers, size, most > 1e-30f ? 127 / most : 0, rounded + r * size);
        bases[r] = multiply_add(rest, splat(steps[r] * ByteCodes<BITS>::MIDDLE), bases[r]);
    }
}

// totals [rows, 2 vectors] += rounded rows, `stride` lanes apart, times rows of words.
template <int BITS, int ROWS>
inline __attribute__((always_inline)) void add_byte_words(vi (&totals)[ROWS][2], const uint32_t* words, int64_t count, int64_t word_stride, const uint32_t* rounded,
                                                          int64_t stride) {
    using C = ByteCodes<BITS>;
    vs sums[ROWS][2] = {};
    for (int64_t w = 0; w < count; w++) {
        vu first = load(words + w * word_stride), second = load(words + w * word_stride + W);
#pragma GCC unroll 4
        for (int i = 0; i < C::STEPS; i++) {
            vu one = C::expand(first, i), two = C::expand(second, i);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                uint32_t row = rounded[r * stride + w * C::STEPS + i];
                sums[r][0] = add_products(sums[r][0], row, one);
                sums[r][1] = add_products(sums[r][1], row, two);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < 2; v++) totals[r][v] = add_sums(totals[r][v], sums[r][v]);
}

inline vf scale_sums(vi totals, float step) { return __builtin_convertvector(totals, vf) * step; }

// scores [rows, 32] of a unit: see score_unit.
template <int BITS, int ROWS>
void score_unit_bytes(const uint32_t* rounded, const float (&steps)[ROWS], const vf (&bases)[ROWS], const char* unit, float* scores, int64_t span, int64_t head,
                      const char* ahead, int64_t bytes) {
    int64_t words = head * BITS / 32, parts = (words + SUMMED_WORDS - 1) / SUMMED_WORDS, share = (bytes / parts + 63) / 64 * 64;
    for (int64_t j = 0; j < UNIT; j += 2 * W) {
        vi totals[ROWS][2] = {};
        for (int64_t part = 0; part < parts; part++) {
            for (int64_t line = 0; line < share && !j; line += 64) __builtin_prefetch(ahead + part * share + line);
            int64_t w = part * SUMMED_WORDS;
            add_byte_words<BITS, ROWS>(totals, (const uint32_t*)unit + w * UNIT + j, std::min(SUMMED_WORDS, words - w), UNIT,
                                       rounded + w * ByteCodes<BITS>::STEPS, head / 4);
        }
        for (int r = 0; r < ROWS; r++) {
            float base = sum(bases[r]);
            for (int v = 0; v < 2; v++) store(scores + r * span + j + v * W, scale_sums(totals[r][v], steps[r]) + base);
        }
    }
}

// outputs [rows, head] += weights [rows, span] times the values that 32 channels have in a span's units.
template <int BITS, int ROWS, class T>
void add_unit_bytes(const SealedSpan& blocks, const SpanRows& rows, int64_t r, int64_t group, float* numbers, int8_t* rounded) {
    vf found[UNIT / W][ROWS] = {}, bases[ROWS] = {};
    int64_t groups = rows.head / UNIT;
    for (int64_t unit = blocks.from; unit < blocks.to; unit++) {
        const half* scales = (const half*)(blocks.units[unit] + blocks.shape.value_scales()) + group * UNIT;
        float steps[ROWS];
        round_rows<BITS, ROWS>((const T*)rows.weights + r * rows.span + unit * UNIT, rows.span, scales, scales + groups * UNIT, UNIT, numbers, rounded, steps, bases);
        const uint32_t* codes = (const uint32_t*)(blocks.units[unit] + blocks.shape.values()) + group * UNIT;
        for (int64_t part = 0; part < UNIT / W; part += 2) {
            vi totals[ROWS][2] = {};
            add_byte_words<BITS, ROWS>(totals, codes + part * W, BITS, rows.head, (const uint32_t*)rounded, UNIT / 4);
            for (int i = 0; i < ROWS; i++)
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

template <class T>
void score_bytes(const SealedSpan& blocks, const SpanRows& rows, Scratch<T>& s) {
    by_bits(blocks.shape.key_bits, [&](auto bits, int64_t) {
        constexpr int BITS = decltype(bits)::value;
        for (int64_t r = rows.low; r < rows.high; r += BYTE_ROWS)
            by_count<BYTE_ROWS>(rows.high - r, [&](auto count) {
                for (int64_t unit = blocks.from; unit < blocks.to; unit++) {
                    const half* scales = (const half*)(blocks.units[unit] + blocks.shape.key_scales());
                    vf bases[count()] = {};
                    float steps[count()];
                    round_rows<BITS, count>((const T*)rows.queries + r * rows.head, rows.head, scales, scales + rows.head, rows.head, s.numbers.data(),
                                            (int8_t*)s.scaled.data(), steps, bases);
                    score_unit_bytes<BITS, count>((const uint32_t*)s.scaled.data(), steps, bases, blocks.units[unit], rows.scores + r * rows.span + unit * UNIT,
                                                  rows.span, rows.head, blocks.ahead[unit], blocks.shape.bytes());
                }
            });
    });
}

template <class T>
void add_bytes(const SealedSpan& blocks, const SpanRows& rows, Scratch<T>& s) {
    by_bits(blocks.shape.value_bits, [&](auto bits, int64_t) {
        for (int64_t r = rows.low; r < rows.high; r += BYTE_ROWS)
            by_count<BYTE_ROWS>(rows.high - r, [&](auto count) {
                for (int64_t group = 0; group < rows.head / UNIT; group++)
                    add_unit_bytes<decltype(bits)::value, count, T>(blocks, rows, r, group, s.numbers.data(), (int8_t*)s.scaled.data());
            });
    });
}

}  // namespace
