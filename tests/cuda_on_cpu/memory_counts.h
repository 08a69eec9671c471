// Counts of the memory accesses of kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

// What tests call through ctypes.
#define CUDA_ON_CPU_EXPORTED extern "C" __attribute__((visibility("default")))

namespace cuda_on_cpu {

struct Access {
    unsigned warp, line, column, occurrence, ordinal;
    bool writes;
    uintptr_t address;
    size_t bytes;

    auto instruction() const { return std::tuple(warp, line, column, writes, occurrence); }
};

struct Counts {
    int64_t launches = 0, blocks = 0, threads = 0;
    // Bytes that threads ask for; that their warps touch, in whole sectors; and that come from
    // outside a cache which each block has to itself. Read, then written.
    int64_t asked[2] = {}, touched[2] = {}, moved[2] = {};

    // Counts the accesses of one block, a warp's instruction at a time, the warps in step.
    void add_block(const std::vector<Access>& accesses);
};

// Adds a launch, of whose blocks one in `share` was run and seen, to the counts of its kernel.
void add_launch(const char* kernel, const Counts& seen, double share);

}  // namespace cuda_on_cpu
