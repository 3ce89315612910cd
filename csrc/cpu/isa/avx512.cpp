// SPDX-License-Identifier: Apache-2.0
#define SSPO_AVX512
#define SSPO_LANES 16
#include "../row_reductions.h"
#include "../token_logp.h"

const sspo::Kernels sspo::kAvx512 = {run<TokenLogpFwd>, run<TokenLogpBwd>, run<RowReductionsFwd>,
                                     run<RowReductionsBwd>};
