#define SSPO_AVX512
#define SSPO_LANES 16
#include "../row_reductions.h"
#include "../token_logp.h"

const sspo::RowKernels sspo::kRowsAvx512 = {fwd, bwd};
const sspo::ReductionKernels sspo::kReductionsAvx512 = {reductions_fwd, reductions_bwd};
