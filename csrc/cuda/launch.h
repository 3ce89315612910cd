// SPDX-License-Identifier: Apache-2.0
// The launchers that binding.cpp calls, one for each kernel. Each returns 0 or a cudaError_t, and waits for nothing.
#pragma once

#include "params.h"

namespace sspo::cuda {

int token_logp_fwd(const FwdParams&, DType, int device, void* stream);
int token_logp_bwd(const BwdParams&, DType, int device, void* stream);
int step_loss_fwd(const StepParams&, int device, void* stream);

// How many blocks share a row: more than one only where there are too few rows to fill a GPU. It depends on the sizes
// alone, so that all GPUs give the same bits.
int row_splits(int64_t rows, int64_t V, DType);

constexpr int kBlocksWanted = 1056;  // 8 for each of an H100's 132 multiprocessors; with as many rows, no row is split
constexpr int kMaxSplits = 32;

// From csrc/formulas_generated.h, which only device code includes.
const char* formulas_hash();
int num_formulas();

const char* error_string(int error);

}  // namespace sspo::cuda
