// Activations and their derivatives on a GPU, for the values that a thread holds. The functions are
// PyTorch's, NaN and infinities included.
//
// ReLU is not among them: kernels apply it themselves, and take no more registers than that needs.
// The others share one more instantiation of each kernel, which switches at run time: all threads
// branch alike, once for each vector, and such kernels wait for memory. An instantiation for each
// of the seven would take seven times as long to compile and as much room in the library.
#pragma once

#include <cmath>

#include "common/activation_kind.h"
#include "common/cuda.cuh"

namespace pooling_ext::cuda {

POOLING_EXT_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
POOLING_EXT_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
POOLING_EXT_DEVICE float exponential(float x) { return expf(x); }
POOLING_EXT_DEVICE double exponential(double x) { return exp(x); }
POOLING_EXT_DEVICE float error_function(float x) { return erff(x); }
POOLING_EXT_DEVICE double error_function(double x) { return erf(x); }
POOLING_EXT_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }
POOLING_EXT_DEVICE double reciprocal(double x) { return 1 / x; }

// 1 / (1 + e^-x) and its derivative, of which nothing is lost where the function is near 1.
template <class T>
struct Logistic {
    T value, derivative;

    explicit POOLING_EXT_DEVICE Logistic(T x) {
        const T power = exponential(x < 0 ? x : -x), share = reciprocal(1 + power);
        value = x < 0 ? power * share : share;
        derivative = power * share * share;
    }
};

template <class T>
POOLING_EXT_DEVICE T up_to_six(T x) {
    return x < 0 ? T(0) : x > 6 ? T(6) : x;
}

// What Gelu multiplies its argument by: the normal distribution's share below it.
template <class T>
POOLING_EXT_DEVICE T normal_share(T x) {
    return fused(error_function(x * T(0.70710678118654752440)), T(0.5), T(0.5));
}

// GeluTanh's (1 + tanh(z)) / 2 is the logistic function of 2 z.
constexpr double kTwiceRoot = 1.59576912160573071176;  // 2 sqrt(2 / pi)
constexpr double kCube = kTwiceRoot * 0.044715;

template <class T>
POOLING_EXT_DEVICE T twice_gelu_argument(T x) {
    return x * fused(T(kCube) * x, x, T(kTwiceRoot));
}

template <Activation kActivation, class T>
POOLING_EXT_DEVICE T activated(T x, [[maybe_unused]] T slope) {
    if constexpr (kActivation == Activation::Relu6) {
        return up_to_six(x);
    } else if constexpr (kActivation == Activation::Silu) {
        return x * Logistic<T>(x).value;
    } else if constexpr (kActivation == Activation::Hardswish) {
        return x * (up_to_six(x + 3) * T(1.0 / 6));
    } else if constexpr (kActivation == Activation::LeakyRelu) {
        return x > 0 ? x : x * slope;
    } else if constexpr (kActivation == Activation::Gelu) {
        return x * normal_share(x);
    } else if constexpr (kActivation == Activation::GeluTanh) {
        return x * Logistic<T>(twice_gelu_argument(x)).value;
    } else {
        static_assert(kActivation == Activation::Hardsigmoid);
        return up_to_six(x + 3) * T(1.0 / 6);
    }
}

// What a gradient of the activation's output is multiplied by, where x was its input.
template <Activation kActivation, class T>
POOLING_EXT_DEVICE T derivative(T x, [[maybe_unused]] T slope) {
    if constexpr (kActivation == Activation::Relu6) {
        return x <= 0 || x >= 6 ? T(0) : T(1);
    } else if constexpr (kActivation == Activation::Silu) {
        const Logistic<T> s(x);
        return fused(x, s.derivative, s.value);
    } else if constexpr (kActivation == Activation::Hardswish) {
        return x <= -3 ? T(0) : x < 3 ? fused(x, T(1.0 / 3), T(0.5)) : T(1);
    } else if constexpr (kActivation == Activation::LeakyRelu) {
        return x > 0 ? T(1) : slope;
    } else if constexpr (kActivation == Activation::Gelu) {
        const T density = T(0.39894228040143267794) * exponential(T(-0.5) * x * x);
        return fused(x, density, normal_share(x));
    } else if constexpr (kActivation == Activation::GeluTanh) {
        const Logistic<T> s(twice_gelu_argument(x));
        const T steepness = fused(T(3 * kCube) * x, x, T(kTwiceRoot));
        return fused(x * steepness, s.derivative, s.value);
    } else {
        static_assert(kActivation == Activation::Hardsigmoid);
        return x > -3 && x < 3 ? T(1.0 / 6) : T(0);
    }
}

// Puts the activation of each value, or its derivative there, in the value's place.
template <bool kDerivative, class T, int N>
POOLING_EXT_DEVICE void activate(Activation activation, T slope, T (&values)[N]) {
    const auto each = [&](auto kind) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if constexpr (kDerivative)
                values[i] = derivative<decltype(kind)::value>(values[i], slope);
            else
                values[i] = activated<decltype(kind)::value>(values[i], slope);
        }
    };
    switch (activation) {
        case Activation::Relu6:
            return each(std::integral_constant<Activation, Activation::Relu6>());
        case Activation::Silu:
            return each(std::integral_constant<Activation, Activation::Silu>());
        case Activation::Hardswish:
            return each(std::integral_constant<Activation, Activation::Hardswish>());
        case Activation::LeakyRelu:
            return each(std::integral_constant<Activation, Activation::LeakyRelu>());
        case Activation::Gelu:
            return each(std::integral_constant<Activation, Activation::Gelu>());
        case Activation::GeluTanh:
            return each(std::integral_constant<Activation, Activation::GeluTanh>());
        case Activation::Hardsigmoid:
            return each(std::integral_constant<Activation, Activation::Hardsigmoid>());
        default:
            return;  // kernels have the others
    }
}

// Where the derivative is 0 nothing passes, be it infinite.
template <class T>
POOLING_EXT_DEVICE T multiplied(T derivative, T grad) {
    return derivative == 0 ? T(0) : derivative * grad;
}

}  // namespace pooling_ext::cuda
