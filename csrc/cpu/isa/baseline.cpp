// SPDX-License-Identifier: Apache-2.0
#define SSPO_LANES 4
#include "../row_reductions.h"
#include "../token_logp.h"

const sspo::Kernels sspo::kBaseline = {run<TokenLogpFwd>, run<TokenLogpBwd>, run<RowReductionsFwd>,
                                       run<RowReductionsBwd>};
