// How the kernels of pooling divide their work, and the windows that they are specialized for.
#pragma once

#include "common/cuda.cuh"
#include "common/pool_job.h"
#include "kernels/cuda/stream.h"

namespace pooling_ext::cuda {

// --- geometry ------------------------------------------------------------------------------------

// PoolParams as a kernel uses them: in 32 bits unless an axis or a row is longer than that.
template <class Int>
struct Geometry {
    Int channels;
    AxisOf<Int> d, h, w;

    explicit Geometry(const PoolParams& p)
        : channels(Int(p.channels)), d(axis(p.d)), h(axis(p.h)), w(axis(p.w)) {}

    static AxisOf<Int> axis(const Axis& a) {
        return {Int(a.in),         Int(a.out),       Int(a.kernel),   Int(a.stride),
                Int(a.pad_before), Int(a.pad_after), Int(a.dilation), a.adaptive};
    }
};

// Whether every offset within a plane of one channel, and within a row, fits 32 bits with room for
// the sums that windows make.
inline bool fits_32_bits(const PoolParams& p) {
    constexpr int64_t kMost = int64_t(1) << 30;
    int64_t span = 1;
    for (const Axis& a : {p.d, p.h, p.w}) {
        const int64_t reach = a.pad_before + a.pad_after + a.dilation * a.kernel + a.stride;
        if (a.in + reach > kMost || a.out * a.stride + reach > kMost) return false;
        span *= a.in + reach;
        if (span > kMost) return false;
    }
    return p.in_row() < kMost && p.out_row() < kMost && p.d.out * p.h.out * p.w.out < kMost;
}

// --- windows -------------------------------------------------------------------------------------

// Any window; its sizes are known at run time.
template <class Int_>
struct Any {
    using Int = Int_;
    static constexpr bool kFixed = false;

    static POOLING_EXT_DEVICE Geometry<Int> of(const Geometry<Int>& g) { return g; }
};

// A square window in a plane whose sizes the compiler knows.
template <int kKernel, int kStride, int kPadding>
struct Square {
    using Int = int;
    static constexpr bool kFixed = true;
    static constexpr int kernel = kKernel, stride = kStride, padding = kPadding;

    static bool is(const PoolParams& p) {
        const auto same = [](const Axis& a) {
            return !a.adaptive && a.kernel == kKernel && a.stride == kStride &&
                   a.pad_before == kPadding && a.dilation == 1;
        };
        return p.d.in == 1 && p.d.out == 1 && p.d.kernel == 1 && p.d.pad_before == 0 && same(p.h) &&
               same(p.w);
    }

    static POOLING_EXT_DEVICE Geometry<int> of(Geometry<int> g) {
        g.d = {};
        for (AxisOf<int>* a : {&g.h, &g.w}) {
            a->kernel = kKernel;
            a->stride = kStride;
            a->pad_before = kPadding;
            a->dilation = 1;
            a->adaptive = false;
        }
        return g;
    }
};

// Calls use(Window()) with the window of a job: those that CNNs use are known to the compiler, but
// not for float64, in which nobody trains one, nor where kSquares says that other kernels take
// them.
template <class In, bool kSquares = true, class Use>
void with_window(const PoolParams& p, const Use& use) {
    if (!fits_32_bits(p)) return use(Any<int64_t>());
    if constexpr (kSquares && sizeof(In) < 8 && !std::is_integral_v<In>) {
        if (Square<3, 2, 1>::is(p)) return use(Square<3, 2, 1>());
        if (Square<2, 2, 0>::is(p)) return use(Square<2, 2, 0>());
        if (Square<3, 1, 1>::is(p)) return use(Square<3, 1, 1>());
    }
    use(Any<int>());
}

POOLING_EXT_DEVICE int clamped(int i, int size) {
    const int low = i < 0 ? 0 : i;
    return low < size ? low : size - 1;
}

// A type, as an argument.
template <class T>
struct Tag {
    using Type = T;
};

// --- division into threads -----------------------------------------------------------------------

constexpr int kThreads = 256;

// Blocks that a multiprocessor is to have room for. ptxas then takes the registers that it needs,
// where by its own lights it would have spilled some.
constexpr int kResident = 2;

// What a thread makes: a vector of elements at some rows below one another. In channels-last the
// vectors of a pixel lie in groups, and the pixels of a row follow each other within a group, so
// that a block covers pixels which share their windows.
struct Walk {
    unsigned lanes;      // vectors side by side in a group
    unsigned columns;    // pixels of a row, or vectors along it
    unsigned groups;     // of lanes in a pixel
    unsigned vectors;    // in a pixel
    unsigned tiles;      // of blocks along lanes, columns and groups
    unsigned rows;       // that a thread makes
    unsigned row_parts;  // of a plane: the parts of `rows` rows in a slice, times the slices
    unsigned parts;      // of a slice
    int64_t all_parts;   // of all planes

