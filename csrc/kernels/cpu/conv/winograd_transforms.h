// The transforms of Winograd's convolutions along one axis, on anything that adds and multiplies.
//
// Each class has input (B^T d), output (A^T m), grad (A y, the output's transpose), weight (G g)
// and weight_grad (G^T u).
#pragma once

#include "kernels/cpu/conv/lanes.h"
#include "kernels/cpu/conv/winograd_shape.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// F(4, 3): points 0, 1, -1, 2, -2 and infinity.
struct DenseAxis {
    static constexpr WinogradAxis kSizes = kWinogradDense;

    template <class X, class T>
    static POOLING_EXT_INLINE void input(const X (&d)[6], X (&to)[6], T) {
        const X even = d[4] - T(4) * d[2], odd = d[3] - T(4) * d[1];
        const X near = d[4] - d[2], far = T(2) * (d[3] - d[1]);
        to[0] = T(4) * d[0] - T(5) * d[2] + d[4];
        to[1] = even + odd;
        to[2] = even - odd;
        to[3] = near + far;
        to[4] = near - far;
        to[5] = T(4) * d[1] - T(5) * d[3] + d[5];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void output(const X (&m)[6], X (&to)[4], T) {
        const X p = m[1] + m[2], q = m[1] - m[2], u = m[3] + m[4], v = m[3] - m[4];
        to[0] = m[0] + p + u;
        to[1] = q + T(2) * v;
        to[2] = p + T(4) * u;
        to[3] = q + T(8) * v + m[5];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void grad(const X (&g)[4], X (&to)[6], T) {
        const X even = g[0] + g[2], odd = g[1] + g[3];
        const X near = g[0] + T(4) * g[2], far = T(2) * g[1] + T(8) * g[3];
        to[0] = g[0];
        to[1] = even + odd;
        to[2] = even - odd;
        to[3] = near + far;
        to[4] = near - far;
        to[5] = g[3];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight(const X (&g)[3], X (&to)[6], T) {
        const X even = g[0] + g[2], far = T(1.0 / 24) * g[0] + T(1.0 / 6) * g[2];
        const X odd = T(1.0 / 12) * g[1];
        to[0] = T(0.25) * g[0];
        to[1] = T(-1.0 / 6) * (even + g[1]);
        to[2] = T(-1.0 / 6) * (even - g[1]);
        to[3] = far + odd;
        to[4] = far - odd;
        to[5] = g[2];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight_grad(const X (&u)[6], X (&to)[3], T) {
        const X p = u[1] + u[2], q = u[2] - u[1], r = u[3] + u[4], s = u[3] - u[4];
        to[0] = T(0.25) * u[0] - T(1.0 / 6) * p + T(1.0 / 24) * r;
        to[1] = T(1.0 / 6) * q + T(1.0 / 12) * s;
        to[2] = T(1.0 / 6) * (r - p) + u[5];
    }
};

// F(4, 2), points 0, 1, -1, 2 and infinity, of which strided kernels are made: two taps on pixels
// that lie two apart.
struct PairAxis {
    template <class X, class T>
    static POOLING_EXT_INLINE void input(const X& d0, const X& d1, const X& d2, const X& d3,
                                         const X& d4, X* to, T) {
        const X q = d3 - d1, p = d3 - d2;
        to[0] = T(2) * (d0 - d2) + q;
        to[1] = p - T(2) * d1;
        to[2] = p - T(2) * (d2 - d1);
        to[3] = q;
        to[4] = d4 - d2 - T(2) * q;
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void output(const X* m, X (&to)[4], T) {
        const X p = m[1] + m[2], q = m[1] - m[2];
        to[0] = m[0] + p + m[3];
        to[1] = q + T(2) * m[3];
        to[2] = p + T(4) * m[3];
        to[3] = q + T(8) * m[3] + m[4];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void grad(const X (&g)[4], X* to, T) {
        const X even = g[0] + g[2], odd = g[1] + g[3];
        to[0] = g[0];
        to[1] = even + odd;
        to[2] = even - odd;
        to[3] = g[0] + T(2) * g[1] + T(4) * g[2] + T(8) * g[3];
        to[4] = g[3];
    }
};

// Of stride 2. The kernel's points are F(4, 2)'s of its outer taps, and its middle tap.
struct StridedAxis {
    static constexpr WinogradAxis kSizes = kWinogradStrided;

    template <class X, class T>
    static POOLING_EXT_INLINE void input(const X (&d)[9], X (&to)[9], T) {
        PairAxis::input(d[0], d[2], d[4], d[6], d[8], to, T(0));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) to[5 + i] = d[2 * i + 1];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void output(const X (&m)[9], X (&to)[4], T) {
        PairAxis::output(m, to, T(0));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) to[i] += m[5 + i];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void grad(const X (&g)[4], X (&to)[9], T) {
        PairAxis::grad(g, to, T(0));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) to[5 + i] = g[i];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight(const X (&g)[3], X (&to)[6], T) {
        to[0] = T(0.5) * g[0];
        to[1] = T(-0.5) * (g[0] + g[2]);
        to[2] = T(-1.0 / 6) * (g[0] - g[2]);
        to[3] = T(1.0 / 6) * g[0] + T(1.0 / 3) * g[2];
        to[4] = g[2];
        to[5] = g[1];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight_grad(const X (&u)[6], X (&to)[3], T) {
        to[0] = T(0.5) * (u[0] - u[1]) + T(1.0 / 6) * (u[3] - u[2]);
        to[1] = u[5];
        to[2] = T(1.0 / 6) * u[2] - T(0.5) * u[1] + T(1.0 / 3) * u[3] + u[4];
    }
};

// Pixels of the output are in turn the middle tap's product with one of the input's and the outer
// taps' with that and the next.
struct SpreadAxis {
    static constexpr WinogradAxis kSizes = kWinogradSpread;

    template <class X, class T>
    static POOLING_EXT_INLINE void input(const X (&d)[5], X (&to)[9], T) {
        PairAxis::input(d[0], d[1], d[2], d[3], d[4], to, T(0));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) to[5 + i] = d[i];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void output(const X (&m)[9], X (&to)[8], T) {
        X sums[4];
        PairAxis::output(m, sums, T(0));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) to[2 * i] = m[5 + i], to[2 * i + 1] = sums[i];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight(const X (&g)[3], X (&to)[6], T) {
        StridedAxis::weight(g, to, T(0));
    }
};

// A tile of the input and output, and its kernels.
template <class R, class C>
struct Tile {
    using Rows = R;
    using Columns = C;
    static constexpr WinogradTile kSizes{R::kSizes, C::kSizes};
};
using DenseTile = Tile<DenseAxis, DenseAxis>;
using StridedTile = Tile<StridedAxis, StridedAxis>;
using SpreadTile = Tile<SpreadAxis, SpreadAxis>;

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
