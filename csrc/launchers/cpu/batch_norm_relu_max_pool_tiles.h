// Batch normalization, ReLU and max pooling tile by tile, for windows without kernels of their own.
//
// What is pooled is made in memory that stays in the cache, by the kernels of batch_norm_act and
// max_pool; so is its gradient.
#pragma once

#include <algorithm>

#include "kernels/cpu/pool/max_pool.h"
#include "launchers/cpu/batch_norm_launch.h"

namespace pooling_ext {

class BnReluMaxPoolTiles {
  public:
    // A part of the input: rows of an image in channels-last, else some of its planes.
    struct Tile {
        int64_t image;
        int64_t begin, end;          // rows, or planes
        int64_t out_begin, out_end;  // in the forward pass, the rows of the output that pool it
    };

    BnReluMaxPoolTiles(const BatchNormJob& norm, const Job& pool, DType dtype, size_t element)
        : norm_(norm), pool_(pool), dtype_(dtype), element_(element) {
        // A tile is to stay in the second-level cache.
        constexpr int64_t kTile = 1 << 18;
        const PoolParams& p = pool.p;
        const int64_t bytes = int64_t(element);
        if (norm.channels_last) {
            const int64_t row = p.in_row() * bytes;
            rows_ = row < kTile ? kTile / row : 1;
            out_rows_ = rows_ / p.h.stride > 0 ? rows_ / p.h.stride : 1;
            tiles_ = ceil_div(p.h.in, rows_);
            out_tiles_ = ceil_div(p.h.out, out_rows_);
        } else {
            const int64_t plane = p.in_plane() * bytes;
            planes_ = plane < kTile ? kTile / plane : 1;
            tiles_ = out_tiles_ = ceil_div(norm.channels, planes_);
        }
    }

    int64_t tiles(bool forward) const { return norm_.batch * (forward ? out_tiles_ : tiles_); }

    void forward(int64_t begin, int64_t end) const {
        const BatchNormKernel act = kernels::batch_norm(dtype_, Step::Act);
        const Kernel maxima =
            kernels::max_pool(dtype_, pool_.offsets_out ? Offsets::Byte : Offsets::None);
        const ThreadScratch<1> memory(largest_tile());
        void* const buffer = memory.get();
        for (int64_t i = begin; i < end; ++i) {
            const Tile tile = forward_tile(i);
            BatchNormJob norm = norm_of(tile);
            norm.y = buffer;
            run_all(act, norm, Units(norm, Step::Act).count);
            Job pool = pool_;
            PoolParams& p = pool.p;
            int64_t first;
            if (norm.channels_last) {
                // The windows of these rows, as they lie in the tile.
                p.outer = 1;
                p.h.in = tile.end - tile.begin;
                p.h.out = tile.out_end - tile.out_begin;
                p.h.pad_before = tile.begin - pool_.p.h.start(tile.out_begin);
                first = (tile.image * pool_.p.h.out + tile.out_begin) * p.out_row();
            } else {
                p.outer = tile.end - tile.begin;
                first = (tile.image * norm_.channels + tile.begin) * p.out_plane();
            }
            pool.src = buffer;
            pool.dst = static_cast<char*>(pool_.dst) + first * element_;
            if (pool_.offsets_out)
                pool.offsets_out = static_cast<uint8_t*>(pool_.offsets_out) + first;
            const Rows rows = plan_forward(pool, int64_t(element_), false);
            run_all(maxima, pool, rows.count);
        }
    }

