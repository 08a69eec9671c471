// The kernels of max pooling whose machine code tests/gpu/cuda_machine_code.py reads.
#include "kernels/cuda/pool/max_pool_cells.cuh"
#include "kernels/cuda/pool/max_pool_rows.cuh"

namespace pooling_ext::cuda {

using Stem = Square<3, 2, 1>;
using Halves = Square<2, 2, 0>;
using Same = Square<3, 1, 1>;

#define POOLING_EXT_ROWS(Columns, Window)                                      \
    template __global__ void                                                   \
        max_pool_rows<AsTheyAre<typename Columns::In>, Columns, Window, true>( \
            AsTheyAre<typename Columns::In>, ForwardCall, Geometry<int>, Walk);
#define POOLING_EXT_CELLS(Cells, Window, In)                                                    \
    template __global__ void max_pool_cells<ToWinner<In, uint8_t>, Window,                      \
                                            Cells<ToWinner<In, uint8_t>, Window, kVector<In>>>( \
        ToWinner<In, uint8_t>, BackwardCall, Geometry<int>, Walk);

#define POOLING_EXT_WINDOW(Window)                                      \
    using Pixels##Window = PixelColumns<TwoLanes<BFloat16>, Window, 4>; \
    using Runs##Window = RunColumns<TwoLanes<BFloat16>, Window, 4>;     \
    using Floats##Window = PixelColumns<OneLane<float>, Window, 4>;     \
    POOLING_EXT_ROWS(Pixels##Window, Window)                            \
    POOLING_EXT_ROWS(Runs##Window, Window)                              \
    POOLING_EXT_ROWS(Floats##Window, Window)                            \
    POOLING_EXT_CELLS(PixelCells, Window, BFloat16)                     \
    POOLING_EXT_CELLS(RunCells, Window, BFloat16)                       \
    POOLING_EXT_CELLS(PixelCells, Window, float)

POOLING_EXT_WINDOW(Stem)
POOLING_EXT_WINDOW(Halves)
POOLING_EXT_WINDOW(Same)

}  // namespace pooling_ext::cuda
