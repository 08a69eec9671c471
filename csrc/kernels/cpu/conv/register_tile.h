// Matrix products on a tile of registers: rows of broadcast numbers by one or two vectors.
#pragma once

#include "kernels/cpu/conv/lanes.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// How many rows fill the registers beside two vectors and a broadcast number.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif

// Rows in tiles of nearly equal height.
struct RowTiles {
    int64_t count, height, higher;  // `higher` of them have one row more

    explicit POOLING_EXT_INLINE RowTiles(int64_t rows)
        : count(ceil_div(rows, int64_t(kTileRows))), height(rows / count), higher(rows % count) {}

    // Calls use(first, rows) for each.
    template <class Use>
    POOLING_EXT_INLINE void each(const Use& use) const {
        int64_t first = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t rows = height + (i < higher);
            use(first, rows);
            first += rows;
        }
    }
};

// One column after the other of some rows of a matrix. Addresses are made out of two pointers and
// odd multiples of the stride in bytes, which processors multiply by 2, 4 or 8 for nothing:
// compilers run out of registers with a pointer for each row, and with a register for each multiple
// too, unless they are told anew for each column.
template <class T>
struct RowPointers {
    const char *first, *second;
    int64_t one, three, five;

    POOLING_EXT_INLINE RowPointers(const T* a, int64_t stride)
        : first(reinterpret_cast<const char*>(a)),
          second(reinterpret_cast<const char*>(a + 7 * stride)),
          one(stride * int64_t(sizeof(T))),
          three(3 * one),
          five(5 * one) {}

    POOLING_EXT_INLINE void next() {
        first += sizeof(T), second += sizeof(T);
        asm("" : "+r"(first), "+r"(second), "+r"(one), "+r"(three), "+r"(five));
    }
    POOLING_EXT_INLINE T operator[](int row) const {
        const char* const base = row < 7 ? first : second;
        switch (row % 7) {
            case 0:
                return at(base);
            case 1:
                return at(base + one);
            case 2:
                return at(base + 2 * one);
            case 3:
                return at(base + three);
            case 4:
                return at(base + 4 * one);
            case 5:
                return at(base + five);
            default:
                return at(base + 2 * three);
        }
    }

  private:
    static POOLING_EXT_INLINE T at(const char* from) { return *reinterpret_cast<const T*>(from); }
};

// Two runs of memory that are needed soon, of which each step of a product fetches so many bytes:
// evenly, since a burst of fetches would wait for itself.
struct Ahead {
    const char *first, *second;
    int64_t first_step, second_step;
};

// c[i][:] = sum over k of a[i][k] * b[k][:]
template <class T, int kRows, int kVectors>
void product_tile(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                  int64_t c_stride, Ahead ahead) {
    using L = Lanes<T>;
    using X = typename L::X;
    RowPointers<T> rows(a, a_stride);
    X sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k, rows.next(), b += b_stride) {
        __builtin_prefetch(ahead.first, 0, 2);
        __builtin_prefetch(ahead.second, 0, 2);
        ahead.first += ahead.first_step;
        ahead.second += ahead.second_step;
        X factor[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) factor[v] = L::own(b + v * L::kSize);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const T number = rows[i];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[i][v] += number * factor[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) L::keep(c + i * c_stride + v * L::kSize, sums[i][v]);
}

// c[i][:] = sum over k of a[k][i] * b[k][:], to which what was there is added if asked for.
template <class T, int kRows, int kVectors>
void outer_tile(int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c,
                int64_t c_stride, bool add) {
    using L = Lanes<T>;
    using X = typename L::X;
    X sums[kRows][kVectors] = {};
    if (add) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[i][v] = L::own(c + i * c_stride + v * L::kSize);
    }
    // The rows after these, which the next call adds to.
    const T* next = c + kRows * c_stride;
    for (int64_t k = 0; k < depth; ++k) {
        if (add)
            for (int v = 0; v < kVectors; ++v) __builtin_prefetch(next + v * L::kSize);
        next += c_stride;
        X factor[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) factor[v] = L::own(b + v * L::kSize);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const T number = a[i];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[i][v] += number * factor[v];
        }
        a += a_stride;
        b += b_stride;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) L::keep(c + i * c_stride + v * L::kSize, sums[i][v]);
}

// The tiles of every height up to kTileRows, by their height, for one vector and two.
template <class T>
struct TileKernels {
    using Product = void (*)(int64_t depth, const T* a, int64_t a_stride, const T* b,
                             int64_t b_stride, T* c, int64_t c_stride, Ahead ahead);
    using Outer = void (*)(int64_t depth, const T* a, int64_t a_stride, const T* b,
                           int64_t b_stride, T* c, int64_t c_stride, bool add);

    Product product[2][kTileRows + 1] = {};
    Outer outer[2][kTileRows + 1] = {};

    constexpr TileKernels() { fill(std::make_integer_sequence<int, kTileRows>{}); }

  private:
    template <int... I>
    constexpr void fill(std::integer_sequence<int, I...>) {
        ((product[0][I + 1] = product_tile<T, I + 1, 1>), ...);
        ((product[1][I + 1] = product_tile<T, I + 1, 2>), ...);
        ((outer[0][I + 1] = outer_tile<T, I + 1, 1>), ...);
        ((outer[1][I + 1] = outer_tile<T, I + 1, 2>), ...);
    }
};

template <class T>
constexpr TileKernels<T> kTiles{};

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
