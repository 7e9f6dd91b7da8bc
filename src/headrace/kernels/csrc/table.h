// The kernels' signatures. kernels.cpp is compiled once for each instruction set and fills one table each;
// module.cpp chooses among the tables at run time. Knows nothing of Python or torch.
#pragma once

#include <cstdint>

namespace headrace {

enum class Type : int { float32 = 0, bfloat16 = 1 };

// Rows of `size` elements: row (i, j) of outer x inner begins at data + i * outer_stride + j * size. Strides in elements.
struct Rows {
    void* data;
    int64_t outer, outer_stride, inner, size;
};

// One layer's cache. Keys [blocks, kv_heads, head_size, block_size], values [blocks, kv_heads, block_size, head_size].
struct Cache {
    void* keys;
    void* values;
    int64_t kv_heads, head_size, block_size;
};

// Ragged queries: sequence s owns tokens starts[s] to starts[s + 1], whose positions are consecutive from positions[...].
struct Batch {
    int64_t sequences;
    const int32_t* starts;
    const int32_t* positions;
    const int32_t* tables;
    int64_t table_stride;
};

struct Attention {
    float scale;
    int64_t window;  // 0: none
    float soft_cap;  // 0: none
};

struct Table {
    const char* name;
    // Weight [out, in] into panels of 32 output features, [out / 32][in][32], zeros on the right.
    void (*pack)(const float* weight, float* packed, int64_t out, int64_t in);
    // y [rows, out] = x [rows, in] times the packed weight, plus bias [out] if there is one.
    void (*linear)(const float* x, const float* packed, const float* bias, float* y, int64_t rows, int64_t out, int64_t in);
    void (*rms_norm)(Type type, Rows x, const float* weight, float eps, void* y);
    void (*add_rms_norm)(Type type, Rows x, void* residual, const float* weight, float eps, void* y);
    void (*gated)(Type type, const void* gate_up, void* y, int64_t rows, int64_t size, bool gelu);
    void (*rotate)(Type type, Rows heads, const float* cos, const float* sin);
    void (*write_kv)(Type type, Rows keys, Rows values, Cache cache, const int64_t* slots);
    // queries [tokens, heads, head_size] with a stride between tokens; y contiguous.
    void (*attention)(Type type, Rows queries, Cache cache, Batch batch, Attention spec, void* y);
};

const Table& table_portable();
const Table& table_avx2();
const Table& table_avx512();

}  // namespace headrace
