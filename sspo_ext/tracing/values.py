"""What the steps of given chains are worth to a model, and step preferences from it, offline and file to file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..signals.credit.gae import step_gae
from ..signals.pairing.candidates import trace_candidates
from ..signals.pairing.pairs import pair_candidates, pair_rows
from ..signals.pairing.rollouts import nodes_from_rollouts
from ..signals.probing.probe import probe_step_values
from ..signals.probing.texts import Probe
from .chains import Chain, step_batch
from .lines import LineStore, write_lines


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
    made = {"gamma": gamma, "lam": lam, "probe": probe, **options, **(settings or {})}
    store = LineStore(path, _fingerprint(chains, made), resume=resume)
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
                "values": [float(f"{v:.6g}") for v in of_chain],
                "advantages": [float(f"{a:.6g}") for a in advantage.tolist()],
            }
            for chain, of_chain, advantage in zip(some, values.to_lists(), advantages, strict=True)
        )
    if progress is not None:
        progress(len(chains), len(chains))
    return store.finish(keys)


def trace_pairs(
    model: nn.Module,
    tokenizer,
    chains: Sequence[Chain],
    path: str | os.PathLike,
    *,
    states_per_chain: int = 2,
    pairing: dict | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Callable[[int, int], Any] | None = None,
    settings: dict | None = None,
    **options: Any,
) -> list[dict]:
    """Step preferences at random states of every chain (the question alone among them), written to `path` (JSONL).

    The rows are those of `pair_rows`. On the way, what was found for each chain is kept in `path`.nodes, from which a
    killed run goes on with `resume`.

    states_per_chain  random states of each chain, the same for the same chain and seed
    pairing           options of `pair_candidates`
    **options         of `trace_candidates`
    """
    made = {"states": states_per_chain, "seed": seed, "pairing": pairing, **options, **(settings or {})}
    store = LineStore(f"{os.fspath(path)}.nodes", _fingerprint(chains, made), resume=resume)
    todo = [chain for chain in chains if chain.source not in store.rows]
    for done, chain in enumerate(todo):
        if progress is not None:
            progress(len(chains) - len(todo) + done, len(chains))
        every = range(max(len(chain.steps), 1))
        some = random.Random(f"{seed}:{chain.source}").sample(every, min(states_per_chain, len(every)))
        nodes = trace_candidates(
            model, tokenizer, step_batch([chain]), [chain.answer], states=[(0, k) for k in sorted(some)], seed=seed,
            **options,
        )  # fmt: skip
        rows = pair_rows(pair_candidates(nodes, **(pairing or {})), [chain.prompt], [chain.steps])
        candidates = [[dataclasses.asdict(c) for c in node.candidates] for node in nodes]
        store.add([{"key": chain.source, "states": sorted(some), "candidates": candidates, "pairs": rows}])
    if progress is not None:
        progress(len(chains), len(chains))
    found = store.finish([chain.source for chain in chains])
    rows = [{**pair, "source": row["key"]} for row in found for pair in row["pairs"]]
    write_lines(path, rows)
    return rows


def rollout_pairs(
    chains: Sequence[Chain], traced: Sequence[dict], tokenizer, path: str | os.PathLike, **pairing: Any
) -> list[dict]:
    """Step preferences among the chains themselves, where those of one prompt part; see `nodes_from_rollouts`."""
    advantages = torch.tensor([a for row in traced for a in row["advantages"]])
    nodes = nodes_from_rollouts(step_batch(chains), advantages, tokenizer)
    pairs = pair_candidates(nodes, **pairing)
    rows = pair_rows(pairs, [c.prompt for c in chains], [c.steps for c in chains])
    rows = [{**row, "source": chains[p.node.sequence].source} for row, p in zip(rows, pairs, strict=True)]
    write_lines(path, rows)
    return rows


def _fingerprint(chains: Sequence[Chain], made: dict) -> dict:
    """What rows depend on, in JSON: options as they are, functions by name, the chains by hash."""

    def plain(value: Any) -> Any:
        if isinstance(value, Probe):
            return dataclasses.asdict(value)
        return getattr(value, "__qualname__", repr(value)) if callable(value) else value

    text = json.dumps([dataclasses.astuple(chain) for chain in chains])
    return {k: plain(v) for k, v in made.items()} | {"chains": hashlib.sha256(text.encode()).hexdigest()}
