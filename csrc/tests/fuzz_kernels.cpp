// Runs the CPU kernels on random jobs, to be compiled with AddressSanitizer and
// UndefinedBehaviorSanitizer, and compares them with loops over each window in float64.
//
//     fuzz_kernels [jobs [first]]
//
// Each job is made from its number alone: `fuzz_kernels 1 N` repeats job N. Every array, the
// scratch memory too, is an allocation of exactly its size, so that AddressSanitizer sees any
// access outside. Jobs run in a child process, so that a crash can be told from outside.
#include <sstream>
#include <utility>
#include <vector>

#include "kernels/cpu/pool/avg_pool.h"
#include "kernels/cpu/pool/lp_pool.h"
#include "kernels/cpu/pool/max_pool.h"
#include "kernels/cpu/pool/plan.h"
#include "tests/fuzz.h"

namespace pooling_ext {
namespace {

constexpr int64_t kDefaultJobs = 20000;

// What is counted of the jobs.
enum Counter { kBlocks, kPlanes, kEmptyWindows, kFarWindows };

// --- jobs ------------------------------------------------------------------------------

enum class Op { Max, MaxBackward, Avg, AvgBackward, Lp };
constexpr const char* kOps[] = {"max_pool", "max_pool_backward", "avg_pool", "avg_pool_backward",
                                "lp_pool"};
constexpr const char* kOffsets[] = {"none", "byte", "int32", "index"};
constexpr int kOffsetBytes[] = {0, 1, 4, 8};

// A window: its size, the part of it that averages divide by, and what lies inside the input, as
// pairs of an offset in the window and a position.
struct Window {
    int64_t size = 0, counted = 0;
    std::vector<std::pair<int64_t, int64_t>> inside;
};

struct Case {
    Op op;
    Format format;
    Offsets offsets = Offsets::None;
    bool coarse;
    int64_t special;  // one in so many elements, if not 0
    PoolParams p;     // before planning
    Job job;          // after
    Rows rows;

    bool forward() const { return op != Op::MaxBackward && op != Op::AvgBackward; }
    int64_t inputs() const { return p.outer * p.in_plane() * p.channels; }
    int64_t outputs() const { return p.outer * p.out_plane() * p.channels; }

    // The windows of a plane.
    std::vector<Window> windows() const {
        std::vector<Window> all{{1, 1, {{0, 0}}}};
        for (const Axis& axis : {p.d, p.h, p.w}) {
            std::vector<Window> finer;
            for (const Window& window : all)
                for (int64_t o = 0; o < axis.out; ++o) finer.push_back(cut(window, axis, o));
            all = std::move(finer);
        }
        return all;
    }

    std::string description() const {
        std::ostringstream text;
        text << kOps[int(op)] << " " << format.name << " offsets=" << kOffsets[int(offsets)]
             << " special=" << special << " outer=" << p.outer << " channels=" << p.channels;
        for (const Axis& a : {p.d, p.h, p.w})
            text << " [in=" << a.in << " out=" << a.out << " kernel=" << a.kernel
                 << " stride=" << a.stride << " padding=" << a.pad_before << "," << a.pad_after
                 << " dilation=" << a.dilation << " adaptive=" << a.adaptive << "]";
        text << " rows=" << rows.count << " block=" << job.block << " by_plane=" << job.by_plane
             << " include_pad=" << job.count_include_pad << " divisor=" << job.divisor
             << " norm=" << job.norm << " magnitude=" << job.magnitude;
        return text.str();
    }

