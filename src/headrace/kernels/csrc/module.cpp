// The Python module: tables of kernels, one for each instruction set, whose methods pass addresses and shapes on. cpu.py checks
// the tensors.
#if defined(__linux__)
#include <malloc.h>
#endif
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"
#include "table.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

std::vector<const Table*> list_tables() {
    std::vector<const Table*> tables;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
        if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&table_avx512_bf16());
        tables.push_back(&table_avx512());
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) tables.push_back(&table_avx2());
#endif
    tables.push_back(&table_portable());
    return tables;
}

const Table* find_table(const std::string& name) {
    for (const Table* table : list_tables())
        if (name == table->name) return table;
    throw std::invalid_argument("this processor has no " + name);
}

#if defined(__GLIBC__)
// Allocations up to 1 GiB come from memory that was freed before; older releases of the library allow 32 MiB at most. False
// if neither can be had: then it chooses by itself, which a limit on trimming alone would end.
bool keep_freed_memory() {
    return (mallopt(M_MMAP_THRESHOLD, 1 << 30) || mallopt(M_MMAP_THRESHOLD, 1 << 25)) && mallopt(M_TRIM_THRESHOLD, 1 << 30);
}
#else
bool keep_freed_memory() { return false; }
#endif

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Rows rows_of(nb::tuple t) {
    return {at<void>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]), nb::cast<int64_t>(t[3]),
            nb::cast<int64_t>(t[4])};
}

Cache cache_of(nb::tuple t) {
    return {at<char>(nb::cast<uintptr_t>(t[0])), at<char>(nb::cast<uintptr_t>(t[1])), at<char>(nb::cast<uintptr_t>(t[2])),
            nb::cast<int64_t>(t[3]), nb::cast<int64_t>(t[4]), nb::cast<int64_t>(t[5]), nb::cast<int64_t>(t[6])};
}

Sealed sealed_of(nb::tuple t) {
    return {at<char>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]), nb::cast<int64_t>(t[3]),
            nb::cast<int64_t>(t[4]), nb::cast<int64_t>(t[5]), at<int32_t>(nb::cast<uintptr_t>(t[6])), nb::cast<int64_t>(t[7]),
            nb::cast<int64_t>(t[8]), at<char>(nb::cast<uintptr_t>(t[9]))};
}

Batch batch_of(nb::tuple t) {
    return {nb::cast<int64_t>(t[0]), at<int32_t>(nb::cast<uintptr_t>(t[1])), at<int32_t>(nb::cast<uintptr_t>(t[2])),
            at<int32_t>(nb::cast<uintptr_t>(t[3])), nb::cast<int64_t>(t[4]), nb::cast<int64_t>(t[5]),
            at<int32_t>(nb::cast<uintptr_t>(t[6]))};
}

Attention attention_of(nb::tuple t) { return {nb::cast<float>(t[0]), nb::cast<int64_t>(t[1]), nb::cast<float>(t[2])}; }

Weight weight_of(nb::tuple t) {
    return {Type(nb::cast<int>(t[0])),    at<void>(nb::cast<uintptr_t>(t[1])),  nb::cast<int64_t>(t[2]),
            nb::cast<int64_t>(t[3]),      nb::cast<int64_t>(t[4]),              Gate(nb::cast<int>(t[5])),
            at<float>(nb::cast<uintptr_t>(t[6])), at<float>(nb::cast<uintptr_t>(t[7])), nb::cast<int64_t>(t[8]),
            at<half>(nb::cast<uintptr_t>(t[9])),  at<half>(nb::cast<uintptr_t>(t[10])),
            at<float>(nb::cast<uintptr_t>(t[11]))};
}

Heads heads_of(nb::tuple t) {
    return {at<void>(nb::cast<uintptr_t>(t[0])),  nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]),
            at<float>(nb::cast<uintptr_t>(t[3])), at<float>(nb::cast<uintptr_t>(t[4])), nb::cast<float>(t[5]),
            at<float>(nb::cast<uintptr_t>(t[6])), at<float>(nb::cast<uintptr_t>(t[7]))};
}

Vectors vectors_of(nb::tuple t) {
    return {at<char>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]), nb::cast<int64_t>(t[3]),
            nb::cast<int64_t>(t[4]),             nb::cast<int64_t>(t[5]), nb::cast<bool>(t[6]),    nb::cast<bool>(t[7])};
}

Unpacked unpacked_of(nb::tuple t) {
    return {at<int64_t>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), at<float>(nb::cast<uintptr_t>(t[2])),
            at<int64_t>(nb::cast<uintptr_t>(t[3]))};
}

