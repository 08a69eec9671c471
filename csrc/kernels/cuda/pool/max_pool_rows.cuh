// Max pooling with the windows that CNNs use, as code without a branch around a load.
//
// A thread walks down the rows of a column, a vector wide. Of each row it keeps what the row's part
// of a window comes to, as long as windows below share it, so that each row is read and compared
// once. All rows of a step are read before the first is used: enough bytes are then on their way.
// Addresses outside the input are clamped to its border. That reads an element of the window twice,
// at its own place and at one outside, and where the latter comes first it is counted as the
// former.
#pragma once

#include <limits>

#include "kernels/cuda/pool/lanes.cuh"
#include "kernels/cuda/pool/pool_forward.cuh"

namespace pooling_ext::cuda {

// What is compared: by default the elements as they are. OwnCompared may be specialised for others.
template <class In_>
struct AsTheyAre {
    using In = In_;
    // Three blocks of 256 threads have 72 KB on their way; registers allow no fourth one.
    static constexpr int kResident = 3;
    static constexpr bool kKeeps = false;  // whether the winners' elements are written, too
};

// The same for a thread whose vectors have the channels from `channel` of a plane on.
template <class Compared, class Columns>
struct OwnCompared {
    using Value = typename Columns::Lanes::Value;

    POOLING_EXT_DEVICE OwnCompared(const Compared&, int64_t, int) {}

    // Of value w of a vector, and of one element of the i-th channel.
    POOLING_EXT_DEVICE Value operator()(Value x, int) const { return x; }
    POOLING_EXT_DEVICE auto of_one(typename Compared::In x, int) const { return widen(x); }
    // What is written of it.
    template <class T>
    POOLING_EXT_DEVICE T finish(T best) const {
        return best;
    }
};

// The columns of W values of a pixel's channels, side by side in memory.
template <class Lanes_, class Window, int W_>
struct PixelColumns {
    using Lanes = Lanes_;
    using In = typename Lanes::In;
    static constexpr int W = W_, N = W * Lanes::kLanes;
    static constexpr int kChannels = N;
    static constexpr int K = Window::kernel;
    static constexpr int kStep = 0;  // columns from one number to the next
    static constexpr int kSteps = K == 3 && Window::stride == 2 ? 1 : 2;  // outputs at once

    int column, channel;
    int from[K];
    int to;
    typename Lanes::Offset border;

    POOLING_EXT_DEVICE PixelColumns(const Geometry<int>& g, const Place& at)
        : column(int(at.column)), channel(int(at.vector) * N) {
        const int left = column * Window::stride - Window::padding;
#pragma unroll
        for (int k = 0; k < K; ++k) from[k] = clamped(left + k, g.w.in) * g.channels + channel;
        to = column * g.channels + channel;
        border = Lanes::offset(left < 0 ? 1 : 0);
    }

    struct Row {
        typename Lanes::Value values[K][W];
    };

    POOLING_EXT_DEVICE Row read(const In* row) const {
        Row read;
#pragma unroll
        for (int k = 0; k < K; ++k) Lanes::read(row + from[k], read.values[k]);
        return read;
    }

    template <class Own>
    POOLING_EXT_DEVICE Row compared(const Row& row, const Own& own) const {
        Row compared;
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int w = 0; w < W; ++w) compared.values[k][w] = own(row.values[k][w], w);
        return compared;
    }

    // What is in place k of the windows.
    POOLING_EXT_DEVICE typename Lanes::Value value(const Row& row, int k, int w) const {
        return row.values[k][w];
    }

    // The place of what stands in place 0.
    POOLING_EXT_DEVICE typename Lanes::Offset first(int) const { return border; }

    POOLING_EXT_DEVICE typename Lanes::Flag flag(const Row& row) const {
        typename Lanes::Flag flags[K] = {};
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int w = 0; w < W; ++w) Lanes::watch(flags[k], row.values[k][w]);
        auto all = flags[0];
#pragma unroll
        for (int k = 1; k < K; ++k) all = Lanes::either(all, flags[k]);
        return all;
    }
};

