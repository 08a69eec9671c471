// A register of elements in the type that convolutions compute in, as wide as the instruction set
// has them, and parts of one.
#pragma once

#include <utility>

#include "cpu/numeric.h"

#ifndef POOLING_EXT_INLINE_LAMBDA
#define POOLING_EXT_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace pooling_ext::POOLING_EXT_ISA {

template <class In>
struct Lanes {
    using T = Accumulator<In>;
    typedef T X __attribute__((vector_size(kVectorBytes)));
    static constexpr int64_t kCount = kVectorBytes / int64_t(sizeof(T));

    static POOLING_EXT_INLINE X splat(T value) { return value - X{}; }

    // Computed values.
    static POOLING_EXT_INLINE X own(const T* from) {
        X x;
        std::memcpy(&x, from, sizeof(x));
        return x;
    }
    static POOLING_EXT_INLINE void keep(T* to, X x) { std::memcpy(to, &x, sizeof(x)); }
    static POOLING_EXT_INLINE X own(const T* from, int64_t n) {
        X x{};
        std::memcpy(&x, from, size_t(n) * sizeof(T));
        return x;
    }

    static POOLING_EXT_INLINE X get(const In* from) { return widened(raw(from)); }
    static POOLING_EXT_INLINE void put(In* to, X x) {
        const Raw bits = narrowed(x);
        std::memcpy(to, &bits, sizeof(bits));
    }

    // The first n lanes; those beyond are 0.
    static POOLING_EXT_INLINE X get(const In* from, int64_t n) {
        Raw bits{};
        std::memcpy(&bits, from, size_t(n) * sizeof(In));
        return widened(bits);
    }
    static POOLING_EXT_INLINE void put(In* to, X x, int64_t n) {
        const Raw bits = narrowed(x);
        std::memcpy(to, &bits, size_t(n) * sizeof(In));
    }

    // What is read back of what put() writes.
    static POOLING_EXT_INLINE X rounded(X x) {
        if constexpr (std::is_same_v<In, T>) return x;
        return widened(narrowed(x));
    }

    // Where `condition`, a comparison's result, holds.
    template <class Mask>
    static POOLING_EXT_INLINE X choose(Mask condition, X a, X b) {
        return condition ? a : b;
    }

  private:
    typedef BitsOf<In> Raw __attribute__((vector_size(kCount * sizeof(In))));
    typedef BitsOf<T> Words __attribute__((vector_size(kVectorBytes)));

    static POOLING_EXT_INLINE Raw raw(const In* from) {
        Raw bits;
        std::memcpy(&bits, from, sizeof(bits));
        return bits;
    }

    static POOLING_EXT_INLINE X widened(Raw bits) {
        if constexpr (std::is_same_v<In, T>) {
            return (X)bits;
        } else if constexpr (std::is_same_v<In, BFloat16>) {
            return (X)(__builtin_convertvector(bits, Words) << 16);
        } else {  // as widen()
            const Words wide = __builtin_convertvector(bits, Words);
            const Words sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
            const Words finite = (Words)((X)magnitude * 0x1p112f);
            const Words special = magnitude | 0x7f800000u;
            return (X)(sign | (magnitude >= 0x0f800000u ? special : finite));
        }
    }

    static POOLING_EXT_INLINE Raw narrowed(X x) {
        if constexpr (std::is_same_v<In, T>) {
            return (Raw)x;
        } else if constexpr (std::is_same_v<In, BFloat16>) {
            const Words bits = (Words)x, high = bits >> 16;
            const Words rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
            return __builtin_convertvector(x != x ? high | 0x40u : rounded, Raw);
        } else {  // as narrow()
            const Words bits = (Words)x, sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
            const Words normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
            const Words subnormal = (Words)((X)size + 0.5f) - 0x3f000000u;
            Words half = size < 0x38800000u ? subnormal : normal;
            half = size >= 0x47800000u ? Words{} + 0x7c00u : half;
            half = size > 0x7f800000u ? Words{} + 0x7e00u : half;
            return __builtin_convertvector(sign | half, Raw);
        }
    }
};

}  // namespace pooling_ext::POOLING_EXT_ISA
