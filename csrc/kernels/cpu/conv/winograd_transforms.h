// The transforms of Winograd's F(4x4, 3x3), on anything that adds and multiplies: points 0, 1, -1,
// 2, -2 and infinity.
#pragma once

#include "kernels/cpu/conv/lanes.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// B^T d: six to six.
template <class X, class T>
POOLING_EXT_INLINE void input_points(const X& d0, const X& d1, const X& d2, const X& d3,
                                     const X& d4, const X& d5, X* to, int step, T) {
    const X even = d4 - T(4) * d2, odd = d3 - T(4) * d1;
    const X near = d4 - d2, far = T(2) * (d3 - d1);
    to[0] = T(4) * d0 - T(5) * d2 + d4;
    to[step] = even + odd;
    to[2 * step] = even - odd;
    to[3 * step] = near + far;
    to[4 * step] = near - far;
    to[5 * step] = T(4) * d1 - T(5) * d3 + d5;
}

// A^T m: six to four.
template <class X, class T>
POOLING_EXT_INLINE void output_points(const X& m0, const X& m1, const X& m2, const X& m3,
                                      const X& m4, const X& m5, X* to, int step, T) {
    const X p = m1 + m2, q = m1 - m2, u = m3 + m4, v = m3 - m4;
    to[0] = m0 + p + u;
    to[step] = q + T(2) * v;
    to[2 * step] = p + T(4) * u;
    to[3 * step] = q + T(8) * v + m5;
}

// A y: four to six, the output transform's transpose.
template <class X, class T>
POOLING_EXT_INLINE void grad_points(const X& g0, const X& g1, const X& g2, const X& g3, X* to,
                                    int step, T) {
    const X even = g0 + g2, odd = g1 + g3;
    const X near = g0 + T(4) * g2, far = T(2) * g1 + T(8) * g3;
    to[0] = g0;
    to[step] = even + odd;
    to[2 * step] = even - odd;
    to[3 * step] = near + far;
    to[4 * step] = near - far;
    to[5 * step] = g3;
}

// G g: three to six.
template <class X, class T>
POOLING_EXT_INLINE void weight_points(const X& g0, const X& g1, const X& g2, X* to, int step, T) {
    const X even = g0 + g2, far = T(1.0 / 24) * g0 + T(1.0 / 6) * g2, odd = T(1.0 / 12) * g1;
    to[0] = T(0.25) * g0;
    to[step] = T(-1.0 / 6) * (even + g1);
    to[2 * step] = T(-1.0 / 6) * (even - g1);
    to[3 * step] = far + odd;
    to[4 * step] = far - odd;
    to[5 * step] = g2;
}

// G^T u: six to three.
template <class X, class T>
POOLING_EXT_INLINE void weight_grad_points(const X& u0, const X& u1, const X& u2, const X& u3,
                                           const X& u4, const X& u5, X* to, int step, T) {
    const X p = u1 + u2, q = u2 - u1, r = u3 + u4, s = u3 - u4;
    to[0] = T(0.25) * u0 - T(1.0 / 6) * p + T(1.0 / 24) * r;
    to[step] = T(1.0 / 6) * q + T(1.0 / 12) * s;
    to[2 * step] = T(1.0 / 6) * (r - p) + u5;
}

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
