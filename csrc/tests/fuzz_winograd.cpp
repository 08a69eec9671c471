// Runs the kernels of Winograd's convolution on random jobs, to be compiled with AddressSanitizer
// and UndefinedBehaviorSanitizer, and compares them with plain loops in float64.
//
//     fuzz_winograd [jobs [first]]
//
// Arrays, scratch memory and repeating a job are as in fuzz_kernels.cpp.
#include <sstream>
#include <vector>

#include "kernels/cpu/conv/winograd_plan.h"
#include "kernels/cpu/conv/winograd_tables.h"
#include "tests/activations.h"
#include "tests/convolutions.h"

namespace pooling_ext {
namespace {

constexpr int64_t kDefaultJobs = 1500;
enum Counter {
    kForward,
    kSeveralBlocks,
    kSeveralSplits,
    kGroups,
    kStrided,
    kDilated,
    kOtherKernels,
    kPlanar
};
enum class Kind { Forward, InputGrad, WeightGrad };

using Numbers = std::vector<double>;

struct Case {
    Format format;
    Kind kind;
    WinogradShape shape;
    bool bias, residual, stats;
    Activation activation;

    bool is_double() const { return format.dtype == DType::Float64; }
    int64_t element() const { return is_double() ? 8 : 4; }
    int64_t stride() const { return shape.kind == WinogradKind::Strided ? 2 : 1; }
    int64_t rows() const { return shape.tile().rows.taps; }
    int64_t columns() const { return shape.tile().columns.taps; }
    int64_t taps() const { return shape.planes * rows() * columns(); }
    // Of a sum of products, beside their sizes.
    double roundoff() const { return 64 * (is_double() ? 0x1p-53 : 0x1p-24); }

