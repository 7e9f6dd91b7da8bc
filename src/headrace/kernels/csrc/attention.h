// Ragged paged attention with online softmax (FlashAttention, arXiv 2205.14135, algorithm 1), prefill and decode alike.
//
// A task is a tile of query tokens and the query heads that share one kv head, so that keys and values are read once for
// all of them: tokens of one sequence, or the tokens of several sequences that have the same first blocks (a shared
// prefix), which read those together and what is left each for itself. Spans of a few blocks are taken in ascending order
// from position 0, and each (query, head) does the same arithmetic in the same order as if it were alone: a row's bits do
// not depend on chunk or batch, nor on who shares its prefix.
// Where blocks are sealed, a query reads the older ones sealed and then the newer ones exactly.
// In bfloat16 queries, keys, values and softmax weights are bfloat16, sums and the softmax float32.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_tile.h"

namespace {

using namespace headrace;

// One call's arguments, and the sequences in an order in which those that share their first blocks are neighbours.
template <class T>
struct Call {
    const Rows& queries;
    const Cache& cache;
    const Sealed& sealed;
    const Batch& batch;
    const Attention& spec;
    T* y;
    std::vector<int64_t> order;

    int64_t group() const { return queries.inner / cache.kv_heads; }
    int64_t span_blocks() const { return std::max<int64_t>(1, SPAN_TOKENS / cache.block_size); }
    int64_t start(int64_t place) const { return batch.starts[order[place]]; }
    int64_t length(int64_t place) const { return batch.starts[order[place] + 1] - start(place); }
    int64_t position(int64_t place) const { return batch.positions[start(place)]; }
    const int32_t* table(int64_t place, int64_t head = 0) const {
        return batch.tables + order[place] * batch.table_stride + head * batch.head_stride;
    }
    const int32_t* sealed_table(int64_t place, int64_t head = 0) const {
        return sealed.tables + order[place] * sealed.table_stride + head * sealed.head_stride;
    }
    // The blocks that many sequences may read as one: the sealed ones where there are any.
    const int32_t* shared_table(int64_t place) const { return sealed.data ? sealed_table(place) : table(place); }
    Sight sight(int64_t place) const {
        return {batch.begins ? batch.begins[order[place]] : 0, spec.window, sealed.data ? sealed.residual : 0, sealed.data ? sealed.first : 0,
                cache.block_size};
    }

    // Whether two sequences of one token each have the same blocks from span `begin` on for a span, and see all of it.
    bool share(int64_t one, int64_t other, int64_t begin) const {
        int64_t end = begin + span_blocks(), least = std::min(position(one), position(other));
        if (spec.window || batch.head_stride || sealed.head_stride || length(one) != 1 || length(other) != 1) return false;
        if (std::max(sight(one).begin, sight(other).begin) > begin * cache.block_size) return false;
        if ((sealed.data ? sight(one).find_exact(least) : least + 1) < end * cache.block_size) return false;
        int64_t head = sealed.data ? std::min(end, sealed.first / cache.block_size) : begin;
        if (begin < head && !std::equal(table(one) + begin, table(one) + head, table(other) + begin)) return false;
        return std::equal(shared_table(one) + begin, shared_table(one) + end, shared_table(other) + begin);
    }
};

// A tile: some tokens of one sequence, or `count` sequences of one token each that share a span at least.
struct Task {
    int64_t first, count, head, token, tokens;
};

template <class T>
struct Worker {
    const Call<T>& call;
    const Task& task;
    Scratch<T>& s;
    int64_t group = call.group(), head = call.cache.head_size, size = call.cache.block_size, blocks = call.span_blocks();

    // Blocks begin..begin+count of a sequence, of which it has written so many tokens in all.
    Span find(int64_t place, int64_t begin, int64_t first, int64_t last, int64_t tokens) const {
        int64_t written = std::min(size, tokens - (begin + last - 1) * size);
        Span span{{}, {}, {}, {}, first, last, (written + Tile<T>::PAIR - 1) / Tile<T>::PAIR};
        auto find_keys = [&](int64_t block) {
            int64_t from = call.table(place, task.head)[block] * call.cache.stride, row = task.head * size;
            return (const uint32_t*)(call.cache.keys + from + row * head * (int64_t)sizeof(T));
        };
        for (int64_t block = first; block < last; block++) {
            int64_t from = call.table(place, task.head)[begin + block] * call.cache.stride, row = task.head * size, next = begin + block + blocks;
            span.keys[block] = find_keys(begin + block);
            span.ahead[block] = next * size < tokens ? find_keys(next) : nullptr;
            span.values[block] = (const uint32_t*)(call.cache.values + from + row * head * (int64_t)sizeof(T));
            span.bias[block] = call.cache.bias ? (const float*)(call.cache.bias + from) + row : nullptr;
        }
        return span;
    }

