// Activations of convolutions, one number at a time in float64.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/cpu/conv/activation_kind.h"

namespace pooling_ext {

inline double activated(Activation activation, double x, double slope) {
    const double six = std::min(std::max(x + 3, 0.0), 6.0);
    switch (activation) {
        case Activation::None:
            return x;
        case Activation::Relu:
            return std::max(x, 0.0);
        case Activation::Relu6:
            return std::min(std::max(x, 0.0), 6.0);
        case Activation::Silu:
            return x / (1 + std::exp(-x));
        case Activation::Hardswish:
            return x * six / 6;
        case Activation::LeakyRelu:
            return x > 0 ? x : x * slope;
        case Activation::Gelu:
            return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::GeluTanh:
            return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case Activation::Hardsigmoid:
            return six / 6;
    }
    return NAN;
}

}  // namespace pooling_ext
