// The gradient of max pooling with the windows that CNNs use, of which a byte says who won.
//
// Inputs are taken in cells of the stride. Which windows cover an input, and at which of their
// offsets, depends only on where in its cell it lies: nothing is searched for and nothing diverges.
// A thread walks down the cells of a column, a vector wide, and keeps the windows that the next
// cell needs too. Addresses outside are clamped to the border, and who won there is nobody.
#pragma once

#include "kernels/cuda/pool/pool_backward.cuh"

namespace pooling_ext::cuda {

// Blocks that a multiprocessor has room for: three, or as many as registers do not spill with. More
// are taken by windows of stride 1, which cover an input nine times, and by the coefficients of a
// norm.
template <class To, class Window>
constexpr int kResidentCells = 1 + std::is_empty_v<To> + (Window::stride > 1);

// How far windows lie apart that cover a cell.
template <class Window>
struct Cell {
    static constexpr int K = Window::kernel, S = Window::stride, P = Window::padding;
    // The windows of cell a are a + kLow to a + kHigh.
    static constexpr int kLow = -((K - 1 - P) / S), kHigh = (S - 1 + P) / S;
    static constexpr int kAcross = kHigh - kLow + 1;
    // Cells at once, so that enough loads are on their way.
    static constexpr int kSteps = kAcross == 1 ? 2 : 1;

    // Whether input r of a cell has offset k in a window; and which of its windows that is.
    static POOLING_EXT_DEVICE constexpr bool covers(int r, int k) { return (r + P - k) % S == 0; }
    static POOLING_EXT_DEVICE constexpr int window(int r, int k) { return (r + P - k) / S - kLow; }
};

// N bytes that say who won, in as few registers.
template <int N>
struct Winners {
    using Word = std::conditional_t<N % 4 == 0, unsigned, uint8_t>;
    static constexpr int kBytes = sizeof(Word), kWords = N / kBytes;
    Vec<Word, kWords> words;

    POOLING_EXT_DEVICE void read(const uint8_t* from, bool there) {
        words = load<kWords>(reinterpret_cast<const Word*>(from));
#pragma unroll
        for (int i = 0; i < kWords; ++i) words.at[i] |= there ? Word(0) : Word(~Word(0));
    }

    POOLING_EXT_DEVICE int at(int i) const {
        return int(words.at[i / kBytes] >> 8 * (i % kBytes) & 0xff);
    }
};

// The windows of a row that cover a vector of channels in one cell.
template <class To, class Window, int N>
struct PixelCells {
    using In = typename To::In;
    using C = Cell<Window>;
    static constexpr int kChannels = N;              // of a thread
    static constexpr int kVectors = Window::stride;  // of inputs along a row

    int channel;
    int from[C::kAcross];
    bool there[C::kAcross];
    int to, inputs;  // the first input, and how many there are from it on

    POOLING_EXT_DEVICE PixelCells(const Geometry<int>& g, const Position& at)
        : channel(int(at.vector) * N) {
        const int cell = int(at.column), left = cell * Window::stride;
#pragma unroll
        for (int i = 0; i < C::kAcross; ++i) {
            const int window = cell + C::kLow + i;
            there[i] = window >= 0 && window < g.w.out;
            from[i] = clamped(window, g.w.out) * g.channels + channel;
        }
        to = left * g.channels + channel;
        inputs = g.w.in - left;
    }

    struct Row {
        Vec<In, N> grads[C::kAcross];
        Winners<N> winners[C::kAcross];

        // Of the window that input r of the cell has offset k in.
        POOLING_EXT_DEVICE typename To::T grad(int, int window, int i) const {
            return widen(grads[window].at[i]);
        }
        POOLING_EXT_DEVICE int winner(int, int window, int i) const {
            return winners[window].at(i);
        }
    };

    POOLING_EXT_DEVICE Row read(const In* grads, const uint8_t* winners, bool row_there) const {
        Row row;
#pragma unroll
        for (int i = 0; i < C::kAcross; ++i) {
            row.grads[i] = load<N>(grads + from[i]);
            row.winners[i].read(winners + from[i], row_there && there[i]);
        }
        return row;
    }

