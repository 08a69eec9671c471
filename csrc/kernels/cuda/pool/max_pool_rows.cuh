// Max pooling with the windows that CNNs use, as code without a branch around a load.
//
// A thread walks down the rows of a column, a vector wide. Of each row it keeps what the row's part
// of a window comes to, as long as windows below share it, so that each row is read and compared
// once. All rows of a step are read before the first is used: enough bytes are then on their way.
// Addresses outside the input are clamped to its border. That reads an element of the window twice,
// at its own offset and at one outside, and where the latter comes first it is counted as the
// former.
#pragma once

#include <limits>

#include "kernels/cuda/pool/max_pool_columns.cuh"
#include "kernels/cuda/pool/pool_forward.cuh"

namespace pooling_ext::cuda {

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
template <class Window, bool kOffsets, class Compared, class Own>
POOLING_EXT_DEVICE void max_pool_exactly(const Compared& what, const Own& own, int i,
                                         const ForwardCall& call, const Geometry<int>& g,
                                         const typename Compared::In* x, int64_t to, int oh,
                                         int ow) {
    using In = typename Compared::In;
    struct Winner {
        float value = -std::numeric_limits<float>::infinity();
        int offset = -1;
        In element = In(0);
    } best[1];
#pragma unroll 1
    for (int offset = 0; offset < Window::kernel * Window::kernel; ++offset) {
        const int ih = g.h.start(oh) + offset / Window::kernel;
        const int iw = g.w.start(ow) + offset % Window::kernel;
        if (ih < 0 || ih >= g.h.in || iw < 0 || iw >= g.w.in) continue;
        const In element = load(x + (int64_t(ih) * g.w.in + iw) * g.channels).at[0];
        const float value = own.of_one(element, i);
        if (!(value > best->value || is_nan(value) || best->offset < 0)) continue;
        best->value = value;
        best->offset = offset;
        best->element = element;
    }
    store(static_cast<In*>(call.dst) + to, {{narrow<In>(own.finish(best->value))}});
    if constexpr (Compared::kKeeps) store(what.winners + to, {{best->element}});
    if constexpr (kOffsets) store_offsets(call, g, to, best, 0, oh, ow, 0);
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

template <class Compared, class Columns, class Window, bool kOffsets>
__global__ void __launch_bounds__(kThreads, Compared::kResident)
    max_pool_rows(Compared what, ForwardCall call, Geometry<int> sizes, Walk walk) {
    using Lanes = typename Columns::Lanes;
    using In = typename Lanes::In;
    using Best = BestOf<Columns>;
    constexpr int K = Window::kernel, S = Window::stride, P = Window::padding;
    constexpr int kKept = K - S, kSteps = Columns::kSteps;
    const Geometry<int> g = Window::of(sizes);
    const Position at(walk);
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
                    max_pool_exactly<Window, kOffsets>(
                        what, own, channel, call, g, x + columns.channel + channel, to + i,
                        oh + step, columns.column + Columns::kStep * i);
                }
                continue;
            }
#pragma unroll
            for (int w = 0; w < Columns::W; ++w) best.value[w] = own.finish(best.value[w]);
            Lanes::write(static_cast<In*>(call.dst) + to, best.value);
            if constexpr (Compared::kKeeps) Lanes::write(what.winners + to, best.element);
            if constexpr (!kOffsets) continue;
            if (call.kind == Offsets::Byte) {
                store_bytes(static_cast<uint8_t*>(call.offsets) + to, best);
                continue;
            }
#pragma unroll
            for (int i = 0; i < Columns::N; ++i) {
                struct {
                    int offset;
                } const one[1] = {
                    {Lanes::of_lane(best.offset[i / Lanes::kLanes], i % Lanes::kLanes)}};
                store_offsets(call, g, to + i, one, 0, oh + step,
                              columns.column + Columns::kStep * i, 0);
            }
        }
    }
}

// Whether every window has an element of its own at its first offset or beside it, so that clamping
// finds no other one.
template <class Window>
bool starts_inside(const Axis& a) {
    return (a.out - 1) * Window::stride - Window::padding < a.in;
}

// Runs the kernel of a job if there is one.
template <bool kOffsets, class Compared>
bool launch_max_pool_rows(const Compared& what, const PoolJob& job, Offsets kind, Stream stream) {
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
                    launch<max_pool_rows<Compared, Columns, Window, kOffsets>>(walk.grid(), stream,
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