    // The same of its sealed blocks, of which it has `all`.
    SealedSpan find_sealed(int64_t place, int64_t begin, int64_t first, int64_t last, int64_t all) const {
        int64_t units = size / UNIT;
        SealedSpan span{{}, {}, {}, first, last, first * units, last * units, {head, call.sealed.key_bits, call.sealed.value_bits}};
        auto find = [&](int64_t unit) {
            int64_t block = call.sealed_table(place, task.head)[begin + unit / units];
            return call.sealed.data + block * call.sealed.stride + (task.head * units + unit % units) * span.shape.bytes();
        };
        for (int64_t block = first; call.sealed.bias && block < last; block++) {
            int64_t from = call.sealed_table(place, task.head)[begin + block] * call.sealed.stride;
            span.bias[block] = (const float*)(call.sealed.bias + from) + task.head * size;
        }
        for (int64_t unit = span.from; unit < span.to; unit++) {
            span.units[unit] = find(unit);
            span.ahead[unit] = begin + blocks + unit / units < all ? find(unit + blocks * units) : span.units[unit];
        }
        return span;
    }

    // The span that begins at block `at`, of blocks seen..end that are not read as the newest ones are: first ones exactly, then
    // those that are sealed.
    void add_older(Tile<T>& tile, int64_t place, int64_t at, int64_t seen, int64_t end) {
        int64_t from = std::max<int64_t>(0, seen - at), to = std::min(blocks, end - at), head = std::min(to, tile.sight.first / size - at);
        if (from < head) tile.add_span(HeadSpan{find(place, at, from, head, (at + head) * size)}, at * size);
        from = std::max(from, head);
        if (from < to) tile.add_span(find_sealed(place, at, from, to, end), at * size);
    }

    // One sequence's tokens from the block `begin` on, whose rows in the scratch begin at `base`.
    void run_alone(int64_t place, int64_t begin, int64_t base) {
        int64_t position = call.position(place) + task.token, end = position + task.tokens;
        Sight sight = call.sight(place);
        Tile<T> tile{call.spec, sight, group, position, task.tokens, head, size, blocks * size, base, s};
        // What the last of the tokens reads sealed, then what the first of them reads exactly.
        int64_t seen = call.sealed.data ? sight.begin / size : 0, sealed = call.sealed.data ? sight.find_exact(end - 1) / size : 0;
        for (int64_t at = std::max(begin, seen / blocks * blocks); at < sealed; at += blocks) add_older(tile, place, at, seen, sealed);
        seen = sight.find_exact(position) / size;
        for (int64_t at = std::max(begin, seen / blocks * blocks); at * size < end; at += blocks) {
            int64_t last = std::min(blocks, (end - 1) / size + 1 - at);
            tile.add_span(find(place, at, std::max<int64_t>(0, seen - at), last, end), at * size);
        }
    }

    // Sequences from..to: what all of them share is read once for all of their rows, and so for those that share more. Each
    // row's arithmetic is that of run_alone, in the same order.
    void run_shared(int64_t from, int64_t to, int64_t begin) {
        auto shared_by_all = [&] {
            for (int64_t i = from + 1; i < to; i++)
                if (!call.share(from, i, begin)) return false;
            return to - from > 1;
        };
        while (shared_by_all()) {
            int64_t least = call.position(from);
            for (int64_t i = from; i < to; i++) least = std::min(least, call.position(i));
            Tile<T> tile{call.spec, call.sight(from), group, least, to - from, head, size, blocks * size, (from - task.first) * group, s};
            if (call.sealed.data)
                add_older(tile, from, begin, 0, begin + blocks);
            else
                tile.add_span(find(from, begin, 0, blocks, least + 1), begin * size);
            begin += blocks;
        }
        if (to - from == 1) return run_alone(from, begin, (from - task.first) * group);
        for (int64_t next; from < to; from = next) {
            for (next = from + 1; next < to && call.share(from, next, begin);) next++;
            run_shared(from, next, begin);
        }
    }

