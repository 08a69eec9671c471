// Activations in a convolution's epilogue, on registers. The functions are PyTorch's, NaN and
// infinities included.
#pragma once

#include <cmath>

#include "kernels/cpu/conv/activation_kind.h"
#include "kernels/cpu/conv/lanes.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// Of float or double, which they are computed in.
template <class T>
struct Activations {
    using L = Lanes<T>;
    using X = typename L::X;

    template <Activation kActivation>
    static POOLING_EXT_INLINE X apply(X x, [[maybe_unused]] X slope) {
        const X zero{};
        if constexpr (kActivation == Activation::Relu) {
            return x < zero ? zero : x;
        } else if constexpr (kActivation == Activation::Relu6) {
            return up_to_six(x);
        } else if constexpr (kActivation == Activation::Silu) {
            return x / (T(1) + exp(-x));
        } else if constexpr (kActivation == Activation::Hardswish) {
            return x * up_to_six(x + T(3)) / T(6);
        } else if constexpr (kActivation == Activation::LeakyRelu) {
            return x > zero ? x : x * slope;
        } else if constexpr (kActivation == Activation::Gelu) {
            return x * T(0.5) * (T(1) + erf(x * T(0.70710678118654752440)));
        } else if constexpr (kActivation == Activation::GeluTanh) {
            // (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
            const X z = T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
            return x / (T(1) + exp(T(-2) * z));
        } else if constexpr (kActivation == Activation::Hardsigmoid) {
            return up_to_six(x + T(3)) / T(6);
        } else {
            return x;
        }
    }

    // Calls run(apply) with the function of one register that `activation` names. All of them are
    // inlined.
    template <class Run>
    static void with(Activation activation, T slope, const Run& run) {
        const X slopes = L::splat(slope);
        const auto use = [&]<Activation kActivation>() {
            run([slopes](X x)
                    __attribute__((always_inline)) { return apply<kActivation>(x, slopes); });
        };
        switch (activation) {
            case Activation::None:
                return use.template operator()<Activation::None>();
            case Activation::Relu:
                return use.template operator()<Activation::Relu>();
            case Activation::Relu6:
                return use.template operator()<Activation::Relu6>();
            case Activation::Silu:
                return use.template operator()<Activation::Silu>();
            case Activation::Hardswish:
                return use.template operator()<Activation::Hardswish>();
            case Activation::LeakyRelu:
                return use.template operator()<Activation::LeakyRelu>();
            case Activation::Gelu:
                return use.template operator()<Activation::Gelu>();
            case Activation::GeluTanh:
                return use.template operator()<Activation::GeluTanh>();
            case Activation::Hardsigmoid:
                return use.template operator()<Activation::Hardsigmoid>();
        }
    }

  private:
    typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

    static POOLING_EXT_INLINE X up_to_six(X x) {
        const X zero{}, six = L::splat(T(6));
        x = x < zero ? zero : x;
        return x > six ? six : x;
    }

    template <class Function>
    static POOLING_EXT_INLINE X each(X x, const Function& function) {
        alignas(64) T values[L::kSize];
        L::keep(values, x);
        for (T& value : values) value = function(value);
        return L::own(values);
    }

    // e^x to about two units in the last place: 2^n e^r, |r| <= log(2) / 2, e^r by its series.
    static POOLING_EXT_INLINE X exp(X x) {
        if constexpr (std::is_same_v<T, double>) {
            return each(x, [](double value) { return std::exp(value); });
        } else {
            // Beyond these all is 0 or infinity.
            const X low = L::splat(-104), high = L::splat(89);
            X inside = x < low ? low : x;
            inside = inside > high ? high : inside;
            // Adding it rounds to an integer, which is then in the lowest bits.
            const X shifter = L::splat(0x1.8p23f);
            const X shifted = inside * 1.44269504f + shifter;
            const X n = shifted - shifter;
            const X r = inside - n * 0.693145752f - n * 1.42860682e-6f;
            X sum = L::splat(1 / 5040.0f);
            sum = sum * r + 1 / 720.0f;
            sum = sum * r + 1 / 120.0f;
            sum = sum * r + 1 / 24.0f;
            sum = sum * r + 1 / 6.0f;
            sum = sum * r + 0.5f;
            sum = sum * r + 1.0f;
            sum = sum * r + 1.0f;
            // In two steps, since 2^128 and 2^-150 are no floats of their own.
            const Integers whole = (Integers)shifted - 0x4b400000, half = whole >> 1;
            const X result = sum * (X)((half + 127) << 23) * (X)((whole - half + 127) << 23);
            return x != x ? x : result;
        }
    }

    // Polynomials fitted to erf(x) / x in x^2 up to 1, and to log(erfc(x)) up to 4, where erf is 1
    // in float32.
    static POOLING_EXT_INLINE X erf(X x) {
        if constexpr (std::is_same_v<T, double>) {
            return each(x, [](double value) { return std::erf(value); });
        } else {
            const X zero{}, one = L::splat(1), four = L::splat(4);
            const X size = x < zero ? -x : x, square = x * x;
            X small = L::splat(-9.67359045e-06f);
            small = small * square + 0.000112682538f;
            small = small * square - 0.000848439653f;
            small = small * square + 0.00522105341f;
            small = small * square - 0.0268654383f;
            small = small * square + 0.112837826f;
            small = small * square - 0.376126385f;
            small = small * square + 1.12837917f;
            const X inside = size > four ? four : size;
            X log = L::splat(1.05026873e-06f);
            log = log * inside - 1.69219612e-05f;
            log = log * inside + 9.70534441e-05f;
            log = log * inside - 3.5038107e-05f;
            log = log * inside - 0.00299998026f;
            log = log * inside + 0.0232165662f;
            log = log * inside - 0.106264311f;
            log = log * inside - 0.634690492f;
            log = log * inside - 1.12900318f;
            log = log * inside + 8.97465964e-05f;
            const X large = one - exp(log);
            return size < one ? x * small : x < zero ? -large : large;
        }
    }
};

// The same, for loops that all activations inlined would make too long.
template <class T>
__attribute__((noinline)) void activate_out_of_line(typename Lanes<T>::X* values, int64_t n,
                                                    Activation activation, T slope) {
    Activations<T>::with(activation, slope, [=](const auto& apply) {
        for (int64_t i = 0; i < n; ++i) values[i] = apply(values[i]);
    });
}

// ReLU is inlined.
template <class T>
POOLING_EXT_INLINE void activate(typename Lanes<T>::X* values, int64_t n, Activation activation,
                                 T slope) {
    if (activation == Activation::Relu)
        for (int64_t i = 0; i < n; ++i)
            values[i] =
                Activations<T>::template apply<Activation::Relu>(values[i], typename Lanes<T>::X{});
    else if (activation != Activation::None)
        activate_out_of_line<T>(values, n, activation, slope);
}

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