    static constexpr int kLength = N;  // of the vectors

    // Element i of vector v: which input of which cell that is.
    static POOLING_EXT_DEVICE constexpr int input(int v, int) { return v; }
    static POOLING_EXT_DEVICE constexpr int cell(int, int) { return 0; }
    static POOLING_EXT_DEVICE constexpr int lane(int i) { return i; }
    POOLING_EXT_DEVICE int step(const Geometry<int>& g) const { return g.channels; }
    POOLING_EXT_DEVICE bool has(int v) const { return v < inputs; }
};

// Those of N cells side by side.
template <class To, class Window, int N>
struct RunCells {
    using In = typename To::In;
    using C = Cell<Window>;
    static constexpr int kChannels = 1;
    static constexpr int kVectors = Window::stride;
    static constexpr int kBefore = -C::kLow, kAfter = C::kHigh;
    static_assert(kBefore <= 1 && kAfter <= 1);

    int channel = 0;
    int from, before, after;
    bool there, before_there, after_there;
    int to, inputs;

    POOLING_EXT_DEVICE RunCells(const Geometry<int>& g, const Position& at) {
        const int first = int(at.column) * N;
        there = first < g.w.out;
        from = there ? first : 0;
        before = clamped(first - 1, g.w.out);
        before_there = first > 0 && first - 1 < g.w.out;
        after = clamped(first + N, g.w.out);
        after_there = first + N < g.w.out;
        to = first * Window::stride;
        inputs = g.w.in - to;
    }

    struct Row {
        Vec<In, N> grads;
        Winners<N> winners;
        typename To::T before = 0, after = 0;
        int before_winner = -1, after_winner = -1;

        POOLING_EXT_DEVICE typename To::T grad(int cell, int window, int) const {
            const int i = cell + window - kBefore;
            return i < 0 ? before : i >= N ? after : widen(grads.at[i]);
        }
        POOLING_EXT_DEVICE int winner(int cell, int window, int) const {
            const int i = cell + window - kBefore;
            return i < 0 ? before_winner : i >= N ? after_winner : winners.at(i);
        }
    };

    POOLING_EXT_DEVICE Row read(const In* grads, const uint8_t* winners, bool row_there) const {
        Row row;
        row.grads = load<N>(grads + from);
        row.winners.read(winners + from, row_there && there);
        if constexpr (kBefore > 0) {
            row.before = widen(load(grads + before).at[0]);
            row.before_winner = int(load(winners + before).at[0]);
            if (!(row_there && before_there)) row.before_winner = -1;
        }
        if constexpr (kAfter > 0) {
            row.after = widen(load(grads + after).at[0]);
            row.after_winner = int(load(winners + after).at[0]);
            if (!(row_there && after_there)) row.after_winner = -1;
        }
        return row;
    }

    static constexpr int kLength = N;