    std::string description() const {
        const WinogradShape& s = shape;
        std::ostringstream text;
        text << (kind == Kind::Forward     ? "forward "
                 : kind == Kind::InputGrad ? "input grad "
                                           : "weight grad ")
             << format.name << " batch=" << s.batch << " groups=" << s.groups
             << " channels=" << s.channels << " features=" << s.features << " in=" << s.height
             << "x" << s.width << " out=" << s.out_height << "x" << s.out_width
             << " planar=" << s.planar << " kernel=" << rows() << "x" << columns()
             << " turned=" << s.turned << " pad=" << s.pad_top << "," << s.pad_left
             << " stride=" << stride() << " dilation=" << s.dilation_y << "," << s.dilation_x
             << " planes=" << s.planes << " depth=" << s.depth << "->" << s.out_depth
             << " front=" << s.pad_front << " by " << s.plane_stride << "," << s.plane_dilation
             << " bias=" << bias << " residual=" << residual << " stats=" << stats
             << " activation=" << int(activation);
        return text.str();
    }
};

Case make_case(Random& r) {
    Case c{};
    c.format = kFormats[r.pick(0, 3)];
    c.kind = Kind(r.pick(0, 2));
    WinogradShape& s = c.shape;
    do {
        s.batch = r.pick(1, 3), s.groups = r.chance(4) ? r.pick(2, 3) : 1;
        s.channels = r.pick(1, r.chance(3) ? 70 : 20),
        s.features = r.pick(1, r.chance(3) ? 70 : 20);
        s.height = r.pick(1, r.chance(4) ? 24 : 11), s.width = r.pick(1, r.chance(4) ? 24 : 11);
        if (r.chance(8)) s.width = r.pick(30, 90);  // rows of tiles that are longer than blocks
        constexpr WinogradKind kKinds[] = {WinogradKind::Dense,   WinogradKind::Dense,
                                           WinogradKind::Strided, WinogradKind::Strided,
                                           WinogradKind::Square5, WinogradKind::Row3,
                                           WinogradKind::Row7};
        s.kind = kKinds[r.pick(0, 6)];
        s.turned = r.chance(3);
        const bool odd = c.kind == Kind::InputGrad && c.stride() == 2;
        s.pad_top = odd ? r.pick(0, 1) * 2 - 1 : r.pick(-1, 3);
        s.pad_left = odd ? r.pick(0, 1) * 2 - 1 : r.pick(-1, 3);
        s.dilation_y = s.dilation_x = 1;
        if (c.stride() == 1 && r.chance(3))
            s.dilation_y = r.pick(1, 4), s.dilation_x = r.pick(1, 4);
        s.out_height = s.height + s.pad_top + r.pick(-1, 3) - (c.rows() - 1) * s.dilation_y - 1;
        s.out_width = s.width + s.pad_left + r.pick(-1, 3) - (c.columns() - 1) * s.dilation_x - 1;
        s.out_height = s.out_height < 0 ? 0 : s.out_height / c.stride() + 1;
        s.out_width = s.out_width < 0 ? 0 : s.out_width / c.stride() + 1;
        s.planes = s.depth = s.out_depth = s.plane_stride = s.plane_dilation = 1, s.pad_front = 0;
        if (!r.chance(3)) continue;
        s.planes = r.pick(1, 4), s.depth = r.pick(1, 5), s.pad_front = r.pick(-1, 3);
        s.plane_stride = c.kind == Kind::InputGrad ? 1 : r.pick(1, 3);
        s.plane_dilation = r.pick(1, 2);
        s.out_depth = s.depth + s.pad_front + r.pick(-1, 3) - s.plane_dilation * (s.planes - 1) - 1;
        s.out_depth = s.out_depth < 0 ? 0 : s.out_depth / s.plane_stride + 1;
    } while (s.out_height < 1 || s.out_width < 1 || s.out_depth < 1 ||
             s.pixels() * s.groups * s.inner() * s.features > 400000);
    s.planar = s.groups == 1 && s.dilation_y * s.dilation_x * s.planes * s.depth == 1 &&
               !s.turned && s.pad_front == 0 && s.out_depth == 1 && r.chance(2);
    c.bias = r.chance(2), c.residual = !s.planar && r.chance(3), c.stats = r.chance(3);
    if (r.chance(2)) c.activation = Activation(r.pick(0, kActivations - 1));
    return c;
}

// Calls use(output, input, weight) with the indices of each product of the convolution.
template <class Use>
void each_product(const WinogradShape& s, const Use& use) {
    const int64_t out = s.groups * s.features;
    const int64_t stride = s.kind == WinogradKind::Strided ? 2 : 1;
    const int64_t columns = s.tile().columns.taps, plane_taps = s.tile().taps();
    const int64_t taps = s.planes * plane_taps;
    const WinogradStrides in = s.in_strides(), by = s.out_strides();
    for (int64_t pixel = 0; pixel < s.pixels(); ++pixel) {
        const int64_t x = pixel % s.out_width, y = pixel / s.out_width % s.out_height;
        const int64_t image = pixel / s.out_width / s.out_height;
        const int64_t n = image / s.out_depth, z = image % s.out_depth;
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t at = tap % plane_taps;
            const int64_t plane =
                z * s.plane_stride - s.pad_front + tap / plane_taps * s.plane_dilation;
            const int64_t row = y * stride - s.pad_top + at / columns * s.dilation_y;
            const int64_t column = x * stride - s.pad_left + at % columns * s.dilation_x;
            if (plane < 0 || plane >= s.depth || row < 0 || row >= s.height || column < 0 ||
                column >= s.width)
                continue;
            const int64_t from = in.offset(n * s.depth + plane, row, column);
            const int64_t to = by.offset(image, y, x);
            for (int64_t f = 0; f < out; ++f)
                for (int64_t k = 0; k < s.channels; ++k)
                    use(to + f, from + f / s.features * s.channels + k,
                        (f * s.channels + k) * taps + tap);
        }
    }
}

// Elements of pixels in channels-last as planes, or the other way round.
void change_layout(const Elements& from, int64_t images, int64_t pixels, int64_t channels,
                   bool to_planes, const Elements& to) {
    for (int64_t i = 0; i < images * pixels * channels; ++i) {
        const int64_t n = i / channels / pixels, p = i / channels % pixels, c = i % channels;
        const int64_t planar = (n * channels + c) * pixels + p;
        to.array.set(to_planes ? planar : i, from.array.get(to_planes ? i : planar));
    }
}

// Activations as the kernels get them.
struct Given {
    Elements planes;
    const void* data;

