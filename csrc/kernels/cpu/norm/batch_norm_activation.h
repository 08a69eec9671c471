// Activations of batch normalization beside ReLU, which its loops apply themselves.
//
// Values are kept for some elements at a time, in the fastest cache, so that a loop over them with
// one activation replaces a loop with all of them; that is compiled once for a type.
#pragma once

#include "kernels/cpu/norm/batch_norm.h"
#include "kernels/cpu/simd/activation.h"

namespace pooling_ext::POOLING_EXT_ISA {

template <class T, class Function>
POOLING_EXT_INLINE void each_register(T* values, int64_t n, const Function& function) {
    for (int64_t i = 0; i < n; i += Activations<T>::kSize) {
        typename Activations<T>::X x;
        std::memcpy(&x, values + i, sizeof(x));
        x = function(x);
        std::memcpy(values + i, &x, sizeof(x));
    }
}

// Puts the activation of each value, or its derivative there, in the value's place.
template <bool kDerivative, class T>
__attribute__((noinline)) void activate_values(T* values, int64_t n, const BatchNormJob& job) {
    using All = Activations<T>;
    const auto slope = All::splat(T(job.negative_slope));
    with_activation(job.activation, [&](auto activation) {
        each_register(values, n, [=](typename All::X x) POOLING_EXT_INLINE_LAMBDA {
            if constexpr (kDerivative)
                return All::template derivative<decltype(activation)::value>(x, slope);
            else
                return All::template apply<decltype(activation)::value>(x, slope);
        });
    });
}

// The values of up to kMost elements, given and taken back vector by vector in the same order.
template <class In, int64_t kMost>
class Values {
  public:
    using T = Accumulator<In>;

    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE void add(Kind kind, X x) {
        kind.keep(values_ + end_, x);
        end_ += int64_t(sizeof(X) / sizeof(T));
    }

    template <bool kDerivative>
    POOLING_EXT_INLINE void activate(const BatchNormJob& job) {
        constexpr int64_t kSize = Activations<T>::kSize;
        while (end_ % kSize != 0) values_[end_++] = T(0);  // what is left of the last register
        activate_values<kDerivative>(values_, end_, job);
        end_ = 0;
    }

    template <class Kind>
    POOLING_EXT_INLINE typename Kind::X take(Kind kind) {
        const auto x = kind.own(values_ + end_);
        end_ += int64_t(sizeof(x) / sizeof(T));
        return x;
    }

  private:
    alignas(64) T values_[kMost];
    int64_t end_ = 0;
};

}  // namespace pooling_ext::POOLING_EXT_ISA
