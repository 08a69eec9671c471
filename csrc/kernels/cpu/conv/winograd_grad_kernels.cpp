// The gradient of a 3x3 kernel in Winograd's transformed domain, compiled once for each instruction
// set: dU = V^T (A dy A^T) summed over tiles for each point, and then G^T dU G.
#include "kernels/cpu/conv/winograd_tables.h"
#include "kernels/cpu/conv/winograd_tiles.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// Transforms vectors of a tile of 4x4 pixels: at(a, c)(b) is where element c of pixel (a, b) is.
template <class In, class At>
POOLING_EXT_INLINE void transform_grad(int64_t features, int64_t points,
                                       Accumulator<In>* __restrict to, const At& at) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    const auto one = [&](int64_t c, const auto& get) POOLING_EXT_INLINE_LAMBDA {
        X half[4][6];
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a) {
            const auto row = at(a, c);
            grad_points(get(row(0)), get(row(1)), get(row(2)), get(row(3)), half[a], 1, T(0));
        }
#pragma GCC unroll 6
        for (int b = 0; b < 6; ++b) {
            X column[6];
            grad_points(half[0][b], half[1][b], half[2][b], half[3][b], column, 1, T(0));
#pragma GCC unroll 6
            for (int a = 0; a < 6; ++a) L::keep(to + (a * 6 + b) * points + c, column[a]);
        }
    };
    int64_t c = 0;
    for (; c + L::kSize <= features; c += L::kSize)
        one(c, [](const In* from) POOLING_EXT_INLINE_LAMBDA { return L::get(from); });
    if (c < features)
        one(c,
            [&](const In* from) POOLING_EXT_INLINE_LAMBDA { return L::get(from, features - c); });
}

// Tiles [first, last) of features [from, from + features) of all.
template <class In>
void transform_grads(const WinogradShape& s, const In* grad, int64_t first, int64_t last,
                     int64_t from, int64_t features, Accumulator<In>* d, int64_t row, int64_t point,
                     const In* zeros) {
    const int64_t pixel = s.groups * s.features, line = s.out_width * pixel;
    TileWalk walk(s, first);
    for (int64_t t = first; t < last; ++t, walk.next(), d += row) {
        const TilePlace place = walk.place();
        const In* const corner =
            grad + ((place.image * s.out_height + place.y) * s.out_width + place.x) * pixel + from;
        const int64_t rows = s.out_height - place.y, columns = s.out_width - place.x;
        if (rows >= kWinogradOut && columns >= kWinogradOut) {
            const auto inside = [=](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
                return PixelRow<In>{made_anew(corner + c) + a * line, pixel, 3 * pixel, 5 * pixel};
            };
            transform_grad<In>(features, point, d, inside);
            continue;
        }
        const auto anywhere = [=](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
            return [=](int b) POOLING_EXT_INLINE_LAMBDA {
                return (a < rows && b < columns ? corner + a * line + b * pixel : zeros) + c;
            };
        };
        transform_grad<In>(features, point, d, anywhere);
    }
}

template <class In>
void sum_products(const WinogradGradJob& job, const WinogradRegion& region, int64_t first,
                  int64_t last, void* sums, void* scratch) {
    using T = Accumulator<In>;
    constexpr WinogradMachine m = machine_of<In>();
    const WinogradShape& s = job.shape;
    const WinogradGradScratch parts(region, m, job.block);
    T* const v = static_cast<T*>(scratch);
    T* const d = v + parts.v_size();
    In* const zeros = reinterpret_cast<In*>(d + parts.d_size());
    std::memset(zeros, 0, size_t(larger(parts.v_row, parts.d_row)) * sizeof(In));
    const int64_t channels = region.channels(), wide = region.vectors() * m.lanes;
    const int64_t feature = region.first_vector * m.lanes;
    const int64_t features = smaller(wide, s.features - feature);
    T* const to = static_cast<T*>(sums);
    const RowTiles row_tiles(channels);
    for (int64_t tile = first; tile < last; tile += job.block) {
        const int64_t end = smaller(tile + job.block, last);
        transform_inputs<In>(s, static_cast<const In*>(job.x), tile, end,
                             region.group * s.channels + region.first_channel, channels, v,
                             parts.v_row, parts.v_point, zeros);
        transform_grads<In>(s, static_cast<const In*>(job.grad), tile, end,
                            region.group * s.features + feature, features, d, parts.d_row,
                            parts.d_point, zeros);
        for (int64_t point = 0; point < kWinogradPoints; ++point)
            for (int64_t vector = 0; vector < region.vectors(); vector += 2) {
                const int64_t many = smaller(2, region.vectors() - vector);
                const T* const b = d + point * parts.d_point + vector * m.lanes;
                T* const c = to + point * channels * wide + vector * m.lanes;
                row_tiles.each([&](int64_t row, int64_t rows) {
                    kTiles<T>.outer[many - 1][rows](end - tile, v + point * parts.v_point + row,
                                                    parts.v_row, b, parts.d_row, c + row * wide,
                                                    wide, tile > first);
                });
            }
    }
}

