// SPDX-License-Identifier: Apache-2.0
// The program that the sanitizers run: the CPU kernels of every instruction set that runs here, and the step kernel,
// against float64. It prints what differs, and its exit status is then 1. Buffers end where their data ends.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

#include "../formulas_generated.h"
#include "dispatch.h"
#include "step_loss.h"

using namespace sspo;

namespace {

constexpr int kThreads = 3;

std::mt19937 generator(0);
int failures = 0;

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(generator); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high - 1)(generator); }

void expect(const char* what, double got, double truth, double tolerance, const char* isa, int64_t V, int64_t column) {
    if (fabs(got - truth) <= tolerance) return;
    if (++failures <= 20)
        printf("%s: got %.9g, truth %.9g (%s, V = %ld, column %ld)\n", what, got, truth, isa, (long)V, (long)column);
}

size_t size_of(DType d) { return d == DType::kFloat64 ? 8 : d == DType::kFloat32 ? 4 : 2; }

// Numbers that every type holds exactly, so that storing them needs no rounding: multiples of 1/8 in [-8, 8).
void store(void* p, DType d, int64_t i, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (d == DType::kFloat64) ((double*)p)[i] = x;
    if (d == DType::kFloat32) ((float*)p)[i] = x;
    if (d == DType::kBFloat16) ((uint16_t*)p)[i] = (uint16_t)(bits >> 16);
    if (d == DType::kFloat16) {
        const uint16_t magnitude = (uint16_t)(((bits & 0x7fffffffu) >> 13) - (112 << 10));
        ((uint16_t*)p)[i] = x == 0 ? 0 : (uint16_t)((bits >> 16 & 0x8000u) | magnitude);
    }
}

