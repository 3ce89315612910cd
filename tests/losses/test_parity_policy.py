# SPDX-License-Identifier: Apache-2.0
"""Policy losses against TRL 1.16's own GRPOTrainer._compute_loss and RLOOTrainer._compute_loss, where it is installed.

One step per sequence, whose advantage is the sequence's, is what they compute. Where they differ from us on purpose:
  TRL's entropy bonus is a mean over tokens whatever the loss type; ours is aggregated as the loss is.
  TRL clamps cispo's ratio at epsilon_high itself, as ours; the paper's is 1 + epsilon_high.
  TRL counts sequences without a completion in its means over sequences; ours leaves them out (none is here).
"""

import types
from collections import defaultdict

import pytest
import torch
from helpers.parity import TRL, gap, record

from sspo_ext.layout.steps import StepLayout
from sspo_ext.losses.policy import step_policy_loss
from sspo_ext.signals.credit.baselines import outcome_advantages

F64 = torch.float64
PROMPT, MAX_COMPLETION = 3, 9


def _logp(logits, ids):
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, PROMPT - 1 :]


def rollouts(seed=0, B=6, V=13):
    """Prompts of PROMPT tokens, completions of 1 to MAX_COMPLETION: ids, mask of the completion, layout, logits."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, PROMPT + MAX_COMPLETION), generator=g)
    lengths = torch.randint(1, MAX_COMPLETION + 1, (B, 1), generator=g)
    mask = (torch.arange(MAX_COMPLETION) < lengths).long()
    scored = torch.cat([torch.zeros(B, PROMPT, dtype=torch.bool), mask.bool()], 1)
    layout = StepLayout.from_step_ids(ids.masked_fill(~scored, -100), torch.where(scored, 0, -1))
    logits = torch.randn(*ids.shape, V, generator=g, dtype=F64) * 2
    logp = _logp(logits, ids)
    old, ref = (logp + torch.randn(logp.shape, generator=g, dtype=F64) * s for s in (0.3, 0.4))
    rewards = torch.randn(B, generator=g, dtype=F64)
    return ids, mask, layout, logits, old, ref, outcome_advantages(rewards, "grpo", groups=torch.arange(B) // 3)


def trl():
    module = pytest.importorskip("trl", reason="trl is not installed")
    if not module.__version__.startswith("1.16."):
        pytest.skip(f"trl {module.__version__}: the private oracle is pinned to 1.16")
    return module


def fake_trainer(logits, ids, **settings):
    """What _compute_loss asks of its trainer, with these logits for a model's."""

    def logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, **kw):
        assert torch.equal(input_ids, ids)
        logp = logits[:, :-1].log_softmax(-1)[:, -logits_to_keep:]
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, ids[:, -logits_to_keep:, None]).squeeze(-1), entropy, None

    accelerator = types.SimpleNamespace(
        device=logits.device, gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    defaults = dict(
        model=types.SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, beta=0.0,
        _get_per_token_logps_and_entropies=logps_and_entropies, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2,
        current_gradient_accumulation_steps=1, max_completion_length=MAX_COMPLETION, _entropy_bonus_enabled=False,
        use_adaptive_entropy=False, entropy_coef=0.0, _metrics={"train": defaultdict(list)},
        args=types.SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False,
                                   steps_per_generation=1),
    )  # fmt: skip
    return types.SimpleNamespace(**defaults | settings)


CASES = {
    "grpo": ({}, {"aggregation": "sequence"}),
    "bnpo": ({}, {"aggregation": "token"}),
    "dapo": ({"epsilon_high": 0.28}, {"aggregation": "token", "epsilon_high": 0.28}),
    "dr_grpo": ({}, {"aggregation": "sum", "num_items": 6 * MAX_COMPLETION}),
    "grpo, KL": ({"beta": 0.3}, {"aggregation": "sequence", "kl_coef": 0.3}),
    "dr_grpo, KL": ({"beta": 0.3}, {"aggregation": "sum", "num_items": 6 * MAX_COMPLETION, "kl_coef": 0.3}),
    "grpo, delta": ({"delta": 1.3}, {"aggregation": "sequence", "delta": 1.3}),
    "grpo, sequence": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03},
        {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03, "aggregation": "sequence"},
    ),
    "bnpo, entropy": (
        {"_entropy_bonus_enabled": True, "entropy_coef": 0.2},
        {"aggregation": "token", "entropy_coef": 0.2},
    ),
    "cispo": ({"epsilon_high": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2, "aggregation": "token"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_metrics_equal_trls_grpo(case):
    module = trl()
    theirs, ours = CASES[case]
    options = {"loss_type": "ppo"} | ours
    worst = [0.0, 0.0]
    for seed in range(3):
        ids, mask, layout, logits, old, ref, advantages = rollouts(seed)
        leaf = logits.clone().requires_grad_()
        fake = fake_trainer(leaf, ids, loss_type=case.split(",")[0], **theirs)
        inputs = {
            "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
            "completion_ids": ids[:, PROMPT:], "completion_mask": mask, "advantages": advantages,
            "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        want = module.GRPOTrainer._compute_loss(fake, fake.model, inputs)
        want.backward()

        mine = logits.clone().requires_grad_()
        rows = mask.bool()
        out = step_policy_loss(mine, layout, advantages, old=old[rows], ref=ref[rows], **options)
        out.loss.backward()
        worst = [max(worst[0], gap(out.loss, want)), max(worst[1], gap(mine.grad, leaf.grad))]
        level = options.get("importance_sampling_level", "token")
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl", "entropy"):
            known = fake._metrics["train"].get(name)
            # under a sequence's ratio TRL counts sequences, we count their tokens
            if known and name in out.metrics and not (name.startswith("clip") and level == "sequence"):
                assert float(out.metrics[name]) == pytest.approx(known[0], abs=1e-7), name
    record(options["loss_type"], TRL, *worst, 1e-12, case if options["loss_type"] != case else "")
    if case == "dapo":
        record("DAPO, its loss", TRL, *worst, 1e-12)


def test_loss_and_gradient_equal_trls_rloo():
    module = trl()
    ids, mask, layout, logits, old, _, advantages = rollouts()
    old = 0.02 * old + 0.98 * _logp(logits, ids)  # near enough for products within the clip range
    leaf = logits.clone().requires_grad_()
    fake = fake_trainer(leaf, ids)
    inputs = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": ids[:, PROMPT:], "completion_mask": mask, "advantages": advantages,
        "old_logps": (old * mask).sum(1),
    }  # fmt: skip
    want = module.RLOOTrainer._compute_loss(fake, fake.model, inputs)
    want.backward()
    mine = logits.clone().requires_grad_()
    out = step_policy_loss(
        mine, layout, advantages, old=old[mask.bool()], loss_type="ppo", importance_sampling_level="sequence",
        length_normalize=False, aggregation="sequence",
    )  # fmt: skip
    out.loss.backward()
    record("ppo", TRL, gap(out.loss, want), gap(mine.grad, leaf.grad), 1e-12, "rloo")
