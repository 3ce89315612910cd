// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that csrc/cuda calls, over emulation.h.
#pragma once

#include "emulation.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                     ? "no error"
           : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                    : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline int& current_device() {  // of two
    static int device = 0;
    return device;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = current_device(), cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return cudaErrorInvalidValue;
    return current_device() = device, cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
    struct Call {
        void (*kernel)(Params);
        const Params* params;
    } call = {kernel, &params};
    const auto body = [](const void* p) {
        const Call& c = *static_cast<const Call*>(p);
        c.kernel(*c.params);
    };
    return static_cast<cudaError_t>(emulation::run(config->gridDim, config->blockDim, body, &call));
}
