// Activations and their derivatives, on registers. The functions are PyTorch's, NaN and infinities
// included.
//
// All is inlined, since some files are compiled with contraction of products and sums, and some are
// not.
#pragma once

#include <cmath>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "common/activation_kind.h"
#include "kernels/cpu/simd/numeric.h"

namespace pooling_ext::POOLING_EXT_ISA {

// Of float or double, which they are computed in.
template <class T>
struct Activations {
    typedef T X __attribute__((vector_size(kVectorBytes)));
    static constexpr int64_t kSize = kVectorBytes / int64_t(sizeof(T));

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

    // What a gradient of the activation's output is multiplied by, where x was its input; at NaN as
    // PyTorch's loops over single numbers have it.
    template <Activation kActivation>
    static POOLING_EXT_INLINE X derivative(X x, [[maybe_unused]] X slope) {
        const X zero{}, one = splat(1);
        if constexpr (kActivation == Activation::Relu) {
            return x <= zero ? zero : one;
        } else if constexpr (kActivation == Activation::Relu6) {
            return x <= zero ? zero : x >= splat(6) ? zero : one;
        } else if constexpr (kActivation == Activation::Silu) {
            const X sigmoid = one / (one + exp(-x));
            return sigmoid * (one + x * (one - sigmoid));
        } else if constexpr (kActivation == Activation::Hardswish) {
            const X inside = x / T(3) + T(0.5);
            return x <= splat(-3) ? zero : x < splat(3) ? inside : one;
        } else if constexpr (kActivation == Activation::LeakyRelu) {
            return x > zero ? one : slope;
        } else if constexpr (kActivation == Activation::Gelu) {
            const X density = T(0.39894228040143267794) * exp(T(-0.5) * x * x);
            return T(0.5) * (one + erf(x * T(0.70710678118654752440))) + x * density;
        } else if constexpr (kActivation == Activation::GeluTanh) {
            const X square = x * x;
            const X z = T(0.79788456080286535588) * x * (one + T(0.044715) * square);
            const X slope_of_z = T(0.79788456080286535588) * (one + T(3 * 0.044715) * square);
            const X share = one / (one + exp(T(-2) * z));  // (1 + tanh(z)) / 2
            const X rest = one / (one + exp(T(2) * z));    // 1 - share, which is not lost near 1
            return share + T(2) * x * slope_of_z * share * rest;
        } else if constexpr (kActivation == Activation::Hardsigmoid) {
            return x > splat(-3) ? x < splat(3) ? splat(T(1) / T(6)) : zero : zero;
        } else {
            return one;
        }
    }

    static POOLING_EXT_INLINE X splat(T value) { return value - X{}; }  // -0 stays -0

  private:
    typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

    static POOLING_EXT_INLINE X up_to_six(X x) {
        const X zero{}, six = splat(T(6));
        x = x < zero ? zero : x;
        return x > six ? six : x;
    }

    template <class Function>
    static POOLING_EXT_INLINE X each(X x, const Function& function) {
        alignas(64) T values[kSize];
        std::memcpy(values, &x, sizeof(x));
        for (T& value : values) value = function(value);
        std::memcpy(&x, values, sizeof(x));
        return x;
    }

    // e^x to about two units in the last place: 2^n e^r, |r| <= log(2) / 2, e^r by its series.
    static POOLING_EXT_INLINE X exp(X x) {
        if constexpr (std::is_same_v<T, double>) {
            return each(x, [](double value) { return std::exp(value); });
        } else {
            // Beyond these all is 0 or infinity.
            const X low = splat(-104), high = splat(89);
            X inside = x < low ? low : x;
            inside = inside > high ? high : inside;
            // Adding it rounds to an integer, which is then in the lowest bits.
            const X shifter = splat(0x1.8p23f);
            const X shifted = inside * 1.44269504f + shifter;
            const X n = shifted - shifter;
            const X r = inside - n * 0.693145752f - n * 1.42860682e-6f;
            X sum = splat(1 / 5040.0f);
            sum = sum * r + 1 / 720.0f;
            sum = sum * r + 1 / 120.0f;
            sum = sum * r + 1 / 24.0f;
            sum = sum * r + 1 / 6.0f;
            sum = sum * r + 0.5f;
            sum = sum * r + 1.0f;
            sum = sum * r + 1.0f;
#ifdef __AVX512F__
            // The instruction rounds once, as the two steps below do.
            if constexpr (sizeof(X) == 64)
                return (X)_mm512_maskz_scalef_ps(0xffff, (__m512)sum, (__m512)n);
#endif
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
            const X zero{}, one = splat(1), four = splat(4);
            const X size = x < zero ? -x : x, square = x * x;
            X small = splat(-9.67359045e-06f);
            small = small * square + 0.000112682538f;
            small = small * square - 0.000848439653f;
            small = small * square + 0.00522105341f;
            small = small * square - 0.0268654383f;
            small = small * square + 0.112837826f;
            small = small * square - 0.376126385f;
            small = small * square + 1.12837917f;
            const X inside = size > four ? four : size;
            X log = splat(1.05026873e-06f);
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

}  // namespace pooling_ext::POOLING_EXT_ISA
