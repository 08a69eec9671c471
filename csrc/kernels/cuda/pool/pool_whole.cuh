// Pooling with windows that are the whole plane; of few large planes each is shared by several
// blocks, whose parts a second kernel puts together.
#pragma once

#include "kernels/cuda/pool/pool_output.cuh"
#include "kernels/cuda/pool/whole.h"

namespace pooling_ext::cuda {

template <class Acc>
POOLING_EXT_DEVICE Acc shuffled(Acc acc, int bits) {
    acc.value = __shfl_xor_sync(~0u, acc.value, bits);
    if constexpr (requires { acc.offset; }) acc.offset = __shfl_xor_sync(~0u, acc.offset, bits);
    return acc;
}

// The pixels of a plane that a block has: all, or a split of them.
template <class Int, class Acc>
struct Share {
    unsigned splits;
    Int each;    // pixels of a split
    Acc* parts;  // what splits come to, `channels` side by side; none where there is one

    Share(const PoolParams& p, void* memory, int64_t element, int64_t vector) : parts() {
        const int64_t size = p.in_plane();
        const int64_t n = memory == nullptr ? 1 : whole_splits(p, element);
        each = Int(ceil_div(ceil_div(size, n), vector) * vector);
        splits = unsigned(ceil_div(size, each));
        if (splits > 1) parts = static_cast<Acc*>(memory);
    }

    POOLING_EXT_DEVICE unsigned split() const { return blockIdx.x % splits; }
    // Of blocks in order, those that share count as one.
    POOLING_EXT_DEVICE unsigned block() const { return blockIdx.x / splits; }
    POOLING_EXT_DEVICE Int begin() const { return Int(split()) * each; }
    POOLING_EXT_DEVICE Int end(Int size) const {
        return size - begin() < each ? size : begin() + each;
    }
    POOLING_EXT_DEVICE void keep(int64_t plane, int64_t channels, int64_t channel,
                                 const Acc& acc) const {
        store(parts + (plane * splits + split()) * channels + channel, {{acc}});
    }
};

// Puts the parts of each plane's window together, in their order.
template <class Op, class Int>
__global__ void __launch_bounds__(kThreads)
    merge_parts(Op op, ForwardCall call, Geometry<Int> g, Share<Int, typename Op::Acc> share,
                int64_t outputs) {
    using In = typename Op::In;
    using Acc = typename Op::Acc;
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= outputs) return;
    const int64_t plane = i / g.channels, channel = i % g.channels;
    const Acc* const from = share.parts + plane * share.splits * g.channels + channel;
    Acc acc;
    op.start(acc);
#pragma unroll 8
    for (unsigned split = 0; split < share.splits; ++split)
        acc = op.merge(acc, load(from + int64_t(split) * g.channels).at[0]);
    store(static_cast<In*>(call.dst) + i, {{finish<Op, Int>(op, acc, call, g, 0, 0, 0)}});
    if constexpr (Op::kOffsets) {
        const Acc one[1] = {acc};
        store_offsets<Int>(call, g, i, one, 0, 0, 0, 0);
    }
}

// A plane, or a split of one, for each row of threads: a warp, or the block.
template <class Op, class Int, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    pool_whole_planes(Op op, ForwardCall call, Geometry<Int> g, Share<Int, typename Op::Acc> share,
                      int64_t planes) {
    using In = typename Op::In;
    using Acc = typename Op::Acc;
    const int64_t plane = int64_t(share.block()) * blockDim.y + threadIdx.y;
    const Int size = g.d.in * g.h.in * g.w.in, end = share.end(size);
    Acc acc;
    op.start(acc);
    if (plane < planes) {
        const In* const x = static_cast<const In*>(call.src) + plane * size;
#pragma unroll 4
        for (Int at = share.begin() + Int(threadIdx.x) * N; at < end; at += Int(blockDim.x) * N) {
            const Vec<In, N> values = load<N>(x + at);
#pragma unroll
            for (int i = 0; i < N; ++i) op.step(acc, values.at[i], at + i);
        }
    }
    for (int bits = warpSize / 2; bits > 0; bits /= 2) acc = op.merge(acc, shuffled(acc, bits));
    if (blockDim.x > warpSize) {  // one plane, all warps
        Acc* const warps = dynamic_shared<Acc>();
        if (threadIdx.x % warpSize == 0) warps[threadIdx.x / warpSize] = acc;
        __syncthreads();
        if (threadIdx.x == 0)
            for (unsigned warp = 1; warp < blockDim.x / warpSize; ++warp)
                acc = op.merge(acc, warps[warp]);
    }
    if (threadIdx.x != 0 || plane >= planes) return;
    if (share.parts) return share.keep(plane, 1, 0, acc);
    store(static_cast<In*>(call.dst) + plane, {{finish<Op, Int>(op, acc, call, g, 0, 0, 0)}});
    if constexpr (Op::kOffsets) {
        const Acc one[1] = {acc};
        store_offsets<Int>(call, g, plane, one, 0, 0, 0, 0);
    }
}

