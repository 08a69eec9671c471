// What batch normalization's kernels share: rows, walked a vector at a time.
//
// In channels-last a row is a few pixels and has its own coefficients for each element; in the
// contiguous format a row lies in one channel and has the same for all.
#pragma once

#include <utility>

#include "kernels/cpu/norm/batch_norm.h"
#include "kernels/cpu/pool/pool_forward.h"
#include "kernels/cpu/simd/vector.h"

namespace pooling_ext::POOLING_EXT_ISA {

BatchNormKernel batch_norm_backward(DType, Step);

// Calls run(kind, i) for the vectors from i on that n elements consist of. The last may begin
// within the one before it: run must not mind to compute an element twice.
template <class In, class Run>
POOLING_EXT_INLINE void each_vector(int64_t n, const Run& run) {
    constexpr int64_t kSize = Vector<In>::kSize;
    int64_t i = 0;
    for (; i + kSize <= n; i += kSize) run(Vector<In>{}, i);
    if (i == n) return;
    if (n >= kSize)
        run(Vector<In>{}, n - kSize);
    else
        for (; i < n; ++i) run(Single<In>{}, i);
}

// As each_vector, where run(kind, i, read(kind, i)) may write what it was given: of vectors that
// overlap, both are read first.
template <class In, class Read, class Run>
POOLING_EXT_INLINE void each_vector_in_place(int64_t n, const Read& read, const Run& run) {
    constexpr int64_t kSize = Vector<In>::kSize;
    const Vector<In> kind;
    if (n < kSize) {
        for (int64_t i = 0; i < n; ++i) run(Single<In>{}, i, read(Single<In>{}, i));
        return;
    }
    const auto last = read(kind, n - kSize);
    int64_t i = 0;
    for (; i + kSize < n; i += kSize) run(kind, i, read(kind, i));
    run(kind, n - kSize, last);
}

template <class Kind, class X = typename Kind::X>
POOLING_EXT_INLINE X rectified(Kind, X z) {
    using T = typename Kind::T;
    return by_registers<T, T>(z, z, [](auto value, auto) POOLING_EXT_INLINE_LAMBDA {
        const decltype(value) zero{};
        return value < zero ? zero : value;
    });
}

template <class Kind, class X = typename Kind::X>
POOLING_EXT_INLINE X rectified_to_six(Kind kind, X z) {
    using T = typename Kind::T;
    const X positive = rectified(kind, z);
    return by_registers<T, T>(positive, z, [](auto value, auto) POOLING_EXT_INLINE_LAMBDA {
        const decltype(value) six = decltype(value){} + T(6);
        return value > six ? six : value;
    });
}

// The gradient of what ReLU was given, where `z` is its input or output. A NaN lets it through, as
// in PyTorch.
template <class Kind, class X = typename Kind::X>
POOLING_EXT_INLINE X relu_backward(Kind, X z, X grad) {
    using T = typename Kind::T;
    return by_registers<T, T>(z, grad, [](auto value, auto given) POOLING_EXT_INLINE_LAMBDA {
        const decltype(value) zero{};
        return value <= zero ? zero : given;
    });
}

// The same of ReLU6, where `z` is its input.
template <class Kind, class X = typename Kind::X>
POOLING_EXT_INLINE X relu6_backward(Kind, X z, X grad) {
    using T = typename Kind::T;
    return by_registers<T, T>(z, grad, [](auto value, auto given) POOLING_EXT_INLINE_LAMBDA {
        const decltype(value) zero{}, six = zero + T(6);
        return value <= zero ? zero : value >= six ? zero : given;
    });
}

template <class Kind, class In, class X>
POOLING_EXT_INLINE void write(Kind kind, In* to, X x, bool past_cache) {
    past_cache ? kind.stream(to, x) : kind.put(to, x);
}

// Software prefetch: the hardware prefetcher stops at page boundaries, and halves the speed where
// two tensors are read at once.
template <class In>
POOLING_EXT_INLINE void prefetch(const In* from, int64_t n, int64_t bytes_ahead) {
    constexpr int64_t kLine = 64;
    const char* ahead = reinterpret_cast<const char*>(uintptr_t(from) + bytes_ahead);
    for (int64_t i = 0; i < n * int64_t(sizeof(In)); i += kLine) __builtin_prefetch(ahead + i);
}

// Asks for memory that is to be written, where it is so little that it stays in the cache till
// then.
template <class In>
POOLING_EXT_INLINE void prefetch_written(const In* to, int64_t n) {
    constexpr int64_t kLine = 64, kMost = 1024;
    const int64_t bytes = n * int64_t(sizeof(In));
    if (bytes > kMost) return;
    for (int64_t i = 0; i < bytes; i += kLine)
        __builtin_prefetch(reinterpret_cast<const char*>(to) + i, 1);
}

// Calls run(from, n) for pieces of a row of at most kBytes, each a burst of prefetches.
template <int64_t kBytes, class In, class Run>
POOLING_EXT_INLINE void in_pieces(int64_t n, const Run& run) {
    constexpr int64_t kPiece = kBytes / int64_t(sizeof(In));
    for (int64_t from = 0; from < n; from += kPiece)
        run(from, n - from < kPiece ? n - from : kPiece);
}

// Bytes ahead, and in a burst: of one tensor, and of several at once.
constexpr int64_t kAheadOne = 8192, kBurstOne = 2048, kAheadMany = 2048, kBurstMany = 512;

template <class In>
constexpr int64_t kPieceMany = kBurstMany / int64_t(sizeof(In));

// Calls run with its arguments as constants.
template <class Run>
void with_constants(bool a, bool b, const Run& run) {
    using Yes = std::true_type;
    using No = std::false_type;
    if (a)
        b ? run(Yes{}, Yes{}) : run(Yes{}, No{});
    else
        b ? run(No{}, Yes{}) : run(No{}, No{});
}

template <class T>
void clear(T* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = T(0);
}

// A value for each channel, repeated along a row in channels-last.
template <class T>
void repeat(const BatchNormJob& job, const double* __restrict values, T* __restrict row) {
    const int64_t channels = job.channels, n = job.row();
    for (int64_t from = 0; from < n; from += channels)
        for (int64_t c = 0; c < channels; ++c) row[from + c] = T(values[c]);
}

// A channel's coefficients, repeated along a row in channels-last; zeros where there are none.
template <class T>
class Coefficients {
  public:
    Coefficients(const BatchNormJob& job, const double* values, Scratch& scratch)
        : values_(values), each_(job.channels_last) {
        const int64_t n = each_ ? job.row() : 1;
        row_ = scratch.take<T>(n);
        if (values == nullptr)
            clear(row_, n);
        else if (each_)
            repeat(job, values, row_);
    }

