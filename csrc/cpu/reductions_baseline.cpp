#define SSPO_LANES 4
#include "reductions.h"

const sspo::ReductionKernels sspo::kReductionsBaseline = {reductions_fwd, reductions_bwd};
