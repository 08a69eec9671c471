// Winograd's convolution of 5x5, compiled once for each instruction set.
#include "kernels/cpu/conv/winograd_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

void (*winograd_square5(DType dtype))(const WinogradJob&, void*) {
    return conv::forward_of<conv::Square5Tile>(dtype);
}

}  // namespace pooling_ext::POOLING_EXT_ISA
