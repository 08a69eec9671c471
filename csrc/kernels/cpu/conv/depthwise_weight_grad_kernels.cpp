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
    T* sums;                // kernel * kernel vectors, `apart` numbers from one to the next
    int64_t apart;
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
            auto* const to = call.sums + ((first + r) * kKernel + t) * call.apart;
            L::keep(to, L::own(to) + sums[r][t]);
        }
}

// As many rows of the kernel at a time as there are registers for.
template <class L, int kKernel, int kStep>
void products(const ChunkCall<typename L::T>& call) {
    constexpr int kMost = kVectorBytes > 32 ? 28 : kVectorBytes > 16 ? 14 : 9;
    constexpr int kRows = kMost / kKernel < 1 ? 1 : kMost / kKernel < kKernel ? kMost / kKernel : kKernel;
    int64_t first = 0;
    for (; first + kRows <= kKernel; first += kRows) some_rows<L, kKernel, kStep, kRows>(call, first);
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
          input_{static_cast<const In*>(job.x), job.batch, job.channels,
                 job.h.in, job.w.in, job.channels_last},
          grad_{static_cast<const In*>(job.grad), job.batch, job.channels,
                job.h.out, job.w.out, job.channels_last},
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
        const int64_t padded = job_.padded_channels(), items = job_.batch * plan_.bands;
        T* const sums = static_cast<T*>(job_.sums) + at.piece * (job_.taps() + 1) * padded + at.channel;
        const int64_t many = (at.channels + L::kSize - 1) / L::kSize * L::kSize;
        for (int64_t tap = 0; tap <= job_.taps(); ++tap)
            std::memset(sums + tap * padded, 0, many * sizeof(T));
        const int64_t end = (at.piece + 1) * items / plan_.pieces;
        for (int64_t item = at.piece * items / plan_.pieces; item < end; ++item)
            add_band(at, item / plan_.bands, item % plan_.bands * plan_.band, sums, padded);
    }

  private:
    void add_band(const DepthwiseUnit& at, int64_t n, int64_t first, T* sums, int64_t padded) {
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
                add_chunk(v, from, to, sums + v * L::kSize, padded);
        }
    }

    void add_chunk(int64_t v, int64_t from, int64_t to, T* sums, int64_t padded) {
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
            call.apart = padded;
            kernel_(call);
            if (job_.bias_grad != nullptr) add_grads(call, sums + job_.taps() * padded);
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

template <class In>
void weight_grad(const DepthwiseJob& job, int64_t begin, int64_t end, void* scratch) {
    WeightGrad<In> all(job, scratch);
    for (int64_t unit = begin; unit < end; ++unit) all.run(unit);
}

template <class In>
void total(const DepthwiseJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    const DepthwisePlan plan(job);
    const int64_t padded = job.padded_channels(), taps = job.taps();
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kDepthwiseBlock, left = job.channels - first;
        const int64_t count = left < kDepthwiseBlock ? left : kDepthwiseBlock;
        for (int64_t tap = 0; tap <= taps; ++tap) {
            if (tap == taps && job.bias_grad == nullptr) break;
            double sums[kDepthwiseBlock] = {};
            const T* from = static_cast<const T*>(job.sums) + tap * padded + first;
            for (int64_t piece = 0; piece < plan.pieces; ++piece, from += (taps + 1) * padded)
                for (int64_t c = 0; c < kDepthwiseBlock; ++c) sums[c] += double(from[c]);
            for (int64_t c = 0; c < count; ++c) {
                const In value = narrow<In>(T(sums[c]));
                if (tap == taps)
                    static_cast<In*>(job.bias_grad)[first + c] = value;
                else
                    static_cast<In*>(job.weight_grad)[(first + c) * taps + tap] = value;
            }
        }
    }
}

}  // namespace
}  // namespace conv

DepthwiseKernel depthwise_weight_grad(DType dtype, DepthwiseStep step) {
    DepthwiseKernel found = nullptr;
    for_float(dtype, [&](auto zero) -> Kernel {
        using In = decltype(zero);
        found = step == DepthwiseStep::Total ? conv::total<In> : conv::weight_grad<In>;
        return nullptr;
    });
    return found;
}

}  // namespace pooling_ext::POOLING_EXT_ISA
