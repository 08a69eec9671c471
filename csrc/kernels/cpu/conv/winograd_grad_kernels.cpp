// The gradient of a kernel in Winograd's transformed domain, compiled once for each instruction
// set: dU = V^T (A dy A^T) summed over tiles for each point, and then G^T dU G.
#include "kernels/cpu/conv/winograd_tables.h"
#include "kernels/cpu/conv/winograd_tiles.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace conv {
namespace {

// A tile of the output's gradient, into the transformed domain.
struct OfGrad {
    static constexpr int64_t from(const WinogradAxis& axis) { return axis.out; }
    template <class Axis, class From, class To, class T>
    static POOLING_EXT_INLINE void along(const From& from, To& to, T zero) {
        Axis::grad(from, to, zero);
    }
};

// Tiles [first, last) of features [from, from + features) of a group.
template <class In, class Tile>
void transform_grads(const WinogradShape& s, const Pixels<const In>& grad, int64_t first,
                     int64_t last, int64_t from, int64_t features, Accumulator<In>* d, int64_t row,
                     int64_t point, const In* zeros) {
    const int64_t pixel = s.dilation_x * grad.strides.column;
    const int64_t line = s.dilation_y * grad.strides.row;
    TileWalk walk(s, first);
    for (int64_t t = first; t < last; ++t, walk.next(), d += row) {
        const WinogradPosition position = walk.position();
        const In* const corner = grad.at(position.image, position.y, position.x) + from;
        const int64_t rows = s.rows_of(position), columns = s.columns_of(position);
        if (rows == Tile::kSizes.rows.out && columns == Tile::kSizes.columns.out) {
            const auto inside = [=](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
                return PixelRow<In>(made_anew(corner + c) + a * line, pixel);
            };
            transform_tile<In, Tile, OfGrad>(features, point, d, inside);
            continue;
        }
        const auto anywhere = [=](int a, int64_t c) POOLING_EXT_INLINE_LAMBDA {
            return [=](int b) POOLING_EXT_INLINE_LAMBDA {
                return (a < rows && b < columns ? corner + a * line + b * pixel : zeros) + c;
            };
        };
        transform_tile<In, Tile, OfGrad>(features, point, d, anywhere);
    }
}

template <class In, class Tile>
void sum_products(const WinogradGradJob& job, const WinogradRegion& region, int64_t first,
                  int64_t last, void* sums, void* scratch) {
    using T = Accumulator<In>;
    constexpr WinogradMachine m = machine_of<In>();
    const WinogradShape& s = job.shape;
    const WinogradGradScratch parts(s, region, m, job.block);
    T* const v = static_cast<T*>(scratch);
    T* const d = v + parts.v_size();
    In* const zeros = reinterpret_cast<In*>(d + parts.d_size());
    const int64_t zero_row = larger(parts.v_row, parts.d_row);
    std::memset(zeros, 0, size_t(zero_row) * sizeof(In));
    In* const x_band = zeros + zero_row;
    In* const grad_band = x_band + parts.x_size;
    const In* const x = static_cast<const In*>(job.x);
    const In* const grad = static_cast<const In*>(job.grad);
    Pixels<const In> inputs{x + region.group * s.channels, s.in_strides()};
    Pixels<const In> grads{grad + region.group * s.features, s.out_strides()};
    const int64_t channels = region.channels(), wide = region.vectors() * m.lanes;
    const int64_t feature = region.first_vector * m.lanes;
    const int64_t features = smaller(wide, s.features - feature);
    T* const to = static_cast<T*>(sums);
    const RowTiles row_tiles(channels);
    for (int64_t tile = first, end; tile < last; tile = end) {
        end = winograd_block_end(s, tile, job.block, last);
        if (s.planar) {
            inputs = read_band(x, s.height, s.width, s.channels, winograd_input_band(s, tile, end),
                               region.first_channel, region.last_channel, x_band);
            grads = read_band(grad, s.out_height, s.out_width, s.features,
                              winograd_output_band(s, tile, end), feature, feature + features,
                              grad_band);
        }
        transform_inputs<In, Tile>(s, inputs, tile, end, region.first_channel, region.last_channel,
                                   v, parts.v_row, parts.v_point, zeros);
        transform_grads<In, Tile>(s, grads, tile, end, feature, features, d, parts.d_row,
                                  parts.d_point, zeros);
        each_point(Tile::kSizes, [&](int64_t point, int64_t weight_point, bool again) {
            for (int64_t vector = 0; vector < region.vectors(); vector += 2) {
                const int64_t many = smaller(2, region.vectors() - vector);
                const T* const b = d + point * parts.d_point + vector * m.lanes;
                T* const c = to + weight_point * channels * wide + vector * m.lanes;
                row_tiles.each([&](int64_t row, int64_t rows) {
                    kTiles<T>.outer[many - 1][rows](end - tile, v + point * parts.v_point + row,
                                                    parts.v_row, b, parts.d_row, c + row * wide,
                                                    wide, again || tile > first);
                });
            }
        });
    }
}

template <class In, class Tile>
void finish(const WinogradGradJob& job, const WinogradRegion& region, const void* sums,
            int64_t splits) {
    using L = Lanes<In>;
    using T = Accumulator<In>;
    using X = typename L::X;
    constexpr WinogradMachine m = machine_of<In>();
    constexpr int64_t kTogether = L::kSize;  // channels, whose results lie together
    const int64_t channels = region.channels(), wide = region.vectors() * m.lanes;
    const WinogradShape& s = job.shape;
    const int64_t* const strides = job.strides;
    const int64_t size = region.size(s, m.lanes);
    constexpr WinogradAxis kRows = Tile::Rows::kSizes, kColumns = Tile::Columns::kSizes;
    constexpr int64_t kTaps = Tile::kSizes.taps();
    const bool dense = s.planes == 1 && strides[1] == kTaps && strides[4] == 1 &&
                       (kRows.taps == 1 || strides[3] == kColumns.taps);
    alignas(64) T taps[kTogether * kTaps][L::kSize];
    for (int64_t some = 0; some < channels; some += kTogether)
        for (int64_t vector = 0; vector < region.vectors(); ++vector) {
            const int64_t feature = (region.first_vector + vector) * m.lanes;
            const int64_t lanes = smaller(m.lanes, s.features - feature);
            const int64_t count = smaller(kTogether, channels - some);
            for (int64_t k = 0; k < count; ++k) {
                const T* const from =
                    static_cast<const T*>(sums) + (some + k) * wide + vector * m.lanes;
                X half[kRows.taps][kColumns.weight_points];
#pragma GCC unroll 10
                for (int b = 0; b < kColumns.weight_points; ++b) {
                    X u[kRows.weight_points], column[kRows.taps];
#pragma GCC unroll 10
                    for (int a = 0; a < kRows.weight_points; ++a) {
                        const T* const point =
                            from + (a * kColumns.weight_points + b) * channels * wide;
                        u[a] = L::own(point);
                        for (int64_t i = 1; i < splits; ++i) u[a] += L::own(point + i * size);
                    }
                    Tile::Rows::weight_grad(u, column, T(0));
#pragma GCC unroll 7
                    for (int a = 0; a < kRows.taps; ++a) half[a][b] = column[a];
                }
#pragma GCC unroll 7
                for (int a = 0; a < kRows.taps; ++a) {
                    X row[kColumns.taps];
                    Tile::Columns::weight_grad(half[a], row, T(0));
#pragma GCC unroll 7
                    for (int b = 0; b < kColumns.taps; ++b)
                        L::keep(taps[k * kTaps + a * kColumns.taps + b], row[b]);
                }
            }
            In* const of_features =
                static_cast<In*>(job.result) + (region.group * s.features + feature) * strides[0];
            if (dense && count == kTogether) {
                // A feature's channels and their taps lie together.
                In* const to = of_features + (region.first_channel + some) * strides[1];
                for (int64_t piece = 0; piece < kTaps; ++piece) {
                    X rows[L::kSize];
#pragma GCC unroll 16
                    for (int64_t i = 0; i < L::kSize; ++i)
                        rows[i] = L::own(taps[piece * L::kSize + i]);
                    L::transpose(rows);
                    for (int64_t lane = 0; lane < lanes; ++lane)
                        L::put(to + lane * strides[0] + piece * L::kSize, rows[lane]);
                }
                continue;
            }
            for (int64_t k = 0; k < count; ++k) {
                const int64_t channel = region.first_channel + some + k;
                In* const to = of_features + channel / s.channels * strides[2] +
                               channel % s.channels * strides[1];
                for (int64_t tap = 0; tap < kTaps; ++tap) {
                    const int64_t at =
                        tap / kColumns.taps * strides[3] + tap % kColumns.taps * strides[4];
                    for (int64_t lane = 0; lane < lanes; ++lane)
                        POOLING_EXT_ISA::put(to, lane * strides[0] + at,
                                             narrow<In>(taps[k * kTaps + tap][lane]));
                }
            }
        }
}

template <class Tile>
auto grad_of(DType dtype) {
    return for_float(dtype, [](auto zero) -> decltype(WinogradKernels::grad) {
        return sum_products<decltype(zero), Tile>;
    });
}

template <class Tile>
auto grad_end_of(DType dtype) {
    return for_float(dtype, [](auto zero) -> decltype(WinogradKernels::grad_end) {
        return finish<decltype(zero), Tile>;
    });
}

}  // namespace
}  // namespace conv

void (*winograd_grad(DType dtype, WinogradKind kind))(const WinogradGradJob&, const WinogradRegion&,
                                                      int64_t, int64_t, void*, void*) {
    return conv::of_kind(kind, [&](auto tile) { return conv::grad_of<decltype(tile)>(dtype); });
}

void (*winograd_grad_end(DType dtype, WinogradKind kind))(const WinogradGradJob&,
                                                          const WinogradRegion&, const void*,
                                                          int64_t) {
    return conv::of_kind(kind, [&](auto tile) { return conv::grad_end_of<decltype(tile)>(dtype); });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
