// SPDX-License-Identifier: Apache-2.0
#define SSPO_AVX2
#define SSPO_LANES 8
#include "../row_reductions.h"
#include "../token_logp.h"

const sspo::Kernels sspo::kAvx2 = {run<TokenLogpFwd>, run<TokenLogpBwd>, run<RowReductionsFwd>, run<RowReductionsBwd>};
