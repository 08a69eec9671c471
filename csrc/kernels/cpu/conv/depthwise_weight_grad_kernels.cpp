// The gradients of depthwise convolution's weights and biases, compiled once for each instruction
// set.
#include "kernels/cpu/conv/depthwise_kernels.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// A chunk of one vector of channels.
template <class T>
struct ChunkCall {
    const T* grad;  // rows `across` columns apart
    int64_t across;
    const T* const* rows;  // of the input, for each row of the output kKernel, `down` further each
    int64_t down;
    int64_t height, width;  // of the output
    T* sums;                // kernel * kernel vectors
};

// Adds the products for kRows rows of the kernel, from `first` on.
template <class L, int kKernel, int kStep, int kRows>
POOLING_EXT_INLINE void some_rows(const ChunkCall<typename L::T>& call, int64_t first) {
    using X = typename L::X;
    X sums[kRows][kKernel] = {};
    for (int64_t y = 0; y < call.height; ++y) {
        const auto* grad = call.grad + y * call.across * L::kSize;
        const typename L::T* x[kRows];
#pragma GCC unroll 7
        for (int r = 0; r < kRows; ++r) x[r] = call.rows[y * call.down + first + r];
        for (int64_t i = 0; i < call.width; ++i, grad += L::kSize) {
            const X g = L::own(grad);
#pragma GCC unroll 7
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 7
                for (int t = 0; t < kKernel; ++t)
                    sums[r][t] += L::own(x[r] + (i * kStep + t) * L::kSize) * g;
        }
    }
#pragma GCC unroll 7
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 7
        for (int t = 0; t < kKernel; ++t) {
            auto* const to = call.sums + ((first + r) * kKernel + t) * L::kSize;
            L::keep(to, L::own(to) + sums[r][t]);
        }
}

// As many rows of the kernel at a time as there are registers for.
template <class L, int kKernel, int kStep>
void products(const ChunkCall<typename L::T>& call) {
    constexpr int kMost = kVectorBytes > 32 ? 28 : kVectorBytes > 16 ? 14 : 9;
    constexpr int kRows = kMost / kKernel < 1         ? 1
                          : kMost / kKernel < kKernel ? kMost / kKernel
                                                      : kKernel;
    int64_t first = 0;
    for (; first + kRows <= kKernel; first += kRows)
        some_rows<L, kKernel, kStep, kRows>(call, first);
    constexpr int kRest = kKernel % kRows;
    if constexpr (kRest > 0) some_rows<L, kKernel, kStep, kRest>(call, first);
}

template <class L>
using ChunkKernel = void (*)(const ChunkCall<typename L::T>&);

template <class L>
ChunkKernel<L> chunk_kernel(int64_t kernel, int64_t step) {
    if (kernel == 3) return step == 1 ? products<L, 3, 1> : products<L, 3, 2>;
    if (kernel == 5) return step == 1 ? products<L, 5, 1> : products<L, 5, 2>;
    return step == 1 ? products<L, 7, 1> : products<L, 7, 2>;
}

// Where a piece's sums of a group of channels are, cleared: for each vector its taps and the
// gradient's sum.
template <class In>
Accumulator<In>* clear_sums(const DepthwiseJob& job, const DepthwiseUnit& at) {
    using L = Lanes<In>;
    const int64_t each = job.taps() + 1;
    auto* const sums = static_cast<typename L::T*>(job.sums) +
                       (at.piece * job.padded_channels() + at.channel) * each;
    const int64_t vectors = (at.channels + L::kSize - 1) / L::kSize;
    std::memset(sums, 0, vectors * each * sizeof(typename L::X));
    return sums;
}

template <class In>
class WeightGrad {
  public:
    using L = Lanes<In>;
    using T = typename L::T;
    using X = typename L::X;

