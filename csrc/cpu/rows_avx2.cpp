#define SSPO_AVX2
#define SSPO_LANES 8
#include "rows.h"

const sspo::RowKernels sspo::kRowsAvx2 = {fwd, bwd};
