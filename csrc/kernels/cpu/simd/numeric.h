// Element types: how each is read into, and written from, the type that kernels compute in.
// Written without branches so that loops over them vectorize on any instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/pooling.h"

#ifndef POOLING_EXT_ISA
#define POOLING_EXT_ISA baseline
#endif

#define POOLING_EXT_INLINE_LAMBDA __attribute__((always_inline))

namespace pooling_ext::POOLING_EXT_ISA {

// Of a register.
#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class To, class From>
POOLING_EXT_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// The type sums are accumulated in.
template <class In>
using Accumulator = std::conditional_t<std::is_same_v<In, double>, double, float>;

POOLING_EXT_INLINE float widen(float x) { return x; }
POOLING_EXT_INLINE double widen(double x) { return x; }

POOLING_EXT_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

POOLING_EXT_INLINE float widen(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
    // Exponents are biased by 15 here and by 127 there. Multiplying by 2^112 makes up for it, and
    // normalizes subnormals; infinity and NaN need the largest exponent.
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <class Out>
POOLING_EXT_INLINE Out narrow(Accumulator<Out> x);

template <>
POOLING_EXT_INLINE float narrow<float>(float x) {
    return x;
}

template <>
POOLING_EXT_INLINE double narrow<double>(double x) {
    return x;
}

// The upper half is x rounded to nearest, ties to even.
POOLING_EXT_INLINE uint32_t rounded_to_half(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return x != x ? bits | 0x00400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <>
POOLING_EXT_INLINE BFloat16 narrow<BFloat16>(float x) {
    return {uint16_t(rounded_to_half(x) >> 16)};
}

template <>
POOLING_EXT_INLINE Float16 narrow<Float16>(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent, round the 13 bits that go. A carry out of the largest
    // finite value lands on infinity by itself.
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 lines the wanted bits up at the end, rounded by the adder.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {uint16_t(sign | half)};
}

// Whether networks compute in a type. The rest goes without the kernels that are there for speed
// alone: each takes its time to compile, for every type and instruction set.
template <class In>
constexpr bool kCommon = std::is_same_v<In, float> || std::is_same_v<In, BFloat16>;

// The unsigned integer as wide as a type.
template <class T>
using BitsOf =
    std::conditional_t<sizeof(T) == 8, uint64_t,
                       std::conditional_t<sizeof(T) == 4, uint32_t,
                                          std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>>;

// condition ? a : b, which a compiler can not turn into a branch that keeps a loop from being
// vectorized.
template <class T>
POOLING_EXT_INLINE T select(bool condition, T a, T b) {
    const BitsOf<T> mask = BitsOf<T>(-BitsOf<T>(condition));
    return bit_cast<T>(
        BitsOf<T>((bit_cast<BitsOf<T>>(a) & mask) | (bit_cast<BitsOf<T>>(b) & ~mask)));
}

// to[i] = value, as an integer: compilers leave some loops that store a structure alone.
template <class G>
POOLING_EXT_INLINE void put(G* to, int64_t i, G value) {
    typedef BitsOf<G> Aliasing __attribute__((may_alias));
    reinterpret_cast<Aliasing*>(to)[i] = bit_cast<BitsOf<G>>(value);
}

// dst[0..n) = value. As integers, since compilers leave loops that store a structure alone.
template <class G>
void fill(G* dst, G value, int64_t n) {
    typedef BitsOf<G> Aliasing __attribute__((may_alias));
    const BitsOf<G> bits = bit_cast<BitsOf<G>>(value);
    Aliasing* to = reinterpret_cast<Aliasing*>(dst);
    for (int64_t i = 0; i < n; ++i) to[i] = bits;
}

template <class T>
POOLING_EXT_INLINE bool is_nan(T x) {
    if constexpr (std::is_floating_point_v<T>) return x != x;
    return false;
}

// All bits where one of some floating-point numbers, or of those in the same lanes of vectors, is a
// NaN, else none.
template <class X>
POOLING_EXT_INLINE auto nan_mask(X a, X b) {
    if constexpr (std::is_floating_point_v<X>)
        return BitsOf<X>(-BitsOf<X>(__builtin_isunordered(a, b)));
    else
        return ~((a <= b) | (a > b));
}
template <class X>
POOLING_EXT_INLINE auto nan_mask(X a) {
    return nan_mask(a, a);
}
template <class X, class... Rest>
POOLING_EXT_INLINE auto nan_mask(X a, X b, Rest... rest) {
    return nan_mask(a, b) | nan_mask(rest...);
}

// Maxima of the type itself.
template <class In>
struct Ordered {
    using T = std::conditional_t<std::is_integral_v<In>, In, Accumulator<In>>;

    static POOLING_EXT_INLINE T lowest() {
        if constexpr (std::is_integral_v<In>) return std::numeric_limits<In>::lowest();
        return -std::numeric_limits<T>::infinity();
    }
    static POOLING_EXT_INLINE T load(In x) {
        if constexpr (std::is_integral_v<In>)
            return x;
        else
            return widen(x);
    }
    static POOLING_EXT_INLINE In store(T x) {
        if constexpr (std::is_integral_v<In>)
            return x;
        else
            return narrow<In>(x);
    }
    // A NaN wins against all: the first is kept where a comparison fails, and where one of the rest
    // is a NaN all bits are set in the end, which is one too. Apart from each other, as compilers
    // have one instruction for a maximum only while its operands stay floating-point numbers, and
    // one that looks for NaNs in two of them.
    template <class X, class... Rest>
    static POOLING_EXT_INLINE X largest(X first, Rest... rest) {
        X most = first;
        ((most = rest > most ? rest : most), ...);
        if constexpr (std::is_integral_v<T> || sizeof...(rest) == 0) {
            return most;
        } else {
            const auto mask = nan_mask(rest...);
            return bit_cast<X>(bit_cast<decltype(mask + mask)>(most) | mask);
        }
    }
};

// Maxima of 16-bit floats through integers in the same order, twice as many to a register.
template <class In, int16_t kInfinity>
struct OrderedKey {
    using T = int16_t;

    static POOLING_EXT_INLINE T flip(T bits) { return bits ^ ((bits >> 15) & 0x7fff); }
    static POOLING_EXT_INLINE T lowest() { return flip(T(kInfinity | 0x8000)); }
    static POOLING_EXT_INLINE T load(In x) {
        // A NaN loses its sign, which puts it above infinity.
        const T magnitude = T(x.bits & 0x7fff);
        return magnitude > kInfinity ? magnitude : flip(T(x.bits));
    }
    static POOLING_EXT_INLINE In store(T key) { return {uint16_t(flip(key))}; }
    template <class X, class... Rest>
    static POOLING_EXT_INLINE X largest(X most, Rest... rest) {
        ((most = rest > most ? rest : most), ...);
        return most;
    }
};

template <class In>
struct Fastest {
    using Order = Ordered<In>;
};
template <>
struct Fastest<BFloat16> {
    using Order = OrderedKey<BFloat16, 0x7f80>;
};
template <>
struct Fastest<Float16> {
    using Order = OrderedKey<Float16, 0x7c00>;
};

}  // namespace pooling_ext::POOLING_EXT_ISA
