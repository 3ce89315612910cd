// SPDX-License-Identifier: Apache-2.0
// CUDA's execution model on the CPU, as much of it as csrc/cuda uses: for tests, so that the kernel sources themselves
// run where there is no GPU, under the compiler's sanitizers too.
//
// A thread is a fiber, a block is a system thread that switches between its fibers at barriers and shuffles only, and
// some blocks run at the same time. For ThreadSanitizer every fiber is a thread of its own, and only what orders memory
// on a GPU orders it here: barriers, fences with atomics, the ends of a launch. A shuffle does not. So a missing
// barrier is a reported race whatever the order in which fibers happened to run. A barrier that not all threads reach
// aborts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// After the standard headers, some of which use these words as attributes.
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __CUDACC__ 1

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
    float x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {  // emulation.cpp, which is not instrumented for ThreadSanitizer

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void block_barrier();
void warp_barrier();
uint64_t shuffle(uint64_t value, int source_lane, bool is_xor);
void fence();
void before_atomic(void* p);
int run(dim3 grid, dim3 block, void (*body)(const void*), const void* argument);

template <class T>
T shuffled(T value, int lane, bool is_xor) {
    static_assert(sizeof(T) <= 8, "");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(bits, lane, is_xor);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <dim3 (*kOf)(), unsigned dim3::* kMember>
struct Coordinate {
    operator unsigned() const { return kOf().*kMember; }
};
template <dim3 (*kOf)()>
struct Coordinates {
    Coordinate<kOf, &dim3::x> x;
    Coordinate<kOf, &dim3::y> y;
    Coordinate<kOf, &dim3::z> z;
};

}  // namespace emulation

inline constexpr emulation::Coordinates<emulation::thread_index> threadIdx{};
inline constexpr emulation::Coordinates<emulation::block_index> blockIdx{};
inline constexpr emulation::Coordinates<emulation::block_size> blockDim{};
inline constexpr emulation::Coordinates<emulation::grid_size> gridDim{};

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::warp_barrier(); }
inline void __threadfence() { emulation::fence(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::shuffled(value, mask, true);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulation::shuffled(value, lane, false);
}

// Atomic, and ordered with nothing but through fences before and after, as on the device.
inline unsigned atomicAdd(unsigned* p, unsigned v) {
    emulation::before_atomic(p);
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* p, unsigned v) {
    emulation::before_atomic(p);
    return __atomic_exchange_n(p, v, __ATOMIC_RELAXED);
}

template <class T>
T __ldcg(const T* p) {
    return *p;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
