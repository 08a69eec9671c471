// Batch normalization, ReLU and max pooling as one step, compiled once for each instruction set.
#include "kernels/cpu/norm/batch_norm_relu_max_pool.h"
#include "kernels/cpu/pool/max_pool_backward_nhwc.h"
#include "kernels/cpu/pool/pool_nhwc.h"

namespace pooling_ext::POOLING_EXT_ISA {
namespace {

// A coefficient of each channel in the type that is computed in.
template <class T>
__attribute__((noinline)) T* row_of(const double* values, int64_t channels, Scratch& scratch,
                                    int64_t pixels = 1) {
    if (values == nullptr) return nullptr;
    T* const row = scratch.take<T>(pixels * channels);
    for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < channels; ++c) row[i * channels + c] = T(values[c]);
    return row;
}

// Calls run(begin, end) for runs of rows, the last first: what an earlier step read last is then
// still in the cache.
template <class Run>
void backwards(int64_t begin, int64_t end, const Run& run) {
    constexpr int64_t kRows = 16;
    for (int64_t last = end; last > begin; last -= kRows)
        run(last - kRows > begin ? last - kRows : begin, last);
}

// What is compared: of floats the normalized value, made as often as there are windows over it.
template <class In>
struct Normalized {
    using T = In;
    const T* __restrict center, * __restrict scale, * __restrict shift;

    POOLING_EXT_INLINE T operator()(In x, int64_t c) const {
        return (x - center[c]) * scale[c] + shift[c];
    }
    static POOLING_EXT_INLINE bool nan(T z) { return z != z; }
    static POOLING_EXT_INLINE In store(T z) { return z; }
    // A sum of all that was seen is a NaN if one of them was (or, at worst, without need).
    static POOLING_EXT_INLINE T see(T seen, T z) { return seen + z; }
    static POOLING_EXT_INLINE bool any_nan(T seen, T) { return seen != seen; }
};

// Of 16-bit floats, which are normalized and rounded before, the bits as an integer, twice as many
// to a register: those above zero are in the same order. A NaN has no sign.
template <class In>
struct Rounded {
    using T = int16_t;
    static constexpr T kInfinity = std::is_same_v<In, BFloat16> ? 0x7f80 : 0x7c00;

    POOLING_EXT_INLINE T operator()(In x, int64_t) const { return T(x.bits); }
    static POOLING_EXT_INLINE bool nan(T z) { return z > kInfinity; }
    static POOLING_EXT_INLINE In store(T z) { return {uint16_t(z)}; }
    static POOLING_EXT_INLINE T see(T seen, T) { return seen; }
    static POOLING_EXT_INLINE bool any_nan(T, T best) { return nan(best); }

    static POOLING_EXT_INLINE In round(float z) {
        const uint16_t bits = narrow<In>(z).bits;
        const uint16_t magnitude = bits & 0x7fff;
        return {magnitude > kInfinity ? magnitude : bits};
    }
};

template <class In>
using Key = std::conditional_t<sizeof(In) == 2, Rounded<In>, Normalized<In>>;

// y[i] = what Rounded compares of x[i], for rows of a few pixels.
template <class In>
void normalize(const In* __restrict x, In* __restrict y, int64_t n, const float* __restrict center,
               const float* __restrict scale, const float* __restrict shift) {
    constexpr int64_t kAhead = 4096, kLine = 64 / sizeof(In);
    for (int64_t i = 0; i < n; i += kLine)
        __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(x + i) + kAhead));
    for (int64_t i = 0; i < n; ++i)
        put(y, i, Rounded<In>::round((widen(x[i]) - center[i]) * scale[i] + shift[i]));
}

