// The transforms of kernels for Winograd's convolution, compiled once for each instruction set.
//
// A panel of the result is a run of memory for each point, which lie far apart, often at the same
// addresses of every cache. So some channels of a panel are transformed into a small buffer, and
// written from there in pieces of some kilobytes.
#include "kernels/cpu/conv/winograd_tables.h"
#include "kernels/cpu/conv/winograd_tiles.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// The most of a feature's taps that a vector holds, so that equal parts make all.
constexpr int64_t taps_together(int64_t taps, int64_t lanes) {
    int64_t most = taps < lanes ? taps : lanes;
    while (taps % most != 0) --most;
    return most;
}

// Reads a kernel's taps, in any strides, into vectors of features.
template <class In, class Tile>
class Taps {
  public:
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    static constexpr int64_t kChannels = L::kSize;  // read at once
    static constexpr int64_t kTaps = Tile::kSizes.taps(), kColumns = Tile::kSizes.columns.taps;
    static constexpr int64_t kRead = taps_together(kTaps, L::kSize);

    explicit Taps(const WinogradWeightJob& job)
        : job_(job),
          feature_(job.strides[job.transposed]),
          channel_(job.strides[!job.transposed]),
          plane_(job.strides[2]),
          row_(job.strides[3]),
          column_(job.strides[4]) {}

    // Of features [first, first + lanes) and channels [channel, channel + count) of a group and a
    // plane.
    void read(int64_t group, int64_t first, int64_t lanes, int64_t plane, int64_t channel,
              int64_t count) {
        const WinogradShape& s = job_.shape;
        // The given weight's first dimension runs over the groups.
        const int64_t outs = job_.transposed ? s.channels : s.features;
        const int64_t given = job_.transposed ? s.planes - 1 - plane : plane;
        const In* const from = static_cast<const In*>(job_.weight) +
                               group * outs * job_.strides[0] + first * feature_ +
                               channel * channel_ + given * plane_;
        const bool together = (kTaps == kColumns || row_ == kColumns) && column_ == 1;
        if (lanes < L::kSize)
            one_by_one(from, lanes, count);
        else if (feature_ == 1)
            along_features(from, count);
        else if (count < kChannels)
            one_by_one(from, lanes, count);
        else if (channel_ == 1)
            along_channels(from);
        else if (together && channel_ == kTaps)
            along_both(from);
        else if (together && feature_ == kTaps && kRead > 1)
            along_taps(from);
        else
            one_by_one(from, lanes, count);
    }

    // Tap `tap` of the i-th channel.
    POOLING_EXT_INLINE X at(int64_t i, int64_t tap) const { return L::own(taps_[i][tap]); }

  private:
    // The gradient of an input is a convolution with the turned kernel.
    POOLING_EXT_INLINE int64_t turned(int64_t tap) const {
        return job_.transposed ? kTaps - 1 - tap : tap;
    }
    POOLING_EXT_INLINE int64_t offset(int64_t tap) const {
        return tap / kColumns * row_ + tap % kColumns * column_;
    }

    void one_by_one(const In* from, int64_t lanes, int64_t count) {
        for (int64_t k = 0; k < count; ++k)
            for (int64_t tap = 0; tap < kTaps; ++tap)
                for (int64_t lane = 0; lane < L::kSize; ++lane)
                    taps_[k][turned(tap)][lane] =
                        lane < lanes ? widen(from[lane * feature_ + k * channel_ + offset(tap)])
                                     : T(0);
    }

    void along_features(const In* from, int64_t count) {
        for (int64_t k = 0; k < count; ++k)
            for (int64_t tap = 0; tap < kTaps; ++tap)
                L::keep(taps_[k][turned(tap)], L::get(from + k * channel_ + offset(tap)));
    }

    void along_channels(const In* from) {
        for (int64_t tap = 0; tap < kTaps; ++tap)
            transposed(from + offset(tap), feature_,
                       [&](int64_t k) { return taps_[k][turned(tap)]; });
    }

    // A feature's channels and their taps lie together.
    void along_both(const In* from) {
        for (int64_t piece = 0; piece < kTaps; ++piece)
            transposed(from + piece * kChannels, feature_, [&](int64_t i) {
                const int64_t at = piece * kChannels + i;
                return taps_[at / kTaps][turned(at % kTaps)];
            });
    }

    // A channel's features and their taps lie together. What is read beyond the taps of a feature
    // are others, but for those of the last ones, which may be the end of the weight.
    void along_taps(const In* from) {
        constexpr int64_t kWhole = L::kSize - (L::kSize - kRead + kTaps - 1) / kTaps;
        alignas(64) T beyond[L::kSize];
        for (int64_t k = 0; k < kChannels; ++k)
            for (int64_t piece = 0; piece < kTaps / kRead; ++piece) {
                const In* const taps = from + k * channel_ + piece * kRead;
                X rows[L::kSize];
#pragma GCC unroll 16
                for (int64_t i = 0; i < L::kSize; ++i)
                    rows[i] =
                        i < kWhole ? L::get(taps + i * kTaps) : L::get(taps + i * kTaps, kRead);
                L::transpose(rows);
#pragma GCC unroll 16
                for (int64_t i = 0; i < L::kSize; ++i)
                    L::keep(i < kRead ? taps_[k][turned(piece * kRead + i)] : beyond, rows[i]);
            }
    }

