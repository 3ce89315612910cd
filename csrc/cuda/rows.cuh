// SPDX-License-Identifier: Apache-2.0
// What the two row kernels share: the walk over a row, the logit map, and the launch.
//
// A row is [front | groups of 16 bytes | tail]. The groups start at the row's first 16-byte boundary, so the loops move
// 16 bytes a thread for any V and any address. Front and tail are shorter than 16 bytes each. The row's last block
// handles their elements, one a thread.
#pragma once

#include "launch.h"
#include "traits.cuh"

namespace sspo::cuda {

constexpr int kThreads = 128;    // few, so that the loops of other blocks hide a block's start and end
constexpr int kBlocksPerSM = 8;  // at least: 64 registers a thread
constexpr int kUnroll = 4;       // 64 bytes in flight a thread, 64 KiB a multiprocessor: three times what HBM3 needs
constexpr int kPass = kThreads * kUnroll;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;

__device__ __forceinline__ int64_t row_offset(const View& view, uint32_t position, uint32_t T) {
    return static_cast<int64_t>(position / T) * view.stride_b + static_cast<int64_t>(position % T) * view.stride_t;
}

struct Walk {
    int front, groups, tail;  // elements, groups, elements
    int tail_begin;           // column
    int g_begin, g_end;       // this block's groups
    bool has_edges;

    template <class T>
    __device__ __forceinline__ Walk(const T* row, int V, int split, int splits) {
        constexpr int kVec = Traits<T>::kVec;
        const int to_boundary = static_cast<int>(-reinterpret_cast<uintptr_t>(row) & 15) / static_cast<int>(sizeof(T));
        front = min(to_boundary, V);
        groups = (V - front) / kVec;
        tail_begin = front + groups * kVec;
        tail = V - tail_begin;
        const int share = ((groups + kPass - 1) / kPass + splits - 1) / splits * kPass;
        g_begin = min(split * share, groups);
        g_end = min(g_begin + share, groups);
        has_edges = split == splits - 1;
    }

    // The column in the row's front or tail that belongs to this thread, or -1.
    __device__ __forceinline__ int edge_column() const {
        const int e = static_cast<int>(threadIdx.x);
        if (!has_edges) return -1;
        if (e < 8) return e < front ? e : -1;
        return e - 8 < tail ? tail_begin + e - 8 : -1;
    }

    // Whether the loops give this column to this thread.
    template <int kVec>
    __device__ __forceinline__ bool owns(int column) const {
        if (column < front || column >= tail_begin) return column == edge_column();
        const int g = (column - front) / kVec;
        return g >= g_begin && g < g_end && (g - g_begin) % kThreads == static_cast<int>(threadIdx.x);
    }
};

// tanh to float32 accuracy, and 1 - tanh^2 without cancellation; tanh.approx has 11 bits.
__device__ __forceinline__ float2 tanh_sech2(float y) {
    const float magnitude = fabsf(y);
    const float e = exp2f(-2 * kLog2e * magnitude);
    const float r = __fdividef(1.0f, 1.0f + e);
    const float far = fmaf(-2.0f * e, r, 1.0f);
    // 1 - tanh cancels near 0: tanh(y) / y as a polynomial in y^2, relative error 4.4e-8
    const float q = y * y;
    const float p = fmaf(fmaf(fmaf(q, 0.016274091f, -0.05258697f), q, 0.13319422f), q, -0.33332891f);
    const float near = magnitude * fmaf(p, q, 1.0f);
    return make_float2(copysignf(magnitude < 0.55f ? near : far, y), 4.0f * e * r * r);
}

template <bool kSoftcap>
__device__ __forceinline__ float mapped(const LogitMap& map, float x) {
    return kSoftcap ? tanh_sech2(map.a * x).x : x;
}

// Makes `device` current while it lives. The caller's stays what it was.
struct OnDevice {
    explicit OnDevice(int device) {
        error = cudaGetDevice(&before);
        if (error == cudaSuccess && before != device) error = cudaSetDevice(device), changed = error == cudaSuccess;
    }
    ~OnDevice() {
        if (changed) cudaSetDevice(before);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    int before = 0;
    bool changed = false;
    cudaError_t error;
};

// Every launch of this module. A failure is returned, and is not left behind as CUDA's last error.
template <class Params>
int launch(void (*kernel)(Params), const Params& params, dim3 grid, int threads, int device, void* stream) {
    const OnDevice current(device);
    if (current.error != cudaSuccess) return current.error;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

}  // namespace sspo::cuda
