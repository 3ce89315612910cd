"""step_policy_loss: validates, documents and chooses; the formulas are in policy.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import backends
from ._checks import check_choice, check_device, check_float, check_not_negative, check_num_items, check_shape, describe
from .layout import StepLayout
from .logps import StepLogps, layout_of, step_logps
from .policy import KL_ESTIMATORS, LEVELS, POLICY_HEADS, PolicyProblem, Segments, get_policy_head

AGGREGATIONS = ("token", "step", "sequence", "sum")


@dataclass(frozen=True, eq=False)
class StepPolicyOutput:
    """What a policy loss returns. `loss` carries the gradient; everything else is detached."""

    loss: Tensor  # () float32 (float64 for float64 inputs)
    tokens: Tensor  # (N,) log-prob of each scored token, in row order
    step_logps: Tensor  # (S,) step log-probs S_k
    layout: StepLayout = field(repr=False)
    problem: PolicyProblem = field(repr=False)
    entropy: Tensor | None = field(repr=False)  # (N,), with entropy_coef
    _metrics: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors on the device, made when asked for, without a host sync.

        policy_loss: the head's part of the loss; kl (with ref) and entropy (with entropy_coef): means over tokens;
        ratio/mean (with old); clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean (ppo): shares of tokens
        whose gradient the clip has cut off, TRL's names; advantages/mean; tokens/count; steps/logps (mean S_k),
        steps/tokens (mean length), steps/count, steps/empty. Tokens that prob_threshold leaves out do not count.
        """
        if self._metrics:
            return self._metrics
        p, counts = self.problem, self.layout.counts
        counted = p.scale != 0
        tokens, steps = counted.sum(), (counts > 0).sum()

        def mean(x: Tensor) -> Tensor:
            return torch.where(counted, x, 0.0).sum() / tokens.clamp(min=1)

        made = {"policy_loss": p.total(p.surrogate(self.tokens))}
        if p.ref is not None:
            made["kl"] = mean(p.kl(self.tokens))
        if self.entropy is not None:
            made["entropy"] = mean(self.entropy)
        if p.old is not None and POLICY_HEADS[p.head].has_ratio:
            ratio = torch.exp(p.log_ratio(self.tokens))
            made["ratio/mean"] = mean(ratio)
            if p.head == "ppo":
                epsilon, epsilon_high, _ = p.options
                low = mean(((ratio < 1 - epsilon) & (p.advantage < 0)).to(ratio.dtype))
                high = mean(((ratio > 1 + epsilon_high) & (p.advantage > 0)).to(ratio.dtype))
                made["clip_ratio/low_mean"], made["clip_ratio/high_mean"] = low, high
                made["clip_ratio/region_mean"] = low + high
        self._metrics.update(
            made,
            **{
                "advantages/mean": mean(p.advantage),
                "tokens/count": tokens,
                "steps/logps": self.step_logps.sum() / steps.clamp(min=1),
                "steps/tokens": counts.sum() / steps.clamp(min=1),
                "steps/count": steps,
                "steps/empty": counts.numel() - steps,
            },
        )
        return self._metrics