    // Calls use(job, tile) with a job whose input is what the windows of each tile of the forward
    // pass picked, and whose gradient is the output's.
    template <class Element, class Use>
    void winners(int64_t begin, int64_t end, const Use& use) const {
        const PoolParams& p = pool_.p;
        std::vector<int64_t> jump;  // from a window's start to each of its elements
        for (int64_t h = 0; h < p.h.kernel; ++h)
            for (int64_t w = 0; w < p.w.kernel; ++w)
                jump.push_back((h * p.h.dilation * p.w.in + w * p.w.dilation) * p.channels);
        const ThreadScratch<1> memory(largest_tile());
        auto* const buffer = static_cast<Element*>(memory.get());
        for (int64_t i = begin; i < end; ++i) {
            const Tile tile = forward_tile(i);
            const bool last = norm_.channels_last;
            const int64_t planes = last ? 1 : tile.end - tile.begin;
            const int64_t plane = last ? tile.image : tile.image * norm_.channels + tile.begin;
            const int64_t row0 = last ? tile.out_begin : 0,
                          rows = last ? tile.out_end - row0 : p.h.out;
            const int64_t first = (plane * p.h.out + row0) * p.out_row();
            const uint8_t* offset = static_cast<const uint8_t*>(pool_.offsets_in) + first;
            Element* to = buffer;
            for (int64_t n = 0; n < planes; ++n) {
                const Element* x =
                    static_cast<const Element*>(norm_.x) + (plane + n) * p.in_plane() * p.channels;
                for (int64_t oh = row0; oh < row0 + rows; ++oh) {
                    const int64_t start = p.h.start(oh) * p.in_row();
                    const Element* below = x + start + p.h.kernel * p.in_row();
                    if (!last) {
                        prefetch_rows(below, p.in_row());
                        const Element* from = x + start - p.w.pad_before;
                        for (int64_t ow = 0; ow < p.w.out; ++ow, from += p.w.stride)
                            to[ow] = from[jump[offset[ow]]];
                        to += p.w.out;
                        offset += p.w.out;
                        continue;
                    }
                    for (int64_t ow = 0; ow < p.w.out; ++ow) {
                        const int64_t column = p.w.start(ow) * p.channels;
                        prefetch_rows(below + column, p.w.stride * p.channels);
                        const Element* from = x + start + column;
                        for (int64_t c = 0; c < p.channels; ++c) *to++ = from[c + jump[*offset++]];
                    }
                }
            }
            BatchNormJob job = norm_of(tile);
            job.inner = rows * p.w.out;
            job.x = buffer;
            job.grad = static_cast<const char*>(pool_.src) + first * element_;
            use(job, tile);
        }
    }

    // Calls use(job, tile) with the gradient of each tile in the job's `grad`.
    template <class Use>
    void backward(int64_t begin, int64_t end, const Use& use) const {
        const Kernel scatter = kernels::max_pool_backward(dtype_, Offsets::Byte);
        const ThreadScratch<1> memory(largest_tile());
        void* const buffer = memory.get();
        for (int64_t i = begin; i < end; ++i) {
            const Tile tile = backward_tile(i);
            Job pool = pool_;
            PoolParams& p = pool.p;
            if (norm_.channels_last) {
                // Rows of this image alone. The kernel writes them where they lie in the image, of
                // which the buffer holds only these.
                p.outer = 1;
                const int64_t first = tile.image * p.h.out * p.out_row();
                pool.src = static_cast<const char*>(pool_.src) + first * element_;
                pool.offsets_in = static_cast<const uint8_t*>(pool_.offsets_in) + first;
                pool.dst =
                    reinterpret_cast<void*>(uintptr_t(buffer) - tile.begin * p.in_row() * element_);
                pool.by_plane = false;
                const ThreadScratch<> scratch(scratch_bytes(pool));
                scatter(pool, tile.begin, tile.end, scratch.get());
            } else {
                p.outer = tile.end - tile.begin;
                const int64_t first = (tile.image * norm_.channels + tile.begin) * p.out_plane();
                pool.src = static_cast<const char*>(pool_.src) + first * element_;
                pool.offsets_in = static_cast<const uint8_t*>(pool_.offsets_in) + first;
                pool.dst = buffer;
                plan_max_backward(pool, dtype_, Offsets::Byte);
                run_all(scatter, pool, max_backward_rows(pool).count);
            }
            BatchNormJob norm = norm_of(tile);
            norm.grad = buffer;
            use(norm, tile);
        }
    }

