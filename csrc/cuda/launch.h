// The launchers, one per kernel: what binding.cpp calls. Each returns 0 or a cudaError_t, and waits for nothing.
#pragma once

#include "params.h"

namespace sspo::cuda {

int token_logp_fwd(const FwdParams&, DType, int device, void* stream);
int token_logp_bwd(const BwdParams&, DType, int device, void* stream);
int step_loss_fwd(const StepParams&, int device, void* stream);

// Blocks that share a row: more than one only where there are too few rows to fill a GPU. Depends on the sizes alone,
// so that the bits do not change from one GPU to another.
int row_splits(int64_t rows, int64_t V, DType);

constexpr int kBlocksWanted = 1056;  // 8 for each of an H100's 132 multiprocessors: row_splits is 1 from here on
constexpr int kMaxSplits = 32;

int num_heads();  // in csrc/formulas_generated.h, which is device code here

const char* error_string(int error);

}  // namespace sspo::cuda
