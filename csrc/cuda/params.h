// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels take: plain data, passed by value. All strides are in elements.
#pragma once

#include <cstdint>

namespace sspo::cuda {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// (B, T, V), last dimension contiguous. Position i = b * T + t starts at (i / T) * stride_b + (i % T) * stride_t.
struct View {
    void* data;
    int64_t stride_b, stride_t;
};

// A logit x becomes z = factor * u with u = x, or u = tanh(a * x) where there is a softcap; a, factor > 0.
struct LogitMap {
    bool softcap;
    float a;
    float scale;    // factor / ln 2, rounded
    double factor;  // not rounded
};

// One block's share of a row: its largest logit, and the sum of 2^(scale * u - scale * u(x_max)).
struct Partial {
    float x_max, sum;
};

struct FwdParams {
    View logits;
    uint32_t positions, T;  // B * T and T
    int32_t V;
    LogitMap map;
    int32_t N;
    const int64_t* rows;    // (N,) position of row n; outside [0, B * T): NaN
    const int64_t* labels;  // (N,) -1: the label lies in another vocabulary shard. Others outside [0, V): NaN
    float* logp;            // (N,)
    double* lse;            // (N,)
    int32_t splits;         // blocks of one row
    Partial* partials;      // (N, splits), not read with one split
    uint32_t* arrived;      // (N,) zeros before and after, not read with one split
};

struct BwdParams {
    View logits, out;  // `out` may be the logits
    uint32_t positions, T;
    int32_t V;
    LogitMap map;
    int32_t N;
    const int32_t* row_of;  // (positions,) row of a position; outside [0, N): nothing is scored there
    const int64_t* labels;  // (N,) -1: no one-hot term. Others outside [0, V): a NaN row, unless its coef is 0
    const double* lse;      // (N,)
    const float* coef;      // (N,) dL/dlogp
    const float* upstream;  // () multiplies coef, or null
    int32_t splits;
};

constexpr int kMaxOptions = 4;

struct StepParams {
    int32_t N, S, P;
    const float* logp;                                       // (N,)
    const float* weights;                                    // (N,) or null
    const int32_t* step_offsets;                             // (S + 1,)
    const float* ref;                                        // (S,) or null
    const int32_t* pair_index;                               // (P, 2)
    const int32_t* adj_offsets;                              // (S + 1,)
    const int32_t* adj_pairs;                                // (2P,) 2 * pair + side, ascending within a step
    const float *pair_weights, *pair_margins, *pair_labels;  // (P,) or null
    const float* scale;                                      // ()
    int32_t formula;                                         // index of the pair loss in formulas_generated.h
    float options[kMaxOptions];
    float label;        // of every pair where pair_labels is null
    float* loss;        // ()
    float* sums;        // (S,)
    float* pair_loss;   // (P,)
    float* coef;        // (N,)
    uint32_t* arrived;  // () zero before and after
};

}  // namespace sspo::cuda
