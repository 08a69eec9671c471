// Runs the kernels of images' convolution on random jobs, to be compiled with AddressSanitizer and
// UndefinedBehaviorSanitizer, and compares them with plain loops in float64.
//
//     fuzz_image [jobs [first]]
//
// Arrays, scratch memory and repeating a job are as in fuzz_kernels.cpp.
#include <optional>
#include <sstream>
#include <vector>

#include "kernels/cpu/conv/image.h"
#include "tests/convolutions.h"

namespace pooling_ext {
namespace {

constexpr int64_t kDefaultJobs = 2000;
enum Counter { kChannelsLast, kStatistics, kWeightGrad };

struct Case {
    Format format;
    ImageJob job;
    bool biased, statistics, weight_grad;

    Planes input() const { return {job.batch, job.channels, job.h.in, job.w.in, job.image_last}; }
    Planes output() const {
        return {job.batch, job.features, job.h.out, job.w.out, job.channels_last};
    }

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
            set_lengths(*axis, axis->kernel, r);
        }
    } while (job.h.out < 1 || job.w.out < 1 || c.output().count() * job.depth() > 1500000);
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

// Calls use(output, input, weight) for all products of a convolution.
template <class Use>
void each_product(const Case& c, const Use& use) {
    const ImageJob& job = c.job;
    const Planes input = c.input(), output = c.output();
    const int64_t rows = job.h.kernel, columns = job.w.kernel;
    for (int64_t n = 0; n < job.batch; ++n)
        for (int64_t k = 0; k < job.features; ++k)
            for (int64_t q = 0; q < job.channels; ++q)
                each_tap(job.h, job.w, rows, columns,
                         [&](int64_t oy, int64_t ox, int64_t y, int64_t x, int64_t tap) {
                             use(output.at(n, k, oy, ox), input.at(n, q, y, x),
                                 (k * job.channels + q) * rows * columns + tap);
                         });
}

void check_forward(Case& c, Random& r) {
    ImageJob& job = c.job;
    const Elements input(c.format, c.input().count(), r), result(c.format, c.output().count());
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
    std::optional<Statistics> statistics;
    if (c.statistics) statistics.emplace(job, pieces, job.padded_features(), job.features);
    run(c, ImageStep::Prepare, 1, r);
    run(c, ImageStep::Forward, pieces, r);
    if (c.statistics) run(c, ImageStep::Merge, job.features, r);

    std::vector<Sum> sums(c.output().count());
    each_product(c, [&](int64_t output, int64_t at, int64_t tap) {
        sums[output].add(input[at] * weight[tap]);
    });
    check_result(job, c.output(), result, sums, c.biased ? &bias : nullptr, 500);
    if (c.statistics)
        check_statistics(result, job.features, c.output().count(), job.batch, job.channels_last,
                         job.stats);
}

void check_weights(Case& c, Random& r) {
    ImageJob& job = c.job;
    const Elements input(c.format, c.input().count(), r), grad(c.format, c.output().count(), r);
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
