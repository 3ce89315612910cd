#define SSPO_AVX512
#define SSPO_LANES 16
#include "reductions.h"

const sspo::ReductionKernels sspo::kReductionsAvx512 = {reductions_fwd, reductions_bwd};