    template <class AnyJob>
    static void run_all(void (*kernel)(const AnyJob&, int64_t, int64_t, void*), const AnyJob& job,
                        int64_t units) {
        const ThreadScratch<> scratch(scratch_bytes(job));
        kernel(job, 0, units, scratch.get());
    }

  private:
    // Asks for what the windows of the next row of outputs reach: picked elements lie too far apart
    // for the processor to guess.
    template <class Element>
    void prefetch_rows(const Element* from, int64_t n) const {
        constexpr int64_t kLine = 64;
        const int64_t row = pool_.p.in_row() * sizeof(Element);
        for (int64_t r = 0; r < pool_.p.h.stride; ++r)
            for (int64_t i = 0; i < n * int64_t(sizeof(Element)); i += kLine)
                __builtin_prefetch(reinterpret_cast<const char*>(uintptr_t(from) + r * row + i));
    }

    // Bytes of a tile's input, or of what its windows pick, which with padding may be more.
    size_t largest_tile() const {
        const PoolParams& p = pool_.p;
        const int64_t extra = (p.h.kernel - 1) * p.h.dilation + p.h.stride;
        const bool last = norm_.channels_last;
        const int64_t in = last ? (rows_ + extra) * p.in_row() : planes_ * p.in_plane();
        const int64_t out = last ? out_rows_ * p.out_row() : planes_ * p.out_plane();
        return (std::max(in, out) * element_ + 127) / 64 * 64;
    }

    Tile forward_tile(int64_t i) const {
        if (!norm_.channels_last) return backward_tile(i);
        const Axis& h = pool_.p.h;
        Tile tile;
        tile.image = i / out_tiles_;
        tile.out_begin = i % out_tiles_ * out_rows_;
        tile.out_end = tile.out_begin + out_rows_ < h.out ? tile.out_begin + out_rows_ : h.out;
        const int64_t first = h.start(tile.out_begin);
        const int64_t last = h.start(tile.out_end - 1) + (h.kernel - 1) * h.dilation + 1;
        tile.begin = first < 0 ? 0 : first > h.in - 1 ? h.in - 1 : first;
        tile.end = last > h.in ? h.in : last <= tile.begin ? tile.begin + 1 : last;
        return tile;
    }

    Tile backward_tile(int64_t i) const {
        const int64_t all = norm_.channels_last ? pool_.p.h.in : norm_.channels;
        const int64_t at_once = norm_.channels_last ? rows_ : planes_;
        const int64_t begin = i % tiles_ * at_once;
        return {i / tiles_, begin, begin + at_once < all ? begin + at_once : all, 0, 0};
    }

    // The tile as an input of its own.
    BatchNormJob norm_of(const Tile& tile) const {
        BatchNormJob job = norm_;
        job.batch = 1;
        job.undivided = true;
        int64_t first;
        if (norm_.channels_last) {
            job.inner = (tile.end - tile.begin) * pool_.p.w.in;
            first = (tile.image * pool_.p.h.in + tile.begin) * pool_.p.in_row();
        } else {
            job.channels = tile.end - tile.begin;
            first = (tile.image * norm_.channels + tile.begin) * norm_.inner;
            for (const double** values :
                 {&job.center, &job.scale, &job.shift, &job.slope, &job.offset})
                if (*values != nullptr) *values += tile.begin;
        }
        job.x = static_cast<const char*>(norm_.x) + first * element_;
        if (norm_.y != nullptr) job.y = static_cast<char*>(norm_.y) + first * element_;
        return job;
    }

    const BatchNormJob& norm_;
    const Job& pool_;
    DType dtype_;
    size_t element_;
    int64_t rows_ = 0, out_rows_ = 0, planes_ = 0, tiles_ = 0, out_tiles_ = 0;
};

}  // namespace pooling_ext
