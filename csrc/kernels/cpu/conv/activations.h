// Activations on vectors, for the epilogues of convolutions.
#pragma once

#include "kernels/cpu/conv/lanes.h"
#include "kernels/cpu/conv/winograd.h"

namespace pooling_ext::POOLING_EXT_ISA {

// Vector mathematics of a type that is computed in.
template <class T>
struct Math {
    using L = Lanes<T>;
    using X = typename L::X;
    using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    typedef Int Ints __attribute__((vector_size(kVectorBytes)));

    static POOLING_EXT_INLINE X clamp(X x, T low, T high) {
        x = x < low ? L::splat(low) : x;  // a NaN stays
        return x > high ? L::splat(high) : x;
    }

    // By argument reduction to |r| <= log(2) / 2 and a polynomial, to about two units in the last
    // place; float64 lane by lane.
    static POOLING_EXT_INLINE X exp(X x) {
        if constexpr (sizeof(T) == 8) {
            for (int64_t i = 0; i < L::kCount; ++i) x[i] = __builtin_exp(x[i]);
            return x;
        } else {
            const X given = x;
            x = clamp(x, T(-87.33654), T(88.37626));
            const X shifted = x * T(1.44269504088896341) + T(0x1.8p23);  // rounds to nearest
            const X n = shifted - T(0x1.8p23);
            const X r = (x - n * T(0.693359375)) + n * T(2.12194440e-4);
            X p = T(1.9875691500e-4) * r + T(1.3981999507e-3);
            p = p * r + T(8.3334519073e-3);
            p = p * r + T(4.1665795894e-2);
            p = p * r + T(1.6666665459e-1);
            p = p * r + T(5.0000001201e-1);
            p = p * r * r + r + T(1);
            const Ints power = (__builtin_convertvector(n == n ? n : X{}, Ints) + 127) << 23;
            X result = p * (X)power;
            result = given > T(88.72284) ? L::splat(T(__builtin_inff())) : result;
            result = given < T(-87.33654) ? X{} : result;
            return given != given ? given : result;
        }
    }

    static POOLING_EXT_INLINE X sigmoid(X x) { return T(1) / (T(1) + exp(-x)); }

    static POOLING_EXT_INLINE X tanh(X x) {
        // Of |x|, so that nothing overflows.
        const X size = x < T(0) ? -x : x, e = exp(T(-2) * size);
        const X t = (T(1) - e) / (T(1) + e);
        return x < T(0) ? -t : t;
    }

    static POOLING_EXT_INLINE X erf(X x) {
        if constexpr (sizeof(T) == 8)
            for (int64_t i = 0; i < L::kCount; ++i) x[i] = __builtin_erf(x[i]);
        else
            for (int64_t i = 0; i < L::kCount; ++i) x[i] = __builtin_erff(x[i]);
        return x;
    }
};

// Those that take more than a comparison are not inlined into every use.
template <class T>
__attribute__((noinline)) void activate_slowly(typename Lanes<T>::X* values, int64_t n,
                                               Activation activation, double slope) {
    using M = Math<T>;
    using X = typename M::X;
    const auto each = [&](const auto& function) {
        for (int64_t i = 0; i < n; ++i) values[i] = function(values[i]);
    };
    const T by = T(slope);
    switch (activation) {
        case Activation::None:
        case Activation::Relu:
            return;
        case Activation::Relu6:
            return each([](X x) { return M::clamp(x, T(0), T(6)); });
        case Activation::Silu:
            return each([](X x) { return x / (T(1) + M::exp(-x)); });
        case Activation::Hardswish:
            return each([](X x) { return x * M::clamp(x + T(3), T(0), T(6)) / T(6); });
        case Activation::LeakyRelu:
            return each([by](X x) { return x > T(0) ? x : x * by; });
        case Activation::Gelu:
            return each(
                [](X x) { return T(0.5) * x * (T(1) + M::erf(x * T(0.70710678118654752440))); });
        case Activation::GeluTanh:
            return each([](X x) {
                const X inner = T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
                return T(0.5) * x * (T(1) + M::tanh(inner));
            });
        case Activation::Hardsigmoid:
            return each([](X x) { return M::clamp(x + T(3), T(0), T(6)) / T(6); });
    }
}

template <class T>
POOLING_EXT_INLINE void activate(typename Lanes<T>::X* values, int64_t n, Activation activation,
                                 double slope) {
    if (activation == Activation::Relu) {
        for (int64_t i = 0; i < n; ++i)
            values[i] = values[i] < T(0) ? typename Lanes<T>::X{} : values[i];
    } else if (activation != Activation::None) {
        activate_slowly<T>(values, n, activation, slope);
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
