// What averages divide by: the product of a count for each axis, or one number for all.
#pragma once

#include "kernels/cpu/pool/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

template <class T>
class Divisors {
  public:
    Divisors(const Job& job, Scratch& scratch)
        : job_(job),
          columns_(scratch.take<T>(job.p.w.out)),
          inverses_(scratch.take<T>(job.p.w.out)) {
        const Axis& w = job.p.w;
        for (int64_t o = 0; o < w.out; ++o) {
            const int64_t count = job.divisor ? 1 : w.count(o, job.count_include_pad);
            columns_[o] = T(count);
            inverses_[o] = T(1) / T(count);
            powers_of_two_ &= is_power_of_two(count);
        }
    }

    // Calls write(i, read(i) / divisor) for each element i of the row of outputs (od, oh).
    template <class Read, class Write>
    POOLING_EXT_INLINE void divide(int64_t od, int64_t oh, Read read, Write write) const {
        const int64_t rows = rows_of(od, oh);
        // Division is slow; by a power of two it gives what multiplication gives.
        if (powers_of_two_ && is_power_of_two(rows)) {
            const T inverse = T(1) / T(rows);
            each(inverses_, [=](int64_t i, T factor) { write(i, read(i) * (inverse * factor)); });
        } else {
            const T divisor = T(rows);
            each(columns_, [=](int64_t i, T factor) { write(i, read(i) / (divisor * factor)); });
        }
    }

    // Calls use(a function that divides) for window o of that row.
    template <class Use>
    POOLING_EXT_INLINE void divide_pixel(int64_t od, int64_t oh, int64_t o, Use use) const {
        const int64_t rows = rows_of(od, oh);
        if (powers_of_two_ && is_power_of_two(rows)) {
            const T factor = T(1) / T(rows) * inverses_[o];
            use([=](T x) { return x * factor; });
        } else {
            const T divisor = T(rows) * columns_[o];
            use([=](T x) { return x / divisor; });
        }
    }

  private:
    static bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

    int64_t rows_of(int64_t od, int64_t oh) const {
        const bool include = job_.count_include_pad;
        return job_.divisor ? job_.divisor
                            : job_.p.d.count(od, include) * job_.p.h.count(oh, include);
    }

    template <class Visit>
    POOLING_EXT_INLINE void each(const T* __restrict factors, Visit visit) const {
        const int64_t out = job_.p.w.out, channels = job_.p.channels;
        if (channels == 1) {
            for (int64_t o = 0; o < out; ++o) visit(o, factors[o]);
            return;
        }
        for (int64_t o = 0; o < out; ++o) {
            const T factor = factors[o];
            for (int64_t i = o * channels; i < (o + 1) * channels; ++i) visit(i, factor);
        }
    }

    const Job& job_;
    T* columns_;
    T* inverses_;
    bool powers_of_two_ = true;
};

}  // namespace pooling_ext::POOLING_EXT_ISA