    // Those of the row, or of the channel.
    const T* operator()(int64_t channel) const {
        if (values_ != nullptr && !each_) *row_ = T(values_[channel]);
        return row_;
    }

  private:
    const double* values_;
    bool each_;
    T* row_;
};

// Adds the sums of a row's columns up for each channel, into `sums`.
template <class T>
void add_lanes(const BatchNormJob& job, const T* __restrict lanes, double* __restrict sums) {
    const int64_t channels = job.channels, n = job.row();
    clear(sums, channels);
    for (int64_t from = 0; from < n; from += channels)
        for (int64_t c = 0; c < channels; ++c) sums[c] += double(lanes[from + c]);
}

// run(0), ..., run(kMany - 1).
template <int kMany, class Run>
POOLING_EXT_INLINE void unrolled(const Run& run) {
    [&]<int... v>(std::integer_sequence<int, v...>)
        POOLING_EXT_INLINE_LAMBDA { (run(v), ...); }(std::make_integer_sequence<int, kMany>());
}

// Some vectors of a row in channels-last: what belongs to their columns stays in registers while
// rows are walked.
template <class Kind, int kMany>
struct Columns {
    using X = typename Kind::X;
    using T = typename Kind::T;
    X x[kMany];

    POOLING_EXT_INLINE explicit Columns(const T* from) {
        unrolled<kMany>([&](int v)
                            POOLING_EXT_INLINE_LAMBDA { x[v] = Kind::own(from + v * kSize); });
    }
    POOLING_EXT_INLINE void keep(T* to) const {
        unrolled<kMany>([&](int v) POOLING_EXT_INLINE_LAMBDA { Kind::keep(to + v * kSize, x[v]); });
    }

