# SPDX-License-Identifier: Apache-2.0
"""The public preference losses, from logits, from hidden states and from step log-probs: arguments in, loss out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._checks import check_tensor
from ..formulas.registry import PAIR_FORMULAS
from ..layout.pairs import StepPairs
from ..layout.steps import StepLayout
from ..objective.pair import PairLossSpec, loss_of_sums, mixed_pair_losses
from ..objective.pair_arguments import check_logps, chosen_formulas, pair_loss_spec, resolve_pairs
from ..objective.sums import StepLogps
from ..routes.linear import settings as linear
from ..routes.linear.pref import pref as linear_pref
from ..routes.logits.prepare import layout_of, prepare
from ..routes.logits.route import pref


@dataclass(frozen=True, eq=False)
class StepPrefOutput:
    """What a preference loss returns. `loss` carries the gradient; everything else is detached.

    Examples:
        >>> out = step_pref_loss(logits, layout, pairs, reference_free=True)
        >>> accuracy = out.metrics["rewards/accuracies"]
    """

    loss: Tensor  # () float32 (float64 for float64 logits)
    step_logps: Tensor  # (S,) step log-probs S_k
    pair_losses: Tensor  # (P,) unweighted loss of each pair; 0 for a pair with an empty step
    term_losses: Tensor = field(repr=False)  # (C, P) the same, of each of the C losses of a mixture
    loss_types: tuple[str, ...] = field(repr=False)
    layout: StepLayout = field(repr=False)
    pairs: StepPairs = field(repr=False)
    ref: Tensor | None = field(repr=False)  # (S,) reference step sums, where the (first) loss has a reference
    beta: float = field(repr=False)
    per_token_reward: bool = field(repr=False)
    _metrics: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """(S,): r_k = beta * (S_k - S_k_ref), of the first loss of a mixture.

        Divided by the step's token count for losses whose reward is a token mean (simpo, orpo, asft).
        """
        u = self.step_logps if self.ref is None else self.step_logps - self.ref.to(self.step_logps.dtype)
        return self.beta * (u / self.layout.counts.clamp(min=1) if self.per_token_reward else u)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors on the device, made when asked for, without a host sync.

        Means over pairs whose steps both have tokens: rewards/chosen, rewards/rejected, rewards/margins,
        rewards/accuracies, logps/chosen, logps/rejected (TRL's names). Over steps: steps/logps (mean S_k of steps with
        tokens), steps/tokens (mean length), steps/count, steps/empty. Over pairs: pairs/count, pairs/dropped. A mixture
        also has loss/NAME for each of its losses.
        """
        if self._metrics:
            return self._metrics
        valid, (winner, loser) = self.pairs.valid, self.pairs.index.long().unbind(1)
        num_valid = valid.sum()

        def mean(x: Tensor) -> Tensor:
            return torch.where(valid, x, torch.zeros_like(x)).sum() / num_valid.clamp(min=1)

        rewards, counts = self.rewards, self.layout.counts
        num_steps = (counts > 0).sum()
        r_w, r_l = rewards[winner], rewards[loser]
        self._metrics.update(
            {
                "rewards/chosen": mean(r_w),
                "rewards/rejected": mean(r_l),
                "rewards/margins": mean(r_w - r_l),
                "rewards/accuracies": mean((r_w > r_l).to(rewards.dtype)),
                "logps/chosen": mean(self.step_logps[winner]),
                "logps/rejected": mean(self.step_logps[loser]),
                "steps/logps": self.step_logps.sum() / num_steps.clamp(min=1),
                "steps/tokens": counts.sum() / num_steps.clamp(min=1),
                "steps/count": num_steps,
                "steps/empty": counts.numel() - num_steps,
                "pairs/count": num_valid,
                "pairs/dropped": valid.numel() - num_valid,
            }
        )
        if len(self.loss_types) > 1:
            named = zip(self.loss_types, self.term_losses, strict=True)
            self._metrics.update({f"loss/{name}": mean(losses) for name, losses in named})
        return self._metrics


