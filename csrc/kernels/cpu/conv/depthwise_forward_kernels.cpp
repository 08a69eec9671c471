// Depthwise convolution's output and its input's gradient, compiled once for each instruction set.
#include "kernels/cpu/conv/activation.h"
#include "kernels/cpu/conv/depthwise_columns.h"
#include "kernels/cpu/conv/depthwise_kernels.h"
#include "kernels/cpu/conv/depthwise_statistics.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// The first channel of a vector. In place the last vector ends with the last channel, and may share
// some with the one before.
template <class In>
int64_t start_of(const DepthwiseJob& job, int64_t v) {
    const int64_t start = v * Lanes<In>::kSize, last = job.channels - Lanes<In>::kSize;
    return job.in_place && start > last ? last : start;
}

// --- weights ------------------------------------------------------------------------------------

// For each vector of channels and each phase of rows and columns its taps, and then the biases.
template <class In>
void prepare(const DepthwiseJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    constexpr int64_t kSize = Lanes<In>::kSize, kVectors = kDepthwiseBlock / kSize;
    const DepthwiseWalk rows(job.h, job.kernel, job.backward());
    const DepthwiseWalk columns(job.w, job.kernel, job.backward());
    const In* const weight = static_cast<const In*>(job.weight);
    const In* const bias = static_cast<const In*>(job.bias);
    for (int64_t v = begin * kVectors; v < end * kVectors && v * kSize < job.channels; ++v) {
        const int64_t first = start_of<In>(job, v), left = job.channels - first;
        const int64_t count = left < kSize ? left : kSize;
        T* to = static_cast<T*>(job.prepared) + v * kSize * (job.taps() + 1);
        for (int64_t ph = 0; ph < rows.phases; ++ph)
            for (int64_t pw = 0; pw < columns.phases; ++pw)
                for (int64_t i = 0; i < rows.taps(ph); ++i)
                    for (int64_t j = 0; j < columns.taps(pw); ++j, to += kSize) {
                        const int64_t tap = rows.tap(ph, i) * job.kernel + columns.tap(pw, j);
                        for (int64_t c = 0; c < kSize; ++c)
                            to[c] =
                                c < count ? widen(weight[(first + c) * job.taps() + tap]) : T(0);
                    }
        for (int64_t c = 0; c < kSize; ++c)
            to[c] = bias != nullptr && c < count ? widen(bias[first + c]) : T(0);
    }
}

void merge(const DepthwiseJob& job, int64_t begin, int64_t end, void*) {
    const DepthwisePlan plan(job);
    merge_moments(job.moments, job.batch * plan.bands, job.padded_channels(), job.stats,
                  job.channels, begin * kDepthwiseBlock, end * kDepthwiseBlock, [&](int64_t piece) {
                      const int64_t left = job.h.out - piece % plan.bands * plan.band;
                      return (left < plan.band ? left : plan.band) * job.w.out;
                  });
}

// --- both directions ----------------------------------------------------------------------------

// The rows of a unit. In place the innermost loops read the source where it lies, else from scratch
// memory.
template <class In, bool kInPlace>
class Convolution {
  public:
    using L = Lanes<In>;
    using T = typename L::T;
    // What the innermost loops read and write: the tensors, or scratch memory.
    using E = std::conditional_t<kInPlace, In, T>;
    using Call = ColumnsCall<E>;
    using Kernels = ColumnsKernels<E>;

