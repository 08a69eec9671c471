// Runs the kernels of images' convolution on random jobs, to be compiled with AddressSanitizer and
// UndefinedBehaviorSanitizer, and compares them with plain loops in float64.
//
//     fuzz_image [jobs [first]]
//
// Arrays, scratch memory and repeating a job are as in fuzz_kernels.cpp.
#include <sstream>
#include <vector>

#include "kernels/cpu/conv/image.h"
#include "tests/activations.h"
#include "tests/convolutions.h"

namespace pooling_ext {
namespace {

constexpr int64_t kDefaultJobs = 2000;
enum Counter { kChannelsLast, kStatistics, kWeightGrad };

struct Case {
    Format format;
    ImageJob job;
    bool biased, statistics, weight_grad;

    int64_t input_at(int64_t n, int64_t c, int64_t y, int64_t x) const {
        return job.image_last ? ((n * job.h.in + y) * job.w.in + x) * job.channels + c
                              : ((n * job.channels + c) * job.h.in + y) * job.w.in + x;
    }
    int64_t output_at(int64_t n, int64_t k, int64_t y, int64_t x) const {
        return job.channels_last ? ((n * job.h.out + y) * job.w.out + x) * job.features + k
                                 : ((n * job.features + k) * job.h.out + y) * job.w.out + x;
    }
    int64_t inputs() const { return job.batch * job.channels * job.h.in * job.w.in; }
    int64_t outputs() const { return job.batch * job.features * job.h.out * job.w.out; }

