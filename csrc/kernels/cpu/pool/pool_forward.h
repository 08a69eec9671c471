// The forward pass of every pooling operator: windows reduced in two steps.
//
// A row of outputs is made from the rows of input under it. The first step reduces those rows to
// one, element by element; the second reduces each window's columns of that row. Both are the same
// loop over contiguous memory, `reduce_rows`: in the contiguous format the second step first
// deinterleaves the row into `stride` phases, so that the c-th columns of neighboring windows lie
// side by side; in channels-last the columns are vectors of channels anyway. The windows that most
// networks have take shorter ways: slide.h, and in channels-last pool_nhwc.h.
//
// An operator is a type with `In` and `T` (stored and computed type), load, store, combine and
// identity, and `kPlain`: whether load changes nothing. combine takes any number of values at once,
// or of vectors of them; the first is what came first.
#pragma once

#include "kernels/cpu/pool/job.h"
#include "kernels/cpu/simd/numeric.h"
#include "kernels/cpu/simd/slide.h"

namespace pooling_ext::POOLING_EXT_ISA {

// Cuts the scratch memory into aligned arrays.
class Scratch {
  public:
    explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* const array =
            reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(next_) + 63) & ~uintptr_t(63));
        next_ = reinterpret_cast<char*>(array + count);
        return array;
    }

  private:
    char* next_;
};

// Scratch rows have room for a vector more, so that loops over them need no remainder.
constexpr int64_t kVector = 64;

inline int64_t whole_vectors(int64_t n, int64_t vector = kVector / 2) {
    return (n + vector - 1) / vector * vector;
}

// How many elements a loop over both types takes at a time.
template <class A, class B>
constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// Reads elements as they lie in the input.
template <class Op>
struct Stored {
    using Element = typename Op::In;
    static POOLING_EXT_INLINE typename Op::T get(Element x) { return Op::load(x); }
};

// Reads elements that are in the computed type already.
template <class Op>
struct Computed {
    using Element = typename Op::T;
    static POOLING_EXT_INLINE typename Op::T get(Element x) { return x; }
};

// dst[i] = rows[0][i] + rows[1][i] + ..., where + is the operator's; count is at least 1.
template <class Op, class Load>
void reduce_rows(typename Op::T* __restrict dst, const typename Load::Element* const* rows,
                 int64_t count, int64_t n) {
    const auto* a = rows[0];
    int64_t row = 1;
    if (count >= 3) {
        const auto *b = rows[1], *c = rows[2];
        for (int64_t i = 0; i < n; ++i)
            dst[i] = Op::combine(Load::get(a[i]), Load::get(b[i]), Load::get(c[i]));
        row = 3;
    } else if (count == 2) {
        const auto* b = rows[1];
        for (int64_t i = 0; i < n; ++i) dst[i] = Op::combine(Load::get(a[i]), Load::get(b[i]));
        row = 2;
    } else {
        for (int64_t i = 0; i < n; ++i) dst[i] = Load::get(a[i]);
    }
    for (; row + 2 < count; row += 3) {
        const auto *b = rows[row], *c = rows[row + 1], *d = rows[row + 2];
        for (int64_t i = 0; i < n; ++i)
            dst[i] = Op::combine(dst[i], Load::get(b[i]), Load::get(c[i]), Load::get(d[i]));
    }
    for (; row < count; ++row) {
        const auto* b = rows[row];
        for (int64_t i = 0; i < n; ++i) dst[i] = Op::combine(dst[i], Load::get(b[i]));
    }
}

// The reduction of `n` elements, `step` apart.
template <class Op, class Load>
typename Op::T reduce(const typename Load::Element* x, int64_t n, int64_t step) {
    using T = typename Op::T;
    constexpr int64_t kLanes = 64 / sizeof(T);
    if (step != 1 || n < kLanes) {
        T total = Op::identity();
        for (int64_t i = 0; i < n; ++i) total = Op::combine(total, Load::get(x[i * step]));
        return total;
    }
    T lanes[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = Load::get(x[l]);
    int64_t i = kLanes;
    for (; i + kLanes <= n; i += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] = Op::combine(lanes[l], Load::get(x[i + l]));
    for (int64_t l = 0; i < n; ++i, ++l) lanes[l] = Op::combine(lanes[l], Load::get(x[i]));
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; ++l) lanes[l] = Op::combine(lanes[l], lanes[l + half]);
    return lanes[0];
}

