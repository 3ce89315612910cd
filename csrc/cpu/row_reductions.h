// SPDX-License-Identifier: Apache-2.0
// Log-probability of a row's label with further reductions over the vocabulary (entropy, sum of p^2 and
// KL(reference || p)), and their gradient. The logits and the reference's are each read once. One source for every
// instruction set: isa/*.cpp defines SSPO_LANES and includes it.
//
// Forward, per row: t is the exponent of 2 of a logit relative to the row's shift, and e = 2^t. The sums are those of
// e, e t and e^2; then H = ln(sum e) - ln 2 (sum e t) / (sum e). For the reference r and s stand for t and e, and the
// sums are those of s and s (r - t). As in token_logp.h, a tile whose sum shows that the shift is too small is summed
// again with its own maximum. The sums before it are then moved to the new shift.
//
// Backward, per row: p (A + B t + C p) - kappa q, times dz/dx. A, B, C and kappa are constant in the row.
//
// The two most common requests have code of their own, LEAN: the entropy alone where there is no reference, and the KL
// alone where there is one. Every other request computes all sums.
#pragma once

#include "row.h"

namespace {

using sspo::ReductionArgs;
using sspo::ReductionGradArgs;

constexpr double kLn2 = 0.69314718055994530942;
// Keeps t below 20, so that e t has its digits even where a late tile holds all the probability. A tile that is summed
// with its own maximum as the shift cannot exceed it.
constexpr double kLateMaximum = 0x1p20;
static_assert(kTile <= kLateMaximum, "a tile's sum relative to its maximum");

// At least -160, where the power is 0 already: 0 * t must be 0 where t is -inf.
inline F finite_exponent(F t) { return at_least(-160.0f, t); }

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
    // The row's shift is raised by `d` in exponent.
    void move(double d) {
        const double f = exp2(-d);
        et = f * (et - d * e);
        e *= f;
        ee *= f * f;
        srt += d * s;
    }
    // The reference's shift is raised by `d`.
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
            // A token that the reference excludes counts 0, even where p excludes it too and r - t is NaN.
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

struct RowResult : RowLse {
    double entropy = top, sum_p2 = top, kl = top, ref_lse = top;
};

// From sums of powers of 2, relative to `top` and `ref_top`.
inline RowResult result_of(const RowSums& sums, double top, double ref_top) {
    // Rounding can make a result slightly negative: that becomes 0. NaN stays.
    const auto above_zero = [](double v) { return v < 0 ? 0 : v; };
    RowResult r;
    r.top = top;
    r.log_sum = log(sums.e);
    r.entropy = above_zero(log(sums.e) - kLn2 * sums.et / sums.e);
    r.sum_p2 = sums.ee / (sums.e * sums.e);
    r.ref_lse = ref_top + log(sums.s);
    r.kl = above_zero(kLn2 * sums.srt / sums.s + log(sums.e) - log(sums.s));
    return r;
}

// In double, with two passes: for float64 rows, and for the rare rows that float32 exponents cannot represent.
template <class T>
RowResult row_exact(const Logits& l, const T* x, const T* y) {
    const double m = row_max(l, x), m_ref = y ? row_max(l, y) : 0;
    RowResult none;
    if (isinf(m) || m != m) {
        if (m == -__builtin_inf()) none.top = m;
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
            // A token that the reference masks with a finite number counts 0, as in float32, whatever tile it is in.
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
    bool seen = false, ref_seen = !KL;  // a logit above -inf
    for (int64_t i = 0; i < l.V; i += kTile) {
        const int64_t n = l.V - i < kTile ? l.V - i : kTile;
        RowSums part;
        const auto sum = [&] { part = tile_sums<T, CAP, KL, LEAN>(x + i, y + i, n, map, exp2_, shift, ref_shift); };
        // NaN does not fit. An infinite srt does not either: with a larger maximum of the reference it may become 0.
        const auto fits = [&] {
            return part.e <= kLateMaximum && part.s <= kLateMaximum && part.srt < __builtin_inf();
        };
        if (seen && ref_seen) sum();
        if (!seen || !ref_seen || !fits()) {
            const float m = tile_max(x + i, n, map), m_ref = KL ? tile_max(y + i, n, map) : low;
            if (m > low && (!seen || m > shift)) {
                if (seen)
                    sums.move(map.exponent((double)m - shift));
                else  // the row's own sums are still 0: the shift is in srt only
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

template <class T>
auto store_reductions(const ReductionArgs& args) {
    using A = Accumulator<T>;
    return [&args](int64_t n, const RowResult& r) {
        if (args.entropy) ((A*)args.entropy)[n] = (A)r.entropy;
        if (args.sum_p2) ((A*)args.sum_p2)[n] = (A)r.sum_p2;
        if (!args.ref.data) return;
        ((A*)args.kl)[n] = (A)r.kl;
        args.ref_lse[n] = r.ref_lse;
    };
}

struct RowReductionsFwd {
    template <class T, bool CAP>
    static void rows(const ReductionArgs& args, int64_t begin, int64_t end) {
        const Logits& l = args.logits;
        const Exponent<CAP> map(l);
        const Exp2<kDegree> exp2_;
        const bool has_ref = args.ref.data, lean = !args.sum_p2 && !(has_ref && args.entropy);
        const auto result_of = [&](const T* x, int64_t position) {
            const T* y = has_ref ? row_pointer<T>(args.ref, position) : nullptr;
            if (!(map.k_value > 0)) return row_exact(l, x, y);
            if (lean)
                return y ? row_result<T, CAP, true, true>(l, x, y, map, exp2_)
                         : row_result<T, CAP, false, true>(l, x, x, map, exp2_);
            return y ? row_result<T, CAP, true, false>(l, x, y, map, exp2_)
                     : row_result<T, CAP, false, false>(l, x, x, map, exp2_);
        };
        const auto z_of = [&](double x) { return map.z(l, x); };
        forward_rows<T>(args, begin, end, result_of, z_of, store_reductions<T>(args));
    }

    static void rows_float64(const ReductionArgs& args, int64_t begin, int64_t end) {
        const Logits& l = args.logits;
        const auto result_of = [&](const double* x, int64_t position) {
            return row_exact(l, x, args.ref.data ? row_pointer<double>(args.ref, position) : nullptr);
        };
        const auto z_of = [&](double x) { return exact_z(l, x); };
        forward_rows<double>(args, begin, end, result_of, z_of, store_reductions<double>(args));
    }
};

// d loss/dz_v = g (1[v = label] - p) + p (constant + log_p log p + square p) - kappa q
struct ReductionsGradient : RowGradient {
    double g = 0, constant = 0, log_p = 0, square = 0, kappa = 0, ref_lse = 0;
};

template <class T>
ReductionsGradient reductions_gradient(const ReductionGradArgs& args, int64_t row) {
    ReductionsGradient r;
    const Accumulator<T>* c = (const Accumulator<T>*)args.coefs + 5 * row;
    r.g = c[0], r.constant = c[1], r.log_p = c[2], r.square = c[3], r.kappa = args.ref.data ? c[4] : 0;
    if (r.g == 0 && r.log_p == 0 && r.square == 0 && r.kappa == 0) return r;
    r.ref_lse = args.ref.data ? args.ref_lse[row] : 0;
    const double sum = r.g + r.constant + r.log_p + r.square + r.kappa;
    r.set(args, row, isfinite(sum) && isfinite(r.ref_lse));
    return r;
}

// One element, from its z, dz/dx and the reference's z. At the label expm1 keeps 1 - p from cancelling where p is close
// to 1.
inline double element_grad(const ReductionsGradient& r, const RowLse& lse, const RowLse& ref_lse, double z,
                           double slope, double z_ref, bool is_label) {
    const double log_p = z - lse.top - lse.log_sum, p = exp(log_p);
    double d = is_label ? -r.g * expm1(log_p) : -r.g * p;
    if (p > 0) d += p * (r.constant + r.log_p * log_p + r.square * p);
    if (r.kappa != 0) d -= r.kappa * exp(z_ref - ref_lse.top - ref_lse.log_sum);
    return d * slope;
}

// In double: for float64 rows, and for rows whose logits are too large for float32 exponents. y is null where kappa is
// 0.
template <class T>
void reduction_grad_row_exact(const Logits& l, const ReductionsGradient& r, const T* x, const T* y, T* out) {
    const RowLse lse = row_lse_parts(l, x, r.lse), ref_lse = y ? row_lse_parts(l, y, r.ref_lse) : RowLse{};
    for (int64_t v = 0; v < l.V; ++v) {
        const double x_v = to_double(x[v]), z_ref = y ? exact_z(l, to_double(y[v])) : 0;
        from_double(element_grad(r, lse, ref_lse, exact_z(l, x_v), slope_of(l, x_v), z_ref, v == r.label), out + v);
    }
}

// A row's constants, in the units of the vector loop.
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
    GradRow(const Logits& l, const Exponent<CAP>& map, const ReductionsGradient& r)
        : GradRow(l, map, r, l.a * (CAP ? l.c : 1.0), 0, 0) {}

  private:
    GradRow(const Logits& l, const Exponent<CAP>& map, const ReductionsGradient& r, double slope, double off,
            double ref_off)
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

// LEAN: C = 0 without a reference, B = C = 0 with one.
template <class T, bool CAP, bool STREAM, bool KL, bool LEAN>
void reduction_grad_elements(const T* x, const T* y, T* out, int64_t n, const Exponent<CAP>& map,
                             const GradRow<T, CAP>& row) {
    const F shift = splat(row.shift), ref_shift = splat(row.ref_shift);
    const auto grad = [&](F x_v, F y_v) SSPO_INLINE {
        const TanhSech2 m = CAP ? map.tanh_a(x_v) : TanhSech2{x_v, F{}};
        const F t = map.relative(m.tanh, shift);
        F d;
        if (KL && LEAN) {
            d = row.constant_exp2(t);
        } else {
            const F p = row.exp2_(t), linear = row.log_p * finite_exponent(t) + row.constant;
            d = p * (LEAN ? linear : row.square * p + linear);
        }
        if (KL) d -= row.ref_exp2(map.relative(map.map(y_v), ref_shift));
        return CAP ? d * m.sech2 : d;
    };
    const auto partial = [&](int64_t i, int64_t count) {
        const F2 v = load2_partial(x + i, count), w = KL ? load2_partial(y + i, count) : F2{};
        T result[kPair];
        store2<false>(result, F2{grad(v.a, w.a), grad(v.b, w.b)});
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

// The reference's row, or null where nothing of it is needed.
template <class T>
const T* reference_row(const ReductionGradArgs& args, const ReductionsGradient& r, int64_t position) {
    return r.kappa != 0 ? row_pointer<T>(args.ref, position) : nullptr;
}

struct RowReductionsBwd {
    template <class T, bool CAP>
    static void rows(const ReductionGradArgs& args, int64_t begin, int64_t end) {
        const Logits& l = args.logits;
        const Exponent<CAP> map(l);
        const auto write = [&](const T* x, T* out, const ReductionsGradient& r, int64_t position) {
            const T* y = reference_row<T>(args, r, position);
            if (fabs(r.lse) > kHugeLse || fabs(r.ref_lse) > kHugeLse) return reduction_grad_row_exact(l, r, x, y, out);
            double label_value = 0;
            if (r.has_label()) {
                const double x_v = to_double(x[r.label]);
                label_value = element_grad(r, {r.lse, 0}, {r.ref_lse, 0}, map.z(l, x_v), slope_of(l, x_v),
                                           y ? map.z(l, to_double(y[r.label])) : 0, true);
            }
            const GradRow<T, CAP> row(l, map, r);
            const bool lean = r.square == 0 && !(y && r.log_p != 0);
            constexpr std::true_type yes;
            constexpr std::false_type no;
            const auto elements = [&](auto stream, auto kl, auto is_lean) {
                reduction_grad_elements<T, CAP, stream, kl, is_lean>(x, y, out, l.V, map, row);
            };
            const auto with_kl = [&](auto stream, auto kl) {
                lean ? elements(stream, kl, yes) : elements(stream, kl, no);
            };
            const auto with_stream = [&](auto stream) { y ? with_kl(stream, yes) : with_kl(stream, no); };
            args.stream ? with_stream(yes) : with_stream(no);
            if (r.has_label()) from_double(label_value, out + r.label);
        };
        const auto gradient_of = [&](int64_t row) { return reductions_gradient<T>(args, row); };
        backward_rows<T>(args, begin, end, gradient_of, write);
    }

    static void rows_float64(const ReductionGradArgs& args, int64_t begin, int64_t end) {
        const auto write = [&](const double* x, double* out, const ReductionsGradient& r, int64_t position) {
            reduction_grad_row_exact(args.logits, r, x, reference_row<double>(args, r, position), out);
        };
        const auto gradient_of = [&](int64_t row) { return reductions_gradient<double>(args, row); };
        backward_rows<double>(args, begin, end, gradient_of, write);
    }
};

}  // namespace
