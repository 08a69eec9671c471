// What every CUDA kernel uses: launching, access to global and shared memory, element types. The
// only file that knows whether a GPU's compiler or tests/cuda_on_cpu makes the kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>
#else
#include "cuda_on_cpu.h"
#include "mma.h"
#endif

#include "common/pooling.h"
#ifndef __CUDACC__
#include "kernels/cpu/simd/numeric.h"
#endif

namespace pooling_ext {

#define POOLING_EXT_DEVICE __device__ __forceinline__

// --- elements ------------------------------------------------------------------------------------

#ifdef __CUDACC__
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// The type sums are accumulated in.
template <class In>
using Accumulator = std::conditional_t<std::is_same_v<In, double>, double, float>;

POOLING_EXT_DEVICE float widen(float x) { return x; }
POOLING_EXT_DEVICE double widen(double x) { return x; }
POOLING_EXT_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
POOLING_EXT_DEVICE float widen(Float16 x) { return __half2float(x); }

template <class Out>
POOLING_EXT_DEVICE Out narrow(Accumulator<Out> x) {
    if constexpr (std::is_same_v<Out, BFloat16>)
        return __float2bfloat16_rn(x);
    else if constexpr (std::is_same_v<Out, Float16>)
        return __float2half_rn(x);
    else
        return x;
}
#else
using baseline::Accumulator;
using baseline::BFloat16;
using baseline::Float16;
using baseline::narrow;
using baseline::widen;
#endif

template <class T>
POOLING_EXT_DEVICE bool is_nan(T x) {
    return x != x;
}

// --- launching -----------------------------------------------------------------------------------

using Stream = cudaStream_t;

struct Grid {
    dim3 blocks, threads;
    size_t shared = 0;  // bytes of dynamic shared memory
};

// Runs kKernel on the stream, and throws where that cannot be.
template <auto kKernel, class... Args>
void launch(const Grid& grid, Stream stream, const Args&... args) {
#ifdef __CUDACC__
    cudaError_t error = cudaSuccess;
    // More than 48 KB has to be asked for.
    if (grid.shared > (48 << 10))
        error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     int(grid.shared));
    if (error == cudaSuccess) {
        kKernel<<<grid.blocks, grid.threads, grid.shared, stream>>>(args...);
        error = cudaGetLastError();
    }
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("pooling_ext: a CUDA kernel could not be launched: ") +
                                 cudaGetErrorString(error));
#else
    (void)stream;
    cuda_on_cpu::run(__PRETTY_FUNCTION__, grid.blocks, grid.threads, grid.shared,
                     [&] { kKernel(args...); });
#endif
}

// The block's dynamic shared memory.
template <class T>
POOLING_EXT_DEVICE T* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
#else
    return static_cast<T*>(cuda_on_cpu::dynamic_shared());
#endif
}

// --- global memory -------------------------------------------------------------------------------

// What a thread reads or writes at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    T at[N];
};

// Every access to global memory goes through these two, so that it can be counted.
#ifdef __CUDACC__
#define POOLING_EXT_FROM_HERE
#define POOLING_EXT_HERE
template <int N = 1, class T>
POOLING_EXT_DEVICE Vec<T, N> load(const T* from) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
}

