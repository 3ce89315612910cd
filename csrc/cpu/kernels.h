// What the row kernels of every instruction set take and offer. All strides are in elements.
#pragma once

#include <cstdint>

namespace sspo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int64_t kNoLabel = -1;  // the label lies in another shard of the vocabulary

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
    double* lse;            // (N,) float32 would round 1e4 by 5e-4, and the softmax of the backward with it
};

struct BwdArgs {
    Logits logits;
    const int32_t* row_of;  // (positions,) row of a position, or -1
    const int64_t* labels;  // (N,) kNoLabel: no one-hot term
    const double* lse;      // (N,)
    const void* coef;       // (N,) float32, float64 for float64 logits
    const void* upstream;   // one number of coef's type, or null
    int64_t N;
    void* out;  // may be logits.data, with the same strides
    int64_t out_stride_b, out_stride_t;
    bool stream;  // store past the caches: out is not read soon and is larger than they are
};

// The forward with further reductions of each row; ref.data may be null, with kl and ref_lse then.
struct ReductionArgs {
    Logits logits;
    Logits ref;  // the reference's logits: of the same dtype, sizes and map
    const int64_t* rows;
    const int64_t* labels;
    void* logp;  // (N,) this and the next ones float32, float64 for float64 logits
    void* entropy;
    void* sum_p2;
    void* kl;
    double* lse;
    double* ref_lse;
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

// One call handles rows (fwd) or positions (bwd) [begin, end); what a row gives does not depend on the range.
struct RowKernels {
    void (*fwd)(const FwdArgs&, int64_t begin, int64_t end);
    void (*bwd)(const BwdArgs&, int64_t begin, int64_t end);
};

struct ReductionKernels {
    void (*fwd)(const ReductionArgs&, int64_t begin, int64_t end);
    void (*bwd)(const ReductionGradArgs&, int64_t begin, int64_t end);
};

extern const RowKernels kRowsBaseline;
extern const ReductionKernels kReductionsBaseline;
#if defined(__x86_64__)
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
extern const ReductionKernels kReductionsAvx2;
extern const ReductionKernels kReductionsAvx512;
#endif

}  // namespace sspo
