// Batch normalisation with residual and ReLU, compiled once for each instruction set.
//
// Every step walks rows: in channels-last a row is a few pixels and has its own coefficients for
// each element; in the contiguous format a row lies in one channel and has the same for all.
#include "cpu/pool_forward.h"
#include "cpu/tables.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

// Rows of `width` elements, whose starts are `stride` apart.
struct Block {
    int64_t start, stride, rows, width;
};

// Calls visit(block) for the elements [begin, end) of a unit in channels-last.
template <class Visit>
void blocks_of_run(const BatchNormJob& job, int64_t begin, int64_t end, const Visit& visit) {
    const int64_t row = job.row(), rows = (end - begin) / row;
    if (rows) visit(Block{begin, row, rows, row});
    const int64_t done = begin + rows * row;
    if (done < end) visit(Block{done, row, 1, end - done});
}

// The lanes that the rows of a channel are summed in, in the contiguous format.
constexpr int64_t kLanes = 128;

// Calls visit(block) for the elements of a channel in the contiguous format, and flush(n) after
// every n of them, so that no lane sums many.
template <class Visit, class Flush>
void blocks_of_channel(const BatchNormJob& job, int64_t channel, const Visit& visit,
                       const Flush& flush) {
    constexpr int64_t kWidth = 64, kRows = 256;
    const int64_t first = channel * job.inner, step = job.channels * job.inner;
    if (job.inner <= kLanes) {
        for (int64_t n = 0; n < job.batch; n += kRows) {
            const int64_t rows = job.batch - n < kRows ? job.batch - n : kRows;
            visit(Block{first + n * step, step, rows, job.inner});
            flush(rows * job.inner);
        }
        return;
    }
    const int64_t whole = job.inner / kWidth, rest = job.inner - whole * kWidth;
    int64_t pending = 0;
    for (int64_t n = 0; n < job.batch; ++n) {
        const int64_t begin = first + n * step;
        for (int64_t row = 0; row < whole; row += kRows) {
            const int64_t rows = whole - row < kRows ? whole - row : kRows;
            visit(Block{begin + row * kWidth, kWidth, rows, kWidth});
            pending += rows * kWidth;
            if (pending < kRows * kWidth) continue;
            flush(pending);
            pending = 0;
        }
        if (rest) visit(Block{begin + whole * kWidth, kWidth, 1, rest});
        pending += rest;
    }
    if (pending) flush(pending);
}

// A coefficient of each element of a row, or the same for all.
template <bool kEach, class T>
struct Values {
    const T* __restrict each;
    T same;

    POOLING_EXT_INLINE explicit Values(const T* values)
        : each(values), same(kEach || values == nullptr ? T(0) : *values) {}
    POOLING_EXT_INLINE T operator[](int64_t i) const { return kEach ? each[i] : same; }
};

