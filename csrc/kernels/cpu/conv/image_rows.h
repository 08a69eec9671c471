// What the files of the kernels for images share: rows of an image in scratch memory.
#pragma once

#include "kernels/cpu/conv/depthwise_rows.h"
#include "kernels/cpu/conv/image.h"
#include "kernels/cpu/conv/register_tile.h"

namespace pooling_ext::POOLING_EXT_ISA {

ImageKernel image_weight_grad(DType, ImageStep);

namespace conv {

// Calls use(first, count) for pairs of vectors, and for the last one if it is alone.
template <class Use>
POOLING_EXT_INLINE void each_pair(int64_t vectors, const Use& use) {
    for (int64_t v = 0; v < vectors; v += 2) use(v, vectors - v < 2 ? 1 : 2);
}

// The rows that the windows of an output's row cover, in scratch memory. Row r is in slot r %
// slots.
template <class In>
class ImageRows {
  public:
    using L = Lanes<In>;
    using T = typename L::T;

    ImageRows(const ImageJob& job, Memory& memory)
        : job_(job),
          pitch_((job.reach() + 15) / 16 * 16),
          data_(memory.take<T>(job.h.kernel * pitch_)),
          pointers_(memory.take<const T*>(job.h.kernel)) {
        // What no load writes stays zero: the padding.
        std::memset(data_, 0, job.h.kernel * pitch_ * sizeof(T));
    }

    // Nothing is loaded of another image.
    void begin() { loaded_ = 0; }

    // For each row of the kernel that of the image, for a row of the output; none outside it.
    const T* const* of(int64_t n, int64_t row) {
        const int64_t first = row * job_.h.stride - job_.h.padding, end = first + job_.h.kernel;
        for (int64_t r = first; r < end; ++r) {
            const bool inside = r >= 0 && r < job_.h.in;
            if (inside && r >= loaded_) load(n, r);
            pointers_[r - first] = inside ? at(r) : nullptr;
        }
        if (end > loaded_) loaded_ = end;
        return pointers_;
    }

  private:
    T* at(int64_t r) const { return data_ + r % job_.h.kernel * pitch_; }

    void load(int64_t n, int64_t r) const {
        const int64_t channels = job_.channels, padding = job_.w.padding;
        const int64_t most = (job_.w.out - 1) * job_.w.stride + job_.w.kernel - padding;
        const int64_t columns = most < job_.w.in ? most : job_.w.in;
        T* __restrict to = at(r) + padding * channels;
        const In* const x = static_cast<const In*>(job_.x);
        if (job_.image_last) {
            const In* const from = x + (n * job_.h.in + r) * job_.w.in * channels;
            const int64_t count = columns * channels;
            int64_t i = 0;
            for (; i + L::kSize <= count; i += L::kSize) L::keep(to + i, L::get(from + i));
            for (; i < count; ++i) to[i] = widen(from[i]);
            return;
        }
        for (int64_t c = 0; c < channels; ++c) {
            const In* __restrict from = x + ((n * channels + c) * job_.h.in + r) * job_.w.in;
            for (int64_t i = 0; i < columns; ++i) to[i * channels + c] = widen(from[i]);
        }
    }

    const ImageJob& job_;
    const int64_t pitch_;
    T* const data_;
    const T** const pointers_;
    int64_t loaded_ = 0;
};

}  // namespace conv
}  // namespace pooling_ext::POOLING_EXT_ISA
