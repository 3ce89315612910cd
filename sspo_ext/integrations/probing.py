# SPDX-License-Identifier: Apache-2.0
"""The values that adapters need: before each step of a rollout, by the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..signals.probing.probe import probe_step_values
from ..signals.probing.requests import ProbeRequests, probe_requests, values_from_logprobs
from ..signals.values import StepBatch, StepValues


class LogprobEngine(Protocol):
    """What can be asked for values in place of the policy: `servers.LogprobServer`, or an object of your own."""

    def logprobs(self, requests: ProbeRequests) -> Sequence[Sequence[float]]:
        """The log-probs of every request's continuation tokens."""
        ...


def values_before_steps(
    model, batch: StepBatch, probe: Any, answers: Sequence[Any], *, engine: LogprobEngine | None = None, **options: Any
) -> StepValues:
    """Values for `step_gae`: V_0, ..., V_{K-1}, and 0 for V_K, which nothing needs to be asked for.

    Args:
        model: the policy.
        batch: prompts and steps.
        probe: as in `probe_step_values`.
        answers: as in `probe_step_values`.
        engine: asked in place of the policy. It must have the policy's weights.
        **options: further options of `probe_step_values`; beside an engine those of `probe_requests`.

    Returns:
        StepValues of the batch.
    """
    asked = StepBatch(batch.prompt_ids, [steps[:-1] for steps in batch.step_ids])
    if engine is None:
        values = probe_step_values(model, asked, probe, answers, **options)
    else:
        requests = probe_requests(asked, probe, answers, model=model, **options)
        values = values_from_logprobs(requests, engine.logprobs(requests))
    lists = [[*v, 0.0] if steps else v for v, steps in zip(values.to_lists(), batch.step_ids, strict=True)]
    return StepValues.from_lists(lists, device=values.values.device)
