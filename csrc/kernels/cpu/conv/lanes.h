// Registers of a convolution's kernels: one register of the type sums are made in, whatever the
// type in memory. Files that include this are compiled with contraction of products and sums, so
// all is in a namespace of its own, and nothing that computes is shared with other kernels.
#pragma once

#include <utility>

#include "kernels/cpu/simd/numeric.h"

#ifndef POOLING_EXT_INLINE_LAMBDA
#define POOLING_EXT_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace pooling_ext::POOLING_EXT_ISA::conv {

template <class In>
struct Lanes {
    using T = Accumulator<In>;
    typedef T X __attribute__((vector_size(kVectorBytes)));
    static constexpr int64_t kSize = kVectorBytes / int64_t(sizeof(T));

    static POOLING_EXT_INLINE X splat(T value) { return value - X{}; }  // -0 stays -0

    // Computed values.
    static POOLING_EXT_INLINE X own(const T* from) {
        X x;
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
    static POOLING_EXT_INLINE void keep(T* to, X x) { std::memcpy(to, &x, sizeof(x)); }

    static POOLING_EXT_INLINE X get(const In* from) {
        Raw bits;
        std::memcpy(&bits, from, sizeof(bits));
        return widened(bits);
    }
    static POOLING_EXT_INLINE void put(In* to, X x) {
        const Raw bits = narrowed(x);
        std::memcpy(to, &bits, sizeof(bits));
    }

    // The first n elements, 0 < n < kSize; zeros follow.
    static POOLING_EXT_INLINE X get(const In* from, int64_t n) {
        alignas(64) In values[kSize] = {};
        copy(values, from, n);
        return get(values);
    }
    static POOLING_EXT_INLINE void put(In* to, X x, int64_t n) {
        alignas(64) In values[kSize];
        put(values, x);
        copy(to, values, n);
    }

    // The value that memory has after put().
    static POOLING_EXT_INLINE X stored(X x) {
        if constexpr (std::is_same_v<In, T>)
            return x;
        else if constexpr (std::is_same_v<In, BFloat16>)
            return (X)(rounded(x) >> 16 << 16);
        else
            return widened(narrowed(x));
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
    typedef BitsOf<In> Raw __attribute__((vector_size(kSize * sizeof(In))));
    typedef BitsOf<T> Words __attribute__((vector_size(kVectorBytes)));
    static constexpr auto kSequence = std::make_integer_sequence<int, int(kSize)>{};

    // a[kFirst], b[kFirst], a[kFirst + 1], b[kFirst + 1], ...
    template <int kFirst, int... I>
    static POOLING_EXT_INLINE X zip(X a, X b, std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, (kFirst + I / 2 + (I % 2) * int(kSize))...);
    }

    // In pieces of constant size, which take an instruction or two each.
    static POOLING_EXT_INLINE void copy(In* to, const In* from, int64_t n) {
#pragma GCC unroll 4
        for (int64_t piece = kSize / 2; piece > 0; piece /= 2) {
            if (!(n & piece)) continue;
            std::memcpy(to, from, piece * sizeof(In));
            to += piece;
            from += piece;
        }
    }

    // As widen().
    static POOLING_EXT_INLINE X widened(Raw bits) {
        if constexpr (std::is_same_v<In, T>) {
            return (X)bits;
        } else if constexpr (std::is_same_v<In, BFloat16>) {
            return (X)(__builtin_convertvector(bits, Words) << 16);
        } else {
            const Words wide = __builtin_convertvector(bits, Words);
            const Words sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
            const Words finite = (Words)((X)magnitude * 0x1p112f);
            const Words special = magnitude | 0x7f800000u;
            return (X)(sign | (magnitude >= 0x0f800000u ? special : finite));
        }
    }

    // As narrow().
    static POOLING_EXT_INLINE Raw narrowed(X x) {
        if constexpr (std::is_same_v<In, T>) {
            return (Raw)x;
        } else if constexpr (std::is_same_v<In, BFloat16>) {
            return __builtin_convertvector(rounded(x) >> 16, Raw);
        } else {
            const Words bits = (Words)x, sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
            const Words normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
            const Words subnormal = (Words)((X)size + 0.5f) - 0x3f000000u;
            Words half = size < 0x38800000u ? subnormal : normal;
            half = size >= 0x47800000u ? Words{} + 0x7c00u : half;
            half = size > 0x7f800000u ? Words{} + 0x7e00u : half;
            return __builtin_convertvector(sign | half, Raw);
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
