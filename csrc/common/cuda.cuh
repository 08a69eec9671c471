// What every CUDA kernel uses: launching, access to global and shared memory, element types. The
// only file that knows whether a GPU's compiler or tests/cuda_on_cpu makes the kernels.
#pragma once

#include <cstdint>
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
#include "cpu/numeric.h"
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
template <int N = 1, class T>
POOLING_EXT_DEVICE Vec<T, N> load(const T* from) {
    return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <int N = 1, class T>
POOLING_EXT_DEVICE void store(T* to, const Vec<T, N>& value) {
    *reinterpret_cast<Vec<T, N>*>(to) = value;
}
#else
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

// Elements of 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

// Whether rows of so many elements can be read in vectors of N elements.
template <class T, int N = kVector<T>>
bool takes_vectors(const void* data, int64_t row) {
    return reinterpret_cast<uintptr_t>(data) % (N * sizeof(T)) == 0 && row % N == 0;
}

}  // namespace pooling_ext
