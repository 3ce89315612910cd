// SPDX-License-Identifier: Apache-2.0
// What token_logp.h and row_reductions.h share: the map from logits to exponents of 2, a tile's maximum, a row's exact
// log-sum-exp, and everything around a row's loops (which rows, which label, zero and NaN rows, the dtype switch).
//
// Labels, in every kernel and in both directions:
//   0 <= label < V     the row's label
//   kNoLabel (-1)      the label lies in another shard of the vocabulary (VocabShard.local_labels passes it): logp is
//                      -lse, and the gradient has no one-hot term
//   any other label    an error of the caller, which must show in the loss and must not read outside the row: logp is
//                      NaN, and so is every element of the row's gradient
// lse and the further reductions do not depend on the label. A row whose coefficients are all 0 has the gradient 0,
// whatever its label.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace {

using sspo::kNoLabel;
using sspo::Logits;

constexpr double kLog2e = 1.44269504088896340736;
constexpr int64_t kTile = 256 * kLanes;  // fits the L1 cache; a lane adds 64 terms in float32, the rest is in double
constexpr double kHugeLse = 0x1p28;      // from here on lse has no digits left for the logarithm of its sum
constexpr int kUnroll = 2;               // pairs of vectors per iteration
constexpr int kPrefetch = 4096;          // bytes ahead; the hardware prefetcher stops at the end of a 4 KiB page

// Degrees of the exponential's polynomial. Log-probs are float32 for 16-bit logits too. A 16-bit gradient is rounded
// so coarsely that degree 4, with less than a hundredth of that error, is enough.
#if defined(SSPO_AVX512)
constexpr int kDegree = 5;
#else
constexpr int kDegree = 6;
#endif
template <class T>
constexpr int kGradDegree = sizeof(T) == 2 ? 4 : kDegree;

// A product that is never contracted with a subtraction after it: the difference of two equal huge logits must be 0,
// and with contraction it would be the rounding error of one product.
__attribute__((noinline)) double scaled(double factor, double x) { return factor * x; }

// The exponent of 2 of a logit relative to a shift; m is x, or tanh(a x) with a softcap. With FMA it is k m - shift,
// where k m is not rounded. Without FMA it is k (m - shift), because rounding k m would lose a large logit's digits.
template <bool CAP>
struct Exponent {
    F k;
    Tanh<kDegree> tanh_a;
    double k_value;

    explicit Exponent(const Logits& l) : tanh_a(l.a) {
        const float rounded = (float)((CAP ? l.c : l.a) * kLog2e);
        k_value = rounded;
        k = splat(rounded);
    }
    F map(F x) const { return CAP ? tanh_a(x).tanh : x; }
    // z of one logit. It uses the tanh of the row's loop: the error then cancels where one logit has all probability.
    double z(const Logits& l, double x) const { return CAP ? scaled(l.c, map(splat((float)x))[0]) : scaled(l.a, x); }
#if defined(SSPO_AVX512) || defined(SSPO_AVX2)
    F relative(F m, F shift) const { return multiply_subtract(m, k, shift); }
    F to_shift(F m) const { return m * k; }
    double to_shift(double m) const { return m * k_value; }
    double from_shift(double shift) const { return shift / k_value; }
    double exponent(double shift) const { return shift; }
#else
    F relative(F m, F shift) const { return (m - shift) * k; }
    F to_shift(F m) const { return m; }
    double to_shift(double m) const { return m; }
    double from_shift(double shift) const { return shift; }
    double exponent(double shift) const { return shift * k_value; }
#endif
};

inline double exact_z(const Logits& l, double x) { return l.c == 0 ? scaled(l.a, x) : scaled(l.c, tanh(l.a * x)); }

// dz/dx. 1 - tanh^2 is 4 e / (1 + e)^2 of e = exp(-2 |a x|), which keeps its digits where tanh is close to 1.
inline double slope_of(const Logits& l, double x) {
    if (l.c == 0) return l.a;
    const double e = exp(-2 * fabs(l.a * x));
    return l.c * l.a * 4 * e / ((1 + e) * (1 + e));
}

