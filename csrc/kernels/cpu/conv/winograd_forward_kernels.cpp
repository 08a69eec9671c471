// Winograd's convolution of stride 1, compiled once for each instruction set.
#include "kernels/cpu/conv/winograd_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

void (*winograd_forward(DType dtype, WinogradKind kind))(const WinogradJob&, void*) {
    switch (kind) {
        case WinogradKind::Strided:
            return winograd_strided(dtype);
        case WinogradKind::Spread:
            return winograd_spread(dtype);
        default:
            return conv::forward_of<conv::DenseTile>(dtype);
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
