// Batch normalisation, ReLU and max pooling, backward: the sums need only what the windows picked,
// and each input gathers the gradients of the windows that picked it.
#include "kernels/cuda/norm/batch_norm_relu_max_pool.cuh"
#include "kernels/cuda/pool/max_pool_cells.cuh"

namespace pooling_ext::cuda {
namespace {

// --- sums ----------------------------------------------------------------------------------------

// Divides numbers under 2^31 by one of them without a division (Granlund and Montgomery, "Division
// by invariant integers using multiplication", 1994).
struct Divisor {
    unsigned by, factor, shift = 0;

    explicit Divisor(int64_t n) : by(unsigned(n)) {
        while ((uint64_t(1) << shift) < by) ++shift;
        factor = unsigned((((uint64_t(1) << shift) - by) << 32) / by + 1);
    }

    POOLING_EXT_DEVICE unsigned divide(unsigned n) const {
        return (unsigned(uint64_t(n) * factor >> 32) + n) >> shift;
    }
};

// The windows, and the tensors that their sums are of.
template <class In>
struct Picked {
    const In* grad;
    const uint8_t* places;
    const In* x;
    int64_t image;  // elements of an input's image, and from one to the next of a channel,
    int64_t plane;  // plane
    int64_t pixel;  // and pixel
    int64_t row;    // pixels of the input's row
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    Divisor kernel_w, out_w, out_plane;

    explicit Picked(const BnReluMaxPoolJob& job)
        : grad(static_cast<const In*>(job.pool.src)),
          places(static_cast<const uint8_t*>(job.pool.places_in)),
          x(static_cast<const In*>(job.x)),
          image(job.norm.channels * job.pool.p.in_plane()),
          plane(job.channels_last ? 1 : job.pool.p.in_plane()),
          pixel(job.channels_last ? job.norm.channels : 1),
          row(job.pool.p.w.in),
          stride_h(int(job.pool.p.h.stride)),
          stride_w(int(job.pool.p.w.stride)),
          pad_h(int(job.pool.p.h.pad_before)),
          pad_w(int(job.pool.p.w.pad_before)),
          dilation_h(int(job.pool.p.h.dilation)),
          dilation_w(int(job.pool.p.w.dilation)),
          kernel_w(job.pool.p.w.kernel),
          out_w(job.pool.p.w.out),
          out_plane(job.pool.p.out_plane()) {}

    // What a window of a plane picked; `from` is where the plane begins.
    POOLING_EXT_DEVICE const In* at(const In* from, unsigned window, unsigned place) const {
        const unsigned oh = out_w.divide(window), kh = kernel_w.divide(place);
        const int ow = int(window - oh * out_w.by), kw = int(place - kh * kernel_w.by);
        const int64_t h = int64_t(oh) * stride_h - pad_h + int(kh) * dilation_h;
        const int64_t w = int64_t(ow) * stride_w - pad_w + kw * dilation_w;
        return from + (h * row + w) * pixel;
    }
};

template <class In>
__global__ void __launch_bounds__(kThreads)
    sums_of_picked(Picked<In> picked, double* parts, Norm norm, ChannelTiles tiles) {
    using T = Accumulator<In>;
    constexpr int U = 4;
    __shared__ Lanes<T, 1> gradients, products;
    const Position<1> p(tiles);
    const OwnCoefficients<T, 1> c(tiles, p, norm);
    const In* const x = picked.x + (p.first_channel + p.channel(tiles, 0)) * picked.plane;
    // In channels-last, windows are counted from the first image of the block on.
    const bool pixels = tiles.inner == 1;
    const int64_t image0 = pixels ? p.split * tiles.each / picked.out_plane.by : 0;
    const int64_t window0 = image0 * picked.out_plane.by;
    T gradient = 0, product = 0;
    p.template walk_rows<U>(
        tiles, [&](const auto& at, const auto& there, const auto& rows, const auto& columns) {
            T grads[U], values[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (!there[u]) continue;
                int64_t image;
                unsigned window;
                if (pixels) {
                    const unsigned counted = unsigned(rows[u] - window0);
                    const unsigned images = picked.out_plane.divide(counted);
                    image = image0 + images;
                    window = counted - images * picked.out_plane.by;
                } else {
                    image = rows[u];
                    window = unsigned(columns[u]);
                    window -= picked.out_plane.divide(window) * picked.out_plane.by;
                }
                const unsigned place = load(picked.places + at[u]).at[0];
                grads[u] = widen(load(picked.grad + at[u]).at[0]);
                values[u] = widen(load(picked.at(x + image * picked.image, window, place)).at[0]);
            }
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (!there[u]) continue;
                const T d = values[u] - c.center[0];
                const T g = through(fused(d, c.scale[0], c.shift[0]), grads[u]);
                gradient += g;
                product = fused(g, d, product);
            }
        });
    gradients.at(int(threadIdx.x), 0) = gradient;
    products.at(int(threadIdx.x), 0) = product;
    add_up<1, TwoSums<T>>(
        tiles, p.own,
        [&](int lane, int i) { return TwoSums<T>{gradients.at(lane, i), products.at(lane, i)}; },
        [&](int channel, const TwoSums<T>& all) {
            double* const to = parts + p.split * 2 * norm.channels + p.first_channel + channel;
            store(to, {{double(all.first)}});
            store(to + norm.channels, {{double(all.second)}});
        });
}

// --- the input's gradient ------------------------------------------------------------------------

// Gradients go to the winners, through ReLU, and on through the normalisation.
template <class In>
struct ThroughNorm : ToWinner<In, uint8_t> {
    using T = Accumulator<In>;
    const In* x;
    CoefficientRows<T> coefficients;
    bool sums;

