// SPDX-License-Identifier: Apache-2.0
// The emulated kernels against float64, as one program: what the sanitizers run. Prints what differs; exit status 1 if
// anything does. Every buffer ends where its data ends, so that AddressSanitizer sees a step outside.
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "formulas_generated.h"
#include "launch.h"

using namespace sspo::cuda;

namespace {

std::mt19937 generator(0);
int failures = 0;

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high - 1)(generator); }

float value(float x) { return x; }
float value(__nv_bfloat16 x) { return __bfloat162float(x); }
float value(__half x) { return __half2float(x); }
void set(float* p, float x) { *p = x; }
void set(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
void set(__half* p, float x) { *p = __float2half_rn(x); }
constexpr DType dtype_of(float) { return DType::kFloat32; }
constexpr DType dtype_of(__nv_bfloat16) { return DType::kBFloat16; }
constexpr DType dtype_of(__half) { return DType::kFloat16; }
double epsilon(DType d) { return d == DType::kFloat32 ? 0x1p-23 : d == DType::kBFloat16 ? 0x1p-8 : 0x1p-11; }

void expect(const char* what, double got, double truth, double tolerance, int V, int column) {
    if (std::fabs(got - truth) <= tolerance || (std::isnan(got) && std::isnan(truth))) return;
    if (++failures <= 20) printf("%s: got %.9g, truth %.9g (V = %d, column %d)\n", what, got, truth, V, column);
}

// `count` elements at the end of an allocation that starts on a 16-byte boundary, `offset` elements after it.
template <class T>
struct Buffer {
    T* memory;
    T* data;
    Buffer(size_t count, size_t offset)
        : memory(static_cast<T*>(malloc((offset + count) * sizeof(T)))), data(memory + offset) {
        for (size_t i = 0; i < offset + count; ++i) set(memory + i, NAN);
    }
    ~Buffer() { free(memory); }
};

template <class T>
void check_rows(int V, bool softcap, int offset, int out_offset, int splits, bool in_place) {
    constexpr int kPositions = 3, kRows = 2;
    const DType dtype = dtype_of(T{});
    const double a = softcap ? 1.0 / 20 : 1.25, factor = softcap ? 20.0 / 0.9 : a;
    const LogitMap map = {softcap, static_cast<float>(a), static_cast<float>(factor * 1.44269504088896340736), factor};
    const auto z = [&](double x) { return softcap ? factor * std::tanh(a * x) : a * x; };
    const auto slope = [&](double x) { return softcap ? factor * a * (1 - std::pow(std::tanh(a * x), 2)) : a; };

    Buffer<T> x(static_cast<size_t>(kPositions) * V, offset), fresh(static_cast<size_t>(kPositions) * V, out_offset);
    for (int i = 0; i < kPositions * V; ++i) set(x.data + i, static_cast<float>(uniform(-8, 8)));
    const std::vector<int64_t> rows = {2, 0}, labels = {integer(0, V), integer(0, 4) ? V - 1 : 0};
    const std::vector<int32_t> row_of = {1, -1, 0};
    const std::vector<float> coef = {0.7f, -1.3f};
    const float upstream = 1.5f;
    std::vector<float> logp(kRows);
    std::vector<double> lse(kRows);
    std::vector<Partial> partials(kRows * splits);
    std::vector<uint32_t> arrived(kRows, 0);

    FwdParams f = {};
    f.logits = {x.data, 0, V};
    f.positions = f.T = kPositions;
    f.V = V;
    f.map = map;
    f.N = kRows;
    f.rows = rows.data(), f.labels = labels.data(), f.logp = logp.data(), f.lse = lse.data();
    f.splits = splits, f.partials = partials.data(), f.arrived = arrived.data();
    if (token_logp_fwd(f, dtype, 1, nullptr)) ++failures, puts("forward was not launched");
    if (current_device() != 0) ++failures, puts("another device is current after a launch");
    for (uint32_t n : arrived) expect("arrived", n, 0, 0, V, -1);

    std::vector<double> truth(static_cast<size_t>(kPositions) * V, 0.0);
    for (int n = 0; n < kRows; ++n) {
        const T* row = x.data + rows[n] * V;
        double sum = 0;
        for (int v = 0; v < V; ++v) sum += std::exp(z(value(row[v])) - 30);
        const double exact = 30 + std::log(sum), label_z = z(value(row[labels[n]]));
        expect("lse", lse[n], exact, 1e-5, V, -1);
        expect("logp", logp[n], label_z - exact, 2e-5, V, labels[n]);
        for (int v = 0; v < V; ++v)
            truth[rows[n] * V + v] =
                1.5 * coef[n] * slope(value(row[v])) * ((v == labels[n]) - std::exp(z(value(row[v])) - exact));
    }

    BwdParams b = {};
    b.logits = {x.data, 0, V};
    b.out = in_place ? b.logits : View{fresh.data, 0, V};
    b.positions = b.T = kPositions;
    b.V = V;
    b.map = map;
    b.N = kRows;
    b.row_of = row_of.data(), b.labels = labels.data(), b.lse = lse.data(), b.coef = coef.data();
    b.upstream = &upstream, b.splits = splits;
    if (token_logp_bwd(b, dtype, 0, nullptr)) ++failures, puts("backward was not launched");
    const T* out = static_cast<const T*>(b.out.data);
    for (int i = 0; i < kPositions * V; ++i)
        expect("gradient", value(out[i]), truth[i], 2e-5 + epsilon(dtype) * std::fabs(truth[i]), V, i % V);
    for (const T* p = in_place ? x.memory : fresh.memory; p < out; ++p)
        if (!std::isnan(value(*p))) ++failures, puts("wrote before the gradient");
}

void check_steps(int S, int longest, int P, int formula, bool all) {
    std::vector<int32_t> offsets = {0}, pairs, adj_offsets = {0}, adj_pairs;
    for (int k = 0; k < S; ++k) offsets.push_back(offsets.back() + (k % 5 == 4 ? 0 : integer(1, longest + 1)));
    const int N = offsets.back();
    for (int p = 0; p < P; ++p) {
        pairs.push_back(integer(0, S));
        pairs.push_back((pairs.back() + integer(1, S)) % S);
    }
    for (int k = 0; k < S; ++k) {
        for (int e = 0; e < 2 * P; ++e)
            if (pairs[e] == k) adj_pairs.push_back(e);
        adj_offsets.push_back(static_cast<int32_t>(adj_pairs.size()));
    }
    const auto random = [](int n, double low, double high) {
        std::vector<float> v(n);
        for (float& x : v) x = static_cast<float>(uniform(low, high));
        return v;
    };
    const auto logp = random(N, -5, 0), weights = random(N, 0, 2), ref = random(S, -50, 0);
    const auto pair_weights = random(P, 0, 2), margins = random(P, -1, 1), soft = random(P, 0, 1);
    const float scale = 1.0f / static_cast<float>(P ? P : 1);
    float loss = NAN;
    uint32_t arrived = 0;
    std::vector<float> sums(S), pair_loss(P), coef(N);

    StepParams s = {};
    s.N = N, s.S = S, s.P = P, s.logp = logp.data(), s.step_offsets = offsets.data(), s.pair_index = pairs.data();
    s.adj_offsets = adj_offsets.data(), s.adj_pairs = adj_pairs.data(), s.scale = &scale, s.formula = formula;
    if (all) s.weights = weights.data(), s.ref = ref.data(), s.pair_weights = pair_weights.data();
    if (all) s.pair_margins = margins.data(), s.pair_labels = soft.data();
    s.options[0] = 0.1f, s.options[1] = 0.5f, s.label = 0.9f;
    s.loss = &loss, s.sums = sums.data(), s.pair_loss = pair_loss.data(), s.coef = coef.data(), s.arrived = &arrived;
    if (step_loss_fwd(s, 0, nullptr)) ++failures, puts("steps were not launched");
    expect("arrived", arrived, 0, 0, S, -1);

    std::vector<double> u(S, 0.0), du(S, 0.0);
    const auto count = [&](int k) { return offsets[k + 1] - offsets[k]; };
    for (int k = 0; k < S; ++k) {
        for (int n = offsets[k]; n < offsets[k + 1]; ++n) u[k] += (all ? weights[n] : 1.0) * logp[n];
        expect("sum", sums[k], u[k], 1e-6 * longest * 10, S, k);
        if (all) u[k] -= ref[k];
    }
    double total = 0;
    const double options[kMaxOptions] = {0.1f, 0.5f};
    for (int p = 0; p < P; ++p) {
        const int w = pairs[2 * p], l = pairs[2 * p + 1];
        sspo::PairGrad<double> g = {0, 0, 0};
        if (count(w) && count(l))
            g = sspo::pair_formula<double>(formula,
                                           {u[w], u[l], static_cast<double>(count(w)), static_cast<double>(count(l)),
                                            all ? margins[p] : 0.0, all ? soft[p] : 0.9f},
                                           options);
        const double weight = all ? pair_weights[p] : 1.0;
        expect("pair loss", pair_loss[p], g.loss, 1e-5 * (1 + std::fabs(g.loss)), S, p);
        total += weight * g.loss;
        du[w] += weight * g.du_w, du[l] += weight * g.du_l;
    }
    expect("loss", loss, total * scale, 1e-5 * (1 + std::fabs(total * scale)), S, -1);
    for (int k = 0; k < S; ++k)
        for (int n = offsets[k]; n < offsets[k + 1]; ++n) {
            const double truth = du[k] * scale * (all ? weights[n] : 1.0);
            expect("coef", coef[n], truth, 1e-5 * (1 + std::fabs(truth)), S, n);
        }
}

template <class T>
void check_dtype(int per_pass) {
    for (int V : {1, 13, 333, per_pass + 9}) {
        check_rows<T>(V, V % 2, 0, 0, 1, false);
        check_rows<T>(V, V % 2 == 0, 3, 1, 2, false);
        check_rows<T>(V, false, 1, 0, 2, true);
    }
}

}  // namespace

int main() {
    check_dtype<float>(2048);
    check_dtype<__nv_bfloat16>(4096);
    check_dtype<__half>(4096);
    for (int offset = 0; offset < 8; ++offset) check_rows<__nv_bfloat16>(77, false, offset, 0, 1, false);
    for (int formula = 0; formula < sspo::kNumPairFormulas; ++formula) {
        check_steps(7, 40, 6, formula, formula % 2);
        check_steps(12, 3, 50, formula, formula % 2 == 0);
    }
    check_steps(2, 300, 0, 0, false);
    printf("%d differences\n", failures);
    return failures != 0;
}
