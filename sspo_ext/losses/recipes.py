# SPDX-License-Identifier: Apache-2.0
"""Methods that need no code of their own, and methods that are absent, each with a line for the catalogue."""

from __future__ import annotations

RECIPES: list[tuple[str, str, str, str]] = [  # name, how, source, what it needs
    (
        "Step-DPO",
        '`loss_type="sigmoid"`, the shared prefix unscored, one scored step a sequence, without a final EOS '
        "(beta 0.4 in its example)",
        "arXiv 2406.18629",
        "pairs of steps with a common prefix, reference",
    ),
    (
        "Step-Controlled DPO",
        '`loss_type="sigmoid"`, the prefix unscored, everything after the branching point as one step',
        "arXiv 2407.00782",
        "pairs of solutions with a common prefix, reference",
    ),
    (
        "Segment-supervised PO",
        '`loss_type="sigmoid"`, `layout.pair_by_index()`, and the number of sequence pairs as `num_items=`: a sum over '
        "segments",
        "arXiv 2508.08550",
        "sequence pairs cut into segments, reference",
    ),
    (
        "SVPO, policy part",
        '`loss_type="sigmoid"` on pairs of sibling steps of a search tree; its value head is a model of its own',
        "arXiv 2406.10858; read from a summary",
        "pairs of sibling steps, reference",
    ),
    (
        "LD-DPO",
        '`loss_type="sigmoid"`, layout with `losses.ld_dpo_weights(labels, ld_alpha)`, reference by token',
        "arXiv 2409.06411",
        "sequence pairs, reference by token",
    ),
    (
        "TGDPO",
        '`loss_type="sigmoid"`, layout with `losses.tgdpo_weights(guide, chosen, ...)`, reference by token',
        "arXiv 2506.14574",
        "log-ratios of a frozen preference-trained model, reference by token",
    ),
    (
        "Full-Step-DPO, kappa = 0",
        "`losses.full_step_weights(...)` as the layout's token weights; with kappa: `losses.full_step_dpo_loss`",
        "arXiv 2502.14356",
        "step rewards",
    ),
    (
        "SPO-chain",
        "`step_policy_loss`, layout with `losses.spo_weights(old_logps)`, advantage = difference of segment values",
        "arXiv 2505.23564",
        "Monte Carlo values at segment boundaries, old log-probs",
    ),
    (
        "DAPO, its loss",
        '`step_policy_loss(..., loss_type="ppo", epsilon=0.2, epsilon_high=0.28, aggregation="token", num_items=...)`, '
        "on GRPO's advantages, without KL; `num_items` is the number of the update's tokens. Its paper divides by the "
        "tokens of each prompt's group and averages over prompts; TRL and verl divide by all tokens of a batch, and so "
        "does this. Dynamic sampling and the reward for overlong answers belong to the sampler",
        'arXiv 2503.14476, eq. 8 and section 4.1; TRL\'s `loss_type="dapo"`, which tests/losses/test_parity_policy.py '
        "holds it against; verl's `loss_agg_mode`",
        "advantages, old log-probs",
    ),
    (
        "RTO",
        "`step_policy_loss` with (N,) advantages from its token rewards (clipped log-ratios of a frozen DPO model, "
        "plus the reward at the end)",
        "arXiv 2404.18922",
        "a DPO model, a reward model, advantages",
    ),
    (
        "From r to Q*",
        "`StepPrefOutput.rewards`: beta u_k of a model trained with `sigmoid` is each step's credit",
        "arXiv 2404.12358",
        "reference",
    ),
    (
        "PRIME",
        "`losses.implicit_prm_loss` trains the PRM; its `.rewards` are step rewards for `step_policy_loss`",
        "arXiv 2502.01456",
        "outcomes, reference",
    ),
    (
        "BCO",
        '`loss_type="bco_pair"`, `margins=shift.margins(pairs)` with `shift = losses.RewardMean()`, and '
        "`shift.update(out, group)` after the batch",
        "arXiv 2404.04656",
        "pairs, reference; a running mean, saved with the model",
    ),
    (
        "WPO",
        "any pair loss with `weights=losses.wpo_weights(logps, layout, pairs)`, of log-probs made with `sum_p2=True`",
        "arXiv 2406.11827",
        "`StepLogps.sum_p2`",
    ),
    (
        "CPO, ORPO with TRL's or Liger's token-mean likelihood",
        '`loss_type=["cpo", "sft"], loss_weights=[1, alpha], cpo_alpha=0`; for ORPO only the likelihood term differs, '
        "and only where responses are unequally long",
        "TRL CPOTrainer, Liger chunked losses",
        "pairs, no reference",
    ),
    (
        "3D-properties' regularisers",
        '`loss_type=["flex_dpo", "nll", "nll_rejected"], loss_weights=[1, c_w, c_l], beta=..., beta_rejected=...`',
        "arXiv 2406.07327",
        "pairs; reference for flex_dpo",
    ),
    (
        "RPO (DPO + NLL)",
        '`loss_type=["sigmoid", "nll"], loss_weights=[1, alpha]`; TRL\'s `["sigmoid", "sft"]` averages over tokens',
        "arXiv 2404.19733",
        "pairs, reference",
    ),
    (
        "soft preference labels",
        "`soft_labels=` (P,) instead of label_smoothing, for the losses that take them",
        "cDPO",
        "a probability per pair",
    ),
]

ABSENT: list[tuple[str, str]] = [
    (
        "DVO (arXiv 2502.13723)",
        "its exact loss was not seen; with targets for beta u_k, `direct_advantage_loss` is the squared distance to "
        "them",
    ),
    (
        "TARS (arXiv 2507.21584)",
        "needs perturbed visual tokens and a spectral term on hidden states, which belong to a model; "
        "for text it is a [scheme](schemes.md)",
    ),
    (
        "SRPO (arXiv 2406.01660)",
        "needs forwards conditioned on a revision, and its least-squares form was not seen; with one of ours it is a "
        "[scheme](schemes.md)",
    ),
    (
        "TRL's f-divergences beside other losses than sigmoid",
        "f-DPO defines them for the logistic loss; hinge, ipo, exo and others with them are TRL's combinations",
    ),
]
