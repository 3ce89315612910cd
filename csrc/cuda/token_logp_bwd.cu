// SPDX-License-Identifier: Apache-2.0
// Row backward: the gradient of every position's logits, written once. Rows with a gradient are read once, other rows
// are not read. The specification is autograd on token_logps in sspo_ext/backends/reference.py.
//
// Each element, the label's too, is read and written by the same thread, so working in place needs no barrier.
#include "rows.cuh"

namespace sspo::cuda {
namespace {

constexpr float kLargestShift = 0x1p24f;  // beyond it scale * x has no fractional digits, and may overflow

// softmax(z) * dz/dx = 2^(scale * u + shift) * weight; `weight` holds all factors that are constant in the row.
template <class T, bool kSoftcap>
struct RowGrad {
    float shift, weight;

    __device__ __forceinline__ float operator()(const LogitMap& map, float x) const {
        if (!kSoftcap) return exp2f(fmaf(x, map.scale, shift)) * weight;
        const float2 t = tanh_sech2(map.a * x);
        return exp2f(fmaf(t.x, map.scale, shift)) * (weight * t.y);
    }

    __device__ __forceinline__ uint4 operator()(const LogitMap& map, uint4 w) const {
        constexpr int kPairs = Traits<T>::kVec / 2;
        float2 x[kPairs];
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
            x[k] = Traits<T>::to_float2(w, k);
            x[k].x = (*this)(map, x[k].x);
            x[k].y = (*this)(map, x[k].y);
        }
        return Traits<T>::pack(x);
    }
};

// Loads a group's 16 bytes of logits where the logits lie `skew` bytes past a 16-byte boundary and the gradient lies on
// one: by two aligned loads, or by single elements where those would reach outside the row. The second load is the next
// thread's first, so it comes from the L1 cache.
template <class T>
struct SkewedLoad {
    const T* row;
    int V, front;
    uint32_t skew;

