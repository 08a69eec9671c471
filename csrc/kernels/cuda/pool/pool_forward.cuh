// Pooling forward. An Op says what becomes of the elements of a window:
//
//     In, of elements; T, of counts; Acc, what a window has come to
//     kOffsets: whether it wants the offsets of winners; kVectors: whether it is worth vectors
//     Wide: the same where offsets need 64 bits
//     kSquares: false where kernels of its own take the windows that CNNs use (default: true)
//     void start(Acc&), void step(Acc&, In element, offset in the window)
//     Acc merge(Acc, Acc)           of two parts of a window
//     In finish(Acc)                or, with kAverages,
//     In finish(Acc, T count, T size)    of the elements that count, and that a full window has
//     void keep(to, Acc[N])         writes more of N outputs (default: nothing)
//
// One without merge() takes no windows that are the whole plane by themselves. OwnOp may be
// specialized for one that treats each channel in its own way.
#pragma once

#include "kernels/cuda/pool/pool_whole.cuh"

namespace pooling_ext::cuda {

// The Op of a thread whose vectors have the N channels from `channel` of a plane on.
template <class Op, int N>
struct OwnOp {
    const Op& op;

    POOLING_EXT_DEVICE OwnOp(const Op& op, int64_t, int64_t) : op(op) {}