    Given(const WinogradShape& s, const Elements& x, int64_t pixels, int64_t channels)
        : planes(x.format, s.planar ? s.batch * pixels * channels : 1),
          data(s.planar ? planes.data() : x.data()) {
        if (s.planar) change_layout(x, s.batch, pixels, channels, true, planes);
    }
};

WinogradMachine machine_of(const Case& c, const WinogradKernels& table) {
    WinogradMachine m;
    m.lanes = table.lanes, m.element = c.element();
    return m;
}

// A weight in memory, its elements in one of the orders that are read in their own ways.
struct PlainWeight {
    Array array;
    WinogradWeightJob job;

    PlainWeight(const Case& c, const WinogradShape& s, const Elements& weight, bool transposed,
                Random& r)
        : array(s.groups * s.inner() * s.features * s.tile().taps(), c.format.bytes) {
        job.shape = s;
        job.transposed = transposed, job.weight = array.data.get();
        const int64_t inner = transposed ? s.features : s.channels, taps = c.taps();
        const int64_t outs = s.groups * (transposed ? s.channels : s.features);
        const int64_t rows = c.rows(), columns = c.columns(), plane = rows * columns;
        const int64_t orders[][5] = {{inner * taps, taps, plane, columns, 1},
                                     {inner * taps, 1, plane * inner, inner * columns, inner},
                                     {1, outs * taps, outs * plane, outs * columns, outs},
                                     {inner * taps, taps, plane, 1, rows}};
        const int64_t* const strides = orders[r.pick(0, 3)];
        std::copy(strides, strides + 5, job.strides);
        for (int64_t i = 0; i < outs * inner * taps; ++i) {
            const int64_t tap = i % taps;
            array.set(i / taps / inner * strides[0] + i / taps % inner * strides[1] +
                          tap / plane * strides[2] + tap % plane / columns * strides[3] +
                          tap % columns * strides[4],
                      weight.array.get(i));
        }
    }
    // Panels of vectors [first, last) to `result`, as if all were there.
    void transform(int64_t first, int64_t last, void* result, const WinogradKernels& table) {
        job.result = result;
        const int64_t between = (first + last) / 2;
        table.weight(job, first, between);
        table.weight(job, between, last);
    }
};

// As forward convolutions, of the shape as it is or of the one that makes the input's gradient.
void check_forward(const Case& c, const WinogradShape& s, const Elements& x, const Elements& weight,
                   bool transposed, const Numbers& sums, double size, const WinogradKernels& table,
                   Random& r) {
    PlainWeight plain(c, s, weight, transposed, r);
    const WinogradMachine m = machine_of(c, table);
    const int64_t channels = s.groups * s.features, n = s.pixels() * channels;
    const Format& wide = kFormats[c.is_double() ? 1 : 0];
    const Elements bias(wide, channels, r), residual(c.format, n, r), y(c.format, n);
    std::vector<double> stats(size_t(c.stats ? s.units() * 2 * channels : 0), NAN);
    WinogradJob job;
    const Given given(s, x, s.height * s.width, s.channels);
    job.shape = s, job.x = given.data, job.y = y.data();
    if (c.bias) job.bias = bias.data();
    if (c.residual) job.residual = residual.data();
    if (c.stats) job.stats = stats.data();
    job.activation = c.activation, job.slope = 0.125;
    job.non_temporal =
        r.chance(2) && s.features * c.format.bytes % 64 == 0 && uintptr_t(y.data()) % 64 == 0;
    const int64_t unit = c.stats ? kWinogradUnit : 1,
                  vectors = s.groups * winograd_vectors(s.features, m);
    const int64_t tile = std::min(r.pick(0, s.tiles() / unit) * unit, s.tiles());
    const int64_t vector = r.pick(0, vectors);
    const WinogradShare shares[] = {{0, tile, 0, vector},
                                    {0, tile, vector, vectors},
                                    {tile, s.tiles(), 0, vector},
                                    {tile, s.tiles(), vector, vectors}};
    for (const WinogradShare& share : shares) {
        job.share = share;
        job.block = {r.pick(1, 4) * (c.stats ? kWinogradUnit : r.pick(1, 8)), r.pick(1, 4)};
        progress->counted[kSeveralBlocks] += share.last_tile - share.first_tile > job.block.tiles;
        if (share.first_vector >= share.last_vector) continue;
        Array scratch(WinogradScratch(s, m, job.block).bytes(m), 1, r.chance(2) ? 0xff : 0x4b);
        const auto some = [&](int64_t first, int64_t last) {
            const WinogradPanels panels(s, m, first, last);
            Array transformed(panels.end - panels.begin, c.element());
            char* const begin = reinterpret_cast<char*>(transformed.data.get());
            char* const result = begin - panels.begin * c.element();
            plain.transform(first, last, result, table);
            job.weight = result;
            job.share.first_vector = first, job.share.last_vector = last;
            table.forward(job, scratch.data.get());
        };
        const int64_t middle = r.pick(share.first_vector + 1, share.last_vector);
        some(share.first_vector, middle);
        job.input_is_there = s.groups == 1 && share.last_tile - share.first_tile <= job.block.tiles;
        if (middle < share.last_vector) some(middle, share.last_vector);
        job.input_is_there = false;
    }
    if (s.planar) {
        Elements found(c.format, n);
        std::memcpy(found.data(), y.data(), size_t(n * c.format.bytes));
        change_layout(found, s.batch, s.out_height * s.out_width, channels, false, y);
    }
    std::vector<double> counts(size_t(s.units()), 0.0);
    std::vector<int64_t> unit_of(size_t(s.pixels()), -1);
    for (int64_t t = 0; t < s.tiles(); ++t) {
        const WinogradPosition at =
            s.position(t / s.columns() / s.rows(), t / s.columns() % s.rows(), t % s.columns());
        for (int64_t a = 0; a < s.rows_of(at); ++a)
            for (int64_t b = 0; b < s.columns_of(at); ++b) {
                const int64_t row = at.y + a * s.dilation_y, column = at.x + b * s.dilation_x;
                unit_of[s.out_strides().offset(at.image, row, column) / channels] =
                    t / kWinogradUnit;
            }
    }
    Numbers mean(stats.size()), square(stats.size()), largest(stats.size());
    for (int64_t i = 0; i < n; ++i) {
        double value = sums[i] + (c.bias ? bias[i % channels] : 0) + (c.residual ? residual[i] : 0);
        value = activated(c.activation, value, job.slope);
        check("output", i, y[i], value, size * c.roundoff() + c.format.rounding(value));
        if (!c.stats) continue;
        const int64_t u = unit_of[i / channels];
        counts[u] += i % channels == 0;
        mean[u * 2 * channels + i % channels] += y[i];
        square[u * 2 * channels + i % channels] += y[i] * y[i];
        double& size_of_unit = largest[u * 2 * channels + i % channels];
        size_of_unit = std::max(size_of_unit, std::abs(y[i]));
    }
    for (int64_t u = 0; c.stats && u < s.units(); ++u)
        for (int64_t k = 0; k < channels; ++k) {
            const int64_t at = u * 2 * channels + k;
            if (counts[u] == 0) continue;  // of tiles beyond a phase
            const double total = mean[at], slack = 8 * c.roundoff();
            check("mean", at, stats[at], total / counts[u], slack * (1 + std::sqrt(square[at])));
            // The squares are summed about a value of the unit, which may be its farthest.
            const double about = 4 * counts[u] * largest[at] * largest[at];
            check("deviation", at, stats[at + channels], square[at] - total * total / counts[u],
                  slack * (1 + about));
        }
}

void check_grad(const Case& c, const Elements& x, const Elements& grad, const Numbers& sums,
                double size, const WinogradKernels& table, Random& r) {
    const WinogradShape& s = c.shape;
    const WinogradMachine m = machine_of(c, table);
    const int64_t taps = c.taps(), n = s.groups * s.features * s.channels * taps;
    const Elements result(c.format, n);
    WinogradGradJob job;
    const Given inputs(s, x, s.height * s.width, s.channels);
    const Given grads(s, grad, s.out_height * s.out_width, s.features);
    job.shape = s, job.x = inputs.data, job.grad = grads.data, job.result = result.data();
    const int64_t strides[] = {s.channels * taps, taps, c.rows() * c.columns(), c.columns(), 1};
    std::copy(strides, strides + 5, job.strides);
    WinogradGradGrid grid;
    grid.splits = std::min(r.pick(1, 3), s.tiles());
    grid.over_channels = r.pick(1, winograd_inner_vectors(s, m));
    grid.over_vectors = r.pick(1, winograd_vectors(s.features, m));
    progress->counted[kSeveralSplits] += grid.splits > 1;
    for (int64_t i = 0; i < grid.regions(s); ++i) {
        const WinogradRegion region = grid.region(i, s, m);
        Array parts(grid.splits * region.size(s, m.lanes), m.element, 0xff);
        for (int64_t split = 0; split < grid.splits; ++split) {
            job.block = r.pick(1, 20);
            Array scratch(WinogradGradScratch(s, region, m, job.block).bytes(m), 1,
                          r.chance(2) ? 0xff : 0x4b);
            table.grad(job, region, grid.first_tile(split, s), grid.first_tile(split + 1, s),
                       &parts.data[split * region.size(s, m.lanes) * m.element],
                       scratch.data.get());
        }
        table.grad_end(job, region, parts.data.get(), grid.splits);
    }
    for (int64_t i = 0; i < n; ++i)
        check("gradient", i, result[i], sums[i], size * c.roundoff() + c.format.rounding(sums[i]));
}

void check_job(const Case& c, Random& r) {
    const WinogradShape& s = c.shape;
    const WinogradKernels table = POOLING_EXT_ISA::winograd(c.format.dtype, s.kind);
    const int64_t x_size = s.in_pixels() * s.groups * s.channels;
    const int64_t y_size = s.pixels() * s.groups * s.features;
    const int64_t weights = s.groups * s.features * s.channels * c.taps();
    progress->counted[kStrided] += c.stride() == 2;
    progress->counted[kDilated] += s.dilation_y * s.dilation_x > 1;
    progress->counted[kPlanar] += s.planar;
    progress->counted[kOtherKernels] += c.rows() != 3 || c.columns() != 3;
    progress->counted[kForward] += c.kind == Kind::Forward;
    progress->counted[kGroups] += s.groups > 1;
    const Elements x(c.format, x_size, r), weight(c.format, weights, r), grad(c.format, y_size, r);
    // Elements are at most 4; a tile's largest product of transforms is some 100 times theirs, and
    // more with more points.
    const double product = s.tile().points() == 36 ? 16 : 64;
    if (c.kind == Kind::WeightGrad) {
        Numbers sums(size_t(weights), 0.0);
        each_product(s, [&](int64_t o, int64_t i, int64_t w) { sums[w] += grad[o] * x[i]; });
        return check_grad(c, x, grad, sums, product * double(s.pixels()), table, r);
    }
    if (c.kind == Kind::Forward) {
        Numbers sums(size_t(y_size), 0.0);
        each_product(s, [&](int64_t o, int64_t i, int64_t w) { sums[o] += weight[w] * x[i]; });
        return check_forward(c, s, x, weight, false, sums,
                             product * double(c.taps() * s.channels + 9), table, r);
    }
    Numbers sums(size_t(x_size), 0.0);
    each_product(s, [&](int64_t o, int64_t i, int64_t w) { sums[i] += weight[w] * grad[o]; });
    WinogradShape turned = s;
    std::swap(turned.channels, turned.features);
    turned.height = s.out_height, turned.width = s.out_width;
    turned.out_height = s.height, turned.out_width = s.width;
    turned.pad_top = (c.rows() - 1) * s.dilation_y - s.pad_top;
    turned.pad_left = (c.columns() - 1) * s.dilation_x - s.pad_left;
    turned.depth = s.out_depth, turned.out_depth = s.depth;
    turned.pad_front = s.plane_dilation * (s.planes - 1) - s.pad_front;
    if (c.stride() == 2) {
        turned.kind = WinogradKind::Spread;
        turned.pad_top = -(s.pad_top - 1) / 2, turned.pad_left = -(s.pad_left - 1) / 2;
    }
    const WinogradKernels grad_table = POOLING_EXT_ISA::winograd(c.format.dtype, turned.kind);
    check_forward(c, turned, grad, weight, true, sums,
                  product * double(c.taps() * turned.channels + 9), grad_table, r);
}

}  // namespace
}  // namespace pooling_ext

int main(int argc, char** argv) {
    using namespace pooling_ext;
    const char* const counters[kCounters] = {"forward",
                                             "shares in several blocks",
                                             "gradients in several splits",
                                             "in groups",
                                             "strided",
                                             "dilated",
                                             "of other kernels than 3x3",
                                             "planar"};
    return fuzz(argc, argv, "fuzz_winograd", kDefaultJobs, counters,
                [](Random& random, const auto& describe) {
                    const Case c = make_case(random);
                    describe(c.description());
                    check_job(c, random);
                });
}