// The windows of as many outputs along a row; what neighbours share is read once.
template <class Lanes_, class Window, int W_>
struct RunColumns {
    using Lanes = Lanes_;
    using In = typename Lanes::In;
    static constexpr int W = W_, N = W * Lanes::kLanes;
    static constexpr int kChannels = 1;
    static constexpr int K = Window::kernel, S = Window::stride, P = Window::padding;
    static constexpr int kStep = 1;
    static constexpr int kSteps = 2;
    static constexpr bool kAfter = K - S - P > 0;
    static_assert(P <= 1 && K - S - P <= 1);

    int column, channel = 0;
    int from, before, after;
    int to;
    typename Lanes::Offset border;

    POOLING_EXT_DEVICE RunColumns(const Geometry<int>& g, const Place& at)
        : column(int(at.column) * N) {
        from = column * S;
        before = clamped(from - 1, g.w.in);
        after = clamped(from + S * N, g.w.in);
        to = column;
        border = column == 0 ? P : 0;
    }

    struct Row {
        typename Lanes::Value values[1 + S * W + 1];
    };

    POOLING_EXT_DEVICE Row read(const In* row) const {
        Row read;
        read.values[0] = read.values[1 + S * W] = {};
#pragma unroll
        for (int s = 0; s < S; ++s) {
            typename Lanes::Value values[W];
            Lanes::read(row + from + s * N, values);
#pragma unroll
            for (int w = 0; w < W; ++w) read.values[1 + s * W + w] = values[w];
        }
        if constexpr (P > 0) read.values[0] = Lanes::last(row + before);
        if constexpr (kAfter) read.values[1 + S * W] = Lanes::first(row + after);
        return read;
    }

    template <class Own>
    POOLING_EXT_DEVICE Row compared(const Row& row, const Own& own) const {
        Row compared = row;
#pragma unroll
        for (int i = P > 0 ? 0 : 1; i < S * W + (kAfter ? 2 : 1); ++i)
            compared.values[i] = own(row.values[i], 0);
        return compared;
    }

    POOLING_EXT_DEVICE typename Lanes::Value value(const Row& row, int k, int w) const {
        return Lanes::gather(row.values, (1 + w * S) * Lanes::kLanes + k - P, S);
    }

    POOLING_EXT_DEVICE typename Lanes::Offset first(int w) const {
        return w == 0 ? border : typename Lanes::Offset(0);
    }

    POOLING_EXT_DEVICE typename Lanes::Flag flag(const Row& row) const {
        typename Lanes::Flag flag = {};
#pragma unroll
        for (int i = 0; i < 2 + S * W; ++i) Lanes::watch(flag, row.values[i]);
        return flag;
    }
};

// What parts of windows come to.
template <class Columns>
struct BestOf {
    using Lanes = typename Columns::Lanes;
    static constexpr int W = Columns::W;

    typename Lanes::Value value[W];
    // Nobody asks for these in inference, nor for the elements where they are what is compared.
    typename Lanes::Offset offset[W];
    typename Lanes::Value element[W];
    typename Lanes::Flag flag;

    POOLING_EXT_DEVICE void take(int w, typename Lanes::Value other,
                                 typename Lanes::Offset other_offset,
                                 typename Lanes::Value other_element) {
        const auto wins = Lanes::wins(other, value[w]);
        value[w] = Lanes::pick(wins, other, value[w]);
        offset[w] = Lanes::pick(wins, other_offset, offset[w]);
        element[w] = Lanes::pick(wins, other_element, element[w]);
    }

    // A row; offsets are counted from its own.
    template <class Own>
    static POOLING_EXT_DEVICE BestOf row(const Columns& columns, const typename Columns::Row& row,
                                         const Own& own) {
        const typename Columns::Row compared = columns.compared(row, own);
        BestOf best;
        best.flag = columns.flag(compared);
#pragma unroll
        for (int w = 0; w < W; ++w) {
            best.value[w] = columns.value(compared, 0, w);
            best.offset[w] = columns.first(w);
            best.element[w] = columns.value(row, 0, w);
#pragma unroll
            for (int k = 1; k < Columns::K; ++k)
                best.take(w, columns.value(compared, k, w), Lanes::offset(k),
                          columns.value(row, k, w));
        }
        return best;
    }

    // A row that lies further down.
    POOLING_EXT_DEVICE void below(const BestOf& row, int offset_of_row) {
        flag = Lanes::either(flag, row.flag);
#pragma unroll
        for (int w = 0; w < W; ++w)
            take(w, row.value[w], row.offset[w] + Lanes::offset(offset_of_row), row.element[w]);
    }
};

