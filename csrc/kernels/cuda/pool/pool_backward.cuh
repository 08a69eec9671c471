// Pooling backward: each element of the input gathers from the windows that cover it, so that there
// are no atomics and the order of a sum is always the same.
#pragma once

#include "kernels/cuda/pool/pool.cuh"

namespace pooling_ext::cuda {

struct BackwardCall {
    const void* grad;
    const void* offsets;
    void* dst;
    bool count_include_pad;
    int64_t divisor;

    explicit BackwardCall(const PoolJob& job)
        : grad(job.src),
          offsets(job.offsets_in),
          dst(job.dst),
          count_include_pad(job.count_include_pad),
          divisor(job.divisor) {}
};

// The sizes that averages divide by.
template <class T, class Int>
POOLING_EXT_DEVICE T count_of(const BackwardCall& call, const Geometry<Int>& g, Int od, Int oh,
                              Int ow) {
    if (call.divisor) return T(call.divisor);
    return T(g.d.count(od, call.count_include_pad)) * T(g.h.count(oh, call.count_include_pad)) *
           T(g.w.count(ow, call.count_include_pad));
}

// The gradients of a max pool go to the winners. `Stored` is what offsets are kept in.
template <class In_, class Stored_>
struct ToWinner {
    using In = In_;
    using T = Accumulator<In>;
    using Stored = Stored_;
    static constexpr bool kOffsets = true;
    // Bytes are those of windows that max_pool_cells.cuh has kernels for.
    static constexpr bool kSquares = sizeof(Stored) > 1;

    // What the offset of the winner has to be for a gradient to go to this element: its offset in
    // the window, or its index in the plane, either of which fits Int.
    template <class Int>
    static POOLING_EXT_DEVICE Int wanted(Int offset, Int index) {
        return sizeof(Stored) == 8 ? index : offset;
    }
};

// The gradients of an average go to all elements, in equal shares.
template <class In_>
struct ToAll {
    using In = In_;
    using T = Accumulator<In>;
    using Stored = uint8_t;
    static constexpr bool kOffsets = false, kSquares = true;
};

// What a thread does with the gradients of vectors that have the N channels from `channel` of a
// plane on, or the same one.
//
// A To with data has its own OwnTo, and says by aligned() whether that may read in vectors.
template <class To, int N>
struct OwnTo {
    POOLING_EXT_DEVICE OwnTo(const To&, int64_t, int64_t) {}