    // With an element of the i-th channel.
    template <class Int>
    POOLING_EXT_DEVICE void step(typename Op::Acc& acc, int, typename Op::In element,
                                 Int offset) const {
        op.step(acc, element, offset);
    }
};

// A vector of channels of one output pixel for each row; one element where the planes are apart.
template <class Op, class Window, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    pool_pixels(Op op, ForwardCall call, Geometry<typename Window::Int> sizes, Walk walk) {
    using In = typename Op::In;
    using Int = typename Window::Int;
    const Geometry<Int> g = Window::of(sizes);
    const Position at(walk);
    if (!at.inside) return;
    const Int od = at.depth, ow = at.column, c = Int(at.vector) * N;
    const int64_t in_row = int64_t(g.w.in) * g.channels;
    const In* x =
        static_cast<const In*>(call.src) + at.plane * (int64_t(g.d.in) * g.h.in * in_row) + c;
    // The elements of windows that lie inside the input; where there are few, all are looked at.
    const Int kd0 = g.d.first(od), kd1 = g.d.end(od);
    const Int kw0 = Window::kFixed ? 0 : g.w.first(ow),
              kw1 = Window::kFixed ? g.w.kernel : g.w.end(ow);
    const Int left = g.w.start(ow);
    const OwnOp<Op, N> own(op, at.plane, c);
    for (unsigned r = 0; r < walk.rows; ++r) {
        const Int oh = at.row + r;
        if (oh >= g.h.out) return;
        typename Op::Acc acc[N];
#pragma unroll
        for (int i = 0; i < N; ++i) op.start(acc[i]);
        const Int top = g.h.start(oh);
        const Int kh0 = Window::kFixed ? 0 : g.h.first(oh),
                  kh1 = Window::kFixed ? g.h.kernel : g.h.end(oh);
        for (Int kd = kd0; kd < kd1; ++kd) {
            const int64_t slice = int64_t(g.d.start(od) + kd * g.d.dilation) * g.h.in;
#pragma unroll(Window::kFixed ? 3 : 1)
            for (Int kh = kh0; kh < kh1; ++kh) {
                const Int ih = top + kh * g.h.dilation;
                if (Window::kFixed && (ih < 0 || ih >= g.h.in)) continue;
                const In* const row = x + (slice + ih) * in_row;
#pragma unroll(Window::kFixed ? 3 : 1)
                for (Int kw = kw0; kw < kw1; ++kw) {
                    const Int iw = left + kw * g.w.dilation;
                    if (Window::kFixed && (iw < 0 || iw >= g.w.in)) continue;
                    const Vec<In, N> values = load<N>(row + int64_t(iw) * g.channels);
                    const Int offset = (kd * g.h.kernel + kh) * g.w.kernel + kw;
#pragma unroll
                    for (int i = 0; i < N; ++i) own.step(acc[i], i, values.at[i], offset);
                }
            }
        }
        const int64_t to =
            (((at.plane * g.d.out + od) * g.h.out + oh) * g.w.out + ow) * g.channels + c;
        Vec<In, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out.at[i] = finish(op, acc[i], call, g, od, oh, ow);
        store<N>(static_cast<In*>(call.dst) + to, out);
        if constexpr (Op::kOffsets) store_offsets(call, g, to, acc, od, oh, ow, Int(0));
        if constexpr (requires { op.keep(to, acc); }) op.keep(to, acc);
    }
}

// A vector of outputs along a row, from as many vectors of inputs as the stride, with the columns
// beside them that the first and the last windows need.
template <class Op, class Window, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    pool_runs(Op op, ForwardCall call, Geometry<int> sizes, Walk walk) {
    using In = typename Op::In;
    constexpr int kBefore = Window::padding, kMiddle = Window::stride * N;
    constexpr int kAfter = Window::kernel - Window::stride - Window::padding > 0
                               ? Window::kernel - Window::stride - Window::padding
                               : 0;
    const Geometry<int> g = Window::of(sizes);
    const Position at(walk);
    if (!at.inside) return;
    const int ow = int(at.column) * N, first = ow * Window::stride;
    const In* const plane =
        static_cast<const In*>(call.src) + at.plane * (int64_t(g.h.in) * g.w.in);
    const OwnOp<Op, 1> own(op, at.plane, 0);
    for (unsigned r = 0; r < walk.rows; ++r) {
        const int oh = at.row + r;
        if (oh >= g.h.out) return;
        typename Op::Acc acc[N];
#pragma unroll
        for (int i = 0; i < N; ++i) op.start(acc[i]);
#pragma unroll
        for (int kh = 0; kh < Window::kernel; ++kh) {
            const int ih = g.h.start(oh) + kh;
            if (ih < 0 || ih >= g.h.in) continue;
            const In* const row = plane + int64_t(ih) * g.w.in + first;
            In values[kBefore + kMiddle + kAfter];
#pragma unroll
            for (int j = 0; j < kBefore; ++j)
                if (first >= kBefore - j) values[j] = load(row - kBefore + j).at[0];
#pragma unroll
            for (int v = 0; v < Window::stride; ++v) {
                if (first + v * N >= g.w.in) continue;
                const Vec<In, N> middle = load<N>(row + v * N);
#pragma unroll
                for (int i = 0; i < N; ++i) values[kBefore + v * N + i] = middle.at[i];
            }
#pragma unroll
            for (int j = 0; j < kAfter; ++j)
                if (first + kMiddle + j < g.w.in)
                    values[kBefore + kMiddle + j] = load(row + kMiddle + j).at[0];
#pragma unroll
            for (int i = 0; i < N; ++i)
#pragma unroll
                for (int kw = 0; kw < Window::kernel; ++kw) {
                    const int j = i * Window::stride + kw, iw = first - kBefore + j;
                    if (iw >= 0 && iw < g.w.in)
                        own.step(acc[i], 0, values[j], kh * Window::kernel + kw);
                }
        }
        const int64_t to = (at.plane * g.h.out + oh) * g.w.out + ow;
        Vec<In, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out.at[i] = finish(op, acc[i], call, g, 0, oh, ow + i);
        store<N>(static_cast<In*>(call.dst) + to, out);
        if constexpr (Op::kOffsets) store_offsets(call, g, to, acc, 0, oh, ow, 1);
    }
}

// --- launching -----------------------------------------------------------------------------------

// Runs Op over the windows of a job. Where there are no vectors to be had, an element at a time.
// `parts` is memory for windows that several blocks share.
template <class Op>
void launch_forward(const Op& op, const PoolJob& job, Offsets kind, Stream stream,
                    void* parts = nullptr) {
    using In = typename Op::In;
    constexpr int N = kVector<In>;
    const PoolParams& p = job.p;
    const ForwardCall call(job, kind);
    const bool channels = p.channels > 1 && takes_vectors<In>(job.src, p.channels);
    constexpr bool kMerges = requires(const typename Op::Acc& acc) { op.merge(acc, acc); };
    if constexpr (kMerges)
        if (is_whole(p) && p.in_plane() > 1 && p.outer * p.channels < (1ll << 31)) {
            const bool planes = p.channels == 1 && takes_vectors<In>(job.src, p.in_plane());
            if (!fits_32_bits(p)) {
                const typename Op::Wide wide(op);
                return launch_whole<typename Op::Wide, int64_t, 1>(wide, p, call, parts, stream);
            }
            if (Op::kVectors && (channels || planes))
                return launch_whole<Op, int, Op::kVectors ? N : 1>(op, p, call, parts, stream);
            return launch_whole<Op, int, 1>(op, p, call, parts, stream);
        }
    constexpr bool kSquares = [] {
        if constexpr (requires { Op::kSquares; }) return Op::kSquares;
        return true;
    }();
    with_window<In, kSquares>(p, [&](auto window) {
        using Window = decltype(window);
        using Int = typename Window::Int;
        const Geometry<Int> g(p);
        if constexpr (Op::kVectors && std::is_same_v<Int, int>) {
            if (channels) {
                const Walk walk(p.outer, p.d.out, p.h.out, p.w.out, p.channels / N);
                return launch<pool_pixels<Op, Window, N>>(walk.grid(), stream, op, call, g, walk);
            }
            if constexpr (Window::kFixed) {
                const auto runs = [&](auto length) {
                    constexpr int kRun = decltype(length)::value;
                    if (p.channels > 1 || !takes_vectors<In, kRun>(job.src, p.w.in) ||
                        p.w.out % kRun)
                        return false;
                    const Walk walk(p.outer, 1, p.h.out, p.w.out / kRun, 1);
                    launch<pool_runs<Op, Window, kRun>>(walk.grid(), stream, op, call, g, walk);
                    return true;
                };
                if (in_runs<In>(runs)) return;
            }
        }
        const Walk walk(p.outer, p.d.out, p.h.out, p.w.out, p.channels);
        if constexpr (std::is_same_v<Int, int>)
            launch<pool_pixels<Op, Window, 1>>(walk.grid(), stream, op, call, g, walk);
        else
            launch<pool_pixels<typename Op::Wide, Window, 1>>(walk.grid(), stream,
                                                              typename Op::Wide(op), call, g, walk);
    });
}

}  // namespace pooling_ext::cuda