    explicit ThroughNorm(const BnReluMaxPoolJob& job)
        : x(static_cast<const In*>(job.x)), coefficients(job), sums(job.norm.sums != nullptr) {}

    bool aligned() const { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }
};

}  // namespace

template <class In, int N>
struct OwnTo<ThroughNorm<In>, N> {
    using T = Accumulator<In>;
    const ThroughNorm<In>& to;
    T center[N], scale[N], shift[N], slope[N], offset[N];

    POOLING_EXT_DEVICE OwnTo(const ThroughNorm<In>& to, int64_t plane, int64_t channel) : to(to) {
        const auto& rows = to.coefficients;
        rows.read(0, plane, channel, center);
        rows.read(1, plane, channel, scale);
        rows.read(2, plane, channel, shift);
        rows.read(3, plane, channel, slope);
        rows.read(4, plane, channel, offset);
    }

    template <int M>
    POOLING_EXT_DEVICE Vec<In, M> finish(const T* acc, int64_t at) const {
        const Vec<In, M> values = load<M>(to.x + at);
        Vec<In, M> out;
#pragma unroll
        for (int i = 0; i < M; ++i) {
            const int c = N == 1 ? 0 : i;
            const T d = widen(values.at[i]) - center[c];
            T g = through(fused(d, scale[c], shift[c]), acc[i]) * scale[c];
            if (to.sums) g += fused(d, slope[c], offset[c]);
            out.at[i] = narrow<In>(g);
        }
        return out;
    }
};

ChannelTiles stem_tiles(const BnReluMaxPoolJob& job) {
    const PoolParams& p = job.pool.p;
    const int64_t element = job.dtype == DType::Float64 ? 8 : job.dtype == DType::Float32 ? 4 : 2;
    // One element at a time: what is picked lies apart. Half a line of channels, so that rows of
    // the input stay in the cache for the next row of windows.
    constexpr int64_t kLine = 64;
    const int64_t channels = job.norm.channels;
    ChannelTiles tiles =
        job.channels_last
            ? ChannelTiles(p.outer * p.out_plane(), channels, 1, element, false, kLine)
            : ChannelTiles(p.outer / channels, channels, p.out_plane(), element, false);
    tiles.divide_sums();
    return tiles;
}

void stem_sums(const BnReluMaxPoolJob& job, double* parts, StreamHandle stream) {
    const PoolParams& p = job.pool.p;
    if (!fits_32_bits(p)) throw std::runtime_error("pooling_ext: input is too large");
    const ChannelTiles tiles = stem_tiles(job);
    with_float(job.dtype, [&](auto zero) {
        using In = decltype(zero);
        launch<sums_of_picked<In>>(grid_of(tiles), static_cast<Stream>(stream), Picked<In>(job),
                                   parts, job.norm, tiles);
    });
}

void stem_backward(const BnReluMaxPoolJob& job, StreamHandle stream) {
    with_float(job.dtype, [&](auto zero) {
        using In = decltype(zero);
        const ThroughNorm<In> to(job);
        if (!launch_max_pool_cells(job.pool, static_cast<Stream>(stream), to))
            launch_backward(job.pool, static_cast<Stream>(stream), to);
    });
}

}  // namespace pooling_ext::cuda
