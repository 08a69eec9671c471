// Stands in for nvcuda::wmma: matrix fragments of 16 x 16 x 16. Which elements a lane holds is not
// specified on a GPU, so here they lie where nobody would guess.
#pragma once

#include "cuda_on_cpu.h"
#include "kernels/cpu/simd/numeric.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    static_assert(M == 16 && N == 16 && K == 16);
    static constexpr int num_elements = 8;
    T x[num_elements];

    // The element that lane `lane` has as x[i], as 16 * row + column.
    static int slot(int lane, int i) { return (lane * num_elements + i) * 37 % 256; }
};

template <class F, class T>
void fill_fragment(F& to, T value) {
    for (auto& x : to.x) x = value;
    __syncwarp();
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* from, unsigned stride) {
    using F = fragment<Use, 16, 16, 16, T, Layout>;
    __syncwarp();
    for (int i = 0; i < F::num_elements; ++i) {
        const int at = F::slot(cuda_on_cpu::lane(), i), row = at / 16, column = at % 16;
        to.x[i] = std::is_same_v<Layout, row_major> ? from[row * stride + column]
                                                    : from[column * stride + row];
    }
}

template <class T>
void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& from, unsigned stride,
                       layout_t layout) {
    using F = fragment<accumulator, 16, 16, 16, T>;
    for (int i = 0; i < F::num_elements; ++i) {
        const int at = F::slot(cuda_on_cpu::lane(), i), row = at / 16, column = at % 16;
        to[layout == mem_row_major ? row * stride + column : column * stride + row] = from.x[i];
    }
    __syncwarp();
}

// d = a * b + c, by the last lane for all.
template <class T, class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
              const fragment<matrix_a, 16, 16, 16, T, A>& a,
              const fragment<matrix_b, 16, 16, 16, T, B>& b,
              const fragment<accumulator, 16, 16, 16, float>& c) {
    struct Operands {
        fragment<accumulator, 16, 16, 16, float>* d;
        const fragment<matrix_a, 16, 16, 16, T, A>* a;
        const fragment<matrix_b, 16, 16, 16, T, B>* b;
        const fragment<accumulator, 16, 16, 16, float>* c;
    } mine{&d, &a, &b, &c};
    const Operands* const address = &mine;
    cuda_on_cpu::warp_exchange(~0u, &address, sizeof(address), [](const unsigned char* values) {
        using pooling_ext::baseline::widen;
        const Operands* lanes[warpSize];
        float left[16][16], right[16][16], sum[16][16];
        const auto each = [&](const auto& use) {
            for (int lane = 0; lane < warpSize; ++lane)
                for (int i = 0; i < 8; ++i) {
                    const int at = fragment<accumulator, 16, 16, 16, float>::slot(lane, i);
                    use(*lanes[lane], i, at / 16, at % 16);
                }
        };
        for (int lane = 0; lane < warpSize; ++lane)
            std::memcpy(&lanes[lane], values + 16 * lane, sizeof(lanes[lane]));
        each([&](const Operands& of, int i, int row, int column) {
            left[row][column] = widen(of.a->x[i]);
            right[row][column] = widen(of.b->x[i]);
            sum[row][column] = of.c->x[i];
        });
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                for (int column = 0; column < 16; ++column)
                    sum[row][column] += left[row][k] * right[k][column];
        each(
            [&](const Operands& of, int i, int row, int column) { of.d->x[i] = sum[row][column]; });
    });
}

}  // namespace nvcuda::wmma
