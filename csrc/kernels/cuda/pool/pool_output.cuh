// What kernels of pooling forward write, and from what.
#pragma once

#include "kernels/cuda/pool/pool.cuh"

namespace pooling_ext::cuda {

// What every forward kernel is given besides its windows.
struct ForwardCall {
    const void* src;
    void* dst;
    void* places;
    Places kind;
    bool count_include_pad;
    int64_t divisor;

    explicit ForwardCall(const PoolJob& job, Places kind = Places::None)
        : src(job.src),
          dst(job.dst),
          places(job.places_out),
          kind(kind),
          count_include_pad(job.count_include_pad),
          divisor(job.divisor) {}
};

// The index in the plane of a place in a window, or -1 of none.
template <class Int>
POOLING_EXT_DEVICE int64_t index_of(const Geometry<Int>& g, Int place, Int od, Int oh, Int ow) {
    if (place < 0) return -1;
    const Int kw = place % g.w.kernel, row = place / g.w.kernel;
    const Int d = g.d.start(od) + row / g.h.kernel * g.d.dilation;
    const Int h = g.h.start(oh) + row % g.h.kernel * g.h.dilation;
    return (int64_t(d) * g.h.in + h) * g.w.in + g.w.start(ow) + kw * g.w.dilation;
}

// Writes the places of the vector of outputs at `to`; the i-th is of column ow + i * step.
template <class Int, int N, class Acc>
POOLING_EXT_DEVICE void store_places(const ForwardCall& call, const Geometry<Int>& g, int64_t to,
                                     const Acc (&acc)[N], Int od, Int oh, Int ow, Int step) {
    if (call.kind == Places::Byte) {
        Vec<uint8_t, N> bytes;
#pragma unroll
        for (int i = 0; i < N; ++i) bytes.at[i] = uint8_t(acc[i].place);  // -1 becomes 255
        store<N>(static_cast<uint8_t*>(call.places) + to, bytes);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (call.kind == Places::Int32)
            store(static_cast<int32_t*>(call.places) + to + i, {{int32_t(acc[i].place)}});
        else
            store(static_cast<int64_t*>(call.places) + to + i,
                  {{index_of<Int>(g, acc[i].place, od, oh, ow + i * step)}});
    }
}

template <class Op, class Int>
POOLING_EXT_DEVICE typename Op::In finish(const Op& op, const typename Op::Acc& acc,
                                          const ForwardCall& call, const Geometry<Int>& g, Int od,
                                          Int oh, Int ow) {
    if constexpr (Op::kAverages) {
        using T = typename Op::T;
        const T count = call.divisor ? T(call.divisor)
                                     : T(g.d.count(od, call.count_include_pad)) *
                                           T(g.h.count(oh, call.count_include_pad)) *
                                           T(g.w.count(ow, call.count_include_pad));
        return op.finish(acc, count, T(g.d.places(od)) * T(g.h.places(oh)) * T(g.w.places(0)));
    } else {
        return op.finish(acc);
    }
}

}  // namespace pooling_ext::cuda
