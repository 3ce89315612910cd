"""The public losses. They validate, document and choose; kernels and formulas live below."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ._checks import check_choice, check_device, check_float, check_not_negative, check_shape, describe
from .backends import reference
from .heads import PairHead, get_pair_head
from .layout import StepLayout
from .logps import LogitsRoute, PairLossSpec, StepLogps, layout_of, prepare
from .pairs import StepPairs


@dataclass(frozen=True, eq=False)
class StepPrefOutput:
    """What a preference loss returns. `loss` carries the gradient; everything else is detached."""

    loss: Tensor  # () float32 (float64 for float64 logits)
    step_logps: Tensor  # (S,) step log-probs S_k
    pair_losses: Tensor  # (P,) unweighted loss of each pair; 0 for a pair with an empty step
    layout: StepLayout = field(repr=False)
    pairs: StepPairs = field(repr=False)
    ref: Tensor | None = field(repr=False)  # (S,) reference step sums
    beta: float = field(repr=False)
    per_token_reward: bool = field(repr=False)
    _metrics: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """(S,): r_k = beta * (S_k - S_k_ref); divided by the step's token count for losses on per-token means
        (simpo)."""
        u = self.step_logps if self.ref is None else self.step_logps - self.ref.to(self.step_logps.dtype)
        return self.beta * (u / self.layout.counts.clamp(min=1) if self.per_token_reward else u)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors on the device, made when asked for, without a host sync. Means over pairs whose steps both have
        tokens:

        rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected (TRL's
        names); over steps: steps/logps (mean S_k of steps with tokens), steps/tokens (mean length), steps/count,
        steps/empty; over pairs: pairs/count, pairs/dropped.
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
    loss_type: str = "sigmoid",
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

    Equal to (but one read of the scored rows forward, one read and one write backward, and no stored softmax)::

        logp = log_softmax(logits)[row, label]                     # scored tokens only
        S = segment_sum(token_weights * logp, steps)               # (S,)
        u = S - S_ref
        loss = (weights * head(u[winner], u[loser])).sum() / (number of pairs, or num_items)

    Called as `step_pref_loss(logits, layout, pairs)` with a StepLayout, or as `step_pref_loss(logits, labels,
    step_ids)` with plain (B, T) tensors whose rows are [chosen_0.., rejected_0..]: step k of a chosen sequence is then
    paired with step k of its rejected one and unmatched steps are left out, unless `pairs=` says otherwise. Plain
    tensors on a GPU cost a copy to the host; build layout and pairs in the collator to avoid it. Under torch.compile
    pass a StepLayout and StepPairs: host work cannot be traced.

    Args:
        logits: (B, T, V), or (total, V) for a packed layout. float32, bfloat16, float16 or float64. Copied once if its
            last dimension is not contiguous.
        layout: StepLayout, or unshifted labels (B, T) int with -100 where nothing is scored (also by name, `labels=`).
        steps_or_pairs: pairs when `layout` is a StepLayout; step_ids (B, T) when it is labels (also `step_ids=`).
        pairs: StepPairs or (P, 2) int indices (winner step, loser step). Default: pair by index.
        ref: the reference's StepLogps, step sums (S,), or token log-probs as (N,) rows or (B, T) aligned with the
            labels; detached. None is reference-free.
        loss_type: 'sigmoid', 'hinge', 'ipo' or 'simpo'; see `sspo_ext.heads` for formula and source.
        beta: reward scale; default is the loss type's (0.1; 2.0 for simpo).
        label_smoothing: probability in [0, 0.5) that a pair's order is wrong; for losses that have it.
        soft_labels: (P,) in [0, 1], the probability that the winner is better; instead of label_smoothing.
        weights: (P,) multiply the pairs' losses (the mean still divides by their number).
        margins: (P,), in units of the reward.
        temperature, logit_softcap, logit_scale: the distribution is softmax(cap(logit_scale * logits) / temperature).
        token_weights: (B, T), or (N,) in row order with a StepLayout; constants. Zeros belong to the layout's
            construction.
        reduction: 'mean' over pairs whose steps both have tokens, or 'sum'.
        num_items: divides the sum instead (a global number of pairs, under gradient accumulation or data parallel); a
            number or a 0-dim tensor.
        backend: 'auto', 'cpu', 'triton', 'cuda' or 'reference'.
        inplace_backward: write the gradient over the logits.
        **loss_options: further options of the loss type (`simpo_gamma`). One that it does not have raises TypeError.

    Returns:
        StepPrefOutput; `.loss` is float32 (float64 for float64 logits). With nothing to score it is 0, with zero
        gradients.

    Example::

        >>> out = step_pref_loss(model(input_ids).logits, labels, step_ids, ref=ref_step_sums, beta=0.1)
        >>> out.loss.backward()
    """
    head = get_pair_head(loss_type)
    if steps_or_pairs is not None:
        name, twice = ("pairs", pairs) if isinstance(layout, StepLayout) else ("step_ids", step_ids)
        if twice is not None:
            raise TypeError(f"{name}: given twice, by position and by name")
        pairs, step_ids = (steps_or_pairs, step_ids) if name == "pairs" else (pairs, steps_or_pairs)
    layout = layout_of(logits, layout, labels, step_ids, token_weights)
    logits, (a, c), name = prepare(logits, layout, temperature, logit_softcap, logit_scale, backend, inplace_backward)
    pairs = resolve_pairs(layout, pairs, weights, margins, soft_labels)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    spec = pair_loss_spec(head, layout, pairs, dtype, ref, beta, label_smoothing, reduction, num_items, loss_options)
    if name == "reference":
        tokens = reference.token_logps(logits, layout.rows, layout.labels, a, c)
        loss, sums, pair_losses = reference_loss(tokens, layout, spec)
    else:
        loss, sums, _, pair_losses = LogitsRoute.apply(logits, layout, spec, a, c, name, inplace_backward)
    return StepPrefOutput(
        loss, sums.detach(), pair_losses.detach(), layout, pairs, spec.ref, spec.options[0], head.per_token_reward
    )