    // `planes` planes of depth x height rows of `columns` units, each of `vectors` vectors.
    Walk(int64_t planes, int64_t depth, int64_t height, int64_t columns_, int64_t vectors_) {
        constexpr int64_t kLanes = 8;  // 128 bytes
        // So many threads keep a large GPU busy. More rows for each share more of their windows.
        constexpr int64_t kBusy = 1 << 18, kRows = 16;
        lanes = 1;
        while (lanes < kLanes && lanes < vectors_) lanes *= 2;
        columns = unsigned(columns_);
        vectors = unsigned(vectors_);
        groups = unsigned(ceil_div(vectors_, lanes));
        const int64_t across = planes * depth * columns_ * vectors_;
        int64_t divided = ceil_div(height, kRows);
        while (divided < height && across * divided < kBusy) divided *= 2;
        rows = unsigned(ceil_div(height, divided));
        parts = unsigned(ceil_div(height, rows));
        row_parts = unsigned(parts * depth);
        all_parts = planes * int64_t(row_parts);
        const int64_t units = int64_t(lanes) * columns * groups;
        width = 1;
        while (width < kThreads && width < units) width *= 2;
        tiles = unsigned(ceil_div(units, width));
    }

    Grid grid() const {
        const unsigned below = kThreads / width;
        const int64_t blocks = ceil_div(all_parts, below) * tiles;
        if (blocks > 0x7fffffff) throw std::runtime_error("pooling_ext: input is too large");
        return {dim3(unsigned(blocks)), dim3(width, below)};
    }

    unsigned width;  // of a block
};

// Where a thread begins.
struct Position {
    bool inside;
    int64_t plane;
    unsigned depth, row;      // the first of `rows` rows
    unsigned column, vector;  // of the row, and of the pixel

    POOLING_EXT_DEVICE explicit Position(const Walk& walk) {
        const unsigned tile = blockIdx.x % walk.tiles;
        const unsigned unit = tile * blockDim.x + threadIdx.x;
        const int64_t part = int64_t(blockIdx.x / walk.tiles) * blockDim.y + threadIdx.y;
        const unsigned pixel = unit / walk.lanes;
        vector = pixel / walk.columns * walk.lanes + unit % walk.lanes;
        column = pixel % walk.columns;
        // Dividing 64 bits takes several times as long.
        unsigned in_plane;
        if (walk.all_parts <= 0xffffffff) {
            plane = unsigned(part) / walk.row_parts;
            in_plane = unsigned(part) % walk.row_parts;
        } else {
            plane = part / walk.row_parts;
            in_plane = unsigned(part % walk.row_parts);
        }
        depth = in_plane / walk.parts;
        row = in_plane % walk.parts * walk.rows;
        inside = part < walk.all_parts && vector < walk.vectors;
    }
};

// Calls runs(length) with the lengths of vectors along a row until one is taken: 16 bytes, and the
// half of that for 16 bits, since the rows of smaller images have no more in common.
template <class In, class Runs>
bool in_runs(const Runs& runs) {
    constexpr int N = kVector<In>;
    if (runs(std::integral_constant<int, N>())) return true;
    if constexpr (sizeof(In) == 2) return runs(std::integral_constant<int, N / 2>());
    return false;
}

// --- dtypes --------------------------------------------------------------------------------------

[[noreturn]] inline void no_kernel() {
    throw std::runtime_error("pooling_ext: the CUDA kernels do not support this dtype");
}

// Calls use(zero) with a zero of the type.
template <class Use>
void with_float(DType dtype, const Use& use) {
    switch (dtype) {
        case DType::Float32:
            return use(float());
        case DType::Float64:
            return use(double());
        case DType::BFloat16:
            return use(BFloat16());
        case DType::Float16:
            return use(Float16());
        default:
            no_kernel();
    }
}

template <class Use>
void with_integer(DType dtype, const Use& use) {
    switch (dtype) {
        case DType::Int8:
            return use(int8_t());
        case DType::Int16:
            return use(int16_t());
        case DType::Int32:
            return use(int32_t());
        case DType::Int64:
            return use(int64_t());
        case DType::UInt8:
            return use(uint8_t());
        default:
            no_kernel();
    }
}

}  // namespace pooling_ext::cuda
