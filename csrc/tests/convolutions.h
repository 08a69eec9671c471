// What the fuzzers of direct convolutions share: elements with their values, sums with the error
// that is allowed, and checks.
#pragma once

#include <utility>
#include <vector>

#include "tests/fuzz.h"

namespace pooling_ext {
namespace {

// Elements of a format, with their values.
struct Elements {
    const Format& format;
    Array array;

    Elements(const Format& format, int64_t count) : format(format), array(count, format.bytes) {}
    Elements(const Format& format, int64_t count, Random& r) : Elements(format, count) {
        for (int64_t i = 0; i < count; ++i) array.set(i, format.random(r, false, false));
    }
    double operator[](int64_t i) const { return format.value(array.get(i)); }
    void* data() const { return array.data.get(); }
};

// A sum, and that of its terms' sizes, from which the error that is allowed follows.
struct Sum {
    double value = 0, size = 0;

    void add(double x) {
        value += x;
        size += std::abs(x);
    }
};

void check(const char* what, int64_t at, double found, double expected, double slack) {
    if (!(std::abs(found - expected) <= slack)) fail(what, at, found, {expected, slack});
}

// Two ranges, in either order, as two threads would take them.
template <class Job>
void run_ranges(void (*kernel)(const Job&, int64_t, int64_t, void*), const Job& job, int64_t count,
                Random& r) {
    const int64_t middle = r.pick(0, count);
    std::pair<int64_t, int64_t> ranges[] = {{0, middle}, {middle, count}};
    if (r.chance(2)) std::swap(ranges[0], ranges[1]);
    for (const auto& [begin, end] : ranges) {
        if (begin == end) continue;
        Array scratch(scratch_bytes(job), 1, r.chance(2) ? 0xff : 0x4b);
        kernel(job, begin, end, scratch.data.get());
    }
}

double unit_roundoff(const Format& format) {
    return format.dtype == DType::Float64 ? 0x1p-53 : 0x1p-24;
}

// Means and variances of the channels of an output, in either layout.
void check_statistics(const Elements& y, int64_t channels, int64_t count, int64_t batch,
                      bool channels_last, const double* stats) {
    const int64_t pixels = count / (batch * channels);
    std::vector<long double> mean(channels), variance(channels), size(channels);
    const auto each = [&](const auto& use) {
        for (int64_t i = 0; i < count; ++i)
            use(channels_last ? i % channels : i / pixels % channels, y[i]);
    };
    const double n = double(batch * pixels);
    each([&](int64_t k, double x) { mean[k] += x / n, size[k] += x * x / n; });
    each([&](int64_t k, double x) { variance[k] += (x - mean[k]) * (x - mean[k]) / n; });
    const double terms = 300 * unit_roundoff(y.format);
    for (int64_t k = 0; k < channels; ++k) {
        check("mean", k, stats[k], double(mean[k]), terms * std::sqrt(double(size[k])));
        check("variance", k, stats[channels + k], double(variance[k]), terms * double(size[k]));
    }
}

// Gradients of weights and biases beside the exact sums.
void compare(const char* what, const Elements& found, const std::vector<Sum>& exact) {
    for (size_t i = 0; i < exact.size(); ++i) {
        const double slack = 300 * unit_roundoff(found.format) * exact[i].size;
        check(what, i, found[i], exact[i].value,
              slack + found.format.rounding(std::abs(exact[i].value) + slack));
    }
}

}  // namespace
}  // namespace pooling_ext
