// Winograd's convolutions of one row or column, compiled once for each instruction set.
#include "kernels/cpu/conv/winograd_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

void (*winograd_row3(DType dtype))(const WinogradJob&, void*) {
    return conv::forward_of<conv::Row3Tile>(dtype);
}
void (*winograd_row7(DType dtype))(const WinogradJob&, void*) {
    return conv::forward_of<conv::Row7Tile>(dtype);
}

}  // namespace pooling_ext::POOLING_EXT_ISA
