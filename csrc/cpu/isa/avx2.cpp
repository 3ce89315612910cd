#define SSPO_AVX2
#define SSPO_LANES 8
#include "../row_reductions.h"
#include "../token_logp.h"

const sspo::RowKernels sspo::kRowsAvx2 = {fwd, bwd};
const sspo::ReductionKernels sspo::kReductionsAvx2 = {reductions_fwd, reductions_bwd};
