// The mean of each plane of relu(input + residual), compiled once for each instruction set. A unit
// is a plane, or an image in channels-last.
#include "kernels/cpu/norm/add_relu_global_avg_pool.h"
#include "kernels/cpu/pool/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class T>
POOLING_EXT_INLINE T rectified(T z) {
    return select(z < T(0), T(0), z);
}

// sums[i] += relu(x + residual), lane by lane, for rows of n elements one after another.
template <class In, class T>
void add_rows(const In* __restrict x, const In* __restrict residual, int64_t rows, int64_t n,
              T* __restrict sums) {
    for (int64_t row = 0; row < rows; ++row) {
        const In* __restrict a = x + row * n;
        const In* __restrict b = residual + row * n;
        for (int64_t i = 0; i < n; ++i) sums[i] += rectified(T(widen(a[i]) + widen(b[i])));
    }
}

// The sum of relu(x + residual) over n elements; no lane sums many in its own type.
template <class In>
double plane_sum(const In* __restrict x, const In* __restrict residual, int64_t n) {
    using T = Accumulator<In>;
    constexpr int64_t kLanes = 16, kBlock = 256 * kLanes;
    double total = 0;
    for (int64_t from = 0; from < n; from += kBlock) {
        const int64_t end = n - from < kBlock ? n : from + kBlock;
        T lanes[kLanes] = {}, rest = T(0);
        int64_t i = from;
        for (; i + kLanes <= end; i += kLanes)
            for (int64_t j = 0; j < kLanes; ++j)
                lanes[j] += rectified(T(widen(x[i + j]) + widen(residual[i + j])));
        for (; i < end; ++i) rest += rectified(T(widen(x[i]) + widen(residual[i])));
        for (int64_t half = kLanes / 2; half > 0; half /= 2)
            for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
        total += double(lanes[0] + rest);
    }
    return total;
}

template <class In>
void mean(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    const In* const x = static_cast<const In*>(job.x);
    const In* const residual = static_cast<const In*>(job.residual);
    In* const y = static_cast<In*>(job.y);
    const int64_t inner = job.inner, channels = job.channels;
    if (!job.channels_last) {
        for (int64_t plane = begin; plane < end; ++plane) {
            const double sum = plane_sum(x + plane * inner, residual + plane * inner, inner);
            y[plane] = narrow<In>(T(sum / double(inner)));
        }
        return;
    }
    constexpr int64_t kRows = 256;
    Scratch scratch(memory);
    T* const sums = scratch.take<T>(channels);
    double* const totals = scratch.take<double>(channels);
    for (int64_t image = begin; image < end; ++image) {
        for (int64_t c = 0; c < channels; ++c) totals[c] = 0;
        for (int64_t row = 0; row < inner; row += kRows) {
            const int64_t rows = inner - row < kRows ? inner - row : kRows;
            const int64_t from = (image * inner + row) * channels;
            for (int64_t c = 0; c < channels; ++c) sums[c] = T(0);
            add_rows(x + from, residual + from, rows, channels, sums);
            for (int64_t c = 0; c < channels; ++c) totals[c] += double(sums[c]);
        }
        for (int64_t c = 0; c < channels; ++c)
            put(y, image * channels + c, narrow<In>(T(totals[c] / double(inner))));
    }
}

// y = share where x + residual > 0; a NaN lets it through, as in PyTorch.
template <bool kEach, class In, class T>
void spread(const In* __restrict x, const In* __restrict residual, In* __restrict y, int64_t n,
            const T* __restrict shares) {
    const T same = *shares;
    for (int64_t i = 0; i < n; ++i) {
        const T z = widen(x[i]) + widen(residual[i]), share = kEach ? shares[i] : same;
        put(y, i, narrow<In>(select(z <= T(0), T(0), share)));
    }
}

template <class In>
void mean_backward(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    Scratch scratch(memory);
    const int64_t width = job.channels_last ? job.channels : 1;
    const int64_t rows = job.channels_last ? job.inner : 1;
    const int64_t row = job.channels_last ? job.channels : job.inner;
    T* const shares = scratch.take<T>(width);
    for (int64_t unit = begin; unit < end; ++unit) {
        const In* grad = static_cast<const In*>(job.grad) + unit * width;
        for (int64_t c = 0; c < width; ++c) shares[c] = widen(grad[c]) / T(job.inner);
        for (int64_t i = unit * rows * row; i < (unit + 1) * rows * row; i += row) {
            const In* x = static_cast<const In*>(job.x) + i;
            const In* residual = static_cast<const In*>(job.residual) + i;
            In* y = static_cast<In*>(job.y) + i;
            if (job.channels_last)
                spread<true>(x, residual, y, row, shares);
            else
                spread<false>(x, residual, y, row, shares);
        }
    }
}

}  // namespace

BatchNormKernel add_relu_mean(DType dtype, bool backward) {
    return for_float(dtype, [&](auto zero) -> BatchNormKernel {
        using In = decltype(zero);
        return backward ? mean_backward<In> : mean<In>;
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
