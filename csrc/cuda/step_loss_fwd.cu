// SPDX-License-Identifier: Apache-2.0
// From the rows' log-probs to step sums, pair losses, the total loss and dL/dlogp of every row, in one launch. The
// specification is step_sums and pair_losses in sspo_ext/backends/reference.py.
//
// One block of one warp per step. It sums its own rows, and again the rows of every step it is paired with. That costs
// less than a second launch or a barrier over the grid, and gives the same bits as the partner's own sum.
#include "../formulas_generated.h"
#include "rows.cuh"

namespace sspo::cuda {
namespace {

static_assert(kMaxOptions == sspo::kMaxOptions, "options of a formula");

constexpr int kWarp = 32;
constexpr int kStepUnroll = 4;  // loads in flight a thread

__device__ __forceinline__ double warp_sum(double x) {
    for (int mask = kWarp / 2; mask; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

// Sum of weights[i] * x[i] (of x[i] without weights) over [begin, end). Every lane and every call gets the same bits.
__device__ __forceinline__ double weighted_sum(const float* x, const float* weights, int begin, int end) {
    double sum = 0;
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kStepUnroll * kWarp) {
        float value[kStepUnroll], weight[kStepUnroll];
#pragma unroll
        for (int u = 0; u < kStepUnroll; ++u) {
            const bool in = i + u * kWarp < end;
            value[u] = in ? __ldcg(x + i + u * kWarp) : 0.0f;
            weight[u] = in && weights ? weights[i + u * kWarp] : 1.0f;
        }
#pragma unroll
        for (int u = 0; u < kStepUnroll; ++u) sum += static_cast<double>(weight[u]) * value[u];
    }
    return warp_sum(sum);
}

struct Step {
    int begin, end;  // rows

    // Ranges are clamped to their table: wrong indices must not become wild accesses.
    __device__ __forceinline__ Step(const StepParams& p, int k) {
        begin = max(0, min(p.step_offsets[k], p.N));
        end = max(begin, min(p.step_offsets[k + 1], p.N));
    }
    __device__ __forceinline__ double sum(const StepParams& p) const {
        return weighted_sum(p.logp, p.weights, begin, end);
    }
};

// Grid (S).
__global__ void __launch_bounds__(kWarp) step_loss_fwd_kernel(const StepParams p) {
    const int k = blockIdx.x;
    const bool first_lane = threadIdx.x == 0;
    const Step own(p, k);
    const double own_sum = own.sum(p);
    const float own_ref = p.ref ? p.ref[k] : 0.0f;
    if (first_lane) p.sums[k] = static_cast<float>(own_sum);

    double du = 0;
    const int j_end = max(0, min(p.adj_offsets[k + 1], 2 * p.P));
    for (int j = max(0, p.adj_offsets[k]); j < j_end; ++j) {
        const int entry = p.adj_pairs[j], pair = entry >> 1;
        if (entry < 0 || pair >= p.P) continue;
        const bool is_loser = entry & 1;
        const int partner = p.pair_index[entry ^ 1];
        PairGrad<float> g = {0, 0, 0};
        if (partner >= 0 && partner < p.S) {
            const Step other(p, partner);
            if (own.end > own.begin && other.end > other.begin) {
                const float u_own = static_cast<float>(own_sum - own_ref);
                const float u_other = static_cast<float>(other.sum(p) - (p.ref ? p.ref[partner] : 0.0f));
                const float n_own = static_cast<float>(own.end - own.begin);
                const float n_other = static_cast<float>(other.end - other.begin);
                const PairScores<float> scores = {is_loser ? u_other : u_own,
                                                  is_loser ? u_own : u_other,
                                                  is_loser ? n_other : n_own,
                                                  is_loser ? n_own : n_other,
                                                  p.pair_margins ? p.pair_margins[pair] : 0.0f,
                                                  p.pair_labels ? p.pair_labels[pair] : p.label};
                g = pair_formula<float>(p.formula, scores, p.options);
                const float d = is_loser ? g.du_l : g.du_w;
                du += static_cast<double>(p.pair_weights ? p.pair_weights[pair] : 1.0f) * d;
            }
        }
        if (!is_loser && first_lane) p.pair_loss[pair] = g.loss;
    }

    du *= *p.scale;
    for (int n = own.begin + static_cast<int>(threadIdx.x); n < own.end; n += kWarp)
        p.coef[n] = static_cast<float>(du * (p.weights ? p.weights[n] : 1.0f));

    // The last block to arrive sees every pair's loss and adds them in the order of the pairs. The result does not
    // depend on which block that is.
    int is_last = 0;
    if (first_lane) {
        __threadfence();
        is_last = atomicAdd(p.arrived, 1u) == gridDim.x - 1;
        __threadfence();
    }
    if (!__shfl_sync(0xffffffffu, is_last, 0)) return;
    __syncwarp();  // a shuffle does not order memory
    const double total = weighted_sum(p.pair_loss, p.pair_weights, 0, p.P);
    if (first_lane) {
        *p.loss = static_cast<float>(total * *p.scale);
        atomicExch(p.arrived, 0u);
    }
}

}  // namespace

int step_loss_fwd(const StepParams& p, int device, void* stream) {
    if (p.S == 0) return cudaSuccess;
    return launch(step_loss_fwd_kernel, p, dim3(p.S), kWarp, device, stream);
}

int num_formulas() { return kNumPairFormulas; }

const char* formulas_hash() { return kFormulasHash; }

}  // namespace sspo::cuda
