// The transforms of Winograd's convolutions along one axis, on anything that adds and multiplies.
//
// Each class has input (B^T d), output (A^T m), grad (A y, the output's transpose), weight (G g)
// and weight_grad (G^T u).
#pragma once

#include "kernels/cpu/conv/lanes.h"
#include "kernels/cpu/conv/winograd_shape.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// What multiplies what in a Cook-Toom algorithm with the points 0, infinity, and pairs p and -p,
// which share their sums over even and over odd places. With M(x) = x (x^2 - p^2) (x^2 - q^2) ...,
// row p of B^T has the coefficients of M(x) / (x - p), row p of G powers of p over M'(p), and
// column p of A^T powers of p; those of infinity have the coefficients of M, and 1 in the last
// place.
template <int kPairs>
struct CookToom {
    static constexpr int kPoints = 2 * kPairs + 2;

    double all[kPoints] = {0, 1};         // M's coefficients
    double without[kPairs][kPoints + 1];  // those of M(x) / (x^2 - p^2)
    double powers[kPairs][kPoints];
    double weights[kPairs][kPoints];  // powers of p over M'(p)

    explicit constexpr CookToom(const double (&pairs)[kPairs]) : without{}, powers{}, weights{} {
        for (int i = 0; i < kPairs; ++i) {
            multiply(all, pairs[i]);
            without[i][1] = powers[i][0] = 1;
            for (int k = 1; k < kPoints; ++k) powers[i][k] = powers[i][k - 1] * pairs[i];
            for (int other = 0; other < kPairs; ++other)
                if (other != i) multiply(without[i], pairs[other]);
        }
        for (int i = 0; i < kPairs; ++i) {
            double derivative = 0;  // an even function
            for (int k = 1; k < kPoints; ++k) derivative += k * all[k] * powers[i][k - 1];
            for (int k = 0; k < kPoints; ++k) weights[i][k] = powers[i][k] / derivative;
        }
    }

  private:
    // By x^2 - p^2.
    static constexpr void multiply(double* polynomial, double p) {
        for (int k = kPoints - 1; k >= 0; --k)
            polynomial[k] = (k >= 2 ? polynomial[k - 2] : 0) - p * p * polynomial[k];
    }
};

// A sum of terms of which compilers know the factors: those of 0 and 1 cost nothing.
template <class X, class T>
struct Terms {
    X sum{};
    bool is_empty = true;

    POOLING_EXT_INLINE void add(double factor, const X& x) {
        if (factor == 0) return;
        const X term = factor == 1 ? x : T(factor) * x;
        sum = is_empty ? term : sum + term;
        is_empty = false;
    }
};

// F(out, taps) by such an algorithm. Points are in memory as 0, p, -p, q, -q, ..., infinity.
template <class Points>
struct CookToomAxis {
    static constexpr WinogradAxis kSizes = Points::kSizes;
    static constexpr int kPairs = Points::kTable.kPoints / 2 - 1, kLast = 2 * kPairs + 1;
    static constexpr int kTaps = int(kSizes.taps), kOut = int(kSizes.out);