    __device__ __forceinline__ uint4 operator()(int g) const {
        constexpr int kVec = Traits<T>::kVec, kSize = sizeof(T);
        const int column = front + g * kVec, before = static_cast<int>(skew) / kSize;
        if (column < before || column - before + 2 * kVec > V) {
            T x[kVec];
#pragma unroll
            for (int k = 0; k < kVec; ++k) x[k] = row[column + k];
            uint4 w;
            memcpy(&w, x, sizeof w);
            return w;
        }
        const uint4* aligned = reinterpret_cast<const uint4*>(row + column - before);
        const uint4 a = aligned[0], b = aligned[1];
        const bool by8 = skew & 8, by4 = skew & 4;
        uint32_t w[6] = {by8 ? a.z : a.x, by8 ? a.w : a.y, by8 ? b.x : a.z,
                         by8 ? b.y : a.w, by8 ? b.z : b.x, by8 ? b.w : b.y};
#pragma unroll
        for (int k = 0; k < 5; ++k) w[k] = by4 ? w[k + 1] : w[k];
        if (kSize == 2) {
#pragma unroll
            for (int k = 0; k < 4; ++k) w[k] = __funnelshift_r(w[k], w[k + 1], skew % 4 * 8);
        }
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
};

template <int kLoads, class Load, class Grad>
__device__ __forceinline__ void write_groups(const LogitMap& map, const Walk& walk, uint4* out, Load load, Grad grad) {
    int g = walk.g_begin + static_cast<int>(threadIdx.x);
    for (; g + (kLoads - 1) * kThreads < walk.g_end; g += kLoads * kThreads) {
        uint4 w[kLoads];
#pragma unroll
        for (int u = 0; u < kLoads; ++u) w[u] = load(g + u * kThreads);
#pragma unroll
        for (int u = 0; u < kLoads; ++u) out[g + u * kThreads] = grad(map, w[u]);
    }
    for (; g < walk.g_end; g += kThreads) out[g] = grad(map, load(g));
}

// In double, for rows too large for float32 exponents. Each thread handles the same elements as in the float32 loop.
template <class T, bool kSoftcap>
__device__ __noinline__ void write_in_double(const T* row, T* out_row, Walk walk, LogitMap map, double lse,
                                             float weight) {
    const auto write = [&](int v) {
        const float x = Traits<T>::to_float(row[v]);
        const float2 t = kSoftcap ? tanh_sech2(map.a * x) : make_float2(x, 1);
        // The rounding of a huge lse must not make a probability above 1. NaN stays.
        const float exponent = static_cast<float>((t.x * map.factor - lse) / kLn2);
        out_row[v] = Traits<T>::from_float(weight * t.y * exp2f(exponent > 0 ? 0.0f : exponent));
    };
    for (int g = walk.g_begin + static_cast<int>(threadIdx.x); g < walk.g_end; g += kThreads)
        for (int k = 0; k < Traits<T>::kVec; ++k) write(walk.front + g * Traits<T>::kVec + k);
    if (const int edge = walk.edge_column(); edge >= 0) write(edge);
}

// Grid (positions, splits).
template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) token_logp_bwd_kernel(const BwdParams p) {
    constexpr int kVec = Traits<T>::kVec;
    const LogitMap& map = p.map;
    const uint32_t i = blockIdx.x;
    T* out_row = static_cast<T*>(p.out.data) + row_offset(p.out, i, p.T);
    const Walk walk(out_row, p.V, blockIdx.y, p.splits);
    uint4* out_body = reinterpret_cast<uint4*>(out_row + walk.front);
    const int edge = walk.edge_column();

    const int n = p.row_of[i];
    float coef = n >= 0 && n < p.N ? p.coef[n] : 0.0f;
    if (p.upstream && coef != 0) coef *= *p.upstream;
    if (coef == 0) {
        for (int g = walk.g_begin + static_cast<int>(threadIdx.x); g < walk.g_end; g += kThreads)
            out_body[g] = make_uint4(0, 0, 0, 0);
        if (edge >= 0) out_row[edge] = Traits<T>::from_float(0);
        return;
    }

    const T* row = static_cast<const T*>(p.logits.data) + row_offset(p.logits, i, p.T);
    const int64_t label = p.labels[n];
    const double lse = p.lse[n];
    const bool label_is_mine = label >= 0 && label < p.V && walk.owns<kVec>(static_cast<int>(label));
    const float x_label = label_is_mine ? Traits<T>::to_float(row[label]) : 0.0f;
    const float x_edge = edge >= 0 ? Traits<T>::to_float(row[edge]) : 0.0f;

    float weight = coef * static_cast<float>(map.softcap ? map.a * map.factor : map.factor);  // coef * dz/du * du/dx
    if (label < -1 || label >= p.V) weight = NAN;
    // lse in units of scale * u, in which the rounding of `scale` cancels. The rounding to float32 would scale every
    // exponential of the row, so its correction goes into the row's factor.
    const double exact = -lse * (map.scale / map.factor);
    const float shift = static_cast<float>(exact);
    const RowGrad<T, kSoftcap> grad{shift, -weight * exp2f(static_cast<float>(exact - shift))};

    const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row + walk.front) & 15);
    if (fabsf(shift) > kLargestShift) {
        write_in_double<T, kSoftcap>(row, out_row, walk, map, lse, -weight);
    } else {
        if (skew == 0) {
            const uint4* body = reinterpret_cast<const uint4*>(row + walk.front);
            write_groups<kUnroll>(map, walk, out_body, [body](int g) { return body[g]; }, grad);
        } else {
            write_groups<kUnroll / 2>(map, walk, out_body, SkewedLoad<T>{row, p.V, walk.front, skew}, grad);
        }
        if (edge >= 0) out_row[edge] = Traits<T>::from_float(grad(map, x_edge));
    }
    if (label_is_mine) {  // 1 - p without cancellation where p is close to 1
        const float2 t = kSoftcap ? tanh_sech2(map.a * x_label) : make_float2(x_label, 1);
        const float log_p = static_cast<float>(t.x * map.factor - lse);
        out_row[label] = Traits<T>::from_float(weight * t.y * -expm1f(log_p));
    }
}

template <class T>
int launch_bwd(const BwdParams& p, int device, void* stream) {
    const dim3 grid(p.positions, p.splits);
    return p.map.softcap ? launch(token_logp_bwd_kernel<T, true>, p, grid, kThreads, device, stream)
                         : launch(token_logp_bwd_kernel<T, false>, p, grid, kThreads, device, stream);
}

}  // namespace

int token_logp_bwd(const BwdParams& p, DType dtype, int device, void* stream) {
    if (p.positions == 0 || p.V == 0) return cudaSuccess;
    switch (dtype) {
        case DType::kFloat32:
            return launch_bwd<float>(p, device, stream);
        case DType::kBFloat16:
            return launch_bwd<__nv_bfloat16>(p, device, stream);
        case DType::kFloat16:
            return launch_bwd<__half>(p, device, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace sspo::cuda
