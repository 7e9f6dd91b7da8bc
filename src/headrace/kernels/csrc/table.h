// The kernels' signatures. kernels.cpp is compiled once for each instruction set and fills one table each;
// module.cpp chooses among the tables at run time. Knows nothing of Python or torch.
#pragma once

#include <cstdint>

namespace headrace {

enum class Type : int { float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3 };

// What a product's first half of outputs does to the second: nothing, or activation(first) * second.
enum class Gate : int { none = 0, silu = 1, gelu = 2 };

// 16-bit floats as IEEE 754 has them.
struct half {
    uint16_t bits;
};

// A packed weight: panels of 32 outputs, [panels][in / group][32] lanes of 32 bits, zeros where outputs or inputs end. With
// a gate, a panel is 16 gates and their 16 values, and `out` counts what comes out. Scales and bias [32 * panels] lie as the
// panels do; null if there are none.
// Integer weights are multiplied with inputs rounded to 8 bits, a scale each input_group. 8-bit ones are stored with 128
// added. 4-bit ones are 0 to 15; of weight_group neighbours each means number * scale + minimum, half precision, both
// [panels][in / weight_group][32]. weight_group divides input_group.
struct Weight {
    Type type;
    const void* panels;
    int64_t out, in, input_group;
    Gate gate;
    const float* scales;
    const float* bias;
    int64_t weight_group;
    const half* group_scales;
    const half* group_minimums;
    // [in]: what inputs are multiplied by before they are rounded; null: nothing.
    const float* input_scales;
    // Where the weight lies that is probably multiplied next.
    const void* next = nullptr;
    int64_t next_bytes = 0;
};

// What happens to a product's rows x before it: they are added to `residual` [rows, in] unless x is null, and the residual's
// norm is multiplied instead. Without a weight nothing happens.
struct Norm {
    void* residual;
    const float* weight;
    float eps;
};

enum class Sweep : int { read = 0, write = 1, copy = 2 };

// Rows of `size` elements: row (i, j) of outer x inner begins at data + i * outer_stride + j * size. Strides in elements.
struct Rows {
    void* data;
    int64_t outer, outer_stride, inner, size;
};

// One layer's cache in lanes of 32 bits, one float32 or two bfloat16 (pair = 1 or 2). A block's keys [kv_heads, head_size / pair,
// block_size] hold neighbours of a head in a lane, its values [kv_heads, block_size / pair, head_size] neighbouring tokens; from
// one block to the next it is `stride` bytes.
struct Cache {
    char* keys;
    char* values;
    const char* bias;  // a block's float32 [kv_heads, block_size], added to its scores; null: nothing
    int64_t stride, kv_heads, head_size, block_size;
};

// The same layer's sealed blocks (sealed.h says what is in one), `stride` bytes apart; data is null if there are none. A query
// at position p reads blocks that end before the block of token p - residual + 1 sealed, and that one and later ones exactly;
// exactly too the `first` tokens, a multiple of the block size.
struct Sealed {
    char* data;
    int64_t stride, key_bits, value_bits, residual, first;
    const int32_t* tables;
    int64_t table_stride, head_stride;  // as a Batch's
    const char* bias;                   // as a Cache's, in sealed blocks
};

// Ragged queries: sequence s owns tokens starts[s] to starts[s + 1], whose positions are consecutive from positions[...]. What
// lies before begins[s], a multiple of the block size, is not there; null: nothing is missing anywhere.
struct Batch {
    int64_t sequences;
    const int32_t* starts;
    const int32_t* positions;
    const int32_t* tables;
    int64_t table_stride, head_stride;  // head_stride: from one kv head's table to the next; 0: all have the same
    const int32_t* begins;
};

// A projection's output [tokens, heads + 2 kv_heads, head_size]: queries, keys, values. Norm weights [head_size] or null;
// cos and sin [tokens, head_size / 2].
struct Heads {
    void* data;
    int64_t tokens, heads;
    const float *query_norm, *key_norm;
    float eps;
    const float *cos, *sin;
};

struct Attention {
    float scale;
    int64_t window;  // 0: none
    float soft_cap;  // 0: none
};

// What is counted of a step's attention. mass: float32 [kv_heads, block_size] of a block, blocks as far apart as the cache's.
// firsts: for each sequence the position from which queries count; below 0 none do. With a share, a weight counts one if it is
// at least the average of its query's, and so many times itself besides; 0: itself.
struct Observed {
    char* mass;
    const int32_t* firsts;
    float share;
};

// Tokens that are moved: of kv head h those in slots[h * count ...] come to the slots from `into` on. Slots count from the
// first of some blocks.
struct Moved {
    const int32_t* blocks;
    const int64_t* slots;
    int64_t count, into;
};

// Keys or values in a policy's own bytes, blocks `stride` bytes apart: see VectorForm in vectors.py.
struct Vectors {
    const char* data;
    int64_t stride, tokens, width, bits, group;
    bool exponents, by_channel;

