#define SSPO_LANES 4
#include "rows.h"

const sspo::RowKernels sspo::kRowsBaseline = {fwd, bwd};