    static constexpr int64_t kSize = sizeof(X) / sizeof(T), kElements = kMany * kSize;
    static constexpr int kVectors = kMany;
};

// Calls run(kind, many, i) for the columns from i on, as many vectors of that kind as the constant
// says, of which n elements consist.
template <int kMost, class In, class Run>
POOLING_EXT_INLINE void in_columns(int64_t n, const Run& run) {
    constexpr int64_t kSize = Vector<In>::kSize;
    using One = std::integral_constant<int, 1>;
    int64_t i = 0;
    for (; i + kMost * kSize <= n; i += kMost * kSize)
        run(Vector<In>{}, std::integral_constant<int, kMost>{}, i);
    for (; i + kSize <= n; i += kSize) run(Vector<In>{}, One{}, i);
    for (; i < n; ++i) run(Single<In>{}, One{}, i);
}

// Calls run(at, v) for the vectors of the columns from i on in rows of n elements: the v-th of a
// row lies at `at`.
template <class Some, class Run>
POOLING_EXT_INLINE void down_rows(int64_t rows, int64_t n, int64_t i, const Run& run) {
    for (int64_t r = 0; r < rows; ++r)
        unrolled<Some::kVectors>(
            [&](int v) POOLING_EXT_INLINE_LAMBDA { run(r * n + i + v * Some::kSize, v); });
}

// Rows that are walked together. It pays where few tensors are: rows of many lie at the same offset
// in their pages too often.
constexpr int64_t kRowsTogether = 8;

// Calls run(at, rows, n) for groups of at most kRows rows of n elements in channels-last, of which
// the first begins at `at`, for the elements [begin, end).
template <int64_t kRows, class Run>
POOLING_EXT_INLINE void row_groups(const BatchNormJob& job, int64_t begin, int64_t end,
                                   const Run& run) {
    const int64_t row = job.row();
    int64_t at = begin;
    for (int64_t rows = (end - begin) / row; rows > 0; rows -= kRows, at += kRows * row)
        run(at, rows < kRows ? rows : kRows, row);
    const int64_t rest = (end - begin) % row;
    if (rest > 0) run(end - rest, int64_t(1), rest);
}

// How far to look ahead from a group of rows: as far as the next one, if it has more than one.
template <class In>
POOLING_EXT_INLINE int64_t ahead_of(int64_t rows, int64_t n, int64_t least) {
    return rows > 1 ? rows * n * int64_t(sizeof(In)) : least;
}

// Two sums over a channel in the contiguous format, lane by lane.
template <class In>
struct ChannelSums {
    using X = typename Vector<In>::X;
    static constexpr int64_t kSize = Vector<In>::kSize, kSets = 4;
    // No lane adds up more, in its own type.
    static constexpr int64_t kMost = 256;

    X first[kSets], second[kSets];

    void clear() {
        for (int64_t set = 0; set < kSets; ++set) first[set] = second[set] = X{};
    }

