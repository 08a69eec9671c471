// What the fuzzers of convolutions share: elements with their values, sums with the error that is
// allowed, checks, and of the direct ones where elements lie and which are multiplied.
#pragma once

#include <utility>
#include <vector>

#include "tests/activations.h"
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

// Planes of so many channels, in either layout.
struct Planes {
    int64_t batch, channels, height, width;
    bool channels_last;

    int64_t count() const { return batch * channels * height * width; }
    int64_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
        return channels_last ? ((n * height + y) * width + x) * channels + c
                             : ((n * channels + c) * height + y) * width + x;
    }
    // The channel of an element.
    int64_t channel(int64_t i) const {
        return channels_last ? i % channels : i / (height * width) % channels;
    }
};

// Sets an axis of random length for a kernel of so many elements.
template <class Axis>
void set_lengths(Axis& axis, int64_t kernel, Random& r) {
    axis.in = r.pick(1, r.chance(5) ? 130 : 20);
    axis.out = output_size(axis.in, kernel, axis.stride, axis.padding, axis.padding, 1, false);
}

// Calls use(output row, column, input row, column, tap) for the products of a plane of a
// convolution whose kernel has so many rows and columns.
template <class Axis, class Use>
void each_tap(const Axis& h, const Axis& w, int64_t rows, int64_t columns, const Use& use) {
    for (int64_t oy = 0; oy < h.out; ++oy)
        for (int64_t ox = 0; ox < w.out; ++ox)
            for (int64_t tap = 0; tap < rows * columns; ++tap) {
                const int64_t y = oy * h.stride - h.padding + tap / columns;
                const int64_t x = ox * w.stride - w.padding + tap % columns;
                if (y < 0 || y >= h.in || x < 0 || x >= w.in) continue;
                use(oy, ox, y, x, tap);
            }
}

// Memory for the statistics of a job's output, of so many pieces with padded channels.
struct Statistics {
    Array moments, stats;

    template <class Job>
    Statistics(Job& job, int64_t pieces, int64_t padded, int64_t channels)
        : moments(pieces * 2 * padded, 8), stats(2 * channels, 8) {
        job.moments = reinterpret_cast<double*>(moments.data.get());
        job.stats = reinterpret_cast<double*>(stats.data.get());
    }
};

// A result beside the exact sums, to which `bias` is added if it is given; `terms` is the error
// that is allowed, in roundings of the sums' sizes.
template <class Job>
void check_result(const Job& job, const Planes& planes, const Elements& result,
                  std::vector<Sum>& exact, const Elements* bias, double terms) {
    for (int64_t i = 0; i < planes.count(); ++i) {
        if (bias != nullptr) exact[i].add((*bias)[planes.channel(i)]);
        const double expected = activated(job.activation, exact[i].value, job.slope);
        // No activation is steeper than 1.5; SiLU and GELU have errors of their own.
        const double slack = terms * unit_roundoff(result.format) * (exact[i].size + 1);
        check("result", i, result[i], expected,
              slack + result.format.rounding(std::abs(expected) + slack));
    }
}

}  // namespace
}  // namespace pooling_ext
