// SPDX-License-Identifier: Apache-2.0
// Step sums, pair losses and dL/dlogp of every row. The equations are those of step_loss_fwd in
// sspo_ext/backends/cpu.py.
#pragma once

#include <cstdint>

namespace sspo {

template <class T>
struct StepLossArgs {
    int64_t N, S, P;
    const T* logp;                                       // (N,)
    const T* weights;                                    // (N,) or null
    const int32_t* step_offsets;                         // (S + 1,)
    const T* ref;                                        // (S,) or null
    const int32_t* pair_index;                           // (P, 2)
    const int32_t* adj_offsets;                          // (S + 1,)
    const int32_t* adj_pairs;                            // (2P,)
    const T *pair_weights, *pair_margins, *pair_labels;  // (P,) or null
    int formula;                                         // index of the pair loss in formulas_generated.h
    const T* options;                                    // (kMaxOptions,)
    T label;
    const T* scale;  // ()
    T* loss;         // ()
    T* sums;         // (S,)
    T* pair_loss;    // (P,)
    T* coef;         // (N,)
};

template <class T>
void step_loss_fwd(const StepLossArgs<T>&);

}  // namespace sspo