    void run() {
        int64_t rows = task.count * task.tokens * group;
        for (int64_t i = 0; i < rows / group; i++) {
            const T* row = (const T*)call.queries.data + token(i) * call.queries.outer_stride + task.head * group * head;
            std::memcpy(s.queries.data() + i * group * head, row, group * head * sizeof(T));
        }
        std::fill_n(s.outputs.begin(), rows * head, 0.0f);
        std::fill_n(s.top.begin(), rows, -INFINITE);
        std::fill_n(s.total.begin(), rows * W, 0.0f);
        if (task.count > 1)
            run_shared(task.first, task.first + task.count, 0);
        else
            run_alone(task.first, 0, 0);
        for (int64_t r = 0; r < rows; r++) {
            T* into = call.y + token(r / group) * call.queries.inner * head + (task.head * group + r % group) * head;
            vf total = splat(1.0f / sum(load(&s.total[r * W])));
            for (int64_t d = 0; d < head; d += W) store(into + d, load(&s.outputs[r * head + d], head - d) * total, head - d);
        }
    }

    // The batch's token of which this tile's i-th group of rows is.
    int64_t token(int64_t i) const { return call.start(task.first + i / task.tokens) + task.token + i % task.tokens; }
};

// Ask for what a task reads first, while another runs: short contexts are over before the processor has seen a pattern.
template <class T>
void prefetch_task(const Call<T>& call, const Task& task) {
    const Cache& cache = call.cache;
    int64_t size = cache.block_size, position = call.position(task.first) + task.token;
    Sight sight = call.sight(task.first);
    int64_t begin = sight.begin / size, first = sight.find_exact(position) / size;
    if (call.sealed.data && begin < first) {
        UnitShape shape{cache.head_size, call.sealed.key_bits, call.sealed.value_bits};
        int64_t bytes = size / UNIT * shape.bytes();
        for (int64_t block = begin; block < std::min(first, begin + call.span_blocks()); block++) {
            const char* row = call.sealed.data + call.sealed_table(task.first, task.head)[block] * call.sealed.stride + task.head * bytes;
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
        }
        return;
    }
    int64_t end = std::min((position + task.tokens - 1) / size + 1, first + call.span_blocks());
    for (int64_t block = first; block < end; block++) {
        int64_t bytes = cache.head_size * size * sizeof(T), row = call.table(task.first, task.head)[block] * cache.stride + task.head * bytes;
        for (int64_t at = 0; at < bytes; at += 64) {
            __builtin_prefetch(cache.keys + row + at, 0, 2);
            __builtin_prefetch(cache.values + row + at, 0, 2);
        }
    }
}

// Sequences of one token first, and of these such with equal first blocks beside each other.
template <class T>
void order_sequences(Call<T>& call) {
    call.order.resize(call.batch.sequences);
    for (int64_t i = 0; i < call.batch.sequences; i++) call.order[i] = i;
    const int32_t* tables = call.sealed.data ? call.sealed.tables : call.batch.tables;
    int64_t stride = call.sealed.data ? call.sealed.table_stride : call.batch.table_stride;
    auto table = [&](int64_t s) { return tables + s * stride; };
    // Blocks beyond a sequence's last one are -1, whose bytes come behind those of any other.
    auto several = [&](int64_t s) { return call.batch.starts[s + 1] - call.batch.starts[s] > 1; };
    std::sort(call.order.begin(), call.order.end(), [&](int64_t a, int64_t b) {
        if (several(a) != several(b)) return several(b);
        int order = std::memcmp(table(a), table(b), stride * sizeof(int32_t));
        return order ? order < 0 : a < b;
    });
}

template <class T>
void attention(Rows queries, Cache cache, Sealed sealed, Batch batch, Attention spec, T* y) {
    Call<T> call{queries, cache, sealed, batch, spec, y, {}};
    order_sequences(call);
    int64_t group = call.group(), tile = std::max<int64_t>(1, TILE_ROWS / group), rows = tile * group;
    std::vector<Task> tasks;
    for (int64_t place = 0, next; place < batch.sequences; place = next) {
        for (next = place + 1; next < batch.sequences && next - place < tile && call.share(place, next, 0);) next++;
        for (int64_t h = 0; h < cache.kv_heads; h++)
            for (int64_t t = 0; t < call.length(place); t += tile)
                tasks.push_back({place, next - place, h, t, std::min(tile, call.length(place) - t)});
    }
    int64_t threads = Pool::get().threads(), count = (int64_t)tasks.size();
    Pool::get().run(count, [&](int64_t i, int) {
        // Kept between calls: clearing it would take longer than a short context does.
        static thread_local Scratch<T> scratch;
        scratch.fit(rows, call.span_blocks() * cache.block_size, cache.head_size);
        if (i + threads < count && tasks[i + threads].tokens == 1) prefetch_task(call, tasks[i + threads]);
        Worker<T>{call, tasks[i], scratch}.run();
    });
}

}  // namespace
