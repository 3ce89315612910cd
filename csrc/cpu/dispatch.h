// Chooses the instruction set and splits the work over threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels.h"

namespace sspo {

struct Isa {
    std::string name;
    std::string why_not;        // empty where this machine can run it
    const RowKernels* kernels;  // null where this build does not have it
    const ReductionKernels* reductions;
};

const std::vector<Isa>& isas();  // from the plainest to the fastest

// The fastest one, or what SSPO_CPU_ISA names; throws std::runtime_error with the reason if that cannot run here.
const Isa& choose_isa();

// Calls work(begin, end) over [0, count), in blocks of `block`, from up to `threads` threads; `work` must not throw.
void parallel_for(int64_t count, int64_t block, int threads, const std::function<void(int64_t, int64_t)>& work);

// Prepares a large output that is not the logits; returns whether its memory was touched before.
//
// Fresh memory costs one fault per page, more than the arithmetic: with 2 MiB pages the faults are 512 times fewer. The
// pages are cleared through the cache, so plain stores find them there, while memory that was in use is written fastest
// past the cache, without being read first. All of this is advice: nothing but time depends on it.
bool prepare_large_output(void* data, int64_t bytes);

void token_logp_fwd(const RowKernels&, const FwdArgs&, int64_t N, int threads);
void token_logp_bwd(const RowKernels&, const BwdArgs&, int threads);
void row_reductions_fwd(const ReductionKernels&, const ReductionArgs&, int64_t N, int threads);
void row_reductions_bwd(const ReductionKernels&, const ReductionGradArgs&, int threads);

}  // namespace sspo