    WeightGrad(const DepthwiseJob& job, void* scratch)
        : job_(job),
          plan_(job),
          rows_(job.h, job.kernel, false),
          columns_(job.w, job.kernel, false),
          input_{static_cast<const In*>(job.x),
                 job.batch,
                 job.channels,
                 job.h.in,
                 job.w.in,
                 job.channels_last},
          grad_{static_cast<const In*>(job.grad),
                job.batch,
                job.channels,
                job.h.out,
                job.w.out,
                job.channels_last},
          vectors_(plan_.group * kDepthwiseBlock / L::kSize),
          memory_(scratch),
          ring_(memory_.take<T>(Ring<In>::size(plan_.slots, vectors_, plan_.width)), plan_.slots,
                vectors_, plan_.width, plan_.lead),
          grads_(memory_.take<T>(Ring<In>::size(plan_.chunk, vectors_, plan_.across)), plan_.chunk,
                 vectors_, plan_.across, 0),
          sources_(memory_.take<const T*>(plan_.chunk * job.kernel)),
          kernel_(chunk_kernel<L>(job.kernel, columns_.step)) {
        ring_.clear();
    }

    void run(int64_t unit) {
        const DepthwiseUnit at(job_, plan_, true, unit);
        T* const sums = clear_sums<In>(job_, at);
        const int64_t items = job_.batch * plan_.bands, end = (at.piece + 1) * items / plan_.pieces;
        for (int64_t item = at.piece * items / plan_.pieces; item < end; ++item)
            add_band(at, item / plan_.bands, item % plan_.bands * plan_.band, sums);
    }

  private:
    void add_band(const DepthwiseUnit& at, int64_t n, int64_t first, T* sums) {
        const int64_t left = rows_.result - first;
        const int64_t end = first + (left < plan_.band ? left : plan_.band);
        int64_t loaded = 0;
        for (int64_t from = first; from < end; from += plan_.chunk) {
            const int64_t to = from + plan_.chunk < end ? from + plan_.chunk : end;
            const int64_t low = rows_.first(from) > loaded ? rows_.first(from) : loaded;
            const int64_t stop = rows_.first(to - 1) + job_.kernel;
            const int64_t high = stop < rows_.source ? stop : rows_.source;
            ring_.load(input_, n, at.channel, at.channels, low, high);
            loaded = high > loaded ? high : loaded;
            grads_.load(grad_, n, at.channel, at.channels, from, to);
            for (int64_t v = 0; v * L::kSize < at.channels; ++v)
                add_chunk(v, from, to, sums + v * (job_.taps() + 1) * L::kSize);
        }
    }

    void add_chunk(int64_t v, int64_t from, int64_t to, T* sums) {
        const int64_t shift = (plan_.lead + columns_.first(0)) * L::kSize;
        for (int64_t y = from; y < to; ++y)
            for (int64_t i = 0; i < job_.kernel; ++i)
                sources_[(y - from) * job_.kernel + i] =
                    ring_.row(rows_.first(y) + i, v, rows_.source) + shift;
        ChunkCall<T> call;
        for (int64_t y = from; y < to;) {
            // Slots of the gradient's rows follow one another up to the last.
            const int64_t slot = y % plan_.chunk, rest = plan_.chunk - slot;
            const int64_t height = to - y < rest ? to - y : rest;
            call.grad = grads_.row(y, v, rows_.result);
            call.across = vectors_ * plan_.across;
            call.rows = sources_ + (y - from) * job_.kernel;
            call.down = job_.kernel;
            call.height = height;
            call.width = columns_.result;
            call.sums = sums;
            kernel_(call);
            if (job_.bias_grad != nullptr) add_grads(call, sums + job_.taps() * L::kSize);
            y += height;
        }
    }

    void add_grads(const ChunkCall<T>& call, T* to) {
        X sum[2] = {};
        for (int64_t y = 0; y < call.height; ++y)
            for (int64_t i = 0; i < call.width; ++i)
                sum[i & 1] += L::own(call.grad + (y * call.across + i) * L::kSize);
        L::keep(to, L::own(to) + (sum[0] + sum[1]));
    }

    const DepthwiseJob& job_;
    const DepthwisePlan plan_;
    const DepthwiseWalk rows_, columns_;
    const Planes<const In> input_, grad_;
    const int64_t vectors_;
    Memory memory_;
    const Ring<In> ring_, grads_;
    const T** const sources_;
    const ChunkKernel<L> kernel_;
};

// --- channels-last, where the tensors lie
// ---------------------------------------------------------

// A row of the output, for one vector of channels.
template <class E>
struct RowProducts {
    using T = Accumulator<E>;
    const E* grad;         // its first column, columns `pitch` elements apart
    const E* const* rows;  // of the input: column 0
    const int64_t* taps;   // which row of the kernel each goes with
    int64_t count;         // of them
    int64_t pitch;
    int64_t first;  // the input's column of the first tap
    int64_t input_width, width;
    T* sums;  // kernel * kernel vectors, and one for the gradient's sum
    bool biased;
};