  private:
    // A window extended along one more axis, by window o of that.
    Window cut(const Window& window, const Axis& a, int64_t o) const {
        const int64_t start = a.adaptive ? o * a.in / a.out : o * a.stride - a.pad_before;
        const int64_t end = ((o + 1) * a.in + a.out - 1) / a.out;
        const int64_t size = a.adaptive ? end - start : a.kernel;
        Window result{window.size * size, 0, {}};
        for (int64_t k = 0; k < size; ++k) {
            const int64_t at = start + k * a.dilation;
            const bool inside = at >= 0 && at < a.in;
            if (inside || (job.count_include_pad && at < a.in + a.pad_after))
                result.counted += window.counted;
            if (!inside) continue;
            for (const auto& [offset, position] : window.inside)
                result.inside.push_back({offset * a.kernel + k, position * a.in + at});
        }
        // In the order of the offsets.
        std::sort(result.inside.begin(), result.inside.end());
        return result;
    }
};

// Has the windows step or reach far beyond the input.
void reach_far(Axis& a, bool dilated, Random& r) {
    constexpr int64_t kFar = int64_t(1) << 24;
    if (dilated && a.kernel > 1 && r.chance(2)) {
        a.dilation = kFar + r.pick(0, 3);
        // So that one offset of each window is near the input.
        a.pad_before = a.dilation * r.pick(0, a.kernel - 1) + r.pick(0, 2);
        a.pad_before = std::min(a.pad_before, a.dilation * (a.kernel - 1));
        a.pad_after = a.dilation * (a.kernel - 1) - a.pad_before;
    } else {
        a.stride = kFar + r.pick(0, 3);
    }
}

// Fills in the axes; false where that leaves no outputs, or too many to loop over.
bool choose_windows(Case& c, Random& r, int64_t rank, bool many) {
    const bool whole = r.chance(8), adaptive = r.chance(3),
               dilated = c.op == Op::Max || c.op == Op::MaxBackward;
    const int64_t limits[] = {6, rank == 3 ? 12 : 30, many ? 50 : rank == 1 ? 600 : 90};
    Axis* const axes[] = {&c.p.d, &c.p.h, &c.p.w};
    for (int64_t i = 3 - rank; i < 3; ++i) {
        Axis& a = *axes[i];
        a.in = r.pick(1, r.chance(2) ? limits[i] : 6);
        if (adaptive) {
            const Ints out{whole || c.op == Op::Lp ? 1 : r.pick(1, a.in + 3)}, none;
            a = axis_of(a.in, {out, none, none, none, none}, 0);
            continue;
        }
        if (dilated && !whole && r.chance(2)) a.dilation = r.pick(2, 4);
        if (a.dilation > 1 && r.chance(4)) a.in = r.pick(1, 3);  // windows may be empty
        a.kernel = whole ? a.in : r.pick(1, r.chance(6) ? 20 : 4);
        a.stride = r.chance(3) ? a.kernel : r.pick(1, 5);
        const int64_t reach = a.dilation * (a.kernel - 1);
        if (!whole && r.chance(2)) a.pad_before = r.pick(0, reach), a.pad_after = r.pick(0, reach);
        if (!whole && r.chance(20)) reach_far(a, dilated, r);
        a.out = output_size(a.in, a.kernel, a.stride, a.pad_before, a.pad_after, a.dilation,
                            r.chance(2));
        if (a.out < 1) return false;
    }
    return c.inputs() <= 140000 && c.outputs() * c.p.window_size() <= 300000;
}

Case make_case(Random& r) {
    Case c;
    bool chosen;
    do {
        c = Case{};
        c.op = Op(r.pick(0, 4));
        c.format = kFormats[r.pick(0, c.op == Op::Max ? 8 : 3)];
        c.coarse = r.chance(2);
        c.special = r.chance(2) ? 0 : r.chance(2) ? 12 : 300;
        const int64_t rank = r.pick(1, 3);
        const bool many = r.chance(3);
        c.p.outer = many ? r.pick(64, 140) : r.pick(1, 4);
        if (!many && rank > 1 && r.chance(2)) c.p.channels = r.pick(1, r.chance(3) ? 80 : 9);
        chosen = choose_windows(c, r, rank, many);
    } while (!chosen);
    Job& job = c.job;
    job.p = c.p;
    if (c.op == Op::Max || c.op == Op::MaxBackward)
        c.offsets = Offsets(r.pick(c.op == Op::MaxBackward, 3));
    if (c.offsets == Offsets::Byte && c.p.window_size() > kByteWindow) c.offsets = Offsets::Int32;
    if (c.op == Op::Avg || c.op == Op::AvgBackward) {
        job.count_include_pad = r.chance(2);
        if (r.chance(4)) job.divisor = r.chance(2) ? r.pick(1, 9) : -r.pick(1, 9);
    }
    if (c.op == Op::Lp) job.norm = r.pick(1, 3), job.magnitude = r.chance(2);
    // Planning asks whether there are offsets; run_case says where.
    static char somewhere;
    if (c.op == Op::Max && c.offsets != Offsets::None) job.offsets_out = &somewhere;
    if (c.op == Op::MaxBackward) {
        plan_max_backward(job, c.format.dtype, c.offsets);
        if (r.chance(4)) job.by_plane = !job.by_plane;
    }
    c.rows = c.op == Op::MaxBackward ? max_backward_rows(job)
             : c.forward()           ? plan_forward(job, c.format.bytes, c.op == Op::Avg)
                                     : plan_avg_backward(job, c.format.bytes);
    return c;
}

// --- expected results ------------------------------------------------------------------

double root(double x, int norm) { return norm == 1 ? x : std::pow(x, 1.0 / norm); }

Expected power_average(double sum, double slack, double scale, int norm) {
    sum *= scale, slack *= scale;
    if (norm == 1) return {sum, slack};
    if (!std::isfinite(sum) || sum < -slack) return {root(sum, norm), 0};
    const double value = root(std::max(sum, 0.0), norm);
    const double above = root(sum + slack, norm) - value;
    const double below = value - root(std::max(sum - slack, 0.0), norm);
    return {value, std::max(above, below) + value * 0x1p-20, norm == 3 && sum < slack};
}

// The elements of the result, and the winners' offsets. For a backward pass of max pooling these
// are chosen here, at random.
std::vector<Expected> expect(const Case& c, const std::vector<double>& x, Random& r,
                             std::vector<uint64_t>& offsets) {
    const PoolParams& p = c.p;
    const Format& format = c.format;
    std::vector<Expected> y(c.forward() ? c.outputs() : c.inputs());
    // Rounding errors grow with the number of terms and their size.
    const double epsilon = format.dtype == DType::Float64 ? 0x1p-52 : 0x1p-24;
    const auto slack = [&](double terms, double size) { return (terms + 8) * epsilon * size; };
    std::vector<double> terms(y.size()), size(y.size());
    const auto add = [&](int64_t i, double term) {
        y[i].value += term, size[i] += std::abs(term), ++terms[i];
        y[i].slack = slack(terms[i], size[i]);
    };
    const auto windows = c.windows();
    const auto empty = [](const Window& window) { return window.inside.empty(); };
    const auto far = [](const Axis& a) { return a.stride > (1 << 20) || a.dilation > (1 << 20); };
    progress->counted[kFarWindows] += far(c.p.d) || far(c.p.h) || far(c.p.w);
    progress->counted[kEmptyWindows] += std::any_of(windows.begin(), windows.end(), empty);
    for (int64_t o = 0; o < c.outputs(); ++o) {
        const int64_t channel = o % p.channels, outer = o / p.channels / p.out_plane();
        const Window& window = windows[o / p.channels % p.out_plane()];
        const auto element = [&](const auto& pair) {
            return (outer * p.in_plane() + pair.second) * p.channels + channel;
        };
        const auto offset = [&](const auto& pair) {
            return uint64_t(c.offsets == Offsets::Index ? pair.second : pair.first);
        };
        const double divisor = c.job.divisor ? c.job.divisor : window.counted;
        const int64_t count = window.inside.size();
        uint64_t winner = -1;
        if (c.op == Op::Max) {
            y[o].value = format.lowest();
            if (count) winner = offset(window.inside[0]);
            for (const auto& pair : window.inside)
                if (const double v = x[element(pair)]; v > y[o].value || std::isnan(v))
                    y[o].value = v, winner = offset(pair);
        } else if (c.op == Op::MaxBackward) {
            if (count && !r.chance(20)) {
                const auto& pair = window.inside[r.pick(0, count - 1)];
                winner = offset(pair);
                add(element(pair), x[o]);
            }
        } else if (c.op == Op::AvgBackward) {
            for (const auto& pair : window.inside) add(element(pair), x[o] / divisor);
        } else {
            double sum = 0, magnitudes = 0;
            for (const auto& pair : window.inside) {
                const double v = x[element(pair)], base = c.job.magnitude ? std::abs(v) : v;
                const double power = c.op == Op::Lp ? std::pow(base, c.job.norm) : base;
                sum += power, magnitudes += std::abs(power);
            }
            const double error = slack(count, magnitudes);
            if (c.op == Op::Avg)
                y[o] = {sum / divisor, error / std::abs(divisor)};
            else
                y[o] = power_average(sum, error, window.size / divisor, c.job.norm);
        }
        offsets.push_back(winner);
    }
    return y;
}

void run_case(const Case& c, Random& r) {
    const bool forward = c.forward();
    Array src(forward ? c.inputs() : c.outputs(), c.format.bytes);
    Array dst(forward ? c.outputs() : c.inputs(), c.format.bytes);
    Array offsets(c.outputs(), kOffsetBytes[int(c.offsets)]);
    std::vector<double> x;
    for (int64_t i = 0; i < src.count; ++i) {
        src.set(i, c.format.random(r, c.coarse, c.special && r.chance(c.special)));
        x.push_back(c.format.value(src.get(i)));
    }
    std::vector<uint64_t> winners;
    const std::vector<Expected> expected = expect(c, x, r, winners);
    Job job = c.job;
    job.src = src.data.get();
    job.dst = dst.data.get();
    if (c.op == Op::Max && c.offsets != Offsets::None) job.offsets_out = offsets.data.get();
    if (c.op == Op::MaxBackward) {
        job.offsets_in = offsets.data.get();
        for (int64_t o = 0; o < offsets.count; ++o) offsets.set(o, winners[o]);
    }

    namespace isa = POOLING_EXT_ISA;
    const DType t = c.format.dtype;
    const Kernel kernels[] = {isa::max_pool(t, c.offsets), isa::max_pool_backward(t, c.offsets),
                              isa::avg_pool(t), isa::avg_pool_backward(t), isa::lp_pool(t)};
    // Two ranges of rows, in either order, as two threads would take them.
    const int64_t middle = r.pick(0, c.rows.count);
    std::pair<int64_t, int64_t> ranges[] = {{0, middle}, {middle, c.rows.count}};
    if (r.chance(2)) std::swap(ranges[0], ranges[1]);
    const int64_t plane = forward ? c.p.out_plane() : c.p.in_plane(), channels = c.p.channels;
    const int64_t row = job.block ? job.block * plane : dst.count / c.rows.count;
    const auto row_of = [&](int64_t i) {
        if (!job.by_plane) return i / row;
        const int64_t groups = ceil_div(channels, kScatterChannels);
        return i / (channels * plane) * groups + i % channels / kScatterChannels;
    };
    for (const auto& [begin, end] : ranges) {
        if (begin == end) continue;
        Array scratch(scratch_bytes(job), 1, r.chance(2) ? 0xff : 0x4b);
        kernels[int(c.op)](job, begin, end, scratch.data.get());
        if (&begin != &ranges[0].first) continue;
        for (int64_t i = 0; i < dst.count; ++i)
            if ((row_of(i) < begin || row_of(i) >= end) &&
                (dst.written(i) || (job.offsets_out && offsets.written(i))))
                fail("written outside the rows: element", i, c.format.value(dst.get(i)), {});
    }

    for (int64_t i = 0; i < dst.count; ++i) {
        const Expected& e = expected[i];
        const double found = c.format.value(dst.get(i));
        if (found == e.value || (std::isnan(found) && (std::isnan(e.value) || e.or_nan))) continue;
        const double rounding = e.slack < 0 ? 0 : c.format.rounding(e.value);
        if (!(std::abs(found - e.value) <= e.slack + rounding)) fail("element", i, found, e);
    }
    const int unused = 64 - 8 * kOffsetBytes[int(c.offsets)];
    for (int64_t o = 0; job.offsets_out && o < offsets.count; ++o)
        if (offsets.get(o) != winners[o] << unused >> unused)
            fail("offset", o, double(offsets.get(o)), {double(winners[o])});
    progress->counted[kBlocks] += job.block > 0;
    progress->counted[kPlanes] += job.by_plane;
}

}  // namespace
}  // namespace pooling_ext

int main(int argc, char** argv) {
    using namespace pooling_ext;
    const char* const counters[] = {"in blocks", "by plane", "with empty windows",
                                    "with far windows", nullptr};
    return fuzz(argc, argv, "fuzz_kernels", kDefaultJobs, counters,
                [](Random& random, const auto& describe) {
                    const Case c = make_case(random);
                    describe(c.description());
                    run_case(c, random);
                });
}
