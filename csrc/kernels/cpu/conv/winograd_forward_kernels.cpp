// Winograd's convolution of stride 1, compiled once for each instruction set.
#include "kernels/cpu/conv/winograd_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

void (*winograd_forward(DType dtype, WinogradKind kind))(const WinogradJob&, void*) {
    switch (kind) {
        case WinogradKind::Strided:
            return winograd_strided(dtype);
        case WinogradKind::Spread:
            return winograd_spread(dtype);
        case WinogradKind::Square5:
            return winograd_square5(dtype);
        case WinogradKind::Row3:
            return winograd_row3(dtype);
        case WinogradKind::Row7:
            return winograd_row7(dtype);
        case WinogradKind::Dense:
            break;
    }
    return conv::forward_of<conv::DenseTile>(dtype);
}

}  // namespace pooling_ext::POOLING_EXT_ISA
