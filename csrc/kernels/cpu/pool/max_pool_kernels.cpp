// Max pooling, compiled once for each instruction set.
#include "kernels/cpu/pool/argmax_reducer.h"
#include "kernels/cpu/pool/block_transpose.h"
#include "kernels/cpu/pool/max_pool.h"
#include "kernels/cpu/pool/pool_nhwc.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

template <class In>
void max_values(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.block)
        return pool_blocks(job, begin, end, Scratch(scratch), max_values<In>, true, sizeof(In), 0);
    using Order = typename Fastest<In>::Order;
    using Op = MaxOp<Order, In>;
    if constexpr (kCommon<In>)
        if (PixelWalker<In>::takes(job.p))
            return pool_nhwc<Op>(job, begin, end, [](int64_t, int64_t, int64_t, auto use) {
                use([](typename Op::T x) { return x; });
            });
    const int64_t n = job.p.out_row();
    pool_rows<Op, In, Op::kPlain>(
        job, begin, end, Scratch(scratch),
        [&](int64_t, int64_t, const typename Op::T* __restrict row, In* __restrict y) {
            for (int64_t i = 0; i < n; ++i) y[i] = Order::store(row[i]);
        });
}

// Writes the winners' indices in the plane; -1 where there is none.
inline void write_indices(const PoolParams& p, int64_t od, int64_t oh,
                          const int32_t* __restrict offset, int64_t* __restrict indices) {
    const int64_t d0 = p.d.start(od), h0 = p.h.start(oh);
    for (int64_t o = 0, i = 0; o < p.w.out; ++o) {
        const int64_t w0 = p.w.start(o);
        for (int64_t c = 0; c < p.channels; ++c, ++i) {
            const int32_t row = offset[i] / int32_t(p.w.kernel),
                          kw = offset[i] % int32_t(p.w.kernel);
            const int32_t kd = row / int32_t(p.h.kernel), kh = row % int32_t(p.h.kernel);
            const int64_t d = d0 + kd * p.d.dilation, h = h0 + kh * p.h.dilation;
            indices[i] =
                offset[i] < kNowhere ? (d * p.h.in + h) * p.w.in + w0 + kw * p.w.dilation : -1;
        }
    }
}

// Maxima of whole planes: the maximum first, then the index of whoever has it.
template <class In, class Offset>
void max_of_planes(const Job& job, int64_t begin, int64_t end) {
    using Order = Ordered<In>;
    using Op = MaxOp<Order, In>;
    const int64_t n = job.p.in_plane();
    for (int64_t plane = begin; plane < end; ++plane) {
        const In* x = static_cast<const In*>(job.src) + plane * n;
        const auto most = reduce<Op, Stored<Op>>(x, n, 1);
        int64_t at = 0;
        if (is_nan(most))
            for (at = n - 1; !is_nan(Order::load(x[at]));) --at;
        else
            while (Order::load(x[at]) != most) ++at;
        static_cast<In*>(job.dst)[plane] = Order::store(most);
        static_cast<Offset*>(job.offsets_out)[plane] = Offset(at);
    }
}

