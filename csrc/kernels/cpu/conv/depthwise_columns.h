// The innermost loops of depthwise convolution's output and its input's gradient.
#pragma once

#include "kernels/cpu/conv/depthwise_rows.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// Some columns of a row of the result, for some vectors of channels.
template <class E>
struct ColumnsCall {
    using T = Accumulator<E>;
    const E* const* rows;     // of the source: its column 0, only those inside the plane
    int64_t count;            // of them
    int64_t pitch;            // from one column to the next, in elements
    int64_t first, width;     // the column of the first tap, and how many columns there are
    const int64_t* starts;    // of each vector, in elements from a column's first
    const T* const* weights;  // of each vector: the taps of the rows, then at `bias` the bias
    int64_t bias;
    int64_t vectors;
    // Results go where they belong, columns `apart` elements from each other, of which there are
    // `valid`; or, where there is more to do with them, into scratch memory, kManyColumns each.
    E* y;
    int64_t apart, valid;
    T* to;
};

// Columns computed at once: as many as there are registers for their sums, a row's weights and one
// of its elements.
constexpr int kFewColumns = DepthwisePlan::kColumns;
constexpr int kManyColumns = kVectorBytes > 32 ? 2 * kFewColumns : kFewColumns;

// kMany columns, each a sum over kTaps columns of each row; results lie kStep columns of the source
// apart. kInside: all columns are inside the plane; else what is outside adds nothing.
template <class E, int kMany, int kTaps, int kStep, bool kInside>
void some_columns(const ColumnsCall<E>& call) {
    using L = Lanes<E>;
    using X = typename L::X;
    auto* to = call.to;
    const int64_t pitch = call.pitch;
    for (int64_t v = 0; v < call.vectors; ++v, to += kManyColumns * L::kSize) {
        const auto* weight = call.weights[v];
        const int64_t start = call.first * pitch + call.starts[v];
        X sums[kMany];
        const X bias = L::own(weight + call.bias);
#pragma GCC unroll 14
        for (int i = 0; i < kMany; ++i) sums[i] = bias;
        for (int64_t r = 0; r < call.count; ++r) {
            const E* x = call.rows[r] + start;
            X w[kTaps];
#pragma GCC unroll 7
            for (int t = 0; t < kTaps; ++t, weight += L::kSize) w[t] = L::own(weight);
#pragma GCC unroll 33
            for (int j = 0; j < (kMany - 1) * kStep + kTaps; ++j, x += pitch) {
                if (!kInside && uint64_t(call.first + j) >= uint64_t(call.width)) continue;
                fixed(x);
                const X value = L::get(x);
#pragma GCC unroll 7
                for (int t = 0; t < kTaps; ++t) {
                    const int at = j - t;
                    if (at >= 0 && at % kStep == 0 && at / kStep < kMany)
                        sums[at / kStep] += value * w[t];
                }
            }
        }
        if (call.y == nullptr) {
#pragma GCC unroll 14
            for (int i = 0; i < kMany; ++i) L::keep(to + i * L::kSize, sums[i]);
            continue;
        }
        E* y = call.y + call.starts[v];
        const int64_t apart = call.apart;
#pragma GCC unroll 14
        for (int i = 0; i < kMany; ++i, y += apart)
            if (i < call.valid) L::put(y, sums[i]);
    }
}

template <class E>
using ColumnsKernel = void (*)(const ColumnsCall<E>&);

// The kernels for one number of taps.
template <class E>
struct ColumnsKernels {
    ColumnsKernel<E> many_inside, many, few;

    ColumnsKernels() = default;
    ColumnsKernels(int64_t taps, int64_t step) {
        switch (taps) {
            case 1:
                set<1, 1>();
                break;
            case 2:
                set<2, 1>();
                break;
            case 3:
                step == 1 ? set<3, 1>() : set<3, 2>();
                break;
            case 4:
                set<4, 1>();
                break;
            case 5:
                step == 1 ? set<5, 1>() : set<5, 2>();
                break;
            default:
                step == 1 ? set<7, 1>() : set<7, 2>();
                break;
        }
    }

  private:
    template <int kTaps, int kStep>
    void set() {
        many_inside = some_columns<E, kManyColumns, kTaps, kStep, true>;
        many = some_columns<E, kManyColumns, kTaps, kStep, false>;
        few = some_columns<E, kFewColumns, kTaps, kStep, false>;
    }
};

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
