# SPDX-License-Identifier: Apache-2.0
"""Formulas with a likelihood term: SFT regularisers to mix in, and reference-free losses that have one already."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .numerics import MAX_MEAN_LOGP, log1mexp, log_odds, logistic
from .registry import NOT_NEGATIVE, PairScores, pair_formula

_BETA_UNUSED = {"beta": 0.1}  # scales the rewards of the metrics; the loss does not use it


@pair_formula(
    "sft",
    options=_BETA_UNUSED,
    reference="forbidden",
    margins=False,
    by_winner_tokens=True,
    formula="-S_w / nbar,  nbar = mean n_w over the batch's pairs: the mean over pairs is one over chosen tokens",
    source="cross-entropy of the chosen responses, as TRL's loss_type 'sft'",
    use="mixed in, to keep the chosen response likely; long responses count for more",
)
def _sft(s: PairScores, beta):
    return -s.u_w / s.n_w


@pair_formula(
    "nll",
    options=_BETA_UNUSED,
    reference="forbidden",
    margins=False,
    formula="-S_w / n_w",
    source="per-response mean negative log-likelihood: RPO (arXiv 2404.19733), CPO, ORPO as in their papers",
    use="mixed in, with every response counting the same",
)
def _nll(s: PairScores, beta):
    return -s.u_w / s.n_w


@pair_formula(
    "nll_rejected",
    options=_BETA_UNUSED,
    reference="forbidden",
    margins=False,
    formula="-S_l / n_l",
    source="the rejected response's SFT term of the 3D-properties study (arXiv 2406.07327)",
    use="mixed in with a small weight, to slow the fall of rejected likelihoods",
)
def _nll_rejected(s: PairScores, beta):
    return -s.u_l / s.n_l


@pair_formula(
    "cpo",
    options={"beta": 0.1, "cpo_alpha": 1.0},
    reference="forbidden",
    smoothing="optional",
    soft_labels=True,
    limits={"cpo_alpha": NOT_NEGATIVE},
    formula="-q ls(z) - (1 - q) ls(-z) - cpo_alpha S_w / n_w,  z = beta (S_w - S_l) - margin",
    source="CPO (arXiv 2401.08417). TRL and Liger average the likelihood term over all chosen tokens: "
    "loss_type=['cpo', 'sft'], loss_weights=[1, alpha], cpo_alpha=0; TPO's pair term with cpo_alpha=0",
    use="no reference model, good chosen responses",
)
def _cpo(s: PairScores, beta, cpo_alpha):
    return logistic(beta * (s.u_w - s.u_l) - s.margin, s.label) - cpo_alpha * (s.u_w / s.n_w)


@pair_formula(
    "orpo",
    options={"beta": 0.1},
    reference="forbidden",
    margins=False,
    per_token_reward=True,
    formula="-S_w / n_w - beta ls(lo_w - lo_l),  lo = m - log(1 - e^m),  m = min(S / n, -1e-6)",
    source="ORPO (arXiv 2403.07691), eq. 6 and 7. TRL's likelihood term also covers the prompt; Liger's averages over "
    "all chosen tokens",
    use="SFT and preference in one stage, from a base model",
)
def _orpo(s: PairScores, beta):
    return -s.u_w / s.n_w - beta * F.logsigmoid(log_odds(s.u_w / s.n_w) - log_odds(s.u_l / s.n_l))


@pair_formula(
    "asft",
    options={"beta": 0.1},
    reference="forbidden",
    margins=False,
    per_token_reward=True,
    formula="-m_w + beta [-m_w - log(1 - e^m_l)],  m_w = S_w / n_w,  m_l = min(S_l / n_l, -1e-6)",
    source="ASFT (arXiv 2409.10571): -ls(logit p_w) - ls(-logit p_l) with its logarithms taken together",
    use="as orpo, each response on its own",
)
def _asft(s: PairScores, beta):
    m_w, m_l = s.u_w / s.n_w, torch.clamp(s.u_l / s.n_l, max=MAX_MEAN_LOGP)
    return -m_w + beta * (-m_w - log1mexp(m_l))
