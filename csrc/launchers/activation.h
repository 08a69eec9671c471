// An activation from the number that an operator takes.
#pragma once

#include "common/pool_call.h"
#include "kernels/cpu/conv/activation_kind.h"

namespace pooling_ext {

inline Activation activation_of(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number < kActivations,
                    "pooling_ext: activation must be from 0 to ", kActivations - 1, ", but got ",
                    number);
    return Activation(number);
}

}  // namespace pooling_ext