class StepPrefLoss(nn.Module):
    """`step_pref_loss` with its options bound, for those who want a module.

    Example::

        >>> criterion = StepPrefLoss(loss_type="ipo", beta=0.2)
        >>> criterion(logits, layout, pairs, ref=ref).loss.backward()
    """

    def __init__(self, loss_type: str = "sigmoid", beta: float | None = None, **options):
        super().__init__()
        common = inspect.signature(step_pref_loss).parameters
        head = get_pair_head(loss_type)
        head.check_options(
            head.options["beta"] if beta is None else beta, {k: v for k, v in options.items() if k not in common}
        )
        self.options = {"loss_type": loss_type, "beta": beta, **options}

    def forward(self, logits: Tensor, layout: StepLayout | Tensor, steps_or_pairs=None, **kwargs) -> StepPrefOutput:
        return step_pref_loss(logits, layout, steps_or_pairs, **{**self.options, **kwargs})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)


def resolve_pairs(layout: StepLayout, pairs, weights, margins, soft_labels) -> StepPairs:
    """StepPairs from whatever was given; per-pair options given beside a StepPairs replace its own."""
    per_pair = {"weights": weights, "margins": margins, "soft_labels": soft_labels}
    if pairs is None:
        pairs = layout.pair_by_index()
    elif not isinstance(pairs, StepPairs):
        pairs = StepPairs.from_index(layout, pairs)
    if pairs.num_steps != layout.num_steps:
        raise ValueError(
            f"pairs: expected pairs of the layout's {layout.num_steps} steps, got pairs made for {pairs.num_steps}"
        )
    if not torch.compiler.is_compiling() and not torch.equal(pairs.host_step_offsets, layout.host_step_offsets):
        raise ValueError("pairs: expected pairs made for this layout, got pairs of one whose steps have other lengths")
    if pairs.index.device != layout.device:
        raise ValueError(f"pairs: expected them on {layout.device} (pairs.to(...)), got {pairs.index.device}")
    return pairs.with_values(**per_pair) if any(v is not None for v in per_pair.values()) else pairs


