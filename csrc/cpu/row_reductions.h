// The row kernels with further reductions over the vocabulary: entropy, sum of p^2, and KL(reference || p), in the same
// single read of the logits (and of the reference's). reductions_<isa>.cpp defines SSPO_LANES and includes this.
//
// Forward, per row, with t the exponent of 2 of a logit relative to the row's shift and e = 2^t: sums of e, e t and
// e^2; then H = ln(sum e) - ln 2 (sum e t) / (sum e). With r and s the reference's exponent and power: sums of s and s
// (r - t). A tile whose sum shows that the shift is too small is summed again with its maximum, as in rows.h, and what
// was summed before is moved to the new shift.
//
// Backward, per row: p (A + B t + C p) - kappa q, times dz/dx; A, B, C, kappa are numbers of the row.
//
// What is asked for most is asked for alone: LEAN is the entropy without a reference, and KL without the entropy with
// one. Everything else takes all sums.
#pragma once

#include <type_traits>

#include "row.h"

namespace {

using sspo::ReductionArgs;
using sspo::ReductionGradArgs;

// GCC would leave a body with several callers out of line.
#define SSPO_INLINE __attribute__((always_inline))

constexpr double kLn2 = 0.69314718055994530942;
// t stays below 20, so that e t keeps its digits where all the probability lies in a late tile; a tile's own sum cannot
// be larger with its own maximum as the shift.
constexpr double kLateMaximum = 0x1p20;
static_assert(kTile <= kLateMaximum, "a tile's sum relative to its maximum");

// Below every exponent whose power is not 0: 0 * t must be 0 where t is -inf.
inline F finite_exponent(F t) { return at_least(-160.0f, t); }

// -------------------------------------------------------------------------------------------------------- forward

struct RowSums {
    double e = 0, et = 0, ee = 0;  // relative to the row's shift
    double s = 0, srt = 0;         // relative to the reference's shift; srt: r - t

    void add(const RowSums& o) {
        e += o.e;
        et += o.et;
        ee += o.ee;
        s += o.s;
        srt += o.srt;
    }
    // The row's shift, or the reference's, was `d` lower in exponent when these were summed.
    void move(double d) {
        const double f = exp2(-d);
        et = f * (et - d * e);
        e *= f;
        ee *= f * f;
        srt += d * s;
    }
    void move_reference(double d) {
        const double f = exp2(-d);
        srt = f * (srt - d * s);
        s *= f;
    }
};

template <bool KL, bool LEAN>
struct LaneSums {
    F e[2] = {}, et[2] = {}, ee[2] = {}, s[2] = {}, srt[2] = {};

    RowSums total() const {
        RowSums sums;
        sums.e = horizontal_sum(e[0] + e[1]);
        if (!KL || !LEAN) sums.et = horizontal_sum(et[0] + et[1]);
        if (!LEAN) sums.ee = horizontal_sum(ee[0] + ee[1]);
        if (KL) {
            sums.s = horizontal_sum(s[0] + s[1]);
            sums.srt = horizontal_sum(srt[0] + srt[1]);
        }
        return sums;
    }
};

template <class T, bool CAP, bool KL, bool LEAN>
RowSums tile_sums(const T* x, const T* y, int64_t n, const Exponent<CAP>& map, const Exp2<kDegree>& exp2_, float shift,
                  float ref_shift) {
    const F shift_x = splat(shift), shift_y = splat(ref_shift);
    LaneSums<KL, LEAN> sums;
    const auto add = [&](int which, F x_v, F y_v, auto counts) SSPO_INLINE {
        const F t = map.relative(map.map(x_v), shift_x);
        const F e = counts(exp2_(clamp_exponent(t)));
        sums.e[which] += e;
        if (!KL || !LEAN) sums.et[which] += e * finite_exponent(t);
        if (!LEAN) sums.ee[which] += e * e;
        if (KL) {
            const F r = map.relative(map.map(y_v), shift_y);
            const F s = counts(exp2_(clamp_exponent(r)));
            sums.s[which] += s;
            // where the reference has no probability nothing counts, not even an impossible token of p
            sums.srt[which] += s > 0.0f ? s * (r - t) : F{};
        }
    };
    const auto all = [](F v) { return v; };
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) {
        for (int b = 0; b < (int)(kPair * sizeof(T)); b += 64) {
            prefetch((const char*)(x + i) + b);
            if (KL) prefetch((const char*)(y + i) + b);
        }
        const F2 v = load2(x + i), w = KL ? load2(y + i) : F2{};
        add(0, v.a, w.a, all);
        add(1, v.b, w.b, all);
    }
    if (i < n) {
        const F2 v = load2_partial(x + i, n - i), w = KL ? load2_partial(y + i, n - i) : F2{};
        const Index2 index = lane_index(x);
        const int rest = (int)(n - i);
        add(0, v.a, w.a, [&](F f) { return index.a < rest ? f : F{}; });
        add(1, v.b, w.b, [&](F f) { return index.b < rest ? f : F{}; });
    }
    return sums.total();
}

