// SPDX-License-Identifier: Apache-2.0
// The program that the sanitizers run: the CPU kernels of every instruction set that runs here, and the step kernel,
// against float64. It prints what differs, and its exit status is then 1. Buffers end where their data ends.
#include "checks.h"

#include "../formulas_generated.h"
#include "step_loss.h"

using namespace sspo;
using namespace checks;

namespace {

// A logit: near 0, or, in `late` rows, far below but for the last ones, so that a late tile raises the running maximum
// by more than 2^60 holds.
float logit(int64_t column, int64_t V, bool late) {
    const float near = (float)integer(-64, 64) / 8;
    return late ? near + (column >= V - 5 ? 56 : -56) : near;
}

void check_rows(const Isa& isa, DType dtype, int64_t V, int64_t positions, bool softcap, int offset, bool in_place,
                bool late = false) {
    const double a = softcap ? 1.0 / 20 : 1.25, c = softcap ? 22.0 : 0.0,
                 eps = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
    const double coarse = dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : eps;
    const auto z = [&](double x) { return softcap ? c * tanh(a * x) : a * x; };
    const size_t bytes = size_of(dtype) * (size_t)(offset + positions * V);
    char *x = (char*)malloc(bytes), *fresh = (char*)malloc(bytes);
    void* data = x + size_of(dtype) * (size_t)offset;
    for (int64_t i = 0; i < positions * V; ++i) store(data, dtype, i, logit(i % V, V, late));
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
        const double logp_exact = z(load(data, dtype, rows[n] * V + labels[n])) - exact;
        const double size = late ? 1 + fabs(exact) + fabs(logp_exact) : 1;
        expect("lse", lse[n], exact, 100 * eps * size, isa.name.c_str(), V, -1);
        expect("logp", wide ? logp_wide[n] : logp[n], logp_exact, 200 * eps * size, isa.name.c_str(), V, labels[n]);
        for (int64_t v = 0; v < V; ++v) {
            const double value = load(data, dtype, rows[n] * V + v), t = tanh(a * value);
            truth[rows[n] * V + v] =
                1.5 * coef[n] * (softcap ? c * a * (1 - t * t) : a) * ((v == labels[n]) - exp(z(value) - exact));
        }
    }

    void* out = in_place ? data : fresh + size_of(dtype) * (size_t)offset;
    const void* coef_in = wide ? (const void*)coef_wide.data() : (const void*)coef.data();
    const void* upstream_in = wide ? (const void*)&upstream_wide : (const void*)&upstream;
    BwdArgs args{logits, row_of.data(), labels.data(), lse.data(), coef_in, upstream_in, N, out, 0, V, false};
    const auto check_gradient = [&](const char* what) {
        for (int64_t i = 0; i < positions * V; ++i)
            expect(what, load(out, dtype, i), truth[i], 200 * eps + coarse * fabs(truth[i]), isa.name.c_str(), V,
                   i % V);
    };
    token_logp_bwd(*isa.kernels, args, kThreads);
    check_gradient("gradient");
    if (!in_place) {  // as for an output larger than the caches
        memset(out, 0xff, size_of(dtype) * (size_t)(positions * V));
        args.stream = true;
        isa.kernels->token_logp_bwd(args, 0, positions);
        check_gradient("gradient, streamed");
    }
    free(x);
    free(fresh);
}

// Entropy, sum of squares, KL from a reference with another layout, and their gradient, at `count` positions, all
// scored. `lean`: without the sum of squares, and with a reference without the entropy too.
void check_reductions(const Isa& isa, DType dtype, int64_t V, int64_t count, bool has_ref, bool lean, int offset,
                      bool in_place, bool late = false) {
    const double a = 1.25, eps = dtype == DType::kFloat64 ? 0x1p-52 : 0x1p-23;
    const double coarse = dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : eps;
    const size_t size = size_of(dtype), bytes = size * (size_t)(offset + count * V);
    char *x = (char*)malloc(bytes), *fresh = (char*)malloc(bytes), *ref = (char*)malloc(size * (size_t)(count * V));
    void *data = x + size * (size_t)offset, *out = in_place ? data : fresh + size * (size_t)offset;
    for (int64_t i = 0; i < count * V; ++i) {
        store(data, dtype, i, logit(i % V, V, late));
        store(ref, dtype, i, logit(i % V, V, late && i / V % 2 == 0));  // where not, the policy alone rises
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
                expect(names[k], wide ? values_wide[k * N + n] : values[k * N + n], exact[k],
                       400 * eps * (late ? 1 + fabs(exact[k]) : 1), isa.name.c_str(), V, n);
    }
    ReductionGradArgs args{logits,
                           of_ref,
                           row_of.data(),
                           labels.data(),
                           lse.data(),
                           ref_lse.data(),
                           wide ? (const void*)coefs_wide.data() : (const void*)coefs.data(),
                           count,
                           out,
                           0,
                           V,
                           false};
    const auto check_gradient = [&](const char* what) {
        for (int64_t i = 0; i < count * V; ++i)
            expect(what, load(out, dtype, i), truth[(size_t)i], 400 * eps + coarse * fabs(truth[(size_t)i]),
                   isa.name.c_str(), V, i % V);
    };
    row_reductions_bwd(*isa.kernels, args, kThreads);
    check_gradient("gradient+");
    if (!in_place) {
        memset(out, 0xff, size * (size_t)(count * V));
        args.stream = true;
        isa.kernels->row_reductions_bwd(args, 0, count);
        check_gradient("gradient+, streamed");
    }
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

// Every instruction set, or the one that is named.
int main(int argc, char** argv) {
    for (const Isa& isa : isas()) {
        if (!isa.why_not.empty() || (argc > 1 && isa.name != argv[1])) continue;
        for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
            for (int64_t V : {1, 7, 33, 301, 4111}) {
                check_rows(isa, dtype, V, 3, V % 2 == 0, 3, false);
                check_rows(isa, dtype, V, 2, V % 3 == 0, 0, true);
                check_labels(isa, dtype, V);
                check_positions(isa, dtype, V);
                for (bool lean : {false, true}) {
                    check_reductions(isa, dtype, V, 3, true, lean, 3, false);
                    check_reductions(isa, dtype, V, 2, V % 3 != 0, lean, 0, true);
                }
            }
            for (bool softcap : {false, true}) check_rows(isa, dtype, 4111, 3, softcap, 1, false, true);
            for (bool has_ref : {false, true})
                for (bool lean : {false, true}) check_reductions(isa, dtype, 4111, 3, has_ref, lean, 1, false, true);
        }
        // several blocks of a megabyte, so that all threads have work
        check_rows(isa, DType::kFloat32, 131075, 5, false, 1, false);
        check_reductions(isa, DType::kFloat32, 131075, 5, true, false, 1, false);
        printf("%s\n", isa.name.c_str());
    }
    for (int formula = 0; formula < kNumPairFormulas; ++formula)
        check_steps<float>(formula), check_steps<double>(formula);
    check_bad_steps();
    check_product();
    printf("%d differences\n", failures);
    return failures != 0;
}
