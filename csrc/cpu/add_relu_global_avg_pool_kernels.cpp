// The mean of each plane of relu(input + residual), compiled once for each instruction set. A unit
// is a plane, or an image in channels-last.
#include "cpu/pool_forward.h"
#include "cpu/tables.h"

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

template <class In>
void mean(const BatchNormJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    // No lane sums many elements in its own type.
    constexpr int64_t kLanes = 64, kRows = 256;
    Scratch scratch(memory);
    const int64_t width = job.channels_last ? job.channels : kLanes;
    const int64_t size = job.channels_last ? job.channels * job.inner : job.inner;
    const int64_t rows = size / width, rest = size - rows * width;
    T* const sums = scratch.take<T>(width);
    double* const totals = scratch.take<double>(width);
    for (int64_t unit = begin; unit < end; ++unit) {
        const In* x = static_cast<const In*>(job.x) + unit * size;
        const In* residual = static_cast<const In*>(job.residual) + unit * size;
        for (int64_t i = 0; i < width; ++i) totals[i] = 0;
        for (int64_t row = 0; row == 0 || row < rows; row += kRows) {
            const int64_t some = rows - row < kRows ? rows - row : kRows;
            for (int64_t i = 0; i < width; ++i) sums[i] = T(0);
            add_rows(x + row * width, residual + row * width, some, width, sums);
            if (rest && row + some == rows)
                add_rows(x + rows * width, residual + rows * width, 1, rest, sums);
            for (int64_t i = 0; i < width; ++i) totals[i] += double(sums[i]);
        }
        In* const y = static_cast<In*>(job.y) + (job.channels_last ? unit * width : unit);
        if (job.channels_last) {
            for (int64_t c = 0; c < width; ++c)
                put(y, c, narrow<In>(T(totals[c] / double(job.inner))));
            continue;
        }
        double total = 0;
        for (int64_t i = 0; i < width; ++i) total += totals[i];
        *y = narrow<In>(T(total / double(job.inner)));
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
    BatchNormKernel found = nullptr;
    for_float(dtype, [&](auto zero) -> Kernel {
        using In = decltype(zero);
        found = backward ? mean_backward<In> : mean<In>;
        return nullptr;
    });
    return found;
}

}  // namespace pooling_ext::POOLING_EXT_ISA
