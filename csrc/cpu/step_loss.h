// Step sums, pair losses and dL/dlogp of every row: see step_loss_fwd in sspo_ext/backends/cpu.py for the equations.
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
    int head;
    const T* options;
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
