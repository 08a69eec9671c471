// The product of two tiles in shared memory, on tensor cores or in plain FMA.
#pragma once

#include "common/cuda.cuh"
#include "kernels/cuda/conv/conv.h"

namespace pooling_ext::cuda {

// A tile's sizes. Rows of both operands lie in shared memory with 16 bytes between them, so that
// eight of them, at the same place, are in different banks.
template <class T, int kTile>
struct TileOf {
    static constexpr int kRows = kConvTiles[kTile].pixels, kColumns = kConvTiles[kTile].channels;
    static constexpr int kDown = kConvTiles[kTile].warps_down,
                         kAcross = kConvTiles[kTile].warps_across;
    static constexpr int kThreads = 32 * kDown * kAcross;
    static constexpr int kStages = kConvTiles[kTile].stages;
    static constexpr int kStep = 64 / int(sizeof(T));
    static constexpr int kStride = kStep + kVector<T>;
    static constexpr int kStage = (kRows + kColumns) * kStride;  // elements
    // The result goes to shared memory so many columns at a time, in float32.
    static constexpr int kPart = 64, kPartStride = kPart + 4;
    static constexpr int kParts = kColumns / kPart;
    static_assert(kColumns % kPart == 0 && kThreads % kPart == 0 && kStages >= 2);
};

// N elements of shared memory.
template <int N, class T>
POOLING_EXT_DEVICE Vec<T, N>& vector(T* from) {
    return *reinterpret_cast<Vec<T, N>*>(from);
}
template <int N, class T>
POOLING_EXT_DEVICE const Vec<T, N>& vector(const T* from) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
}

// The sums of a block's tile, spread over its threads: a += rows * columns^T for one step, of which
// `rows` and `columns` are in shared memory, and put() writes one part of kPart columns there.
template <class T, class Tile>
class Product {
  public:
    POOLING_EXT_DEVICE Product() {
#pragma unroll
        for (int i = 0; i < kHigh; ++i)
#pragma unroll
            for (int j = 0; j < kWide; ++j) nvcuda::wmma::fill_fragment(sums_[i][j], 0.0f);
    }

    POOLING_EXT_DEVICE void add(const T* rows, const T* columns) {
        using namespace nvcuda::wmma;
        rows += row() * Tile::kStride;
        columns += column() * Tile::kStride;
#pragma unroll
        for (int k = 0; k < Tile::kStep; k += 16) {
            fragment<matrix_b, 16, 16, 16, T, col_major> right[kWide];
#pragma unroll
            for (int j = 0; j < kWide; ++j)
                load_shared_matrix(right[j], columns + 16 * j * Tile::kStride + k, Tile::kStride);
#pragma unroll
            for (int i = 0; i < kHigh; ++i) {
                fragment<matrix_a, 16, 16, 16, T, row_major> left;
                load_shared_matrix(left, rows + 16 * i * Tile::kStride + k, Tile::kStride);
#pragma unroll
                for (int j = 0; j < kWide; ++j) mma_sync(sums_[i][j], left, right[j], sums_[i][j]);
            }
        }
    }

    template <int kNumber>
    POOLING_EXT_DEVICE void put(float* part) const {
        if (column() / Tile::kPart != kNumber) return;
        part += row() * Tile::kPartStride + column() % Tile::kPart;
#pragma unroll
        for (int i = 0; i < kHigh; ++i)
#pragma unroll
            for (int j = 0; j < kWide; ++j)
                nvcuda::wmma::store_matrix_sync(part + 16 * (i * Tile::kPartStride + j),
                                                sums_[i][j], Tile::kPartStride,
                                                nvcuda::wmma::mem_row_major);
    }

  private:
    // Fragments of a warp.
    static constexpr int kHigh = Tile::kRows / Tile::kDown / 16;
    static constexpr int kWide = Tile::kColumns / Tile::kAcross / 16;
    static_assert(Tile::kPart % (16 * kWide) == 0);

    static POOLING_EXT_DEVICE int row() {
        return int(threadIdx.x) / 32 % Tile::kDown * (16 * kHigh);
    }
    static POOLING_EXT_DEVICE int column() {
        return int(threadIdx.x) / 32 / Tile::kDown * (16 * kWide);
    }

    nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sums_[kHigh][kWide];
};

// In float32 each thread has the outer product of every so many rows and every 16th column.
template <class Tile>
class Product<float, Tile> {
  public:
    POOLING_EXT_DEVICE Product() {
#pragma unroll
        for (int i = 0; i < kHigh; ++i)
#pragma unroll
            for (int j = 0; j < kWide; ++j) sums_[i][j] = 0;
    }

    POOLING_EXT_DEVICE void add(const float* rows, const float* columns) {
        rows += row() * Tile::kStride;
        columns += column() * Tile::kStride;
#pragma unroll(kHigh* kWide < 64 ? 4 : 1)
        for (int k = 0; k < Tile::kStep; k += 4) {
            Vec<float, 4> right[kWide];
#pragma unroll
            for (int j = 0; j < kWide; ++j)
                right[j] = vector<4>(columns + kAcross * j * Tile::kStride + k);
#pragma unroll
            for (int i = 0; i < kHigh; ++i) {
                const Vec<float, 4> left = vector<4>(rows + kDown * i * Tile::kStride + k);
#pragma unroll
                for (int j = 0; j < kWide; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sums_[i][j] = fmaf(left.at[e], right[j].at[e], sums_[i][j]);
            }
        }
    }

    template <int kNumber>
    POOLING_EXT_DEVICE void put(float* part) const {
        constexpr int kOwn = Tile::kPart / kAcross;
#pragma unroll
        for (int i = 0; i < kHigh; ++i)
#pragma unroll
            for (int j = 0; j < kOwn; ++j)
                part[(row() + kDown * i) * Tile::kPartStride + column() + kAcross * j] =
                    sums_[i][kNumber * kOwn + j];
    }

  private:
    static constexpr int kAcross = 16, kDown = Tile::kThreads / kAcross;
    static constexpr int kHigh = Tile::kRows / kDown, kWide = Tile::kColumns / kAcross;

    static POOLING_EXT_DEVICE int row() { return int(threadIdx.x) / kAcross; }
    static POOLING_EXT_DEVICE int column() { return int(threadIdx.x) % kAcross; }

    float sums_[kHigh][kWide];
};

}  // namespace pooling_ext::cuda