def step_pref_loss(
    logits: Tensor,
    layout: StepLayout | Tensor | None = None,
    steps_or_pairs: StepPairs | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    step_ids: Tensor | None = None,
    pairs: StepPairs | Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    reference_free: bool = False,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
    inplace_backward: bool = False,
    **loss_options: float,
) -> StepPrefOutput:
    """Step-wise preference loss of a batch of logits, fused forward and backward.

    The same as this, with one read of the scored rows forward, one read and one write backward, and no stored softmax:

        logp = log_softmax(logits)[row, label]                     # scored tokens only
        S = segment_sum(token_weights * logp, steps)               # (S,)
        u = S - S_ref
        loss = (weights * formula(u[winner], u[loser])).sum() / (number of pairs, or num_items)

    Call it as `step_pref_loss(logits, layout, pairs)` with a StepLayout, or as `step_pref_loss(logits, labels,
    step_ids)` with plain (B, T) tensors whose rows are [chosen_0.., rejected_0..]. Without `pairs`, step k of a chosen
    sequence is paired with step k of its rejected one, and steps without a partner are left out. Plain tensors on a GPU
    cost a copy to the host; build layout and pairs in the collator to avoid it. Under torch.compile pass a StepLayout
    and StepPairs, since host work cannot be traced.

    Args:
        logits: (B, T, V), or (total, V) for a packed layout. float32, bfloat16, float16 or float64. Copied once if its
            last dimension is not contiguous.
        layout: StepLayout, or unshifted labels (B, T) int with -100 where nothing is scored.
        steps_or_pairs: pairs if `layout` is a StepLayout, step ids (B, T) if it is labels.
        labels: the labels, by name instead of as `layout`.
        step_ids: the step ids, by name instead of as `steps_or_pairs`.
        pairs: StepPairs or (P, 2) int: winner step, loser step. Default: pair by index.
        ref: the reference's StepLogps, step sums (S,), or token log-probs as (N,) rows or (B, T) aligned with the
            labels; detached. None: no reference, with a warning unless `reference_free` says so.
        reference_free: whether no reference is meant: a reward is then beta * log pi.
        loss_type: a name of docs/losses.md (`sspo_ext.formulas.registry.PAIR_FORMULAS`), or a list of names: a mixture
            over one pass of the logits, in which each loss takes the options, reference and labels that it has.
        loss_weights: the weight of each loss of a list; default 1 each.
        beta: reward scale; default: the loss type's (0.1; 2.0 for simpo).
        label_smoothing: probability in [0, 0.5) that a pair's order is wrong; for losses that have it.
        soft_labels: (P,) in [0, 1], the probability that the winner is better; instead of label_smoothing.
        weights: (P,) multiply the pairs' losses; the mean still divides by the number of pairs.
        margins: (P,), in units of the reward.
        temperature: the distribution is softmax(cap(logit_scale * logits) / temperature).
        logit_softcap: cap(x) = logit_softcap * tanh(x / logit_softcap), as in Gemma; None: no cap.
        logit_scale: factor on the logits, as in Cohere's models.
        token_weights: (B, T), or (N,) in row order with a StepLayout; constants. A StepLayout takes weights of 0 only
            when it is built.
        reduction: 'mean' over pairs whose steps both have tokens, or 'sum'.
        num_items: divides the sum instead of the number of pairs (a global number, under gradient accumulation or data
            parallel); a number or a 0-dim tensor. DDP and FSDP average gradients: there, multiply the loss by the world
            size.
        backend: 'auto', 'cpu', 'triton', 'cuda' or 'reference'.
        inplace_backward: write the gradient over the logits.
        **loss_options: further options of the loss type, `simpo_gamma` for example.

    Returns:
        StepPrefOutput; `.loss` is () float32 (float64 for float64 logits). With nothing to score it is 0, with zero
        gradients.

    Raises:
        TypeError: An argument has a wrong type, or the loss type has no such option. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> out = step_pref_loss(logits, labels, step_ids, beta=0.1, reference_free=True)
        >>> out.loss.backward()
    """
    formulas = chosen_formulas(loss_type, loss_weights)
    if steps_or_pairs is not None and isinstance(layout, StepLayout):
        _check_once("pairs", pairs)
        pairs = steps_or_pairs
    elif steps_or_pairs is not None:
        _check_once("step_ids", step_ids)
        step_ids = check_tensor("step_ids", steps_or_pairs)
    layout = layout_of(logits, layout, labels, step_ids, token_weights)
    call = prepare(logits, layout, temperature, logit_softcap, logit_scale, backend, inplace_backward)
    pairs = resolve_pairs(layout, pairs, weights, margins, soft_labels)
    spec = pair_loss_spec(
        formulas, layout, pairs, call.acc_dtype, ref, beta, label_smoothing, reduction, num_items, loss_options,
        reference_free,
    )  # fmt: skip
    return pref_output(*pref(call, spec), layout, spec)


