// Comparing what a vector holds: one number at a time, or two of 16 bits in a register, for which
// there are instructions that compare both.
//
//     Value, Offset    kLanes numbers, and as many offsets in a window
//     read, write      W values from and to memory, in one access
//     wins(x, best)    where x replaces what came before it, in which there is no NaN
//     map(x, f)        f(number, lane) of each, rounded to the element type
//     Flag             in which watch() adds up zero times what it is given. That is NaN where one
//                      of them was NaN or infinite, and then they are suspect().
#pragma once

#include <cstring>

#include "common/cuda.cuh"

namespace pooling_ext::cuda {

template <class In_>
struct OneLane {
    using In = In_;
    using Value = Accumulator<In>;
    using Offset = int;
    using Flag = Value;
    static constexpr int kLanes = 1;

    template <int W>
    static POOLING_EXT_DEVICE void read(const In* from, Value (&to)[W] POOLING_EXT_FROM_HERE) {
        const Vec<In, W> values = load<W>(from POOLING_EXT_HERE);
#pragma unroll
        for (int i = 0; i < W; ++i) to[i] = widen(values.at[i]);
    }

    template <int W>
    static POOLING_EXT_DEVICE void write(In* to, const Value (&from)[W]) {
        Vec<In, W> values;
#pragma unroll
        for (int i = 0; i < W; ++i) values.at[i] = narrow<In>(from[i]);
        store<W>(to, values);
    }

    static POOLING_EXT_DEVICE Offset offset(int all) { return all; }
    static POOLING_EXT_DEVICE int of_lane(Offset offset, int) { return offset; }

    static POOLING_EXT_DEVICE bool wins(Value x, Value best) { return x > best; }
    template <class T>
    static POOLING_EXT_DEVICE T pick(bool wins, T x, T best) {
        return wins ? x : best;
    }

    template <class F>
    static POOLING_EXT_DEVICE Value map(Value x, const F& f) {
        return widen(narrow<In>(f(x, 0)));
    }

    static POOLING_EXT_DEVICE void watch(Flag& flag, Value x) { flag += x * Value(0); }
    static POOLING_EXT_DEVICE Flag either(Flag a, Flag b) { return a + b; }
    static POOLING_EXT_DEVICE bool suspect(Flag flag) { return is_nan(flag); }

    // A number in the last lane.
    static POOLING_EXT_DEVICE Value last(const In* from POOLING_EXT_FROM_HERE) {
        return widen(load(from POOLING_EXT_HERE).at[0]);
    }
    static POOLING_EXT_DEVICE Value first(const In* from POOLING_EXT_FROM_HERE) {
        return widen(load(from POOLING_EXT_HERE).at[0]);
    }

    // The number at `index` of a sequence of values.
    static POOLING_EXT_DEVICE Value gather(const Value* sequence, int index, int) {
        return sequence[index];
    }
};

template <class In_>
struct TwoLanes {
    using In = In_;
    using Value = unsigned;
    using Offset = unsigned;
    using Flag = unsigned;
    static constexpr int kLanes = 2;

    template <int W>
    static POOLING_EXT_DEVICE void read(const In* from, Value (&to)[W] POOLING_EXT_FROM_HERE) {
        const auto values = load<W>(reinterpret_cast<const unsigned*>(from) POOLING_EXT_HERE);
#pragma unroll
        for (int i = 0; i < W; ++i) to[i] = values.at[i];
    }

    template <int W>
    static POOLING_EXT_DEVICE void write(In* to, const Value (&from)[W]) {
        Vec<unsigned, W> values;
#pragma unroll
        for (int i = 0; i < W; ++i) values.at[i] = from[i];
        store<W>(reinterpret_cast<unsigned*>(to), values);
    }

    static POOLING_EXT_DEVICE Offset offset(int all) { return unsigned(all) * 0x00010001u; }
    static POOLING_EXT_DEVICE int of_lane(Offset offset, int lane) {
        return int(offset >> 16 * lane & 0xffff);
    }

    template <class T>
    static POOLING_EXT_DEVICE T pick(unsigned wins, T x, T best) {
        return (x & wins) | (best & ~wins);
    }

#ifdef __CUDACC__
    using Pair = std::conditional_t<std::is_same_v<In, BFloat16>, __nv_bfloat162, __half2>;

    static POOLING_EXT_DEVICE Pair pair(unsigned bits) {
        Pair both;
        memcpy(&both, &bits, sizeof(both));
        return both;
    }

    static POOLING_EXT_DEVICE unsigned wins(Value x, Value best) {
        return __hgt2_mask(pair(x), pair(best));
    }

    // Rounding both at once is one instruction.
    template <class F>
    static POOLING_EXT_DEVICE Value map(Value x, const F& f) {
        const Pair both = pair(x);
        const float low = f(widen(both.x), 0), high = f(widen(both.y), 1);
        Pair rounded;
        if constexpr (std::is_same_v<In, BFloat16>)
            rounded = __floats2bfloat162_rn(low, high);
        else
            rounded = __floats2half2_rn(low, high);
        Value bits;
        memcpy(&bits, &rounded, sizeof(bits));
        return bits;
    }

    static POOLING_EXT_DEVICE void watch(Flag& flag, Value x) {
        const Pair sum = __hfma2(pair(x), pair(0), pair(flag));
        memcpy(&flag, &sum, sizeof(flag));
    }
#else
    static In lane(unsigned bits, int i) {
        In one;
        one.bits = uint16_t(bits >> 16 * i);
        return one;
    }

    static unsigned wins(Value x, Value best) {
        unsigned mask = 0;
        for (int i = 0; i < 2; ++i)
            if (widen(lane(x, i)) > widen(lane(best, i))) mask |= 0xffffu << 16 * i;
        return mask;
    }

    template <class F>
    static Value map(Value x, const F& f) {
        unsigned bits = 0;
        for (int i = 0; i < 2; ++i)
            bits |= unsigned(narrow<In>(f(widen(lane(x, i)), i)).bits) << 16 * i;
        return bits;
    }

    static void watch(Flag& flag, Value x) {
        unsigned sums = 0;
        for (int i = 0; i < 2; ++i)
            sums |= unsigned(narrow<In>(widen(lane(x, i)) * 0 + widen(lane(flag, i))).bits)
                    << 16 * i;
        flag = sums;
    }
#endif
    static POOLING_EXT_DEVICE bool suspect(Flag flag) { return (flag & 0x7fff7fffu) != 0; }

    static POOLING_EXT_DEVICE Flag either(Flag a, Flag b) { return a | b; }

    static POOLING_EXT_DEVICE Value first(const In* from POOLING_EXT_FROM_HERE) {
        return load(reinterpret_cast<const uint16_t*>(from) POOLING_EXT_HERE).at[0];
    }
    static POOLING_EXT_DEVICE Value last(const In* from POOLING_EXT_FROM_HERE) {
        return first(from POOLING_EXT_HERE) << 16;
    }

    // The numbers at `index` and `index + step` of a sequence of values.
    static POOLING_EXT_DEVICE Value gather(const Value* sequence, int index, int step) {
        const int next = index + step;
        if (step == 1 && index % 2 == 0) return sequence[index / 2];
        return __byte_perm(sequence[index / 2], sequence[next / 2],
                           (index % 2 ? 0x32 : 0x10) | (next % 2 ? 0x7600 : 0x5400));
    }
};

}  // namespace pooling_ext::cuda
