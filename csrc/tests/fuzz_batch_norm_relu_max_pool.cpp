// Runs the kernels of batch normalization, ReLU and max pooling as one step on random jobs, to be
// compiled with AddressSanitizer and UndefinedBehaviorSanitizer, and compares them with plain
// loops: outputs and offsets to the bit, gradients and sums within rounding.
//
//     fuzz_batch_norm_relu_max_pool [jobs [first]]
//
// Arrays, scratch memory and repeating a job are as in fuzz_kernels.cpp.
#include <sstream>
#include <utility>
#include <vector>

#include "kernels/cpu/norm/batch_norm_relu_max_pool.h"
#include "kernels/cpu/pool/max_pool.h"
#include "tests/fuzz.h"

namespace pooling_ext {
namespace {

using namespace POOLING_EXT_ISA;

constexpr int64_t kDefaultJobs = 3000;
enum Counter { kNothing, kNan, kSeveralBands };

struct Case {
    Format format;
    PoolParams p;
    bool coarse, offsets, constants;
    int64_t special;  // one in so many elements is a zero, infinite or a NaN; 0 for none

    int64_t inputs() const { return p.outer * p.in_plane() * p.channels; }
    int64_t outputs() const { return p.outer * p.out_plane() * p.channels; }

    std::string description() const {
        std::ostringstream text;
        text << format.name << " outer=" << p.outer << " channels=" << p.channels
             << " offsets=" << offsets << " constants=" << constants << " special=" << special;
        for (const Axis& a : {p.h, p.w})
            text << " [in=" << a.in << " out=" << a.out << " kernel=" << a.kernel
                 << " stride=" << a.stride << " padding=" << a.pad_before << "," << a.pad_after
                 << "]";
        return text.str();
    }
};

Case make_case(Random& r) {
    Case c;
    do {
        c = Case{};
        do c.format = kFormats[r.pick(0, 3)];
        while (!BnReluMaxPoolJob::has(c.format.dtype));
        c.coarse = r.chance(2);
        c.offsets = !r.chance(4);
        c.constants = r.chance(3);
        c.special = r.chance(2) ? 0 : r.chance(2) ? 12 : 300;
        c.p.outer = r.pick(1, 4);
        c.p.channels = r.pick(2, r.chance(3) ? 300 : r.chance(2) ? 70 : 9);
        for (Axis* a : {&c.p.h, &c.p.w}) {
            a->in = r.pick(1, r.chance(8) ? 200 : 20);
            a->kernel = r.pick(1, BnReluMaxPoolJob::kMost);
            a->stride = r.pick(1, 4);
            a->pad_before = r.pick(0, a->kernel - 1), a->pad_after = r.pick(0, a->kernel - 1);
            a->out = output_size(a->in, a->kernel, a->stride, a->pad_before, a->pad_after, 1,
                                 r.chance(2));
        }
    } while (c.p.h.out < 1 || c.p.w.out < 1 || c.inputs() > 150000 || c.outputs() > 150000);
    return c;
}

// Two ranges of a step's units, in either order, as two threads would take them.
void run(const Case& c, const BnReluMaxPoolJob& job, BnReluMaxPoolStep step, int64_t count,
         Random& r) {
    const int64_t middle = r.pick(0, count);
    std::pair<int64_t, int64_t> ranges[] = {{0, middle}, {middle, count}};
    if (r.chance(2)) std::swap(ranges[0], ranges[1]);
    for (const auto& [begin, end] : ranges) {
        if (begin == end) continue;
        Array scratch(scratch_bytes(job), 1, r.chance(2) ? 0xff : 0x4b);
        bn_relu_max_pool(c.format.dtype, step)(job, begin, end, scratch.data.get());
    }
}

void check(const char* what, int64_t at, double found, double expected, double slack) {
    if (std::isnan(expected) ? std::isnan(found) : found == expected) return;
    if (!(std::abs(found - expected) <= slack)) fail(what, at, found, {expected, slack});
}

template <class In>
void check_job(const Case& c, Random& r) {
    using T = Accumulator<In>;
    const PoolParams& p = c.p;
    const Format& format = c.format;
    const int64_t channels = p.channels;
    const auto elements = [&](int64_t count, bool special) {
        auto array = std::make_unique<Array>(count, format.bytes);
        for (int64_t i = 0; i < count; ++i)
            array->set(i, format.random(r, c.coarse, special && c.special && r.chance(c.special)));
        return array;
    };
    const auto x = elements(c.inputs(), true), grad = elements(c.outputs(), false);
    Array y(c.outputs(), format.bytes), offsets(c.outputs(), 1), spread(c.inputs(), format.bytes);
    const auto coefficients = [&] {
        std::unique_ptr<double[]> values(new double[channels]);
        for (int64_t k = 0; k < channels; ++k) values[k] = double(r.pick(-64, 64)) / 16;
        return values;
    };
    const auto center = coefficients(), scale = coefficients(), shift = coefficients(),
               slope = coefficients(), offset = coefficients();

    BnReluMaxPoolJob job;
    BatchNormJob& norm = job.norm;
    norm.batch = p.outer, norm.channels = channels, norm.inner = p.in_plane();
    norm.channels_last = true;
    norm.x = x->data.get(), norm.y = spread.data.get();
    norm.center = center.get(), norm.scale = scale.get(), norm.shift = shift.get();
    if (!c.constants) norm.slope = slope.get(), norm.offset = offset.get();
    job.pool.p = p;
    job.pool.dst = y.data.get();
    if (c.offsets) job.pool.offsets_out = offsets.data.get();
    if (!job.taken(format.dtype)) fail("taken", 0, 0, {1});
    run(c, job, BnReluMaxPoolStep::Forward, p.out_rows(), r);

    const double roundoff = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
    std::vector<double> given(c.inputs()), terms(c.inputs()), first(channels), second(channels),
        size(2 * channels);
    const auto value = [&](const Array& from, int64_t i) { return format.value(from.get(i)); };
    for (int64_t o = 0; o < c.outputs(); ++o) {
        const int64_t k = o % channels, ow = o / channels % p.w.out;
        const int64_t oh = o / p.out_row() % p.h.out, image = o / (p.out_row() * p.h.out);
        double best = -INFINITY;
        int64_t offset = kByteWindow, from = -1;
        for (int64_t at = 0; at < p.window_size(); ++at) {
            const int64_t h = p.h.start(oh) + at / p.w.kernel, w = p.w.start(ow) + at % p.w.kernel;
            if (h < 0 || h >= p.h.in || w < 0 || w >= p.w.in) continue;
            best = std::max(best, 0.0);
            const int64_t i = ((image * p.h.in + h) * p.w.in + w) * channels + k;
            const T z = (T(value(*x, i)) - T(center[k])) * T(scale[k]) + T(shift[k]);
            const double rounded = double(widen(narrow<In>(z)));
            if (rounded > best || std::isnan(rounded)) best = rounded, offset = at, from = i;
        }
        progress->counted[kNothing] += offset == kByteWindow;
        progress->counted[kNan] += std::isnan(best);
        check("output", o, value(y, o), best, -1);
        if (c.offsets) check("offset", o, double(offsets.get(o)), double(offset), -1);
        offsets.set(o, offset);
        if (from < 0) continue;
        const double g = value(*grad, o), d = value(*x, from) - center[k];
        given[from] += g, terms[from] += std::abs(g);
        first[k] += g, second[k] += g * d;
        size[k] += std::abs(g), size[channels + k] += std::abs(g) * (1 + std::abs(d));
    }

    job.pool.src = grad->data.get(), job.pool.offsets_in = offsets.data.get();
    const int64_t bands = p.outer * job.bands();
    progress->counted[kSeveralBands] += job.bands() > 1;
    const std::unique_ptr<double[]> sums(new double[bands * 2 * channels]);
    norm.sums = sums.get();
    run(c, job, BnReluMaxPoolStep::Sums, bands, r);
    for (int64_t i = 0; i < 2 * channels; ++i) {
        double found = 0;
        for (int64_t band = 0; band < bands; ++band) found += sums[band * 2 * channels + i];
        const int64_t k = i % channels;
        const double wanted = i < channels ? first[k] : second[k];
        check("sum", i, found, wanted, std::isfinite(wanted) ? 300 * roundoff * size[i] : -1);
    }

    run(c, job, BnReluMaxPoolStep::Backward, p.in_rows(), r);
    for (int64_t i = 0; i < c.inputs(); ++i) {
        const int64_t k = i % channels;
        const double d = value(*x, i) - center[k];
        const double through = c.constants ? 0 : d * slope[k] + offset[k];
        const double wanted = given[i] * scale[k] + through;
        double slack = terms[i] * std::abs(scale[k]);
        if (!c.constants) slack += std::abs(d * slope[k]) + std::abs(offset[k]);
        check("gradient", i, value(spread, i), wanted,
              std::isfinite(wanted) ? 8 * roundoff * slack + format.rounding(wanted) : -1);
    }
}

}  // namespace
}  // namespace pooling_ext

int main(int argc, char** argv) {
    using namespace pooling_ext;
    const char* const counters[] = {"windows with nothing", "with NaN", "jobs in several bands",
                                    nullptr};
    return fuzz(argc, argv, "fuzz_batch_norm_relu_max_pool", kDefaultJobs, counters,
                [](Random& random, const auto& describe) {
                    const Case c = make_case(random);
                    describe(c.description());
                    for_float(c.format.dtype, [&](auto zero) -> Kernel {
                        check_job<decltype(zero)>(c, random);
                        return nullptr;
                    });
                });
}
