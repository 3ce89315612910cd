# SPDX-License-Identifier: Apache-2.0
"""prime-rl: `[trainer.loss] type = "custom"`, `import_path = "sspo_ext.integrations.prime_rl.step_loss"`.

Written against the dataclasses of its documentation of November 2026; no release is on PyPI. The ratio is over the
inference engine's own log-probs, so it corrects for the rollouts by itself, within its clip range.
"""

from __future__ import annotations

from typing import Any

from .steps import policy_loss_at


def step_loss(inputs: Any, level: str = "step", **options: Any) -> Any:
    """PPO's loss of one sequence with the ratio of steps, summed over its tokens.

    Args:
        inputs: prime-rl's LossInputs, (T,) tensors of one sequence; steps are the runs of equal advantages.
        level: whose ratio: "step", "token" or "sequence".
        **options: options of `policy_loss`, by `[trainer.loss.kwargs]`.

    Returns:
        prime-rl's LossOutputs.
    """
    from prime_rl.trainer.rl.loss import LossOutputs  # pyright: ignore[reportMissingImports]

    out = policy_loss_at(
        level, inputs.trainer_logprobs[None], inputs.inference_logprobs[None], inputs.advantages[None],
        inputs.loss_mask[None], aggregation="sum",
        token_weights=None if inputs.loss_weights is None else inputs.loss_weights[None], **options,
    )  # fmt: skip
    metrics = {name: out.metrics[name] for name in ("ratio/mean", "clip_ratio/region_mean")}
    return LossOutputs(loss=out.loss, metrics=metrics)
