// How a gradient passes back through the activation, for each Gate.
//
// For one file, in an unnamed namespace: the compiler then sees every caller when it decides what
// to inline.
#pragma once

#include "kernels/cpu/norm/batch_norm_activation.h"
#include "kernels/cpu/norm/batch_norm_rows.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class Run>
void with_gate(Gate gate, const Run& run) {
    switch (gate) {
        case Gate::None:
            return run(std::integral_constant<Gate, Gate::None>{});
        case Gate::Relu:
            return run(std::integral_constant<Gate, Gate::Relu>{});
        case Gate::Relu6:
            return run(std::integral_constant<Gate, Gate::Relu6>{});
        case Gate::ReluOutput:
            return run(std::integral_constant<Gate, Gate::ReluOutput>{});
        case Gate::Derivative:
            return run(std::integral_constant<Gate, Gate::Derivative>{});
        case Gate::DerivativeKept:
            return run(std::integral_constant<Gate, Gate::DerivativeKept>{});
        case Gate::DerivativeOfSum:
            return run(std::integral_constant<Gate, Gate::DerivativeOfSum>{});
    }
}

constexpr bool derives(Gate gate) {
    return gate == Gate::Derivative || gate == Gate::DerivativeKept ||
           gate == Gate::DerivativeOfSum;
}

// Where the derivative is 0 nothing passes, be it infinite.
template <class Kind, class X = typename Kind::X>
POOLING_EXT_INLINE X multiplied(Kind, X derivative, X grad) {
    using T = typename Kind::T;
    return by_registers<T, T>(derivative, grad,
                              [](auto factor, auto given) POOLING_EXT_INLINE_LAMBDA {
                                  const decltype(factor) zero{};
                                  return factor == zero ? zero : factor * given;
                              });
}

struct NoDerivatives {};

// Those at up to kMost elements and, where vectors overlap, at one more vector.
template <Gate kGate, class In, int64_t kMost>
using Derivatives =
    std::conditional_t<derives(kGate), Values<In, kMost + Vector<In>::kSize>, NoDerivatives>;

}  // namespace
}  // namespace pooling_ext::POOLING_EXT_ISA