struct RowResult {
    RowLse lse;
    double entropy = lse.top, sum_p2 = lse.top, kl = lse.top, ref_lse = lse.top;
};

// From sums of powers of 2, relative to `top` and `ref_top`.
inline RowResult result_of(const RowSums& sums, double top, double ref_top) {
    // what rounding makes negative is 0; NaN stays
    const auto above_zero = [](double v) { return v < 0 ? 0 : v; };
    RowResult r;
    r.lse = {top, log(sums.e)};
    r.entropy = above_zero(log(sums.e) - kLn2 * sums.et / sums.e);
    r.sum_p2 = sums.ee / (sums.e * sums.e);
    r.ref_lse = ref_top + log(sums.s);
    r.kl = above_zero(kLn2 * sums.srt / sums.s + log(sums.e) - log(sums.s));
    return r;
}

// In double, two passes: float64 rows, and the rare rows that the float32 arithmetic cannot represent.
template <class T>
RowResult row_exact(const Logits& l, const T* x, const T* y) {
    const double m = row_max(l, x), m_ref = y ? row_max(l, y) : 0;
    RowResult none;
    if (isinf(m) || m != m) {
        if (m == -__builtin_inf()) none.lse = {m, 0};
        return none;
    }
    RowSums sums;
    constexpr int64_t kBlock = 128;  // summed on its own: one long sum would lose digits to its length
    for (int64_t begin = 0; begin < l.V; begin += kBlock) {
        RowSums part;
        for (int64_t v = begin; v < l.V && v < begin + kBlock; ++v) {
            const double t = exact_z(l, to_double(x[v])) - m, e = exp(t);
            part.e += e;
            part.et += e > 0 ? e * t : 0;
            part.ee += e * e;
            if (!y) continue;
            const double r = exact_z(l, to_double(y[v])) - m_ref, s = exp(r);
            part.s += s;
            // a reference's finite mask allows nothing, as in float32: wherever in the row its tile is
            part.srt += (sizeof(T) == 8 ? s > 0 : (float)s > 0) ? s * (r - t) : 0;
        }
        sums.add(part);
    }
    sums.et *= kLog2e;
    sums.srt *= kLog2e;
    RowResult result = result_of(sums, m, m_ref);
    if (!y || isinf(m_ref) || m_ref != m_ref) result.kl = result.ref_lse = __builtin_nan("");
    return result;
}

template <class T, bool CAP, bool KL, bool LEAN>
RowResult row_result(const Logits& l, const T* x, const T* y, const Exponent<CAP>& map, const Exp2<kDegree>& exp2_) {
    const float low = -__builtin_inff();
    RowSums sums;
    float shift = 0, ref_shift = 0;
    bool seen = false, ref_seen = !KL;  // something that is not -inf
    for (int64_t i = 0; i < l.V; i += kTile) {
        const int64_t n = l.V - i < kTile ? l.V - i : kTile;
        RowSums part;
        const auto sum = [&] { part = tile_sums<T, CAP, KL, LEAN>(x + i, y + i, n, map, exp2_, shift, ref_shift); };
        // No NaN does. Nor does an infinite srt: a larger maximum of the reference may yet make it 0.
        const auto fits = [&] {
            return part.e <= kLateMaximum && part.s <= kLateMaximum && part.srt < __builtin_inf();
        };
        if (seen && ref_seen) sum();
        if (!seen || !ref_seen || !fits()) {
            const float m = tile_max(x + i, n, map), m_ref = KL ? tile_max(y + i, n, map) : low;
            if (m > low && (!seen || m > shift)) {
                if (seen) sums.move(map.exponent((double)m - shift));
                // before anything is seen the row's sums are 0, and the shift only in those of the reference
                else
                    sums.srt += map.exponent((double)m - shift) * sums.s;
                shift = m;
                seen = true;
            }
            if (KL && m_ref > low && (!ref_seen || m_ref > ref_shift)) {
                if (ref_seen) sums.move_reference(map.exponent((double)m_ref - ref_shift));
                ref_shift = m_ref;
                ref_seen = true;
            }
            sum();
            if (!fits()) return row_exact(l, x, KL ? y : nullptr);
        }
        sums.add(part);
    }
    if (!(sums.e > 0) || (KL && !(sums.s > 0))) return row_exact(l, x, KL ? y : nullptr);
    const double factor = CAP ? l.c : l.a;
    return result_of(sums, scaled(factor, map.from_shift(shift)), scaled(factor, map.from_shift(ref_shift)));
}

