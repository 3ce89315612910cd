// SPDX-License-Identifier: Apache-2.0
// Indices out of range, which must neither be followed nor give a plausible number.
#include "../formulas_generated.h"
#include "checks.h"
#include "step_loss.h"

namespace checks {

using namespace sspo;

namespace {

void expect_nan(const char* what, double got, int64_t n) {
    if (isnan(got)) return;
    if (++failures <= 20) printf("%s: row %ld out of range: got %g, expected NaN\n", what, (long)n, got);
}

struct BadSteps {
    std::vector<int32_t> offsets = {0, 2, 3, 5, 6}, pairs = {0, 2, 3, 1, 3, 0}, adj_offsets = {0, 2, 3, 4, 6},
                         adj_pairs = {0, 5, 3, 1, 2, 4};
};

// What step_loss.cpp promises: ranges are clamped, and pairs and adjacent entries that do not exist are skipped.
void check_steps_against_promise(const BadSteps& c) {
    constexpr int N = 6, S = 4, P = 3;
    std::vector<double> logp(N), sums(S), pair_loss(P), coef(N), options(kMaxOptions, 0.3);
    for (double& v : logp) v = -uniform(0, 1);
    const double scale = 0.5;
    double loss = NAN;
    StepLossArgs<double> a{};
    a.N = N, a.S = S, a.P = P, a.logp = logp.data(), a.step_offsets = c.offsets.data();
    a.pair_index = c.pairs.data(), a.adj_offsets = c.adj_offsets.data(), a.adj_pairs = c.adj_pairs.data();
    a.formula = 0, a.options = options.data(), a.label = 1, a.scale = &scale;
    a.loss = &loss, a.sums = sums.data(), a.pair_loss = pair_loss.data(), a.coef = coef.data();
    step_loss_fwd(a);

    const auto clamp = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
    int64_t begin[S], end[S];
    double u[S] = {}, du[2 * P] = {}, total = 0, expected_coef[N] = {};
    for (int k = 0; k < S; ++k) {
        begin[k] = clamp(c.offsets[k], 0, N), end[k] = clamp(c.offsets[k + 1], begin[k], N);
        for (int64_t n = begin[k]; n < end[k]; ++n) u[k] += logp[n];
        expect("bad steps, sum", sums[k], u[k], 1e-12, "steps", S, k);
    }
    for (int p = 0; p < P; ++p) {
        const int64_t w = c.pairs[2 * p], l = c.pairs[2 * p + 1];
        PairGrad<double> g = {0, 0, 0};
        if (w >= 0 && w < S && l >= 0 && l < S && end[w] > begin[w] && end[l] > begin[l])
            g = pair_formula<double>(0, {u[w], u[l], (double)(end[w] - begin[w]), (double)(end[l] - begin[l]), 0, 1},
                                     options.data());
        expect("bad steps, pair loss", pair_loss[p], g.loss, 1e-12, "steps", S, p);
        total += g.loss, du[2 * p] = g.du_w, du[2 * p + 1] = g.du_l;
    }
    expect("bad steps, loss", loss, scale * total, 1e-12, "steps", S, -1);
    for (int k = 0; k < S; ++k) {
        double sum = 0;
        const int64_t last = clamp(c.adj_offsets[k + 1], 0, 2 * P);
        for (int64_t j = clamp(c.adj_offsets[k], 0, last); j < last; ++j)
            if (c.adj_pairs[j] >= 0 && c.adj_pairs[j] < 2 * P) sum += du[c.adj_pairs[j]];
        for (int64_t n = begin[k]; n < end[k]; ++n) expected_coef[n] = scale * sum;
    }
    for (int n = 0; n < N; ++n) expect("bad steps, coef", coef[n], expected_coef[n], 1e-12, "steps", S, n);
}

}  // namespace

// Rows whose position, and positions whose row, is out of range: NaN and zeros. The tables end where their data ends.
void check_positions(const Isa& isa, DType dtype, int64_t V) {
    constexpr int64_t positions = 2;
    const size_t bytes = size_of(dtype) * (size_t)(positions * V);
    char *x = (char*)malloc(bytes), *out = (char*)malloc(bytes);
    for (int64_t i = 0; i < positions * V; ++i) store(x, dtype, i, (float)integer(-64, 64) / 8);
    const Logits logits = {x, dtype, 0, V, positions, positions, V, 1, 0};
    Logits no_ref = logits;
    no_ref.data = nullptr;
    const bool wide = dtype == DType::kFloat64;

    std::vector<int64_t> rows = {1, INT64_MIN, INT64_MAX};
    for (int32_t index : wrong_indices(positions)) rows.push_back(index);
    const size_t N = rows.size();
    std::vector<int64_t> labels(N, 0);
    std::vector<double> lse(N), ref_lse(N), values(4 * N);
    const auto value = [&](size_t which, size_t n) {
        return wide ? values[which * N + n] : ((const float*)(values.data() + which * N))[n];
    };
    const FwdArgs fwd{logits, rows.data(), labels.data(), values.data(), lse.data()};
    const ReductionArgs reductions{logits,
                                   logits,
                                   rows.data(),
                                   labels.data(),
                                   values.data(),
                                   values.data() + N,
                                   values.data() + 2 * N,
                                   values.data() + 3 * N,
                                   lse.data(),
                                   ref_lse.data()};
    for (bool further : {false, true}) {
        further ? row_reductions_fwd(*isa.kernels, reductions, (int64_t)N, kThreads)
                : token_logp_fwd(*isa.kernels, fwd, (int64_t)N, kThreads);
        for (size_t n = 1; n < N; ++n) {
            for (size_t which = 0; which < (further ? 4 : 1); ++which) expect_nan("forward", value(which, n), rows[n]);
            expect_nan("lse", lse[n], rows[n]);
        }
        if (!(value(0, 0) <= 0)) ++failures, printf("a sound row beside wrong ones: %g\n", value(0, 0));
    }

    // One row; the other position has a row that does not exist.
    const std::vector<int64_t> label = {0};
    const std::vector<double> one_lse = {lse[0]}, one_coef = {1.0}, coefs = {1, 0, 0, 0, 0};
    const std::vector<float> one_coef_narrow = {1.0f}, coefs_narrow = {1, 0, 0, 0, 0};
    for (int32_t index : wrong_indices(1)) {
        const std::vector<int32_t> row_of = {index, 0};
        const void* coef = wide ? (const void*)one_coef.data() : (const void*)one_coef_narrow.data();
        const void* five = wide ? (const void*)coefs.data() : (const void*)coefs_narrow.data();
        for (bool further : {false, true}) {
            memset(out, 0xff, bytes);
            if (further)
                row_reductions_bwd(*isa.kernels,
                                   ReductionGradArgs{logits, no_ref, row_of.data(), label.data(), one_lse.data(),
                                                     nullptr, five, 1, out, 0, V, false},
                                   kThreads);
            else
                token_logp_bwd(
                    *isa.kernels,
                    BwdArgs{logits, row_of.data(), label.data(), one_lse.data(), coef, nullptr, 1, out, 0, V, false},
                    kThreads);
            for (int64_t v = 0; v < V; ++v)
                expect("gradient of no row", load(out, dtype, v), 0, 0, isa.name.c_str(), V, v);
        }
    }
    free(x);
    free(out);
}

void check_bad_steps() {
    check_steps_against_promise({});
    const auto each = [](std::vector<int32_t> BadSteps::* table, int32_t size) {
        for (int32_t index : wrong_indices(size))
            for (size_t i = 0; i < (BadSteps{}.*table).size(); ++i) {
                BadSteps c;
                (c.*table)[i] = index;
                check_steps_against_promise(c);
            }
    };
    each(&BadSteps::offsets, 6);
    each(&BadSteps::pairs, 4);
    each(&BadSteps::adj_offsets, 6);
    each(&BadSteps::adj_pairs, 6);
    BadSteps backwards;
    backwards.offsets = {6, 4, 2, 1, 0}, backwards.adj_offsets = {6, 4, 2, 1, 0};
    check_steps_against_promise(backwards);
}

}  // namespace checks