// The maxima of a window above zero and the offsets of the first that have them; x holds its
// elements in order. Returns whether there was a NaN.
template <int kCount, bool kOffsets, class In>
bool max_of_window(In* __restrict y, uint8_t* __restrict winners, const In* const* elements,
                   const uint8_t* offsets, int64_t n, const Key<In> key) {
    using T = typename Key<In>::T;
    using Word = BitsOf<T>;
    const In* x[kCount];
    Word offset[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = elements[k], offset[k] = offsets[k];
    Word strange = 0;
    for (int64_t i = 0; i < n; ++i) {
        T best = T(0), seen = T(0);
        Word where = Word(kByteWindow);
        for (int k = 0; k < kCount; ++k) {
            const T v = key(x[k][i], i);
            const bool wins = v > best;
            best = wins ? v : best;
            where = wins ? offset[k] : where;
            seen = Key<In>::see(seen, v);
        }
        put(y, i, Key<In>::store(best));
        if constexpr (kOffsets) winners[i] = uint8_t(where);
        strange |= Word(-Word(Key<In>::any_nan(seen, best)));
    }
    return strange != 0;
}

// The same where there may be NaNs, of which the last wins.
template <class In>
__attribute__((noinline)) void max_with_nan(In* y, uint8_t* winners, const In* const* x,
                                            const uint8_t* offsets, int count, int64_t n,
                                            const Key<In>& key) {
    for (int64_t i = 0; i < n; ++i) {
        auto best = typename Key<In>::T(0);
        int64_t where = kByteWindow;
        for (int k = 0; k < count; ++k)
            if (const auto v = key(x[k][i], i); v > best || Key<In>::nan(v))
                best = v, where = offsets[k];
        put(y, i, Key<In>::store(best));
        if (winners) winners[i] = uint8_t(where);
    }
}

// The elements of a window that a PixelWalker visits. BnReluMaxPoolJob::taken() leaves out four
// rows.
template <class Rows, class Columns>
constexpr int count_of(Rows, Columns) {
    return Rows::value <= BnReluMaxPoolJob::kMost ? Rows::value * Columns::value : 0;
}

// Pools rows [oh_begin, oh_end) of the outputs of an image, whose tensors begin at x, y and
// winners.
template <bool kOffsets, class In>
void pool(const PoolParams& p, const In* x, In* y, uint8_t* winners, int64_t oh_begin,
          int64_t oh_end, const Key<In>& key) {
    PixelWalker<In> walk(p);
    const int64_t channels = p.channels;
    for (int64_t oh = oh_begin; oh < oh_end; ++oh) {
        In* const row = y + oh * p.out_row();
        uint8_t* const winner_row = kOffsets ? winners + oh * p.out_row() : nullptr;
        walk(x, 0, oh, [&](const Taps<In>& taps, auto rows, auto columns, int64_t o) {
            constexpr int kCount = count_of(rows, columns);
            In* const to = row + o * channels;
            uint8_t* const winner = kOffsets ? winner_row + o * channels : nullptr;
            if constexpr (kCount == 0) {
                fill(to, Ordered<In>::store(Ordered<In>::lowest()), channels);
                if constexpr (kOffsets) fill(winner, uint8_t(kByteWindow), channels);
            } else {
                const In* elements[kCount];
                uint8_t offsets[kCount];
                for (int k = 0; k < kCount; ++k) {
                    elements[k] = taps.at(k, columns.value);
                    offsets[k] = uint8_t(walk.offset(o, k, columns.value));
                }
                if (max_of_window<kCount, kOffsets>(to, winner, elements, offsets, channels, key))
                    max_with_nan(to, winner, elements, offsets, kCount, channels, key);
            }
        });
    }
}

// Calls visit(image, begin, end) for the runs of rows of one image that are in [begin, end).
template <class Visit>
void each_image(int64_t begin, int64_t end, int64_t rows, const Visit& visit) {
    while (begin < end) {
        const int64_t image = begin / rows, first = begin - image * rows;
        const int64_t left = end - begin, last = rows - first < left ? rows : first + left;
        visit(image, first, last);
        begin += last - first;
    }
}

template <class In, bool kOffsets>
void forward_rows(const BnReluMaxPoolJob& job, int64_t begin, int64_t end, Scratch scratch) {
    const PoolParams& p = job.pool.p;
    const BatchNormJob& norm = job.norm;
    const In* const x = static_cast<const In*>(norm.x);
    In* const y = static_cast<In*>(job.pool.dst);
    uint8_t* const winners = static_cast<uint8_t*>(job.pool.offsets_out);
    const int64_t in = p.in_plane() * p.channels, out = p.out_plane() * p.channels;
    using T = Accumulator<In>;
    if constexpr (sizeof(In) > 2) {
        const Key<In> key{row_of<T>(norm.center, p.channels, scratch),
                          row_of<T>(norm.scale, p.channels, scratch),
                          row_of<T>(norm.shift, p.channels, scratch)};
        backwards(begin, end, [&](int64_t first, int64_t last) {
            each_image(first, last, p.h.out, [&](int64_t image, int64_t from, int64_t to) {
                pool<kOffsets>(p, x + image * in, y + image * out,
                               kOffsets ? winners + image * out : nullptr, from, to, key);
            });
        });
    } else {
        const int64_t at_once = job.rows_at_once(), row = norm.row(), pixels = row / p.channels;
        const T* const center = row_of<T>(norm.center, p.channels, scratch, pixels);
        const T* const scale = row_of<T>(norm.scale, p.channels, scratch, pixels);
        const T* const shift = row_of<T>(norm.shift, p.channels, scratch, pixels);
        In* const tile = scratch.take<In>(job.tile());
        each_image(begin, end, p.h.out, [&](int64_t image, int64_t from, int64_t to) {
            int64_t held = 0, held_end = 0;  // rows of the image in the tile
            for (int64_t oh = from; oh < to; oh += at_once) {
                const int64_t oh_end = oh + at_once < to ? oh + at_once : to;
                const int64_t first = p.h.start(oh) + p.h.first(oh);
                const int64_t end_row = p.h.start(oh_end - 1) + p.h.end(oh_end - 1);
                const int64_t last = end_row < p.h.in ? end_row : p.h.in;
                // What windows share is kept.
                int64_t fresh = first;
                if (first >= held && first < held_end) {
                    fresh = held_end;
                    std::memmove(tile, tile + (first - held) * p.in_row(),
                                 (held_end - first) * p.in_row() * sizeof(In));
                }
                held = first, held_end = last;
                const In* const source = x + image * in + fresh * p.in_row();
                In* const to_row = tile + (fresh - first) * p.in_row();
                const int64_t n = (last - fresh) * p.in_row();
                for (int64_t at = 0; at < n; at += row)
                    normalize(source + at, to_row + at, n - at < row ? n - at : row, center, scale,
                              shift);
                // The tile holds only these rows of the plane.
                const In* const plane = reinterpret_cast<const In*>(
                    uintptr_t(tile) - first * p.in_row() * int64_t(sizeof(In)));
                pool<kOffsets>(p, plane, y + image * out,
                               kOffsets ? winners + image * out : nullptr, oh, oh_end, Key<In>{});
            }
        });
    }
}

template <class In>
void forward(const BnReluMaxPoolJob& job, int64_t begin, int64_t end, void* memory) {
    if (job.pool.offsets_out)
        forward_rows<In, true>(job, begin, end, Scratch(memory));
    else
        forward_rows<In, false>(job, begin, end, Scratch(memory));
}

// s1 += g and s2 += g * (x - center) for the channels of a window, of which x holds the elements.
template <int kCount, class In, class T>
void add_winners(const In* __restrict grad, const uint8_t* __restrict winners,
                 const In* const* elements, const uint8_t* offsets, int64_t n,
                 const T* __restrict center, T* __restrict s1, T* __restrict s2) {
    using Bits = BitsOf<In>;
    const In* x[kCount];
    Bits offset[kCount];
    for (int k = 0; k < kCount; ++k) x[k] = elements[k], offset[k] = offsets[k];
    for (int64_t i = 0; i < n; ++i) {
        const Bits at = winners[i];
        Bits won = 0;
        for (int k = 0; k < kCount; ++k) won |= Bits(bit_cast<Bits>(x[k][i]) & same(at, offset[k]));
        const T g =
            widen(bit_cast<In>(Bits(bit_cast<Bits>(grad[i]) & ~same(at, Bits(kByteWindow)))));
        s1[i] += g;
        s2[i] += g * (widen(bit_cast<In>(won)) - center[i]);
    }
}

template <class In>
void sums(const BnReluMaxPoolJob& job, int64_t begin, int64_t end, void* memory) {
    using T = Accumulator<In>;
    // So that no lane sums many.
    constexpr int64_t kPixels = 64;
    Scratch scratch(memory);
    const PoolParams& p = job.pool.p;
    const int64_t channels = p.channels, bands = job.bands();
    const T* const center = row_of<T>(job.norm.center, channels, scratch);
    T* const lanes = scratch.take<T>(2 * channels);
    const In* const x = static_cast<const In*>(job.norm.x);
    const In* const grad = static_cast<const In*>(job.pool.src);
    const uint8_t* const winners = static_cast<const uint8_t*>(job.pool.offsets_in);
    PixelWalker<In> walk(p);
    for (int64_t band = begin; band < end; ++band) {
        double* const total = job.norm.sums + band * 2 * channels;
        for (int64_t i = 0; i < 2 * channels; ++i) total[i] = 0, lanes[i] = T(0);
        int64_t pending = 0;
        const auto flush = [&] {
            for (int64_t i = 0; i < 2 * channels; ++i) {
                total[i] += double(lanes[i]);
                lanes[i] = T(0);
            }
            pending = 0;
        };
        const int64_t image = band / bands, first = band % bands * job.band();
        const int64_t last = first + job.band() < p.h.out ? first + job.band() : p.h.out;
        const In* const plane = x + image * p.in_plane() * channels;
        for (int64_t oh = first; oh < last; ++oh) {
            const int64_t row = (image * p.h.out + oh) * p.out_row();
            walk(plane, 0, oh, [&](const Taps<In>& taps, auto rows, auto columns, int64_t o) {
                constexpr int kCount = count_of(rows, columns);
                if constexpr (kCount > 0) {
                    const In* elements[kCount];
                    uint8_t offsets[kCount];
                    for (int k = 0; k < kCount; ++k) {
                        elements[k] = taps.at(k, columns.value);
                        offsets[k] = uint8_t(walk.offset(o, k, columns.value));
                    }
                    const int64_t at = row + o * channels;
                    add_winners<kCount>(grad + at, winners + at, elements, offsets, channels,
                                        center, lanes, lanes + channels);
                    if (++pending == kPixels) flush();
                }
            });
        }
        flush();
    }
}

// The input's gradient from the sum of those of a pixel's windows.
template <class In, bool kBatch>
struct Spread {
    using T = Accumulator<In>;
    static constexpr bool kOne = false;
    const In* __restrict x;
    const T* __restrict center, * __restrict scale, * __restrict slope, * __restrict offset;

    template <class Kind, class X = typename Kind::X>
    POOLING_EXT_INLINE X operator()(Kind kind, int64_t c, X g) const {
        X sum = g * kind.own(scale + c);
        if constexpr (kBatch)
            sum += (kind.get(x + c) - kind.own(center + c)) * kind.own(slope + c) +
                   kind.own(offset + c);
        return sum;
    }
};

template <class In, bool kBatch>
void backward_rows(const BnReluMaxPoolJob& job, int64_t begin, int64_t end, Scratch scratch) {
    using T = Accumulator<In>;
    constexpr int64_t kAhead = 2048, kLine = 64;
    const int64_t channels = job.norm.channels;
    const auto coefficients = [&](const double* values) {
        return row_of<T>(values, channels, scratch);
    };
    Spread<In, kBatch> spread{nullptr, coefficients(job.norm.center), coefficients(job.norm.scale),
                              coefficients(job.norm.slope), coefficients(job.norm.offset)};
    Job pool = job.pool;
    pool.dst = job.norm.y;
    MaxPoolBackwardNhwc<In> gatherer(pool, scratch);
    const In* const x = static_cast<const In*>(job.norm.x);
    backwards(begin, end, [&](int64_t first, int64_t last) {
        gather_rows<In>(
            pool, first, last, [&] { gatherer.start(); },
            [&](const SpreadRow<In>& row) { gatherer.add(row); },
            [&](In* dst) {
                const In* const from = x + (dst - static_cast<In*>(pool.dst));
                gatherer.finish(dst, [&](int64_t i) {
                    spread.x = from + i * channels;
                    if constexpr (kBatch) {
                        const char* ahead =
                            reinterpret_cast<const char*>(uintptr_t(spread.x) + kAhead);
                        for (int64_t b = 0; b < channels * int64_t(sizeof(In)); b += kLine)
                            __builtin_prefetch(ahead + b);
                    }
                    return spread;
                });
            });
    });
}

template <class In>
void backward(const BnReluMaxPoolJob& job, int64_t begin, int64_t end, void* memory) {
    if (job.norm.slope)
        backward_rows<In, true>(job, begin, end, Scratch(memory));
    else
        backward_rows<In, false>(job, begin, end, Scratch(memory));
}

template <class In>
BnReluMaxPoolKernel bn_relu_max_pool_of(BnReluMaxPoolStep step) {
    constexpr BnReluMaxPoolKernel steps[] = {forward<In>, sums<In>, backward<In>};
    return steps[int(step)];
}

}  // namespace

BnReluMaxPoolKernel bn_relu_max_pool(DType dtype, BnReluMaxPoolStep step) {
    if (!BnReluMaxPoolJob::has(dtype)) return nullptr;
    return dtype == DType::Float32 ? bn_relu_max_pool_of<float>(step)
                                   : bn_relu_max_pool_of<BFloat16>(step);
}

}  // namespace pooling_ext::POOLING_EXT_ISA