// Vectors of 16 and of 8 bytes are written by an instruction that compilers do not divide into
// several small ones, as they do with structures whose parts are ready one after the other.
template <int N = 1, class T>
POOLING_EXT_DEVICE void store(T* to, const Vec<T, N>& value) {
    if constexpr (sizeof(value) == 16 || sizeof(value) == 8) {
        std::conditional_t<sizeof(value) == 16, uint4, uint2> words;
        memcpy(&words, &value, sizeof(words));
        __stwb(reinterpret_cast<decltype(words)*>(to), words);
    } else {
        *reinterpret_cast<Vec<T, N>*>(to) = value;
    }
}
#else
#define POOLING_EXT_FROM_HERE , std::source_location where = std::source_location::current()
#define POOLING_EXT_HERE , where
template <int N = 1, class T>
Vec<T, N> load(const T* from, std::source_location where = std::source_location::current()) {
    cuda_on_cpu::note_access(from, sizeof(T) * N, false, where);
    return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <int N = 1, class T>
void store(T* to, const Vec<T, N>& value,
           std::source_location where = std::source_location::current()) {
    cuda_on_cpu::note_access(to, sizeof(T) * N, true, where);
    *reinterpret_cast<Vec<T, N>*>(to) = value;
}
#endif

// Copies N elements to shared memory, or zeros there unless `wanted`, while the thread goes on
// until it waits for that with __pipeline_wait_prior. What is smaller than 4 bytes is copied at
// once.
template <int N, class T>
POOLING_EXT_DEVICE void copy_async(T* to, const T* from, bool wanted POOLING_EXT_FROM_HERE) {
    if constexpr (sizeof(T) * N >= 4) {
#ifndef __CUDACC__
        if (wanted) cuda_on_cpu::note_access(from, sizeof(T) * N, false, where);
#endif
        __pipeline_memcpy_async(to, from, sizeof(T) * N, wanted ? 0 : sizeof(T) * N);
    } else {
        Vec<T, N> value{};
        if (wanted) value = load<N>(from POOLING_EXT_HERE);
        *reinterpret_cast<Vec<T, N>*>(to) = value;
    }
}

// --- tensor cores --------------------------------------------------------------------------------

// A 16 x 16 matrix of 16-bit floats from shared memory. What a compiler is not told to be there it
// reads with ordinary loads.
template <class Use, class T, class Layout>
POOLING_EXT_DEVICE void load_shared_matrix(nvcuda::wmma::fragment<Use, 16, 16, 16, T, Layout>& to,
                                           const T* from, unsigned stride) {
#ifdef __CUDACC__
    constexpr bool kLeft = std::is_same_v<Use, nvcuda::wmma::matrix_a>;
    static_assert(
        std::is_same_v<
            Layout, std::conditional_t<kLeft, nvcuda::wmma::row_major, nvcuda::wmma::col_major>>);
    const unsigned at = unsigned(__cvta_generic_to_shared(from));
    unsigned* const x = reinterpret_cast<unsigned*>(&to.x[0]);
#define POOLING_EXT_LOAD_4(use, layout)                               \
    asm volatile("wmma.load." use ".sync.aligned." layout             \
                 ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;" \
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])     \
                 : "r"(at), "r"(stride)                               \
                 : "memory")
#define POOLING_EXT_LOAD_8(use, layout)                                                    \
    asm volatile("wmma.load." use ".sync.aligned." layout                                  \
                 ".m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"       \
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]), "=r"(x[4]), "=r"(x[5]), \
                   "=r"(x[6]), "=r"(x[7])                                                  \
                 : "r"(at), "r"(stride)                                                    \
                 : "memory")
    if constexpr (std::is_same_v<T, BFloat16> && kLeft)
        POOLING_EXT_LOAD_4("a", "row");
    else if constexpr (std::is_same_v<T, BFloat16>)
        POOLING_EXT_LOAD_4("b", "col");
    else if constexpr (kLeft)
        POOLING_EXT_LOAD_8("a", "row");
    else
        POOLING_EXT_LOAD_8("b", "col");
#undef POOLING_EXT_LOAD_4
#undef POOLING_EXT_LOAD_8
#else
    nvcuda::wmma::load_matrix_sync(to, from, stride);
#endif
}

// Elements of 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

// Whether rows of so many elements can be read in vectors of N elements.
template <class T, int N = kVector<T>>
bool takes_vectors(const void* data, int64_t row) {
    return reinterpret_cast<uintptr_t>(data) % (N * sizeof(T)) == 0 && row % N == 0;
}

}  // namespace pooling_ext
