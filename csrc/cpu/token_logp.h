// SPDX-License-Identifier: Apache-2.0
// Log-probability of a row's label, and its gradient. One source for every instruction set: isa/*.cpp defines
// SSPO_LANES and includes it.
//
// Forward, per row: the sum of 2^(k x - shift), k = a log2(e), tile by tile. Each logit is read once. The shift is the
// maximum of the first tile, and the next tiles keep it. A tile's sum beyond kRescale (or NaN) shows that the shift was
// too small. Only then the tile's maximum is taken, and the tile, which is still in the L1 cache, is summed again.
// A term lost to underflow is below 2^-126 of the sum, because the shift is the exponent of one of the row's logits.
//
// Backward, per row: 2^(k x - log2(e) lse). The row's factor is multiplied into the polynomial's coefficients. The
// label's element is written last.
#pragma once

#include "row.h"

namespace {

using sspo::BwdArgs;
using sspo::FwdArgs;

constexpr double kRescale = 0x1p60;  // far from overflow, and no precision is lost below it

template <class T, bool CAP>
double tile_sum(const T* x, int64_t n, const Exponent<CAP>& e, const Exp2<kDegree>& exp2_, float shift) {
    const F s = splat(shift);
    const auto term = [&](F v) { return exp2_(clamp_exponent(e.relative(e.map(v), s))); };
    F sum[2 * kUnroll] = {};
    int64_t i = 0;
    for (; i + kUnroll * kPair <= n; i += kUnroll * kPair) {
        for (int u = 0; u < kUnroll; ++u) {
            const T* p = x + i + u * kPair;
            for (int b = 0; b < (int)(kPair * sizeof(T)); b += 64) prefetch((const char*)p + b);
            const F2 v = load2(p);
            sum[2 * u] += term(v.a);
            sum[2 * u + 1] += term(v.b);
        }
    }
    for (; i + kPair <= n; i += kPair) {
        const F2 v = load2(x + i);
        sum[0] += term(v.a);
        sum[1] += term(v.b);
    }
    if (i < n) {
        const F2 v = load2_partial(x + i, n - i);
        const Index2 index = lane_index(x);
        const int rest = (int)(n - i);
        sum[0] += index.a < rest ? term(v.a) : F{};
        sum[1] += index.b < rest ? term(v.b) : F{};
    }
    for (int u = 1; u < 2 * kUnroll; ++u) sum[0] += sum[u];
    return horizontal_sum(sum[0]);
}

template <class T, bool CAP>
RowLse row_lse(const Logits& l, const T* x, const Exponent<CAP>& e, const Exp2<kDegree>& exp2_) {
    float shift = 0;
    double sum = 0;
    for (int64_t i = 0; i < l.V; i += kTile) {
        const int64_t n = l.V - i < kTile ? l.V - i : kTile;
        double part = 0;
        const bool first = sum == 0;
        if (!first) part = tile_sum(x + i, n, e, exp2_, shift);
        if (first || !(part < kRescale)) {
            const float m = tile_max(x + i, n, e);
            if (m == -__builtin_inff() && tile_sum(x + i, n, e, exp2_, 0) == 0) continue;  // masked, and no NaN
            if (isinf(m) || m != m) return row_lse_exact(l, x);  // not finite, or beyond float32 as an exponent
            if (!first && m > shift) sum *= exp2(e.exponent((double)shift - m));
            if (first || m > shift) shift = m;
            part = tile_sum(x + i, n, e, exp2_, shift);
            if (!(part < kRescale)) return row_lse_exact(l, x);
        }
        sum += part;
    }
    if (sum == 0) return row_lse_exact(l, x);
    // The shift as it was rounded: the terms are relative to it, so its rounding does not count.
    return {scaled(CAP ? l.c : l.a, e.from_shift(shift)), log(sum)};
}

struct TokenLogpFwd {
    template <class T, bool CAP>
    static void rows(const FwdArgs& args, int64_t begin, int64_t end) {
        const Logits& l = args.logits;
        const Exponent<CAP> e(l);
        const Exp2<kDegree> exp2_;
        forward_rows<T>(
            args, begin, end,
            [&](const T* x, int64_t) { return e.k_value > 0 ? row_lse<T, CAP>(l, x, e, exp2_) : row_lse_exact(l, x); },
            [&](double x) { return e.z(l, x); }, [](int64_t, const RowLse&) {});
    }

