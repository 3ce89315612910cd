// SPDX-License-Identifier: Apache-2.0
// What differs between element types: converting 16 bytes of logits to float32 and back, and taking their maximum.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace sspo::cuda {

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Maxima ignore a NaN, which the sum then shows. With 16-bit elements two are taken at once.
template <class Pair>
__device__ __forceinline__ uint32_t max_of_pairs(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmax2(bits_as<Pair>(a), bits_as<Pair>(b)));
}

template <class T>
struct Traits;

template <>
struct Traits<float> {
    static constexpr int kVec = 4;  // elements in 16 bytes

    static __device__ __forceinline__ float to_float(float x) { return x; }
    static __device__ __forceinline__ float from_float(float x) { return x; }
    static __device__ __forceinline__ float2 to_float2(uint4 w, int pair) {
        return pair ? make_float2(__uint_as_float(w.z), __uint_as_float(w.w))
                    : make_float2(__uint_as_float(w.x), __uint_as_float(w.y));
    }
    static __device__ __forceinline__ uint4 pack(const float2 (&x)[2]) {
        return make_uint4(__float_as_uint(x[0].x), __float_as_uint(x[0].y), __float_as_uint(x[1].x),
                          __float_as_uint(x[1].y));
    }
    static __device__ __forceinline__ uint4 max(uint4 a, uint4 b) {
        const auto larger = [](uint32_t x, uint32_t y) {
            return __float_as_uint(fmaxf(__uint_as_float(x), __uint_as_float(y)));
        };
        return make_uint4(larger(a.x, b.x), larger(a.y, b.y), larger(a.z, b.z), larger(a.w, b.w));
    }
    static __device__ __forceinline__ float max(uint4 w) {
        const uint4 m = max(w, make_uint4(w.z, w.w, w.z, w.w));
        return fmaxf(__uint_as_float(m.x), __uint_as_float(m.y));
    }
};

template <class T, class Pair>
struct Traits16 {
    static constexpr int kVec = 8;

    static __device__ __forceinline__ uint32_t word(uint4 w, int i) {
        return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
    }
    static __device__ __forceinline__ uint4 max(uint4 a, uint4 b) {
        return make_uint4(max_of_pairs<Pair>(a.x, b.x), max_of_pairs<Pair>(a.y, b.y), max_of_pairs<Pair>(a.z, b.z),
                          max_of_pairs<Pair>(a.w, b.w));
    }
    static __device__ __forceinline__ Pair max_pair(uint4 w) {
        return bits_as<Pair>(max_of_pairs<Pair>(max_of_pairs<Pair>(w.x, w.y), max_of_pairs<Pair>(w.z, w.w)));
    }
};

template <>
struct Traits<__nv_bfloat16> : Traits16<__nv_bfloat16, __nv_bfloat162> {
    static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
    static __device__ __forceinline__ float2 to_float2(uint4 w, int pair) {  // a shift and a mask
        const uint32_t bits = word(w, pair);
        return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
    }
    static __device__ __forceinline__ uint4 pack(const float2 (&x)[4]) {
        const auto two = [](float2 v) { return bits_as<uint32_t>(__floats2bfloat162_rn(v.x, v.y)); };
        return make_uint4(two(x[0]), two(x[1]), two(x[2]), two(x[3]));
    }
    using Traits16::max;
    static __device__ __forceinline__ float max(uint4 w) {
        const float2 m = __bfloat1622float2(max_pair(w));
        return fmaxf(m.x, m.y);
    }
};

template <>
struct Traits<__half> : Traits16<__half, __half2> {
    static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
    static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
    static __device__ __forceinline__ float2 to_float2(uint4 w, int pair) {
        return __half22float2(bits_as<__half2>(word(w, pair)));
    }
    static __device__ __forceinline__ uint4 pack(const float2 (&x)[4]) {
        const auto two = [](float2 v) { return bits_as<uint32_t>(__floats2half2_rn(v.x, v.y)); };
        return make_uint4(two(x[0]), two(x[1]), two(x[2]), two(x[3]));
    }
    using Traits16::max;
    static __device__ __forceinline__ float max(uint4 w) {
        const float2 m = __half22float2(max_pair(w));
        return fmaxf(m.x, m.y);
    }
};

}  // namespace sspo::cuda
