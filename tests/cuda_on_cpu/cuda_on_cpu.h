// Stands in for the CUDA runtime, so that a C++ compiler makes the CUDA kernels into functions that
// run on the CPU: blocks one after the other, the threads of a block as fibers in an order drawn
// from a seed, which change over where a thread waits for others. What a thread would do without
// waiting it does in one go.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Blocks run one after the other, but operators may be called from several threads.
#define __shared__ static thread_local

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
using cudaStream_t = void*;

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

// Runs `thread` once for each thread of the grid.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared,
         const std::function<void()>& thread);

// The dynamic shared memory of the block, of exactly the size asked for.
void* dynamic_shared();

// The threads of the block wait for each other.
void block_barrier();

// The lanes of `mask` wait for each other, each with a value of `bytes` <= 16 that the others see;
// the last one runs `last`, if any, before they go on. Returns the values, 16 bytes apart.
const unsigned char* warp_exchange(unsigned mask, const void* value, size_t bytes,
                                   const std::function<void(const unsigned char*)>& last = {});

// Notes that this thread reads or writes global memory, where accesses are counted.
void note_access(const void* address, size_t bytes, bool writes, const std::source_location& where);

// Copies of this thread that are under way until it waits for them.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(unsigned groups_left);

template <class T>
T exchange(unsigned mask, T value, unsigned lane) {
    const unsigned char* values = warp_exchange(mask, &value, sizeof(T));
    std::memcpy(&value, values + 16 * lane, sizeof(T));
    return value;
}

inline unsigned lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

}  // namespace cuda_on_cpu

inline float __fdividef(float x, float y) { return x / y; }

// The bytes of y:x that the lower three bits of each hexadecimal digit of `selector` name.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = uint64_t(y) << 32 | x;
    unsigned bytes = 0;
    for (int i = 0; i < 4; ++i)
        bytes |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return bytes;
}

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::exchange(mask, 0, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return cuda_on_cpu::exchange(mask, value, lane % warpSize);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return cuda_on_cpu::exchange(mask, value, cuda_on_cpu::lane() ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const unsigned from = cuda_on_cpu::lane() + by;
    return cuda_on_cpu::exchange(mask, value, from < warpSize ? from : cuda_on_cpu::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = cuda_on_cpu::lane();
    return cuda_on_cpu::exchange(mask, value, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const unsigned char value = vote;
    const unsigned char* values = cuda_on_cpu::warp_exchange(mask, &value, 1);
    unsigned ballot = 0;
    for (int lane = 0; lane < warpSize; ++lane)
        if (mask >> lane & 1) ballot |= unsigned(values[16 * lane]) << lane;
    return ballot;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == mask; }

// cuda_pipeline.h
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
    static constexpr char nothing[16] = {};
    if (bytes > zeros) cuda_on_cpu::copy_later(to, from, bytes - zeros);
    if (zeros) cuda_on_cpu::copy_later(static_cast<char*>(to) + bytes - zeros, nothing, zeros);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(unsigned groups) { cuda_on_cpu::wait_for_copies(groups); }
