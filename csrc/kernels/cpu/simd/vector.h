// Vectors of one size for every instruction set.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "kernels/cpu/simd/numeric.h"

namespace pooling_ext::POOLING_EXT_ISA {

// A vector as registers. Compilers scalarize comparisons on vectors wider than a register.
template <class T>
struct Registers {
    typedef T One __attribute__((vector_size(kVectorBytes)));
    static constexpr int kCount = 64 / kVectorBytes;
    One part[kCount];
};

// run(a, b) for vectors of T and U, register by register; or for two numbers.
template <class T, class U, class A, class B, class Run>
POOLING_EXT_INLINE A by_registers(A a, B b, const Run& run) {
    if constexpr (sizeof(A) == sizeof(T)) {
        return run(a, b);
    } else {
        auto x = bit_cast<Registers<T>>(a);
        const auto y = bit_cast<Registers<U>>(b);
#pragma GCC unroll 4
        for (int i = 0; i < Registers<T>::kCount; ++i) x.part[i] = run(x.part[i], y.part[i]);
        return bit_cast<A>(x);
    }
}

// Stores a register past the cache, to an address aligned to its size, where the processor can.
template <class R>
POOLING_EXT_INLINE void store_non_temporal(void* to, R x) {
#ifdef __SSE2__
    if constexpr (sizeof(R) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)x);
#endif
#ifdef __AVX__
    if constexpr (sizeof(R) == 32)
        return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)x);
#endif
#ifdef __AVX512F__
    if constexpr (sizeof(R) == 64)
        return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)x);
#endif
    std::memcpy(to, &x, sizeof(x));
}

// Makes non-temporal stores visible to other threads.
inline void fence_non_temporal() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// Some elements at a time, of as many bytes when computed whatever the instruction set, so that
// sums are too.
template <class In>
struct Vector {
    using T = Accumulator<In>;
    typedef T X __attribute__((vector_size(64)));
    static constexpr int64_t kSize = 64 / sizeof(T);

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
            Half half;
            std::memcpy(&half, from, sizeof(half));
            return (X)(__builtin_convertvector(half, Bits) << 16);
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
            const Half half = narrowed(x);
            std::memcpy(to, &half, sizeof(half));
        } else {
            alignas(64) T values[kSize];
            keep(values, x);
            for (int64_t i = 0; i < kSize; ++i) POOLING_EXT_ISA::put(to, i, narrow<In>(values[i]));
        }
    }

    // Past the cache, to an address aligned to as many bytes.
    static POOLING_EXT_INLINE void stream(In* to, X x) {
        if constexpr (std::is_same_v<In, T>)
            store_all_non_temporal(to, x);
        else if constexpr (std::is_same_v<In, BFloat16>)
            store_all_non_temporal(to, narrowed(x));
        else
            put(to, x);
    }

    // The gradients whose offsets are `wanted`, else 0.
    static POOLING_EXT_INLINE X given(const In* grad, const uint8_t* offsets, uint32_t wanted) {
        Bytes bytes;
        std::memcpy(&bytes, offsets, sizeof(bytes));
        // Compilers have an instruction for each of these two steps, but not for both at once.
        const Half halves = __builtin_convertvector(bytes, Half);
        const Bits words = __builtin_convertvector(halves, Bits);
        return by_registers<T, uint32_t>(get(grad), words,
                                         [=](auto value, auto offset) POOLING_EXT_INLINE_LAMBDA {
                                             return offset == wanted ? value : decltype(value){};
                                         });
    }

    // x in the last `n` lanes, else 0.
    static POOLING_EXT_INLINE X last(const X& x, int64_t n) {
        Order order;
        for (int64_t i = 0; i < kSize; ++i) order[i] = i;
        return by_registers<T, Index>(
            x, order, [=](auto value, auto lane) POOLING_EXT_INLINE_LAMBDA {
                return lane >= Index(kSize - n) ? value : decltype(value){};
            });
    }

  private:
    using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    typedef Index Order __attribute__((vector_size(64)));
    typedef uint32_t Bits __attribute__((vector_size(64)));
    typedef uint16_t Half __attribute__((vector_size(32)));
    typedef uint8_t Bytes __attribute__((vector_size(16)));

    // As narrow().
    static POOLING_EXT_INLINE Half narrowed(X x) {
        const Bits words = by_registers<uint32_t, T>(
            (Bits)x, x, [](auto bits, auto value) POOLING_EXT_INLINE_LAMBDA {
                const auto high = bits >> 16;
                const auto rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
                return value != value ? high | 0x40u : rounded;
            });
        return __builtin_convertvector(words, Half);
    }

    template <class All>
    static POOLING_EXT_INLINE void store_all_non_temporal(In* to, All x) {
        constexpr int64_t kBytes = sizeof(All) < kVectorBytes ? sizeof(All) : kVectorBytes;
        typedef uint32_t One __attribute__((vector_size(kBytes)));
        struct Parts {
            One part[sizeof(All) / kBytes];
        };
        const Parts parts = bit_cast<Parts>(x);
#pragma GCC unroll 4
        for (size_t i = 0; i < sizeof(All) / kBytes; ++i)
            store_non_temporal(reinterpret_cast<char*>(to) + i * kBytes, parts.part[i]);
    }
};

// One element, through the same names.
template <class In>
struct Single {
    using T = Accumulator<In>;
    using X = T;
    static POOLING_EXT_INLINE X splat(T value) { return value; }
    static POOLING_EXT_INLINE X own(const T* from) { return *from; }
    static POOLING_EXT_INLINE void keep(T* to, X x) { *to = x; }
    static POOLING_EXT_INLINE X get(const In* from) { return widen(*from); }
    static POOLING_EXT_INLINE void put(In* to, X x) { POOLING_EXT_ISA::put(to, 0, narrow<In>(x)); }
    static POOLING_EXT_INLINE void stream(In* to, X x) { put(to, x); }
};

}  // namespace pooling_ext::POOLING_EXT_ISA