    // A vector of the result, which is to be written from `at` on.
    template <int M>
    POOLING_EXT_DEVICE Vec<typename To::In, M> finish(const typename To::T* acc, int64_t) const {
        Vec<typename To::In, M> out;
#pragma unroll
        for (int i = 0; i < M; ++i) out.at[i] = narrow<typename To::In>(acc[i]);
        return out;
    }
};

// A vector of channels of one input pixel for each row.
template <class To, class Window, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    gather_pixels(To to, BackwardCall call, Geometry<typename Window::Int> sizes, Walk walk) {
    using In = typename To::In;
    using T = typename To::T;
    using Stored = typename To::Stored;
    using Int = typename Window::Int;
    const Geometry<Int> g = Window::of(sizes);
    const Position at(walk);
    if (!at.inside) return;
    const Int id = at.depth, iw = at.column, c = Int(at.vector) * N;
    const int64_t out_row = int64_t(g.w.out) * g.channels;
    const int64_t plane = at.plane * (int64_t(g.d.out) * g.h.out * out_row) + c;
    const Int od0 = g.d.first_output(id), od1 = g.d.end_output(id);
    const Int ow0 = g.w.first_output(iw), ow1 = g.w.end_output(iw);
    const OwnTo<To, N> own(to, at.plane, c);
    for (unsigned r = 0; r < walk.rows; ++r) {
        const Int ih = at.row + r;
        if (ih >= g.h.in) return;
        T acc[N];
#pragma unroll
        for (int i = 0; i < N; ++i) acc[i] = 0;
        const Int index = (id * g.h.in + ih) * g.w.in + iw;
        const Int oh0 = g.h.first_output(ih), oh1 = g.h.end_output(ih);
        for (Int od = od0; od < od1; ++od) {
            const Int kd = g.d.element(od, id);
            if (kd < 0) continue;
#pragma unroll 2
            for (Int oh = oh0; oh < oh1; ++oh) {
                const Int kh = g.h.element(oh, ih);
                if (kh < 0) continue;
                const int64_t row = plane + (int64_t(od) * g.h.out + oh) * out_row;
#pragma unroll 2
                for (Int ow = ow0; ow < ow1; ++ow) {
                    const Int kw = g.w.element(ow, iw);
                    if (kw < 0) continue;
                    const int64_t from = row + int64_t(ow) * g.channels;
                    const Vec<In, N> grads = load<N>(static_cast<const In*>(call.grad) + from);
                    if constexpr (To::kOffsets) {
                        const Int wanted =
                            To::wanted((kd * g.h.kernel + kh) * g.w.kernel + kw, index);
                        const Vec<Stored, N> offsets =
                            load<N>(static_cast<const Stored*>(call.offsets) + from);
#pragma unroll
                        for (int i = 0; i < N; ++i)
                            if (Int(offsets.at[i]) == wanted) acc[i] += widen(grads.at[i]);
                    } else {
                        const T count = count_of<T>(call, g, od, oh, ow);
#pragma unroll
                        for (int i = 0; i < N; ++i) acc[i] += widen(grads.at[i]) / count;
                    }
                }
            }
        }
        const int64_t end = (at.plane * g.d.in * g.h.in * g.w.in + int64_t(index)) * g.channels + c;
        store<N>(static_cast<In*>(call.dst) + end, own.template finish<N>(acc, end));
    }
}

// As many vectors of inputs along a row as the stride, from a vector of outputs with those beside
// it whose windows reach in.
template <class To, class Window, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    gather_runs(To to, BackwardCall call, Geometry<int> sizes, Walk walk) {
    using In = typename To::In;
    using T = typename To::T;
    using Stored = typename To::Stored;
    constexpr int K = Window::kernel, S = Window::stride, P = Window::padding;
    constexpr int kBefore = (K - 1 - P) / S, kAfter = P > 0 ? (P - 1) / S + 1 : 0;
    constexpr int kOutputs = kBefore + N + kAfter;
    const Geometry<int> g = Window::of(sizes);
    const Position at(walk);
    if (!at.inside) return;
    const int first = int(at.column) * N * S;       // of the inputs
    const int left = int(at.column) * N - kBefore;  // of the outputs
    const OwnTo<To, 1> own(to, at.plane, 0);
    for (unsigned r = 0; r < walk.rows; ++r) {
        const int ih = at.row + r;
        if (ih >= g.h.in) return;
        T acc[N * S];
#pragma unroll
        for (int i = 0; i < N * S; ++i) acc[i] = 0;
        const int oh0 = g.h.first_output(ih), oh1 = g.h.end_output(ih);
        for (int oh = oh0; oh < oh1; ++oh) {
            const int kh = g.h.element(oh, ih);
            if (kh < 0) continue;
            const int64_t row = (at.plane * g.h.out + oh) * g.w.out + left;
            T grads[kOutputs];
            int offsets[kOutputs];
            const auto take = [&](int j, In grad, Stored offset) {
                grads[j] = widen(grad);
                offsets[j] = int(offset);
                if constexpr (!To::kOffsets) grads[j] /= count_of<T>(call, g, 0, oh, left + j);
            };
            const In* const from = static_cast<const In*>(call.grad) + row;
            const Stored* winners = nullptr;
            if constexpr (To::kOffsets) winners = static_cast<const Stored*>(call.offsets) + row;
#pragma unroll
            for (int j = 0; j < kOutputs; ++j) {
                grads[j] = 0;
                offsets[j] = -1;
                if (j >= kBefore && j < kBefore + N) continue;
                if (left + j < 0 || left + j >= g.w.out) continue;
                take(j, load(from + j).at[0], To::kOffsets ? load(winners + j).at[0] : Stored());
            }
            if (left + kBefore < g.w.out) {
                const Vec<In, N> middle = load<N>(from + kBefore);
                Vec<Stored, N> won{};
                if constexpr (To::kOffsets) won = load<N>(winners + kBefore);
#pragma unroll
                for (int i = 0; i < N; ++i) take(kBefore + i, middle.at[i], won.at[i]);
            }
#pragma unroll
            for (int j = 0; j < kOutputs; ++j)
#pragma unroll
                for (int kw = 0; kw < K; ++kw) {
                    const int i = (j - kBefore) * S - P + kw;
                    if (i < 0 || i >= N * S) continue;
                    if (!To::kOffsets || offsets[j] == kh * K + kw) acc[i] += grads[j];
                }
        }
        const int64_t end = (at.plane * g.h.in + ih) * g.w.in + first;
#pragma unroll
        for (int v = 0; v < S; ++v) {
            if (first + v * N >= g.w.in) continue;
            store<N>(static_cast<In*>(call.dst) + end + v * N,
                     own.template finish<N>(acc + v * N, end + v * N));
        }
    }
}

// Planes with one window each, taken as one long row, so that vectors may begin anywhere.
template <class To, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    spread_whole_planes(BackwardCall call, Geometry<int> g, int64_t planes) {
    using In = typename To::In;
    using T = typename To::T;
    using Stored = typename To::Stored;
    const int size = g.d.in * g.h.in * g.w.in;
    const int64_t total = planes * size;
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
    if (first >= total) return;
    int64_t plane = total <= 0xffffffff ? int64_t(unsigned(first) / unsigned(size)) : first / size;
    int at = int(first - plane * size);
    T grad = 0;
    int64_t winner = -1;
    const auto next = [&] {
        grad = widen(load(static_cast<const In*>(call.grad) + plane).at[0]);
        if constexpr (To::kOffsets)
            winner = int64_t(load(static_cast<const Stored*>(call.offsets) + plane).at[0]);
        else
            grad /= count_of<T>(call, g, 0, 0, 0);
    };
    next();
    Vec<In, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (at == size) {
            at = 0;
            if (++plane < planes) next();
        }
        out.at[i] = narrow<In>(!To::kOffsets || winner == at ? grad : T(0));
        ++at;
    }
    In* const to = static_cast<In*>(call.dst) + first;
    if (first + N <= total) return store<N>(to, out);
    for (int i = 0; first + i < total; ++i) store(to + i, {{out.at[i]}});
}