def step_policy_loss(
    logits: Tensor,
    layout: StepLayout | Tensor,
    advantages: Tensor,
    *,
    step_ids: Tensor | None = None,
    old: StepLogps | Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    loss_type: str = "reinforce",
    importance_sampling_level: str = "token",
    length_normalize: bool = True,
    prob_threshold: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    aggregation: str = "token",
    num_items: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weights: Tensor | None = None,
    backend: str = "auto",
    inplace_backward: bool = False,
    **loss_options: float | None,
) -> StepPolicyOutput:
    """Policy-gradient loss of a batch of logits with an advantage for each step, or each token.

    Equal to (but one read of the scored rows forward, one read and one write backward, and no stored softmax)::

        logp = log_softmax(logits)[row, label]                     # scored tokens only
        A    = advantages[step_of_row]
        r    = exp(logp - old)                                     # or of the step's, the sequence's mean
        L_t  = head(logp, r, A) + kl_coef * kl(logp - ref) - entropy_coef * H_t
        loss = aggregate(token_weights * L)

    Without old log-probs a ratio is pi / stop_grad(pi): 1, with the gradient of the first update.

    Args:
        logits: (B, T, V), or (total, V) for a packed layout. float32, bfloat16, float16 or float64. Copied once if its
            last dimension is not contiguous.
        layout: StepLayout, or unshifted labels (B, T) beside `step_ids` (B, T); build the layout in the collator to
            avoid the copy to the host.
        advantages: (S,) for each step, or for each token (N,) in row order or (B, T) aligned with the labels; detached.
        old: log-probs of the policy that sampled the tokens: StepLogps, (N,) or (B, T); detached. For losses with a
            ratio, and for prob_threshold.
        ref: log-probs of the policy that KL is measured from, in the same forms (`old`'s for a soft trust region).
            With kl_coef = 0 it is only measured.
        loss_type: 'reinforce', 'ppo' or 'cispo'; see `sspo_ext.policy.POLICY_HEADS` for formula, source and options.
        importance_sampling_level: whose ratio it is: 'token', 'step' or 'sequence' (GSPO). A step's or sequence's
            moves each of its tokens by that token's own advantage (GSPO-token). Clip ranges of means are far smaller
            than of tokens: GSPO uses epsilon=3e-4, epsilon_high=4e-4.
        length_normalize: a step's or sequence's ratio is exp of the mean log-ratio; False: of the sum (RLOO in TRL).
        prob_threshold: only tokens whose old probability is below it count (0.9 in SPO, arXiv 2505.23564).
        kl_coef, kl_estimator: KL term, 'k1', 'k2' or 'k3'; differentiated as it stands, so that k1's gradient is zero
            on average, and k2's that of KL(pi || ref).
        entropy_coef: bonus on the entropy of each scored row.
        aggregation: 'token': mean over all tokens of the batch (DAPO in TRL and verl); 'step': mean within a step, then
            over steps; 'sequence': mean within a sequence, then over sequences (GRPO); 'sum'. Steps and sequences in
            which nothing counts are left out. Head, KL and entropy share it.
        num_items: divides instead of the number of tokens, steps or sequences in this batch (a global one, under
            gradient accumulation or data parallel); with 'sum' any constant (B * max_completion_length: Dr. GRPO). A
            number or a 0-dim tensor. DDP and FSDP average gradients: there, multiply the loss by the world size.
        temperature, logit_softcap, logit_scale, token_weights, backend, inplace_backward: as in `step_pref_loss`. Token
            weights multiply L_t; they enter neither ratios nor counts.
        **loss_options: options of the loss type (`epsilon`, `epsilon_high`, `delta`). One that it does not have raises
            TypeError.

    Returns:
        StepPolicyOutput; `.loss` is float32 (float64 for float64 logits). With nothing to score it is 0, with zero
        gradients. Differentiable once: create_graph=True raises.

    Example::

        >>> with torch.no_grad():
        ...     old = step_logps(model(ids).logits, layout)
        >>> out = step_policy_loss(model(ids).logits, layout, advantages, old=old, loss_type="ppo", epsilon_high=0.28)
        >>> out.loss.backward()
    """
    if isinstance(layout, StepLayout) and step_ids is not None:
        raise TypeError("step_ids: given beside a StepLayout, which holds them already")
    labels = None if isinstance(layout, StepLayout) else layout
    layout = layout_of(logits, layout if labels is None else None, labels, step_ids, token_weights)
    check_float("logits", logits)
    name = backends.select(backend, logits.device.type, logits.dtype)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    problem = policy_problem(
        layout, dtype, name, advantages, old, ref, loss_type, importance_sampling_level, length_normalize,
        prob_threshold, kl_coef, kl_estimator, entropy_coef, aggregation, num_items, loss_options,
    )  # fmt: skip
    scored = step_logps(
        logits, layout, entropy=entropy_coef != 0, temperature=temperature, logit_softcap=logit_softcap,
        logit_scale=logit_scale, backend=backend, inplace_backward=inplace_backward,
    )  # fmt: skip
    return policy_output(scored, layout, problem)


def policy_output(scored: StepLogps, layout: StepLayout, problem: PolicyProblem) -> StepPolicyOutput:
    """Loss on differentiable log-probs."""
    entropy = None if scored.entropy is None else scored.entropy.detach()
    loss = problem.loss(scored.tokens, scored.entropy)
    return StepPolicyOutput(loss, scored.tokens.detach(), scored.sums.detach(), layout, problem, entropy)


