// What the stand-in itself must do: see tests/gpu/test_cuda.py, which compiles and runs this.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "common/cuda.cuh"

extern "C" void cuda_on_cpu_set(uint64_t seed, int64_t most, bool counting);

namespace pooling_ext {
namespace {

constexpr int kThreads = 96;

// Each thread takes over what another one wrote; without the barrier it may not be there yet.
template <bool kBarrier>
__global__ void reverse(int* to) {
    int* const shared = dynamic_shared<int>();
    shared[threadIdx.x] = int(threadIdx.x);
    if (kBarrier) __syncthreads();
    to[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void half_wait(int* to) {
    if (threadIdx.x % 2) __syncthreads();
    to[threadIdx.x] = 1;
}

__global__ void warps(int* to) {
    int sum = int(threadIdx.x);
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
    const unsigned odd = __ballot_sync(~0u, threadIdx.x % 2);
    to[threadIdx.x] = odd == 0xaaaaaaaau ? sum : -1;
}

// A copy has arrived when it has been waited for, and not before.
__global__ void copies(const int* from, int* to) {
    int* const shared = dynamic_shared<int>();
    shared[threadIdx.x] = -1;
    __pipeline_memcpy_async(shared + threadIdx.x, from + threadIdx.x, sizeof(int));
    __pipeline_commit();
    const int before = shared[threadIdx.x];
    __pipeline_wait_prior(0);
    to[threadIdx.x] = before == -1 ? shared[threadIdx.x] : -2;
}

__global__ void products(const float* from, float* to) {
    using namespace nvcuda::wmma;
    fragment<matrix_a, 16, 16, 16, Float16, row_major> a;
    fragment<matrix_b, 16, 16, 16, Float16, col_major> b;
    fragment<accumulator, 16, 16, 16, float> sum;
    Float16* const shared = dynamic_shared<Float16>();
    for (int i = int(threadIdx.x); i < 256; i += 32) shared[i] = narrow<Float16>(from[i]);
    __syncwarp();
    fill_fragment(sum, 1.0f);
    load_matrix_sync(a, shared, 16);
    load_matrix_sync(b, shared, 16);
    mma_sync(sum, a, b, sum);
    store_matrix_sync(to, sum, 16, mem_row_major);
}

void expect(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "not so: %s\n", what);
    std::exit(1);
}

template <auto kKernel, class... Args>
bool throws(const Args&... args) {
    try {
        launch<kKernel>({dim3(1), dim3(kThreads), kThreads * sizeof(int)}, nullptr, args...);
    } catch (const std::runtime_error&) {
        return true;
    }
    return false;
}

int run() {
    int to[kThreads], from[kThreads];
    const Grid grid{dim3(1), dim3(kThreads), kThreads * sizeof(int)};
    int wrong = 0;
    for (uint64_t seed = 0; seed < 8; ++seed) {
        cuda_on_cpu_set(seed, 0, false);
        launch<reverse<true>>(grid, nullptr, static_cast<int*>(to));
        for (int i = 0; i < kThreads; ++i) expect(to[i] == kThreads - 1 - i, "threads wait");
        launch<reverse<false>>(grid, nullptr, static_cast<int*>(to));
        for (int i = 0; i < kThreads; ++i) wrong += to[i] != kThreads - 1 - i;
        launch<warps>(grid, nullptr, static_cast<int*>(to));
        for (int i = 0; i < kThreads; ++i)
            expect(to[i] == i / 32 * 32 * 32 + 31 * 16, "lanes see each other's values");
        for (int i = 0; i < kThreads; ++i) from[i] = 3 * i;
        launch<copies>(grid, nullptr, static_cast<const int*>(from), static_cast<int*>(to));
        for (int i = 0; i < kThreads; ++i) expect(to[i] == 3 * i, "copies arrive when waited for");
    }
    expect(wrong > 0, "a missing barrier shows");
    expect(throws<half_wait>(static_cast<int*>(to)), "a barrier that not all reach is an error");
    expect(!throws<reverse<true>>(static_cast<int*>(to)), "and the next launch runs");

    float matrix[256], product[256];
    for (int i = 0; i < 256; ++i) matrix[i] = float((i * 7) % 11) - 5;
    launch<products>({dim3(1), dim3(32), 256 * sizeof(Float16)}, nullptr,
                     static_cast<const float*>(matrix), static_cast<float*>(product));
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 16; ++column) {
            float sum = 1;
            for (int k = 0; k < 16; ++k) sum += matrix[row * 16 + k] * matrix[column * 16 + k];
            expect(product[row * 16 + column] == sum, "fragments multiply");
        }
    return 0;
}

}  // namespace
}  // namespace pooling_ext

int main() { return pooling_ext::run(); }
