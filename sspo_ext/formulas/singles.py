# SPDX-License-Identifier: Apache-2.0
"""Formulas that push each of the two scores on its own against the reference, not only their difference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .registry import PairScores, pair_formula


@pair_formula(
    "nca_pair",
    options={"beta": 0.1},
    reference="required",
    margins=False,
    formula="-ls(r_w) - ls(-r_w) / 2 - ls(-r_l) / 2,  r = beta u",
    source="NCA (arXiv 2402.05369), pair form",
    use="the chosen response's likelihood must not fall",
)
def _nca_pair(s: PairScores, beta):
    r_w, r_l = beta * s.u_w, beta * s.u_l
    return -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)


@pair_formula(
    "bco_pair",
    options={"beta": 0.1},
    reference="required",
    formula="-ls(r_w - margin) - ls(margin - r_l),  r = beta u; margin is BCO's reward shift",
    source="BCO (arXiv 2404.04656); the shift is a running mean of rewards (`RewardMean.margins`), which TRL leaves at "
    "0. TRL's documentation prints DPO's formula for it; this is what its code computes",
    use="thumbs-up and thumbs-down data; the shift keeps the classifier centred",
)
def _bco_pair(s: PairScores, beta):
    return -F.logsigmoid(beta * s.u_w - s.margin) - F.logsigmoid(s.margin - beta * s.u_l)


@pair_formula(
    "sppo_hard",
    options={"beta": 0.1},
    reference="required",
    margins=False,
    formula="(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2",
    source="SPPO (arXiv 2405.00675), eq. 4.7 with win probability 1",
    use="self-play against the previous iteration as reference",
)
def _sppo_hard(s: PairScores, beta):
    return torch.square(s.u_w - 0.5 / beta) + torch.square(s.u_l + 0.5 / beta)


@pair_formula(
    "sppo",
    options={"beta": 0.1},
    reference="required",
    smoothing="optional",
    soft_labels=True,
    margins=False,
    formula="(u_w - (q - 1/2) / beta)^2 + (u_l + (q - 1/2) / beta)^2",
    source="SPPO (arXiv 2405.00675), eq. 4.7 with win probability q",
    use="as sppo_hard, with a preference model's probabilities as soft labels",
)
def _sppo(s: PairScores, beta):
    target = (s.label - 0.5) / beta
    return torch.square(s.u_w - target) + torch.square(s.u_l + target)


@pair_formula(
    "apo_zero",
    options={"beta": 0.1},
    reference="required",
    margins=False,
    formula="1 - sig(beta u_w) + sig(beta u_l)",
    source="APO-zero (arXiv 2408.06266), eq. 7",
    use="chosen responses are better than what the model writes",
)
def _apo_zero(s: PairScores, beta):
    return torch.sigmoid(-beta * s.u_w) + torch.sigmoid(beta * s.u_l)


@pair_formula(
    "apo_down",
    options={"beta": 0.1},
    reference="required",
    formula="sig(beta u_w) + 1 - sig(z),  z = beta (u_w - u_l) - margin",
    source="APO-down (arXiv 2408.06266), eq. 8",
    use="the model writes better than the chosen responses",
)
def _apo_down(s: PairScores, beta):
    return torch.sigmoid(beta * s.u_w) + torch.sigmoid(s.margin - beta * (s.u_w - s.u_l))