    static POOLING_EXT_DEVICE constexpr int input(int v, int i) {
        return (v * N + i) % Window::stride;
    }
    static POOLING_EXT_DEVICE constexpr int cell(int v, int i) {
        return (v * N + i) / Window::stride;
    }
    static POOLING_EXT_DEVICE constexpr int lane(int) { return 0; }
    POOLING_EXT_DEVICE int step(const Geometry<int>&) const { return N; }
    POOLING_EXT_DEVICE bool has(int v) const { return v * N < inputs; }
};

template <class To, class Window, class Cells>
__global__ void __launch_bounds__(kThreads, kResidentCells<To, Window>)
    max_pool_cells(To to, BackwardCall call, Geometry<int> sizes, Walk walk) {
    using In = typename To::In;
    using C = Cell<Window>;
    constexpr int K = C::K, S = C::S, kKept = C::kAcross - 1, kSteps = C::kSteps;
    constexpr int N = Cells::kLength;
    const Geometry<int> g = Window::of(sizes);
    const Position at(walk);
    if (!at.inside) return;
    const Cells cells(g, at);
    const OwnTo<To, Cells::kChannels> own(to, at.plane, cells.channel);
    const int in_row = g.w.in * g.channels, out_row = g.w.out * g.channels;
    const int64_t plane = at.plane * (int64_t(g.h.out) * out_row);
    const In* const grads = static_cast<const In*>(call.grad) + plane;
    const uint8_t* const winners = static_cast<const uint8_t*>(call.offsets) + plane;
    const auto read = [&](int oh) {
        const int64_t row = int64_t(clamped(oh, g.h.out)) * out_row;
        return cells.read(grads + row, winners + row, oh >= 0 && oh < g.h.out);
    };
    const int last = (g.h.in + S - 1) / S, rows_end = int(at.row + walk.rows);
    const int end = rows_end < last ? rows_end : last;
    int a = int(at.row);
    typename Cells::Row kept[kKept + 1];
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = read(a + C::kLow + i);
    for (; a < end; a += kSteps) {
        typename Cells::Row rows[kKept + kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) rows[kKept + i] = read(a + C::kHigh + i);
#pragma unroll
        for (int i = 0; i < kKept; ++i) rows[i] = kept[i];
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
            for (int rh = 0; rh < S; ++rh) {
                const int ih = (a + step) * S + rh;
                const bool there = a + step < end && ih < g.h.in;
                const int64_t first = (at.plane * g.h.in + ih) * in_row + cells.to;
#pragma unroll
                for (int v = 0; v < Cells::kVectors; ++v) {
                    typename To::T sums[N];
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        sums[i] = 0;
                        const int rw = Cells::input(v, i), cell = Cells::cell(v, i);
                    // The first window has the last offsets.
#pragma unroll
                        for (int kh = K - 1; kh >= 0; --kh)
#pragma unroll
                            for (int kw = K - 1; kw >= 0; --kw) {
                                if (!C::covers(rh, kh) || !C::covers(rw, kw)) continue;
                                const auto& row = rows[step + C::window(rh, kh)];
                                const int window = C::window(rw, kw), lane = Cells::lane(i);
                                if (row.winner(cell, window, lane) == kh * K + kw)
                                    sums[i] += row.grad(cell, window, lane);
                            }
                    }
                    if (!there || !cells.has(v)) continue;
                    const int64_t end = first + int64_t(v) * cells.step(g);
                    store<N>(static_cast<In*>(call.dst) + end, own.template finish<N>(sums, end));
                }
            }
#pragma unroll
        for (int i = 0; i < kKept; ++i) kept[i] = rows[kSteps + i];
    }
}

// Runs the kernel of a job if there is one.
template <class To>
bool launch_max_pool_cells(const PoolJob& job, Stream stream, const To& to = To()) {
    using In = typename To::In;
    bool done = false, aligned = true;
    if constexpr (requires { to.aligned(); }) aligned = to.aligned();
    const PoolParams& p = job.p;
    if (is_whole(p)) return false;
    const BackwardCall call(job);
    with_window<In>(p, [&](auto window) {
        using Window = decltype(window);
        if constexpr (Window::kFixed) {
            constexpr int N = kVector<In>, S = Window::stride;
            const Geometry<int> g(p);
            const auto run = [&](auto cells, int64_t across, int64_t vectors) {
                using Cells = typename decltype(cells)::Type;
                const Walk walk(p.outer, 1, ceil_div(p.h.in, S), across, vectors);
                launch<max_pool_cells<To, Window, Cells>>(walk.grid(), stream, to, call, g, walk);
                done = true;
            };
            if (aligned && p.channels > 1 && takes_vectors<In>(job.src, p.channels))
                return run(Tag<PixelCells<To, Window, N>>(), ceil_div(p.w.in, S), p.channels / N);
            const auto runs = [&](auto length) {
                constexpr int kRun = decltype(length)::value;
                if (!aligned || p.channels > 1 || !takes_vectors<In, kRun>(job.src, p.w.out) ||
                    p.w.in % kRun)
                    return false;
                run(Tag<RunCells<To, Window, kRun>>(), ceil_div(p.w.in, kRun * S), 1);
                return true;
            };
            if (in_runs<In>(runs)) return;
            run(Tag<PixelCells<To, Window, 1>>(), ceil_div(p.w.in, S), p.channels);
        }
    });
    return done;
}

}  // namespace pooling_ext::cuda