    // Calls terms(kind, i, a, b), which adds to a and b what the elements from i on give.
    template <class Terms>
    POOLING_EXT_INLINE void add_row(int64_t n, const Terms& terms) {
        const Vector<In> kind;
        int64_t i = 0;
        if (n >= kSets * kSize) {
            X a0 = first[0], a1 = first[1], a2 = first[2], a3 = first[3];
            X b0 = second[0], b1 = second[1], b2 = second[2], b3 = second[3];
            for (; i + kSets * kSize <= n; i += kSets * kSize) {
                terms(kind, i, a0, b0);
                terms(kind, i + kSize, a1, b1);
                terms(kind, i + 2 * kSize, a2, b2);
                terms(kind, i + 3 * kSize, a3, b3);
            }
            first[0] = a0, first[1] = a1, first[2] = a2, first[3] = a3;
            second[0] = b0, second[1] = b1, second[2] = b2, second[3] = b3;
        }
        for (int64_t set = 0; i + kSize <= n; i += kSize, ++set)
            terms(kind, i, first[set], second[set]);
        if (i == n) return;
        if (n >= kSize) {
            X a{}, b{};
            terms(kind, n - kSize, a, b);
            first[kSets - 1] += Vector<In>::last(a, n - i);
            second[kSets - 1] += Vector<In>::last(b, n - i);
            return;
        }
        for (; i < n; ++i) {
            auto a = first[0][i], b = second[0][i];
            terms(Single<In>{}, i, a, b);
            first[0][i] = a, second[0][i] = b;
        }
    }

    // The two sums, which begin again.
    void take(double& a, double& b) {
        X x = (first[0] + first[1]) + (first[2] + first[3]);
        X y = (second[0] + second[1]) + (second[2] + second[3]);
        a = b = 0;
        for (int64_t i = 0; i < kSize; ++i) a += double(x[i]), b += double(y[i]);
        clear();
    }
};

// Channels with short planes are taken some at a time, so that what is read of an image is not.
struct ChannelBlock {
    static constexpr int64_t kMost = 16;

    static int64_t size(const BatchNormJob& job, int64_t element) {
        constexpr int64_t kBytes = 2048;
        const int64_t planes = kBytes / (job.inner * element);
        return planes < 1 ? 1 : planes < kMost ? planes : kMost;
    }

    // Calls run(first, count) for the blocks of channels [begin, end).
    template <class Run>
    static void each(const BatchNormJob& job, int64_t element, int64_t begin, int64_t end,
                     const Run& run) {
        const int64_t most = size(job, element);
        for (int64_t first = begin; first < end; first += most)
            run(first, end - first < most ? end - first : most);
    }
};

// Calls visit(k, start, n) for the runs of a block's channels in the contiguous format, where k is
// the channel's number in the block, and flush(n) after every n elements of each, so that no lane
// sums many.
template <class In, class Visit, class Flush>
void runs_of_channels(const BatchNormJob& job, int64_t channel, int64_t count, const Visit& visit,
                      const Flush& flush) {
    using Sums = ChannelSums<In>;
    // A short run may add to one set alone.
    constexpr int64_t kRun = Sums::kMost * Sums::kSize * Sums::kSets;
    const int64_t vectors = (job.inner + Sums::kSize - 1) / Sums::kSize;
    const int64_t most = vectors < Sums::kSets ? Sums::kMost * job.inner : kRun;
    int64_t pending = 0;
    for (int64_t n = 0; n < job.batch; ++n) {
        const int64_t begin = (n * job.channels + channel) * job.inner;
        for (int64_t from = 0; from < job.inner; from += kRun) {
            const int64_t some = job.inner - from < kRun ? job.inner - from : kRun;
            if (pending + some > most) {
                flush(pending);
                pending = 0;
            }
            for (int64_t k = 0; k < count; ++k) visit(k, begin + k * job.inner + from, some);
            pending += some;
        }
    }
    if (pending) flush(pending);
}

// Calls run(begin, end, channel) for the units [begin, end), in runs, the last run first: what an
// earlier step read last is then still in the cache.
template <class Run>
void units_backwards(const BatchNormJob& job, int64_t begin, int64_t end, const Run& run) {
    constexpr int64_t kRun = 1 << 16;
    const Units units(job, Step::Act);
    const int64_t at_once = units.size < kRun ? kRun / units.size : 1;
    for (int64_t last = end; last > begin; last -= at_once)
        for (int64_t unit = last - at_once > begin ? last - at_once : begin; unit < last; ++unit) {
            const int64_t from = unit * units.size;
            run(from, Units::end(job, from, units.size), unit % job.channels);
        }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
