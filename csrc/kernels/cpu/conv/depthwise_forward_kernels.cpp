// Depthwise convolution's output and its input's gradient, compiled once for each instruction set.
#include "kernels/cpu/conv/activation.h"
#include "kernels/cpu/conv/depthwise_kernels.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// --- weights ------------------------------------------------------------------------------------

// For each block of channels and each phase of rows and columns its taps, sixteen channels of each;
// then the biases.
template <class In>
void prepare(const DepthwiseJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    const DepthwiseWalk rows(job.h, job.kernel, job.backward());
    const DepthwiseWalk columns(job.w, job.kernel, job.backward());
    const In* const weight = static_cast<const In*>(job.weight);
    const In* const bias = static_cast<const In*>(job.bias);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kDepthwiseBlock, left = job.channels - first;
        const int64_t count = left < kDepthwiseBlock ? left : kDepthwiseBlock;
        T* to = static_cast<T*>(job.prepared) + first * (job.taps() + 1);
        for (int64_t ph = 0; ph < rows.phases; ++ph)
            for (int64_t pw = 0; pw < columns.phases; ++pw)
                for (int64_t i = 0; i < rows.taps(ph); ++i)
                    for (int64_t j = 0; j < columns.taps(pw); ++j, to += kDepthwiseBlock) {
                        const int64_t tap = rows.tap(ph, i) * job.kernel + columns.tap(pw, j);
                        for (int64_t c = 0; c < kDepthwiseBlock; ++c)
                            to[c] = c < count ? widen(weight[(first + c) * job.taps() + tap]) : T(0);
                    }
        for (int64_t c = 0; c < kDepthwiseBlock; ++c)
            to[c] = bias != nullptr && c < count ? widen(bias[first + c]) : T(0);
    }
}

// --- rows ---------------------------------------------------------------------------------------

// Columns of one phase of a row of the result.
template <class T>
struct RowCall {
    const T* const* rows;  // of the source, where the first column's first tap is
    int64_t count;         // of them
    const T* weights;      // kDepthwiseBlock numbers for each tap
    const T* bias;
    T* to;
    int64_t apart;    // of the results, in columns
    int64_t columns;  // there is room for a multiple of DepthwisePlan::kColumns
};

// kMany columns of results: sums over kTaps columns of the source, kStep apart, of each row.
template <class L, int kMany, int kTaps, int kStep>
POOLING_EXT_INLINE void some_columns(const RowCall<typename L::T>& call, int64_t from) {
    using X = typename L::X;
    X sums[kMany];
    const X bias = L::own(call.bias);
#pragma GCC unroll 14
    for (int i = 0; i < kMany; ++i) sums[i] = bias;
    const auto* weight = call.weights;
    for (int64_t r = 0; r < call.count; ++r) {
        const auto* x = call.rows[r] + from * kStep * L::kSize;
        fixed(x);
#pragma GCC unroll 7
        for (int t = 0; t < kTaps; ++t, weight += kDepthwiseBlock) {
            const X w = L::own(weight);
#pragma GCC unroll 14
            for (int i = 0; i < kMany; ++i)
                sums[i] += L::own(x + (i * kStep + t) * L::kSize) * w;
        }
    }
    const int64_t apart = call.apart * L::kSize;
    auto* to = call.to + from * apart;
#pragma GCC unroll 14
    for (int i = 0; i < kMany; ++i, to += apart) L::keep(to, sums[i]);
}

template <class L, int kTaps, int kStep>
void row_of(const RowCall<typename L::T>& call) {
    constexpr int kOnce = DepthwisePlan::kColumns;
    // With fused operands twice as many sums fit the registers, and weights are loaded half as often.
    constexpr int kMany = kVectorBytes > 16 ? 2 * kOnce : kOnce;
    int64_t i = 0;
    for (; call.columns - i > kMany - kOnce; i += kMany) some_columns<L, kMany, kTaps, kStep>(call, i);
    if (i < call.columns) some_columns<L, kOnce, kTaps, kStep>(call, i);
}

template <class L>
using RowKernel = void (*)(const RowCall<typename L::T>&);

template <class L>
RowKernel<L> row_kernel(int64_t taps, int64_t step) {
    const auto of = [&](auto count) -> RowKernel<L> {
        constexpr int kTaps = decltype(count)::value;
        if constexpr (kTaps == 3 || kTaps == 5 || kTaps == 7)
            if (step == 2) return row_of<L, kTaps, 2>;
        return row_of<L, kTaps, 1>;
    };
    switch (taps) {
        case 1:
            return of(std::integral_constant<int, 1>{});
        case 2:
            return of(std::integral_constant<int, 2>{});
        case 3:
            return of(std::integral_constant<int, 3>{});
        case 4:
            return of(std::integral_constant<int, 4>{});
        case 5:
            return of(std::integral_constant<int, 5>{});
        default:
            return of(std::integral_constant<int, 7>{});
    }
}

