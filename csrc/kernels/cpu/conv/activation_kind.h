// The activations that a convolution's epilogue may have.
#pragma once

#include <cstdint>

namespace pooling_ext {

// In the order of pooling_ext/ops/conv_activations.py.
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

}  // namespace pooling_ext
