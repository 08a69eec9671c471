// Runs batch normalization's kernels on random jobs, to be compiled with AddressSanitizer and
// UndefinedBehaviorSanitizer, and compares them with plain loops in float64.
//
//     fuzz_batch_norm [jobs [first]]
//
// Arrays, scratch memory and repeating a job are as in fuzz_kernels.cpp.
#include <sstream>
#include <utility>
#include <vector>

#include "kernels/cpu/norm/batch_norm.h"
#include "tests/activations.h"
#include "tests/fuzz.h"

namespace pooling_ext {
namespace {

constexpr int64_t kDefaultJobs = 6000;
enum Counter { kChannelsLast, kSeveralUnits, kInPlace };

using Numbers = std::vector<double>;
using Exact = std::vector<long double>;

// Elements of a format, with their values.
struct Elements {
    const Format& format;
    Array array;

    Elements(const Format& format, int64_t count) : format(format), array(count, format.bytes) {}
    Elements(const Format& format, int64_t count, Random& r, bool coarse)
        : Elements(format, count) {
        for (int64_t i = 0; i < count; ++i) array.set(i, format.random(r, coarse, false));
    }
    double operator[](int64_t i) const { return format.value(array.get(i)); }
    void* data() const { return array.data.get(); }
};

struct Case {
    Format format;
    BatchNormJob job;
    Step step;
    bool coarse, residual, constants;

    int64_t channel(int64_t i) const {
        return job.channels_last ? i % job.channels : i / job.inner % job.channels;
    }

