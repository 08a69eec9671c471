// What the fuzzers share: random jobs in a child process, elements of every format, and arrays of
// exactly their size.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>

#include "common/pool_job.h"

namespace pooling_ext {
namespace {

constexpr unsigned char kPoison = 0xa5;

struct Random {
    std::mt19937_64 bits;

    int64_t pick(int64_t low, int64_t high) { return low + bits() % uint64_t(high - low + 1); }
    bool chance(int64_t one_in) { return pick(1, one_in) == 1; }
};

// --- elements --------------------------------------------------------------------------

struct Format {
    DType dtype;
    const char* name;
    int bytes, exponent, mantissa;  // exponent and mantissa in bits; 0 for integers

    int bias() const { return (1 << (exponent - 1)) - 1; }
    bool is_float() const { return exponent > 0; }

    double value(uint64_t bits) const {
        if (dtype == DType::UInt8) return double(bits);
        const int unused = 64 - 8 * bytes;
        if (!is_float()) return double(int64_t(bits << unused) >> unused);
        const int field = int(bits >> mantissa) & ((1 << exponent) - 1);
        const uint64_t fraction = bits & ((uint64_t(1) << mantissa) - 1);
        const double sign = bits >> (8 * bytes - 1) ? -1 : 1;
        if (field == (1 << exponent) - 1) return fraction ? NAN : sign * INFINITY;
        const uint64_t significand = fraction | uint64_t(field > 0) << mantissa;
        return std::ldexp(sign * double(significand), std::max(field, 1) - bias() - mantissa);
    }

    double lowest() const {
        if (is_float()) return -INFINITY;
        return dtype == DType::UInt8 ? 0 : -std::ldexp(1, 8 * bytes - 1);
    }

    // The error of rounding to about x.
    double rounding(double x) const {
        return std::ldexp(1.001 * std::abs(x), -mantissa - 1) + std::ldexp(1, -bias() - mantissa);
    }

    // Of magnitude 1/8 to 4. Coarse elements are often equal; `special` ones are any others.
    uint64_t random(Random& r, bool coarse, bool special) const {
        if (!is_float()) {
            const uint64_t top = uint64_t(1) << (8 * bytes - 1);
            if (special) return r.chance(2) ? top : top - 1;
            return coarse ? r.pick(0, 4) - 2 * (dtype != DType::UInt8) : int64_t(r.bits()) >> 12;
        }
        const uint64_t sign = r.bits() >> 63 << (8 * bytes - 1);
        const uint64_t infinity = ((uint64_t(1) << exponent) - 1) << mantissa;
        const uint64_t specials[] = {0, infinity, infinity | uint64_t(1) << (mantissa - 1)};
        if (special) return sign | specials[r.pick(0, 2)];
        const uint64_t fraction = r.bits() >> (64 - mantissa);
        const uint64_t kept = coarse ? uint64_t(1) << (mantissa - 1) : ~uint64_t(0);
        return sign | uint64_t(bias() + r.pick(-3, 1)) << mantissa | (fraction & kept);
    }
};

constexpr Format kFormats[] = {
    {DType::Float32, "float32", 4, 8, 23},  {DType::Float64, "float64", 8, 11, 52},
    {DType::BFloat16, "bfloat16", 2, 8, 7}, {DType::Float16, "float16", 2, 5, 10},
    {DType::Int8, "int8", 1, 0, 0},         {DType::Int16, "int16", 2, 0, 0},
    {DType::Int32, "int32", 4, 0, 0},       {DType::Int64, "int64", 8, 0, 0},
    {DType::UInt8, "uint8", 1, 0, 0},
};

// `count` elements of `size` bytes each, aligned as PyTorch's are.
struct Array {
    static constexpr std::align_val_t kAlignment{64};
    struct Delete {
        void operator()(unsigned char* bytes) const { ::operator delete[](bytes, kAlignment); }
    };
    const int64_t count, size;
    const std::unique_ptr<unsigned char[], Delete> data{
        new (kAlignment) unsigned char[count * size]};

    Array(int64_t count, int64_t size, int fill = kPoison) : count(count), size(size) {
        std::memset(data.get(), fill, count * size);
    }
    uint64_t get(int64_t i) const {
        uint64_t bits = 0;
        std::memcpy(&bits, &data[i * size], size);
        return bits;
    }
    void set(int64_t i, uint64_t bits) const { std::memcpy(&data[i * size], &bits, size); }
    bool written(int64_t i) const {
        const auto* const from = &data[i * size];
        return std::any_of(from, from + size, [](int byte) { return byte != kPoison; });
    }
};

// What an element should be, within a slack; below 0 means exactly.
struct Expected {
    double value = 0, slack = -1;
    bool or_nan = false;  // the sum may have either sign, and its root is NaN
};

[[noreturn]] inline void fail(const char* what, int64_t at, double found,
                              const Expected& expected) {
    std::fprintf(stderr, "%s %lld: found %.17g, expected %.17g within %g\n", what, (long long)at,
                 found, expected.value, expected.slack);
    std::exit(1);
}

// What the child process leaves for its parent to tell.
constexpr int kCounters = 8;
struct Progress {
    char job[640];
    long long done, counted[kCounters];
};
inline Progress* progress;

// Runs jobs [first, first + jobs) of the command line in a child process, each from its number.
// run(random, describe) calls describe(text) once it knows what the job is.
template <class Run>
int fuzz(int argc, char** argv, const char* name, long long jobs, const char* const* counters,
         const Run& run) {
    if (argc > 1) jobs = std::atoll(argv[1]);
    const long long first = argc > 2 ? std::atoll(argv[2]) : 0;
    void* const shared =
        mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) return std::perror("mmap"), 2;
    progress = new (shared) Progress{};
    const pid_t child = fork();
    if (child == 0) {
        for (long long number = first; number < first + jobs; ++number) {
            Random random{std::mt19937_64(number)};
            run(random, [&](const std::string& text) {
                std::snprintf(progress->job, sizeof(progress->job), "job %lld: %s", number,
                              text.c_str());
            });
            ++progress->done;
        }
        return 0;
    }
    int status = 1;
    if (child < 0 || waitpid(child, &status, 0) != child) return std::perror("fork"), 2;
    if (status != 0) return std::fprintf(stderr, "%s: FAILED in %s\n", name, progress->job), 1;
    std::printf("%s: %lld jobs passed", name, progress->done);
    for (int i = 0; i < kCounters && counters[i] != nullptr; ++i)
        std::printf("%s %lld %s", i ? "," : ":", progress->counted[i], counters[i]);
    std::printf("\n");
    return 0;
}

}  // namespace
}  // namespace pooling_ext