// Deals x[0], x[step], x[2 * step], ... out to dst.
template <class Load, class T>
void gather_phase(T* __restrict dst, const typename Load::Element* __restrict x, int64_t n,
                  int64_t step) {
    switch (step) {
        case 1:
            for (int64_t i = 0; i < n; ++i) dst[i] = Load::get(x[i]);
            break;
        case 2:
            for (int64_t i = 0; i < n; ++i) dst[i] = Load::get(x[2 * i]);
            break;
        case 3:
            for (int64_t i = 0; i < n; ++i) dst[i] = Load::get(x[3 * i]);
            break;
        default:
            for (int64_t i = 0; i < n; ++i) dst[i] = Load::get(x[step * i]);
    }
}

// Where the columns of a row lie once it is deinterleaved: column i of the padded row is element
// i / stride of phase i % stride. Only the phases that windows read are kept.
class Deinterleaver {
  public:
    // If not `deinterleaves`, there are none.
    Deinterleaver(const Axis& w, bool deinterleaves, Scratch& scratch) {
        if (!deinterleaves) return;
        stride_ = w.stride;
        length_ = w.dilation * (w.kernel - 1) / w.stride + w.out + w.in / w.stride + 2;
        at_ = scratch.take<int64_t>(w.kernel);
        parts_ = scratch.take<Part>(w.stride);
        for (int64_t c = 0; c < w.kernel; ++c) at_[c] = offset(c * w.dilation);
        for (int64_t phase = 0; phase < stride_; ++phase) {
            bool read = false;
            for (int64_t c = 0; c < w.kernel; ++c) read |= c * w.dilation % stride_ == phase;
            const int64_t column = ((phase - w.pad_before) % stride_ + stride_) % stride_;
            if (read && column < w.in)
                parts_[count_++] = {offset(column + w.pad_before), column,
                                    ceil_div(w.in - column, stride_)};
        }
    }

    int64_t size() const { return stride_ * length_; }

    // Where the c-th columns of the windows begin.
    int64_t at(int64_t c) const { return at_[c]; }

    // For each phase: where its first element inside the input goes to, the column that one
    // comes from, and how many there are.
    struct Part {
        int64_t to, from, count;
    };
    const Part* begin() const { return parts_; }
    const Part* end() const { return parts_ + count_; }

  private:
    int64_t offset(int64_t column) const { return column % stride_ * length_ + column / stride_; }

    int64_t stride_ = 0, length_ = 0, count_ = 0;
    int64_t* at_ = nullptr;
    Part* parts_ = nullptr;
};

// Deinterleaves a row into the phases that lie at `deinterleaved`.
template <class Load, class T>
void deinterleave(T* __restrict deinterleaved, const Deinterleaver& phases,
                  const typename Load::Element* __restrict row, const Axis& w) {
    const auto* part = phases.begin();
    if (w.stride == 2 && phases.end() - part == 2) {
        // Both together: the last vector of a loop over one of them would go one by one.
        const bool swapped = part->from == 1;
        T* __restrict even = deinterleaved + part[swapped].to;
        T* __restrict odd = deinterleaved + part[!swapped].to;
        for (int64_t i = 0; i < w.in / 2; ++i) {
            even[i] = Load::get(row[2 * i]);
            odd[i] = Load::get(row[2 * i + 1]);
        }
        if (w.in % 2) even[w.in / 2] = Load::get(row[w.in - 1]);
        return;
    }
    for (; part != phases.end(); ++part)
        gather_phase<Load>(deinterleaved + part->to, row + part->from, part->count, w.stride);
}

// Prefetches what the row of outputs after the next one reads besides, where `last` is the last row
// of inputs of this one. The hardware foresees a long run, but here each is short and begins anew.
template <class In>
POOLING_EXT_INLINE void prefetch_rows(const PoolParams& p, const In* last) {
    if (p.channels != 1) return;
    constexpr int64_t kLine = 64 / sizeof(In);
    // Rows that a long stride steps over are not read, and a plane has no more than its own.
    const int64_t window = p.h.kernel < p.h.in ? p.h.kernel : p.h.in;
    const int64_t row = p.w.in, n = row * (p.h.stride < window ? p.h.stride : window);
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(last + row + n + i);
}

