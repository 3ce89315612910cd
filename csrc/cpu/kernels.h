// SPDX-License-Identifier: Apache-2.0
// What the kernels that read logits take, and the table of them that each instruction set offers. All strides are in
// elements.
#pragma once

#include <cstdint>

namespace sspo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int64_t kNoLabel = -1;  // the label lies in another shard of the vocabulary; all about labels: row.h

// A logit x becomes z = a * x when c == 0, else z = c * tanh(a * x).
struct Logits {
    const void* data;
    DType dtype;
    int64_t stride_b, stride_t;  // position i starts at (i / T) * stride_b + (i % T) * stride_t
    int64_t positions, T, V;
    double a, c;
};

struct FwdArgs {
    Logits logits;
    const int64_t* rows;    // (N,) position of row n
    const int64_t* labels;  // (N,) kNoLabel: logp is -lse
    void* logp;             // (N,) float32, float64 for float64 logits
    double* lse;            // (N,) float32 would round 1e4 by 5e-4, and shift the backward's softmax by as much
};

struct BwdArgs {
    Logits logits;
    const int32_t* row_of;  // (positions,) row of a position, or -1
    const int64_t* labels;  // (N,) kNoLabel: no one-hot term
    const double* lse;      // (N,)
    const void* coef;       // (N,) float32, float64 for float64 logits
    const void* upstream;   // () of coef's type, or null
    int64_t N;
    void* out;  // may be logits.data, with the same strides
    int64_t out_stride_b, out_stride_t;
    bool stream;  // store past the caches: out is larger than they are and is not read soon
};

// The forward with further reductions of each row.
struct ReductionArgs {
    Logits logits;
    Logits ref;             // the reference's logits, of the same dtype, sizes and map; its data may be null
    const int64_t* rows;    // (N,)
    const int64_t* labels;  // (N,)
    void* logp;             // (N,), as the next three: float32, float64 for float64 logits
    void* entropy;          // or null
    void* sum_p2;           // or null
    void* kl;               // not written without a reference
    double* lse;            // (N,)
    double* ref_lse;        // (N,) not written without a reference
};

// dz = g (1[label] - p) + p (constant + log_p log p + square p) - kappa q
struct ReductionGradArgs {
    Logits logits;
    Logits ref;
    const int32_t* row_of;
    const int64_t* labels;
    const double* lse;
    const double* ref_lse;
    const void* coefs;  // (N, 5) g, constant, log_p, square, kappa; float32, float64 for float64 logits
    int64_t N;
    void* out;
    int64_t out_stride_b, out_stride_t;
    bool stream;
};

// One call computes rows (forward) or positions (backward) [begin, end). A row's result does not depend on the range.
struct Kernels {
    void (*token_logp_fwd)(const FwdArgs&, int64_t begin, int64_t end);
    void (*token_logp_bwd)(const BwdArgs&, int64_t begin, int64_t end);
    void (*row_reductions_fwd)(const ReductionArgs&, int64_t begin, int64_t end);
    void (*row_reductions_bwd)(const ReductionGradArgs&, int64_t begin, int64_t end);
};

// total (V, H) += gradient (n, V)^T hidden (n, H), bfloat16 into float32.
struct ProductArgs {
    float* total;
    const uint16_t* gradient;
    const uint16_t* hidden;
    int64_t total_stride, gradient_stride, hidden_stride;  // of a row
    int64_t n, V, H;
    bool first;  // total is written, not added to
};

// The product by one instruction set. Each element's sum runs over n in one order, whatever the ranges.
struct Product {
    int64_t block_rows;  // ranges of `multiply` begin at multiples of it
    int64_t (*packed_size)(const ProductArgs&);
    void (*pack)(const ProductArgs&, uint32_t* packed, int64_t begin, int64_t end);  // pairs of rows of hidden
    void (*multiply)(const ProductArgs&, const uint32_t* packed, int64_t begin, int64_t end);  // rows of total
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Product* const kAvx512Bf16Product;  // null where the compiler does not know the instructions
#endif

}  // namespace sspo
