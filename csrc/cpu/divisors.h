// What averages divide by: the product of a count for each axis, or one number for all.
#pragma once

#include "cpu/pool_forward.h"

namespace pooling_ext::POOLING_EXT_ISA {

template <class T>
class Divisors {
  public:
    Divisors(const Job& job, Scratch& scratch) : job_(job), columns_(scratch.take<T>(job.p.w.out)) {
        const Axis& w = job.p.w;
        for (int64_t o = 0; o < w.out; ++o)
            columns_[o] = job.divisor ? T(1) : T(w.count(o, job.count_include_pad));
    }

    // Calls visit(i, divisor) for each element i of the row of outputs (od, oh).
    template <class Visit>
    POOLING_EXT_INLINE void each(int64_t od, int64_t oh, Visit visit) const {
        const PoolParams& p = job_.p;
        const bool include = job_.count_include_pad;
        const T row =
            T(job_.divisor ? job_.divisor : p.d.count(od, include) * p.h.count(oh, include));
        const T* __restrict columns = columns_;
        if (p.channels == 1) {
            for (int64_t o = 0; o < p.w.out; ++o) visit(o, row * columns[o]);
            return;
        }
        for (int64_t o = 0; o < p.w.out; ++o) {
            const T divisor = row * columns[o];
            const int64_t at = o * p.channels;
            for (int64_t c = 0; c < p.channels; ++c) visit(at + c, divisor);
        }
    }

  private:
    const Job& job_;
    T* columns_;
};

}  // namespace pooling_ext::POOLING_EXT_ISA