def policy_problem(
    layout: StepLayout, dtype: torch.dtype, backend: str, advantages, old, ref, loss_type, level, length_normalize,
    prob_threshold, kl_coef, kl_estimator, entropy_coef, aggregation, num_items, loss_options,
) -> PolicyProblem:  # fmt: skip
    """Validated arguments of one policy loss, shared by the routes."""
    head = get_policy_head(loss_type)
    options = head.check_options(loss_options)
    check_choice("importance_sampling_level", level, LEVELS)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("kl_estimator", kl_estimator, tuple(KL_ESTIMATORS))
    check_not_negative("kl_coef", kl_coef)
    check_not_negative("entropy_coef", entropy_coef)
    if not isinstance(length_normalize, bool):
        raise TypeError(f"length_normalize: expected True or False, got {describe(length_normalize)}")
    if not head.has_ratio and level != "token":
        raise ValueError(f"importance_sampling_level: loss_type {loss_type!r} has no ratio, got {level!r}")
    if not length_normalize and level == "token":
        raise ValueError("length_normalize: expected True where each token has its own ratio, got False")
    if not head.has_ratio and prob_threshold is None and old is not None:
        raise ValueError(f"old: loss_type {loss_type!r} has no ratio and needs none without prob_threshold")
    if kl_coef and ref is None:
        raise ValueError(f"ref: expected log-probs for the KL term (kl_coef={kl_coef!r}), got None")
    old, ref = (
        None if value is None else _token_values(name, value, layout, dtype)
        for name, value in (("old", old), ("ref", ref))
    )
    counts = None
    if prob_threshold is not None:
        if isinstance(prob_threshold, bool) or not isinstance(prob_threshold, (int, float)):
            raise TypeError(f"prob_threshold: expected a number, got {describe(prob_threshold)}")
        if not 0 < prob_threshold <= 1:
            raise ValueError(f"prob_threshold: expected a number in (0, 1], got {prob_threshold!r}")
        if old is None:
            raise ValueError("old: expected log-probs for prob_threshold, got None")
        counts = torch.exp(old) < prob_threshold
    scale, norm = _scale(layout, counts, aggregation, num_items, dtype)
    return PolicyProblem(
        head=head.name,
        options=options,
        kl_estimator=kl_estimator,
        kl_coef=float(kl_coef),
        entropy_coef=float(entropy_coef),
        length_normalize=length_normalize,
        advantage=_token_values("advantages", advantages, layout, dtype, steps=True),
        old=old if head.has_ratio else None,
        ref=ref,
        scale=scale,
        norm=norm,
        segments=None if level == "token" else segments_of(layout, level),
        step_offsets=layout.step_offsets,
        backend=backend,
    )


def segments_of(layout: StepLayout, level: str) -> Segments:
    """The layout's steps, or its sequences, as runs of rows."""
    if level == "step":
        return Segments(layout.step_offsets, layout.step_of_row, layout.host_step_offsets)

    def first_steps(sequence: Tensor) -> Tensor:
        every = torch.arange(layout.num_sequences + 1, dtype=sequence.dtype, device=sequence.device)
        return torch.searchsorted(sequence, every)

    return Segments(
        layout.step_offsets[first_steps(layout.step_sequence)],
        layout.step_sequence.long()[layout.step_of_row],
        layout.host_step_offsets[first_steps(layout.host_step_sequence)],
    )


def _scale(
    layout: StepLayout, counts: Tensor | None, aggregation: str, num_items: float | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(N,) weight of each token within what is averaged first, and () one over the number of what is averaged last."""
    device = layout.device
    scale = torch.ones(layout.num_rows, dtype=dtype, device=device)
    if layout.weights is not None:
        scale = layout.weights.to(dtype)
    ones = torch.ones_like(layout.step_of_row) if counts is None else counts.long()
    if counts is not None:
        scale = torch.where(counts, scale, 0.0)
    items = None
    if aggregation == "token":
        items = ones.sum()
    elif aggregation != "sum":
        of_row, number = layout.step_of_row, layout.num_steps
        if aggregation == "sequence":
            of_row, number = layout.step_sequence.long()[of_row], layout.num_sequences
        # integers: their sum has no order
        tokens = torch.zeros(number, dtype=torch.int64, device=device).index_add(0, of_row, ones)
        scale = scale / tokens.clamp(min=1)[of_row].to(dtype)
        items = (tokens > 0).sum()
    if num_items is not None:
        check_num_items(num_items)
    if isinstance(num_items, Tensor):
        items = num_items.to(device)
    elif num_items is not None:
        items = torch.full((), float(num_items), dtype=torch.float64, device=device)
    if items is None:
        return scale, torch.ones((), dtype=dtype, device=device)
    items = items.to(dtype)
    return scale, torch.where(items > 0, items.reciprocal(), 0.0)


def _token_values(name: str, value, layout: StepLayout, dtype: torch.dtype, steps: bool = False) -> Tensor:
    """(N,) constants in row order from whatever form they came in; with `steps`, also from one value a step."""
    rows, num_steps = layout.num_rows, layout.num_steps
    if isinstance(value, StepLogps):
        name, value = f"{name}.tokens", value.tokens
    check_float(name, value, ndim=(1, 2))
    check_device(name, value, layout.device, "the layout")
    value = value.detach().to(dtype)
    known = ((rows,), (num_steps,)) if steps else ((rows,),)
    if value.ndim == 2 or (tuple(value.shape) not in known and layout.shape == (1, value.shape[0])):
        check_shape(name, value if value.ndim == 2 else value[None], layout.shape)
        return value.reshape(-1)[layout.rows + 1]
    if steps and rows == num_steps == value.shape[0] and not layout.one_row_per_step:
        raise ValueError(f"{name}: {describe(value)} may be steps' or tokens' here; pass (B, T) values of the tokens")
    if steps and value.shape[0] == num_steps:
        return value[layout.step_of_row]
    if value.shape[0] == rows:
        return value.contiguous()
    forms = f"({num_steps},) a step, " if steps else ""
    raise ValueError(f"{name}: expected {forms}({rows},) rows or {layout.shape} tokens, got {describe(value)}")
