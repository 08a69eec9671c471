// How the Winograd kernels of one instruction set find each other.
#pragma once

#include "kernels/cpu/conv/winograd.h"

namespace pooling_ext::POOLING_EXT_ISA {

// Each returns nullptr for what it has no kernel for.
void (*winograd_weight(DType dtype, WinogradKind kind))(const WinogradWeightJob&, int64_t begin,
                                                        int64_t end);
void (*winograd_forward(DType dtype, WinogradKind kind))(const WinogradJob&, void* scratch);
void (*winograd_strided(DType dtype))(const WinogradJob&, void* scratch);
void (*winograd_spread(DType dtype))(const WinogradJob&, void* scratch);
void (*winograd_square5(DType dtype))(const WinogradJob&, void* scratch);
void (*winograd_row3(DType dtype))(const WinogradJob&, void* scratch);
void (*winograd_row7(DType dtype))(const WinogradJob&, void* scratch);
void (*winograd_grad(DType dtype, WinogradKind kind))(const WinogradGradJob&, const WinogradRegion&,
                                                      int64_t first, int64_t last, void* sums,
                                                      void* scratch);
void (*winograd_grad_end(DType dtype, WinogradKind kind))(const WinogradGradJob&,
                                                          const WinogradRegion&, const void* sums,
                                                          int64_t splits);

}  // namespace pooling_ext::POOLING_EXT_ISA
