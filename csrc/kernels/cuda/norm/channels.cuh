// The threads of a block on its channels: what each moves, and how they add up.
#pragma once

#include "common/cuda.cuh"
#include "kernels/cuda/norm/channel_tiles.h"
#include "kernels/cuda/pool/pool.cuh"

namespace pooling_ext::cuda {

static_assert(kThreads == ChannelTiles::kThreads);

// Where a thread is, in vectors of N elements.
template <int N>
struct ChannelPosition {
    int64_t split;
    int64_t first_channel;  // of the block
    int own;                // channels that it has
    int64_t row = 0;        // of the first vector
    int64_t at;             // its first element
    int64_t across;         // vectors of the row before it
    int64_t next, end;      // rows, or vectors

    // `backwards` begins with what an earlier kernel read last, which may still be in the cache.
    POOLING_EXT_DEVICE explicit ChannelPosition(const ChannelTiles& t, bool backwards = false) {
        const int thread = int(threadIdx.x);
        const unsigned blocks = unsigned(t.blocks);
        split = blockIdx.x / blocks;
        if (backwards) split = t.splits - 1 - split;
        first_channel = int64_t(blockIdx.x % blocks) * t.width;
        own = t.channels - first_channel < t.width ? int(t.channels - first_channel) : t.width;
        const int64_t begin = split * t.each, all = t.flat ? t.rows * t.across : t.rows;
        end = begin + t.each < all ? begin + t.each : all;
        if (t.flat) {
            next = begin + thread;
            row = next / t.across;
            across = next % t.across;
        } else {
            across = thread % int(t.across);
            const int y = thread / int(t.across);
            row = next = begin + y;
            if (y >= t.below || across * N >= own * t.inner) next = end;
        }
        at = (row * t.channels + first_channel) * t.inner + across * N;
    }

    // The channel of the block that element i of every vector lies in.
    POOLING_EXT_DEVICE int channel(const ChannelTiles& t, int i) const {
        if (t.flat) return 0;
        const int column = int(across) * N + i;
        return t.inner == 1 ? column : column / int(t.inner);
    }

    // Calls use(at, there) for the vectors of the thread: where kUnroll of them begin, and which of
    // them exist. Where one does not, the first begins, so that loads need no branch.
    template <int kUnroll, class Use>
    POOLING_EXT_DEVICE void walk(const ChannelTiles& t, const Use& use) const {
        walk_units<kUnroll>(
            t, [&](const auto& at, const auto& there, const auto&) { use(at, there); });
    }

    // Calls use(at, there, units), with the vectors' rows or, in a flat tile, their numbers.
    template <int kUnroll, class Use>
    POOLING_EXT_DEVICE void walk_units(const ChannelTiles& t, const Use& use) const {
        int64_t here = at, k = next, column = across;
        while (k < end) {
            int64_t begins[kUnroll], units[kUnroll];
            bool there[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                there[u] = u == 0 || k < end;
                begins[u] = there[u] ? here : begins[0];
                units[u] = there[u] ? k : units[0];
                k += t.step;
                here += t.step_at;
                column += t.step_across;
                if (column >= t.across) {
                    column -= t.across;
                    here += t.wrap;
                }
            }
            use(begins, there, units);
        }
    }
};

// Numbers of the elements of all threads' vectors, in the block's shared memory.
template <class T, int N>
struct Lanes {
    T values[N * (kThreads + 1)];  // threads that read next to each other do not share a bank

    POOLING_EXT_DEVICE T& at(int thread, int i) { return values[i * (kThreads + 1) + thread]; }
};

// Adds up, for each channel of the block, what get(thread, i) says of its elements, in an order
// that depends on the tiles alone, and calls done(channel, Item) for each. All threads take part.
template <int N, class Item, class Get, class Done>
POOLING_EXT_DEVICE void add_up(const ChannelTiles& t, int own, const Get& get, const Done& done) {
    __shared__ Item all[kThreads];
    const int thread = int(threadIdx.x), groups = kThreads / t.width;
    const int channel = thread % t.width, group = thread / t.width;
    const int lanes = t.flat ? kThreads : int(t.across), rows = t.flat ? 1 : t.below;
    const int span = t.flat ? kThreads * N : int(t.inner);  // columns of a channel
    const bool takes_part = group < groups && channel < own;
    Item item = {};
    __syncthreads();
    if (takes_part)
        for (int k = group; k < rows * span; k += groups) {
            const int y = span == 1 ? k : k / span, column = channel * span + (k - y * span);
            item.add(get(y * lanes + column / N, column % N));
        }
    all[thread] = item;
    for (int n = groups; n > 1;) {
        const int half = (n + 1) / 2;
        __syncthreads();
        if (takes_part && group + half < n) {
            item.add(all[thread + half * t.width]);
            all[thread] = item;
        }
        n = half;
    }
    if (takes_part && group == 0) done(channel, item);
}

// Count, mean and sum of squared deviations.
template <class T>
struct Moments {
    T count, mean, deviations;

    // Chan, Golub and LeVeque's update.
    POOLING_EXT_DEVICE void add(const Moments& other) {
        if (other.count == 0) return;
        const T both = count + other.count, share = other.count / both, away = other.mean - mean;
        mean += away * share;
        deviations += other.deviations + away * away * (count * share);
        count = both;
    }
};

template <class T>
struct TwoSums {
    T first, second;

    POOLING_EXT_DEVICE void add(const TwoSums& other) {
        first += other.first;
        second += other.second;
    }
};

template <class T>
struct Sum {
    T value;

    POOLING_EXT_DEVICE void add(const Sum& other) { value += other.value; }
};

// So many channels and splits are added up by a block at once.
constexpr int kTotalChannels = 16, kTotalSplits = kThreads / kTotalChannels;

inline Grid grid_of_totals(int64_t channels) {
    return {dim3(unsigned(ceil_div(channels, kTotalChannels))), dim3(kThreads)};
}

// Adds up, for each channel, what get(split, channel) says, and calls done(channel, Item). All
// threads take part.
template <class Item, class Get, class Done>
POOLING_EXT_DEVICE void add_up_splits(int64_t channels, int64_t splits, const Get& get,
                                      const Done& done) {
    __shared__ Item all[kThreads];
    const int thread = int(threadIdx.x);
    const int64_t channel = int64_t(blockIdx.x) * kTotalChannels + thread % kTotalChannels;
    Item item = {};
    if (channel < channels)
#pragma unroll 4
        for (int64_t split = thread / kTotalChannels; split < splits; split += kTotalSplits)
            item.add(get(split, channel));
    all[thread] = item;
    for (int half = kThreads / 2; half >= kTotalChannels; half /= 2) {
        __syncthreads();
        if (thread >= half) continue;
        item.add(all[thread + half]);
        all[thread] = item;
    }
    if (thread < kTotalChannels && channel < channels) done(channel, item);
}

// Calls use(zero, vector length) for the tiles of a tensor.
template <class Use>
void with_tiles(DType dtype, const ChannelTiles& tiles, const Use& use) {
    with_float(dtype, [&](auto zero) {
        using In = decltype(zero);
        if constexpr (sizeof(In) < 8)
            if (tiles.vector > 1) return use(zero, std::integral_constant<int, kVector<In>>());
        use(zero, std::integral_constant<int, 1>());
    });
}

inline Grid grid_of(const ChannelTiles& tiles) {
    if (tiles.grid() > 0x7fffffff) throw std::runtime_error("pooling_ext: input is too large");
    return {dim3(unsigned(tiles.grid())), dim3(kThreads)};
}

}  // namespace pooling_ext::cuda
