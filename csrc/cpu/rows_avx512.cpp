#define SSPO_AVX512
#define SSPO_LANES 16
#include "rows.h"

const sspo::RowKernels sspo::kRowsAvx512 = {fwd, bwd};
