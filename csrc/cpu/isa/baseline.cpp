#define SSPO_LANES 4
#include "../row_reductions.h"
#include "../token_logp.h"

const sspo::RowKernels sspo::kRowsBaseline = {fwd, bwd};
const sspo::ReductionKernels sspo::kReductionsBaseline = {reductions_fwd, reductions_bwd};