constexpr int kProductColumns = kVectorBytes > 32 ? 14 : 7;

// The products of kProductColumns columns of the gradient.
template <class E, int kKernel, int kStep, bool kInside>
POOLING_EXT_INLINE void some_products(const RowProducts<E>& call, int64_t from) {
    using L = Lanes<E>;
    using X = typename L::X;
    constexpr int kMany = kProductColumns;
    const int64_t pitch = call.pitch, first = call.first + from * kStep;
    X g[kMany];
    const E* grad = call.grad + from * pitch;
#pragma GCC unroll 14
    for (int i = 0; i < kMany; ++i, grad += pitch) {
        fixed(grad);
        g[i] = kInside || from + i < call.width ? L::get(grad) : X{};
    }
    if (call.biased) {
        X sum = g[0];
#pragma GCC unroll 14
        for (int i = 1; i < kMany; ++i) sum += g[i];
        auto* const to = call.sums + kKernel * kKernel * L::kSize;
        L::keep(to, L::own(to) + sum);
    }
    for (int64_t r = 0; r < call.count; ++r) {
        auto* const to = call.sums + call.taps[r] * kKernel * L::kSize;
        X sums[kKernel];
#pragma GCC unroll 7
        for (int t = 0; t < kKernel; ++t) sums[t] = L::own(to + t * L::kSize);
        const E* x = call.rows[r] + first * pitch;
#pragma GCC unroll 33
        for (int j = 0; j < (kMany - 1) * kStep + kKernel; ++j, x += pitch) {
            if (!kInside && uint64_t(first + j) >= uint64_t(call.input_width)) continue;
            fixed(x);
            const X value = L::get(x);
#pragma GCC unroll 7
            for (int t = 0; t < kKernel; ++t) {
                const int at = j - t;
                if (at >= 0 && at % kStep == 0 && at / kStep < kMany)
                    sums[t] += value * g[at / kStep];
            }
        }
#pragma GCC unroll 7
        for (int t = 0; t < kKernel; ++t) L::keep(to + t * L::kSize, sums[t]);
    }
}

template <class E, int kKernel, int kStep>
void row_products(const RowProducts<E>& call) {
    for (int64_t from = 0; from < call.width; from += kProductColumns) {
        const int64_t first = call.first + from * kStep;
        if (first >= 0 && from + kProductColumns <= call.width &&
            first + (kProductColumns - 1) * kStep + kKernel <= call.input_width)
            some_products<E, kKernel, kStep, true>(call, from);
        else
            some_products<E, kKernel, kStep, false>(call, from);
    }
}

template <class E>
using RowProductsKernel = void (*)(const RowProducts<E>&);

template <class E>
RowProductsKernel<E> row_products_kernel(int64_t kernel, int64_t step) {
    if (kernel == 3) return step == 1 ? row_products<E, 3, 1> : row_products<E, 3, 2>;
    if (kernel == 5) return step == 1 ? row_products<E, 5, 1> : row_products<E, 5, 2>;
    return step == 1 ? row_products<E, 7, 1> : row_products<E, 7, 2>;
}

// Some rows at a time, so that they stay in the cache while vector after vector of channels is
// passed over.
template <class In>
class WeightGradInPlace {
  public:
    using L = Lanes<In>;
    using T = typename L::T;

    explicit WeightGradInPlace(const DepthwiseJob& job)
        : job_(job),
          plan_(job),
          rows_(job.h, job.kernel, false),
          columns_(job.w, job.kernel, false),
          kernel_(row_products_kernel<In>(job.kernel, columns_.step)) {}

    void run(int64_t unit) const {
        const DepthwiseUnit at(job_, plan_, true, unit);
        T* const sums = clear_sums<In>(job_, at);
        const int64_t items = job_.batch * plan_.bands, end = (at.piece + 1) * items / plan_.pieces;
        for (int64_t item = at.piece * items / plan_.pieces; item < end; ++item) {
            const int64_t first = item % plan_.bands * plan_.band, left = rows_.result - first;
            const int64_t last = first + (left < plan_.band ? left : plan_.band);
            for (int64_t from = first; from < last; from += plan_.chunk)
                add_chunk(at, item / plan_.bands, from,
                          from + plan_.chunk < last ? from + plan_.chunk : last, sums);
        }
    }

