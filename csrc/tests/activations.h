// Activations and their derivatives, one number at a time in float64.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/activation_kind.h"

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

inline double derivative(Activation activation, double x, double slope) {
    const double sigmoid = 1 / (1 + std::exp(-x)), root = std::sqrt(2 / M_PI);
    switch (activation) {
        case Activation::None:
            return 1;
        case Activation::Relu:
            return x > 0;
        case Activation::Relu6:
            return x > 0 && x < 6;
        case Activation::Silu:
            return sigmoid * (1 + x * (1 - sigmoid));
        case Activation::Hardswish:
            return x <= -3 ? 0 : x < 3 ? x / 3 + 0.5 : 1;
        case Activation::LeakyRelu:
            return x > 0 ? 1 : slope;
        case Activation::Gelu:
            return (1 + std::erf(x / std::sqrt(2.0))) / 2 +
                   x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
        case Activation::GeluTanh: {
            const double t = std::tanh(root * (x + 0.044715 * x * x * x));
            return (1 + t) / 2 + x / 2 * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x);
        }
        case Activation::Hardsigmoid:
            return x > -3 && x < 3 ? 1.0 / 6 : 0;
    }
    return NAN;
}

// Whether the derivative jumps no further than `room` from x.
inline bool bends_near(double x, double room) {
    for (const double bend : {0.0, -3.0, 3.0, 6.0})
        if (std::abs(x - bend) <= room) return true;
    return false;
}

}  // namespace pooling_ext
