// SPDX-License-Identifier: Apache-2.0
#include "step_loss.h"

#include <algorithm>
#include <vector>

#include "../formulas_generated.h"

// One thread is enough: there are thousands of rows and steps here, and hundreds of millions of logits in the row
// kernels.

namespace sspo {

template <class T>
void step_loss_fwd(const StepLossArgs<T>& a) {
    // An index outside its table must not become a wild access. Ranges are clamped and pairs skipped, so that the sums
    // lack what the index pointed to.
    const auto row_begin = [&](int64_t k) { return std::clamp<int64_t>(a.step_offsets[k], 0, a.N); };
    const auto row_end = [&](int64_t k) { return std::clamp<int64_t>(a.step_offsets[k + 1], row_begin(k), a.N); };
    const auto count = [&](int64_t k) { return row_end(k) - row_begin(k); };
    const auto weight = [&](int64_t n) { return a.weights ? a.weights[n] : T(1); };

    for (int64_t k = 0; k < a.S; ++k) {
        double sum = 0;
        for (int64_t n = row_begin(k); n < row_end(k); ++n) sum += (double)weight(n) * (double)a.logp[n];
        a.sums[k] = (T)sum;
    }

    double loss = 0;
    std::vector<PairGrad<T>> grads(a.P, PairGrad<T>{0, 0, 0});  // du_w and du_l times the pair's weight
    for (int64_t p = 0; p < a.P; ++p) {
        const int64_t w = a.pair_index[2 * p], l = a.pair_index[2 * p + 1];
        a.pair_loss[p] = 0;
        if (w < 0 || w >= a.S || l < 0 || l >= a.S || count(w) == 0 || count(l) == 0) continue;
        const PairScores<T> scores{a.sums[w] - (a.ref ? a.ref[w] : T(0)),
                                   a.sums[l] - (a.ref ? a.ref[l] : T(0)),
                                   (T)count(w),
                                   (T)count(l),
                                   a.pair_margins ? a.pair_margins[p] : T(0),
                                   a.pair_labels ? a.pair_labels[p] : a.label};
        const PairGrad<T> g = pair_formula<T>(a.formula, scores, a.options);
        const T pair_weight = a.pair_weights ? a.pair_weights[p] : T(1);
        a.pair_loss[p] = g.loss;
        loss += (double)pair_weight * (double)g.loss;
        grads[p] = {g.loss, pair_weight * g.du_w, pair_weight * g.du_l};
    }
    *a.loss = (T)(loss * (double)*a.scale);

    std::fill(a.coef, a.coef + a.N, T(0));
    for (int64_t k = 0; k < a.S; ++k) {
        const int64_t end = std::clamp<int64_t>(a.adj_offsets[k + 1], 0, 2 * a.P);
        double du = 0;
        for (int64_t j = std::clamp<int64_t>(a.adj_offsets[k], 0, end); j < end; ++j) {
            const int64_t entry = a.adj_pairs[j];
            if (entry < 0 || entry >= 2 * a.P) continue;
            du += (double)(entry % 2 ? grads[entry / 2].du_l : grads[entry / 2].du_w);
        }
        du *= (double)*a.scale;
        for (int64_t n = row_begin(k); n < row_end(k); ++n) a.coef[n] = (T)(du * (double)weight(n));
    }
}

template void step_loss_fwd(const StepLossArgs<float>&);
template void step_loss_fwd(const StepLossArgs<double>&);

}  // namespace sspo
