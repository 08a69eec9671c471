// The transforms of Winograd's convolutions along one axis, on anything that adds and multiplies.
//
// Each class has input (B^T d), output (A^T m), grad (A y, the output's transpose), weight (G g)
// and weight_grad (G^T u).
#pragma once

#include "kernels/cpu/conv/lanes.h"
#include "kernels/cpu/conv/winograd_shape.h"

namespace pooling_ext::POOLING_EXT_ISA::conv {

// What multiplies what in a Cook-Toom algorithm with the points 0, infinity, and pairs p and -p,
// which share their sums over even and over odd points. With M(x) = x (x^2 - p^2) (x^2 - q^2) ...,
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
            Terms<X, T> even, odd;
#pragma GCC unroll 10
            for (int k = 0; k < kLast; ++k) {
                even.add(Points::kTable.without[i][k], d[k + 1]);
                odd.add(Points::kTable.without[i][k], d[k]);
            }
            const T p = T(Points::kTable.powers[i][1]);
            to[1 + 2 * i] = even.sum + p * odd.sum, to[2 + 2 * i] = even.sum - p * odd.sum;
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

// Pairs are those with the least error among multiples of 1/8: for 3x3 kernels a third to a quarter
// of that of 1 and 2, for the others less than half of that of 1, 2, 1/2 and 4. With fused
// multiplications none costs more than another.
struct DensePoints {
    static constexpr WinogradAxis kSizes = kWinogradDense;
    static constexpr CookToom<2> kTable{{0.625, 1.5}};
};
struct FivePoints {
    static constexpr WinogradAxis kSizes = kWinogradFive;
    static constexpr CookToom<3> kTable{{0.625, 1, 1.75}};
};
struct SevenPoints {
    static constexpr WinogradAxis kSizes = kWinogradSeven;
    static constexpr CookToom<4> kTable{{0.5, 0.875, 1.25, 2}};
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

// F(4, 2), of which strided kernels are made: two taps on pixels that lie two apart. Its points are
// two pairs, chosen as above, and infinity.
struct PairAxis {
    static constexpr double kFirst = 0.5, kSecond = 1.25;
    static constexpr double kFirst2 = kFirst * kFirst, kSecond2 = kSecond * kSecond;
    static constexpr double kFirst3 = kFirst * kFirst2, kSecond3 = kSecond * kSecond2;
    // One over the derivative of (x^2 - p^2) (x^2 - q^2), which changes its sign with x.
    static constexpr double kFirstWeight = 1 / (2 * kFirst * (kFirst2 - kSecond2));
    static constexpr double kSecondWeight = 1 / (2 * kSecond * (kSecond2 - kFirst2));

    template <class X, class T>
    static POOLING_EXT_INLINE void input(const X& d0, const X& d1, const X& d2, const X& d3,
                                         const X& d4, X* to, T) {
        const X u = d3 - T(kSecond2) * d1, v = T(kFirst) * (d2 - T(kSecond2) * d0);
        const X r = d3 - T(kFirst2) * d1, s = T(kSecond) * (d2 - T(kFirst2) * d0);
        to[0] = u + v;
        to[1] = u - v;
        to[2] = r + s;
        to[3] = r - s;
        to[4] = d4 - T(kFirst2 + kSecond2) * d2 + T(kFirst2 * kSecond2) * d0;
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void output(const X* m, X (&to)[4], T) {
        const X p = m[0] + m[1], q = m[0] - m[1], u = m[2] + m[3], v = m[2] - m[3];
        to[0] = p + u;
        to[1] = T(kFirst) * q + T(kSecond) * v;
        to[2] = T(kFirst2) * p + T(kSecond2) * u;
        to[3] = T(kFirst3) * q + T(kSecond3) * v + m[4];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void grad(const X (&g)[4], X* to, T) {
        const X p = g[0] + T(kFirst2) * g[2], q = T(kFirst) * g[1] + T(kFirst3) * g[3];
        const X u = g[0] + T(kSecond2) * g[2], v = T(kSecond) * g[1] + T(kSecond3) * g[3];
        to[0] = p + q;
        to[1] = p - q;
        to[2] = u + v;
        to[3] = u - v;
        to[4] = g[3];
    }

    // Of the two taps.
    template <class X, class T>
    static POOLING_EXT_INLINE void weight(const X& g0, const X& g1, X* to, T) {
        const X p = T(kFirstWeight) * g0, q = T(kFirstWeight * kFirst) * g1;
        const X u = T(kSecondWeight) * g0, v = T(kSecondWeight * kSecond) * g1;
        to[0] = q + p;
        to[1] = q - p;
        to[2] = v + u;
        to[3] = v - u;
        to[4] = g1;
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight_grad(const X* u, X& to0, X& to1, T) {
        to0 = T(kFirstWeight) * (u[0] - u[1]) + T(kSecondWeight) * (u[2] - u[3]);
        to1 = T(kFirstWeight * kFirst) * (u[0] + u[1]) +
              T(kSecondWeight * kSecond) * (u[2] + u[3]) + u[4];
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
        PairAxis::weight(g[0], g[2], to, T(0));
        to[5] = g[1];
    }

    template <class X, class T>
    static POOLING_EXT_INLINE void weight_grad(const X (&u)[6], X (&to)[3], T) {
        PairAxis::weight_grad(u, to[0], to[2], T(0));
        to[1] = u[5];
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
