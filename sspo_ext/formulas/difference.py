# SPDX-License-Identifier: Apache-2.0
"""Formulas of the difference of the two scores (and the first four of the table, whose numbers stay)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import bounded_exp, logistic
from .registry import ABOVE_ZERO, NOT_NEGATIVE, Limit, PairScores, pair_formula

_MARGIN_TEXT = "z = beta (u_w - u_l) - margin"
_EPSILON = 1e-6  # soft labels of 0 and 1 have no logarithm


def _z(s: PairScores, beta) -> Tensor:
    return beta * (s.u_w - s.u_l) - s.margin


@pair_formula(
    "sigmoid",
    options={"beta": 0.1},
    smoothing="optional",
    soft_labels=True,
    formula=f"-q ls(z) - (1 - q) ls(-z),  {_MARGIN_TEXT}",
    source="DPO (arXiv 2305.18290); label smoothing: cDPO; per step: Step-DPO (2406.18629), Segment-Supervised PO "
    "(2508.08550)",
    use="the default",
)
def _sigmoid(s: PairScores, beta):
    return logistic(_z(s, beta), s.label)


@pair_formula(
    "hinge",
    options={"beta": 0.1},
    formula=f"max(0, 1 - z),  {_MARGIN_TEXT}",
    source="RSO (arXiv 2309.06657), normalised SLiC (2305.10425)",
    use="pairs that are separated well enough should stop pulling",
)
def _hinge(s: PairScores, beta):
    return torch.relu(1 - _z(s, beta))


@pair_formula(
    "ipo",
    options={"beta": 0.1},
    formula="(u_w / n_w - u_l / n_l - margin / beta - 1 / (2 beta))^2",
    source="IPO (arXiv 2310.12036); per-token means as in TRL, which cites its authors",
    use="few or repeated pairs, where sigmoid overfits; responses of different lengths",
)
def _ipo(s: PairScores, beta):
    return torch.square(s.u_w / s.n_w - s.u_l / s.n_l - s.margin / beta - 1 / (2 * beta))


@pair_formula(
    "simpo",
    options={"beta": 2.0, "simpo_gamma": 0.5},
    reference="forbidden",
    smoothing="optional",
    soft_labels=True,
    per_token_reward=True,
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta (S_w / n_w - S_l / n_l) - simpo_gamma - margin",
    source="SimPO (arXiv 2405.14734); gamma is in units of the reward, as in TRL's CPOTrainer",
    use="no reference model; also TPO-L's pair term (add `nll` on the gold response)",
)
def _simpo(s: PairScores, beta, simpo_gamma):
    return logistic(beta * (s.u_w / s.n_w - s.u_l / s.n_l) - simpo_gamma - s.margin, s.label)


@pair_formula(
    "ipo_sum",
    options={"beta": 0.1},
    formula="(u_w - u_l - margin / beta - 1 / (2 beta))^2",
    source="IPO (arXiv 2310.12036), eq. 17 as printed: sums, not means",
    use="steps of similar length; to reproduce the paper's equation",
)
def _ipo_sum(s: PairScores, beta):
    return torch.square(s.u_w - s.u_l - s.margin / beta - 1 / (2 * beta))


@pair_formula(
    "sigmoid_norm",
    options={"beta": 0.1},
    smoothing="optional",
    soft_labels=True,
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta (u_w / n_w - u_l / n_l) - margin",
    source="length-normalised DPO: Tulu 3 (arXiv 2411.15124), TRL's sigmoid_norm; TRPA's pair term (2504.04524)",
    use="responses of very different lengths, with a reference; beta is then of the order of 1 to 10",
)
def _sigmoid_norm(s: PairScores, beta):
    return logistic(beta * (s.u_w / s.n_w - s.u_l / s.n_l) - s.margin, s.label)


@pair_formula(
    "robust",
    options={"beta": 0.1},
    smoothing="optional",
    formula=f"[-(1 - e) ls(z) + e ls(-z)] / (1 - 2 e),  e = label_smoothing,  {_MARGIN_TEXT}",
    source="Robust DPO (arXiv 2403.00409)",
    use="a known share e of the pairs is the wrong way round: unbiased under it, where smoothing is not",
)
def _robust(s: PairScores, beta):
    z = _z(s, beta)
    return (-s.label * F.logsigmoid(z) + (1 - s.label) * F.logsigmoid(-z)) / (2 * s.label - 1)


@pair_formula(
    "exo_pair",
    options={"beta": 0.1},
    smoothing="required",
    soft_labels=True,
    formula=f"sig(z) [ls(z) - log q] + sig(-z) [ls(-z) - log(1 - q)],  q in [1e-6, 1 - 1e-6],  {_MARGIN_TEXT}",
    source="EXO (arXiv 2402.00856), eq. 16; its authors recommend label_smoothing=1e-3",
    use="mode seeking (reverse KL to the preference distribution) instead of DPO's mean seeking",
)
def _exo_pair(s: PairScores, beta):
    z = _z(s, beta)
    q = torch.clamp(s.label, _EPSILON, 1 - _EPSILON)
    return torch.sigmoid(z) * (F.logsigmoid(z) - torch.log(q)) + torch.sigmoid(-z) * (
        F.logsigmoid(-z) - torch.log1p(-q)
    )


@pair_formula(
    "discopop",
    options={"beta": 0.1, "discopop_tau": 0.05},
    limits={"discopop_tau": Limit(lambda v: 0 < v <= 1, "a number in (0, 1]")},
    formula=f"-(1 - sig(z / tau)) ls(z) + e^(ls(z / tau) - z),  tau = discopop_tau,  {_MARGIN_TEXT}",
    source="DiscoPOP (arXiv 2406.08414), eq. 5; the product sig(z / tau) e^-z in one exponent, which the product as "
    "printed overflows in float32 below z = -89",
    use="an empirically found blend of logistic and exponential loss",
)
def _discopop(s: PairScores, beta, discopop_tau):
    z = _z(s, beta)
    scaled = z / discopop_tau
    return -torch.sigmoid(-scaled) * F.logsigmoid(z) + torch.exp(F.logsigmoid(scaled) - z)


@pair_formula(
    "sigmoid_forward_kl",
    options={"beta": 0.1},
    reference="required",
    smoothing="optional",
    soft_labels=True,
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta (e^-u_l - e^-u_w) - margin,  exponents at most 80",
    source="f-DPO (arXiv 2309.16240), forward KL; TRL's f_divergence_type='forward_kl'",
    use="mass covering: stay close to everything the reference does",
)
def _sigmoid_forward_kl(s: PairScores, beta):
    return logistic(beta * (bounded_exp(-s.u_l) - bounded_exp(-s.u_w)) - s.margin, s.label)


@pair_formula(
    "sigmoid_js_divergence",
    options={"beta": 0.1},
    reference="required",
    smoothing="optional",
    soft_labels=True,
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta (ls(u_w) - ls(u_l)) - margin",
    source="f-DPO (arXiv 2309.16240), Jensen-Shannon; TRL's f_divergence_type='js_divergence'",
    use="between reverse and forward KL: keeps more diversity than sigmoid",
)
def _sigmoid_js_divergence(s: PairScores, beta):
    return logistic(beta * (F.logsigmoid(s.u_w) - F.logsigmoid(s.u_l)) - s.margin, s.label)


@pair_formula(
    "sigmoid_alpha_divergence",
    options={"beta": 0.1, "f_alpha_divergence_coef": 0.5},
    reference="required",
    smoothing="optional",
    soft_labels=True,
    limits={
        "f_alpha_divergence_coef": Limit(
            lambda v: abs(v - 1) >= 1e-6, "a number other than 1 (whose limit is loss_type 'sigmoid')"
        )
    },
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta (e^((a - 1) u_w) - e^((a - 1) u_l)) / (a - 1) - margin,  "
    "a = f_alpha_divergence_coef,  exponents at most 80",
    source="f-DPO (arXiv 2309.16240), alpha divergence; TRL's f_divergence_type='alpha_divergence'",
    use="a dial between reverse (a -> 1) and forward KL (a -> 0)",
)
def _sigmoid_alpha_divergence(s: PairScores, beta, f_alpha_divergence_coef):
    k = f_alpha_divergence_coef - 1
    return logistic(beta * ((bounded_exp(k * s.u_w) - bounded_exp(k * s.u_l)) / k) - s.margin, s.label)


@pair_formula(
    "flex_dpo",
    options={"beta": 0.1, "beta_rejected": 0.05},
    smoothing="optional",
    soft_labels=True,
    limits={"beta_rejected": ABOVE_ZERO},
    formula="-q ls(z) - (1 - q) ls(-z),  z = beta u_w - beta_rejected u_l - margin",
    source="Flex-DPO of the 3D-properties study (arXiv 2406.07327); its SFT terms: mix in `nll` and `nll_rejected`",
    use="the rejected response's likelihood falls too fast: give it a smaller beta",
)
def _flex_dpo(s: PairScores, beta, beta_rejected):
    return logistic(beta * s.u_w - beta_rejected * s.u_l - s.margin, s.label)


@pair_formula(
    "slic",
    options={"beta": 1.0, "slic_delta": 1.0},
    reference="forbidden",
    limits={"slic_delta": NOT_NEGATIVE},
    formula="max(0, slic_delta - beta (S_w - S_l) + margin)",
    source="SLiC-HF (arXiv 2305.10425), rank calibration; its regulariser: mix in `nll`",
    use="no reference model, and a margin in nats",
)
def _slic(s: PairScores, beta, slic_delta):
    return torch.relu(slic_delta - (beta * (s.u_w - s.u_l) - s.margin))