// Vectors of channels side by side, the pixels divided among the rows of threads.
template <class Op, class Int, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    pool_whole_pixels(Op op, ForwardCall call, Geometry<Int> g, Share<Int, typename Op::Acc> share,
                      unsigned tiles) {
    using In = typename Op::In;
    using Acc = typename Op::Acc;
    const int64_t image = share.block() / tiles;
    const int c = int(share.block() % tiles * blockDim.x + threadIdx.x) * N;
    const Int size = g.d.in * g.h.in * g.w.in, end = share.end(size);
    Acc acc[N];
#pragma unroll
    for (int i = 0; i < N; ++i) op.start(acc[i]);
    if (c < g.channels) {
        const In* const x = static_cast<const In*>(call.src) + image * size * g.channels + c;
#pragma unroll 4
        for (Int at = share.begin() + Int(threadIdx.y); at < end; at += Int(blockDim.y)) {
            const Vec<In, N> values = load<N>(x + int64_t(at) * g.channels);
#pragma unroll
            for (int i = 0; i < N; ++i) op.step(acc[i], values.at[i], at);
        }
    }
    Acc* const all = dynamic_shared<Acc>();
    const int threads = int(blockDim.x * blockDim.y);
    const int me = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
    for (int i = 0; i < N; ++i) all[i * threads + me] = acc[i];
    for (int below = int(blockDim.y) / 2; below > 0; below /= 2) {
        __syncthreads();
        if (int(threadIdx.y) >= below) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            acc[i] = op.merge(acc[i], all[i * threads + me + below * int(blockDim.x)]);
            all[i * threads + me] = acc[i];
        }
    }
    if (threadIdx.y != 0 || c >= g.channels) return;
    if (share.parts) {
#pragma unroll
        for (int i = 0; i < N; ++i) share.keep(image, g.channels, c + i, acc[i]);
        return;
    }
    const int64_t to = image * g.channels + c;
    Vec<In, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.at[i] = finish<Op, Int>(op, acc[i], call, g, 0, 0, 0);
    store<N>(static_cast<In*>(call.dst) + to, out);
    if constexpr (Op::kOffsets) store_offsets<Int>(call, g, to, acc, 0, 0, 0, 0);
}

template <class Op, class Int, int N>
void launch_whole(const Op& op, const PoolParams& p, const ForwardCall& call, void* parts,
                  Stream stream) {
    using Acc = typename Op::Acc;
    const Geometry<Int> g(p);
    const int64_t size = p.in_plane();
    const Share<Int, Acc> share(p, parts, sizeof(typename Op::In), p.channels == 1 ? N : 1);
    const auto merge = [&] {
        if (share.parts == nullptr) return;
        const int64_t outputs = p.outer * p.channels;
        const Grid grid{dim3(unsigned(ceil_div(outputs, kThreads))), dim3(kThreads)};
        launch<merge_parts<Op, Int>>(grid, stream, op, call, g, share, outputs);
    };
    if (p.channels == 1) {
        constexpr int64_t kLong = 2048;  // vectors from which on a plane is shared by more warps
        const bool block = size / N >= kLong || share.parts != nullptr;
        const dim3 threads = block ? dim3(kThreads) : dim3(32, kThreads / 32);
        const Grid grid{dim3(unsigned(ceil_div(p.outer, threads.y) * share.splits)), threads,
                        block ? kThreads / 32 * sizeof(Acc) : 0};
        launch<pool_whole_planes<Op, Int, N>>(grid, stream, op, call, g, share, p.outer);
        return merge();
    }
    unsigned width = 1, height = 1;
    while (width < 32 && width * N < p.channels) width *= 2;
    while (height * width < kThreads && height < size) height *= 2;
    const unsigned tiles = unsigned(ceil_div(p.channels, width * N));
    const Grid grid{dim3(unsigned(p.outer * tiles * share.splits)), dim3(width, height),
                    width * height * N * sizeof(Acc)};
    launch<pool_whole_pixels<Op, Int, N>>(grid, stream, op, call, g, share, tiles);
    merge();
}

}  // namespace pooling_ext::cuda
