#include "kernels/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "kernels/cpu/dispatch.h"

namespace pooling_ext {
namespace {

struct Variant {
    std::string name;
    int index;
};

std::vector<Variant> variants() {
    std::vector<Variant> found{{"baseline", 0}};
#ifdef POOLING_EXT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"avx2", 1});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd"))
        found.push_back({"avx512", 2});
#endif
    return found;
}

Variant choose() {
    const std::vector<Variant> found = variants();
    const char* wanted = std::getenv("POOLING_EXT_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return found.back();
    std::string names;
    for (const Variant& variant : found) {
        if (variant.name == wanted) return variant;
        names += (names.empty() ? "" : ", ") + variant.name;
    }
    throw std::invalid_argument("POOLING_EXT_CPU_ISA=" + std::string(wanted) +
                                " is not available on this machine; choose from " + names);
}

const Variant& chosen() {
    static const Variant variant = choose();
    return variant;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) names.push_back(variant.name);
    return names;
}

const std::string& chosen_isa() { return chosen().name; }

int chosen_isa_index() { return chosen().index; }

}  // namespace pooling_ext