    Convolution(const DepthwiseJob& job, void* scratch)
        : job_(job),
          plan_(job),
          rows_(job.h, job.kernel, job.backward()),
          columns_(job.w, job.kernel, job.backward()),
          source_{static_cast<const In*>(job.backward() ? job.grad : job.x),
                  job.batch,
                  job.channels,
                  rows_.source,
                  columns_.source,
                  job.channels_last},
          result_{static_cast<In*>(job.y), job.batch,        job.channels, rows_.result,
                  columns_.result,         job.channels_last},
          vectors_(plan_.group * kDepthwiseBlock / L::kSize),
          memory_(scratch),
          starts_(memory_.take<int64_t>(vectors_)),
          weights_(memory_.take<const T*>(2 * vectors_)),
          columns_at_once_(memory_.take<T>(kTogether * kManyColumns * L::kSize)),
          statistics_(job.moments == nullptr ? 0 : vectors_, memory_),
          ring_(memory_.take<T>(kInPlace ? 0 : Ring<In>::size(plan_.slots, vectors_, plan_.width)),
                plan_.slots, vectors_, plan_.width, plan_.lead),
          chunk_(memory_.take<T>(kInPlace ? 0 : plan_.chunk * plan_.across * L::kSize)) {
        if (!kInPlace) ring_.clear();
        for (int64_t phase = 0; phase < columns_.phases; ++phase)
            kernels_[phase] = Kernels(columns_.taps(phase), columns_.step);
    }

    void run(int64_t unit) {
        const DepthwiseUnit at(job_, plan_, false, unit);
        const int64_t first = at.band * plan_.band, left = rows_.result - first;
        const int64_t end = first + (left < plan_.band ? left : plan_.band);
        const int64_t used = (at.channels + L::kSize - 1) / L::kSize;
        if (job_.moments != nullptr) statistics_.begin();
        loaded_ = 0;
        for (int64_t from = first; from < end; from += plan_.chunk) {
            const int64_t to = from + plan_.chunk < end ? from + plan_.chunk : end;
            if constexpr (kInPlace)
                for (int64_t r = from; r < to; ++r) row_in_place(at, r, used, r == first);
            else
                chunk_from_ring(at, from, to, used, from == first);
            if (job_.moments != nullptr) statistics_.merge((to - from) * columns_.result);
        }
        if (job_.moments == nullptr) return;
        double* const moments =
            job_.moments + (at.n * plan_.bands + at.band) * 2 * job_.padded_channels();
        for (int64_t v = 0; v < used; ++v) {
            const int64_t channel = start_of<In>(job_, at.channel / L::kSize + v);
            const int64_t rest = job_.channels - channel;
            statistics_.take(v, rest < L::kSize ? rest : L::kSize, moments + channel,
                             moments + job_.padded_channels() + channel);
        }
    }

  private:
    static constexpr int64_t kMostTaps = 7;
    static constexpr int64_t kTogether = 4;  // vectors

    // What the columns of one row have in common. Its rows of the source are found by `row`.
    template <class Row>
    Call call_of(int64_t r, const E** rows, const Row& row) const {
        const int64_t start = rows_.first(r), end = start + rows_.taps(rows_.phase(r));
        const int64_t low = start > 0 ? start : 0, high = end < rows_.source ? end : rows_.source;
        Call call;
        call.rows = rows;
        call.count = high > low ? high - low : 0;
        for (int64_t i = 0; i < call.count; ++i) rows[i] = row(low + i);
        call.width = columns_.source;
        call.to = columns_at_once_;
        call.pitch = kInPlace ? job_.channels : L::kSize;
        call.vectors = 1;
        return call;
    }

    // Where the weights of a vector begin, for a row and a phase of columns, and how far its bias
    // is.
    const T* weights_of(int64_t v, int64_t r, int64_t across, int64_t* bias) const {
        const int64_t phase = rows_.phase(r), taps = rows_.taps(phase), start = rows_.first(r);
        int64_t at = phase == 1 ? rows_.taps(0) * job_.kernel : 0;
        if (across == 1) at += taps * columns_.taps(0);
        // Rows before the plane's first are left out.
        const int64_t out = start < 0 ? -start : 0;
        at += (out < taps ? out : taps) * columns_.taps(across);
        *bias = (job_.taps() - at) * L::kSize;
        return static_cast<const T*>(job_.prepared) + (v * (job_.taps() + 1) + at) * L::kSize;
    }

    // The kernel for the columns of a phase from `from` on, for which the call is then made.
    POOLING_EXT_INLINE ColumnsKernel<E> some_of(Call& call, int64_t across, int64_t from) const {
        const Kernels& kernels = kernels_[across];
        const int64_t left = columns_.count(across) - from;
        const int64_t reach = (kManyColumns - 1) * columns_.step + columns_.taps(across);
        call.first = columns_.first(columns_.begin(across)) + from * columns_.step;
        call.valid = left < kManyColumns ? left : kManyColumns;
        if (call.first >= 0 && call.first + reach <= columns_.source) return kernels.many_inside;
        return left > kFewColumns ? kernels.many : kernels.few;
    }