// One number after the other, with every rule; it is of the i-th channel of the thread.
template <class Window, bool kPlaces, class Compared, class Own>
POOLING_EXT_DEVICE void max_pool_exactly(const Compared& what, const Own& own, int i,
                                         const ForwardCall& call, const Geometry<int>& g,
                                         const typename Compared::In* x, int64_t to, int oh,
                                         int ow) {
    using In = typename Compared::In;
    struct Winner {
        float value = -std::numeric_limits<float>::infinity();
        int place = -1;
        In element = In(0);
    } best[1];
#pragma unroll 1
    for (int place = 0; place < Window::kernel * Window::kernel; ++place) {
        const int ih = g.h.start(oh) + place / Window::kernel;
        const int iw = g.w.start(ow) + place % Window::kernel;
        if (ih < 0 || ih >= g.h.in || iw < 0 || iw >= g.w.in) continue;
        const In element = load(x + (int64_t(ih) * g.w.in + iw) * g.channels).at[0];
        const float value = own.of_one(element, i);
        if (!(value > best->value || is_nan(value) || best->place < 0)) continue;
        best->value = value;
        best->place = place;
        best->element = element;
    }
    store(static_cast<In*>(call.dst) + to, {{narrow<In>(own.finish(best->value))}});
    if constexpr (Compared::kKeeps) store(what.winners + to, {{best->element}});
    if constexpr (kPlaces) store_places(call, g, to, best, 0, oh, ow, 0);
}

// The offsets of N outputs, as bytes.
template <class Columns>
POOLING_EXT_DEVICE void store_bytes(uint8_t* to, const BestOf<Columns>& best) {
    using Lanes = typename Columns::Lanes;
    if constexpr (Lanes::kLanes == 2) {
        constexpr int kWords = Columns::W / 2;
        Vec<unsigned, kWords> words;
#pragma unroll
        for (int i = 0; i < kWords; ++i)
            words.at[i] = __byte_perm(best.offset[2 * i], best.offset[2 * i + 1], 0x6420);
        store<kWords>(reinterpret_cast<unsigned*>(to), words);
    } else {
        Vec<uint8_t, Columns::N> bytes;
#pragma unroll
        for (int i = 0; i < Columns::N; ++i) bytes.at[i] = uint8_t(best.offset[i]);
        store<Columns::N>(to, bytes);
    }
}

