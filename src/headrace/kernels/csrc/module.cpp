// The Python module: chooses a table of kernels once, and passes addresses and shapes on. cpu.py checks the tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"

namespace nb = nanobind;
using namespace headrace;

namespace {

std::vector<const Table*> list_tables() {
    std::vector<const Table*> tables;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        tables.push_back(&table_avx512());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&table_avx2());
#endif
    tables.push_back(&table_portable());
    return tables;
}

const Table* chosen = list_tables().front();

void use_instruction_set(const std::string& name) {
    for (const Table* table : list_tables())
        if (name == table->name) {
            chosen = table;
            return;
        }
    throw std::invalid_argument("this processor has no " + name);
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Rows rows_of(nb::tuple t) {
    return {at<void>(nb::cast<uintptr_t>(t[0])), nb::cast<int64_t>(t[1]), nb::cast<int64_t>(t[2]), nb::cast<int64_t>(t[3]),
            nb::cast<int64_t>(t[4])};
}

Cache cache_of(nb::tuple t) {
    return {at<void>(nb::cast<uintptr_t>(t[0])), at<void>(nb::cast<uintptr_t>(t[1])), nb::cast<int64_t>(t[2]),
            nb::cast<int64_t>(t[3]), nb::cast<int64_t>(t[4])};
}

Batch batch_of(nb::tuple t) {
    return {nb::cast<int64_t>(t[0]), at<int32_t>(nb::cast<uintptr_t>(t[1])), at<int32_t>(nb::cast<uintptr_t>(t[2])),
            at<int32_t>(nb::cast<uintptr_t>(t[3])), nb::cast<int64_t>(t[4])};
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Table* table : list_tables()) names.push_back(table->name);
        return names;
    });
    m.def("instruction_set", [] { return std::string(chosen->name); });
    m.def("use_instruction_set", &use_instruction_set);
    m.def("pack", [](uintptr_t weight, uintptr_t packed, int64_t out, int64_t in) {
        chosen->pack(at<float>(weight), at<float>(packed), out, in);
    });
    m.def("linear", [](uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t y, int64_t rows, int64_t out, int64_t in) {
        nb::gil_scoped_release release;
        chosen->linear(at<float>(x), at<float>(packed), at<float>(bias), at<float>(y), rows, out, in);
    });
    m.def("rms_norm", [](int type, nb::tuple x, uintptr_t weight, float eps, uintptr_t y) {
        chosen->rms_norm(Type(type), rows_of(x), at<float>(weight), eps, at<void>(y));
    });
    m.def("add_rms_norm", [](int type, nb::tuple x, uintptr_t residual, uintptr_t weight, float eps, uintptr_t y) {
        chosen->add_rms_norm(Type(type), rows_of(x), at<void>(residual), at<float>(weight), eps, at<void>(y));
    });
    m.def("gated_activation", [](int type, uintptr_t gate_up, uintptr_t y, int64_t rows, int64_t size, bool gelu) {
        chosen->gated(Type(type), at<void>(gate_up), at<void>(y), rows, size, gelu);
    });
    m.def("rotate", [](int type, nb::tuple heads, uintptr_t cos, uintptr_t sin) {
        chosen->rotate(Type(type), rows_of(heads), at<float>(cos), at<float>(sin));
    });
    m.def("write_kv", [](int type, nb::tuple keys, nb::tuple values, nb::tuple cache, uintptr_t slots) {
        chosen->write_kv(Type(type), rows_of(keys), rows_of(values), cache_of(cache), at<int64_t>(slots));
    });
    m.def("attention", [](int type, nb::tuple queries, nb::tuple cache, nb::tuple batch, nb::tuple spec, uintptr_t y) {
        Attention attention{nb::cast<float>(spec[0]), nb::cast<int64_t>(spec[1]), nb::cast<float>(spec[2])};
        Rows q = rows_of(queries);
        Cache c = cache_of(cache);
        Batch b = batch_of(batch);
        nb::gil_scoped_release release;
        chosen->attention(Type(type), q, c, b, attention, at<void>(y));
    });
}