    void row_in_place(const DepthwiseUnit& at, int64_t r, int64_t used, bool first_row) {
        const int64_t channels = job_.channels, width = columns_.source * channels;
        const In* const plane = source_.at(at.n, 0, 0);
        const E* rows[kMostTaps];
        Call call = call_of(r, rows, [&](int64_t row) { return plane + row * width; });
        // The rows that the next one needs are asked for while this one is computed.
        const int64_t end = rows_.first(r) + rows_.taps(rows_.phase(r));
        const int64_t ahead = end < rows_.source && end > 0 ? end : -1;
        const int64_t together = rows_.step;
        In* const y = result_.at(at.n, 0, r * columns_.result);
        const int64_t first_vector = at.channel / L::kSize;
        const bool plain = job_.activation == Activation::None && job_.moments == nullptr;
        int64_t biases[2], most = 0;
        for (int64_t across = 0; across < columns_.phases; ++across) {
            for (int64_t v = 0; v < used; ++v)
                weights_[across * vectors_ + v] =
                    weights_of(first_vector + v, r, across, &biases[across]);
            most = columns_.count(across) > most ? columns_.count(across) : most;
        }
        for (int64_t v = 0; v < used; ++v) starts_[v] = start_of<In>(job_, first_vector + v);
        call.apart = columns_.phases * channels;
        for (int64_t from = 0; from < most; from += kManyColumns)
            for (int64_t v = 0; v < used; v += kTogether) {
                call.starts = starts_ + v;
                call.vectors = used - v < kTogether ? used - v : kTogether;
                // Columns of all phases lie together: lines of the cache are written as a whole.
                for (int64_t across = 0; across < columns_.phases; ++across) {
                    if (from >= columns_.count(across)) continue;
                    const auto kernel = some_of(call, across, from);
                    if (ahead >= 0 && across == 0)
                        for (int64_t row = 0; row < together && ahead + row < rows_.source; ++row)
                            prefetch(plane + (ahead + row) * width, call,
                                     call.valid * columns_.step);
                    In* const to = y + (columns_.begin(across) + from * columns_.phases) * channels;
                    call.weights = weights_ + across * vectors_ + v;
                    call.bias = biases[across];
                    call.y = plain ? to : nullptr;
                    kernel(call);
                    if (plain) continue;
                    finish(call, v, first_row && across == 0 && from == 0);
                    write(call, to);
                }
            }
    }

    // Of some columns, the vectors of a call.
    POOLING_EXT_INLINE void prefetch(const In* row, const Call& call, int64_t count) const {
        constexpr int64_t kLine = 64;
        const int64_t bytes =
            (call.starts[call.vectors - 1] - call.starts[0] + L::kSize) * sizeof(In);
        int64_t first = call.first > 0 ? call.first : 0;
        const int64_t end =
            call.first + count < columns_.source ? call.first + count : columns_.source;
        for (; first < end; ++first) {
            const char* const from =
                reinterpret_cast<const char*>(row + first * call.pitch + call.starts[0]);
            for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(from + i);
        }
    }

    // Statistics and activation of what a kernel has just computed.
    POOLING_EXT_INLINE void finish(const Call& call, int64_t v, bool first) {
        constexpr int64_t kApart = kManyColumns * L::kSize;
        if (job_.moments != nullptr)
            for (int64_t i = 0; i < call.vectors; ++i)
                statistics_.add(v + i, call.to + i * kApart, call.valid, first);
        if (job_.activation == Activation::None) return;
        with_function<T>(job_.activation, T(job_.slope), [&](const auto& apply) {
            for (int64_t i = 0; i < call.vectors; ++i)
                for (int64_t k = 0; k < call.valid; ++k) {
                    T* const x = call.to + i * kApart + k * L::kSize;
                    L::keep(x, apply(L::own(x)));
                }
        });
    }

