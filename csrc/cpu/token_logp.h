// The row kernels, one source for every instruction set. isa/*.cpp defines SSPO_LANES and includes this.
//
// Forward, per row: sum of 2^(k x - shift), k = a log2(e), tile by tile, reading each logit once. The shift is the
// maximum of the first tile. Later tiles are summed with the shift as it stands: a sum beyond kRescale (or NaN) tells
// that it was too small, and only then the tile's maximum is taken and the tile, still in the L1 cache, summed again.
// Every term lost to underflow is below 2^-126 of the sum, because the shift is the exponent of a logit of the row.
//
// Backward, per row: 2^(k x - log2(e) lse) with the row's factor multiplied into the polynomial's coefficients, label
// element set afterwards.
#pragma once

#include "row.h"

namespace {

// ---------------------------------------------------------------------------------------------------------- forward

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
    // The shift in double: what its rounding took from the terms' exponents, their sum has.
    return {scaled(CAP ? l.c : l.a, e.from_shift(shift)), log(sum)};
}

template <class T, bool CAP>
void fwd_rows(const FwdArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    const Exponent<CAP> e(l);
    const Exp2<kDegree> exp2_;
    for (int64_t n = begin; n < end; ++n) {
        const int64_t position = args.rows[n], label = args.labels[n];
        RowLse row;
        double logp = row.top;
        if (position >= 0 && position < l.positions) {
            const T* x = row_pointer<T>(l, position);
            row = e.k_value > 0 ? row_lse<T, CAP>(l, x, e, exp2_) : row_lse_exact(l, x);
            logp = log_prob(label, l.V, row, [&](int64_t v) { return e.z(l, to_double(x[v])); });
        }
        ((float*)args.logp)[n] = (float)logp;
        args.lse[n] = row.lse();
    }
}

void fwd_rows_float64(const FwdArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    for (int64_t n = begin; n < end; ++n) {
        const int64_t position = args.rows[n], label = args.labels[n];
        RowLse row;
        double logp = row.top;
        if (position >= 0 && position < l.positions) {
            const double* x = row_pointer<double>(l, position);
            row = row_lse_exact(l, x);
            logp = log_prob(label, l.V, row, [&](int64_t v) { return exact_z(l, x[v]); });
        }
        ((double*)args.logp)[n] = logp;
        args.lse[n] = row.lse();
    }
}

// --------------------------------------------------------------------------------------------------------- backward

