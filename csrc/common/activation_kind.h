// The activations that a convolution or a batch norm may apply as it writes.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pooling_ext {

// In the order of pooling_ext/ops/activations.py.
enum class Activation {
    None,
    Relu,
    Relu6,
    Silu,
    Hardswish,
    LeakyRelu,
    Gelu,
    GeluTanh,
    Hardsigmoid
};

constexpr int64_t kActivations = int64_t(Activation::Hardsigmoid) + 1;

// Calls run(constant) with `activation` as a constant.
template <class Run, int64_t kFirst = 0>
__attribute__((always_inline)) inline void with_activation(Activation activation, const Run& run) {
    if (int64_t(activation) == kFirst)
        run(std::integral_constant<Activation, Activation(kFirst)>{});
    else if constexpr (kFirst + 1 < kActivations)
        with_activation<Run, kFirst + 1>(activation, run);
}

}  // namespace pooling_ext