// --- statistics ---------------------------------------------------------------------------------

// Mean and deviations of the results of one unit, for the channels of a group; a chunk's are merged
// with those before as in Chan, Golub and LeVeque.
template <class In>
class Statistics {
  public:
    using L = Lanes<In>;
    using T = typename L::T;

    // `mean` and `deviation` have a number for each channel of the group.
    Statistics(double* mean, double* deviation) : means_(mean), deviations_(deviation) {}

    void begin() { count_ = 0; }

    void add(int64_t v, const T* from, int64_t rows, int64_t columns, int64_t across) {
        double* const mean = means_ + v * L::kSize;
        double* const deviation = deviations_ + v * L::kSize;
        alignas(64) T center[L::kSize], sums[L::kSize], squares[L::kSize];
        if (count_ == 0) {
            L::keep(center, mean_of(from, columns));
            for (int64_t c = 0; c < L::kSize; ++c) mean[c] = deviation[c] = 0;
        } else {
            for (int64_t c = 0; c < L::kSize; ++c) center[c] = T(mean[c]);
        }
        const auto about = L::own(center);
        typename L::X first[2]{}, second[2]{};
        for (int64_t r = 0; r < rows; ++r, from += across * L::kSize)
            for (int64_t i = 0; i < columns; ++i) {
                const auto d = L::stored(L::own(from + i * L::kSize)) - about;
                first[i & 1] += d;
                second[i & 1] += d * d;
            }
        L::keep(sums, first[0] + first[1]);
        L::keep(squares, second[0] + second[1]);
        const double n = double(rows * columns), before = double(count_), all = before + n;
        for (int64_t c = 0; c < L::kSize; ++c) {
            const double s1 = sums[c], s2 = squares[c];
            const double away = double(center[c]) + s1 / n - mean[c];
            deviation[c] += s2 - s1 * (s1 / n) + away * away * (before * n / all);
            mean[c] += away * (n / all);
        }
    }

    // After the vectors of a chunk.
    void end_chunk(int64_t count) { count_ += count; }

  private:
    static typename L::X mean_of(const T* from, int64_t columns) {
        typename L::X sum{};
        for (int64_t i = 0; i < columns; ++i) sum += L::own(from + i * L::kSize);
        return sum / T(columns);
    }

    double* means_;
    double* deviations_;
    int64_t count_ = 0;
};

void merge(const DepthwiseJob& job, int64_t begin, int64_t end, void*) {
    const DepthwisePlan plan(job);
    const int64_t padded = job.padded_channels(), pieces = job.batch * plan.bands;
    for (int64_t block = begin; block < end; ++block)
        for (int64_t i = 0; i < kDepthwiseBlock; ++i) {
            const int64_t c = block * kDepthwiseBlock + i;
            if (c >= job.channels) break;
            double count = 0, mean = 0, deviation = 0;
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t first = piece % plan.bands * plan.band;
                const int64_t left = job.h.out - first;
                const double n = double((left < plan.band ? left : plan.band) * job.w.out);
                const double* const of_piece = job.moments + piece * 2 * padded;
                const double away = of_piece[c] - mean, all = count + n;
                deviation += of_piece[padded + c] + away * away * (count * n / all);
                mean += away * (n / all);
                count = all;
            }
            job.stats[c] = mean;
            job.stats[job.channels + c] = deviation / count;
        }
}

// --- both directions ----------------------------------------------------------------------------

// The rows of a unit, chunk by chunk.
template <class In>
class Convolution {
  public:
    using L = Lanes<In>;
    using T = typename L::T;

    Convolution(const DepthwiseJob& job, void* scratch)
        : job_(job),
          plan_(job),
          rows_(job.h, job.kernel, job.backward()),
          columns_(job.w, job.kernel, job.backward()),
          source_{static_cast<const In*>(job.backward() ? job.grad : job.x), job.batch, job.channels,
                  rows_.source, columns_.source, job.channels_last},
          result_{static_cast<In*>(job.y), job.batch,           job.channels,
                  rows_.result,            columns_.result, job.channels_last},
          vectors_(plan_.group * kDepthwiseBlock / L::kSize),
          memory_(scratch),
          ring_(memory_.take<T>(Ring<In>::size(plan_.slots, vectors_, plan_.width)), plan_.slots,
                vectors_, plan_.width, plan_.lead),
          chunk_(memory_.take<T>(plan_.chunk * plan_.across * L::kSize)) {
        ring_.clear();
        for (int64_t phase = 0; phase < columns_.phases; ++phase)
            kernels_[phase] = row_kernel<L>(columns_.taps(phase), columns_.step);
    }

