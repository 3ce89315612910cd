# SPDX-License-Identifier: Apache-2.0
"""Values of steps from the rollout engine, which has the policy's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..signals.probing.options import FLOOR
from ..signals.probing.requests import probe_requests, values_from_logprobs
from ..signals.values import StepBatch, StepValues


def check_engine(engine: Any, probe_engine: str) -> None:
    """ValueError if an engine is to be asked for values that cannot give log-probs."""
    if probe_engine == "rollout" and not hasattr(engine, "logprobs"):
        raise ValueError(
            "probe_engine: expected a rollout engine with `logprobs`, such as 'vllm', for 'rollout', "
            f"got {type(engine).__name__}"
        )


def engine_values(
    engine: Any,
    model: nn.Module,
    batch: StepBatch,
    probe: Any,
    answers: Sequence[Any],
    *,
    tokenizer: Any,
    reduce: str = "joint",
    floor: float = FLOOR,
    mode: str = "likelihood",
) -> StepValues:
    """`probe_step_values` with an engine in the model's place.

    Args:
        engine: Has `logprobs(requests)`, and the policy's weights.
        model: Only its configs are read.
        batch: As in `probe_step_values`, like the other arguments.
        probe: One, or one for each sequence.
        answers: The gold answers.
        tokenizer: Of the probe and the answers.
        reduce: "joint", "mean" or "logprob".
        floor: With "logprob".
        mode: "likelihood"; an engine is asked for nothing else.

    Returns:
        The values, in float32 on the host.
    """
    assert mode == "likelihood"
    requests = probe_requests(batch, probe, answers, reduce=reduce, tokenizer=tokenizer, model=model)
    return values_from_logprobs(requests, engine.logprobs(requests), floor=floor)