template <class Compared, class Columns, class Window, bool kPlaces>
__global__ void __launch_bounds__(kThreads, Compared::kResident)
    max_pool_rows(Compared what, ForwardCall call, Geometry<int> sizes, Walk walk) {
    using Lanes = typename Columns::Lanes;
    using In = typename Lanes::In;
    using Best = BestOf<Columns>;
    constexpr int K = Window::kernel, S = Window::stride, P = Window::padding;
    constexpr int kKept = K - S, kSteps = Columns::kSteps;
    const Geometry<int> g = Window::of(sizes);
    const Place at(walk);
    if (!at.inside) return;
    const Columns columns(g, at);
    const OwnCompared<Compared, Columns> own(what, at.plane, columns.channel);
    const int in_row = g.w.in * g.channels, out_row = g.w.out * g.channels;
    const In* const x = static_cast<const In*>(call.src) + at.plane * (int64_t(g.h.in) * in_row);
    const int64_t first_out = at.plane * (int64_t(g.h.out) * out_row) + columns.to;
    const auto read = [&](int ih) {
        return columns.read(x + int64_t(clamped(ih, g.h.in)) * in_row);
    };
    const int rows_end = int(at.row + walk.rows), end = rows_end < g.h.out ? rows_end : g.h.out;
    int oh = int(at.row);
    Best kept[kKept + 1];
    if constexpr (kKept > 0) {
        typename Columns::Row rows[kKept];
#pragma unroll
        for (int k = 0; k < kKept; ++k) rows[k] = read(oh * S - P + k);
#pragma unroll
        for (int k = 0; k < kKept; ++k) kept[k] = Best::row(columns, rows[k], own);
        if (P > 0 && oh == 0) {
#pragma unroll
            for (int w = 0; w < Columns::W; ++w) kept[0].offset[w] += Lanes::offset(P * K);
        }
    }
    for (; oh < end; oh += kSteps) {
        typename Columns::Row rows[kSteps * S];
#pragma unroll
        for (int i = 0; i < kSteps * S; ++i) rows[i] = read(oh * S - P + kKept + i);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            Best parts[K];
#pragma unroll
            for (int k = 0; k < K; ++k)
                parts[k] =
                    k < kKept ? kept[k] : Best::row(columns, rows[step * S + k - kKept], own);
#pragma unroll
            for (int k = 0; k < kKept; ++k) kept[k] = parts[k + S];
            Best best = parts[0];
#pragma unroll
            for (int k = 1; k < K; ++k) best.below(parts[k], k * K);
            if (oh + step >= end) continue;
            const int64_t to = first_out + int64_t(oh + step) * out_row;
            if (Lanes::suspect(best.flag)) {
#pragma unroll 1
                for (int i = 0; i < Columns::N; ++i) {
                    const int channel = Columns::kChannels == 1 ? 0 : i;
                    max_pool_exactly<Window, kPlaces>(
                        what, own, channel, call, g, x + columns.channel + channel, to + i,
                        oh + step, columns.column + Columns::kStep * i);
                }
                continue;
            }
#pragma unroll
            for (int w = 0; w < Columns::W; ++w) best.value[w] = own.finish(best.value[w]);
            Lanes::write(static_cast<In*>(call.dst) + to, best.value);
            if constexpr (Compared::kKeeps) Lanes::write(what.winners + to, best.element);
            if constexpr (!kPlaces) continue;
            if (call.kind == Places::Byte) {
                store_bytes(static_cast<uint8_t*>(call.places) + to, best);
                continue;
            }
#pragma unroll
            for (int i = 0; i < Columns::N; ++i) {
                struct {
                    int place;
                } const one[1] = {
                    {Lanes::of_lane(best.offset[i / Lanes::kLanes], i % Lanes::kLanes)}};
                store_places(call, g, to + i, one, 0, oh + step,
                             columns.column + Columns::kStep * i, 0);
            }
        }
    }
}

// Whether every window has an element of its own at its first place or beside it, so that clamping
// finds no other one.
template <class Window>
bool starts_inside(const Axis& a) {
    return (a.out - 1) * Window::stride - Window::padding < a.in;
}

// Runs the kernel of a job if there is one.
template <bool kPlaces, class Compared>
bool launch_max_pool_rows(const Compared& what, const PoolJob& job, Places kind, Stream stream) {
    using In = typename Compared::In;
    if constexpr (std::is_integral_v<In> || sizeof(In) == 8) {
        return false;
    } else {
        const PoolParams& p = job.p;
        const ForwardCall call(job, kind);
        constexpr int N = kVector<In>;
        using Lanes = std::conditional_t<sizeof(In) == 2, TwoLanes<In>, OneLane<In>>;
        bool done = false;
        with_window<In>(p, [&](auto window) {
            using Window = decltype(window);
            if constexpr (Window::kFixed) {
                if (!starts_inside<Window>(p.h) || !starts_inside<Window>(p.w)) return;
                const Geometry<int> g(p);
                const auto run = [&](auto columns, int64_t across, int64_t vectors) {
                    using Columns = typename decltype(columns)::Type;
                    const Walk walk(p.outer, 1, p.h.out, across, vectors);
                    launch<max_pool_rows<Compared, Columns, Window, kPlaces>>(walk.grid(), stream,
                                                                              what, call, g, walk);
                    done = true;
                };
                if (p.channels > 1 && takes_vectors<In>(job.src, p.channels))
                    return run(Tag<PixelColumns<Lanes, Window, N / Lanes::kLanes>>(), p.w.out,
                               p.channels / N);
                const auto runs = [&](auto length) {
                    constexpr int kRun = decltype(length)::value;
                    if (p.channels > 1 || !takes_vectors<In, kRun>(job.src, p.w.in) ||
                        p.w.out % kRun || p.w.out * Window::stride > p.w.in)
                        return false;
                    run(Tag<RunColumns<Lanes, Window, kRun / Lanes::kLanes>>(), p.w.out / kRun, 1);
                    return true;
                };
                if (in_runs<In>(runs)) return;
                run(Tag<PixelColumns<OneLane<In>, Window, 1>>(), p.w.out, p.channels);
            }
        });
        return done;
    }
}

}  // namespace pooling_ext::cuda
