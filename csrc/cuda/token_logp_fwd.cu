// SPDX-License-Identifier: Apache-2.0
// Row forward: the log-probability of one label per row, and the row's log-sum-exp, in one read of the row.
// The specification is token_logps in sspo_ext/backends/reference.py.
#include "rows.cuh"

namespace sspo::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

// Running maxima start here and not at -inf. A thread that has seen only -inf (a masked vocabulary) then has weights
// 2^-inf = 0 instead of NaN. A row that lies entirely below it is summed again, relative to its own maximum.
constexpr float kLowest = -1e30f;

__device__ __forceinline__ float warp_max(float x) {
    for (int mask = 16; mask; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// A running maximum of logits and the sum of 2^(scale * u - top), where top is the rounded scale * u(x_max). The
// threads of a block exchange nothing until the row is read.
template <class T, bool kSoftcap>
struct Running {
    float x_max = kLowest, top, sum = 0;

    __device__ __forceinline__ explicit Running(const LogitMap& map) { top = map.scale * mapped<kSoftcap>(map, x_max); }

    // Raises the maximum to x if it is lower, and rescales the sum once for all logits up to x.
    __device__ __forceinline__ void raise(const LogitMap& map, float x) {
        x_max = fmaxf(x_max, x);
        const float before = top;
        top = map.scale * mapped<kSoftcap>(map, x_max);
        sum *= exp2f(before - top);
    }

    __device__ __forceinline__ float term(const LogitMap& map, float x) const {
        return exp2f(fmaf(mapped<kSoftcap>(map, x), map.scale, -top));
    }

    // Adds the first `count` of kUnroll groups, or all if not kMasked. The other groups hold any logits of the row.
    template <bool kMasked>
    __device__ __forceinline__ void add(const LogitMap& map, const uint4 (&w)[kUnroll], int count) {
        uint4 largest = w[0];
#pragma unroll
        for (int u = 1; u < kUnroll; ++u) largest = Traits<T>::max(largest, w[u]);
        raise(map, Traits<T>::max(largest));
        float2 part[2] = {make_float2(0, 0), make_float2(0, 0)};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (kMasked && u >= count) break;
#pragma unroll
            for (int k = 0; k < Traits<T>::kVec / 2; ++k) {
                const float2 x = Traits<T>::to_float2(w[u], k);
                part[k % 2].x += term(map, x.x);
                part[k % 2].y += term(map, x.y);
            }
        }
        sum += (part[0].x + part[0].y) + (part[1].x + part[1].y);
    }

    __device__ __forceinline__ void add(const LogitMap& map, const Partial& other) {
        raise(map, other.x_max);
        sum += other.sum * exp2f(map.scale * mapped<kSoftcap>(map, other.x_max) - top);
    }
};

// The maximum first, then the sum of 2^(scale * (u - u_max)). For rows so large that scale * x overflows or that its
// rounding matters, rows entirely below kLowest, and rows that are not finite. Called by the whole block.
template <class T, bool kSoftcap>
__device__ __noinline__ Partial sum_in_two_passes(const T* row, int V, LogitMap map) {
    __shared__ float per_warp[2][kWarps];
    const int warp = threadIdx.x / 32;
    float x_max = -INFINITY;
    for (int v = threadIdx.x; v < V; v += kThreads) x_max = fmaxf(x_max, Traits<T>::to_float(row[v]));
    x_max = warp_max(x_max);
    if (threadIdx.x % 32 == 0) per_warp[0][warp] = x_max;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) x_max = fmaxf(x_max, per_warp[0][w]);
    if (!kSoftcap && x_max == -INFINITY) x_max = 0;  // all masked: the sum is 0 and lse -inf

    const float u_max = mapped<kSoftcap>(map, x_max);
    float sum = 0;
    for (int v = threadIdx.x; v < V; v += kThreads)
        sum += exp2f((mapped<kSoftcap>(map, Traits<T>::to_float(row[v])) - u_max) * map.scale);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) per_warp[1][warp] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += per_warp[1][w];
    return {x_max, sum};
}

