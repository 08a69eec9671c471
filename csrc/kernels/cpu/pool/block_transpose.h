// Small planes, pooled many at a time.
//
// A row of a small plane is too short for vector loops. So a block of planes is transposed to
// channels-last, each plane a channel, pooled there, and the result transposed back.
#pragma once

#include <utility>

#include "kernels/cpu/pool/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

template <class E, int64_t kCount>
struct Lanes {
    typedef E Type __attribute__((vector_size(kCount * sizeof(E))));
};
template <class E, int64_t kCount>
using VectorOf = typename Lanes<E, kCount>::Type;

// Square tiles of kLanes x kLanes elements, transposed in registers: log2(kLanes) rounds of
// interleaving row i with row i + kLanes / 2.
template <class E>
class Tile {
  public:
    static constexpr int64_t kLanes = kVectorBytes / sizeof(E) < 16 ? kVectorBytes / sizeof(E) : 16;
    using V = VectorOf<E, kLanes>;

    // to[j * to_pitch + i] = from[i * from_pitch + j]
    static POOLING_EXT_INLINE void transpose(E* to, int64_t to_pitch, const E* from,
                                             int64_t from_pitch) {
        V rows[kLanes], next[kLanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i)
            std::memcpy(&rows[i], from + i * from_pitch, sizeof(V));
#pragma GCC unroll 4
        for (int64_t round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
            for (int64_t i = 0; i < kLanes / 2; ++i) {
                next[2 * i] = zip<0>(rows[i], rows[i + kLanes / 2], kSequence);
                next[2 * i + 1] = zip<kLanes / 2>(rows[i], rows[i + kLanes / 2], kSequence);
            }
#pragma GCC unroll 16
            for (int64_t i = 0; i < kLanes; ++i) rows[i] = next[i];
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) std::memcpy(to + i * to_pitch, &rows[i], sizeof(V));
    }

    // rows[0][i] = the sum of row i.
    static POOLING_EXT_INLINE void sum(V* rows) {
#pragma GCC unroll 4
        for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
            for (int64_t i = 0; i < half; ++i)
                rows[i] = zip<0>(rows[i], rows[i + half], kSequence) +
                          zip<kLanes / 2>(rows[i], rows[i + half], kSequence);
        }
    }

  private:
    static constexpr auto kSequence = std::make_integer_sequence<int, int(kLanes)>{};

    // a[kFirst], b[kFirst], a[kFirst + 1], b[kFirst + 1], ...
    template <int kFirst, int... I>
    static POOLING_EXT_INLINE V zip(V a, V b, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, (kFirst + I / 2 + (I % 2) * int(kLanes))...);
    }
};

// to[column * rows + row] = from[row * columns + column]
template <class E>
void transpose(E* to, const E* from, int64_t rows, int64_t columns) {
    constexpr int64_t kLanes = Tile<E>::kLanes;
    if (rows % kLanes != 0 || columns < kLanes) {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < columns; ++column)
                to[column * rows + row] = from[row * columns + column];
        return;
    }
    for (int64_t row = 0; row < rows; row += kLanes)
        for (int64_t next = 0; next < columns; next += kLanes) {
            // The last tile overlaps the one before it instead of ending early.
            const int64_t column = next + kLanes <= columns ? next : columns - kLanes;
            Tile<E>::transpose(to + column * rows + row, rows, from + row * columns + column,
                               columns);
        }
}

inline void transpose(void* to, const void* from, int64_t rows, int64_t columns, size_t size) {
    const auto run = [&](auto element) {
        using E = decltype(element);
        transpose(static_cast<E*>(to), static_cast<const E*>(from), rows, columns);
    };
    switch (size) {
        case 1:
            return run(uint8_t{});
        case 2:
            return run(uint16_t{});
        case 4:
            return run(uint32_t{});
        default:
            return run(uint64_t{});
    }
}

// Runs `pool` on blocks [begin, end) of job.block planes each. `size` and `offsets_size` are those
// of an element and of an offset (0 if there are none).
inline void pool_blocks(const Job& job, int64_t begin, int64_t end, Scratch scratch, Kernel pool,
                        bool forward, size_t size, size_t offsets_size) {
    Job inner = job;
    inner.block = 0;
    PoolParams& p = inner.p;
    const int64_t in = p.d.in * p.h.in * p.w.in, out = p.d.out * p.h.out * p.w.out;
    const int64_t from = forward ? in : out, to = forward ? out : in;
    char* const src = scratch.take<char>(from * job.block * size);
    char* const dst = scratch.take<char>(to * job.block * size);
    char* const offsets = scratch.take<char>(out * job.block * offsets_size);
    inner.src = src;
    inner.dst = dst;
    inner.offsets_out = offsets;
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * job.block;
        p.channels = first + job.block <= job.planes ? job.block : job.planes - first;
        transpose(src, static_cast<const char*>(job.src) + first * from * size, p.channels, from,
                  size);
        pool(inner, 0, forward ? p.out_rows() : p.in_rows(), scratch.take<char>(0));
        transpose(static_cast<char*>(job.dst) + first * to * size, dst, to, p.channels, size);
        if (offsets_size)
            transpose(static_cast<char*>(job.offsets_out) + first * out * offsets_size, offsets,
                      out, p.channels, offsets_size);
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