    std::string description() const {
        constexpr const char* names[] = {"stats", "merge",    "act",   "sums",
                                         "total", "backward", "train", "train backward"};
        std::ostringstream text;
        text << names[int(step)] << " " << format.name << " batch=" << job.batch
             << " channels=" << job.channels << " inner=" << job.inner
             << " channels_last=" << job.channels_last << " undivided=" << job.undivided
             << " activation=" << int(job.activation) << " gate=" << int(job.gate)
             << " residual=" << residual << " constants=" << constants;
        return text.str();
    }
};

Case make_case(Random& r) {
    Case c{};
    c.format = kFormats[r.pick(0, 3)];
    constexpr Step steps[] = {Step::Stats,    Step::Act,   Step::Sums,
                              Step::Backward, Step::Train, Step::TrainBackward};
    c.step = steps[r.pick(0, 5)];
    c.coarse = r.chance(3);
    BatchNormJob& job = c.job;
    const bool train = c.step == Step::Train || c.step == Step::TrainBackward;
    job.channels_last = !train && r.chance(2);
    job.non_temporal = r.chance(3);
    do {
        job.batch = r.pick(1, r.chance(4) ? 600 : 5);
        job.channels = r.pick(1, r.chance(4) ? 700 : 20);
        job.inner = r.chance(6) ? 1 : r.pick(1, r.chance(6) ? 20000 : r.chance(2) ? 400 : 30);
        // Lines of the cache are streamed whole.
        int64_t& run = job.channels_last ? job.channels : job.inner;
        const int64_t line = 64 / c.format.bytes;
        if (job.non_temporal) run = (run + line - 1) / line * line;
    } while (job.numel() > 150000);
    job.undivided = r.chance(5);
    job.activation = Activation(r.pick(0, r.chance(2) ? 1 : kActivations - 1));
    job.negative_slope = 0.25;
    c.residual = r.chance(2);
    c.constants = r.chance(3);
    const bool sums = c.step == Step::Sums || c.step == Step::TrainBackward;
    job.gate = gate_of(job.activation, sums && r.chance(2));
    if (sums && job.gate == Gate::Derivative && c.format.bytes >= 4 && r.chance(2))
        job.gate = Gate::DerivativeKept;
    return c;
}

void check(const char* what, int64_t at, double found, double expected, double slack) {
    if (!(std::abs(found - expected) <= slack)) fail(what, at, found, {expected, slack});
}

// Two ranges of a step's units, in either order, as two threads would take them.
void run(const Case& c, const BatchNormJob& job, Step step, Random& r) {
    const BatchNormKernel kernel = POOLING_EXT_ISA::batch_norm(c.format.dtype, step);
    const int64_t count = Units(job, step).count, middle = r.pick(0, count);
    std::pair<int64_t, int64_t> ranges[] = {{0, middle}, {middle, count}};
    if (r.chance(2)) std::swap(ranges[0], ranges[1]);
    for (const auto& [begin, end] : ranges) {
        if (begin == end) continue;
        Array scratch(scratch_bytes(job), 1, r.chance(2) ? 0xff : 0x4b);
        kernel(job, begin, end, scratch.data.get());
    }
}

// Runs a step that makes two rows of sums, and the one that adds up those of its units.
Numbers run_sums(const Case& c, BatchNormJob job, Step step, Step combine, Random& r) {
    const int64_t units = job.channels_last ? Units(job, step).count : 1;
    progress->counted[kSeveralUnits] += units > 1;
    const std::unique_ptr<double[]> sums(new double[units * 2 * job.channels]);
    std::fill(&sums[0], &sums[0] + units * 2 * job.channels, NAN);
    job.sums = sums.get();
    run(c, job, step, r);
    if (units > 1) run(c, job, combine, r);
    return {&sums[0], &sums[0] + 2 * job.channels};
}

double unit_roundoff(const Case& c) { return c.format.dtype == DType::Float64 ? 0x1p-53 : 0x1p-24; }

void check_stats(const Case& c, BatchNormJob job, const Elements& x, Random& r) {
    const int64_t channels = job.channels, n = job.batch * job.inner;
    Exact mean(channels), deviation(channels);
    Numbers size(channels);
    for (int64_t i = 0; i < job.numel(); ++i) {
        mean[c.channel(i)] += x[i] / (long double)(n);
        size[c.channel(i)] += x[i] * x[i];
    }
    for (int64_t i = 0; i < job.numel(); ++i)
        deviation[c.channel(i)] += std::pow(x[i] - mean[c.channel(i)], 2.0L);
    const Numbers found = run_sums(c, job, Step::Stats, Step::Merge, r);
    // A lane sums at most 256 rows of a batch, or the rows of a unit.
    const double terms = 300 * unit_roundoff(c);
    for (int64_t k = 0; k < channels; ++k) {
        check("mean", k, found[k], double(mean[k]), terms * std::sqrt(size[k] / double(n)));
        check("deviation", k, found[channels + k], double(deviation[k]), terms * size[k]);
    }
}

// A direction at once: its results are those of its steps one after the other, to the last bit.
void check_train(const Case& c, BatchNormJob job, Random& r) {
    const bool forward = c.step == Step::Train;
    const int64_t n = job.numel(), channels = job.channels;
    const double count = double(job.batch * job.inner);
    const Elements other(c.format, n, r, c.coarse), kept(c.format, n, r, c.coarse);
    const Elements y(c.format, n), masked(c.format, n), steps(c.format, n),
        steps_masked(c.format, n);
    const auto numbers = [&](int64_t size) { return std::unique_ptr<double[]>(new double[size]); };
    const auto weight = numbers(channels), bias = numbers(channels), sums = numbers(2 * channels),
               moments = numbers(2 * channels);
    for (int64_t k = 0; k < channels; ++k) {
        weight[k] = double(r.pick(-64, 64)) / 16, bias[k] = double(r.pick(-64, 64)) / 16;
        moments[k] = double(r.pick(-64, 64)) / 17;
        moments[channels + k] = double(r.pick(0, 64)) / 17;
    }
    job.weight = weight.get(), job.bias = bias.get(), job.moments = moments.get();
    job.sums = sums.get(), job.eps = 1e-5, job.y = y.data();
    if (forward && c.residual) job.residual = other.data();
    if (!forward) job.grad = other.data();
    if (reads_kept(job.gate)) job.kept = kept.data();
    if (writes_gradient(job.gate)) job.residual_grad = masked.data();
    const bool in_place =
        job.gate == Gate::DerivativeKept && job.has_whole_vectors() && r.chance(2);
    if (in_place) job.residual_grad = y.data();
    run(c, job, c.step, r);

    BatchNormJob step = job;
    Numbers center(channels), scale(channels), shift(channels), inverse(channels), slope(channels),
        offset(channels);
    if (forward) {
        const Numbers found = run_sums(c, step, Step::Stats, Step::Merge, r);
        for (int64_t k = 0; k < channels; ++k) {
            check("mean", k, moments[k], found[k], 0);
            check("variance", k, moments[channels + k], found[channels + k] / count, 0);
        }
    }
    const bool is_double = c.format.dtype == DType::Float64;
    for (int64_t k = 0; k < channels; ++k) {
        const Affine affine =
            affine_of(moments[k], moments[channels + k], weight[k], bias[k], job.eps, is_double);
        center[k] = affine.center, scale[k] = affine.scale, shift[k] = affine.shift;
        inverse[k] = affine.inverse;
    }
    step.center = center.data(), step.scale = scale.data(), step.shift = shift.data();
    step.y = steps.data();
    if (forward) {
        run(c, step, Step::Act, r);
    } else {
        if (writes_gradient(job.gate)) step.residual_grad = steps_masked.data();
        const Numbers found = run_sums(c, step, Step::Sums, Step::Total, r);
        for (int64_t k = 0; k < channels; ++k) {
            const double away = moments[k] - center[k];
            const double product = found[channels + k] - away * found[k];
            check("sum", k, sums[k], found[k], 0);
            check("sum of products", k, sums[channels + k], product * inverse[k], 0);
            const StatsGrad stats =
                stats_grad(found[k] / count, product / count, away, scale[k], inverse[k]);
            slope[k] = stats.slope, offset[k] = stats.offset;
        }
        step.slope = slope.data(), step.offset = offset.data();
        if (writes_gradient(job.gate)) step.grad = step.residual_grad, step.gate = Gate::None;
        run(c, step, Step::Backward, r);
    }
    for (int64_t i = 0; i < n; ++i) {
        // As bits, since float16 may overflow to an infinity.
        if (y.array.get(i) != steps.array.get(i)) fail("element", i, y[i], {steps[i], 0});
        if (job.residual_grad && !in_place && masked.array.get(i) != steps_masked.array.get(i))
            fail("masked", i, masked[i], {steps_masked[i], 0});
    }
}

void check_job(const Case& c, Random& r) {
    BatchNormJob job = c.job;
    const int64_t n = job.numel(), channels = job.channels;
    const Elements x(c.format, n, r, c.coarse);
    job.x = x.data();
    progress->counted[kChannelsLast] += job.channels_last;
    if (c.step == Step::Stats) return check_stats(c, job, x, r);
    if (c.step == Step::Train || c.step == Step::TrainBackward) return check_train(c, job, r);

    // Coefficients that are exact in float32, each in an allocation of its own.
    const auto coefficients = [&](bool wanted) {
        std::unique_ptr<double[]> values(wanted ? new double[channels] : nullptr);
        for (int64_t k = 0; wanted && k < channels; ++k) values[k] = double(r.pick(-64, 64)) / 16;
        return values;
    };
    const bool batch = c.step == Step::Backward && !c.constants;
    const auto center = coefficients(true), scale = coefficients(true), shift = coefficients(true),
               slope = coefficients(batch), offset = coefficients(batch);
    job.center = center.get(), job.scale = scale.get(), job.shift = shift.get();
    job.slope = slope.get(), job.offset = offset.get();

    const bool forward = c.step == Step::Act;
    const Elements other(c.format, n, r, c.coarse);  // the residual, or the gradient
    const Elements kept(c.format, n, r, c.coarse), y(c.format, n), masked(c.format, n);
    if (forward && c.residual) job.residual = other.data();
    if (!forward) job.grad = other.data();
    if (reads_kept(job.gate)) job.kept = kept.data();
    if (writes_gradient(job.gate)) job.residual_grad = masked.data();
    // The output may go where the input lies.
    const Elements& result = forward && !job.non_temporal && r.chance(3) ? x : y;
    progress->counted[kInPlace] += &result == &x;
    if (c.step != Step::Sums) job.y = result.data();

    const double roundoff = 8 * unit_roundoff(c);
    Exact first(channels), second(channels);
    Numbers size(channels);
    Numbers values(n), slack(n), doubtful(channels);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t k = c.channel(i);
        const double d = x[i] - center[k], z = d * scale[k] + shift[k];
        const double terms = std::abs(d * scale[k]) + std::abs(shift[k]);
        if (forward) {
            const double sum = z + (c.residual ? other[i] : 0);
            values[i] = activated(job.activation, sum, job.negative_slope);
            slack[i] = 2 * roundoff * (terms + std::abs(sum - z) + std::abs(values[i]));
            continue;
        }
        double g = other[i], given = z;
        if (job.gate == Gate::DerivativeOfSum) given += kept[i];
        if (job.gate == Gate::ReluOutput) given = kept[i];
        const double room = job.gate == Gate::ReluOutput ? 0 : roundoff * (terms + std::abs(given));
        // On which side of a bend it is, is rounding's affair.
        const bool unsure = room > 0 && bends_near(given, room);
        const double factor = derivative(job.activation, given, job.negative_slope);
        g *= factor;
        // No derivative changes faster than its argument, but where it jumps.
        const double off = job.gate == Gate::Derivative || job.gate == Gate::DerivativeKept ||
                                   job.gate == Gate::DerivativeOfSum
                               ? std::abs(other[i]) * 2 * (room + roundoff)
                               : 0;
        if (c.step == Step::Sums) {
            values[i] = g;
            slack[i] =
                off + (unsure ? 2 * std::abs(other[i]) : 0) + (off > 0 ? c.format.rounding(g) : 0);
            doubtful[k] += off * (1 + std::abs(d));
            first[k] += g, second[k] += g * d;
            size[k] += std::abs(g) * (1 + std::abs(d));
            if (unsure) doubtful[k] += 2 * std::abs(other[i]) * (1 + std::abs(d));
            continue;
        }
        const double through = batch ? d * slope[k] + offset[k] : 0;
        values[i] = g * scale[k] + through;
        slack[i] = roundoff * (std::abs(g * scale[k]) +
                               (batch ? std::abs(d * slope[k]) + std::abs(offset[k]) : 0)) +
                   (off + (unsure ? 2 * std::abs(other[i]) : 0)) * std::abs(scale[k]);
    }
    if (c.step == Step::Sums) {
        const Numbers found = run_sums(c, job, Step::Sums, Step::Total, r);
        for (int64_t k = 0; k < channels; ++k) {
            const double room = 300 * unit_roundoff(c) * size[k] + doubtful[k];
            check("sum", k, found[k], double(first[k]), room);
            check("sum of products", k, found[channels + k], double(second[k]), room);
        }
        for (int64_t i = 0; job.residual_grad && i < n; ++i)
            check("masked", i, masked[i], values[i], slack[i]);
        return;
    }
    run(c, job, c.step, r);
    for (int64_t i = 0; i < n; ++i)
        check("element", i, result[i], values[i], slack[i] + c.format.rounding(values[i]));
}

}  // namespace
}  // namespace pooling_ext

int main(int argc, char** argv) {
    using namespace pooling_ext;
    const char* const counters[] = {"in channels-last", "in several units", "in place", nullptr};
    return fuzz(argc, argv, "fuzz_batch_norm", kDefaultJobs, counters,
                [](Random& random, const auto& describe) {
                    const Case c = make_case(random);
                    describe(c.description());
                    check_job(c, random);
                });
}