    int64_t rows() const { return by_channel ? width : tokens; }
    int64_t columns() const { return by_channel ? tokens : width; }
};

// Which blocks are unpacked. factors: float32 [count, tokens] that vectors are multiplied by, or null. order: the row that each
// channel is in, or null for its own.
struct Unpacked {
    const int64_t* blocks;
    int64_t count;
    const float* factors;
    const int64_t* order;
};

// What stands for a prompt's first chunks in `blocks`, and what is wanted of it: in each kv head the `count` likeliest chunks, in the
// slots of blocks `into`. values [kv heads, chunks, 8, head_size] lie elsewhere; null: in the blocks. cos and sin [positions,
// head_size / 2].
struct Shadow {
    const int32_t* blocks;
    int64_t chunks, count, rank;
    const void* values;
    const int32_t* into;
    const float *cos, *sin;
    float scale;
};

struct Table {
    const char* name;
    // A weight [out, in], or [2 out, in] gates first, of the given type into panels. Ignores weight.panels.
    void (*pack)(const void* from, const Weight& weight, void* into);
    // y [rows, out] of type `result` = x [rows, in] times the weight; x is float32 or bfloat16, as the weight unless that is of integers.
    void (*linear)(Type type, const void* x, int64_t rows, const Norm& norm, const Weight& weight, Type result, void* y);
    // y [rows]: the column of the largest of each row of that product, the first of equal ones, -1 where one is no number. For
    // weights without a gate.
    void (*find_largest)(Type type, const void* x, int64_t rows, const Weight& weight, int64_t* y);
    void (*rms_norm)(Type type, const void* x, const float* weight, float eps, int64_t rows, int64_t size, void* y);
    // residual += x, then the norm of the new residual into y.
    void (*add_rms_norm)(Type type, const void* x, void* residual, const float* weight, float eps, int64_t rows, int64_t size, void* y);
    void (*place_heads)(Type type, const Heads& heads, Cache cache, const int64_t* slots);
    // queries [tokens, heads, head_size] with a stride between tokens; y contiguous.
    void (*attention)(Type type, Rows queries, Cache cache, Sealed sealed, Batch batch, Attention spec, void* y);
    // Blocks `from` of the cache, all of whose tokens are written, as sealed blocks `into`.
    void (*seal)(Type type, Cache cache, Sealed sealed, const int32_t* from, const int32_t* into, int64_t count);
    // Add to the mass of exact tokens what queries give to them; new tokens have none, and at the first query that counts all do.
    void (*observe)(Type type, Rows queries, Cache cache, Batch batch, Attention spec, Observed observed);
    void (*move_tokens)(Type type, Cache cache, Moved moved);
    // Exact keys, if they lie by channel, or values, of heads of so many elements; blocks one after the other.
    void (*unpack)(Type type, Vectors form, Unpacked wanted, int64_t head, void* into);
    // Queries [1, heads, head_size] of one token.
    void (*recall)(Type type, Rows queries, Cache cache, Shadow shadow);
    // What the processor can do at most (probe.h): multiply-adds done, and a sweep over memory.
    int64_t (*multiply_registers)(Type type, int64_t rounds);
    void (*sweep)(Sweep kind, char* data, int64_t bytes);
};

const Table& table_portable();
const Table& table_avx2();
const Table& table_avx512();
const Table& table_avx512_bf16();

}  // namespace headrace
