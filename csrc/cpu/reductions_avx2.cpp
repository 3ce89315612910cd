#define SSPO_AVX2
#define SSPO_LANES 8
#include "reductions.h"

const sspo::ReductionKernels sspo::kReductionsAvx2 = {reductions_fwd, reductions_bwd};
