// What kernels of pooling forward write, and from what.
#pragma once

#include "kernels/cuda/pool/pool.cuh"

namespace pooling_ext::cuda {

// What every forward kernel is given besides its windows.
struct ForwardCall {
    const void* src;
    void* dst;
    void* offsets;
    Offsets kind;
    bool count_include_pad;
    int64_t divisor;

    explicit ForwardCall(const PoolJob& job, Offsets kind = Offsets::None)
        : src(job.src),
          dst(job.dst),
          offsets(job.offsets_out),
          kind(kind),
          count_include_pad(job.count_include_pad),
          divisor(job.divisor) {}
};

// The index in the plane of an offset in a window, or -1 of none.
template <class Int>
POOLING_EXT_DEVICE int64_t index_of(const Geometry<Int>& g, Int offset, Int od, Int oh, Int ow) {
    if (offset < 0) return -1;
    const Int kw = offset % g.w.kernel, row = offset / g.w.kernel;
    const Int d = g.d.start(od) + row / g.h.kernel * g.d.dilation;
    const Int h = g.h.start(oh) + row % g.h.kernel * g.h.dilation;
    return (int64_t(d) * g.h.in + h) * g.w.in + g.w.start(ow) + kw * g.w.dilation;
}

// Writes the offsets of the vector of outputs at `to`; the i-th is of column ow + i * step.
template <class Int, int N, class Acc>
POOLING_EXT_DEVICE void store_offsets(const ForwardCall& call, const Geometry<Int>& g, int64_t to,
                                      const Acc (&acc)[N], Int od, Int oh, Int ow, Int step) {
    if (call.kind == Offsets::Byte) {
        Vec<uint8_t, N> bytes;
#pragma unroll
        for (int i = 0; i < N; ++i) bytes.at[i] = uint8_t(acc[i].offset);  // -1 becomes 255
        store<N>(static_cast<uint8_t*>(call.offsets) + to, bytes);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (call.kind == Offsets::Int32)
            store(static_cast<int32_t*>(call.offsets) + to + i, {{int32_t(acc[i].offset)}});
        else
            store(static_cast<int64_t*>(call.offsets) + to + i,
                  {{index_of<Int>(g, acc[i].offset, od, oh, ow + i * step)}});
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
        return op.finish(acc, count, T(g.d.length(od)) * T(g.h.length(oh)) * T(g.w.length(0)));
    } else {
        return op.finish(acc);
    }
}

}  // namespace pooling_ext::cuda