// Calls visit(pointer to row, offset of the row in the window) for the input rows inside the
// window of output row (od, oh).
template <class In, class Visit>
POOLING_EXT_INLINE void each_row(const PoolParams& p, const In* plane, int64_t od, int64_t oh,
                                 Visit visit) {
    const int64_t d_end = p.d.end(od), h_first = p.h.first(oh), h_end = p.h.end(oh);
    const int64_t d0 = p.d.start(od), h0 = p.h.start(oh);
    for (int64_t kd = p.d.first(od); kd < d_end; ++kd) {
        const int64_t first = (d0 + kd * p.d.dilation) * p.h.in + h0 + h_first * p.h.dilation;
        const In* row = plane + first * p.in_row();
        for (int64_t kh = h_first; kh < h_end; ++kh, row += p.h.dilation * p.in_row()) {
            // Compilers would make vectors of the few pointers.
            asm("" : "+r"(row));
            visit(row, kd * p.h.kernel + kh);
        }
    }
}

// Makes rows of outputs in the computed type.
template <class Op>
class RowReducer {
  public:
    using In = typename Op::In;
    using T = typename Op::T;

    // `end` is where the input ends.
    RowReducer(const PoolParams& p, const In* end, Scratch& scratch)
        : p_(p),
          slide_(slide_for<Op>(p)),
          slide_over_rows_(p, end),
          deinterleaves_(!slide_ && deinterleaves(p)),
          end_(end),
          phases_(p.w, deinterleaves_, scratch),
          rows_(scratch.take<const In*>(p.window_rows())),
          columns_(scratch.take<const void*>(deinterleaves_   ? p.w.kernel
                                             : p.channels > 1 ? p.w.most_inside()
                                                              : 0)),
          row_(scratch.take<T>(slide_ || p.window_rows() > 1 ? p.in_row() + 2 * kVector : 0) +
               kVector),
          deinterleaved_(scratch.take<T>(phases_.size())),
          out_(scratch.take<T>(p.out_row() + kVector)) {
        for (int64_t i = 0; i < phases_.size(); ++i) deinterleaved_[i] = Op::identity();
        if (slide_)
            for (int64_t i = 1; i <= p.w.pad_before; ++i) row_[-i] = Op::identity();
    }

    // The reduced row of outputs (od, oh) of one outer element.
    T* operator()(const In* plane, int64_t od, int64_t oh) {
        (*this)(plane, od, oh, out_);
        return out_;
    }

    // Writes it to `out`, and perhaps over what follows there till vectors are whole.
    void operator()(const In* plane, int64_t od, int64_t oh, T* out) {
        int64_t count = 0;
        each_row(p_, plane, od, oh, [&](const In* row, int64_t) { rows_[count++] = row; });
        if (count > 0) prefetch_rows(p_, rows_[count - 1]);
        if constexpr (kOverRows)
            if (count > 0 && slide_over_rows_(out, rows_, count)) return;
        if (count == 0) {
            for (int64_t i = 0; i < p_.out_row(); ++i) out[i] = Op::identity();
        } else if (slide_ && slides_in_place(count)) {
            slide_(out, reinterpret_cast<const T*>(rows_[0]), p_.w.out);
        } else if (slide_) {
            fold_rows(count);
            const int64_t past = (p_.w.out - 1) * p_.w.stride + p_.w.kernel - p_.w.pad_before;
            for (int64_t i = p_.w.in; i < past; ++i) row_[i] = Op::identity();
            slide_(out, row_ - p_.w.pad_before, p_.w.out);
        } else if (count == 1) {
            reduce_columns<Stored<Op>>(out, rows_[0]);
        } else {
            fold_rows(count);
            reduce_columns<Computed<Op>>(out, row_);
        }
    }

  private:
    static constexpr bool kOverRows = Op::kPlain && kCommon<In>;
    struct None {
        None(const PoolParams&, const In*) {}
    };

    // Whether windows of one row can be read where it lies.
    bool slides_in_place(int64_t count) const {
        const Axis& w = p_.w;
        return Op::kPlain && count == 1 && w.pad_before == 0 &&
               (w.out - 1) * w.stride + w.kernel <= w.in &&
               rows_[0] + whole_vectors(w.out) * w.stride + w.kernel <= end_;
    }