    static void rows_float64(const FwdArgs& args, int64_t begin, int64_t end) {
        const Logits& l = args.logits;
        forward_rows<double>(
            args, begin, end, [&](const double* x, int64_t) { return row_lse_exact(l, x); },
            [&](double x) { return exact_z(l, x); }, [](int64_t, const RowLse&) {});
    }
};

// out[v] = factor * 2^(k x[v] - shift) [* (1 - tanh^2)]; the factor is part of exp2_.
template <class T, bool CAP, bool STREAM, int DEGREE>
void grad_elements(const T* x, T* out, int64_t n, const Exponent<CAP>& e, const Exp2<DEGREE>& exp2_, F shift) {
    const auto grad = [&](F v) {
        if (!CAP) return exp2_(e.relative(v, shift));
        const TanhSech2 m = e.tanh_a(v);
        return exp2_(e.relative(m.tanh, shift)) * m.sech2;
    };
    const auto partial = [&](int64_t i, int64_t count) {
        const F2 v = load2_partial(x + i, count);
        T result[kPair];
        store2<false>(result, F2{grad(v.a), grad(v.b)});
        memcpy(out + i, result, count * sizeof(T));
    };
    int64_t i = 0;
    if (STREAM) {  // streaming stores must be aligned
        const int64_t before = (int64_t)(-(uintptr_t)out % sizeof(F) / sizeof(T));
        i = before < n ? before : n;
        if (i) partial(0, i);
    }
    for (; i + kUnroll * kPair <= n; i += kUnroll * kPair) {
        for (int u = 0; u < kUnroll; ++u) {
            const T* p = x + i + u * kPair;
            for (int b = 0; b < (int)(kPair * sizeof(T)); b += 64) prefetch((const char*)p + b);
            const F2 v = load2(p);
            store2<STREAM>(out + i + u * kPair, F2{grad(v.a), grad(v.b)});
        }
    }
    for (; i < n; i += kPair) partial(i, n - i < kPair ? n - i : kPair);
}

struct TokenLogpGradient : RowGradient {
    double factor = 0;  // dL/dlogp
};

template <class T>
TokenLogpGradient token_logp_gradient(const BwdArgs& args, int64_t row) {
    using A = Accumulator<T>;
    TokenLogpGradient g;
    g.factor = ((const A*)args.coef)[row];
    // Rounded as torch rounds the same product, so that it does not matter which of the two computes it.
    if (args.upstream) g.factor = (A)(g.factor * *(const A*)args.upstream);
    if (g.factor != 0) g.set(args, row, isfinite(g.factor));
    return g;
}

// The label's element: factor * (1 - p) * dz/dx, with expm1 so that nothing cancels where p is close to 1.
inline double label_grad(double z, double slope, double factor, const RowLse& row) {
    return factor * slope * -expm1(z - row.top - row.log_sum);
}

// In double: for float64 rows, and for rows whose logits are too large for float32 exponents.
template <class T>
void grad_row_exact(const Logits& l, const T* x, T* out, const TokenLogpGradient& g) {
    const RowLse row = row_lse_parts(l, x, g.lse);
    const double x_label = g.has_label() ? to_double(x[g.label]) : 0;
    const double label_value = label_grad(exact_z(l, x_label), slope_of(l, x_label), g.factor, row);
    for (int64_t v = 0; v < l.V; ++v) {
        const double x_v = to_double(x[v]);
        from_double(-g.factor * slope_of(l, x_v) * exp(exact_z(l, x_v) - row.top - row.log_sum), out + v);
    }
    if (g.has_label()) from_double(label_value, out + g.label);
}

struct TokenLogpBwd {
    template <class T, bool CAP>
    static void rows(const BwdArgs& args, int64_t begin, int64_t end) {
        const Logits& l = args.logits;
        const Exponent<CAP> e(l);
        const auto write = [&](const T* x, T* out, const TokenLogpGradient& g, int64_t) {
            if (fabs(g.lse) > kHugeLse) return grad_row_exact(l, x, out, g);
            const double x_label = g.has_label() ? to_double(x[g.label]) : 0;
            const double label_value = label_grad(e.z(l, x_label), slope_of(l, x_label), g.factor, {g.lse, 0});
            const double exact_shift = e.to_shift(g.lse / (CAP ? l.c : l.a));
            const float shift = (float)exact_shift;
            const double correction = exp2(e.exponent(shift - exact_shift));
            const Exp2<kGradDegree<T>> exp2_(-g.factor * l.a * (CAP ? l.c : 1.0) * correction);
            if (args.stream)
                grad_elements<T, CAP, true>(x, out, l.V, e, exp2_, splat(shift));
            else
                grad_elements<T, CAP, false>(x, out, l.V, e, exp2_, splat(shift));
            if (g.has_label()) from_double(label_value, out + g.label);
        };
        const auto gradient_of = [&](int64_t row) { return token_logp_gradient<T>(args, row); };
        backward_rows<T>(args, begin, end, gradient_of, write);
    }

    static void rows_float64(const BwdArgs& args, int64_t begin, int64_t end) {
        const auto write = [&](const double* x, double* out, const TokenLogpGradient& g, int64_t) {
            grad_row_exact(args.logits, x, out, g);
        };
        const auto gradient_of = [&](int64_t row) { return token_logp_gradient<double>(args, row); };
        backward_rows<double>(args, begin, end, gradient_of, write);
    }
};

}  // namespace
