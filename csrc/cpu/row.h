// What the row kernels (rows.h) and those with further reductions (reductions.h) share: the map from logits to
// exponents of 2, a tile's maximum, single elements.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using sspo::BwdArgs;
using sspo::FwdArgs;
using sspo::Logits;

constexpr double kLog2e = 1.44269504088896340736;
constexpr int64_t kTile = 256 * kLanes;  // fits the L1 cache; a lane adds 64 terms in float32, the rest is in double
constexpr double kRescale = 0x1p60;      // far from overflow, and no precision is lost below it
constexpr double kHugeLse = 0x1p28;      // from here on lse loses the digits of its sum's logarithm
constexpr int kUnroll = 2;               // pairs of vectors per iteration
constexpr int kPrefetch = 4096;          // bytes ahead; the hardware prefetcher stops at the end of a 4 KiB page

// Degrees of the exponential. Log-probs are float32 whatever the logits are; a 16-bit gradient is rounded more
// than 100 times more coarsely than degree 4 errs.
#if defined(SSPO_AVX512)
constexpr int kDegree = 5;
#else
constexpr int kDegree = 6;
#endif
template <class T>
constexpr int kGradDegree = sizeof(T) == 2 ? 4 : kDegree;

// A product that no subtraction after it is contracted with: the difference of equal huge logits must be 0, not what
// the rounding of one product cut off.
__attribute__((noinline)) double scaled(double factor, double x) { return factor * x; }

// The exponent of 2 of a logit relative to a shift. With FMA it is k m - shift, k m not being rounded; without, it is
// k (m - shift), as k m alone would lose the digits of a large logit. m is x, or tanh(a x) with a softcap.
template <bool CAP>
struct Exponent {
    F k, a;
    double k_value;

    explicit Exponent(const Logits& l) {
        const float rounded = (float)((CAP ? l.c : l.a) * kLog2e);
        k_value = rounded;
        k = splat(rounded);
        a = splat((float)l.a);
    }
    F map(F x) const { return CAP ? vector_tanh(a * x) : x; }
    // z of one logit by the same tanh as its row's, so that the error cancels where one logit has all the probability.
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

inline double slope_of(const Logits& l, double z) { return l.c == 0 ? l.a : l.c * l.a * (1 - z / l.c * (z / l.c)); }

template <class T>
inline const T* row_pointer(const Logits& l, int64_t position) {
    return (const T*)l.data + (position / l.T) * l.stride_b + (position % l.T) * l.stride_t;
}

inline void prefetch(const void* p) { __builtin_prefetch((const char*)p + kPrefetch); }

// The rest are copies of the first: a 0 could be infinitely far above the row.
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

// lse in two parts: among logits of 1e16 and more their sum would not hold the second.
struct RowLse {
    double top = __builtin_nan(""), log_sum = 0;

    double lse() const { return top + log_sum; }
};

// In double, two passes: float64 rows, and the rare rows that the float32 arithmetic cannot represent.
template <class T>
RowLse row_lse_exact(const Logits& l, const T* x) {
    const double m = row_max(l, x);
    if (m == -__builtin_inf()) return {m, 0};
    if (isinf(m) || m != m) return {};
    double sum = 0;
    for (int64_t v = 0; v < l.V; ++v) sum += exp(exact_z(l, to_double(x[v])) - m);
    return {m, log(sum)};
}

// What a backward gets of a row's lse, taken apart again where its logits are huge (a masked row, say, is all at the
// dtype's lowest number). What the lse of a vocabulary's shard lacks to that of the whole is part of the second.
template <class T>
RowLse row_lse_parts(const Logits& l, const T* x, double lse) {
    if (!(fabs(lse) > kHugeLse)) return {lse, 0};
    const RowLse own = row_lse_exact(l, x);
    return isfinite(own.top) ? RowLse{own.top, own.log_sum + (lse - own.lse())} : RowLse{lse, 0};
}

template <class Z>
double log_prob(int64_t label, int64_t V, const RowLse& row, const Z& z_of) {
    if (label == sspo::kNoLabel) return -row.lse();
    if (label < 0 || label >= V) return __builtin_nan("");
    const double logp = z_of(label) - row.top - row.log_sum;
    return logp > 0 ? 0 : logp;  // the rounding of lse must not make a probability above 1
}

template <class T>
void fill(T* out, int64_t n, double value) {
    for (int64_t v = 0; v < n; ++v) from_double(value, out + v);
}

}  // namespace