    void fold_rows(int64_t count) {
        const int64_t n = whole_vectors(p_.in_row(), kLanes<In, T>);
        const bool readable = rows_[count - 1] + n <= end_;
        reduce_rows<Op, Stored<Op>>(row_, rows_, count, readable ? n : p_.in_row());
    }

    template <class Load>
    void reduce_columns(T* out, const typename Load::Element* row) {
        using Element = typename Load::Element;
        const Axis& w = p_.w;
        const int64_t channels = p_.channels;
        if (channels > 1) {
            const auto** columns = reinterpret_cast<const Element**>(columns_);
            for (int64_t o = 0; o < w.out; ++o) {
                const int64_t first = w.first(o), count = w.end(o) - first;
                const Element* x = row + (w.start(o) + first * w.dilation) * channels;
                for (int64_t c = 0; c < count; ++c) columns[c] = x + c * w.dilation * channels;
                T* const to = out + o * channels;
                if (count > 0)
                    reduce_rows<Op, Load>(to, columns, count, channels);
                else
                    for (int64_t c = 0; c < channels; ++c) to[c] = Op::identity();
            }
        } else if (!deinterleaves_) {
            for (int64_t o = 0; o < w.out; ++o) {
                const int64_t first = w.first(o);
                out[o] = reduce<Op, Load>(row + w.start(o) + first * w.dilation, w.end(o) - first,
                                          w.dilation);
            }
        } else {
            deinterleave<Load>(deinterleaved_, phases_, row, w);
            const auto** columns = reinterpret_cast<const T**>(columns_);
            for (int64_t c = 0; c < w.kernel; ++c) columns[c] = deinterleaved_ + phases_.at(c);
            reduce_rows<Op, Computed<Op>>(out, columns, w.kernel, w.out);
        }
    }

    const PoolParams& p_;
    const Slide<T> slide_;
    const std::conditional_t<kOverRows, SlideOverRows<Op>, None> slide_over_rows_;
    const bool deinterleaves_;
    const In* const end_;
    const Deinterleaver phases_;
    const In** const rows_;
    const void** const columns_;
    T* const row_;
    T* const deinterleaved_;
    T* const out_;
};

// Calls visit(index, outer, d, h) for rows [begin, end) of planes of d_size x h_size rows.
template <class Visit>
POOLING_EXT_INLINE void each_index(int64_t begin, int64_t end, int64_t d_size, int64_t h_size,
                                   Visit visit) {
    int64_t h = begin % h_size, d = begin / h_size % d_size, outer = begin / (h_size * d_size);
    for (int64_t index = begin; index < end; ++index) {
        visit(index, outer, d, h);
        if (++h < h_size) continue;
        h = 0;
        if (++d < d_size) continue;
        d = 0;
        ++outer;
    }
}

// Calls finish(od, oh, reduced row, pointer to the row of outputs) for output rows [begin, end). If
// kInPlace, finish does nothing but copy, and rows are reduced where they belong, but for the last:
// what completes their vectors there would go over outputs that are none, or another thread's.
template <class Op, class Out, bool kInPlace = false, class Finish>
POOLING_EXT_INLINE void pool_rows(const Job& job, int64_t begin, int64_t end, Scratch scratch,
                                  Finish finish) {
    const PoolParams& p = job.p;
    const auto* src = static_cast<const typename Op::In*>(job.src);
    auto* dst = static_cast<Out*>(job.dst);
    const int64_t plane = p.in_plane() * p.channels, out = p.out_row();
    const int64_t in_place = kInPlace ? end - ceil_div(whole_vectors(out) - out, out) : begin;
    RowReducer<Op> reduce_row(p, src + p.outer * plane, scratch);
    each_index(begin, end, p.d.out, p.h.out,
               [&](int64_t index, int64_t outer, int64_t od, int64_t oh) {
                   const auto* from = src + outer * plane;
                   Out* const y = dst + index * out;
                   if constexpr (kInPlace)
                       if (index < in_place) return reduce_row(from, od, oh, y);
                   finish(od, oh, reduce_row(from, od, oh), y);
               });
}

}  // namespace pooling_ext::POOLING_EXT_ISA