Shadow shadow_of(nb::tuple t) {
    return {at<int32_t>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]), nb::cast<int64_t>(t[3]),
            at<void>(nb::cast<uintptr_t>(t[4])),    at<int32_t>(nb::cast<uintptr_t>(t[5])),
            at<float>(nb::cast<uintptr_t>(t[6])),   at<float>(nb::cast<uintptr_t>(t[7])), nb::cast<float>(t[8])};
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Table* table : list_tables()) names.push_back(table->name);
        return names;
    });
    m.def("find_table", &find_table, nb::rv_policy::reference);
    m.def("keep_freed_memory", &keep_freed_memory);
    m.def("set_threads", [](int threads) {
        nb::gil_scoped_release release;
        Pool::get().resize(threads);
    });
    m.def("threads", [] { return Pool::get().threads(); });
    nb::class_<Weight>(m, "Weight").def("__init__", [](Weight* self, nb::tuple parts) { new (self) Weight(weight_of(parts)); })
        .def("expect_next", [](Weight& self, uintptr_t next, int64_t bytes) { self.next = at<void>(next); self.next_bytes = bytes; });
    nb::class_<Table> table(m, "Table");
    table.def_prop_ro("instruction_set", [](const Table& self) { return std::string(self.name); });
    table.def("multiply_registers", [](const Table& self, int type, int64_t rounds) {
        nb::gil_scoped_release release;
        return self.multiply_registers(Type(type), rounds);
    });
    table.def("sweep", [](const Table& self, int kind, uintptr_t data, int64_t bytes) {
        nb::gil_scoped_release release;
        self.sweep(Sweep(kind), at<char>(data), bytes);
    });
    table.def("pack", [](const Table& self, uintptr_t from, const Weight& weight, uintptr_t into) {
        nb::gil_scoped_release release;
        self.pack(at<void>(from), weight, at<void>(into));
    });
    table.def("linear", [](const Table& self, int type, uintptr_t x, int64_t rows, const Weight& weight, int result, uintptr_t y) {
        nb::gil_scoped_release release;
        self.linear(Type(type), at<void>(x), rows, Norm{}, weight, Type(result), at<void>(y));
    });
    table.def("find_largest", [](const Table& self, int type, uintptr_t x, int64_t rows, const Weight& weight, uintptr_t y) {
        nb::gil_scoped_release release;
        self.find_largest(Type(type), at<void>(x), rows, weight, at<int64_t>(y));
    });
    table.def("norm_linear", [](const Table& self, int type, uintptr_t x, int64_t rows, uintptr_t residual, uintptr_t norm,
                                float eps, const Weight& weight, uintptr_t y) {
        nb::gil_scoped_release release;
        self.linear(Type(type), at<void>(x), rows, Norm{at<void>(residual), at<float>(norm), eps}, weight, Type(type), at<void>(y));
    });
    table.def("rms_norm", [](const Table& self, int type, uintptr_t x, uintptr_t weight, float eps, int64_t rows, int64_t size,
                             uintptr_t y) {
        nb::gil_scoped_release release;
        self.rms_norm(Type(type), at<void>(x), at<float>(weight), eps, rows, size, at<void>(y));
    });
    table.def("add_rms_norm", [](const Table& self, int type, uintptr_t x, uintptr_t residual, uintptr_t weight, float eps,
                                 int64_t rows, int64_t size, uintptr_t y) {
        nb::gil_scoped_release release;
        self.add_rms_norm(Type(type), at<void>(x), at<void>(residual), at<float>(weight), eps, rows, size, at<void>(y));
    });
    table.def("place_heads", [](const Table& self, int type, nb::tuple heads, nb::tuple cache, uintptr_t slots) {
        Heads h = heads_of(heads);
        Cache c = cache_of(cache);
        nb::gil_scoped_release release;
        self.place_heads(Type(type), h, c, at<int64_t>(slots));
    });
    table.def("attention", [](const Table& self, int type, nb::tuple queries, nb::tuple cache, nb::tuple sealed, nb::tuple batch,
                              nb::tuple spec, uintptr_t y) {
        Attention attention = attention_of(spec);
        Rows q = rows_of(queries);
        Cache c = cache_of(cache);
        Sealed s = sealed_of(sealed);
        Batch b = batch_of(batch);
        nb::gil_scoped_release release;
        self.attention(Type(type), q, c, s, b, attention, at<void>(y));
    });
    table.def("seal", [](const Table& self, int type, nb::tuple cache, nb::tuple sealed, uintptr_t from, uintptr_t into,
                         int64_t count) {
        Cache c = cache_of(cache);
        Sealed s = sealed_of(sealed);
        nb::gil_scoped_release release;
        self.seal(Type(type), c, s, at<int32_t>(from), at<int32_t>(into), count);
    });
    table.def("move_tokens", [](const Table& self, int type, nb::tuple cache, uintptr_t blocks, uintptr_t slots, int64_t count,
                                int64_t into) {
        Cache c = cache_of(cache);
        nb::gil_scoped_release release;
        self.move_tokens(Type(type), c, {at<int32_t>(blocks), at<int64_t>(slots), count, into});
    });
    table.def("unpack", [](const Table& self, int type, nb::tuple form, nb::tuple wanted, int64_t head, uintptr_t into) {
        Vectors v = vectors_of(form);
        Unpacked u = unpacked_of(wanted);
        nb::gil_scoped_release release;
        self.unpack(Type(type), v, u, head, at<void>(into));
    });
    table.def("recall", [](const Table& self, int type, nb::tuple queries, nb::tuple cache, nb::tuple shadow) {
        Rows q = rows_of(queries);
        Cache c = cache_of(cache);
        Shadow s = shadow_of(shadow);
        nb::gil_scoped_release release;
        self.recall(Type(type), q, c, s);
    });
    table.def("observe", [](const Table& self, int type, nb::tuple queries, nb::tuple cache, nb::tuple batch, nb::tuple spec,
                            uintptr_t mass, uintptr_t firsts, float share) {
        Attention attention = attention_of(spec);
        Rows q = rows_of(queries);
        Cache c = cache_of(cache);
        Batch b = batch_of(batch);
        nb::gil_scoped_release release;
        self.observe(Type(type), q, c, b, attention, {at<char>(mass), at<int32_t>(firsts), share});
    });
}