template <class T, class Out, class Row, class Z>
void reduce_rows(const ReductionArgs& args, int64_t begin, int64_t end, const Row& row, const Z& z_of) {
    const Logits& l = args.logits;
    for (int64_t n = begin; n < end; ++n) {
        const int64_t position = args.rows[n], label = args.labels[n];
        RowResult r;
        double logp = r.lse.top;
        if (position >= 0 && position < l.positions) {
            const T* x = row_pointer<T>(l, position);
            r = row(x, args.ref.data ? row_pointer<T>(args.ref, position) : nullptr);
            logp = log_prob(label, l.V, r.lse, [&](int64_t v) { return z_of(to_double(x[v])); });
        }
        ((Out*)args.logp)[n] = (Out)logp;
        args.lse[n] = r.lse.lse();
        if (args.entropy) ((Out*)args.entropy)[n] = (Out)r.entropy;
        if (args.sum_p2) ((Out*)args.sum_p2)[n] = (Out)r.sum_p2;
        if (!args.ref.data) continue;
        ((Out*)args.kl)[n] = (Out)r.kl;
        args.ref_lse[n] = r.ref_lse;
    }
}

template <class T, bool CAP>
void reductions_fwd_rows(const ReductionArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    const Exponent<CAP> map(l);
    const Exp2<kDegree> exp2_;
    const bool lean = !args.sum_p2 && !(args.ref.data && args.entropy);
    const auto row = [&](const T* x, const T* y) {
        if (!(map.k_value > 0)) return row_exact(l, x, y);
        if (lean)
            return y ? row_result<T, CAP, true, true>(l, x, y, map, exp2_)
                     : row_result<T, CAP, false, true>(l, x, x, map, exp2_);
        return y ? row_result<T, CAP, true, false>(l, x, y, map, exp2_)
                 : row_result<T, CAP, false, false>(l, x, x, map, exp2_);
    };
    reduce_rows<T, float>(args, begin, end, row, [&](double x) { return map.z(l, x); });
}

void reductions_fwd_float64(const ReductionArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    reduce_rows<double, double>(
        args, begin, end, [&](const double* x, const double* y) { return row_exact(l, x, y); },
        [&](double x) { return exact_z(l, x); });
}

// ------------------------------------------------------------------------------------------------------- backward

// d loss/dz_v = g (1[v = label] - p) + p (constant + log_p log p + square p) - kappa q
struct RowCoefs {
    double g, constant, log_p, square, kappa, lse, ref_lse;  // of the forward
    int64_t label;
    enum { kZero, kNaN, kDense } kind = kZero;
};

template <class Coef>
RowCoefs row_coefs(const ReductionGradArgs& args, int64_t position) {
    RowCoefs r{};
    const int64_t row = args.row_of[position];
    if (row < 0 || row >= args.N) return r;
    const Coef* c = (const Coef*)args.coefs + 5 * row;
    r.g = c[0], r.constant = c[1], r.log_p = c[2], r.square = c[3], r.kappa = args.ref.data ? c[4] : 0;
    if (r.g == 0 && r.log_p == 0 && r.square == 0 && r.kappa == 0) return r;
    r.label = args.labels[row];
    r.lse = args.lse[row];
    r.ref_lse = args.ref.data ? args.ref_lse[row] : 0;
    const double sum = r.g + r.constant + r.log_p + r.square + r.kappa;
    const bool label_ok = r.label == sspo::kNoLabel || (r.label >= 0 && r.label < args.logits.V);
    r.kind = isfinite(sum) && isfinite(r.lse) && isfinite(r.ref_lse) && label_ok ? RowCoefs::kDense : RowCoefs::kNaN;
    return r;
}

