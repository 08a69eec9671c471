// Activations in a convolution's epilogue.
#pragma once

#include "kernels/cpu/conv/lanes.h"
#include "kernels/cpu/simd/activation.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// Calls run(apply) with the function of one register that `activation` names.
template <class T, class Run>
POOLING_EXT_INLINE void with_function(Activation activation, T slope, const Run& run) {
    using All = Activations<T>;
    const typename All::X slopes = All::splat(slope);
    with_activation(activation, [&](auto constant) POOLING_EXT_INLINE_LAMBDA {
        run([slopes](typename All::X x) POOLING_EXT_INLINE_LAMBDA {
            return All::template apply<decltype(constant)::value>(x, slopes);
        });
    });
}

// The same, for loops that all activations inlined would make too long.
template <class T>
__attribute__((noinline)) void activate_out_of_line(typename Lanes<T>::X* values, int64_t n,
                                                    Activation activation, T slope) {
    with_function<T>(activation, slope, [=](const auto& apply) {
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
