# SPDX-License-Identifier: Apache-2.0
"""Importance weights for rollouts that another policy has drawn than the one whose gradient is taken."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import backends
from .._checks import check_bool, check_choice, check_kind, check_not_negative
from ..formulas.policy import KL_ESTIMATORS, LEVELS, MAX_LOG_RATIO
from ..layout.steps import StepLayout
from ..objective.policy import segments_of
from ..objective.sums import StepLogps, segment_sums
from ..objective.values import token_values

MODES = tuple(f"{level}_{bound}" for level in LEVELS for bound in ("truncate", "mask"))


@dataclass(frozen=True, eq=False)
class RolloutCorrection:
    """What `rollout_correction` returns; constants on the log-probs' device.

    Attributes:
        weights: (N,) one for each scored token, in row order, for `importance_weights` of a policy loss.
        metrics: 0-dim tensors, over tokens whose log-prob is known, under TRL's names where it has them:
            sampling/sampling_logp_difference/mean and /max (absolute); sampling/importance_sampling_ratio/mean and
            /max (of the weights), /clipped (the share of tokens whose weight is truncated or 0); sampling/ratio/mean
            and /max (of the tokens' own ratios); sampling/kl_k1 and sampling/kl_k3, estimates of the KL divergence of
            the trainer's policy from the sampling one, KL(sampling || trainer).
    """

    weights: Tensor
    metrics: dict[str, Tensor] = field(repr=False)


def check_correction(
    mode: str, clip_max: float | None, clip_min: float | None, length_normalize: bool, names: str = ""
) -> None:
    """Raises for a mode that is unknown and for bounds that leave nothing; `names` stands before theirs."""
    check_choice(f"{names}mode", mode, MODES)
    for name, value in (("clip_max", clip_max), ("clip_min", clip_min)):
        if value is not None:
            check_not_negative(names + name, value)
    if clip_max is not None and clip_min is not None and clip_min >= clip_max:
        raise ValueError(f"{names}clip_min: expected less than {names}clip_max={clip_max!r}, got {clip_min!r}")
    if mode.endswith("truncate") and clip_max is None and clip_min is None:
        raise ValueError(f"{names}clip_max: expected a bound for mode {mode!r}, which has no other, got None")
    check_bool(f"{names}length_normalize", length_normalize)
    if length_normalize and mode.startswith("token"):
        raise ValueError(f"{names}length_normalize: expected False where each token has its own ratio, got True")


def rollout_correction(
    old: StepLogps | Tensor,
    sampling: StepLogps | Tensor,
    layout: StepLayout,
    *,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
    length_normalize: bool = False,
) -> RolloutCorrection:
    r"""Importance weights of tokens that an engine has drawn with other probabilities than the trainer's.

    The weight of a token, step or sequence u, which all of its tokens have, is:

        rho_u = exp(sum over the tokens of u of (old - sampling))
        truncate: w_u = min(max(rho_u, clip_min), clip_max)
        mask:     w_u = rho_u if clip_min <= rho_u <= clip_max else 0

    Where no bound acts the expected gradient is exact at its level. With weights of sequences it is that of samples of
    the trainer's own policy. With those of steps it is that of steps drawn from it after prefixes of the engine's, and
    with those of tokens likewise. Finer weights vary less. Masked tokens stay in the number that a loss divides by.

    Args:
        old: log-probs of the trainer's policy as it was when the tokens were drawn: StepLogps, (N,) in row order,
            (B, T) aligned with the layout's tokens, or (total,) of a packed layout. At the temperature of the sampling.
        sampling: log-probs of the same tokens in the distribution that they were drawn from, in the same forms. NaN for
            a token where it is not known: its ratio is 1.
        layout: StepLayout.
        mode: whose ratio it is, and what happens to one out of bounds: 'token_truncate', 'token_mask', 'step_truncate',
            'step_mask', 'sequence_truncate' or 'sequence_mask'.
        clip_max: upper bound of the ratio; None: none.
        clip_min: lower bound of the ratio; None: none.
        length_normalize: whether the ratio of a step or sequence is exp of the mean log-ratio of its tokens and not of
            the sum (the geometric mean). It is for masks: as weights such ratios are not exact.

    Returns:
        RolloutCorrection.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> layout = StepLayout.from_response(torch.ones(1, 3), torch.tensor([[0, 0, 1]]))
        >>> old, sampling = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.5, -1.0, -1.0]])
        >>> rollout_correction(old, sampling, layout, mode="step_truncate").weights.round(decimals=3)
        tensor([1.6490, 1.6490, 1.0000])
    """
    check_kind("layout", layout, StepLayout, "a StepLayout")
    check_correction(mode, clip_max, clip_min, length_normalize)
    level, _, bound = mode.partition("_")
    given = sampling.tokens if isinstance(sampling, StepLogps) else sampling
    dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
    now, drawn = (token_values(n, v, layout, dtype) for n, v in (("old", old), ("sampling", sampling)))
    known = ~drawn.isnan()
    own = torch.where(known, now - drawn, 0.0)
    rho = torch.exp(_of_level(own, layout, level, length_normalize).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    low, high = 0.0 if clip_min is None else clip_min, torch.inf if clip_max is None else clip_max
    outside = (rho < low) | (rho > high)
    weights = rho.clamp(low, high) if bound == "truncate" else torch.where(outside, 0.0, rho)
    return RolloutCorrection(weights, _metrics(own, known, weights, outside))


def _of_level(log_ratio: Tensor, layout: StepLayout, level: str, length_normalize: bool) -> Tensor:
    """(N,): the sum or mean of log-ratios over each token's step or sequence, in a fixed order."""
    if level == "token":
        return log_ratio
    segments = segments_of(layout, level)
    of_row = segments.index(len(log_ratio))
    name = backends.select("auto", log_ratio.device.type, log_ratio.dtype)
    sums = segment_sums(log_ratio, segments.offsets, of_row, name)
    if length_normalize:
        sums = sums / (segments.offsets[1:] - segments.offsets[:-1]).clamp(min=1)
    return sums[of_row]


def _metrics(own: Tensor, known: Tensor, weights: Tensor, outside: Tensor) -> dict[str, Tensor]:
    def mean(values: Tensor) -> Tensor:
        return torch.where(known, values, 0.0).sum() / known.sum().clamp(min=1)

    def largest(values: Tensor) -> Tensor:
        return pad(torch.where(known, values, 0.0), (0, 1)).amax()

    ratio, difference = torch.exp(own.clamp(max=MAX_LOG_RATIO)), own.abs()
    name = "sampling/importance_sampling_ratio"
    return {
        "sampling/sampling_logp_difference/mean": mean(difference),
        "sampling/sampling_logp_difference/max": largest(difference),
        f"{name}/mean": mean(weights),
        f"{name}/max": largest(weights),
        f"{name}/clipped": mean(outside.to(own.dtype)),
        "sampling/ratio/mean": mean(ratio),
        "sampling/ratio/max": largest(ratio),
        **{f"sampling/kl_{k}": mean(KL_ESTIMATORS[k](-own)) for k in ("k1", "k3")},
    }