// out[v] = factor * 2^(k x[v] - shift) [* (1 - tanh^2)], factor being part of exp2_.
template <class T, bool CAP, bool STREAM, int DEGREE>
void grad_elements(const T* x, T* out, int64_t n, const Exponent<CAP>& e, const Exp2<DEGREE>& exp2_, F shift) {
    const auto grad = [&](F v) {
        const F m = e.map(v);
        const F p = exp2_(e.relative(m, shift));
        return CAP ? p * (1.0f - m * m) : p;
    };
    const auto partial = [&](int64_t i, int64_t count) {
        const F2 v = load2_partial(x + i, count);
        T result[kPair];
        store2<false>(result, F2{grad(v.a), grad(v.b)});
        memcpy(out + i, result, count * sizeof(T));
    };
    int64_t i = 0;
    if (STREAM) {  // streaming stores must be aligned
        const int64_t head = (int64_t)(-(uintptr_t)out % sizeof(F) / sizeof(T));
        i = head < n ? head : n;
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

// What a row's gradient needs: factor = dL/dlogp, lse, and whether the row is zero or not a number altogether.
struct RowGrad {
    double factor = 0, lse = 0;  // of the forward
    int64_t label = sspo::kNoLabel;
    enum { kZero, kNaN, kDense } kind = kZero;
};

template <class Coef>
RowGrad row_grad(const BwdArgs& args, int64_t position, bool finite_float) {
    RowGrad g;
    const int64_t row = args.row_of[position];
    if (row < 0 || row >= args.N) return g;
    g.factor = ((const Coef*)args.coef)[row];
    // rounded as torch rounds the same product, so that it does not matter which of the two makes it
    if (args.upstream) g.factor = (Coef)(g.factor * *(const Coef*)args.upstream);
    if (g.factor == 0) return g;
    g.label = args.labels[row];
    g.lse = args.lse[row];
    const bool ok = isfinite(g.lse) && (g.label == sspo::kNoLabel || (g.label >= 0 && g.label < args.logits.V)) &&
                    (finite_float ? isfinite((float)g.factor) : isfinite(g.factor));
    g.kind = ok ? RowGrad::kDense : RowGrad::kNaN;
    return g;
}

// The label's element: factor * (1 - p) * dz/dx, without cancellation where p is close to 1.
inline double label_grad(const Logits& l, double z, double factor, const RowLse& row) {
    return factor * slope_of(l, z) * -expm1(z - row.top - row.log_sum);
}

// In double: float64 rows, and those whose logits are too large for float32 exponents.
template <class T>
void grad_row_exact(const Logits& l, const T* x, T* out, const RowGrad& g) {
    const RowLse row = row_lse_parts(l, x, g.lse);
    const bool labelled = g.label != sspo::kNoLabel;
    const double label_value = labelled ? label_grad(l, exact_z(l, to_double(x[g.label])), g.factor, row) : 0;
    for (int64_t v = 0; v < l.V; ++v) {
        const double z = exact_z(l, to_double(x[v]));
        from_double(-g.factor * slope_of(l, z) * exp(z - row.top - row.log_sum), out + v);
    }
    if (labelled) from_double(label_value, out + g.label);
}

template <class T, bool CAP>
void bwd_rows(const BwdArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    const Exponent<CAP> e(l);
    // From the last position to the first: the forward's last rows may still be in the cache.
    for (int64_t position = end - 1; position >= begin; --position) {
        T* out = (T*)args.out + (position / l.T) * args.out_stride_b + (position % l.T) * args.out_stride_t;
        const RowGrad g = row_grad<float>(args, position, true);
        if (g.kind != RowGrad::kDense) {
            if (g.kind == RowGrad::kZero)
                memset(out, 0, l.V * sizeof(T));
            else
                fill(out, l.V, __builtin_nan(""));
            continue;
        }
        const T* x = row_pointer<T>(l, position);
        if (fabs(g.lse) > kHugeLse) {
            grad_row_exact(l, x, out, g);
            continue;
        }
        const bool labelled = g.label != sspo::kNoLabel;
        const double label_value = labelled ? label_grad(l, e.z(l, to_double(x[g.label])), g.factor, {g.lse, 0}) : 0;
        const double exact_shift = e.to_shift(g.lse / (CAP ? l.c : l.a));
        const float shift = (float)exact_shift;
        const double correction = exp2(e.exponent(shift - exact_shift));
        const Exp2<kGradDegree<T>> exp2_(-g.factor * l.a * (CAP ? l.c : 1.0) * correction);
        if (args.stream)
            grad_elements<T, CAP, true>(x, out, l.V, e, exp2_, splat(shift));
        else
            grad_elements<T, CAP, false>(x, out, l.V, e, exp2_, splat(shift));
        if (labelled) from_double(label_value, out + g.label);
    }
    if (args.stream) store_fence();
}

void bwd_rows_float64(const BwdArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    for (int64_t position = end - 1; position >= begin; --position) {
        double* out = (double*)args.out + (position / l.T) * args.out_stride_b + (position % l.T) * args.out_stride_t;
        const RowGrad g = row_grad<double>(args, position, false);
        if (g.kind != RowGrad::kDense) {
            fill(out, l.V, g.kind == RowGrad::kZero ? 0.0 : __builtin_nan(""));
            continue;
        }
        grad_row_exact(l, row_pointer<double>(l, position), out, g);
    }
}

// --------------------------------------------------------------------------------------------------------- dispatch

template <bool CAP>
void fwd_any(const FwdArgs& args, int64_t begin, int64_t end) {
    switch (args.logits.dtype) {
        case sspo::DType::kFloat32:
            return fwd_rows<float, CAP>(args, begin, end);
        case sspo::DType::kBFloat16:
            return fwd_rows<bf16, CAP>(args, begin, end);
        case sspo::DType::kFloat16:
            return fwd_rows<f16, CAP>(args, begin, end);
        case sspo::DType::kFloat64:
            return fwd_rows_float64(args, begin, end);
    }
}

template <bool CAP>
void bwd_any(const BwdArgs& args, int64_t begin, int64_t end) {
    switch (args.logits.dtype) {
        case sspo::DType::kFloat32:
            return bwd_rows<float, CAP>(args, begin, end);
        case sspo::DType::kBFloat16:
            return bwd_rows<bf16, CAP>(args, begin, end);
        case sspo::DType::kFloat16:
            return bwd_rows<f16, CAP>(args, begin, end);
        case sspo::DType::kFloat64:
            return bwd_rows_float64(args, begin, end);
    }
}

void fwd(const FwdArgs& args, int64_t begin, int64_t end) {
    args.logits.c == 0 ? fwd_any<false>(args, begin, end) : fwd_any<true>(args, begin, end);
}

void bwd(const BwdArgs& args, int64_t begin, int64_t end) {
    args.logits.c == 0 ? bwd_any<false>(args, begin, end) : bwd_any<true>(args, begin, end);
}

}  // namespace