def pair_loss_spec(
    head: PairHead, layout: StepLayout, pairs: StepPairs, dtype: torch.dtype, ref, beta, label_smoothing, reduction,
    num_items, loss_options,
) -> PairLossSpec:  # fmt: skip
    """Validated arguments of one pair loss, shared by the routes."""
    beta = head.options["beta"] if beta is None else beta
    options = head.check_options(beta, loss_options)
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: expected a number, got {describe(label_smoothing)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing!r}")
    if not head.soft_labels and (label_smoothing or pairs.soft_labels is not None):
        name = "label_smoothing" if label_smoothing else "soft_labels"
        raise ValueError(f"{name}: loss_type {head.name!r} does not have it")
    if label_smoothing and pairs.soft_labels is not None:
        raise ValueError("label_smoothing: expected 0 when soft_labels are given, since they replace it")
    if ref is not None and head.reference == "forbidden":
        raise ValueError(f"ref: loss_type {head.name!r} is reference-free, got {describe(ref)}")
    return PairLossSpec(
        pairs=pairs,
        head=head.name,
        options=tuple(options),
        label=1.0 - label_smoothing,
        scale=_scale(pairs, reduction, num_items, dtype),
        ref=_reference_sums(ref, layout),
    )


def _scale(pairs: StepPairs, reduction: str, num_items: float | Tensor | None, dtype: torch.dtype) -> Tensor:
    """(): what the sum over pairs is multiplied by; 0 when there is nothing to divide by."""
    check_choice("reduction", reduction, ("mean", "sum"))
    device = pairs.index.device
    if isinstance(num_items, Tensor):
        check_shape("num_items", num_items, ())
        items = num_items.to(device, dtype)
        return torch.where(items > 0, items.reciprocal(), torch.zeros_like(items))
    if num_items is not None:
        check_not_negative("num_items", num_items)
        return torch.full((), 1.0 / num_items if num_items else 0.0, dtype=dtype, device=device)
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=device)
    if dtype == torch.float32:
        return pairs.mean_scale
    return torch.full((), 1.0 / max(pairs.num_valid, 1), dtype=dtype, device=device)


def _reference_sums(ref: StepLogps | Tensor | None, layout: StepLayout) -> Tensor | None:
    """(S,) step sums of the reference, detached."""
    if ref is None:
        return None
    if isinstance(ref, StepLogps):
        # from the tokens, so that the reference is weighted as this loss is
        check_shape("ref.tokens", ref.tokens, (layout.num_rows,))
        return _sum_rows(ref.tokens.detach().to(layout.device), layout)
    check_float("ref", ref)
    check_device("ref", ref, layout.device, "the layout")
    ref, (rows, steps) = ref.detach(), (layout.num_rows, layout.num_steps)
    if ref.ndim == 2 or (ref.ndim == 1 and layout.shape == (1, ref.shape[0]) and ref.shape[0] not in (rows, steps)):
        check_shape("ref", ref if ref.ndim == 2 else ref[None], layout.shape)
        return _sum_rows(ref.reshape(-1)[layout.rows + 1], layout)
    if ref.shape == (rows,) == (steps,) and (layout.weights is not None or not layout.one_row_per_step):
        raise ValueError(
            f"ref: {describe(ref)} may be step sums or token log-probs here; pass a StepLogps or (B, T) token log-probs"
        )
    if ref.shape == (steps,):
        return ref
    if ref.shape == (rows,):
        return _sum_rows(ref, layout)
    raise ValueError(
        f"ref: expected step sums ({steps},), token log-probs ({rows},) or {layout.shape}, or a StepLogps, "
        f"got {describe(ref)}"
    )


def _sum_rows(tokens: Tensor, layout: StepLayout) -> Tensor:
    return reference.step_sums(
        tokens.float() if tokens.dtype != torch.float64 else tokens,
        layout.weights,
        layout.step_of_row,
        layout.num_steps,
    )


def reference_loss(tokens: Tensor, layout: StepLayout, spec: PairLossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, sums, pair losses) from token log-probs, by autograd on plain torch."""
    sums = reference.step_sums(tokens, layout.weights, layout.step_of_row, layout.num_steps)
    pairs = spec.pairs
    losses = reference.pair_losses(
        sums,
        layout.counts,
        spec.ref,
        pairs.index,
        pairs.margins,
        pairs.soft_labels,
        spec.head,
        list(spec.options),
        spec.label,
    )
    weighted = losses if pairs.weights is None else losses * pairs.weights.to(losses.dtype)
    return weighted.sum() * spec.scale.to(losses.dtype), sums, losses
