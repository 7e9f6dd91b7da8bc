// All kernels for one instruction set: HEADRACE_TABLE names the function that returns their table, HEADRACE_NAME the set.
#include <algorithm>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "table.h"

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

void rms_norm_any(Type type, Rows x, const float* weight, float eps, void* y) { TYPED(rms_norm<T>(x, weight, eps, (T*)y)); }

void add_rms_norm_any(Type type, Rows x, void* residual, const float* weight, float eps, void* y) {
    TYPED(add_rms_norm<T>(x, (T*)residual, weight, eps, (T*)y));
}

void gated_any(Type type, const void* gate_up, void* y, int64_t rows, int64_t size, bool gelu) {
    TYPED(gated<T>((const T*)gate_up, (T*)y, rows, size, gelu));
}

void rotate_any(Type type, Rows heads, const float* cos, const float* sin) { TYPED(rotate<T>(heads, cos, sin)); }

void write_kv_any(Type type, Rows keys, Rows values, Cache cache, const int64_t* slots) {
    TYPED(write_kv<T>(keys, values, cache, slots));
}

void attention_any(Type type, Rows queries, Cache cache, Batch batch, Attention spec, void* y) {
    TYPED(attention<T>(queries, cache, batch, spec, (T*)y));
}

}  // namespace

namespace headrace {

const Table& HEADRACE_TABLE() {
    static const Table table = {HEADRACE_NAME, pack,       linear,       rms_norm_any, add_rms_norm_any,
                                gated_any,     rotate_any, write_kv_any, attention_any};
    return table;
}

}  // namespace headrace