    template <class X, class T>
    static POOLING_EXT_INLINE void input(const X (&d)[kLast + 1], X (&to)[kLast + 1], T) {
        Terms<X, T> zero, infinity;
#pragma GCC unroll 10
        for (int k = 0; k < kLast; ++k) zero.add(Points::kTable.all[k + 1], d[k]);
#pragma GCC unroll 10
        for (int k = 0; k <= kLast; ++k) infinity.add(Points::kTable.all[k], d[k]);
        to[0] = zero.sum, to[kLast] = infinity.sum;
#pragma GCC unroll 4
        for (int i = 0; i < kPairs; ++i) {
            Terms<X, T> even, odd, scaled;
#pragma GCC unroll 10
            for (int k = 0; k < kLast; ++k) {
                even.add(Points::kTable.without[i][k], d[k + 1]);
                odd.add(Points::kTable.without[i][k], d[k]);
            }
            scaled.add(Points::kTable.powers[i][1], odd.sum);
            to[1 + 2 * i] = even.sum + scaled.sum, to[2 + 2 * i] = even.sum - scaled.sum;
        }
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void output(const X (&m)[kLast + 1], X (&to)[kOut], T) {
        from_points<kOut>(m, m[0], Points::kTable.powers, to, T(0));
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void grad(const X (&g)[kOut], X (&to)[kLast + 1], T) {
        to_points<kOut>(g, g[0], Points::kTable.powers, to, T(0));
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight(const X (&g)[kTaps], X (&to)[kLast + 1], T) {
        to_points<kTaps>(g, T(1 / Points::kTable.all[1]) * g[0], Points::kTable.weights, to, T(0));
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight_grad(const X (&u)[kLast + 1], X (&to)[kTaps], T) {
        from_points<kTaps>(u, T(1 / Points::kTable.all[1]) * u[0], Points::kTable.weights, to,
                           T(0));
    }

  private:
    using Factors = double[kPairs][kLast + 1];

    // The polynomial with these coefficients at each point.
    template <int kSize, class X, class T>
    static POOLING_EXT_INLINE void to_points(const X (&g)[kSize], const X& zero,
                                             const Factors& factors, X (&to)[kLast + 1], T) {
        to[0] = zero, to[kLast] = g[kSize - 1];
#pragma GCC unroll 4
        for (int i = 0; i < kPairs; ++i) {
            Terms<X, T> even, odd;
#pragma GCC unroll 7
            for (int k = 0; k < kSize; ++k) (k % 2 == 0 ? even : odd).add(factors[i][k], g[k]);
            to[1 + 2 * i] = even.sum + odd.sum, to[2 + 2 * i] = even.sum - odd.sum;
        }
    }

    // The transpose.
    template <int kSize, class X, class T>
    static POOLING_EXT_INLINE void from_points(const X (&m)[kLast + 1], const X& zero,
                                               const Factors& factors, X (&to)[kSize], T) {
        X even[kPairs], odd[kPairs];
#pragma GCC unroll 4
        for (int i = 0; i < kPairs; ++i)
            even[i] = m[1 + 2 * i] + m[2 + 2 * i], odd[i] = m[1 + 2 * i] - m[2 + 2 * i];
#pragma GCC unroll 7
        for (int k = 0; k < kSize; ++k) {
            Terms<X, T> terms;
            terms.add(k == 0 ? 1 : 0, zero);
#pragma GCC unroll 4
            for (int i = 0; i < kPairs; ++i)
                terms.add(factors[i][k], k % 2 == 0 ? even[i] : odd[i]);
            terms.add(k == kSize - 1 ? 1 : 0, m[kLast]);
            to[k] = terms.sum;
        }
    }
};

struct DensePoints {
    static constexpr WinogradAxis kSizes = kWinogradDense;
    static constexpr CookToom<2> kTable{{1, 2}};
};
struct FivePoints {
    static constexpr WinogradAxis kSizes = kWinogradFive;
    static constexpr CookToom<3> kTable{{1, 2, 0.5}};
};
// The last pair was chosen by the error: 7e-6 of the largest output, with 4 or 1/4 three times as
// much.
struct SevenPoints {
    static constexpr WinogradAxis kSizes = kWinogradSeven;
    static constexpr CookToom<4> kTable{{1, 2, 0.5, 1.25}};
};
using DenseAxis = CookToomAxis<DensePoints>;
using FiveAxis = CookToomAxis<FivePoints>;
using SevenAxis = CookToomAxis<SevenPoints>;

// Along which nothing is to be done.
struct SingleAxis {
    static constexpr WinogradAxis kSizes = kWinogradSingle;

    template <class X, class T>
    static POOLING_EXT_INLINE void input(const X (&d)[1], X (&to)[1], T) {
        to[0] = d[0];
    }
    template <class X, class T>
    static POOLING_EXT_INLINE void output(const X (&m)[1], X (&to)[1], T) {
        to[0] = m[0];
    }
    template <class X, class T>
    static POOLING_EXT_INLINE void grad(const X (&g)[1], X (&to)[1], T) {
        to[0] = g[0];
    }
    template <class X, class T>
    static POOLING_EXT_INLINE void weight(const X (&g)[1], X (&to)[1], T) {
        to[0] = g[0];
    }
    template <class X, class T>
    static POOLING_EXT_INLINE void weight_grad(const X (&u)[1], X (&to)[1], T) {
        to[0] = u[0];
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
using Square5Tile = Tile<FiveAxis, FiveAxis>;
using Row3Tile = Tile<SingleAxis, DenseAxis>;
using Row7Tile = Tile<SingleAxis, SevenAxis>;

// Calls use(tile) with that of a kind whose kernels have a gradient, or gives nullptr.
template <class Use>
auto of_kind(WinogradKind kind, const Use& use) -> decltype(use(DenseTile{})) {
    switch (kind) {
        case WinogradKind::Dense:
            return use(DenseTile{});
        case WinogradKind::Strided:
            return use(StridedTile{});
        case WinogradKind::Square5:
            return use(Square5Tile{});
        case WinogradKind::Row3:
            return use(Row3Tile{});
        case WinogradKind::Row7:
            return use(Row7Tile{});
        case WinogradKind::Spread:
            break;
    }
    return nullptr;
}

}  // namespace pooling_ext::POOLING_EXT_ISA::conv
