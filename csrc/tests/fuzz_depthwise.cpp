// Runs depthwise convolution's kernels on random jobs, to be compiled with AddressSanitizer and
// UndefinedBehaviorSanitizer, and compares them with plain loops in float64.
//
//     fuzz_depthwise [jobs [first]]
//
// Arrays, scratch memory and repeating a job are as in fuzz_kernels.cpp.
#include <optional>
#include <sstream>
#include <vector>

#include "kernels/cpu/conv/depthwise.h"
#include "tests/convolutions.h"

namespace pooling_ext {
namespace {

constexpr int64_t kDefaultJobs = 3000;
enum Counter { kChannelsLast, kStrided, kStatistics };

struct Case {
    Format format;
    DepthwiseJob job;
    bool biased, statistics;

    Planes input() const {
        return {job.batch, job.channels, job.h.in, job.w.in, job.channels_last};
    }
    Planes output() const {
        return {job.batch, job.channels, job.h.out, job.w.out, job.channels_last};
    }

    std::string description() const {
        constexpr const char* names[] = {"", "forward", "", "input grad", "weight grad"};
        std::ostringstream text;
        text << names[int(job.step)] << " " << format.name << " batch=" << job.batch
             << " channels=" << job.channels << " kernel=" << job.kernel
             << " channels_last=" << job.channels_last << " in_place=" << job.in_place
             << " biased=" << biased << " statistics=" << statistics
             << " activation=" << int(job.activation);
        for (const DepthwiseAxis& axis : {job.h, job.w})
            text << " [in=" << axis.in << " out=" << axis.out << " stride=" << axis.stride
                 << " padding=" << axis.padding << "]";
        return text.str();
    }
};

Case make_case(Random& r) {
    Case c{};
    c.format = kFormats[r.pick(0, 3)];
    DepthwiseJob& job = c.job;
    constexpr DepthwiseStep steps[] = {DepthwiseStep::Forward, DepthwiseStep::InputGrad,
                                       DepthwiseStep::WeightGrad};
    job.step = steps[r.pick(0, 2)];
    job.kernel = 2 * r.pick(1, 3) + 1;
    job.channels_last = r.chance(2);
    job.wide = c.format.dtype == DType::Float64 ? 8 : 4;
    do {
        job.batch = r.pick(1, r.chance(6) ? 70 : 3);
        job.channels = r.pick(1, r.chance(6) ? 300 : 40);
        for (DepthwiseAxis* axis : {&job.h, &job.w}) {
            axis->stride = r.pick(1, 2);
            axis->padding = r.chance(3) ? r.pick(0, 10) : job.kernel / 2;
            set_lengths(*axis, job.kernel, r);
        }
    } while (job.h.out < 1 || job.w.out < 1 ||
             (c.input().count() + c.output().count()) * job.taps() > 1500000);
    job.in_place = job.channels_last && job.channels >= kDepthwiseBlock &&
                   c.format.dtype != DType::Float16 && !r.chance(4);
    const bool forward = job.step == DepthwiseStep::Forward;
    c.biased = job.step != DepthwiseStep::InputGrad && r.chance(2);
    c.statistics = forward && r.chance(3);
    if (forward && !c.statistics) job.activation = Activation(r.pick(0, kActivations - 1));
    job.slope = 0.125;
    return c;
}

void run(const Case& c, DepthwiseStep step, int64_t count, Random& r) {
    run_ranges(POOLING_EXT_ISA::depthwise(c.format.dtype, step), c.job, count, r);
}

// Calls use(channel, output, input, tap) for all products of a convolution.
template <class Use>
void each_product(const Case& c, const Use& use) {
    const DepthwiseJob& job = c.job;
    const Planes input = c.input(), output = c.output();
    for (int64_t n = 0; n < job.batch; ++n)
        for (int64_t k = 0; k < job.channels; ++k)
            each_tap(job.h, job.w, job.kernel, job.kernel,
                     [&](int64_t oy, int64_t ox, int64_t y, int64_t x, int64_t tap) {
                         use(k, output.at(n, k, oy, ox), input.at(n, k, y, x), tap);
                     });
}

// The output or the input's gradient.
void check_planes(Case& c, Random& r) {
    DepthwiseJob& job = c.job;
    const bool forward = job.step == DepthwiseStep::Forward;
    const Planes from = forward ? c.input() : c.output(), to = forward ? c.output() : c.input();
    const int64_t count = to.count();
    const Elements source(c.format, from.count(), r), result(c.format, count);
    const Elements weight(c.format, job.channels * job.taps(), r), bias(c.format, job.channels, r);
    (forward ? job.x : job.grad) = source.data();
    job.y = result.data();
    job.weight = weight.data();
    if (c.biased) job.bias = bias.data();
    const Array prepared(job.prepared_count(), job.wide);
    job.prepared = prepared.data.get();
    const DepthwisePlan plan(job);
    const int64_t pieces = job.batch * plan.bands;
    std::optional<Statistics> statistics;
    if (c.statistics) statistics.emplace(job, pieces, job.padded_channels(), job.channels);
    run(c, DepthwiseStep::Prepare, job.blocks(), r);
    run(c, job.step, plan.units, r);
    if (c.statistics) run(c, DepthwiseStep::Merge, job.blocks(), r);

    std::vector<Sum> sums(count);
    each_product(c, [&](int64_t k, int64_t output, int64_t input, int64_t tap) {
        sums[forward ? output : input].add(source[forward ? input : output] *
                                           weight[k * job.taps() + tap]);
    });
    check_result(job, to, result, sums, c.biased ? &bias : nullptr, 100);
    if (c.statistics)
        check_statistics(result, job.channels, count, job.batch, job.channels_last, job.stats);
}

void check_weights(Case& c, Random& r) {
    DepthwiseJob& job = c.job;
    const Elements input(c.format, c.input().count(), r), grad(c.format, c.output().count(), r);
    const Elements weight_grad(c.format, job.channels * job.taps()),
        bias_grad(c.format, job.channels);
    job.x = input.data();
    job.grad = grad.data();
    job.weight_grad = weight_grad.data();
    if (c.biased) job.bias_grad = bias_grad.data();
    const DepthwisePlan plan(job);
    const Array memory(plan.pieces * (job.taps() + 1) * job.padded_channels(), job.wide);
    job.sums = memory.data.get();
    run(c, job.step, plan.units, r);
    run(c, DepthwiseStep::Total, job.blocks(), r);

    std::vector<Sum> sums(job.channels * job.taps()), biases(job.channels);
    each_product(c, [&](int64_t k, int64_t output, int64_t at, int64_t tap) {
        sums[k * job.taps() + tap].add(grad[output] * input[at]);
    });
    for (int64_t n = 0; n < job.batch; ++n)
        for (int64_t k = 0; k < job.channels; ++k)
            for (int64_t i = 0; i < job.h.out * job.w.out; ++i)
                biases[k].add(grad[c.output().at(n, k, i / job.w.out, i % job.w.out)]);
    compare("weight's gradient", weight_grad, sums);
    if (c.biased) compare("bias's gradient", bias_grad, biases);
}

}  // namespace
}  // namespace pooling_ext

int main(int argc, char** argv) {
    using namespace pooling_ext;
    constexpr const char* counters[kCounters] = {"in channels-last", "of stride 2",
                                                 "with statistics"};
    return fuzz(argc, argv, "fuzz_depthwise", kDefaultJobs, counters,
                [](Random& random, const auto& describe) {
                    Case c = make_case(random);
                    describe(c.description());
                    progress->counted[kChannelsLast] += c.job.channels_last;
                    progress->counted[kStrided] += c.job.h.stride == 2 || c.job.w.stride == 2;
                    progress->counted[kStatistics] += c.statistics;
                    c.job.step == DepthwiseStep::WeightGrad ? check_weights(c, random)
                                                            : check_planes(c, random);
                });
}