// Asks for what is read soon: the processor's own guesses end with a page, and where two tensors
// are read at once they halve the speed.
template <int64_t kAhead, class In>
POOLING_EXT_INLINE void prefetch(const In* from, int64_t n) {
    constexpr int64_t kLine = 64;
    const char* ahead = reinterpret_cast<const char*>(uintptr_t(from) + kAhead);
    for (int64_t i = 0; i < n * int64_t(sizeof(In)); i += kLine) __builtin_prefetch(ahead + i);
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

// s1 += x - center and s2 += (x - center)^2, lane by lane.
template <bool kEach, class In, class T>
void add_deviations(const In* __restrict x, int64_t n, const T* __restrict centers,
                    T* __restrict s1, T* __restrict s2) {
    const Values<kEach, T> center(centers);
    prefetch<kAheadOne>(x, n);
    for (int64_t i = 0; i < n; ++i) {
        const T d = widen(x[i]) - center[i];
        s1[i] += d;
        s2[i] += d * d;
    }
}

template <bool kEach, class In, class T>
void add_deviations(const In* x, const Block& block, const T* center, T* s1, T* s2) {
    for (int64_t row = 0; row < block.rows; ++row)
        in_pieces<kBurstOne, In>(block.width, [&](int64_t from, int64_t n) {
            add_deviations<kEach>(x + block.start + row * block.stride + from, n,
                                  center + (kEach ? from : 0), s1 + from, s2 + from);
        });
}

// The gradient of what ReLU was given, where `z` is its input or output. A NaN lets it through, as
// in PyTorch.
template <class T>
POOLING_EXT_INLINE T through(T z, T grad) {
    return select(z <= T(0), T(0), grad);
}

// s1 += g and s2 += g * (x - center), lane by lane, where g is the masked gradient.
template <bool kEach, Mask kMask, class In, class T>
void add_gradients(const In* __restrict x, const In* __restrict grad, const In* __restrict output,
                   In* __restrict masked, int64_t n, const T* __restrict centers,
                   const T* __restrict scales, const T* __restrict shifts, T* __restrict s1,
                   T* __restrict s2) {
    const Values<kEach, T> center(centers), scale(scales), shift(shifts);
    prefetch<kAheadMany>(x, n);
    prefetch<kAheadMany>(grad, n);
    if constexpr (kMask == Mask::Output) prefetch<kAheadMany>(output, n);
    for (int64_t i = 0; i < n; ++i) {
        const T d = widen(x[i]) - center[i];
        T g = widen(grad[i]);
        if constexpr (kMask == Mask::Input) g = through(T(d * scale[i] + shift[i]), g);
        if constexpr (kMask == Mask::Output) {
            g = through(T(widen(output[i])), g);
            put(masked, i, narrow<In>(g));
        }
        s1[i] += g;
        s2[i] += g * d;
    }
}

template <bool kEach, Mask kMask, class In, class T>
void add_gradients(const BatchNormJob& job, const Block& block, const T* center, const T* scale,
                   const T* shift, T* s1, T* s2) {
    for (int64_t row = 0; row < block.rows; ++row)
        in_pieces<kBurstMany, In>(block.width, [&](int64_t from, int64_t n) {
            const int64_t at = block.start + row * block.stride + from, k = kEach ? from : 0;
            add_gradients<kEach, kMask>(
                static_cast<const In*>(job.x) + at, static_cast<const In*>(job.grad) + at,
                static_cast<const In*>(job.output) + at, static_cast<In*>(job.masked) + at, n,
                center + k, scale + k, shift + k, s1 + from, s2 + from);
        });
}

template <bool kEach, bool kResidual, bool kRelu, class In, class T>
void act(const In* __restrict x, const In* __restrict residual, In* __restrict y, int64_t n,
         const T* __restrict centers, const T* __restrict scales, const T* __restrict shifts) {
    const Values<kEach, T> center(centers), scale(scales), shift(shifts);
    for (int64_t i = 0; i < n; ++i) {
        T z = (widen(x[i]) - center[i]) * scale[i] + shift[i];
        if constexpr (kResidual) z += widen(residual[i]);
        if constexpr (kRelu) z = select(z < T(0), T(0), z);
        put(y, i, narrow<In>(z));
    }
}

template <bool kEach, bool kBatch, bool kMask, class In, class T>
void spread(const In* __restrict x, const In* __restrict grad, In* __restrict y, int64_t n,
            const T* __restrict centers, const T* __restrict scales, const T* __restrict shifts,
            const T* __restrict slopes, const T* __restrict offsets) {
    const Values<kEach, T> center(centers), scale(scales), shift(shifts), slope(slopes),
        offset(offsets);
    prefetch<kAheadMany>(x, n);
    prefetch<kAheadMany>(grad, n);
    for (int64_t i = 0; i < n; ++i) {
        T g = widen(grad[i]);
        if constexpr (kBatch || kMask) {
            const T d = widen(x[i]) - center[i];
            if constexpr (kMask) g = through(T(d * scale[i] + shift[i]), g);
            if constexpr (kBatch) {
                put(y, i, narrow<In>(g * scale[i] + (d * slope[i] + offset[i])));
                continue;
            }
        }
        put(y, i, narrow<In>(g * scale[i]));
    }
}

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

template <class Run>
void with_mask(Mask mask, const Run& run) {
    switch (mask) {
        case Mask::None:
            return run(std::integral_constant<Mask, Mask::None>{});
        case Mask::Input:
            return run(std::integral_constant<Mask, Mask::Input>{});
        case Mask::Output:
            return run(std::integral_constant<Mask, Mask::Output>{});
    }
}

template <class T>
void clear(T* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = T(0);
}

// A value for each channel, repeated along a row in channels-last.
template <class T>
void repeat(const BatchNormJob& job, const double* __restrict values, T* __restrict row) {
    const int64_t channels = job.channels;
    for (int64_t from = 0; from < job.row(); from += channels)
        for (int64_t c = 0; c < channels; ++c) row[from + c] = T(values[c]);
}

// A channel's coefficients, repeated along a row in channels-last.
template <class T>
class Coefficients {
  public:
    Coefficients(const BatchNormJob& job, const double* values, Scratch& scratch)
        : values_(values), each_(job.channels_last) {
        if (values == nullptr) return;
        row_ = scratch.take<T>(each_ ? job.row() : 1);
        if (each_) repeat(job, values, row_);
    }

    // Those of the row, or of the channel.
    const T* operator()(int64_t channel) const {
        if (values_ != nullptr && !each_) *row_ = T(values_[channel]);
        return row_;
    }

  private:
    const double* values_;
    bool each_;
    T* row_ = nullptr;
};

// Adds lane by lane sums up for each channel, into `sums`.
template <class T>
void add_lanes(const BatchNormJob& job, const T* __restrict lanes, double* __restrict sums) {
    const int64_t channels = job.channels;
    clear(sums, channels);
    for (int64_t from = 0; from < job.row(); from += channels)
        for (int64_t c = 0; c < channels; ++c) sums[c] += double(lanes[from + c]);
}

// The sum of a channel's lanes.
template <class T>
double total(const T* lanes) {
    constexpr int64_t kAtOnce = 8;
    double sums[kAtOnce] = {};
    for (int64_t i = 0; i < kLanes; i += kAtOnce)
        for (int64_t j = 0; j < kAtOnce; ++j) sums[j] += double(lanes[i + j]);
    double sum = 0;
    for (double some : sums) sum += some;
    return sum;
}

// Mean and sum of squared deviations of a growing set; sets are merged as in Chan, Golub and
// LeVeque.
struct Moments {
    double count = 0, mean = 0, deviation = 0;

    // Adds n elements, of which s1 and s2 are the sums of x - center and its square.
    void add(double n, double center, double s1, double s2) {
        const double away = center + s1 / n - mean, all = count + n;
        deviation += s2 - s1 * s1 / n + away * away * count * n / all;
        mean += away * n / all;
        count = all;
    }
};

// A value near the mean of a run: that of some of its rows.
template <class In, class T>
void guess_center(const BatchNormJob& job, const In* x, int64_t begin, int64_t end, T* lanes,
                  double* sums, T* center) {
    constexpr int64_t kSamples = 4;
    const int64_t row = job.row(), rows = (end - begin) / row, channels = job.channels;
    int64_t count = 0;
    clear(lanes, row);
    if (rows == 0) {
        for (int64_t i = 0; i < channels; ++i) lanes[i] = widen(x[begin + i]);
        count = 1;
    } else {
        const int64_t samples = rows < kSamples ? rows : kSamples;
        for (int64_t sample = 0; sample < samples; ++sample) {
            const In* __restrict from = x + begin + sample * rows / samples * row;
            for (int64_t i = 0; i < row; ++i) lanes[i] += widen(from[i]);
        }
        count = samples * (row / channels);
    }
    add_lanes(job, lanes, sums);
    for (int64_t c = 0; c < channels; ++c) sums[c] /= double(count);
    repeat(job, sums, center);
}

template <class In>
void stats(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const In* x = static_cast<const In*>(job.x);
    const int64_t channels = job.channels, row = job.channels_last ? job.row() : kLanes;
    T *center = scratch.take<T>(row), *s1 = scratch.take<T>(row), *s2 = scratch.take<T>(row);
    if (job.channels_last) {
        const Units units(job, Step::Stats);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t from = unit * units.size;
            const int64_t to = Units::end(job, from, units.size);
            double* const mean = job.sums + unit * 2 * channels;
            double* const deviation = mean + channels;
            guess_center(job, x, from, to, s1, mean, center);
            clear(s1, row);
            clear(s2, row);
            blocks_of_run(job, from, to, [&](const Block& block) {
                add_deviations<true>(x, block, center, s1, s2);
            });
            add_lanes(job, s1, mean);
            add_lanes(job, s2, deviation);
            const double n = double((to - from) / channels);
            for (int64_t c = 0; c < channels; ++c) {
                deviation[c] -= mean[c] * mean[c] / n;
                mean[c] = double(center[c]) + mean[c] / n;
            }
        }
        return;
    }
    for (int64_t channel = begin; channel < end; ++channel) {
        Moments moments;
        // The mean of a few elements is a better guess than one.
        const In* some = x + channel * job.inner;
        const int64_t few = job.inner < kLanes ? job.inner : kLanes;
        *center = T(0);
        for (int64_t i = 0; i < few; ++i) *center += T(widen(some[i])) / T(few);
        clear(s1, kLanes);
        clear(s2, kLanes);
        blocks_of_channel(
            job, channel,
            [&](const Block& block) { add_deviations<false>(x, block, center, s1, s2); },
            [&](int64_t n) {
                moments.add(double(n), double(*center), total(s1), total(s2));
                *center = T(moments.mean);
                clear(s1, kLanes);
                clear(s2, kLanes);
            });
        job.sums[channel] = moments.mean;
        job.sums[channels + channel] = moments.deviation;
    }
}