    // Element i of each feature's run as a vector, at to(i).
    template <class To>
    POOLING_EXT_INLINE void transposed(const In* from, int64_t stride, const To& to) {
        X rows[L::kSize];
#pragma GCC unroll 16
        for (int64_t i = 0; i < L::kSize; ++i) rows[i] = L::get(from + i * stride);
        L::transpose(rows);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L::kSize; ++i) L::keep(to(i), rows[i]);
    }

    const WinogradWeightJob& job_;
    const int64_t feature_, channel_, plane_, row_, column_;  // strides
    alignas(64) T taps_[kChannels][kTaps][L::kSize];
};

// Calls keep(point, vector) for the transform of a channel's taps.
template <class Tile, class In, class Keep>
POOLING_EXT_INLINE void transform_weight(const Taps<In, Tile>& taps, int64_t k, const Keep& keep) {
    using T = Accumulator<In>;
    using X = typename Lanes<In>::X;
    constexpr WinogradAxis kRows = Tile::Rows::kSizes, kColumns = Tile::Columns::kSizes;
    X half[kRows.weight_points][kColumns.taps];
#pragma GCC unroll 7
    for (int b = 0; b < kColumns.taps; ++b) {
        X column[kRows.taps], points[kRows.weight_points];
#pragma GCC unroll 7
        for (int a = 0; a < kRows.taps; ++a) column[a] = taps.at(k, a * kColumns.taps + b);
        Tile::Rows::weight(column, points, T(0));
#pragma GCC unroll 10
        for (int a = 0; a < kRows.weight_points; ++a) half[a][b] = points[a];
    }
#pragma GCC unroll 10
    for (int a = 0; a < kRows.weight_points; ++a) {
        X row[kColumns.weight_points];
        Tile::Columns::weight(half[a], row, T(0));
#pragma GCC unroll 10
        for (int b = 0; b < kColumns.weight_points; ++b)
            keep(a * kColumns.weight_points + b, row[b]);
    }
}

template <class In, class Tile>
void transform_weights(const WinogradWeightJob& job, int64_t begin, int64_t end) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    constexpr WinogradMachine m = machine_of<In>();
    constexpr int64_t kChannels = Taps<In, Tile>::kChannels;
    constexpr int64_t kPoints = Tile::kSizes.weight_points();
    const WinogradShape& s = job.shape;
    const int64_t vectors = winograd_vectors(s.features, m);
    Taps<In, Tile> taps(job);
    // A vector more for each point, so that points do not all fall on the same addresses of a
    // cache.
    alignas(64) T buffer[kPoints][2 * kChannels + 1][L::kSize];
    for (int64_t index = begin; index < end;) {
        const int64_t group = index / vectors, vector = index % vectors;
        const WinogradPanel panel(s, vector, L::kSize);
        // Both vectors of a panel, so that its rows are written whole.
        const int64_t many = vector % 2 == 0 && vector + 1 < vectors && index + 1 < end ? 2 : 1;
        T* const to = static_cast<T*>(job.result) + group * s.weight_size() + panel.offset;
        // Channels of a plane, some at a time.
        const int64_t some = ceil_div(s.channels, kChannels);
        for (int64_t part = 0; part < s.planes * some; ++part) {
            const int64_t plane = part / some, channel = part % some * kChannels;
            const int64_t count = smaller(kChannels, s.channels - channel);
            for (int64_t v = 0; v < many; ++v) {
                const int64_t first = (vector + v) * L::kSize;
                taps.read(group, first, smaller(L::kSize, s.features - first), plane, channel,
                          count);
                for (int64_t k = 0; k < count; ++k)
                    transform_weight<Tile>(taps, k,
                                           [&](int64_t point, X x) POOLING_EXT_INLINE_LAMBDA {
                                               L::keep(buffer[point][k * many + v], x);
                                           });
            }
            // Of a panel of which one vector is wanted, every other vector of the result is left.
            const int64_t step = panel.width / many;
            T* row = to + (plane * s.channels + channel) * panel.width;
            for (int64_t point = 0; point < kPoints; ++point) {
                for (int64_t i = 0; i < count * many; ++i)
                    L::keep(row + i * step, L::own(buffer[point][i]));
                row += s.inner() * panel.width;
            }
        }
        index += many;
    }
}

template <class Tile>
auto transform_of(DType dtype) {
    return for_float(dtype, [](auto zero) -> decltype(WinogradKernels::weight) {
        return transform_weights<decltype(zero), Tile>;
    });
}

}  // namespace
}  // namespace conv

void (*winograd_weight(DType dtype, WinogradKind kind))(const WinogradWeightJob&, int64_t,
                                                        int64_t) {
    return conv::of_kind(kind == WinogradKind::Spread ? WinogradKind::Strided : kind,
                         [&](auto tile) { return conv::transform_of<decltype(tile)>(dtype); });
}

WinogradKernels winograd(DType dtype, WinogradKind kind) {
    return {(dtype == DType::Float64 ? conv::Lanes<double>::kSize : conv::Lanes<float>::kSize),
            winograd_weight(dtype, kind), winograd_forward(dtype, kind), winograd_grad(dtype, kind),
            winograd_grad_end(dtype, kind)};
}

}  // namespace pooling_ext::POOLING_EXT_ISA
