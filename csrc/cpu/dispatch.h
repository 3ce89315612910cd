// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set, and divides the work among threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels.h"

namespace sspo {

struct Isa {
    std::string name;
    std::string why_not;     // empty where this machine can run it
    const Kernels* kernels;  // null where this build does not have it
};

const std::vector<Isa>& isas();  // the slowest first

// The fastest one that runs here, or the one that SSPO_CPU_ISA names. Throws std::runtime_error with the reason if the
// named one cannot run here.
const Isa& choose_isa();

// The product of bfloat16 matrices that runs here, or null and the reason. It belongs to the instruction set "avx512",
// and SSPO_CPU_ISA can leave it out.
struct ProductChoice {
    const Product* product;
    std::string why_not;
};
ProductChoice choose_product();

// Calls work(begin, end) over [0, count) in blocks of `block`, from up to `threads` threads. `work` must not throw.
void parallel_for(int64_t count, int64_t block, int threads, const std::function<void(int64_t, int64_t)>& work);

// Prepares a large output that is not the logits. Returns true if its memory was in use before.
//
// Fresh memory costs a page fault for each page, which takes longer than the arithmetic. Pages of 2 MiB cause 512 times
// fewer faults. The system clears them through the caches, so plain stores find them there. Memory that was in use is
// written fastest past the caches, without being read first. All of this changes the time alone.
bool prepare_large_output(void* data, int64_t bytes);

void add_product(const Product&, const ProductArgs&, int threads);
void token_logp_fwd(const Kernels&, const FwdArgs&, int64_t N, int threads);
void token_logp_bwd(const Kernels&, const BwdArgs&, int threads);
void row_reductions_fwd(const Kernels&, const ReductionArgs&, int64_t N, int threads);
void row_reductions_bwd(const Kernels&, const ReductionGradArgs&, int threads);

}  // namespace sspo
