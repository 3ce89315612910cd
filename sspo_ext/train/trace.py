"""What the steps of given chains are worth to a model, and step preferences from it, offline and file to file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..signals.gae import step_gae
from ..signals.probe import Probe, probe_step_values
from .chains import Chain, step_batch
from .lines import LineStore


def trace_values(
    model: nn.Module,
    tokenizer,
    chains: Sequence[Chain],
    path: str | os.PathLike,
    *,
    probe: str | Probe = "en",
    gamma: float = 0.9,
    lam: float = 0.0,
    resume: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], Any] | None = None,
    settings: dict | None = None,
    **options: Any,
) -> list[dict]:
    """Values and advantages of every chain's steps, as rows, which are also written to `path` (JSONL).

    A row is {"key": the chain's source, "prompt", "answer", "reward", "steps": [text] * K, "values": [V_0..V_K],
    "advantages": [A_1..A_K]}. Killed and started again with `resume`, it goes on where it was; the file appears when it
    is complete.

    probe, **options  of `probe_step_values`
    gamma, lam        of `step_gae`, with the chain's reward at its end
    batch_size        chains probed between two writes
    progress          called with (chains done, chains in all)
    settings          of the run, as the model's name; `resume` refuses rows that were made with other ones
    """
    keys = [chain.source for chain in chains]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"chains: expected a different id for each, got {twice!r} twice")
    shown = dataclasses.asdict(probe) if isinstance(probe, Probe) else probe
    plain = {k: v for k, v in options.items() if isinstance(v, (str, int, float))}
    data = hashlib.sha256(json.dumps([dataclasses.astuple(c) for c in chains]).encode()).hexdigest()
    made = {"probe": shown, "gamma": gamma, "lam": lam, "data": data, **plain, **(settings or {})}
    store = LineStore(path, made, resume=resume)
    todo = [chain for chain in chains if chain.source not in store.rows]
    for start in range(0, len(todo), batch_size):
        if progress is not None:
            progress(len(chains) - len(todo) + start, len(chains))
        some = todo[start : start + batch_size]
        values = probe_step_values(
            model, step_batch(some), probe, [c.answer for c in some], tokenizer=tokenizer, **options
        )
        rewards = torch.tensor([c.reward for c in some], device=values.values.device)
        advantages = step_gae(values, rewards, gamma=gamma, lam=lam).split(values.steps_per_sequence.tolist())
        store.add(
            {
                "key": chain.source,
                "prompt": chain.prompt,
                "answer": chain.answer,
                "reward": chain.reward,
                "steps": chain.steps,
                "values": [round(v, 6) for v in of_chain],
                "advantages": [round(a, 6) for a in advantage.tolist()],
            }
            for chain, of_chain, advantage in zip(some, values.to_lists(), advantages, strict=True)
        )
    if progress is not None:
        progress(len(chains), len(chains))
    return store.finish(keys)
