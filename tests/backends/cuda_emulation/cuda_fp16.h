// SPDX-License-Identifier: Apache-2.0
// float16 as csrc/cuda uses it.
#pragma once

#include "emulation.h"

struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};

inline float __half2float(__half v) {
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    const float magnitude = exponent == 31
                                ? (mantissa ? NAN : INFINITY)
                                : ldexpf(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return v.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const float magnitude = fabsf(v);
    if (v != v) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(rintf(magnitude * 0x1p24f)))};
    const unsigned bits = __float_as_uint(magnitude);
    return {static_cast<uint16_t>(sign | (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) {  // the number where one is NaN
    return __floats2half2_rn(fmaxf(__half2float(a.x), __half2float(b.x)), fmaxf(__half2float(a.y), __half2float(b.y)));
}
