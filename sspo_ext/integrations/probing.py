# SPDX-License-Identifier: Apache-2.0
"""The values that adapters need: before each step of a rollout, by the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..signals.probing.probe import probe_step_values
from ..signals.values import StepBatch, StepValues


def values_before_steps(model, batch: StepBatch, probe: Any, answers: Sequence[Any], **options: Any) -> StepValues:
    """`probe_step_values` for `step_gae`: V_0, ..., V_{K-1}, and 0 for V_K, which nothing needs to be asked for.

    Args:
        model: the policy.
        batch: prompts and steps.
        probe: as in `probe_step_values`.
        answers: as in `probe_step_values`.
        **options: further options of `probe_step_values`.

    Returns:
        StepValues of the batch.
    """
    asked = StepBatch(batch.prompt_ids, [steps[:-1] for steps in batch.step_ids])
    values = probe_step_values(model, asked, probe, answers, **options)
    lists = [[*v, 0.0] if steps else v for v, steps in zip(values.to_lists(), batch.step_ids, strict=True)]
    return StepValues.from_lists(lists, device=values.values.device)
