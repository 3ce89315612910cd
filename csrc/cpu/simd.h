// SPDX-License-Identifier: Apache-2.0
// Vectors of SSPO_LANES floats for one instruction set, with conversions to and from 16-bit types, exp2 and tanh.
// Included by isa/*.cpp only. Everything is in an anonymous namespace, and no inline function of the C++ library is
// called: the linker merges such functions across files, and a machine without AVX-512 could get the AVX-512 version.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the 16-bit loads assume a little-endian machine"
#endif

namespace {

// For bodies that GCC would leave out of line. Their loops would then load captured constants in every iteration.
#define SSPO_INLINE __attribute__((always_inline))

constexpr int kLanes = SSPO_LANES;
constexpr int kPair = 2 * kLanes;  // elements come in pairs of vectors, so that 16-bit types fill whole registers

typedef float F __attribute__((vector_size(4 * SSPO_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * SSPO_LANES)));
typedef int32_t I __attribute__((vector_size(4 * SSPO_LANES)));

struct F2 {
    F a, b;
};

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline F splat(float v) { return v - F{}; }
inline U splat_bits(uint32_t v) { return v + U{}; }
inline U bits_of(F v) { return (U)v; }
inline F from_bits(U v) { return (F)v; }

template <class V>
inline V load_vector(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

// Loads: kPair elements as two vectors. bfloat16 is split into even and odd elements, which needs no permutation.
// lane_index says which element a lane holds.

inline F2 load2(const float* p) { return {load_vector<F>(p), load_vector<F>(p + kLanes)}; }

inline F2 load2(const bf16* p) {
    const U v = load_vector<U>(p);
    return {from_bits(v << 16), from_bits(v & 0xffff0000u)};
}

inline F2 load2(const f16* p) {
#if defined(SSPO_AVX512)
    return {(F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)),
            (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1))};
#elif defined(SSPO_AVX2)
    return {(F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
#else
    const auto widen = [](U h) {
        // Exponent and mantissa are shifted into place. The product corrects the exponent's bias, exactly even for
        // subnormals.
        const F magnitude = from_bits((h & 0x7fffu) << 13) * 0x1p112f;
        const U special = (U)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
        return from_bits(bits_of(magnitude) | special | ((h & 0x8000u) << 16));
    };
    const U v = load_vector<U>(p);
    return {widen(v & 0xffffu), widen(v >> 16)};
#endif
}

struct Index2 {
    I a, b;
};

inline Index2 lane_index(bool interleaved) {
    Index2 index;
    for (int l = 0; l < kLanes; ++l) {
        index.a[l] = interleaved ? 2 * l : l;
        index.b[l] = interleaved ? 2 * l + 1 : kLanes + l;
    }
    return index;
}
inline Index2 lane_index(const float*) { return lane_index(false); }
inline Index2 lane_index(const bf16*) { return lane_index(true); }
#if defined(SSPO_AVX512) || defined(SSPO_AVX2)
inline Index2 lane_index(const f16*) { return lane_index(false); }
#else
inline Index2 lane_index(const f16*) { return lane_index(true); }
#endif

template <bool STREAM, class V>
inline void store_vector(void* p, V v) {
#if defined(SSPO_AVX512)
    if (STREAM) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(SSPO_AVX2)
    if (STREAM) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__x86_64__)
    if (STREAM) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
    memcpy(p, &v, sizeof v);
}

template <bool STREAM>
inline void store2(float* p, F2 v) {
    store_vector<STREAM>(p, v.a);
    store_vector<STREAM>(p + kLanes, v.b);
}

// To nearest, ties away from zero. A tie is one value in 65536 here, and ties to even would make the backward a fifth
// slower. The caller stores no NaN: the addition could carry its payload into the sign.
inline U round_bf16(F v) { return bits_of(v) + 0x8000u; }

template <bool STREAM>
inline void store2(bf16* p, F2 v) {
    store_vector<STREAM>(p, (round_bf16(v.a) >> 16) | (round_bf16(v.b) & 0xffff0000u));
}

#if defined(SSPO_AVX512)
template <bool STREAM>
inline void store_half(void* p, __m256i v) {
    STREAM ? _mm256_stream_si256((__m256i*)p, v) : _mm256_storeu_si256((__m256i*)p, v);
}
#endif

template <bool STREAM>
inline void store2(f16* p, F2 v) {
#if defined(SSPO_AVX512)
    store_half<STREAM>(p, _mm512_cvtps_ph((__m512)v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    store_half<STREAM>(p + kLanes, _mm512_cvtps_ph((__m512)v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(SSPO_AVX2)
    const __m128i a = _mm256_cvtps_ph((__m256)v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i b = _mm256_cvtps_ph((__m256)v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_vector<STREAM>(p, _mm256_set_m128i(b, a));
#else
    const auto narrow = [](F f) {
        const U sign = (bits_of(f) >> 16) & 0x8000u, magnitude = bits_of(f) & 0x7fffffffu;
        const U normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // exponent - 112, rounded
        const U subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;       // the addition rounds
        const U finite = (U)((I)magnitude < 0x38800000) & subnormal;
        const U wide = ~(U)((I)magnitude < 0x38800000) & normal;
        const U overflow = (U)((I)magnitude >= 0x477ff000);  // 65520 and up, and NaN
        const U special = ((U)((I)magnitude > 0x7f800000) & 0x0200u) | 0x7c00u;
        return sign | (overflow & special) | (~overflow & (finite | wide));
    };
    store_vector<STREAM>(p, narrow(v.a) | (narrow(v.b) << 16));
#endif
}

inline void store_fence() {
#if defined(__x86_64__)
    _mm_sfence();  // without it, streaming stores are not ordered with the thread's end
#endif
}

#if defined(SSPO_AVX512)
inline F multiply_subtract(F a, F b, F c) { return (F)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(SSPO_AVX2)
inline F multiply_subtract(F a, F b, F c) { return (F)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c); }
#endif

// max(limit, t) and min(limit, t) that keep a NaN in t, as one instruction.
inline F at_least(float limit, F t) {
#if defined(SSPO_AVX512)
    return (F)_mm512_max_ps(_mm512_set1_ps(limit), (__m512)t);
#elif defined(SSPO_AVX2)
    return (F)_mm256_max_ps(_mm256_set1_ps(limit), (__m256)t);
#elif defined(__x86_64__)
    return (F)_mm_max_ps(_mm_set1_ps(limit), (__m128)t);
#else
    return t < limit ? splat(limit) : t;
#endif
}

inline F at_most(float limit, F t) {
#if defined(SSPO_AVX512)
    return (F)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)t);
#elif defined(SSPO_AVX2)
    return (F)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)t);
#elif defined(__x86_64__)
    return (F)_mm_min_ps(_mm_set1_ps(limit), (__m128)t);
#else
    return t > limit ? splat(limit) : t;
#endif
}

// 2^t times a factor that is multiplied into the polynomial's coefficients. Relative errors of the polynomials, which
// are minimax (Remez) with the constant term fixed at 1: degree 4: 3e-6, degree 5: 9e-8, degree 6: 3e-9.

template <int DEGREE>
struct Exp2 {
    F c[DEGREE + 1];

    // Multiplied into the coefficients, the factor costs nothing per element.
    explicit Exp2(double factor = 1.0) {
#if defined(SSPO_AVX512)  // for the fraction in [0, 1)
        static const double k4[] = {1.0, 0.693044845025, 0.241280204074, 0.0522424753446, 0.0134266837168};
        static const double k5[] = {
            1.0, 0.693151311818, 0.240164450039, 0.0557999134252, 0.00901702996253, 0.00186713021195};
        const double* k = DEGREE == 4 ? k4 : k5;
#else  // for the fraction in [-1/2, 1/2]
        static const double k4[] = {1.0, 0.693113604483, 0.240207111005, 0.055976883149, 0.00978291118662};
        static const double k6[] = {1.0,
                                    0.693147214968,
                                    0.240226527829,
                                    0.0555031055121,
                                    0.00961769297614,
                                    0.00134066438475,
                                    0.000155946770151};
        const double* k = DEGREE == 4 ? k4 : k6;
#endif
        for (int i = 0; i <= DEGREE; ++i) c[i] = splat((float)(k[i] * factor));
    }

    SSPO_INLINE F operator()(F t) const {
#if defined(SSPO_AVX512)
        const F f = (F)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
        return (F)_mm512_scalef_ps((__m512)poly(f), (__m512)t);                                 // poly * 2^floor(t)
#else
        t = at_least(-127.0f, t);         // the scale of -127 is 0, so -inf and all that underflows give 0
        const F shifted = t + 0x1.8p23f;  // its low bits are round(t)
        const F f = t - (shifted - 0x1.8p23f);
        const F scale = from_bits((bits_of(shifted) << 23) + 0x3f800000u);
        return poly(f) * scale;
#endif
    }

  private:
    F poly(F f) const {
        F p = c[DEGREE];
        for (int i = DEGREE - 1; i >= 0; --i) p = p * f + c[i];
        return p;
    }
};

// Keeps 2^t representable where Exp2 assembles the exponent's bits. A sum that large is computed again anyway.
inline F clamp_exponent(F t) {
#if defined(SSPO_AVX512)
    return t;
#else
    return at_most(127.0f, t);
#endif
}

// Unspecified where one is NaN: the sum over the same elements shows it.
inline F vector_max(F a, F b) {
#if defined(SSPO_AVX512)
    return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(SSPO_AVX2)
    return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// tanh(a x) and 1 - tanh^2(a x), a > 0. With t = 2^(-2 log2(e) |a x|) and d = 2 t / (1 + t), tanh is 1 - d and
// 1 - tanh^2 is d (2 - d). So where tanh is close to 1, its only error is the last rounding, and its slope keeps its
// digits. 1 - d cancels near 0: there tanh(y) / y is a polynomial in y^2, relative error 4.4e-8. tanh is off by at most
// 1.3e-7, and by half a unit in the last place from |a x| = 4 on.
struct TanhSech2 {
    F tanh, sech2;
};

template <int DEGREE>
struct Tanh {
    Exp2<DEGREE> twice_exp2{2.0};
    F a, exponent;

    explicit Tanh(double a_) : a(splat((float)a_)), exponent(splat((float)(a_ * -2.88539008177792681472))) {}

    SSPO_INLINE TanhSech2 operator()(F x) const {
        const U sign = bits_of(x) & 0x80000000u;
        const F t = twice_exp2(from_bits(bits_of(x) ^ sign) * exponent);
        const F d = t / (0.5f * t + 1.0f);
        const F y = a * x, q = y * y;
        F p = q * 0.016274091f - 0.05258697f;
        p = p * q + 0.13319422f;
        p = p * q - 0.33332891f;
        const F near = y + y * (p * q), far = from_bits(bits_of(1.0f - d) | sign);
        return {q < 0.3025f ? near : far, d * (2.0f - d)};
    }
};

// In lane order, so that every compiler gives the same sum.
inline double horizontal_sum(F v) {
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += v[l];
    return sum;
}

inline float horizontal_max(F v) {
    float m = v[0];
    for (int l = 1; l < kLanes; ++l) m = v[l] > m ? v[l] : m;
    return m;
}

inline double to_double(double v) { return v; }
inline double to_double(float v) { return v; }
inline double to_double(bf16 v) {
    const uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
inline double to_double(f16 v) {
    const int exponent = (v.bits >> 10) & 31, mantissa = v.bits & 1023;
    double m;
    if (exponent == 31)
        m = mantissa ? __builtin_nan("") : __builtin_inf();
    else if (exponent == 0)
        m = mantissa * 0x1p-24;
    else
        m = ldexp(1024 + mantissa, exponent - 25);
    return v.bits & 0x8000 ? -m : m;
}

inline void from_double(double v, double* p) { *p = v; }
inline void from_double(double v, float* p) { *p = (float)v; }
inline void from_double(double v, bf16* p) {
    const float f = (float)v;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    p->bits = f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_double(double v, f16* p) {
    const float f = (float)v;
    const float magnitude = fabsf(f);
    uint16_t h;
    if (f != f)
        h = 0x7e00;
    else if (magnitude >= 65520.0f)
        h = 0x7c00;
    else if (magnitude < 0x1p-14f)
        h = (uint16_t)rintf(magnitude * 0x1p24f);
    else {
        uint32_t bits;
        memcpy(&bits, &magnitude, sizeof bits);
        h = (uint16_t)((bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13);
    }
    p->bits = h | (signbit(f) ? 0x8000 : 0);
}

}  // namespace