// One element, z and the reference's z_ref given; at the label without cancellation where p is close to 1.
inline double element_grad(const Logits& l, const RowCoefs& r, const RowLse& lse, const RowLse& ref_lse, double z,
                           double z_ref, bool is_label) {
    const double log_p = z - lse.top - lse.log_sum, p = exp(log_p);
    double d = is_label ? -r.g * expm1(log_p) : -r.g * p;
    if (p > 0) d += p * (r.constant + r.log_p * log_p + r.square * p);
    if (r.kappa != 0) d -= r.kappa * exp(z_ref - ref_lse.top - ref_lse.log_sum);
    return d * slope_of(l, z);
}

// In double: float64 rows, and those whose logits are too large for float32 exponents. y is null where kappa is 0.
template <class T>
void reduction_grad_row_exact(const Logits& l, const RowCoefs& r, const T* x, const T* y, T* out) {
    const RowLse lse = row_lse_parts(l, x, r.lse), ref_lse = y ? row_lse_parts(l, y, r.ref_lse) : RowLse{};
    for (int64_t v = 0; v < l.V; ++v) {
        const double z = exact_z(l, to_double(x[v])), z_ref = y ? exact_z(l, to_double(y[v])) : 0;
        from_double(element_grad(l, r, lse, ref_lse, z, z_ref, v == r.label), out + v);
    }
}

// Numbers of the row in the units of the vectors.
template <class T, bool CAP>
struct GradRow {
    float shift, ref_shift;
    F constant, log_p, square;
    Exp2<kGradDegree<T>> exp2_, constant_exp2, ref_exp2;

    static float shift_of(const Logits& l, const Exponent<CAP>& map, double lse, double* rounding) {
        const double exact = map.to_shift(lse / (CAP ? l.c : l.a));
        const float shift = (float)exact;
        *rounding = map.exponent(shift - exact);
        return shift;
    }
    GradRow(const Logits& l, const Exponent<CAP>& map, const RowCoefs& r)
        : GradRow(l, map, r, l.a * (CAP ? l.c : 1.0), 0, 0) {}

  private:
    GradRow(const Logits& l, const Exponent<CAP>& map, const RowCoefs& r, double slope, double off, double ref_off)
        : shift(shift_of(l, map, r.lse, &off)),
          ref_shift(shift_of(l, map, r.ref_lse, &ref_off)),
          // log p = ln 2 (t + off), p = 2^t 2^off
          constant(splat((float)(slope * (r.constant - r.g + r.log_p * kLn2 * off)))),
          log_p(splat((float)(slope * r.log_p * kLn2))),
          square(splat((float)(slope * r.square))),
          exp2_(exp2(off)),
          constant_exp2(slope * (r.constant - r.g) * exp2(off)),
          ref_exp2(slope * r.kappa * exp2(ref_off)) {}
};

// LEAN, without a reference: C = 0; with one: B = C = 0.
template <class T, bool CAP, bool STREAM, bool KL, bool LEAN>
void reduction_grad_elements(const T* x, const T* y, T* out, int64_t n, const Exponent<CAP>& map,
                             const GradRow<T, CAP>& row) {
    const F shift = splat(row.shift), ref_shift = splat(row.ref_shift);
    const auto grad = [&](F x_v, F y_v) SSPO_INLINE {
        const F m = map.map(x_v);
        const F t = map.relative(m, shift);
        F d;
        if (KL && LEAN) {
            d = row.constant_exp2(t);
        } else {
            const F p = row.exp2_(t), linear = row.log_p * finite_exponent(t) + row.constant;
            d = p * (LEAN ? linear : row.square * p + linear);
        }
        if (KL) d -= row.ref_exp2(map.relative(map.map(y_v), ref_shift));
        return CAP ? d * (1.0f - m * m) : d;
    };
    const auto partial = [&](int64_t i, int64_t count) {
        const F2 v = load2_partial(x + i, count), w = KL ? load2_partial(y + i, count) : F2{};
        T result[kPair];
        store2<false>(result, F2{grad(v.a, w.a), grad(v.b, w.b)});
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
            const int64_t at = i + u * kPair;
            for (int b = 0; b < (int)(kPair * sizeof(T)); b += 64) {
                prefetch((const char*)(x + at) + b);
                if (KL) prefetch((const char*)(y + at) + b);
            }
            const F2 v = load2(x + at), w = KL ? load2(y + at) : F2{};
            store2<STREAM>(out + at, F2{grad(v.a, w.a), grad(v.b, w.b)});
        }
    }
    for (; i < n; i += kPair) partial(i, n - i < kPair ? n - i : kPair);
}

template <class T>
T* gradient_pointer(const ReductionGradArgs& args, int64_t position) {
    const int64_t T_ = args.logits.T;
    return (T*)args.out + (position / T_) * args.out_stride_b + (position % T_) * args.out_stride_t;
}