def _check_once(name: str, by_name: object) -> None:
    if by_name is not None:
        raise TypeError(f"{name}: given twice, by position and by name")


def pref_loss(
    logps: StepLogps,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    ref: StepLogps | Tensor | None = None,
    reference_free: bool = False,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    **loss_options: float,
) -> StepPrefOutput:
    """`step_pref_loss` from step log-probs of either route: a few torch ops on (S,).

    Use it when something else needs the same pass over the logits (WPO's weights, entropy), or when a value depends on
    the log-probs. With a trained head on the linear route it costs one GEMM more than `linear_step_pref_loss`. The
    token weights are those of the layout that made `logps`.

    Args:
        logps: StepLogps of `step_logps` or `linear_step_logps`.
        layout: the StepLayout that made them.
        pairs: StepPairs or (P, 2) int: winner step, loser step. Default: pair by index.
        ref: as in `step_pref_loss`.
        reference_free: as in `step_pref_loss`.
        loss_type: as in `step_pref_loss`.
        loss_weights: as in `step_pref_loss`.
        beta: as in `step_pref_loss`.
        label_smoothing: as in `step_pref_loss`.
        soft_labels: as in `step_pref_loss`.
        weights: as in `step_pref_loss`.
        margins: as in `step_pref_loss`.
        reduction: as in `step_pref_loss`.
        num_items: as in `step_pref_loss`.
        **loss_options: as in `step_pref_loss`.

    Returns:
        StepPrefOutput.

    Raises:
        TypeError: An argument has a wrong type, or the loss type has no such option. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> logps = step_logps(logits, layout, sum_p2=True)
        >>> weights = wpo_weights(logps, layout, pairs)
        >>> pref_loss(logps, layout, pairs, weights=weights, reference_free=True).loss.backward()
    """
    check_logps("logps", logps, layout)
    formulas = chosen_formulas(loss_type, loss_weights)
    pairs = resolve_pairs(layout, pairs, weights, margins, soft_labels)
    spec = pair_loss_spec(
        formulas, layout, pairs, logps.sums.dtype, ref, beta, label_smoothing, reduction, num_items, loss_options,
        reference_free,
    )  # fmt: skip
    loss, losses = loss_of_sums(logps.sums, layout, spec)
    return pref_output(loss, logps.sums, losses, layout, spec)


def pref_output(
    loss: Tensor, sums: Tensor, term_losses: Tensor, layout: StepLayout, spec: PairLossSpec
) -> StepPrefOutput:
    """The public output, from what a route returns."""
    first, losses = spec.terms[0], term_losses.detach()
    return StepPrefOutput(
        loss, sums.detach(), mixed_pair_losses(losses, spec), losses, tuple(t.formula for t in spec.terms), layout,
        spec.pairs, spec.ref if first.ref else None, first.options[0], PAIR_FORMULAS[first.formula].per_token_reward,
    )  # fmt: skip