template <class T>
inline const T* row_pointer(const Logits& l, int64_t position) {
    return (const T*)l.data + (position / l.T) * l.stride_b + (position % l.T) * l.stride_t;
}

inline void prefetch(const void* p) { __builtin_prefetch((const char*)p + kPrefetch); }

// The lanes beyond n hold copies of x[0]: zeros could lie infinitely far above the row.
template <class T>
inline F2 load2_partial(const T* x, int64_t n) {
    T padded[kPair];
    for (int i = 0; i < kPair; ++i) padded[i] = x[0];
    memcpy(padded, x, n * sizeof(T));
    return load2(padded);
}

template <class T, bool CAP>
float tile_max(const T* x, int64_t n, const Exponent<CAP>& e) {
    F m = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) {
        const F2 v = load2(x + i);
        m = vector_max(m, vector_max(e.to_shift(e.map(v.a)), e.to_shift(e.map(v.b))));
    }
    if (i < n) {
        const F2 v = load2_partial(x + i, n - i);
        const Index2 index = lane_index(x);
        const int rest = (int)(n - i);
        const F low = splat(-__builtin_inff());
        m = vector_max(m, index.a < rest ? e.to_shift(e.map(v.a)) : low);
        m = vector_max(m, index.b < rest ? e.to_shift(e.map(v.b)) : low);
    }
    return horizontal_max(m);
}

template <class T>
double row_max(const Logits& l, const T* x) {
    double m = -__builtin_inf();
    for (int64_t v = 0; v < l.V; ++v) {
        const double z = exact_z(l, to_double(x[v]));
        if (!(z <= m)) m = z;  // NaN goes in and stays
        if (m != m) break;
    }
    return m;
}

// lse in two parts, because log_sum would be lost in the sum of the two where logits are 1e16 and more. NaN unless set.
struct RowLse {
    double top = __builtin_nan(""), log_sum = 0;

    double lse() const { return top + log_sum; }
};

// In double, with two passes: for float64 rows, and for the rare rows that float32 exponents cannot represent.
template <class T>
RowLse row_lse_exact(const Logits& l, const T* x) {
    const double m = row_max(l, x);
    if (m == -__builtin_inf()) return {m, 0};
    if (isinf(m) || m != m) return {};
    double sum = 0;
    for (int64_t v = 0; v < l.V; ++v) sum += exp(exact_z(l, to_double(x[v])) - m);
    return {m, log(sum)};
}

// The two parts of the lse that a backward is given. They are computed again where the logits are huge, as in a masked
// row full of the dtype's lowest number. With vocabulary shards `lse` is that of all shards; the difference from the
// row's own goes into log_sum.
template <class T>
RowLse row_lse_parts(const Logits& l, const T* x, double lse) {
    if (!(fabs(lse) > kHugeLse)) return {lse, 0};
    const RowLse own = row_lse_exact(l, x);
    return isfinite(own.top) ? RowLse{own.top, own.log_sum + (lse - own.lse())} : RowLse{lse, 0};
}

inline bool is_valid(int64_t label, int64_t V) { return label == kNoLabel || (label >= 0 && label < V); }

template <class Z>
double log_prob(int64_t label, int64_t V, const RowLse& row, const Z& z_of) {
    if (label == kNoLabel) return -row.lse();
    if (!is_valid(label, V)) return __builtin_nan("");
    const double logp = z_of(label) - row.top - row.log_sum;
    return logp > 0 ? 0 : logp;  // the rounding of lse must not make a probability above 1
}

// Log-probs, reductions and coefficients are float32 unless the logits are float64.
template <class T>
using Accumulator = std::conditional_t<sizeof(T) == 8, double, float>;