template <class In>
void sums(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const int64_t channels = job.channels, row = job.channels_last ? job.row() : kLanes;
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch);
    T *s1 = scratch.take<T>(row), *s2 = scratch.take<T>(row);
    with_mask(job.mask, [&](auto mask) {
        constexpr Mask kMask = decltype(mask)::value;
        if (job.channels_last) {
            const Units units(job, Step::Sums);
            for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t from = unit * units.size;
                const int64_t to = Units::end(job, from, units.size);
                clear(s1, row);
                clear(s2, row);
                blocks_of_run(job, from, to, [&](const Block& block) {
                    add_gradients<true, kMask, In>(job, block, center(0), scale(0), shift(0), s1,
                                                   s2);
                });
                double* const out = job.sums + unit * 2 * channels;
                add_lanes(job, s1, out);
                add_lanes(job, s2, out + channels);
            }
            return;
        }
        for (int64_t channel = begin; channel < end; ++channel) {
            double first = 0, second = 0;
            clear(s1, kLanes);
            clear(s2, kLanes);
            blocks_of_channel(
                job, channel,
                [&](const Block& block) {
                    add_gradients<false, kMask, In>(job, block, center(channel), scale(channel),
                                                    shift(channel), s1, s2);
                },
                [&](int64_t) {
                    first += total(s1);
                    second += total(s2);
                    clear(s1, kLanes);
                    clear(s2, kLanes);
                });
            job.sums[channel] = first;
            job.sums[channels + channel] = second;
        }
    });
}