// The maxima of a window in channels-last, and the offsets of their winners; x holds its elements
// in order.
template <class In, int kCount>
__attribute__((noinline)) void argmax_pixel(In* __restrict y, uint8_t* __restrict winner,
                                            const In* const* elements, const int32_t* offsets,
                                            int64_t n) {
    using Order = Ordered<In>;
    using T = typename Order::T;
    // As wide as the values, so that one vector of each belongs together.
    using Where = std::make_signed_t<BitsOf<T>>;
    const In* x[kCount];
    Where offset[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = elements[k], offset[k] = Where(offsets[k]);
    each_run<64 / sizeof(T)>(n, 0, [&](int64_t i, auto count) {
        constexpr int kRun = count.value;
        T maxima[kRun];
        Where winners[kRun];
// Unrolled they would no longer be loops, of which vectors are made.
#pragma GCC unroll 1
        for (int j = 0; j < kRun; ++j) {
            T best = Order::load(x[0][i + j]);
            Where where = offset[0];
            for (int k = 1; k < kCount; ++k) {
                const T v = Order::load(x[k][i + j]);
                const bool wins = (v > best) | is_nan(v);
                best = select(wins, v, best);
                where = select(wins, offset[k], where);
            }
            maxima[j] = best;
            winners[j] = where;
        }
#pragma GCC unroll 1
        for (int j = 0; j < kRun; ++j) y[i + j] = Order::store(maxima[j]);
#pragma GCC unroll 1
        for (int j = 0; j < kRun; ++j) winner[i + j] = uint8_t(winners[j]);
    });
}

template <class In>
void argmax_pixels(const Job& job, int64_t begin, int64_t end) {
    const PoolParams& p = job.p;
    PixelWalker<In> walk(p);
    each_index(
        begin, end, p.d.out, p.h.out, [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
            const In* plane = static_cast<const In*>(job.src) + outer * p.in_plane() * p.channels;
            In* y = static_cast<In*>(job.dst) + index * p.out_row();
            auto* winners = static_cast<uint8_t*>(job.offsets_out) + index * p.out_row();
            walk(plane, od, oh, [&](const Taps<In>& taps, auto rows, auto columns, int64_t o) {
                constexpr int kCount = rows.value * columns.value;
                In* const to = y + o * p.channels;
                uint8_t* const winner = winners + o * p.channels;
                if constexpr (kCount == 0) {
                    fill(to, Ordered<In>::store(Ordered<In>::lowest()), p.channels);
                    fill(winner, uint8_t(kByteWindow), p.channels);
                } else {
                    const In* x[kCount];
                    int32_t offsets[kCount];
                    for (int k = 0; k < kCount; ++k) {
                        x[k] = taps.at(k, columns.value);
                        offsets[k] = walk.offset(o, k, columns.value);
                    }
                    argmax_pixel<In, kCount>(to, winner, x, offsets, p.channels);
                }
            });
        });
}

// Stores a row's winners: their offsets in the windows, or indices in the plane.
template <class Offset>
void store_offsets(const PoolParams& p, int64_t od, int64_t oh, const int32_t* __restrict offsets,
                   Offset* __restrict where, Offset* to) {
    if constexpr (std::is_same_v<Offset, int64_t>) {
        write_indices(p, od, oh, offsets, to);
    } else {
        const int64_t out = p.out_row(), n = whole_vectors(out, kVector);
        for (int64_t i = 0; i < n; ++i) where[i] = Offset(offsets[i] < kNowhere ? offsets[i] : -1);
        std::memcpy(to, where, out * sizeof(Offset));
    }
}

template <class In>
void max_by_rows(const Job& job, int64_t begin, int64_t end, Offsets kind, Scratch scratch) {
    using Order = Ordered<In>;
    const PoolParams& p = job.p;
    const auto* src = static_cast<const In*>(job.src);
    const int64_t plane = p.d.in * p.h.in * p.in_row(), out = p.out_row();
    ArgmaxReducer<In> argmax(p, src + p.outer * plane, scratch);
    In* __restrict maxima = scratch.take<In>(out + kVector);
    int32_t* const where = scratch.take<int32_t>(out + kVector);
    each_index(begin, end, p.d.out, p.h.out,
               [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
                   argmax(src + outer * plane, od, oh);
                   // By way of scratch memory, where whole vectors can be written.
                   const auto* __restrict values = argmax.values();
                   const int64_t n = whole_vectors(out, kVector);
                   for (int64_t i = 0; i < n; ++i) maxima[i] = Order::store(values[i]);
                   std::memcpy(static_cast<In*>(job.dst) + index * out, maxima, out * sizeof(In));
                   const auto store = [&](auto zero) {
                       using Offset = decltype(zero);
                       store_offsets(p, od, oh, argmax.offsets(), reinterpret_cast<Offset*>(where),
                                     static_cast<Offset*>(job.offsets_out) + index * out);
                   };
                   if (kind == Offsets::Byte)
                       store(uint8_t{});
                   else if (kind == Offsets::Int32)
                       store(int32_t{});
                   else
                       store(int64_t{});
               });
}

template <class In, class Offset, Offsets kOffsets>
void max_with_offsets(const Job& job, int64_t begin, int64_t end, void* memory) {
    Scratch scratch(memory);
    if (job.block)
        return pool_blocks(job, begin, end, scratch, max_with_offsets<In, Offset, kOffsets>, true,
                           sizeof(In), sizeof(Offset));
    if (job.p.channels == 1 && is_whole(job.p)) return max_of_planes<In, Offset>(job, begin, end);
    if constexpr (kCommon<In> && kOffsets == Offsets::Byte)
        if (PixelWalker<In>::takes(job.p)) return argmax_pixels<In>(job, begin, end);
    max_by_rows<In>(job, begin, end, kOffsets, scratch);
}

template <class In>
Kernel forward_of(Offsets kind) {
    switch (kind) {
        case Offsets::None:
            return max_values<In>;
        case Offsets::Byte:
            return max_with_offsets<In, uint8_t, Offsets::Byte>;
        case Offsets::Int32:
            return max_with_offsets<In, int32_t, Offsets::Int32>;
        case Offsets::Index:
            return max_with_offsets<In, int64_t, Offsets::Index>;
    }
    return nullptr;
}

}  // namespace

Kernel max_pool(DType dtype, Offsets kind) {
    switch (dtype) {
        case DType::Int8:
            return forward_of<int8_t>(kind);
        case DType::Int16:
            return forward_of<int16_t>(kind);
        case DType::Int32:
            return forward_of<int32_t>(kind);
        case DType::Int64:
            return forward_of<int64_t>(kind);
        case DType::UInt8:
            return forward_of<uint8_t>(kind);
        default:
            return for_float(dtype, [&](auto zero) { return forward_of<decltype(zero)>(kind); });
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
