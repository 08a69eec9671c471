// What averages divide by: the product of a count for each axis, or one number for all.
#pragma once

#include "cpu/pool_forward.h"

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
        const PoolParams& p = job_.p;
        const bool include = job_.count_include_pad;
        const int64_t rows =
            job_.divisor ? job_.divisor : p.d.count(od, include) * p.h.count(oh, include);
        // Division is slow; by a power of two it gives what multiplication gives.
        if (powers_of_two_ && is_power_of_two(rows)) {
            const T inverse = T(1) / T(rows);
            each(inverses_, [=](int64_t i, T factor) { write(i, read(i) * (inverse * factor)); });
        } else {
            const T divisor = T(rows);
            each(columns_, [=](int64_t i, T factor) { write(i, read(i) / (divisor * factor)); });
        }
    }

  private:
    static bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

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