template <class To>
void launch_backward(const PoolJob& job, Stream stream, const To& to = To()) {
    using In = typename To::In;
    constexpr int N = kVector<In>;
    // Offsets of more than a byte are rare.
    constexpr bool kVectors = sizeof(typename To::Stored) == 1;
    const PoolParams& p = job.p;
    const BackwardCall call(job);
    bool aligned = true;
    if constexpr (requires { to.aligned(); }) aligned = to.aligned();
    if constexpr (kVectors && std::is_empty_v<To>)
        if (is_whole(p) && p.channels == 1 && fits_32_bits(p)) {
            const int64_t blocks = ceil_div(p.outer * p.in_plane(), int64_t(kThreads) * N);
            const Grid grid{dim3(unsigned(blocks)), dim3(kThreads)};
            return launch<spread_whole_planes<To, N>>(grid, stream, call, Geometry<int>(p),
                                                      p.outer);
        }
    with_window<In, To::kSquares>(p, [&](auto window) {
        using Window = decltype(window);
        using Int = typename Window::Int;
        const Geometry<Int> g(p);
        if constexpr (kVectors && std::is_same_v<Int, int>) {
            if (aligned && p.channels > 1 && takes_vectors<In>(job.src, p.channels)) {
                const Walk walk(p.outer, p.d.in, p.h.in, p.w.in, p.channels / N);
                return launch<gather_pixels<To, Window, N>>(walk.grid(), stream, to, call, g, walk);
            }
            if constexpr (Window::kFixed) {
                const auto runs = [&](auto length) {
                    constexpr int kRun = decltype(length)::value;
                    if (!aligned || p.channels > 1 || !takes_vectors<In, kRun>(job.src, p.w.out) ||
                        p.w.in % kRun)
                        return false;
                    const int64_t columns = ceil_div(p.w.in, kRun * Window::stride);
                    const Walk walk(p.outer, 1, p.h.in, columns, 1);
                    launch<gather_runs<To, Window, kRun>>(walk.grid(), stream, to, call, g, walk);
                    return true;
                };
                if (in_runs<In>(runs)) return;
            }
        }
        const Walk walk(p.outer, p.d.in, p.h.in, p.w.in, p.channels);
        launch<gather_pixels<To, Window, 1>>(walk.grid(), stream, to, call, g, walk);
    });
}

}  // namespace pooling_ext::cuda
