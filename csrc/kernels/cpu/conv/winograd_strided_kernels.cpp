// Winograd's convolution of stride 2 and the gradient of its input, compiled once for each
// instruction set.
#include "kernels/cpu/conv/winograd_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

void (*winograd_strided(DType dtype))(const WinogradJob&, void*) {
    return conv::forward_of<conv::StridedTile>(dtype);
}
void (*winograd_spread(DType dtype))(const WinogradJob&, void*) {
    return conv::forward_of<conv::SpreadTile>(dtype);
}

}  // namespace pooling_ext::POOLING_EXT_ISA
