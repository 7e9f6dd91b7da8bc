// All kernels for one instruction set: HEADRACE_TABLE names the function that returns their table, HEADRACE_NAME the set.
#include "attention.h"
#include "heads.h"
#include "linear.h"
#include "move.h"
#include "norm.h"
#include "observe.h"
#include "probe.h"
#include "recall.h"
#include "seal.h"
#include "table.h"
#include "unpack.h"

namespace {

// Call a template with the C++ type of an element.
template <class Function>
void with_type(Type type, Function function) {
    if (type == Type::float32)
        function((float*)nullptr);
    else
        function((bf16*)nullptr);
}

#define TYPED(call) with_type(type, [&](auto* none) { using T = std::remove_pointer_t<decltype(none)>; call; })

void linear_any(Type type, const void* x, int64_t rows, const Norm& norm, const Weight& weight, Type result, void* y) {
    if (result == Type::float32)
        TYPED(linear<T>((const T*)x, rows, norm, weight, (float*)y));
    else
        TYPED(linear<T>((const T*)x, rows, norm, weight, (bf16*)y));
}

void find_largest_any(Type type, const void* x, int64_t rows, const Weight& weight, int64_t* y) {
    TYPED(find_largest<T>((const T*)x, rows, weight, y));
}

void rms_norm_any(Type type, const void* x, const float* weight, float eps, int64_t rows, int64_t size, void* y) {
    TYPED(rms_norm<T>((const T*)x, weight, eps, rows, size, (T*)y));
}

void add_rms_norm_any(Type type, const void* x, void* residual, const float* weight, float eps, int64_t rows, int64_t size, void* y) {
    TYPED(add_rms_norm<T>((const T*)x, (T*)residual, weight, eps, rows, size, (T*)y));
}

void place_heads_any(Type type, const Heads& heads, Cache cache, const int64_t* slots) { TYPED(place_heads<T>(heads, cache, slots)); }

void attention_any(Type type, Rows queries, Cache cache, Sealed sealed, Batch batch, Attention spec, void* y) {
    TYPED(attention<T>(queries, cache, sealed, batch, spec, (T*)y));
}

void seal_any(Type type, Cache cache, Sealed sealed, const int32_t* from, const int32_t* into, int64_t count) {
    TYPED(seal<T>(cache, sealed, from, into, count));
}

void observe_any(Type type, Rows queries, Cache cache, Batch batch, Attention spec, Observed observed) {
    TYPED(observe<T>(queries, cache, batch, spec, observed));
}

void move_tokens_any(Type type, Cache cache, Moved moved) { TYPED(move_tokens<T>(cache, moved)); }

void unpack_any(Type type, Vectors form, Unpacked wanted, int64_t head, void* into) { TYPED(unpack<T>(form, wanted, head, (T*)into)); }

void recall_any(Type type, Rows queries, Cache cache, Shadow shadow) { TYPED(recall<T>(queries, cache, shadow)); }

}  // namespace

namespace headrace {

const Table& HEADRACE_TABLE() {
    static const Table table = {HEADRACE_NAME,    pack,     linear_any,  find_largest_any, rms_norm_any, add_rms_norm_any,      place_heads_any,
                                attention_any,    seal_any, observe_any, move_tokens_any,  unpack_any,   recall_any, multiply_registers_of, sweep};
    return table;
}

}  // namespace headrace
