# SPDX-License-Identifier: Apache-2.0
"""The policy losses of token log-probs that an engine has computed already. Their twin for pairs is `pref_loss`."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from .. import backends
from .._checks import check_kind
from ..layout.steps import StepLayout
from ..objective.policy_arguments import PolicyOptions, policy_problem
from ..objective.sums import StepLogps
from ..objective.values import token_values
from ..routes.shared import refuse_double_backward
from .policy import StepPolicyOutput, policy_output


def policy_loss(
    logps: StepLogps | Tensor,
    layout: StepLayout,
    advantages: Tensor,
    *,
    old: StepLogps | Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    loss_type: str = "reinforce",
    importance_sampling_level: str = "token",
    length_normalize: bool = True,
    prob_threshold: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    aggregation: str = "token",
    num_items: float | Tensor | None = None,
    token_weights: Tensor | None = None,
    backend: str = "auto",
    **loss_options: float | None,
) -> StepPolicyOutput:
    """`step_policy_loss` from token log-probs of a trainer's own forward; differentiable in them.

    Options of the logits (temperature, softcap, scale) belong to whoever made the log-probs.

    Args:
        logps: StepLogps, or log-probs of the tokens: (B, T) aligned with the layout's tokens, (total,) of a packed
            layout, or (N,) in row order. What stands at unscored tokens is not read, and gets a gradient of zero.
        layout: StepLayout; `StepLayout.from_response(mask, step_ids)` where there are no labels.
        advantages: (S,) for each step, or for each token in the forms of `logps`; detached.
        old: as in `step_policy_loss`.
        ref: as in `step_policy_loss`.
        importance_weights: as in `step_policy_loss`.
        entropy: of each token's distribution, in the forms of `logps`, for `entropy_coef`; default: a StepLogps' own.
        loss_type: as in `step_policy_loss`.
        importance_sampling_level: as in `step_policy_loss`.
        length_normalize: as in `step_policy_loss`.
        prob_threshold: as in `step_policy_loss`.
        kl_coef: as in `step_policy_loss`.
        kl_estimator: as in `step_policy_loss`.
        entropy_coef: as in `step_policy_loss`.
        aggregation: as in `step_policy_loss`.
        num_items: as in `step_policy_loss`.
        token_weights: (N,), (total,) or (B, T), constants that multiply L_t, KL and entropy too. They enter neither
            ratios nor counts, and may be 0. They replace the layout's own.
        backend: 'auto', 'cpu', 'triton', 'cuda' or 'reference'.
        **loss_options: as in `step_policy_loss`.

    Returns:
        StepPolicyOutput; `.loss` is () float32 (float64 for float64 log-probs). With nothing to score it is 0, with
        zero gradients. Differentiable once, except with backend='reference'.

    Raises:
        TypeError: An argument has a wrong type, or the loss type has no such option. The message names the argument.
        ValueError: A value, shape or device does not fit, or an entropy bonus has no entropy.

    Examples:
        >>> layout = StepLayout.from_response(torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 0, 1, -1]]))
        >>> logps = torch.tensor([[-1.0, -2.0, -0.5, 9.0]], requires_grad=True)
        >>> policy_loss(logps, layout, torch.tensor([1.0, -1.0])).loss.backward()
        >>> logps.grad.round(decimals=3)
        tensor([[-0.3330, -0.3330,  0.3330,  0.0000]])
    """
    check_kind("layout", layout, StepLayout, "a StepLayout")
    if not isinstance(logps, StepLogps):
        logps = StepLogps.from_tokens(logps, layout, entropy=entropy)
    elif entropy is not None:
        raise TypeError("entropy: given beside StepLogps, which have their own")
    tokens = logps.tokens
    if entropy_coef and logps.entropy is None:
        raise ValueError(f"entropy: expected it for entropy_coef={entropy_coef!r}, got None")
    if token_weights is not None:
        # not with_row_weights, which refuses a 0: here such a token counts, and moves nothing
        weights = token_values("token_weights", token_weights, layout, tokens.dtype)
        layout = replace(layout, weights=weights)
    name = backends.select(backend, tokens.device.type, tokens.dtype)
    options = PolicyOptions(
        loss_type, importance_sampling_level, length_normalize, prob_threshold, kl_coef, kl_estimator, entropy_coef,
        aggregation, num_items, loss_options,
    )  # fmt: skip
    problem = policy_problem(layout, tokens.dtype, name, advantages, old, ref, options, importance_weights)
    entropies = logps.entropy if entropy_coef else None
    if name != "reference":
        tokens = _once(tokens)
        entropies = None if entropies is None else _once(entropies)
    return policy_output(problem.loss(tokens, entropies), tokens, entropies, layout, problem)


def _once(values: Tensor) -> Tensor:
    return cast(Tensor, _Once.apply(values))


class _Once(torch.autograd.Function):
    """(N,) -> (N,), unchanged. A kernel knows the first derivative alone, and the caller's graph may allow a second."""

    @staticmethod
    def forward(ctx, tokens: Tensor) -> Tensor:
        return tokens.view_as(tokens).contiguous()

    @staticmethod
    def backward(ctx, *upstream):
        refuse_double_backward()
        return upstream[0]