    POOLING_EXT_INLINE void write(const Call& call, In* y) const {
        for (int64_t k = 0; k < call.valid; ++k, y += call.apart)
            for (int64_t i = 0; i < call.vectors; ++i)
                L::put(y + call.starts[i], L::own(call.to + (i * kManyColumns + k) * L::kSize));
    }

    void chunk_from_ring(const DepthwiseUnit& at, int64_t from, int64_t to, int64_t used,
                         bool first) {
        int64_t low = rows_.source, high = 0;
        for (int64_t r = from; r < to; ++r) {
            const int64_t start = rows_.first(r), stop = start + rows_.taps(rows_.phase(r));
            low = start < low ? start : low;
            high = stop > high ? stop : high;
        }
        low = low > loaded_ ? low : loaded_;
        high = high < rows_.source ? high : rows_.source;
        ring_.load(source_, at.n, at.channel, at.channels, low, high);
        loaded_ = high > loaded_ ? high : loaded_;
        for (int64_t v = 0; v < used; ++v) {
            for (int64_t r = from; r < to; ++r)
                row_from_ring(v, at.channel / L::kSize + v, r,
                              chunk_ + (r - from) * plan_.across * L::kSize, first && r == from);
            store_rows<In>(result_, at.n, at.channel + v * L::kSize, from, to - from, chunk_,
                           plan_.across);
        }
    }

    void row_from_ring(int64_t v, int64_t vector, int64_t r, T* to, bool first_row) {
        const E* rows[kMostTaps];
        Call call = call_of(r, rows, [&](int64_t row) {
            return ring_.row(row, v, rows_.source) + plan_.lead * L::kSize;
        });
        const int64_t start = 0;
        call.starts = &start;
        const T* weights;
        call.weights = &weights;
        const bool plain = job_.activation == Activation::None && job_.moments == nullptr;
        for (int64_t across = 0; across < columns_.phases; ++across) {
            weights = weights_of(vector, r, across, &call.bias);
            call.apart = columns_.phases * L::kSize;
            for (int64_t from = 0; from < columns_.count(across); from += kManyColumns) {
                T* into = to + (columns_.begin(across) + from * columns_.phases) * L::kSize;
                const auto kernel = some_of(call, across, from);
                call.y = plain ? into : nullptr;
                kernel(call);
                if (plain) continue;
                finish(call, v, first_row && across == 0 && from == 0);
                for (int64_t k = 0; k < call.valid; ++k, into += call.apart)
                    L::keep(into, L::own(call.to + k * L::kSize));
            }
        }
    }

    const DepthwiseJob& job_;
    const DepthwisePlan plan_;
    const DepthwiseWalk rows_, columns_;
    const Planes<const In> source_;
    const Planes<In> result_;
    const int64_t vectors_;
    Memory memory_;
    int64_t* const starts_;
    const T** const weights_;
    T* const columns_at_once_;
    Statistics<In> statistics_;
    const Ring<In> ring_;
    T* const chunk_;
    int64_t loaded_ = 0;
    Kernels kernels_[2];
};

template <class In>
void convolve(const DepthwiseJob& job, int64_t begin, int64_t end, void* scratch) {
    const auto run = [&](auto convolution) {
        for (int64_t unit = begin; unit < end; ++unit) convolution.run(unit);
    };
    if constexpr (!std::is_same_v<In, Float16>)
        if (job.in_place) return run(Convolution<In, true>(job, scratch));
    run(Convolution<In, false>(job, scratch));
}

}  // namespace
}  // namespace conv

DepthwiseKernel depthwise(DType dtype, DepthwiseStep step) {
    return for_float(dtype, [&](auto zero) -> DepthwiseKernel {
        using In = decltype(zero);
        switch (step) {
            case DepthwiseStep::Prepare:
                return conv::prepare<In>;
            case DepthwiseStep::Forward:
            case DepthwiseStep::InputGrad:
                return conv::convolve<In>;
            case DepthwiseStep::Merge:
                return conv::merge;
            default:
                return depthwise_weight_grad(dtype, step);
        }
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
