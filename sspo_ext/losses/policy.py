# SPDX-License-Identifier: Apache-2.0
"""The public policy losses, from logits and from hidden states: arguments in, loss out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import backends
from .._checks import check_float
from ..backends.addresses import accumulator
from ..formulas.policy import POLICY_FORMULAS
from ..layout.steps import StepLayout
from ..objective.policy import PolicyProblem
from ..objective.policy_arguments import PolicyOptions, policy_problem, without_idle_rows
from ..objective.sums import StepLogps, step_sums
from ..routes.linear import settings as linear
from ..routes.linear.policy import policy as linear_policy
from ..routes.logits.policy import policy as logits_policy
from ..routes.logits.prepare import layout_of, prepare


@dataclass(frozen=True, eq=False)
class StepPolicyOutput:
    """What a policy loss returns. `loss` carries the gradient; everything else is detached.

    Examples:
        >>> out = step_policy_loss(logits, layout, advantages)
        >>> mean_advantage = out.metrics["advantages/mean"]
    """

    loss: Tensor  # () float32 (float64 for float64 inputs)
    tokens: Tensor  # (N,) log-prob of each scored token, in row order; NaN where skip_zero_advantages left it out
    layout: StepLayout = field(repr=False)
    problem: PolicyProblem = field(repr=False)
    entropy: Tensor | None = field(repr=False)  # (N,), with entropy_coef
    _metrics: dict[str, Tensor] = field(repr=False, default_factory=dict)
    _made: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def step_logps(self) -> Tensor:
        """(S,) step log-probs S_k, made when asked for."""
        if "step_logps" not in self._made:
            self._made["step_logps"] = step_sums(self.tokens, self.layout, self.problem.backend)
        return self._made["step_logps"]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-dim tensors on the device, made when asked for, without a host sync.

        policy_loss: the loss without KL and entropy; kl (with ref) and entropy (with entropy_coef): means over tokens;
        ratio/mean (with old); advantages/mean (times importance weights); tokens/count; steps/logps (mean S_k),
        steps/tokens (mean length), steps/count, steps/empty. Ppo also has clip_ratio/low_mean, clip_ratio/high_mean
        and clip_ratio/region_mean (TRL's names), the shares of tokens whose gradient the clip has removed. Tokens that
        prob_threshold leaves out do not count. With skip_zero_advantages there is tokens/skipped if there are any, and
        kl, ratio/mean and steps/logps are means over the others; what else there is needs no log-probs of skipped
        tokens.
        """
        if self._metrics:
            return self._metrics
        p, counts = self.problem, self.layout.counts
        counted, tokens_of, steps_of = p.scale != 0, self.tokens, counts > 0
        measured, measured_steps, made = counted, steps_of, {}
        if p.skipped is not None:
            measured, made["tokens/skipped"] = counted & ~p.skipped, p.skipped.sum()
            per_step = torch.zeros_like(counts).index_add(0, self.layout.step_of_row, p.skipped.to(counts.dtype))
            measured_steps = steps_of & (per_step == 0)
            tokens_of = torch.where(p.skipped, 0.0, tokens_of)

        def mean(x: Tensor, over: Tensor) -> Tensor:
            return torch.where(over, x, 0.0).sum() / over.sum().clamp(min=1)

        made["policy_loss"] = p.total(p.surrogate(tokens_of))
        if p.ref is not None:
            made["kl"] = mean(p.kl(self.tokens), measured)
        if self.entropy is not None:
            made["entropy"] = mean(self.entropy, counted)
        if p.old is not None and POLICY_FORMULAS[p.formula].has_ratio:
            ratio = torch.exp(p.log_ratio(self.tokens))
            made["ratio/mean"] = mean(ratio, measured)
            if p.formula == "ppo":
                epsilon, epsilon_high, _ = p.options
                low = mean(((ratio < 1 - epsilon) & (p.advantage < 0)).to(ratio.dtype), counted)
                high = mean(((ratio > 1 + epsilon_high) & (p.advantage > 0)).to(ratio.dtype), counted)
                made["clip_ratio/low_mean"], made["clip_ratio/high_mean"] = low, high
                made["clip_ratio/region_mean"] = low + high
        self._metrics.update(
            made,
            **{
                "advantages/mean": mean(p.advantage, counted),
                "tokens/count": counted.sum(),
                "steps/logps": mean(self.step_logps, measured_steps),
                "steps/tokens": mean(counts, steps_of),
                "steps/count": steps_of.sum(),
                "steps/empty": (~steps_of).sum(),
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
    importance_weights: Tensor | None = None,
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

    The same as this, with one read of the scored rows forward, one read and one write backward, and no stored softmax:

        logp = log_softmax(logits)[row, label]                     # scored tokens only
        A    = advantages[step_of_row]
        r    = exp(logp - old)                                     # or of the mean over the step or sequence
        L_t  = formula(logp, r, A) + kl_coef * kl(logp - ref) - entropy_coef * H_t
        loss = aggregate(token_weights * L)

    Without old log-probs a ratio is pi / stop_grad(pi): its value is 1, its gradient that of the first update.

    Args:
        logits: (B, T, V), or (total, V) for a packed layout. float32, bfloat16, float16 or float64. Copied once if its
            last dimension is not contiguous.
        layout: StepLayout, or unshifted labels (B, T) int beside `step_ids`; build the layout in the collator to avoid
            the copy to the host.
        advantages: (S,) for each step, or for each token (N,) in row order or (B, T) aligned with the labels; detached.
            On the layout's device, or on the host.
        step_ids: (B, T) int, beside plain labels.
        old: log-probs of the policy that sampled the tokens: StepLogps, (N,) or (B, T); detached. For losses with a
            ratio, and for prob_threshold.
        ref: log-probs of the policy that KL is measured from, in the same forms; pass `old` here for a soft trust
            region. With kl_coef = 0 the KL is only measured.
        importance_weights: (N,), (B, T) or (total,), constants not below 0 that multiply each token's formula but not
            its KL and entropy: those of `sspo_ext.losses.rollout_correction` for rollouts of another engine.
        loss_type: 'reinforce', 'ppo' or 'cispo'; `sspo_ext.formulas.policy.POLICY_FORMULAS` has formula, source and
            options.
        importance_sampling_level: whose ratio it is: 'token', 'step' or 'sequence' (GSPO). The ratio of a step or
            sequence moves each of its tokens by that token's own advantage (GSPO-token). Clip ranges of means are far
            smaller than those of tokens: GSPO uses epsilon=3e-4, epsilon_high=4e-4.
        length_normalize: a step's or sequence's ratio is exp of the mean log-ratio; False: of the sum (RLOO in TRL).
        prob_threshold: only tokens whose old probability is below it count (0.9 in SPO, arXiv 2505.23564). Others get
            no gradient and are in no sum; the ratio of a step or sequence is still that of all its tokens.
        kl_coef: weight of the KL term.
        kl_estimator: 'k1', 'k2' or 'k3' (Schulman 2020), differentiated as it stands: on average the gradient of k1 is
            zero, that of k2 is the gradient of KL(pi || ref).
        entropy_coef: weight of a bonus on the entropy of each scored row.
        aggregation: 'token': mean over all tokens of the batch (DAPO in TRL and verl); 'step': mean within a step, then
            over steps; 'sequence': mean within a sequence, then over sequences (GRPO); 'sum'. Formula, KL and entropy
            share it. Steps and sequences in which nothing counts are left out.
        num_items: divides instead of the number of tokens, steps or sequences in this batch (a global number, under
            gradient accumulation or data parallel); with 'sum' any constant (B * max_completion_length: Dr. GRPO). A
            number or a 0-dim tensor. DDP and FSDP average gradients: there, multiply the loss by the world size.
        temperature: as in `step_pref_loss`.
        logit_softcap: as in `step_pref_loss`.
        logit_scale: as in `step_pref_loss`.
        token_weights: as in `step_pref_loss`. They multiply L_t and enter neither ratios nor counts.
        backend: as in `step_pref_loss`.
        inplace_backward: as in `step_pref_loss`.
        **loss_options: options of the loss type: `epsilon`, `epsilon_high`, `delta`.

    Returns:
        StepPolicyOutput; `.loss` is () float32 (float64 for float64 logits). With nothing to score it is 0, with zero
        gradients. Differentiable once: create_graph=True raises.

    Raises:
        TypeError: An argument has a wrong type, or the loss type has no such option. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> with torch.no_grad():
        ...     old = step_logps(model(input_ids).logits, layout)
        >>> out = step_policy_loss(logits, layout, advantages, old=old, loss_type="ppo", epsilon_high=0.28)
        >>> out.loss.backward()
    """
    if isinstance(layout, StepLayout) and step_ids is not None:
        raise TypeError("step_ids: given beside a StepLayout, which holds them already")
    layout = layout_of(logits, layout, None, step_ids, token_weights)
    check_float("logits", logits)
    name = backends.select(backend, logits.device.type, logits.dtype)
    options = PolicyOptions(
        loss_type, importance_sampling_level, length_normalize, prob_threshold, kl_coef, kl_estimator, entropy_coef,
        aggregation, num_items, loss_options,
    )  # fmt: skip
    problem = policy_problem(layout, accumulator(logits.dtype), name, advantages, old, ref, options, importance_weights)
    call = prepare(logits, layout, temperature, logit_softcap, logit_scale, backend, inplace_backward)
    return policy_output(*logits_policy(call, problem), layout, problem)


def policy_output(
    loss: Tensor, tokens: Tensor, entropy: Tensor | None, layout: StepLayout, problem: PolicyProblem
) -> StepPolicyOutput:
    """The public output, from what a route returns."""
    return StepPolicyOutput(loss, tokens.detach(), layout, problem, None if entropy is None else entropy.detach())


def linear_step_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    layout: StepLayout,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    old: StepLogps | Tensor | None = None,
    ref: StepLogps | Tensor | None = None,
    importance_weights: Tensor | None = None,
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
    skip_zero_advantages: bool = False,
    chunk_bytes: int | None = None,
    accum_dtype: torch.dtype | None = None,
    weight_grad: Tensor | None = None,
    tp_group=None,
    batch_invariant: bool = False,
    backend: str = "auto",
    **loss_options: float | None,
) -> StepPolicyOutput:
    """`step_policy_loss(hidden @ weight.T + bias, layout, advantages)`, without ever storing the (N, V) logits.

    Only scored rows enter a GEMM. It costs 1 GEMM (N x H x V) without gradients, 2 with a frozen head and 3 with a
    trained one. Tokens interact only through the ratio of their step or sequence; one that is larger than a chunk costs
    4 (3 with a frozen head and an entropy bonus). In float16, where gradients wait for the loss scale, a trained head
    costs 4 too. `sspo_ext.losses.policy_plan(layout, ...)` prints all this.

    A row is idle if its advantage is 0 and there is neither a KL term nor an entropy bonus; in a step or sequence that
    shares a ratio, if all advantages are 0. Its loss and gradients are 0. Where the host knows it, because `advantages`
    lie there (beside a layout on a GPU too; nothing waits), an idle row costs 1 GEMM, for its log-prob, or none with
    `skip_zero_advantages`. With advantages on a GPU, and under torch.compile, all rows are treated alike.

    Args:
        hidden: (B, T, H), or (total, H) with a packed layout: the model's last hidden states.
        weight: (V, H), the LM head's.
        layout: StepLayout.
        advantages: as in `step_policy_loss`.
        bias: (V,), the LM head's.
        old: as in `step_policy_loss`.
        ref: as in `step_policy_loss`.
        importance_weights: as in `step_policy_loss`. They change nothing about which rows are idle.
        loss_type: as in `step_policy_loss`.
        importance_sampling_level: as in `step_policy_loss`.
        length_normalize: as in `step_policy_loss`.
        prob_threshold: as in `step_policy_loss`.
        kl_coef: as in `step_policy_loss`.
        kl_estimator: as in `step_policy_loss`.
        entropy_coef: as in `step_policy_loss`.
        aggregation: as in `step_policy_loss`.
        num_items: as in `step_policy_loss`.
        temperature: as in `step_pref_loss`; the logits are hidden @ weight.T + bias.
        logit_softcap: as in `step_pref_loss`.
        logit_scale: as in `step_pref_loss`.
        token_weights: as in `step_policy_loss`.
        skip_zero_advantages: leave idle rows out of every GEMM. Their `.tokens` are NaN, and so are the `.step_logps`
            of their steps. A value in them that is not finite goes unseen. What the loss divides by stays the same.
        chunk_bytes: as in `linear_step_pref_loss`.
        accum_dtype: as in `linear_step_pref_loss`.
        weight_grad: as in `linear_step_pref_loss`.
        tp_group: as in `linear_step_pref_loss`.
        batch_invariant: as in `linear_step_pref_loss`.
        backend: as in `step_pref_loss`.
        **loss_options: as in `step_policy_loss`.

    Returns:
        StepPolicyOutput.

    Raises:
        TypeError: An argument has a wrong type, or the loss type has no such option. The message names the argument.
        ValueError: A value, shape or device does not fit.

    Examples:
        >>> hidden = model.model(input_ids).last_hidden_state
        >>> out = linear_step_policy_loss(hidden, model.lm_head.weight, layout, advantages, loss_type="ppo")
        >>> out.loss.backward()
    """
    if token_weights is not None and isinstance(layout, StepLayout):
        layout = layout.with_row_weights(token_weights)
    linear_options = linear.LinearOptions(
        temperature, logit_softcap, logit_scale, chunk_bytes, accum_dtype, weight_grad, tp_group, batch_invariant,
        backend,
    )  # fmt: skip
    call = linear.prepare(hidden, weight, bias, layout, linear_options)
    options = PolicyOptions(
        loss_type, importance_sampling_level, length_normalize, prob_threshold, kl_coef, kl_estimator, entropy_coef,
        aggregation, num_items, loss_options,
    )  # fmt: skip
    problem = policy_problem(
        layout, call.acc_dtype, call.settings.backend, advantages, old, ref, options, importance_weights
    )
    problem = without_idle_rows(problem, layout, advantages, importance_sampling_level, skip_zero_advantages)
    return policy_output(*linear_policy(call, problem), layout, problem)
