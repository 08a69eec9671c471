// Max pooling. NaN wins over everything, the last one if there are several; of equal maxima the
// first wins.
#include <limits>

#include "kernels/cuda/pool/max_pool.h"
#include "kernels/cuda/pool/max_pool_cells.cuh"
#include "kernels/cuda/pool/max_pool_rows.cuh"
#include "kernels/cuda/pool/pool_backward.cuh"
#include "kernels/cuda/pool/pool_forward.cuh"

namespace pooling_ext::cuda {
namespace {

// `Offset` is what offsets in a window are counted in; void where nobody asks for them.
template <class In_, class Offset>
struct MaxOp {
    using In = In_;
    static constexpr bool kOffsets = !std::is_void_v<Offset>, kAverages = false;
    static constexpr bool kVectors = !std::is_integral_v<In>, kSquares = false;
    using Wide = MaxOp<In, std::conditional_t<kOffsets, int64_t, void>>;

    // Floats of 16 bits are compared as float32, which holds them exactly.
    static constexpr bool kWidens = !std::is_integral_v<In>;
    static constexpr auto type() {
        if constexpr (kWidens)
            return Accumulator<In>();
        else
            return In();
    }
    using T = decltype(type());
    static constexpr T kLowest =
        kWidens ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::lowest();

    struct Value {
        T value;
    };
    template <class P>
    struct Winner {
        T value;
        P offset;
    };
    using Acc =
        std::conditional_t<kOffsets, Winner<std::conditional_t<kOffsets, Offset, int>>, Value>;

    MaxOp() = default;
    template <class Other>
    explicit MaxOp(const MaxOp<In, Other>&) {}

    POOLING_EXT_DEVICE void start(Acc& acc) const {
        acc.value = kLowest;
        if constexpr (kOffsets) acc.offset = -1;
    }

    template <class Int>
    POOLING_EXT_DEVICE void step(Acc& acc, In element, Int offset) const {
        T x;
        if constexpr (kWidens)
            x = widen(element);
        else
            x = element;
        bool wins = x > acc.value || is_nan(x);
        if constexpr (kOffsets) wins = wins || acc.offset < 0;
        if (!wins) return;
        acc.value = x;
        if constexpr (kOffsets) acc.offset = Offset(offset);
    }

    POOLING_EXT_DEVICE Acc merge(const Acc& a, const Acc& b) const {
        if constexpr (!kOffsets) {
            return a.value > b.value || is_nan(a.value) ? a : b;
        } else {
            if (a.offset < 0 || b.offset < 0) return a.offset < 0 ? b : a;
            if (is_nan(a.value) || is_nan(b.value)) {
                if (is_nan(a.value) && is_nan(b.value)) return a.offset > b.offset ? a : b;
                return is_nan(a.value) ? a : b;
            }
            if (a.value == b.value) return a.offset < b.offset ? a : b;
            return a.value > b.value ? a : b;
        }
    }

    POOLING_EXT_DEVICE In finish(const Acc& acc) const {
        if constexpr (kWidens)
            return narrow<In>(acc.value);
        else
            return acc.value;
    }
};

// Reads the input at the winners' offsets.
template <class Element, class Int>
__global__ void __launch_bounds__(kThreads, kResident)
    gather_winners(PoolJob job, Geometry<Int> g, Offsets kind, int64_t total) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= total) return;
    const int64_t c = i % g.channels, pixel = i / g.channels;
    const int64_t row = pixel / g.w.out, slice = row / g.h.out;
    int64_t index;
    if (kind == Offsets::Index) {
        index = load(static_cast<const int64_t*>(job.offsets_in) + i).at[0];
    } else {
        Int offset;
        if (kind == Offsets::Byte) {
            const uint8_t byte = load(static_cast<const uint8_t*>(job.offsets_in) + i).at[0];
            offset = byte == kByteWindow ? -1 : Int(byte);
        } else {
            offset = load(static_cast<const int32_t*>(job.offsets_in) + i).at[0];
        }
        index = index_of<Int>(g, offset, Int(slice % g.d.out), Int(row % g.h.out),
                              Int(pixel % g.w.out));
    }
    Element value(0);
    if (index >= 0) {
        const int64_t plane = slice / g.d.out * (int64_t(g.d.in) * g.h.in * g.w.in);
        value = load(static_cast<const Element*>(job.src) + (plane + index) * g.channels + c).at[0];
    }
    store(static_cast<Element*>(job.dst) + i, {{value}});
}

}  // namespace

void max_pool(const PoolJob& job, DType dtype, Offsets kind, void* parts, StreamHandle handle) {
    const Stream stream = static_cast<Stream>(handle);
    const auto run = [&](auto zero) {
        using In = decltype(zero);
        if (kind == Offsets::None) {
            if (!launch_max_pool_rows<false>(AsTheyAre<In>(), job, kind, stream))
                launch_forward(MaxOp<In, void>(), job, kind, stream, parts);
        } else {
            if (!launch_max_pool_rows<true>(AsTheyAre<In>(), job, kind, stream))
                launch_forward(MaxOp<In, int>(), job, kind, stream, parts);
        }
    };
    switch (dtype) {
        case DType::Float32:
        case DType::Float64:
        case DType::BFloat16:
        case DType::Float16:
            return with_float(dtype, run);
        default:
            with_integer(dtype, run);
    }
}

void max_pool_backward(const PoolJob& job, DType dtype, Offsets kind, StreamHandle handle) {
    const Stream stream = static_cast<Stream>(handle);
    with_float(dtype, [&](auto zero) {
        using In = decltype(zero);
        switch (kind) {
            case Offsets::Byte:
                if (launch_max_pool_cells<ToWinner<In, uint8_t>>(job, stream)) return;
                return launch_backward<ToWinner<In, uint8_t>>(job, stream);
            case Offsets::Int32:
                return launch_backward<ToWinner<In, int32_t>>(job, stream);
            default:
                return launch_backward<ToWinner<In, int64_t>>(job, stream);
        }
    });
}

void max_pool_gather(const PoolJob& job, DType dtype, Offsets kind, StreamHandle handle) {
    const Stream stream = static_cast<Stream>(handle);
    const int64_t total = job.p.out_rows() * job.p.out_row();
    const Grid grid{dim3(unsigned(ceil_div(total, kThreads))), dim3(kThreads)};
    const auto run = [&](auto element) {
        using Element = decltype(element);
        if (fits_32_bits(job.p))
            launch<gather_winners<Element, int>>(grid, stream, job, Geometry<int>(job.p), kind,
                                                 total);
        else
            launch<gather_winners<Element, int64_t>>(grid, stream, job, Geometry<int64_t>(job.p),
                                                     kind, total);
    };
    // Elements are moved whole, so only their size matters.
    switch (dtype) {
        case DType::Float64:
        case DType::Int64:
            return run(uint64_t());
        case DType::Float32:
        case DType::Int32:
            return run(uint32_t());
        case DType::Int8:
        case DType::UInt8:
            return run(uint8_t());
        default:
            return run(uint16_t());
    }
}

}  // namespace pooling_ext::cuda