    void run(int64_t unit) {
        const DepthwiseUnit at(job_, plan_, false, unit);
        const int64_t first = at.band * plan_.band, left = rows_.result - first;
        const int64_t end = first + (left < plan_.band ? left : plan_.band);
        const int64_t piece = at.n * plan_.bands + at.band, padded = job_.padded_channels();
        double* const moments =
            job_.moments == nullptr ? nullptr : job_.moments + piece * 2 * padded + at.channel;
        Statistics<In> statistics(moments, moments == nullptr ? nullptr : moments + padded);
        int64_t loaded = 0;
        for (int64_t from = first; from < end; from += plan_.chunk) {
            const int64_t to = from + plan_.chunk < end ? from + plan_.chunk : end;
            int64_t low = rows_.source, high = 0;
            for (int64_t r = from; r < to; ++r) {
                const int64_t start = rows_.first(r);
                low = start < low ? start : low;
                const int64_t stop = start + rows_.taps(rows_.phase(r));
                high = stop > high ? stop : high;
            }
            low = low > loaded ? low : loaded;
            high = high < rows_.source ? high : rows_.source;
            ring_.load(source_, at.n, at.channel, at.channels, low, high);
            loaded = high > loaded ? high : loaded;
            for (int64_t v = 0; v * L::kSize < at.channels; ++v) {
                compute(at.channel + v * L::kSize, v, from, to);
                if (moments != nullptr)
                    statistics.add(v, chunk_, to - from, columns_.result, plan_.across);
                store_rows<In>(result_, at.n, at.channel + v * L::kSize, from, to - from, chunk_,
                               plan_.across);
            }
            statistics.end_chunk((to - from) * columns_.result);
        }
    }

  private:
    // Rows [from, to) of a vector of channels.
    void compute(int64_t channel, int64_t v, int64_t from, int64_t to) {
        const int64_t block = channel / kDepthwiseBlock, lane = channel % kDepthwiseBlock;
        const T* const prepared = static_cast<const T*>(job_.prepared) +
                                  block * kDepthwiseBlock * (job_.taps() + 1) + lane;
        for (int64_t r = from; r < to; ++r) {
            const int64_t phase = rows_.phase(r), count = rows_.taps(phase), start = rows_.first(r);
            const T* sources[kMostTaps];
            for (int64_t i = 0; i < count; ++i)
                sources[i] = ring_.row(start + i, v, rows_.source);
            const T* weights = prepared;
            if (phase == 1) weights += rows_.taps(0) * job_.kernel * kDepthwiseBlock;
            for (int64_t across = 0; across < columns_.phases; ++across) {
                const int64_t begin = columns_.begin(across), taps = columns_.taps(across);
                const int64_t shift = (plan_.lead + columns_.first(begin)) * L::kSize;
                const T* shifted[kMostTaps];
                for (int64_t i = 0; i < count; ++i) shifted[i] = sources[i] + shift;
                RowCall<T> call;
                call.rows = shifted;
                call.count = count;
                call.weights = weights;
                call.bias = prepared + job_.taps() * kDepthwiseBlock;
                call.to = chunk_ + ((r - from) * plan_.across + begin) * L::kSize;
                call.apart = columns_.phases;
                call.columns = columns_.count(across);
                kernels_[across](call);
                weights += count * taps * kDepthwiseBlock;
            }
        }
        if (job_.activation == Activation::None) return;
        Activations<In>::with(job_.activation, T(job_.slope), [&](const auto& apply) {
            T* x = chunk_;
            for (int64_t r = from; r < to; ++r, x += plan_.across * L::kSize)
                for (int64_t i = 0; i < columns_.result; ++i)
                    L::keep(x + i * L::kSize, apply(L::own(x + i * L::kSize)));
        });
    }

    static constexpr int64_t kMostTaps = 7;

    const DepthwiseJob& job_;
    const DepthwisePlan plan_;
    const DepthwiseWalk rows_, columns_;
    const Planes<const In> source_;
    const Planes<In> result_;
    const int64_t vectors_;
    Memory memory_;
    const Ring<In> ring_;
    T* const chunk_;
    RowKernel<L> kernels_[2];
};

template <class In>
void convolve(const DepthwiseJob& job, int64_t begin, int64_t end, void* scratch) {
    Convolution<In> convolution(job, scratch);
    for (int64_t unit = begin; unit < end; ++unit) convolution.run(unit);
}

}  // namespace
}  // namespace conv

DepthwiseKernel depthwise(DType dtype, DepthwiseStep step) {
    DepthwiseKernel found = nullptr;
    for_float(dtype, [&](auto zero) -> Kernel {
        using In = decltype(zero);
        switch (step) {
            case DepthwiseStep::Prepare:
                found = conv::prepare<In>;
                break;
            case DepthwiseStep::Forward:
            case DepthwiseStep::InputGrad:
                found = conv::convolve<In>;
                break;
            case DepthwiseStep::Merge:
                found = conv::merge;
                break;
            default:
                found = depthwise_weight_grad(dtype, step);
        }
        return nullptr;
    });
    return found;
}

}  // namespace pooling_ext::POOLING_EXT_ISA
