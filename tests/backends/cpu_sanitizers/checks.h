// SPDX-License-Identifier: Apache-2.0
// What the checks of csrc/cpu share: numbers, their storage in every type, and the report of differences.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

#include "dispatch.h"

namespace checks {

using sspo::DType;

constexpr int kThreads = 3;

inline std::mt19937 generator(0);
inline int failures = 0;

inline double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
inline int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high - 1)(generator); }

inline void expect(const char* what, double got, double truth, double tolerance, const char* isa, int64_t V,
                   int64_t column) {
    if (fabs(got - truth) <= tolerance) return;
    if (++failures <= 20)
        printf("%s: got %.9g, truth %.9g (%s, V = %ld, column %ld)\n", what, got, truth, isa, (long)V, (long)column);
}

inline size_t size_of(DType d) { return d == DType::kFloat64 ? 8 : d == DType::kFloat32 ? 4 : 2; }

// Numbers that every type holds exactly, so that storing them needs no rounding: multiples of 1/8 in [-8, 8).
inline void store(void* p, DType d, int64_t i, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (d == DType::kFloat64) ((double*)p)[i] = x;
    if (d == DType::kFloat32) ((float*)p)[i] = x;
    if (d == DType::kBFloat16) ((uint16_t*)p)[i] = (uint16_t)(bits >> 16);
    if (d == DType::kFloat16) {
        const uint16_t magnitude = (uint16_t)(((bits & 0x7fffffffu) >> 13) - (112 << 10));
        ((uint16_t*)p)[i] = x == 0 ? 0 : (uint16_t)((bits >> 16 & 0x8000u) | magnitude);
    }
}

inline double load(const void* p, DType d, int64_t i) {
    if (d == DType::kFloat64) return ((const double*)p)[i];
    if (d == DType::kFloat32) return ((const float*)p)[i];
    const uint16_t h = ((const uint16_t*)p)[i];
    if (d == DType::kBFloat16) {
        const uint32_t bits = (uint32_t)h << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return mantissa ? NAN : h & 0x8000 ? -INFINITY : INFINITY;
    const double m = ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return h & 0x8000 ? -m : m;
}

// Every 32-bit index that may be passed wrongly: next to both ends of its table, and far from it.
inline std::vector<int32_t> wrong_indices(int32_t size) { return {-1, size, size + 1, INT32_MIN, INT32_MAX}; }

// bad_input.cpp
void check_positions(const sspo::Isa& isa, DType dtype, int64_t V);
void check_bad_steps();

// product.cpp
void check_product();

}  // namespace checks