template <class In>
void finish(const WinogradGradJob& job, const WinogradRegion& region, const void* sums,
            int64_t splits) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    constexpr WinogradMachine m = machine_of<In>();
    constexpr int64_t kTogether = L::kSize;  // channels, whose results lie together
    const int64_t channels = region.channels(), wide = region.vectors() * m.lanes;
    const int64_t size = region.size(m.lanes);
    const bool dense = job.strides[1] == 9 && job.strides[2] == 3 && job.strides[3] == 1;
    alignas(64) T taps[kTogether * 9][L::kSize];
    for (int64_t some = 0; some < channels; some += kTogether)
        for (int64_t vector = 0; vector < region.vectors(); ++vector) {
            const int64_t feature = (region.first_vector + vector) * m.lanes;
            const int64_t lanes = smaller(m.lanes, job.shape.features - feature);
            const int64_t count = smaller(kTogether, channels - some);
            for (int64_t k = 0; k < count; ++k) {
                const T* const from =
                    static_cast<const T*>(sums) + (some + k) * wide + vector * m.lanes;
                X half[3][6];
#pragma GCC unroll 6
                for (int b = 0; b < 6; ++b) {
                    X u[6];
#pragma GCC unroll 6
                    for (int a = 0; a < 6; ++a) {
                        const T* const point = from + (a * 6 + b) * channels * wide;
                        u[a] = L::own(point);
                        for (int64_t i = 1; i < splits; ++i) u[a] += L::own(point + i * size);
                    }
                    weight_grad_points(u[0], u[1], u[2], u[3], u[4], u[5], &half[0][b], 6, T(0));
                }
#pragma GCC unroll 3
                for (int a = 0; a < 3; ++a) {
                    X row[3];
                    weight_grad_points(half[a][0], half[a][1], half[a][2], half[a][3], half[a][4],
                                       half[a][5], row, 1, T(0));
#pragma GCC unroll 3
                    for (int b = 0; b < 3; ++b) L::keep(taps[k * 9 + a * 3 + b], row[b]);
                }
            }
            In* const to = static_cast<In*>(job.result) +
                           (region.group * job.shape.features + feature) * job.strides[0] +
                           (region.first_channel + some) * job.strides[1];
            if (dense && count == kTogether) {
                // A feature's channels and their taps lie together.
                for (int64_t piece = 0; piece < 9; ++piece) {
                    X rows[L::kSize];
#pragma GCC unroll 16
                    for (int64_t i = 0; i < L::kSize; ++i)
                        rows[i] = L::own(taps[piece * L::kSize + i]);
                    L::transpose(rows);
                    for (int64_t lane = 0; lane < lanes; ++lane)
                        L::put(to + lane * job.strides[0] + piece * L::kSize, rows[lane]);
                }
                continue;
            }
            for (int64_t i = 0; i < count * 9; ++i)
                for (int64_t lane = 0; lane < lanes; ++lane)
                    POOLING_EXT_ISA::put(to,
                                         lane * job.strides[0] + i / 9 * job.strides[1] +
                                             i % 9 / 3 * job.strides[2] + i % 3 * job.strides[3],
                                         narrow<In>(taps[i][lane]));
        }
}

}  // namespace
}  // namespace conv

void (*winograd_grad(DType dtype))(const WinogradGradJob&, const WinogradRegion&, int64_t, int64_t,
                                   void*, void*) {
    switch (dtype) {
        case DType::Float32:
            return conv::sum_products<float>;
        case DType::Float64:
            return conv::sum_products<double>;
        case DType::BFloat16:
            return conv::sum_products<BFloat16>;
        case DType::Float16:
            return conv::sum_products<Float16>;
        default:
            return nullptr;
    }
}

void (*winograd_grad_end(DType dtype))(const WinogradGradJob&, const WinogradRegion&, const void*,
                                       int64_t) {
    switch (dtype) {
        case DType::Float32:
            return conv::finish<float>;
        case DType::Float64:
            return conv::finish<double>;
        case DType::BFloat16:
            return conv::finish<BFloat16>;
        case DType::Float16:
            return conv::finish<Float16>;
        default:
            return nullptr;
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
