// An activation from the number that an operator takes.
#pragma once

#include "common/activation_kind.h"
#include "common/pool_call.h"

namespace pooling_ext {

inline Activation activation_of(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number < kActivations,
                    "pooling_ext: activation must be from 0 to ", kActivations - 1, ", but got ",
                    number);
    return Activation(number);
}

}  // namespace pooling_ext
