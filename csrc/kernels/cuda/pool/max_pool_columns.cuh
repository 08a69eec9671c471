// What a thread of max_pool_rows reads of a row, and what it compares of that.
#pragma once

#include "kernels/cuda/pool/lanes.cuh"
#include "kernels/cuda/pool/pool.cuh"

namespace pooling_ext::cuda {

// What is compared: by default the elements as they are. OwnCompared may be specialized for others.
template <class In_>
struct AsTheyAre {
    using In = In_;
    // Three blocks of 256 threads have 72 KB on their way; registers allow no fourth one.
    static constexpr int kResident = 3;
    static constexpr bool kKeeps = false;  // whether the winners' elements are written, too
};

// The same for a thread whose vectors have the channels from `channel` of a plane on.
template <class Compared, class Columns>
struct OwnCompared {
    using Value = typename Columns::Lanes::Value;

    POOLING_EXT_DEVICE OwnCompared(const Compared&, int64_t, int) {}

    // Of value w of a vector, and of one element of the i-th channel.
    POOLING_EXT_DEVICE Value operator()(Value x, int) const { return x; }
    POOLING_EXT_DEVICE auto of_one(typename Compared::In x, int) const { return widen(x); }
    // What is written of it.
    template <class T>
    POOLING_EXT_DEVICE T finish(T best) const {
        return best;
    }
};

// The columns of W values of a pixel's channels, side by side in memory.
template <class Lanes_, class Window, int W_>
struct PixelColumns {
    using Lanes = Lanes_;
    using In = typename Lanes::In;
    static constexpr int W = W_, N = W * Lanes::kLanes;
    static constexpr int kChannels = N;
    static constexpr int K = Window::kernel;
    static constexpr int kStep = 0;  // columns from one number to the next
    static constexpr int kSteps = K == 3 && Window::stride == 2 ? 1 : 2;  // outputs at once

    int column, channel;
    int from[K];
    int to;
    typename Lanes::Offset border;

    POOLING_EXT_DEVICE PixelColumns(const Geometry<int>& g, const Position& at)
        : column(int(at.column)), channel(int(at.vector) * N) {
        const int left = column * Window::stride - Window::padding;
#pragma unroll
        for (int k = 0; k < K; ++k) from[k] = clamped(left + k, g.w.in) * g.channels + channel;
        to = column * g.channels + channel;
        border = Lanes::offset(left < 0 ? 1 : 0);
    }

    struct Row {
        typename Lanes::Value values[K][W];
    };

    POOLING_EXT_DEVICE Row read(const In* row) const {
        Row read;
#pragma unroll
        for (int k = 0; k < K; ++k) Lanes::read(row + from[k], read.values[k]);
        return read;
    }

    template <class Own>
    POOLING_EXT_DEVICE Row compared(const Row& row, const Own& own) const {
        Row compared;
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int w = 0; w < W; ++w) compared.values[k][w] = own(row.values[k][w], w);
        return compared;
    }

    // Element k of the windows.
    POOLING_EXT_DEVICE typename Lanes::Value value(const Row& row, int k, int w) const {
        return row.values[k][w];
    }

    // The offset of what stands in slot 0.
    POOLING_EXT_DEVICE typename Lanes::Offset first(int) const { return border; }

    POOLING_EXT_DEVICE typename Lanes::Flag flag(const Row& row) const {
        typename Lanes::Flag flags[K] = {};
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int w = 0; w < W; ++w) Lanes::watch(flags[k], row.values[k][w]);
        auto all = flags[0];
#pragma unroll
        for (int k = 1; k < K; ++k) all = Lanes::either(all, flags[k]);
        return all;
    }
};

// The windows of as many outputs along a row; what neighbors share is read once.
template <class Lanes_, class Window, int W_>
struct RunColumns {
    using Lanes = Lanes_;
    using In = typename Lanes::In;
    static constexpr int W = W_, N = W * Lanes::kLanes;
    static constexpr int kChannels = 1;
    static constexpr int K = Window::kernel, S = Window::stride, P = Window::padding;
    static constexpr int kStep = 1;
    static constexpr int kSteps = 2;
    static constexpr bool kAfter = K - S - P > 0;
    static_assert(P <= 1 && K - S - P <= 1);

    int column, channel = 0;
    int from, before, after;
    int to;
    typename Lanes::Offset border;

    POOLING_EXT_DEVICE RunColumns(const Geometry<int>& g, const Position& at)
        : column(int(at.column) * N) {
        from = column * S;
        before = clamped(from - 1, g.w.in);
        after = clamped(from + S * N, g.w.in);
        to = column;
        border = column == 0 ? P : 0;
    }

    struct Row {
        typename Lanes::Value values[1 + S * W + 1];
    };

    POOLING_EXT_DEVICE Row read(const In* row) const {
        Row read;
        read.values[0] = read.values[1 + S * W] = {};
#pragma unroll
        for (int s = 0; s < S; ++s) {
            typename Lanes::Value values[W];
            Lanes::read(row + from + s * N, values);
#pragma unroll
            for (int w = 0; w < W; ++w) read.values[1 + s * W + w] = values[w];
        }
        if constexpr (P > 0) read.values[0] = Lanes::last(row + before);
        if constexpr (kAfter) read.values[1 + S * W] = Lanes::first(row + after);
        return read;
    }

    template <class Own>
    POOLING_EXT_DEVICE Row compared(const Row& row, const Own& own) const {
        Row compared = row;
#pragma unroll
        for (int i = P > 0 ? 0 : 1; i < S * W + (kAfter ? 2 : 1); ++i)
            compared.values[i] = own(row.values[i], 0);
        return compared;
    }

    POOLING_EXT_DEVICE typename Lanes::Value value(const Row& row, int k, int w) const {
        return Lanes::gather(row.values, (1 + w * S) * Lanes::kLanes + k - P, S);
    }

    POOLING_EXT_DEVICE typename Lanes::Offset first(int w) const {
        return w == 0 ? border : typename Lanes::Offset(0);
    }

    POOLING_EXT_DEVICE typename Lanes::Flag flag(const Row& row) const {
        typename Lanes::Flag flag = {};
#pragma unroll
        for (int i = 0; i < 2 + S * W; ++i) Lanes::watch(flag, row.values[i]);
        return flag;
    }
};

}  // namespace pooling_ext::cuda