double load(const void* p, DType d, int64_t i) {
    if (d == DType::kFloat64) return ((const double*)p)[i];
    if (d == DType::kFloat32) return ((const float*)p)[i];
    const uint16_t h = ((const uint16_t*)p)[i];
    if (d == DType::kBFloat16) {
        const uint32_t bits = (uint32_t)h << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return mantissa ? NAN : h & 0x8000 ? -INFINITY : INFINITY;
    const double m = ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return h & 0x8000 ? -m : m;
}

void check_rows(const Isa& isa, DType dtype, int64_t V, int64_t positions, bool softcap, int offset, bool in_place) {
    const double a = softcap ? 1.0 / 20 : 1.25, c = softcap ? 22.0 : 0.0,
                 eps = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
    const double coarse = dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : eps;
    const auto z = [&](double x) { return softcap ? c * tanh(a * x) : a * x; };
    const size_t bytes = size_of(dtype) * (size_t)(offset + positions * V);
    char *x = (char*)malloc(bytes), *fresh = (char*)malloc(bytes);
    void* data = x + size_of(dtype) * (size_t)offset;
    for (int64_t i = 0; i < positions * V; ++i) store(data, dtype, i, (float)integer(-64, 64) / 8);
    std::vector<int64_t> rows, labels;
    std::vector<int32_t> row_of((size_t)positions, -1);
    for (int64_t i = 0; i < positions; i += i == 0 && positions > 2 ? 2 : 1) {  // one position is not scored
        row_of[(size_t)i] = (int32_t)rows.size();
        rows.push_back(i);
        labels.push_back(integer(0, (int)V));
    }
    const int64_t N = (int64_t)rows.size();
    const bool wide = dtype == DType::kFloat64;
    std::vector<double> lse((size_t)N), coef_wide((size_t)N), logp_wide((size_t)N);
    std::vector<float> coef((size_t)N), logp((size_t)N);
    for (int64_t n = 0; n < N; ++n) coef[(size_t)n] = (float)uniform(-1, 1), coef_wide[(size_t)n] = coef[(size_t)n];
    const float upstream = 1.5f;
    const double upstream_wide = 1.5;

    const Logits logits = {data, dtype, 0, V, positions, positions, V, a, c};
    void* logp_out = wide ? (void*)logp_wide.data() : (void*)logp.data();
    token_logp_fwd(*isa.kernels, FwdArgs{logits, rows.data(), labels.data(), logp_out, lse.data()}, N, kThreads);

    std::vector<double> truth((size_t)(positions * V), 0.0);
    for (int64_t n = 0; n < N; ++n) {
        double sum = 0;
        for (int64_t v = 0; v < V; ++v) sum += exp(z(load(data, dtype, rows[n] * V + v)));
        const double exact = log(sum);
        expect("lse", lse[n], exact, 100 * eps, isa.name.c_str(), V, -1);
        expect("logp", wide ? logp_wide[n] : logp[n], z(load(data, dtype, rows[n] * V + labels[n])) - exact, 200 * eps,
               isa.name.c_str(), V, labels[n]);
        for (int64_t v = 0; v < V; ++v) {
            const double value = load(data, dtype, rows[n] * V + v), t = tanh(a * value);
            truth[rows[n] * V + v] =
                1.5 * coef[n] * (softcap ? c * a * (1 - t * t) : a) * ((v == labels[n]) - exp(z(value) - exact));
        }
    }

    void* out = in_place ? data : fresh + size_of(dtype) * (size_t)offset;
    const void* coef_in = wide ? (const void*)coef_wide.data() : (const void*)coef.data();
    const void* upstream_in = wide ? (const void*)&upstream_wide : (const void*)&upstream;
    token_logp_bwd(*isa.kernels,
                   BwdArgs{logits, row_of.data(), labels.data(), lse.data(), coef_in, upstream_in, N, out, 0, V, false},
                   kThreads);
    for (int64_t i = 0; i < positions * V; ++i)
        expect("gradient", load(out, dtype, i), truth[i], 200 * eps + coarse * fabs(truth[i]), isa.name.c_str(), V,
               i % V);
    free(x);
    free(fresh);
}

// Entropy, sum of squares, KL from a reference with another layout, and their gradient, at `count` positions, all
// scored. `lean`: without the sum of squares, and with a reference without the entropy too.
void check_reductions(const Isa& isa, DType dtype, int64_t V, int64_t count, bool has_ref, bool lean, int offset,
                      bool in_place) {
    const double a = 1.25, eps = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
    const double coarse = dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : eps;
    const size_t size = size_of(dtype), bytes = size * (size_t)(offset + count * V);
    char *x = (char*)malloc(bytes), *fresh = (char*)malloc(bytes), *ref = (char*)malloc(size * (size_t)(count * V));
    void *data = x + size * (size_t)offset, *out = in_place ? data : fresh + size * (size_t)offset;
    for (int64_t i = 0; i < count * V; ++i) {
        store(data, dtype, i, (float)integer(-64, 64) / 8);
        store(ref, dtype, i, (float)integer(-64, 64) / 8);
    }
    const size_t N = (size_t)count;
    std::vector<int64_t> rows(N), labels(N);
    std::vector<int32_t> row_of(N);
    for (size_t n = 0; n < N; ++n) rows[n] = (int64_t)n, row_of[n] = (int32_t)n, labels[n] = integer(0, (int)V);
    const bool wide = dtype == DType::kFloat64;
    std::vector<double> lse(N), ref_lse(N), values_wide(4 * N), coefs_wide(5 * N);
    std::vector<float> values(4 * N), coefs(5 * N);
    const bool wants_entropy = !lean || !has_ref, wants_sum_p2 = !lean;
    for (size_t i = 0; i < 5 * N; ++i) {
        const bool none = (i % 5 == 2 && !wants_entropy) || (i % 5 == 3 && !wants_sum_p2);
        coefs[i] = none ? 0 : (float)uniform(-1, 1), coefs_wide[i] = coefs[i];
    }
    const auto value = [&](size_t which) {
        return wide ? (void*)(values_wide.data() + which * N) : (void*)(values.data() + which * N);
    };
    const Logits logits = {data, dtype, 0, V, count, count, V, a, 0};
    // The reference's positions are stored in reverse.
    const Logits of_ref = {
        has_ref ? ref + size * (size_t)((count - 1) * V) : nullptr, dtype, 0, -V, count, count, V, a, 0};
    row_reductions_fwd(
        *isa.kernels,
        ReductionArgs{logits, of_ref, rows.data(), labels.data(), value(0), wants_entropy ? value(1) : nullptr,
                      wants_sum_p2 ? value(2) : nullptr, value(3), lse.data(), ref_lse.data()},
        count, kThreads);
    std::vector<double> truth((size_t)(count * V));
    for (int64_t n = 0; n < count; ++n) {
        const auto z = [&](int64_t v) { return a * load(data, dtype, n * V + v); };
        const auto y = [&](int64_t v) { return a * load(ref, dtype, (count - 1 - n) * V + v); };
        double sum = 0, sum_ref = 0, h = 0, s = 0, kl = 0;
        for (int64_t v = 0; v < V; ++v) sum += exp(z(v)), sum_ref += exp(y(v));
        const double* c = coefs_wide.data() + 5 * n;
        for (int64_t v = 0; v < V; ++v) {
            const double log_p = z(v) - log(sum), p = exp(log_p), log_q = y(v) - log(sum_ref), q = exp(log_q);
            h -= p * log_p, s += p * p, kl += q * (log_q - log_p);
            truth[(size_t)(n * V + v)] =
                a * (c[0] * ((v == labels[n]) - p) + p * (c[1] + c[2] * log_p + c[3] * p) - (has_ref ? c[4] * q : 0));
        }
        const double exact[4] = {z(labels[n]) - log(sum), h, s, kl};
        const char* names[4] = {"logp+", "entropy", "sum_p2", "kl"};
        const bool asked[4] = {true, wants_entropy, wants_sum_p2, has_ref};
        for (int k = 0; k < 4; ++k)
            if (asked[k])
                expect(names[k], wide ? values_wide[k * N + n] : values[k * N + n], exact[k], 400 * eps,
                       isa.name.c_str(), V, n);
    }
    row_reductions_bwd(
        *isa.kernels,
        ReductionGradArgs{logits, of_ref, row_of.data(), labels.data(), lse.data(), ref_lse.data(),
                          wide ? (const void*)coefs_wide.data() : (const void*)coefs.data(), count, out, 0, V, false},
        kThreads);
    for (int64_t i = 0; i < count * V; ++i)
        expect("gradient+", load(out, dtype, i), truth[(size_t)i], 400 * eps + coarse * fabs(truth[(size_t)i]),
               isa.name.c_str(), V, i % V);
    free(x);
    free(fresh);
    free(ref);
}

// The contract on labels in csrc/cpu/row.h: one row for each kind of label, and one without any coefficient.
void check_labels(const Isa& isa, DType dtype, int64_t V) {
    const std::vector<int64_t> labels = {V - 1, kNoLabel, V, -2, INT64_MAX, INT64_MIN, V};
    const int64_t N = (int64_t)labels.size();
    const size_t count = (size_t)N, size = size_of(dtype);
    const bool wide = dtype == DType::kFloat64;
    char *x = (char*)malloc(size * (size_t)(N * V)), *out = (char*)malloc(size * (size_t)(N * V));
    for (int64_t i = 0; i < N * V; ++i) store(x, dtype, i, (float)integer(-64, 64) / 8);
    std::vector<int64_t> rows(count);
    std::vector<int32_t> row_of(count);
    for (size_t n = 0; n < count; ++n) rows[n] = (int64_t)n, row_of[n] = (int32_t)n;
    std::vector<double> lse(count), ref_lse(count), values_wide(4 * count), coefs_wide(5 * count, 0.5);
    std::vector<float> values(4 * count), coefs(5 * count, 0.5f);
    for (size_t i = 5 * (count - 1); i < 5 * count; ++i) coefs[i] = 0, coefs_wide[i] = 0;
    const auto value = [&](size_t which) {
        return wide ? (void*)(values_wide.data() + which * count) : (void*)(values.data() + which * count);
    };
    const Logits logits = {x, dtype, 0, V, N, N, V, 1, 0};
    const auto check = [&](const char* what, double got, bool invalid, int64_t n) {
        if (invalid ? isnan(got) : isfinite(got)) return;
        if (++failures <= 20)
            printf("%s: row %ld, label %ld: got %g (%s)\n", what, (long)n, (long)labels[n], got, isa.name.c_str());
    };
    const auto check_forward = [&](const char* what) {
        for (int64_t n = 0; n < N; ++n) {
            const double logp = wide ? values_wide[n] : values[n];
            check(what, logp, n > 1, n);
            check("labels, lse", lse[n], false, n);
            if (labels[n] == kNoLabel) expect(what, logp, -lse[n], 1e-6 * fabs(lse[n]), isa.name.c_str(), V, n);
        }
    };
    const auto check_gradient = [&](const char* what) {
        for (int64_t i = 0; i < N * V; ++i) {
            check(what, load(out, dtype, i), i / V > 1 && i / V < N - 1, i / V);
            if (i / V == N - 1) expect(what, load(out, dtype, i), 0, 0, isa.name.c_str(), V, i % V);
        }
    };
    token_logp_fwd(*isa.kernels, FwdArgs{logits, rows.data(), labels.data(), value(0), lse.data()}, N, kThreads);
    check_forward("labels, logp");
    std::vector<float> coef(count, 0.5f);
    std::vector<double> coef_wide(count, 0.5);
    coef[count - 1] = 0, coef_wide[count - 1] = 0;
    const void* coef_in = wide ? (const void*)coef_wide.data() : (const void*)coef.data();
    token_logp_bwd(*isa.kernels,
                   BwdArgs{logits, row_of.data(), labels.data(), lse.data(), coef_in, nullptr, N, out, 0, V, false},
                   kThreads);
    check_gradient("labels, gradient");
    for (const bool has_ref : {false, true}) {
        Logits ref = logits;
        if (!has_ref) ref.data = nullptr;
        row_reductions_fwd(*isa.kernels,
                           ReductionArgs{logits, ref, rows.data(), labels.data(), value(0), value(1), value(2),
                                         value(3), lse.data(), ref_lse.data()},
                           N, kThreads);
        check_forward("labels, logp+");
        row_reductions_bwd(
            *isa.kernels,
            ReductionGradArgs{logits, ref, row_of.data(), labels.data(), lse.data(), ref_lse.data(),
                              wide ? (const void*)coefs_wide.data() : (const void*)coefs.data(), N, out, 0, V, false},
            kThreads);
        check_gradient("labels, gradient+");
    }
    free(x);
    free(out);
}

double near(double truth) { return 1e-5 * (1 + fabs(truth)); }

template <class T>
void check_steps(int formula) {
    // step 1 is empty; a pair with it, and a step in two pairs
    const std::vector<int32_t> offsets = {0, 3, 3, 5, 9}, pairs = {0, 2, 3, 1, 3, 0}, adj_offsets = {0, 2, 3, 4, 6};
    const std::vector<int32_t> adj_pairs = {0, 5, 3, 1, 2, 4};
    const int N = 9, S = 4, P = 3;
    std::vector<T> logp(N), weights(N), ref(S), pair_weights(P), margins(P), labels(P), sums(S), pair_loss(P), coef(N);
    for (auto* values : {&logp, &weights, &ref, &pair_weights, &margins, &labels})
        for (T& v : *values) v = (T)uniform(0, 1);
    const T options[kMaxOptions] = {T(0.3), T(0.5)}, scale = T(0.5);
    T loss = NAN;
    step_loss_fwd<T>({N,
                      S,
                      P,
                      logp.data(),
                      weights.data(),
                      offsets.data(),
                      ref.data(),
                      pairs.data(),
                      adj_offsets.data(),
                      adj_pairs.data(),
                      pair_weights.data(),
                      margins.data(),
                      labels.data(),
                      formula,
                      options,
                      T(1),
                      &scale,
                      &loss,
                      sums.data(),
                      pair_loss.data(),
                      coef.data()});
    double u[4] = {}, du[4] = {}, total = 0;
    for (int k = 0; k < S; ++k) {
        for (int n = offsets[k]; n < offsets[k + 1]; ++n) u[k] += (double)weights[n] * (double)logp[n];
        expect("sum", sums[k], u[k], 1e-6, "steps", S, k);
        u[k] -= ref[k];
    }
    const double wide_options[kMaxOptions] = {(double)options[0], (double)options[1]};
    for (int p = 0; p < P; ++p) {
        const int w = pairs[2 * p], l = pairs[2 * p + 1], n_w = offsets[w + 1] - offsets[w],
                  n_l = offsets[l + 1] - offsets[l];
        PairGrad<double> g = {0, 0, 0};
        if (n_w && n_l)
            g = pair_formula<double>(
                formula, {u[w], u[l], (double)n_w, (double)n_l, (double)margins[p], (double)labels[p]}, wide_options);
        expect("pair loss", pair_loss[p], g.loss, near(g.loss), "steps", S, p);
        total += (double)pair_weights[p] * g.loss;
        du[w] += (double)pair_weights[p] * g.du_w, du[l] += (double)pair_weights[p] * g.du_l;
    }
    expect("loss", loss, total * scale, near(total), "steps", S, -1);
    for (int k = 0; k < S; ++k)
        for (int n = offsets[k]; n < offsets[k + 1]; ++n)
            expect("coef", coef[n], du[k] * scale * (double)weights[n], near(du[k]), "steps", S, n);
}

}  // namespace

int main() {
    for (const Isa& isa : isas()) {
        if (!isa.why_not.empty()) continue;
        for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
            for (int64_t V : {1, 7, 33, 301, 4111}) {
                check_rows(isa, dtype, V, 3, V % 2 == 0, 3, false);
                check_rows(isa, dtype, V, 2, V % 3 == 0, 0, true);
                check_labels(isa, dtype, V);
                for (bool lean : {false, true}) {
                    check_reductions(isa, dtype, V, 3, true, lean, 3, false);
                    check_reductions(isa, dtype, V, 2, V % 3 != 0, lean, 0, true);
                }
            }
        }
        // several blocks of a megabyte, so that all threads have work
        check_rows(isa, DType::kFloat32, 131075, 5, false, 1, false);
        check_reductions(isa, DType::kFloat32, 131075, 5, true, false, 1, false);
        printf("%s\n", isa.name.c_str());
    }
    for (int formula = 0; formula < kNumPairFormulas; ++formula)
        check_steps<float>(formula), check_steps<double>(formula);
    printf("%d differences\n", failures);
    return failures != 0;
}