// From the units' moments to those of all, in the first unit's place: two sums, without a division
// for each unit and channel.
void merge(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    const Units units(job, Step::Stats);
    const int64_t channels = job.channels, n = end - begin;
    const auto count = [&](int64_t unit) {
        const int64_t from = unit * units.size;
        return double((Units::end(job, from, units.size) - from) / channels);
    };
    const double all = double(job.numel() / channels);
    double* __restrict mean = job.sums + begin;
    double* __restrict deviation = mean + channels;
    // As differences to the first, so that nothing is lost where means are large.
    constexpr int64_t kAtOnce = 64;
    for (int64_t c = 0; c < n; c += kAtOnce) {
        const int64_t some = n - c < kAtOnce ? n - c : kAtOnce;
        double away[kAtOnce] = {}, square[kAtOnce] = {};
        for (int64_t unit = 1; unit < units.count; ++unit) {
            const double* __restrict other = mean + unit * 2 * channels + c;
            const double share = count(unit);
            for (int64_t i = 0; i < some; ++i) {
                const double difference = other[i] - mean[c + i];
                away[i] += share * difference;
                square[i] += share * difference * difference;
                deviation[c + i] += other[channels + i];
            }
        }
        for (int64_t i = 0; i < some; ++i) {
            deviation[c + i] += square[i] - away[i] * away[i] / all;
            mean[c + i] += away[i] / all;
        }
    }
}