def linear_step_pref_loss(
    hidden: Tensor,
    weight: Tensor,
    layout: StepLayout,
    pairs: StepPairs | Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    reference_free: bool = False,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    tp_group=None,
    batch_invariant: bool = False,
    backend: str = "auto",
    **loss_options: float,
) -> StepPrefOutput:
    """`step_pref_loss(hidden @ weight.T + bias, layout, pairs)`, without ever storing the (N, V) logits.

    Prompt, padding, ignored and zero-weight tokens cost nothing and get exactly zero gradient. Rows are worked on in
    chunks that fit `chunk_bytes`; extra memory is that budget and the gradients asked for, at any sequence length,
    with a 16-bit head also 4 * V * H bytes for the sum of several chunks (`print(pref_plan(...))` tells).
    GEMMs run in the promoted dtype of hidden and weight, or in autocast's; a weight of another dtype is then copied
    once a call. The same budget gives the same bits.

    Gradients are made in forward. It costs 1 GEMM (N x H x V) without gradients and 2 with a frozen head. A trained
    head costs 3 for each connected set of pairs that fits in a chunk, and 4 for one that does not. In float16 a trained
    head costs 4, and its gradients are made in backward, under the caller's loss scale.
    `sspo_ext.losses.pref_plan(layout, ...)` prints all this.

    Args:
        hidden: (B, T, H), or (total, H) with a packed layout: the model's last hidden states. Copied once if its
            positions are not evenly strided.
        weight: (V, H), the LM head's.
        layout: StepLayout.
        pairs: as in `step_pref_loss`.
        bias: (V,), the LM head's.
        ref: as in `step_pref_loss`.
        reference_free: as in `step_pref_loss`.
        loss_type: as in `step_pref_loss`.
        loss_weights: as in `step_pref_loss`.
        beta: as in `step_pref_loss`.
        label_smoothing: as in `step_pref_loss`.
        soft_labels: as in `step_pref_loss`.
        weights: as in `step_pref_loss`.
        margins: as in `step_pref_loss`.
        temperature: as in `step_pref_loss`; the logits are hidden @ weight.T + bias.
        logit_softcap: as in `step_pref_loss`.
        logit_scale: as in `step_pref_loss`.
        token_weights: as in `step_pref_loss`.
        reduction: as in `step_pref_loss`.
        num_items: as in `step_pref_loss`.
        chunk_bytes: budget of the logits buffer, in bytes, which is kept. By default 128 MiB on CPUs and 512 MiB
            elsewhere, and more where one chunk of all rows takes no more memory than chunks and the float32 sum of
            their gradients, or, on a GPU, where a chain of pairs would otherwise be computed twice.
        accum_dtype: dtype in which the weight's gradient accumulates over chunks: float32 (float64 for float64) by
            default, or the weight's own.
        weight_grad: (V, H) buffer to which backward adds the weight's gradient (`main_grad`); autograd then sees none.
        tp_group: process group over which the vocabulary is split. Beside a plain `weight`, this rank's rows, the parts
            are equal (Megatron's layout; rows that pad V must carry a bias of -inf). Beside a DTensor sharded over its
            rows it is the group of its mesh. Labels and hidden states must be equal on all its ranks.
        batch_invariant: give a row's log-prob, and what else is computed from its logits, the same bits alone, in any
            batch and at any `chunk_bytes`: of the same dtypes, device, library and number of threads. Logits are then
            products of tiles of 128 rows on CPUs, of 256 elsewhere, the last filled up; a chunk has one at least.
            Gradients are as they would be otherwise. docs/numerics.md has the price.
        backend: as in `step_pref_loss`.
        **loss_options: as in `step_pref_loss`.

    Returns:
        StepPrefOutput; `.loss` is () float32 (float64 for float64). Differentiable once: create_graph=True raises.

    Raises:
        TypeError: An argument has a wrong type, or the loss type has no such option. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> hidden = model.model(input_ids).last_hidden_state
        >>> out = linear_step_pref_loss(hidden, model.lm_head.weight, layout, pairs, reference_free=True)
        >>> out.loss.backward()
    """
    formulas = chosen_formulas(loss_type, loss_weights)
    if token_weights is not None and isinstance(layout, StepLayout):
        layout = layout.with_row_weights(token_weights)
    options = linear.LinearOptions(
        temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad, tp_group, batch_invariant,
        backend,
    )  # fmt: skip
    call = linear.prepare(hidden, weight, bias, layout, options)
    pairs = resolve_pairs(layout, pairs, weights, margins, soft_labels)
    spec = pair_loss_spec(
        formulas, layout, pairs, call.acc_dtype, ref, beta, label_smoothing, reduction, num_items, loss_options,
        reference_free,
    )  # fmt: skip
    return pref_output(*linear_pref(call, spec), layout, spec)
