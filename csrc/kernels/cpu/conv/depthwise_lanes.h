// Registers of a convolution's kernels: one register of the type sums are made in, whatever the
// type in memory. Files that include this are compiled with contraction of products and sums, so
// all is in a namespace of its own, and nothing that computes is shared with other kernels.
#pragma once

#include <utility>

#include "cpu/numeric.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

template <class In>
struct Lanes {
    using T = Accumulator<In>;
    using Bits = BitsOf<T>;
    static constexpr int64_t kSize = kVectorBytes / int64_t(sizeof(T));
    typedef T X __attribute__((vector_size(kVectorBytes)));
    typedef Bits Words __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

    static POOLING_EXT_INLINE X splat(T value) { return value - X{}; }  // -0 stays -0

    // Computed values.
    static POOLING_EXT_INLINE X own(const T* from) {
        X x;
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
    static POOLING_EXT_INLINE void keep(T* to, X x) { std::memcpy(to, &x, sizeof(x)); }

    static POOLING_EXT_INLINE X get(const In* from) {
        if constexpr (std::is_same_v<In, T>) {
            return own(from);
        } else if constexpr (std::is_same_v<In, BFloat16>) {
            Halves halves;
            std::memcpy(&halves, from, sizeof(halves));
            return (X)(__builtin_convertvector(halves, Words) << 16);
        } else {
            alignas(64) T values[kSize];
            for (int64_t i = 0; i < kSize; ++i) values[i] = widen(from[i]);
            return own(values);
        }
    }

    static POOLING_EXT_INLINE void put(In* to, X x) {
        if constexpr (std::is_same_v<In, T>) {
            keep(to, x);
        } else if constexpr (std::is_same_v<In, BFloat16>) {
            const Halves halves = __builtin_convertvector(rounded(x) >> 16, Halves);
            std::memcpy(to, &halves, sizeof(halves));
        } else {
            alignas(64) T values[kSize];
            keep(values, x);
            for (int64_t i = 0; i < kSize; ++i) POOLING_EXT_ISA::put(to, i, narrow<In>(values[i]));
        }
    }

    // The value that memory has after put().
    static POOLING_EXT_INLINE X stored(X x) {
        if constexpr (std::is_same_v<In, T>) {
            return x;
        } else if constexpr (std::is_same_v<In, BFloat16>) {
            return (X)(rounded(x) >> 16 << 16);
        } else {
            alignas(64) In values[kSize];
            put(values, x);
            return get(values);
        }
    }

    // The first n elements, 0 < n < kSize; zeros follow.
    static POOLING_EXT_INLINE X get_some(const In* from, int64_t n) {
        alignas(64) In values[kSize] = {};
        copy_some(values, from, n);
        return get(values);
    }

    static POOLING_EXT_INLINE void put_some(In* to, X x, int64_t n) {
        alignas(64) In values[kSize];
        put(values, x);
        copy_some(to, values, n);
    }

    // rows[j][i] = rows[i][j]: log2(kSize) rounds of interleaving row i with row i + kSize / 2.
    static POOLING_EXT_INLINE void transpose(X* rows) {
        X next[kSize];
#pragma GCC unroll 4
        for (int64_t round = 1; round < kSize; round *= 2) {
#pragma GCC unroll 8
            for (int64_t i = 0; i < kSize / 2; ++i) {
                next[2 * i] = zip<0>(rows[i], rows[i + kSize / 2], kSequence);
                next[2 * i + 1] = zip<kSize / 2>(rows[i], rows[i + kSize / 2], kSequence);
            }
#pragma GCC unroll 16
            for (int64_t i = 0; i < kSize; ++i) rows[i] = next[i];
        }
    }

  private:
    static constexpr auto kSequence = std::make_integer_sequence<int, int(kSize)>{};

    // a[kFirst], b[kFirst], a[kFirst + 1], b[kFirst + 1], ...
    template <int kFirst, int... I>
    static POOLING_EXT_INLINE X zip(X a, X b, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, (kFirst + I / 2 + (I % 2) * int(kSize))...);
    }

    // In pieces of constant size, which take an instruction or two each.
    static POOLING_EXT_INLINE void copy_some(In* to, const In* from, int64_t n) {
#pragma GCC unroll 4
        for (int64_t piece = kSize / 2; piece > 0; piece /= 2) {
            if (!(n & piece)) continue;
            std::memcpy(to, from, piece * sizeof(In));
            to += piece;
            from += piece;
        }
    }

    // As narrow<BFloat16>(), with 16 more bits that do not count.
    static POOLING_EXT_INLINE Words rounded(X x) {
        const Words bits = (Words)x;
        const Words result = bits + 0x7fffu + ((bits >> 16) & 1u);
        return x != x ? bits | 0x400000u : result;
    }
};

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
