// Convolution of images, compiled once for each instruction set.
#include "kernels/cpu/conv/activation.h"
#include "kernels/cpu/conv/depthwise_statistics.h"
#include "kernels/cpu/conv/image_rows.h"
#include "kernels/cpu/simd/vector.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// Some windows beside each other, and vectors of features.
template <class T>
struct TileCall {
    const T* const* rows;  // of the image, for each of the kernel; none outside it
    int64_t count;         // of them
    int64_t offset;        // of the first window in a row
    int64_t step;          // from a window to the next
    int64_t across;        // elements of a window's row
    const T* weights;      // for each element of a window kVectors vectors
    T* y;                  // for each window a vector
    int64_t apart;         // from a vector of features to the next in y
};

template <class T, int kWindows, int kVectors>
void windows(const TileCall<T>& call) {
    using L = Lanes<T>;
    using X = typename L::X;
    X sums[kWindows][kVectors] = {};
    const T* weights = call.weights;
    for (int64_t r = 0; r < call.count; ++r) {
        if (call.rows[r] == nullptr) {
            weights += call.across * kVectors * L::kSize;
            continue;
        }
        RowPointers<T> elements(call.rows[r] + call.offset, call.step);
        for (int64_t k = 0; k < call.across; ++k, elements.next()) {
            X factor[kVectors];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) factor[v] = L::own(weights + v * L::kSize);
            weights += kVectors * L::kSize;
#pragma GCC unroll 16
            for (int i = 0; i < kWindows; ++i) {
                const T number = elements[i];
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) sums[i][v] += number * factor[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWindows; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
            L::keep(call.y + v * call.apart + i * L::kSize, sums[i][v]);
}

// The tiles of every height up to kTileRows, for one vector and two.
template <class T>
struct WindowTiles {
    using Call = TileCall<T>;
    void (*tile[2][kTileRows + 1])(const Call&) = {};

    constexpr WindowTiles() { fill(std::make_integer_sequence<int, kTileRows>{}); }

  private:
    template <int... I>
    constexpr void fill(std::integer_sequence<int, I...>) {
        ((tile[0][I + 1] = windows<T, I + 1, 1>), ...);
        ((tile[1][I + 1] = windows<T, I + 1, 2>), ...);
    }
};

template <class T>
constexpr WindowTiles<T> kWindowTiles{};

// For each pair of vectors of features the weights of a window's elements, and then all biases.
template <class In>
void prepare(const ImageJob& job, int64_t, int64_t, void*) {
    using L = Lanes<In>;
    using T = typename L::T;
    const In* const weight = static_cast<const In*>(job.weight);
    const In* const bias = static_cast<const In*>(job.bias);
    T* to = static_cast<T*>(job.prepared);
    const auto of = [&](int64_t feature, int64_t kh, int64_t kw, int64_t c) {
        if (feature >= job.features) return T(0);
        const int64_t plane = feature * job.channels + c;
        return T(widen(weight[(plane * job.h.kernel + kh) * job.w.kernel + kw]));
    };
    each_pair(job.padded_features() / L::kSize, [&](int64_t v, int64_t count) {
        for (int64_t kh = 0; kh < job.h.kernel; ++kh)
            for (int64_t kw = 0; kw < job.w.kernel; ++kw)
                for (int64_t c = 0; c < job.channels; ++c)
                    for (int64_t i = 0; i < count * L::kSize; ++i)
                        *to++ = of(v * L::kSize + i, kh, kw, c);
    });
    for (int64_t i = 0; i < job.padded_features(); ++i)
        *to++ = bias != nullptr && i < job.features ? T(widen(bias[i])) : T(0);
}

template <class In>
class ImageForward {
  public:
    using L = Lanes<In>;
    using T = typename L::T;

    ImageForward(const ImageJob& job, void* scratch)
        : job_(job),
          plan_(job),
          vectors_(job.padded_features() / L::kSize),
          to_{static_cast<In*>(job.y), job.batch, job.features, job.h.out, job.w.out,
              job.channels_last},
          memory_(scratch),
          rows_(job, memory_),
          row_(memory_.take<T>(job.w.out * job.padded_features())),
          statistics_(job.moments == nullptr ? 0 : vectors_, memory_) {}

    void run(int64_t unit) {
        const int64_t n = unit / plan_.bands, first = unit % plan_.bands * plan_.band;
        const int64_t left = job_.h.out - first;
        const int64_t end = first + (left < plan_.band ? left : plan_.band);
        rows_.begin();
        if (job_.moments != nullptr) statistics_.begin();
        for (int64_t r = first; r < end; ++r) {
            compute(n, r);
            finish(n, r, r == first);
        }
        if (job_.moments == nullptr) return;
        double* const moments = job_.moments + unit * 2 * job_.padded_features();
        for (int64_t v = 0; v < vectors_; ++v)
            statistics_.take(v, L::kSize, moments + v * L::kSize,
                             moments + job_.padded_features() + v * L::kSize);
    }

  private:
    // Parts of a line must not go past the cache one by one.
    static constexpr bool kWholeLines = std::is_same_v<In, T> && kVectorBytes == 64;

    // A row of the output: for each vector of features that of each pixel.
    void compute(int64_t n, int64_t r) {
        const int64_t apart = job_.w.out * L::kSize;
        const T* weights = static_cast<const T*>(job_.prepared);
        TileCall<T> call;
        call.rows = rows_.of(n, r);
        call.count = job_.h.kernel;
        call.step = job_.w.stride * job_.channels;
        call.across = job_.across();
        call.apart = apart;
        const RowTiles tiles(job_.w.out);
        each_pair(vectors_, [&](int64_t v, int64_t count) {
            call.weights = weights;
            tiles.each([&](int64_t first, int64_t windows) {
                call.offset = first * call.step;
                call.y = row_ + v * apart + first * L::kSize;
                kWindowTiles<T>.tile[count - 1][windows](call);
            });
            weights += count * L::kSize * job_.depth();
        });
    }

    // Statistics, of the results with their bias; then what is written, with the activation.
    void finish(int64_t n, int64_t r, bool first) {
        const int64_t pixels = job_.w.out;
        bool has_bias = job_.bias != nullptr;
        if (job_.moments != nullptr) {
            if (has_bias) in_place([](auto x) POOLING_EXT_INLINE_LAMBDA { return x; });
            has_bias = false;
            for (int64_t v = 0; v < vectors_; ++v)
                statistics_.add(v, row_ + v * pixels * L::kSize, pixels, first);
            statistics_.merge(pixels);
        }
        const bool by_pixels = job_.channels_last && job_.features % L::kSize == 0;
        const auto finished = [&](const auto& function) {
            if (by_pixels) return write_pixels(n, r, function);
            in_place(function);
            write_planes(n, r);
        };
        if (job_.activation != Activation::None)
            with_function<T>(job_.activation, T(job_.slope), finished);
        else if (by_pixels || has_bias)
            finished([](auto x) POOLING_EXT_INLINE_LAMBDA { return x; });
        else
            write_planes(n, r);
    }

    const T* biases() const {
        return static_cast<const T*>(job_.prepared) + job_.padded_features() * job_.depth();
    }

    // function(x + bias) in place of each x.
    template <class Function>
    POOLING_EXT_INLINE void in_place(const Function& function) const {
        for (int64_t v = 0; v < vectors_; ++v) {
            T* const row = row_ + v * job_.w.out * L::kSize;
            const auto bias = L::own(biases() + v * L::kSize);
            for (int64_t i = 0; i < job_.w.out * L::kSize; i += L::kSize)
                L::keep(row + i, function(L::own(row + i) + bias));
        }
    }

    void write_planes(int64_t n, int64_t r) const {
        for (int64_t v = 0; v * L::kSize < job_.features; ++v) {
            const T* const row = row_ + v * job_.w.out * L::kSize;
            if (kWholeLines && job_.non_temporal && (v + 1) * L::kSize <= job_.features)
                stream_planes(to_.at(n, v * L::kSize, r * job_.w.out), row);
            else
                store_rows<In>(to_, n, v * L::kSize, r, 1, row, job_.w.out);
        }
    }

    // A row of the planes of a vector of features, in whole lines.
    void stream_planes(In* to, const T* from) const {
        for (int64_t i = 0; i < job_.w.out; i += L::kSize) {
            typename L::X x[L::kSize];
#pragma GCC unroll 16
            for (int64_t k = 0; k < L::kSize; ++k) x[k] = L::own(from + (i + k) * L::kSize);
            L::transpose(x);
#pragma GCC unroll 16
            for (int64_t k = 0; k < L::kSize; ++k)
                store_non_temporal(to + k * to_.pixels() + i, x[k]);
        }
    }

    // Pixel by pixel, as they lie in memory. With statistics the biases have been added.
    template <class Function>
    POOLING_EXT_INLINE void write_pixels(int64_t n, int64_t r, const Function& function) const {
        const int64_t apart = job_.w.out * L::kSize, whole = job_.features / L::kSize;
        const T* const bias = job_.bias == nullptr || job_.moments != nullptr ? nullptr : biases();
        In* y = to_.at(n, 0, r * job_.w.out);
        const auto each = [&](const auto& put) POOLING_EXT_INLINE_LAMBDA {
            for (int64_t i = 0; i < apart; i += L::kSize)
                for (int64_t v = 0; v < whole; ++v, y += L::kSize) {
                    auto x = L::own(row_ + v * apart + i);
                    if (bias != nullptr) x += L::own(bias + v * L::kSize);
                    put(y, function(x));
                }
        };
        if (kWholeLines && job_.non_temporal)
            each([](In* to, auto x) POOLING_EXT_INLINE_LAMBDA { store_non_temporal(to, x); });
        else
            each([](In* to, auto x) POOLING_EXT_INLINE_LAMBDA { L::put(to, x); });
    }

    const ImageJob& job_;
    const ImagePlan plan_;
    const int64_t vectors_;
    const Planes<In> to_;
    Memory memory_;
    ImageRows<In> rows_;
    T* const row_;
    Statistics<In> statistics_;
};

template <class In>
void forward(const ImageJob& job, int64_t begin, int64_t end, void* scratch) {
    ImageForward<In> convolution(job, scratch);
    for (int64_t unit = begin; unit < end; ++unit) convolution.run(unit);
    if (job.non_temporal) fence_non_temporal();
}

void merge(const ImageJob& job, int64_t begin, int64_t end, void*) {
    const ImagePlan plan(job);
    merge_moments(job.moments, plan.all_bands(job), job.padded_features(), job.stats, job.features,
                  begin, end, [&](int64_t unit) {
                      const int64_t left = job.h.out - unit % plan.bands * plan.band;
                      return (left < plan.band ? left : plan.band) * job.w.out;
                  });
}

}  // namespace
}  // namespace conv

ImageKernel image(DType dtype, ImageStep step) {
    return for_float(dtype, [&](auto zero) -> ImageKernel {
        using In = decltype(zero);
        switch (step) {
            case ImageStep::Prepare:
                return conv::prepare<In>;
            case ImageStep::Forward:
                return conv::forward<In>;
            case ImageStep::Merge:
                return conv::merge;
            default:
                return image_weight_grad(dtype, step);
        }
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