// Grid (N, splits).
template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) token_logp_fwd_kernel(const FwdParams p) {
    __shared__ Partial per_warp[kWarps];
    __shared__ bool is_last;
    const LogitMap& map = p.map;
    const int n = blockIdx.x, split = blockIdx.y;
    const int64_t position = p.rows[n];
    if (position < 0 || position >= p.positions) {
        if (threadIdx.x == 0) p.logp[n] = NAN, p.lse[n] = NAN;
        return;
    }
    const T* row = static_cast<const T*>(p.logits.data) + row_offset(p.logits, static_cast<uint32_t>(position), p.T);
    const Walk walk(row, p.V, split, p.splits);

    // Loaded before the loop, which hides their latency.
    const int64_t label = p.labels[n];
    const bool has_label = label >= 0 && label < p.V;
    const float x_label = has_label ? Traits<T>::to_float(row[label]) : NAN;
    const int edge = walk.edge_column();
    const float x_edge = edge >= 0 ? Traits<T>::to_float(row[edge]) : kLowest;

    Running<T, kSoftcap> mine(map);
    const uint4* body = reinterpret_cast<const uint4*>(row + walk.front);
    uint4 w[kUnroll];
    int g = walk.g_begin + static_cast<int>(threadIdx.x);
    for (; g + kPass - kThreads < walk.g_end; g += kPass) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) w[u] = body[g + u * kThreads];
        mine.template add<false>(map, w, kUnroll);
    }
    if (g < walk.g_end) {
        const int count = (walk.g_end - g + kThreads - 1) / kThreads;
        w[0] = body[g];
#pragma unroll
        for (int u = 1; u < kUnroll; ++u) w[u] = u < count ? body[g + u * kThreads] : w[0];
        mine.template add<true>(map, w, count);
    }
    if (edge >= 0) {
        mine.raise(map, x_edge);
        mine.sum += mine.term(map, x_edge);
    }

    mine.raise(map, warp_max(mine.x_max));
    mine.sum = warp_sum(mine.sum);
    if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = {mine.x_max, mine.sum};
    __syncthreads();
    Running<T, kSoftcap> row_sum(map);
    for (int i = 0; i < kWarps; ++i) row_sum.add(map, per_warp[i]);

    if (p.splits > 1) {
        // The last block to arrive sees every block's share and adds them in order. The result does not depend on which
        // block that is.
        Partial* shares = p.partials + static_cast<int64_t>(n) * p.splits;
        if (threadIdx.x == 0) {
            shares[split] = {row_sum.x_max, row_sum.sum};
            __threadfence();
            is_last = atomicAdd(p.arrived + n, 1u) == static_cast<uint32_t>(p.splits - 1);
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;
        row_sum = Running<T, kSoftcap>(map);
        for (int i = 0; i < p.splits; ++i) row_sum.add(map, {__ldcg(&shares[i].x_max), __ldcg(&shares[i].sum)});
        if (threadIdx.x == 0) atomicExch(p.arrived + n, 0u);
    }

    float total = row_sum.sum, u_max = mapped<kSoftcap>(map, row_sum.x_max);
    // `sum` is relative to `top`, which is scale * u_max only up to rounding. With one logit the quotient is exactly 1.
    total /= exp2f(fmaf(u_max, map.scale, -row_sum.top));
    if (!(total > 0 && total < INFINITY)) {
        const Partial again = sum_in_two_passes<T, kSoftcap>(row, p.V, map);
        total = again.sum, u_max = mapped<kSoftcap>(map, again.x_max);
    }
    if (threadIdx.x == 0) {
        // lse is float64 because the backward subtracts it from logits of about its size. logp takes the difference
        // before the scale, so a constant added to the whole row costs no digits.
        const double log_total = logf(total);
        const double lse = u_max * map.factor + log_total;
        const double u_label = mapped<kSoftcap>(map, x_label);
        p.lse[n] = lse;
        p.logp[n] = static_cast<float>(label == -1 ? -lse : (u_label - u_max) * map.factor - log_total);
    }
}

template <class T>
int launch_fwd(const FwdParams& p, int device, void* stream) {
    const dim3 grid(p.N, p.splits);
    return p.map.softcap ? launch(token_logp_fwd_kernel<T, true>, p, grid, kThreads, device, stream)
                         : launch(token_logp_fwd_kernel<T, false>, p, grid, kThreads, device, stream);
}

}  // namespace

int token_logp_fwd(const FwdParams& p, DType dtype, int device, void* stream) {
    if (p.N == 0) return cudaSuccess;
    switch (dtype) {
        case DType::kFloat32:
            return launch_fwd<float>(p, device, stream);
        case DType::kBFloat16:
            return launch_fwd<__nv_bfloat16>(p, device, stream);
        case DType::kFloat16:
            return launch_fwd<__half>(p, device, stream);
    }
    return cudaErrorInvalidValue;
}

int row_splits(int64_t rows, int64_t V, DType dtype) {
    if (rows <= 0) return 1;
    const int64_t pass = static_cast<int64_t>(kPass) * 16 / (dtype == DType::kFloat32 ? 4 : 2);
    const int64_t wanted = (kBlocksWanted + rows - 1) / rows, possible = V / pass;
    const int64_t splits = wanted < possible ? wanted : possible;
    return static_cast<int>(splits < 1 ? 1 : splits > kMaxSplits ? kMaxSplits : splits);
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace sspo::cuda
