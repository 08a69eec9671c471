// The kernels of an operator for each instruction set, and types by their DType.
#pragma once

#include <type_traits>

#include "common/pool_job.h"
#include "kernels/cpu/simd/numeric.h"

namespace pooling_ext {

// The instruction sets the kernels are compiled for: baseline, and on x86-64 avx2 and avx512.
#ifdef POOLING_EXT_X86
constexpr int kIsas = 3;
#else
constexpr int kIsas = 1;
#endif

// The one in use (isa.h), as an index among them.
int chosen_isa_index();

// Calls the function of the instruction set in use.
template <class Find>
class Dispatch;

template <class Result, class... Args>
class Dispatch<Result(Args...)> {
  public:
    template <class... Finds>
    constexpr explicit Dispatch(Finds... by_isa) : by_isa_{by_isa...} {}

    POOLING_EXT_INLINE Result operator()(Args... args) const {
        return by_isa_[chosen_isa_index()](args...);
    }

  private:
    Result (*by_isa_[kIsas])(Args...);
};

#define POOLING_EXT_KERNELS_OF(isa, name, ...) \
    namespace isa {                            \
    std::type_identity_t<__VA_ARGS__> name;    \
    }

// Declares the function that finds an operator's kernels, beside the operator:
//
//     POOLING_EXT_KERNELS(avg_pool, Kernel(DType))
//
// A *_kernels.cpp, which is compiled for each instruction set, defines avg_pool in the namespace
// POOLING_EXT_ISA; it returns nullptr for what it has no kernel for. Launchers call
// kernels::avg_pool. The linker brings them together: no file lists the operators, and nothing is
// registered when the library is loaded.
#ifdef POOLING_EXT_X86
#define POOLING_EXT_KERNELS(name, ...)                                                        \
    POOLING_EXT_KERNELS_OF(baseline, name, __VA_ARGS__)                                       \
    POOLING_EXT_KERNELS_OF(avx2, name, __VA_ARGS__)                                           \
    POOLING_EXT_KERNELS_OF(avx512, name, __VA_ARGS__)                                         \
    namespace kernels {                                                                       \
    inline constexpr Dispatch<__VA_ARGS__> name(&baseline::name, &avx2::name, &avx512::name); \
    }
#else
#define POOLING_EXT_KERNELS(name, ...)                            \
    POOLING_EXT_KERNELS_OF(baseline, name, __VA_ARGS__)           \
    namespace kernels {                                           \
    inline constexpr Dispatch<__VA_ARGS__> name(&baseline::name); \
    }
#endif

}  // namespace pooling_ext

namespace pooling_ext::POOLING_EXT_ISA {

// What `make` gives for a value of the floating type that `dtype` names, a pointer; nullptr for
// other types.
template <class Make>
auto for_float(DType dtype, Make make) -> decltype(make(float{})) {
    switch (dtype) {
        case DType::Float32:
            return make(float{});
        case DType::Float64:
            return make(double{});
        case DType::BFloat16:
            return make(BFloat16{});
        case DType::Float16:
            return make(Float16{});
        default:
            return nullptr;
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
