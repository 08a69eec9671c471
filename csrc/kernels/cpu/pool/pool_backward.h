// The backward pass of every pooling operator: each row of inputs gathers from the windows over it.
//
// A row of the input's gradient is summed in scratch memory from the rows of outputs whose windows
// cover it, then written once. No two threads write the same row, so the result does not depend
// on how many there are.
#pragma once

#include "kernels/cpu/pool/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

// One row of outputs, as a row of inputs sees it.
template <class G>
struct SpreadRow {
    const G* grad;       // the row's gradients
    int64_t offset;      // of the row from the start of the outputs
    int64_t od, oh;      // its position in the plane
    int64_t kernel_row;  // of the input row in its windows: kd * kernel_h + kh
    int64_t input_row;   // the input row's position in its plane: d * in_h + h
};

// The sum for one row of inputs. In the contiguous format it may be kept in phases (see
// Deinterleaver), so that the c-th columns of neighboring windows lie side by side.
template <class T>
class RowGradient {
  public:
    // If not `needed`, nothing may be summed.
    RowGradient(const PoolParams& p, Scratch& scratch, bool deinterleaves, bool needed = true)
        : p_(p),
          phases_(p.w, deinterleaves, scratch),
          deinterleaves_(deinterleaves),
          size_(!needed         ? 0
                : deinterleaves ? phases_.size()
                                : p.in_row()) {
        sum_ = scratch.take<T>(size_);
    }

    // Where the c-th columns of windows 0, 1, 2, ... are summed, side by side.
    T* phase(int64_t c) { return sum_ + phases_.at(c); }
    // Where input column `column` is summed, one value for each channel.
    T* column(int64_t column) { return sum_ + column * p_.channels; }

    void clear() {
        for (int64_t i = 0; i < size_; ++i) sum_[i] = T(0);
    }

    template <class G>
    void write(G* __restrict dst) const {
        const int64_t in = p_.in_row(), stride = p_.w.stride;
        if (!deinterleaves_ || stride == 1) {
            const T* __restrict sum = sum_ + (deinterleaves_ ? p_.w.pad_before : 0);
            for (int64_t i = 0; i < in; ++i) dst[i] = narrow<G>(sum[i]);
            return;
        }
        const auto* part = phases_.begin();
        if (phases_.end() - part < stride) std::memset(dst, 0, in * sizeof(G));
        if (stride == 2 && phases_.end() - part == 2) {
            const bool swapped = part->from == 1;
            const T* __restrict even = sum_ + part[swapped].to;
            const T* __restrict odd = sum_ + part[!swapped].to;
            for (int64_t i = 0; i < in / 2; ++i) {
                dst[2 * i] = narrow<G>(even[i]);
                dst[2 * i + 1] = narrow<G>(odd[i]);
            }
            if (in % 2) dst[in - 1] = narrow<G>(even[in / 2]);
            return;
        }
        for (; part != phases_.end(); ++part)
            for (int64_t i = 0; i < part->count; ++i)
                dst[part->from + i * stride] = narrow<G>(sum_[part->to + i]);
    }

  private:
    const PoolParams& p_;
    const Deinterleaver phases_;
    const bool deinterleaves_;
    const int64_t size_;
    T* sum_;
};

// For each of the input rows [begin, end): calls start(), then add(row) for each row of outputs
// over it, then finish(pointer to the row of the input's gradient).
template <class G, class Start, class Add, class Finish>
POOLING_EXT_INLINE void gather_rows(const Job& job, int64_t begin, int64_t end, Start start,
                                    Add add, Finish finish) {
    const PoolParams& p = job.p;
    const auto* grad = static_cast<const G*>(job.src);
    auto* dst = static_cast<G*>(job.dst);
    each_index(
        begin, end, p.d.in, p.h.in, [&](int64_t index, int64_t outer, int64_t id, int64_t ih) {
            start();
            const int64_t d_end = p.d.end_output(id), h_end = p.h.end_output(ih);
            for (int64_t od = p.d.first_output(id); od < d_end; ++od) {
                const int64_t kd = p.d.element(od, id);
                if (kd < 0) continue;
                for (int64_t oh = p.h.first_output(ih); oh < h_end; ++oh) {
                    const int64_t kh = p.h.element(oh, ih);
                    if (kh < 0) continue;
                    const int64_t offset = ((outer * p.d.out + od) * p.h.out + oh) * p.out_row();
                    add(SpreadRow<G>{grad + offset, offset, od, oh, kd * p.h.kernel + kh,
                                     id * p.h.in + ih});
                }
            }
            finish(dst + index * p.in_row());
        });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
