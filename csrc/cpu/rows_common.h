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
    double z(const Logits& l, double x) const { return CAP ? l.c * map(splat((float)x))[0] : l.a * x; }
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

inline double exact_z(const Logits& l, double x) { return l.c == 0 ? l.a * x : l.c * tanh(l.a * x); }

template <class T>
inline const T* row_pointer(const Logits& l, int64_t position) {
    return (const T*)l.data + (position / l.T) * l.stride_b + (position % l.T) * l.stride_t;
}

inline void prefetch(const void* p) { __builtin_prefetch((const char*)p + kPrefetch); }

template <class T>
inline F2 load2_partial(const T* x, int64_t n) {
    T padded[kPair] = {};
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

template <class Z>
double log_prob(int64_t label, int64_t V, double lse, const Z& z_of) {
    if (label == sspo::kNoLabel) return -lse;
    if (label < 0 || label >= V) return __builtin_nan("");
    const double logp = z_of(label) - lse;
    return logp > 0 ? 0 : logp;  // the rounding of lse must not make a probability above 1
}

template <class T>
void fill(T* out, int64_t n, double value) {
    for (int64_t v = 0; v < n; ++v) from_double(value, out + v);
}

}  // namespace