void add_units(const BatchNormJob& job, int64_t begin, int64_t end, void*) {
    const int64_t units = Units(job, Step::Sums).count, channels = job.channels, n = end - begin;
    for (int64_t unit = 1; unit < units; ++unit)
        for (int64_t row = 0; row < 2; ++row) {
            double* __restrict all = job.sums + row * channels + begin;
            const double* __restrict some = all + unit * 2 * channels;
            for (int64_t i = 0; i < n; ++i) all[i] += some[i];
        }
}

// Calls run(start, n, channel) for the rows of the units [begin, end), in runs, the last run first:
// what an earlier step read last is then still in the cache.
template <class Run>
void rows_backwards(const BatchNormJob& job, int64_t begin, int64_t end, const Run& run) {
    constexpr int64_t kRun = 1 << 16;
    const Units units(job, Step::Act);
    const int64_t at_once = units.size < kRun ? kRun / units.size : 1;
    for (int64_t last = end; last > begin; last -= at_once)
        for (int64_t unit = last - at_once > begin ? last - at_once : begin; unit < last; ++unit) {
            const int64_t from = unit * units.size;
            if (!job.channels_last) {
                run(from, units.size, unit % job.channels);
                continue;
            }
            const int64_t to = Units::end(job, from, units.size);
            for (int64_t at = from; at < to; at += job.row())
                run(at, to - at < job.row() ? to - at : job.row(), 0);
        }
}

template <class In>
void act_units(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch);
    const In* x = static_cast<const In*>(job.x);
    const In* residual = static_cast<const In*>(job.residual);
    In* y = static_cast<In*>(job.y);
    with_constants(residual != nullptr, job.relu, [&](auto has_residual, auto relu) {
        constexpr bool kResidual = decltype(has_residual)::value, kRelu = decltype(relu)::value;
        rows_backwards(job, begin, end, [&](int64_t at, int64_t n, int64_t channel) {
            const In* added = kResidual ? residual + at : nullptr;
            if (job.channels_last)
                act<true, kResidual, kRelu>(x + at, added, y + at, n, center(0), scale(0),
                                            shift(0));
            else
                act<false, kResidual, kRelu>(x + at, added, y + at, n, center(channel),
                                             scale(channel), shift(channel));
        });
    });
}

template <class In>
void spread_units(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const Coefficients<T> center(job, job.center, scratch), scale(job, job.scale, scratch),
        shift(job, job.shift, scratch), slope(job, job.slope, scratch),
        offset(job, job.offset, scratch);
    const In* x = static_cast<const In*>(job.x);
    const In* grad = static_cast<const In*>(job.grad);
    In* y = static_cast<In*>(job.y);
    with_constants(job.slope != nullptr, job.mask == Mask::Input, [&](auto batch, auto mask) {
        constexpr bool kBatch = decltype(batch)::value, kMask = decltype(mask)::value;
        rows_backwards(job, begin, end, [&](int64_t start, int64_t row, int64_t channel) {
            const T *c = center(channel), *a = scale(channel), *b = shift(channel);
            const T *k = slope(channel), *o = offset(channel);
            in_pieces<kBurstMany, In>(row, [&](int64_t from, int64_t n) {
                const int64_t at = start + from;
                if (!job.channels_last)
                    spread<false, kBatch, kMask>(x + at, grad + at, y + at, n, c, a, b, k, o);
                else
                    spread<true, kBatch, kMask>(x + at, grad + at, y + at, n, c + from, a + from,
                                                b + from, kBatch ? k + from : k,
                                                kBatch ? o + from : o);
            });
        });
    });
}

}  // namespace

BatchNormKernel batch_norm(DType dtype, Step step) {
    BatchNormKernel found = nullptr;
    for_float(dtype, [&](auto zero) -> Kernel {
        using In = decltype(zero);
        constexpr BatchNormKernel steps[] = {stats<In>, merge,     act_units<In>,
                                             sums<In>,  add_units, spread_units<In>};
        found = steps[int(step)];
        return nullptr;
    });
    return found;
}

}  // namespace pooling_ext::POOLING_EXT_ISA