  private:
    void add_chunk(const DepthwiseUnit& at, int64_t n, int64_t from, int64_t to, T* sums) const {
        const int64_t channels = job_.channels;
        const In* const input =
            static_cast<const In*>(job_.x) + n * job_.h.in * job_.w.in * channels;
        const In* const grad =
            static_cast<const In*>(job_.grad) + n * job_.h.out * job_.w.out * channels;
        const In* rows[kMostTaps];
        int64_t taps[kMostTaps];
        RowProducts<In> call;
        call.rows = rows;
        call.taps = taps;
        call.pitch = channels;
        call.first = columns_.first(0);
        call.input_width = job_.w.in;
        call.width = job_.w.out;
        call.biased = job_.bias_grad != nullptr;
        call.sums = sums;
        for (int64_t v = 0; v * L::kSize < at.channels; ++v) {
            int64_t start = at.channel + v * L::kSize;
            start = start > channels - L::kSize ? channels - L::kSize : start;
            for (int64_t y = from; y < to; ++y) {
                call.count = 0;
                for (int64_t i = 0; i < job_.kernel; ++i) {
                    const int64_t row = rows_.first(y) + i;
                    if (row < 0 || row >= job_.h.in) continue;
                    rows[call.count] = input + row * job_.w.in * channels + start;
                    taps[call.count++] = i;
                }
                call.grad = grad + y * job_.w.out * channels + start;
                kernel_(call);
            }
            call.sums += (job_.taps() + 1) * L::kSize;
        }
    }

    static constexpr int64_t kMostTaps = 7;

    const DepthwiseJob& job_;
    const DepthwisePlan plan_;
    const DepthwiseWalk rows_, columns_;
    const RowProductsKernel<In> kernel_;
};

// --- both ---------------------------------------------------------------------------------------

template <class In>
void weight_grad(const DepthwiseJob& job, int64_t begin, int64_t end, void* scratch) {
    const auto run = [&](auto all) {
        for (int64_t unit = begin; unit < end; ++unit) all.run(unit);
    };
    if constexpr (!std::is_same_v<In, Float16>)
        if (job.in_place) return run(WeightGradInPlace<In>(job));
    run(WeightGrad<In>(job, scratch));
}

// Where the sums of a channel are among those of all: in slot the last vector ends with the last
// channel.
template <class In>
int64_t slot_of(const DepthwiseJob& job, int64_t channel) {
    constexpr int64_t kSize = Lanes<In>::kSize;
    const int64_t last = (job.channels - 1) / kSize * kSize;
    return channel < last || !job.in_place ? channel : channel + last - (job.channels - kSize);
}

template <class In>
void total(const DepthwiseJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    constexpr int64_t kSize = Lanes<In>::kSize;
    const DepthwisePlan plan(job);
    const int64_t taps = job.taps(), piece = job.padded_channels() * (taps + 1);
    const int64_t most = end * kDepthwiseBlock;
    for (int64_t c = begin * kDepthwiseBlock; c < most && c < job.channels; ++c) {
        const int64_t slot = slot_of<In>(job, c);
        const T* const from =
            static_cast<const T*>(job.sums) + slot / kSize * kSize * (taps + 1) + slot % kSize;
        for (int64_t tap = 0; tap <= taps; ++tap) {
            if (tap == taps && job.bias_grad == nullptr) break;
            double sum = 0;
            for (int64_t p = 0; p < plan.pieces; ++p) sum += double(from[p * piece + tap * kSize]);
            In* const to = tap == taps ? static_cast<In*>(job.bias_grad) + c
                                       : static_cast<In*>(job.weight_grad) + c * taps + tap;
            *to = narrow<In>(T(sum));
        }
    }
}

}  // namespace
}  // namespace conv

DepthwiseKernel depthwise_weight_grad(DType dtype, DepthwiseStep step) {
    return for_float(dtype, [&](auto zero) -> DepthwiseKernel {
        using In = decltype(zero);
        return step == DepthwiseStep::Total ? conv::total<In> : conv::weight_grad<In>;
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