    std::string description() const {
        std::ostringstream text;
        text << (weight_grad ? "weight grad " : "forward ") << format.name << " batch=" << job.batch
             << " channels=" << job.channels << " features=" << job.features
             << " image_last=" << job.image_last << " channels_last=" << job.channels_last
             << " non_temporal=" << job.non_temporal << " biased=" << biased
             << " statistics=" << statistics << " activation=" << int(job.activation);
        for (const ImageAxis& axis : {job.h, job.w})
            text << " [in=" << axis.in << " out=" << axis.out << " kernel=" << axis.kernel
                 << " stride=" << axis.stride << " padding=" << axis.padding << "]";
        return text.str();
    }
};

Case make_case(Random& r) {
    Case c{};
    c.format = kFormats[r.pick(0, 3)];
    ImageJob& job = c.job;
    job.image_last = r.chance(2);
    job.channels_last = r.chance(2);
    job.wide = c.format.dtype == DType::Float64 ? 8 : 4;
    do {
        job.batch = r.pick(1, r.chance(6) ? 40 : 3);
        job.channels = r.pick(1, 4);
        job.features = r.chance(2) ? 16 * r.pick(1, 4) : r.pick(1, 70);
        for (ImageAxis* axis : {&job.h, &job.w}) {
            axis->kernel = r.pick(1, r.chance(5) ? 11 : 5);
            axis->stride = r.pick(1, r.chance(5) ? 7 : 2);
            axis->padding = r.chance(3) ? r.pick(0, 12) : axis->kernel / 2;
            axis->in = r.pick(1, r.chance(5) ? 130 : 20);
            axis->out = output_size(axis->in, axis->kernel, axis->stride, axis->padding,
                                    axis->padding, 1, false);
        }
    } while (job.h.out < 1 || job.w.out < 1 || c.outputs() * job.depth() > 1500000);
    c.weight_grad = r.chance(3);
    c.biased = !c.weight_grad && r.chance(2);
    c.statistics = !c.weight_grad && r.chance(3);
    if (!c.weight_grad && !c.statistics) job.activation = Activation(r.pick(0, kActivations - 1));
    job.slope = 0.125;
    return c;
}

void run(const Case& c, ImageStep step, int64_t count, Random& r) {
    run_ranges(POOLING_EXT_ISA::image(c.format.dtype, step), c.job, count, r);
}

// Calls use(feature, output, input, weight) for all products of a convolution.
template <class Use>
void each_product(const Case& c, const Use& use) {
    const ImageJob& job = c.job;
    const int64_t window = job.h.kernel * job.w.kernel;
    for (int64_t n = 0; n < job.batch; ++n)
        for (int64_t k = 0; k < job.features; ++k)
            for (int64_t oy = 0; oy < job.h.out; ++oy)
                for (int64_t ox = 0; ox < job.w.out; ++ox)
                    for (int64_t q = 0; q < job.channels; ++q)
                        for (int64_t tap = 0; tap < window; ++tap) {
                            const int64_t y =
                                oy * job.h.stride - job.h.padding + tap / job.w.kernel;
                            const int64_t x =
                                ox * job.w.stride - job.w.padding + tap % job.w.kernel;
                            if (y < 0 || y >= job.h.in || x < 0 || x >= job.w.in) continue;
                            use(c.output_at(n, k, oy, ox), c.input_at(n, q, y, x),
                                (k * job.channels + q) * window + tap);
                        }
}

void check_forward(Case& c, Random& r) {
    ImageJob& job = c.job;
    const Elements input(c.format, c.inputs(), r), result(c.format, c.outputs());
    const Elements weight(c.format, job.features * job.depth(), r), bias(c.format, job.features, r);
    job.x = input.data();
    job.y = result.data();
    // As the launcher has it, but for small outputs too.
    const int64_t line = job.channels_last ? job.features : job.w.out;
    job.non_temporal = line * c.format.bytes % 64 == 0 && uintptr_t(job.y) % 64 == 0;
    job.weight = weight.data();
    if (c.biased) job.bias = bias.data();
    const Array prepared(job.prepared_count(), job.wide);
    job.prepared = prepared.data.get();
    const int64_t pieces = ImagePlan(job).all_bands(job);
    const Array moments(pieces * 2 * job.padded_features(), 8), stats(2 * job.features, 8);
    if (c.statistics) {
        job.moments = reinterpret_cast<double*>(moments.data.get());
        job.stats = reinterpret_cast<double*>(stats.data.get());
    }
    run(c, ImageStep::Prepare, 1, r);
    run(c, ImageStep::Forward, pieces, r);
    if (c.statistics) run(c, ImageStep::Merge, job.features, r);

    std::vector<Sum> sums(c.outputs());
    each_product(c, [&](int64_t output, int64_t at, int64_t tap) {
        sums[output].add(input[at] * weight[tap]);
    });
    const int64_t pixels = job.h.out * job.w.out;
    for (int64_t i = 0; i < c.outputs(); ++i) {
        if (c.biased)
            sums[i].add(bias[job.channels_last ? i % job.features : i / pixels % job.features]);
        const double expected = activated(job.activation, sums[i].value, job.slope);
        // No activation is steeper than 1.5; SiLU and GELU have errors of their own.
        const double slack = 500 * unit_roundoff(c.format) * (sums[i].size + 1);
        check("result", i, result[i], expected,
              slack + c.format.rounding(std::abs(expected) + slack));
    }
    if (c.statistics)
        check_statistics(result, job.features, c.outputs(), job.batch, job.channels_last,
                         job.stats);
}

void check_weights(Case& c, Random& r) {
    ImageJob& job = c.job;
    const Elements input(c.format, c.inputs(), r), grad(c.format, c.outputs(), r);
    const Elements weight_grad(c.format, job.features * job.depth());
    job.x = input.data();
    job.grad = grad.data();
    job.weight_grad = weight_grad.data();
    const ImagePlan plan(job);
    const Array memory(plan.pieces * job.depth() * job.padded_features(), job.wide);
    job.sums = memory.data.get();
    run(c, ImageStep::WeightGrad, plan.pieces, r);
    run(c, ImageStep::Total, job.features, r);

    std::vector<Sum> sums(job.features * job.depth());
    each_product(c, [&](int64_t output, int64_t at, int64_t tap) {
        sums[tap].add(grad[output] * input[at]);
    });
    compare("weight's gradient", weight_grad, sums);
}

}  // namespace
}  // namespace pooling_ext

int main(int argc, char** argv) {
    using namespace pooling_ext;
    constexpr const char* counters[kCounters] = {"in channels-last", "with statistics",
                                                 "of weights' gradients"};
    return fuzz(argc, argv, "fuzz_image", kDefaultJobs, counters,
                [](Random& random, const auto& describe) {
                    Case c = make_case(random);
                    describe(c.description());
                    progress->counted[kChannelsLast] += c.job.channels_last;
                    progress->counted[kStatistics] += c.statistics;
                    progress->counted[kWeightGrad] += c.weight_grad;
                    c.weight_grad ? check_weights(c, random) : check_forward(c, random);
                });
}