// Forward of rows [begin, end). result_of(x, position) reads the row at x and returns a RowLse, or what is derived from
// one; store(n, result) writes what the result holds beyond lse. A row outside the logits gets the default result, NaN.
template <class T, class Args, class Result, class Z, class Store>
SSPO_INLINE inline void forward_rows(const Args& args, int64_t begin, int64_t end, const Result& result_of,
                                     const Z& z_of, const Store& store) {
    const Logits& l = args.logits;
    for (int64_t n = begin; n < end; ++n) {
        const int64_t position = args.rows[n];
        decltype(result_of((const T*)nullptr, position)) row;
        double logp = row.top;
        if (position >= 0 && position < l.positions) {
            const T* x = row_pointer<T>(l, position);
            row = result_of(x, position);
            logp = log_prob(args.labels[n], l.V, row, [&](int64_t v) { return z_of(to_double(x[v])); });
        }
        ((Accumulator<T>*)args.logp)[n] = (Accumulator<T>)logp;
        args.lse[n] = row.lse();
        store(n, row);
    }
}

// What every backward needs of a row: lse and label of the forward, and whether the gradient is zero or NaN throughout.
struct RowGradient {
    double lse = 0;
    int64_t label = kNoLabel;
    enum { kZero, kNaN, kDense } kind = kZero;

    bool has_label() const { return label != kNoLabel; }

    // Of a row with a gradient; `finite` says whether its coefficients are.
    template <class Args>
    void set(const Args& args, int64_t row, bool finite) {
        label = args.labels[row];
        lse = args.lse[row];
        kind = finite && isfinite(lse) && is_valid(label, args.logits.V) ? kDense : kNaN;
    }
};

// Backward of positions [begin, end). gradient_of(row) returns a RowGradient, or what is derived from one;
// write(x, out, gradient, position) writes a dense row. Other rows are not read.
template <class T, class Args, class Gradient, class Write>
SSPO_INLINE inline void backward_rows(const Args& args, int64_t begin, int64_t end, const Gradient& gradient_of,
                                      const Write& write) {
    const Logits& l = args.logits;
    if (l.V == 0) return;  // nothing to write, and `out` may be null
    // From the last position to the first: the forward's last rows may still be in the cache.
    for (int64_t position = end - 1; position >= begin; --position) {
        T* out = (T*)args.out + (position / l.T) * args.out_stride_b + (position % l.T) * args.out_stride_t;
        const int64_t row = args.row_of[position];
        decltype(gradient_of(row)) gradient;
        if (row >= 0 && row < args.N) gradient = gradient_of(row);
        if (gradient.kind == RowGradient::kZero)
            memset(out, 0, l.V * sizeof(T));
        else if (gradient.kind == RowGradient::kNaN)
            for (int64_t v = 0; v < l.V; ++v) from_double(__builtin_nan(""), out + v);
        else
            write(row_pointer<T>(l, position), out, gradient, position);
    }
    if (args.stream) store_fence();
}

// Calls the kernel for the logits' dtype and map: Kernel::rows<T, CAP> or, in double, Kernel::rows_float64.
template <class Kernel, bool CAP, class Args>
void by_dtype(const Args& args, int64_t begin, int64_t end) {
    switch (args.logits.dtype) {
        case sspo::DType::kFloat32:
            return Kernel::template rows<float, CAP>(args, begin, end);
        case sspo::DType::kBFloat16:
            return Kernel::template rows<bf16, CAP>(args, begin, end);
        case sspo::DType::kFloat16:
            return Kernel::template rows<f16, CAP>(args, begin, end);
        case sspo::DType::kFloat64:
            return Kernel::rows_float64(args, begin, end);
    }
}

template <class Kernel, class Args>
void run(const Args& args, int64_t begin, int64_t end) {
    args.logits.c == 0 ? by_dtype<Kernel, false>(args, begin, end) : by_dtype<Kernel, true>(args, begin, end);
}

}  // namespace
