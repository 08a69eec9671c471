// The forward pass of every pooling operator: windows reduced in two steps.
//
// A row of outputs is made from the rows of input under it. The first step reduces those rows to one, element by
// element; the second reduces each window's columns of that row. Both are the same loop over
// contiguous memory, `fold`: in the contiguous format the second step first deals the row out into
// `stride` phases, so that the c-th columns of neighbouring windows lie side by side; in
// channels-last the columns are vectors of channels anyway.
//
// An operator is a type with `In` and `T` (stored and computed type), load, combine and identity.
#pragma once

#include "cpu/kernels.h"
#include "cpu/numeric.h"

namespace pooling_ext::POOLING_EXT_ISA {

// Cuts the scratch memory into aligned arrays.
class Scratch {
public:
    explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        T* const array = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(next_) + 63) & ~uintptr_t(63));
        next_ = reinterpret_cast<char*>(array + count);
        return array;
    }

private:
    char* next_;
};

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
void fold(typename Op::T* __restrict dst, const typename Load::Element* const* rows, int64_t count, int64_t n) {
    const auto* a = rows[0];
    int64_t row = 1;
    if (count >= 3) {
        const auto *b = rows[1], *c = rows[2];
        for (int64_t i = 0; i < n; ++i)
            dst[i] = Op::combine(Op::combine(Load::get(a[i]), Load::get(b[i])), Load::get(c[i]));
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
            dst[i] = Op::combine(Op::combine(Op::combine(dst[i], Load::get(b[i])), Load::get(c[i])),
                                 Load::get(d[i]));
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
void gather_phase(T* __restrict dst, const typename Load::Element* __restrict x, int64_t n, int64_t step) {
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

// Where the columns of a row lie once it is dealt out: column i of the padded row is element
// i / stride of phase i % stride. Only the phases that windows read are dealt.
class Phases {
public:
    // If not `dealing`, there are none.
    Phases(const Axis& w, bool dealing, Scratch& scratch) {
        if (!dealing) return;
        stride_ = w.stride;
        length_ = w.dilation * (w.kernel - 1) / w.stride + w.out + w.in / w.stride + 2;
        at_ = scratch.take<int64_t>(w.kernel);
        parts_ = scratch.take<Part>(w.stride);
        for (int64_t c = 0; c < w.kernel; ++c) at_[c] = place(c * w.dilation);
        for (int64_t phase = 0; phase < stride_; ++phase) {
            bool read = false;
            for (int64_t c = 0; c < w.kernel; ++c) read |= c * w.dilation % stride_ == phase;
            const int64_t column = ((phase - w.pad_before) % stride_ + stride_) % stride_;
            if (read && column < w.in)
                parts_[count_++] = {place(column + w.pad_before), column, ceil_div(w.in - column, stride_)};
        }
    }

    int64_t size() const { return stride_ * length_; }

    // Where the c-th columns of the windows begin.
    int64_t at(int64_t c) const { return at_[c]; }

    // For each phase: where its first element inside the input is dealt to, the column that one
    // comes from, and how many there are.
    struct Part {
        int64_t to, from, count;
    };
    const Part* begin() const { return parts_; }
    const Part* end() const { return parts_ + count_; }

private:
    int64_t place(int64_t column) const { return column % stride_ * length_ + column / stride_; }

    int64_t stride_ = 0, length_ = 0, count_ = 0;
    int64_t* at_ = nullptr;
    Part* parts_ = nullptr;
};

// Windows too wide for a pass over the row for each column are reduced one by one.
constexpr int64_t kWideWindow = 16;

// Whether rows are dealt out, which takes windows of one size in the contiguous format.
POOLING_EXT_INLINE bool deals(const PoolParams& p) {
    return p.channels == 1 && !p.w.adaptive && p.w.kernel <= kWideWindow;
}

// Calls visit(pointer to row, place of the row in the window) for the input rows inside the
// window of output row (od, oh).
template <class In, class Visit>
POOLING_EXT_INLINE void each_row(const PoolParams& p, const In* plane, int64_t od, int64_t oh, Visit visit) {
    const int64_t d_end = p.d.end(od), h_first = p.h.first(oh), h_end = p.h.end(oh);
    const int64_t d0 = p.d.start(od), h0 = p.h.start(oh);
    for (int64_t kd = p.d.first(od); kd < d_end; ++kd) {
        const In* slice = plane + (d0 + kd * p.d.dilation) * p.h.in * p.in_row();
        for (int64_t kh = h_first; kh < h_end; ++kh)
            visit(slice + (h0 + kh * p.h.dilation) * p.in_row(), kd * p.h.kernel + kh);
    }
}

// Makes rows of outputs in the computed type.
template <class Op>
class RowReducer {
public:
    using In = typename Op::In;
    using T = typename Op::T;

    RowReducer(const PoolParams& p, Scratch& scratch)
        : p_(p),
          phases_(p.w, deals(p), scratch),
          rows_(scratch.take<const In*>(p.d.kernel * p.h.kernel)),
          columns_(scratch.take<const void*>(p.w.kernel)),
          row_(scratch.take<T>(p.d.kernel * p.h.kernel > 1 ? p.in_row() : 0)),
          dealt_(nullptr),
          out_(scratch.take<T>(p.out_row())) {
        if (deals(p)) {
            dealt_ = scratch.take<T>(phases_.size());
            for (int64_t i = 0; i < phases_.size(); ++i) dealt_[i] = Op::identity();
        }
    }

    // The reduced row of outputs (od, oh) of one outer element.
    T* operator()(const In* plane, int64_t od, int64_t oh) {
        int64_t count = 0;
        each_row(p_, plane, od, oh, [&](const In* row, int64_t) { rows_[count++] = row; });
        if (count == 0) {
            for (int64_t i = 0; i < p_.out_row(); ++i) out_[i] = Op::identity();
        } else if (count == 1) {
            reduce_columns<Stored<Op>>(rows_[0]);
        } else {
            fold<Op, Stored<Op>>(row_, rows_, count, p_.in_row());
            reduce_columns<Computed<Op>>(row_);
        }
        return out_;
    }

private:
    template <class Load>
    void reduce_columns(const typename Load::Element* row) {
        using Element = typename Load::Element;
        const Axis& w = p_.w;
        const int64_t channels = p_.channels;
        if (channels > 1) {
            const auto** columns = reinterpret_cast<const Element**>(columns_);
            for (int64_t o = 0; o < w.out; ++o) {
                const int64_t first = w.first(o), count = w.end(o) - first;
                const Element* x = row + (w.start(o) + first * w.dilation) * channels;
                for (int64_t c = 0; c < count; ++c) columns[c] = x + c * w.dilation * channels;
                T* const out = out_ + o * channels;
                if (count > 0) fold<Op, Load>(out, columns, count, channels);
                else
                    for (int64_t c = 0; c < channels; ++c) out[c] = Op::identity();
            }
        } else if (!dealt_) {
            for (int64_t o = 0; o < w.out; ++o) {
                const int64_t first = w.first(o);
                out_[o] = reduce<Op, Load>(row + w.start(o) + first * w.dilation, w.end(o) - first, w.dilation);
            }
        } else {
            for (const auto& part : phases_)
                gather_phase<Load>(dealt_ + part.to, row + part.from, part.count, w.stride);
            const auto** columns = reinterpret_cast<const T**>(columns_);
            for (int64_t c = 0; c < w.kernel; ++c) columns[c] = dealt_ + phases_.at(c);
            fold<Op, Computed<Op>>(out_, columns, w.kernel, w.out);
        }
    }

    const PoolParams& p_;
    const Phases phases_;
    const In** const rows_;
    const void** const columns_;
    T* const row_;
    T* dealt_;
    T* const out_;
};

// Calls finish(od, oh, reduced row, pointer to the row of outputs) for output rows [begin, end).
template <class Op, class Out, class Finish>
POOLING_EXT_INLINE void pool_rows(const Job& job, int64_t begin, int64_t end, Scratch scratch, Finish finish) {
    const PoolParams& p = job.p;
    RowReducer<Op> reduce_row(p, scratch);
    const auto* src = static_cast<const typename Op::In*>(job.src);
    auto* dst = static_cast<Out*>(job.dst);
    const int64_t plane = p.d.in * p.h.in * p.in_row();
    for (int64_t index = begin; index < end; ++index) {
        const int64_t oh = index % p.h.out, od = index / p.h.out % p.d.out;
        const int64_t outer = index / (p.h.out * p.d.out);
        finish(od, oh, reduce_row(src + outer * plane, od, oh), dst + index * p.out_row());
    }
}

}  // namespace pooling_ext::POOLING_EXT_ISA
