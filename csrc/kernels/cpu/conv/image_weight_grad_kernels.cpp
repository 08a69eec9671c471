// The gradient of the weights of a convolution of images, compiled once for each instruction set.
#include "kernels/cpu/conv/image_rows.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// Some elements of all windows of a row, and vectors of features.
template <class T>
struct SumsCall {
    const T* elements;    // of the first window
    int64_t step, count;  // from a window to the next; windows
    const T* grad;        // for each window a vector
    int64_t grad_step;    // from a window to the next
    int64_t apart;        // from a vector of features to the next in grad
    T* sums;              // for each element kVectors vectors, to which the products are added
    int64_t pitch;        // from an element's to the next's
    // What the next row reads: each window asks for so many bytes of it, evenly, since a burst
    // would wait for itself.
    const char* ahead;
    int64_t ahead_step;
};

template <class T, int kElements, int kVectors>
void products(const SumsCall<T>& call) {
    using L = Lanes<T>;
    using X = typename L::X;
    X sums[kElements][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kElements; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
            sums[i][v] = L::own(call.sums + i * call.pitch + v * L::kSize);
    const T *elements = call.elements, *grad = call.grad;
    const char* ahead = call.ahead;
    for (int64_t n = 0; n < call.count; ++n, elements += call.step, grad += call.grad_step) {
        __builtin_prefetch(ahead);
        ahead += call.ahead_step;
        X factor[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) factor[v] = L::own(grad + v * call.apart);
#pragma GCC unroll 16
        for (int i = 0; i < kElements; ++i) {
            const T number = elements[i];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[i][v] += number * factor[v];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kElements; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
            L::keep(call.sums + i * call.pitch + v * L::kSize, sums[i][v]);
}

// The tiles of every height up to kTileRows, for one vector and two.
template <class T>
struct ProductTiles {
    using Call = SumsCall<T>;
    void (*tile[2][kTileRows + 1])(const Call&) = {};

    constexpr ProductTiles() { fill(std::make_integer_sequence<int, kTileRows>{}); }

  private:
    template <int... I>
    constexpr void fill(std::integer_sequence<int, I...>) {
        ((tile[0][I + 1] = products<T, I + 1, 1>), ...);
        ((tile[1][I + 1] = products<T, I + 1, 2>), ...);
    }
};

template <class T>
constexpr ProductTiles<T> kProductTiles{};

template <class In>
void weight_grad(const ImageJob& job, int64_t begin, int64_t end, void* scratch) {
    using L = Lanes<In>;
    using T = typename L::T;
    const ImagePlan plan(job);
    const int64_t padded = job.padded_features(), vectors = padded / L::kSize;
    const int64_t all = plan.all_bands(job), size = job.depth() * padded;
    const Planes<const In> grad{static_cast<const In*>(job.grad),
                                job.batch,
                                job.features,
                                job.h.out,
                                job.w.out,
                                job.channels_last};
    Memory memory(scratch);
    ImageRows<In> rows(job, memory);
    const Ring<In> grads(memory.take<T>(Ring<In>::size(1, vectors, job.w.out)), 1, vectors,
                         job.w.out, 0);
    grads.clear();
    // In place there are no vectors of features beyond the last.
    const int64_t used = ceil_div(job.features, L::kSize);
    const RowTiles tiles(job.across());
    SumsCall<T> call;
    const int64_t calls = job.h.kernel * ceil_div(used, int64_t(2)) * tiles.count;
    call.ahead_step = ceil_div(job.features * int64_t(sizeof(In)), calls);
    call.step = job.w.stride * job.channels;
    call.count = job.w.out;
    // Read where it lies, or from scratch memory.
    const bool in_place =
        std::is_same_v<In, T> && job.channels_last && job.features % L::kSize == 0;
    call.grad_step = in_place ? job.features : L::kSize;
    call.apart = in_place ? L::kSize : job.w.out * L::kSize;
    call.pitch = padded;
    for (int64_t piece = begin; piece < end; ++piece) {
        T* const sums = static_cast<T*>(job.sums) + piece * size;
        std::memset(sums, 0, size * sizeof(T));
        for (int64_t band = all * piece / plan.pieces; band < all * (piece + 1) / plan.pieces;
             ++band) {
            const int64_t n = band / plan.bands, first = band % plan.bands * plan.band;
            const int64_t left = job.h.out - first;
            rows.begin();
            for (int64_t r = first; r < first + (left < plan.band ? left : plan.band); ++r) {
                const T* const* const image = rows.of(n, r);
                call.ahead = reinterpret_cast<const char*>(grad.at(n, 0, (r + 1) * job.w.out));
                if (!in_place) grads.load(grad, n, 0, job.features, r, r + 1);
                for (int64_t kh = 0; kh < job.h.kernel; ++kh) {
                    if (image[kh] == nullptr) continue;
                    each_pair(used, [&](int64_t v, int64_t count) {
                        call.grad = grads.row(r, v, job.h.out);
                        if constexpr (std::is_same_v<In, T>)
                            if (in_place) call.grad = grad.at(n, v * L::kSize, r * job.w.out);
                        tiles.each([&](int64_t at, int64_t elements) {
                            call.elements = image[kh] + at;
                            call.sums = sums + (kh * job.across() + at) * padded + v * L::kSize;
                            kProductTiles<T>.tile[count - 1][elements](call);
                            call.ahead += call.count * call.ahead_step;
                        });
                    });
                }
            }
        }
    }
}

// Of the features [begin, end).
template <class In>
void total(const ImageJob& job, int64_t begin, int64_t end, void*) {
    using T = Accumulator<In>;
    const int64_t padded = job.padded_features(), size = job.depth() * padded;
    const int64_t pieces = ImagePlan(job).pieces;
    In* const to = static_cast<In*>(job.weight_grad);
    for (int64_t k = 0; k < job.depth(); ++k) {
        const int64_t c = k % job.channels, kw = k / job.channels % job.w.kernel;
        const int64_t kh = k / job.across();
        for (int64_t feature = begin; feature < end; ++feature) {
            const T* from = static_cast<const T*>(job.sums) + k * padded + feature;
            T sum = 0;
            for (int64_t piece = 0; piece < pieces; ++piece) sum += from[piece * size];
            to[((feature * job.channels + c) * job.h.kernel + kh) * job.w.kernel + kw] =
                narrow<In>(sum);
        }
    }
}

}  // namespace
}  // namespace conv

ImageKernel image_weight_grad(DType dtype, ImageStep step) {
    return for_float(dtype, [&](auto zero) -> ImageKernel {
        using In = decltype(zero);
        return step == ImageStep::WeightGrad ? conv::weight_grad<In> : conv::total<In>;
    });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
