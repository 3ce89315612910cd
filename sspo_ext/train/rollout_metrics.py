# SPDX-License-Identifier: Apache-2.0
"""What is logged of rollouts: rewards, lengths, values, advantages; and warnings where an update has nothing to say."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from ..signals.probing.options import NEAR_ZERO
from .experience import Summary

_ALL_BUT_ALL = 0.99  # of the values of an update


def rollout_metrics(rows: Iterable[Summary], names: Sequence[str] = ()) -> dict[str, float]:
    """Means over all rollouts: rewards, lengths, steps. With several reward functions, `names`, those of each too."""
    rows = list(rows)
    n = max(len(rows), 1)
    rewards = torch.tensor([row.reward for row in rows], dtype=torch.float64)
    each: dict[str, float] = {}
    for name, column in zip(names, zip(*(row.rewards for row in rows), strict=True), strict=False):
        known = torch.tensor([reward for reward in column if reward == reward], dtype=torch.float64)
        if len(known):  # it applied to some
            each |= {f"rewards/{name}/mean": known.mean().item(), f"rewards/{name}/std": known.std(correction=0).item()}
    return {
        **(each if len(names) > 1 else {}),
        "accuracy": sum(row.answered >= 1 for row in rows) / n,
        "reward": sum(row.reward for row in rows) / n,
        "reward_std": rewards.std(correction=0).item() if len(rows) else 0.0,
        "completions/mean_length": sum(row.tokens for row in rows) / n,
        "completions/clipped_ratio": sum(not row.ended for row in rows) / n,
        "steps/mean": sum(row.steps for row in rows) / n,
    }


def update_metrics(
    rows: Iterable[Summary], advantages: Sequence[Sequence[float]], names: Sequence[str] = ()
) -> dict[str, tuple[float, int]]:  # name: (sum, count)
    """`rollout_metrics`, the values before steps, and the advantages of all steps."""
    rows = list(rows)
    found: dict[str, tuple[float, int]] = {name: (value, 1) for name, value in rollout_metrics(rows, names).items()}
    probed = [row.values for row in rows if len(row.values) > 1]
    if probed:
        found["values/near_zero"] = near_zero(rows), 1
        found["values/first"] = sum(v[0] for v in probed), len(probed)
        found["values/last"] = sum(v[-2] for v in probed), len(probed)
    flat = torch.tensor([a for row in advantages for a in row])
    if len(flat):
        found["advantages/mean"] = flat.mean().item(), 1
        found["advantages/std"] = flat.std(correction=0).item(), 1
        silent = not flat.any()
        found["advantages/silent"] = float(silent), 1
        if silent:
            warnings.warn(_silence(rows), stacklevel=2)
    return found


def near_zero(rows: Iterable[Summary]) -> float:
    """The share of values before steps that are all but zero; 0 without steps."""
    values = [v for row in rows for v in row.values[:-1]]
    return sum(abs(v) < NEAR_ZERO for v in values) / max(len(values), 1)


def warn_near_zero(rows: Sequence[Summary], probe: str) -> bool:
    """Warns if nearly all values of an update are all but zero, and returns whether it did."""
    share = near_zero(rows)
    if share < _ALL_BUT_ALL:
        return False
    warnings.warn(
        f"{share:.1%} of an update's values are below {NEAR_ZERO:g}: after the probe {probe!r} the model hardly ever "
        "gives the right answer. Either it cannot know it there, or this text does not make it answer: "
        "`sspo-ext probe` compares texts on the model's own completions. values/near_zero is logged",
        stacklevel=2,
    )
    return True


def _silence(rows: Sequence[Summary]) -> str:
    low, high = min(row.reward for row in rows), max(row.reward for row in rows)
    rewards = f"all rewards are {low:g}" if low == high else f"rewards are from {low:g} to {high:g}"
    values = [v for row in rows for v in row.values[:-1]]
    told = f" and the values from {min(values):.2g} to {max(values):.2g}" if values else ""
    return (
        f"all {len(rows)} completions of an update have advantage 0 ({rewards}{told}), so it changes nothing; easier "
        "prompts, more completions or another probe may help, and advantages/silent is the share of such updates"
    )