template <class T, bool CAP>
void reductions_bwd_rows(const ReductionGradArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    const Exponent<CAP> map(l);
    // From the last position to the first: the forward's last rows may still be in the cache.
    for (int64_t position = end - 1; position >= begin; --position) {
        T* out = gradient_pointer<T>(args, position);
        const RowCoefs r = row_coefs<float>(args, position);
        if (r.kind != RowCoefs::kDense) {
            fill(out, l.V, r.kind == RowCoefs::kZero ? 0.0 : __builtin_nan(""));
            continue;
        }
        const T* x = row_pointer<T>(l, position);
        const T* y = r.kappa != 0 ? row_pointer<T>(args.ref, position) : nullptr;
        if (fabs(r.lse) > kHugeLse || fabs(r.ref_lse) > kHugeLse) {
            reduction_grad_row_exact(l, r, x, y, out);
            continue;
        }
        double label_value = 0;
        if (r.label != sspo::kNoLabel)
            label_value = element_grad(l, r, {r.lse, 0}, {r.ref_lse, 0}, map.z(l, to_double(x[r.label])),
                                       y ? map.z(l, to_double(y[r.label])) : 0, true);
        const GradRow<T, CAP> row(l, map, r);
        const bool lean = r.square == 0 && !(y && r.log_p != 0);
        constexpr std::true_type yes;
        constexpr std::false_type no;
        const auto elements = [&](auto stream, auto kl, auto is_lean) {
            reduction_grad_elements<T, CAP, stream, kl, is_lean>(x, y, out, l.V, map, row);
        };
        const auto with_kl = [&](auto stream, auto kl) { lean ? elements(stream, kl, yes) : elements(stream, kl, no); };
        const auto with_stream = [&](auto stream) { y ? with_kl(stream, yes) : with_kl(stream, no); };
        args.stream ? with_stream(yes) : with_stream(no);
        if (r.label != sspo::kNoLabel) from_double(label_value, out + r.label);
    }
    if (args.stream) store_fence();
}

void reductions_bwd_float64(const ReductionGradArgs& args, int64_t begin, int64_t end) {
    const Logits& l = args.logits;
    for (int64_t position = end - 1; position >= begin; --position) {
        double* out = gradient_pointer<double>(args, position);
        const RowCoefs r = row_coefs<double>(args, position);
        if (r.kind != RowCoefs::kDense) {
            fill(out, l.V, r.kind == RowCoefs::kZero ? 0.0 : __builtin_nan(""));
            continue;
        }
        const double* x = row_pointer<double>(l, position);
        const double* y = r.kappa != 0 ? row_pointer<double>(args.ref, position) : nullptr;
        reduction_grad_row_exact(l, r, x, y, out);
    }
}

// ------------------------------------------------------------------------------------------------------- dispatch

template <bool CAP>
void reductions_fwd_any(const ReductionArgs& args, int64_t begin, int64_t end) {
    switch (args.logits.dtype) {
        case sspo::DType::kFloat32:
            return reductions_fwd_rows<float, CAP>(args, begin, end);
        case sspo::DType::kBFloat16:
            return reductions_fwd_rows<bf16, CAP>(args, begin, end);
        case sspo::DType::kFloat16:
            return reductions_fwd_rows<f16, CAP>(args, begin, end);
        case sspo::DType::kFloat64:
            return reductions_fwd_float64(args, begin, end);
    }
}

template <bool CAP>
void reductions_bwd_any(const ReductionGradArgs& args, int64_t begin, int64_t end) {
    switch (args.logits.dtype) {
        case sspo::DType::kFloat32:
            return reductions_bwd_rows<float, CAP>(args, begin, end);
        case sspo::DType::kBFloat16:
            return reductions_bwd_rows<bf16, CAP>(args, begin, end);
        case sspo::DType::kFloat16:
            return reductions_bwd_rows<f16, CAP>(args, begin, end);
        case sspo::DType::kFloat64:
            return reductions_bwd_float64(args, begin, end);
    }
}

void reductions_fwd(const ReductionArgs& args, int64_t begin, int64_t end) {
    args.logits.c == 0 ? reductions_fwd_any<false>(args, begin, end) : reductions_fwd_any<true>(args, begin, end);
}

void reductions_bwd(const ReductionGradArgs& args, int64_t begin, int64_t end) {
    args.logits.c == 0 ? reductions_bwd_any<false>(args, begin, end) : reductions_bwd_any<true>(args, begin, end);
}

}  // namespace
