// The statistics of a convolution's output, made where it is written.
#pragma once

#include "kernels/cpu/conv/depthwise_rows.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// Mean and deviations of one unit's results, for some vectors of channels. Sums are taken about a
// center near the mean, and merged now and then as in Chan, Golub and LeVeque.
template <class In>
class Statistics {
  public:
    using L = Lanes<In>;
    using T = typename L::T;

    Statistics(int64_t vectors, Memory& memory)
        : n_(vectors * L::kSize),
          centers_(memory.take<T>(n_)),
          sums_(memory.take<T>(n_)),
          squares_(memory.take<T>(n_)),
          means_(memory.take<double>(n_)),
          deviations_(memory.take<double>(n_)) {}

    void begin() {
        count_ = 0;
        for (int64_t i = 0; i < n_; ++i) {
            sums_[i] = squares_[i] = T(0);
            means_[i] = deviations_[i] = 0;
        }
    }

    // Adds some results of a vector of channels. The first ones are where its center is taken from.
    void add(int64_t v, const T* from, int64_t count, bool first) {
        T* const center = centers_ + v * L::kSize;
        T* const sum = sums_ + v * L::kSize;
        T* const square = squares_ + v * L::kSize;
        if (first) {
            auto all = L::own(from);
            for (int64_t i = 1; i < count; ++i) all += L::own(from + i * L::kSize);
            L::keep(center, all / T(count));
        }
        const auto about = L::own(center);
        typename L::X s1[2] = {}, s2[2] = {};
        for (int64_t i = 0; i < count; ++i) {
            const auto d = L::stored(L::own(from + i * L::kSize)) - about;
            s1[i & 1] += d;
            s2[i & 1] += d * d;
        }
        L::keep(sum, L::own(sum) + (s1[0] + s1[1]));
        L::keep(square, L::own(square) + (s2[0] + s2[1]));
    }

    // Merges what was added since the last time: `count` results of each channel.
    void merge(int64_t count) {
        const double n = double(count), before = double(count_), all = before + n;
        const double share = n / all, both = before * share, inverse = 1 / n;
        for (int64_t i = 0; i < n_; ++i) {
            const double s1 = sums_[i], s2 = squares_[i], mean = s1 * inverse;
            const double away = double(centers_[i]) + mean - means_[i];
            deviations_[i] += s2 - s1 * mean + away * away * both;
            means_[i] += away * share;
            centers_[i] = T(means_[i]);
            sums_[i] = squares_[i] = T(0);
        }
        count_ += count;
    }

    // Writes those of `count` channels, the lanes of a vector from the first on.
    void take(int64_t v, int64_t count, double* mean, double* deviation) const {
        for (int64_t i = 0; i < count; ++i) {
            mean[i] = means_[v * L::kSize + i];
            deviation[i] = deviations_[v * L::kSize + i];
        }
    }

  private:
    const int64_t n_;
    T *const centers_, *const sums_, *const squares_;
    double *const means_, *const deviations_;
    int64_t count_ = 0;
};

// Means and variances of channels [begin, end) of all pieces at `stats`, two rows of `channels`,
// from each piece's means and deviations, two rows of `padded`. A piece has count_of(piece)
// results.
template <class CountOf>
void merge_moments(const double* moments, int64_t pieces, int64_t padded, double* stats,
                   int64_t channels, int64_t begin, int64_t end, const CountOf& count_of) {
    for (int64_t c = begin; c < end && c < channels; ++c) {
        double count = 0, mean = 0, deviation = 0;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const double n = double(count_of(piece));
            const double* const of_piece = moments + piece * 2 * padded;
            const double away = of_piece[c] - mean, all = count + n;
            deviation += of_piece[padded + c] + away * away * (count * n / all);
            mean += away * (n / all);
            count = all;
        }
        stats[c] = mean;
        stats[channels + c] = deviation / count;
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
