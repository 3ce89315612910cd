# SPDX-License-Identifier: Apache-2.0
"""Values of the steps of given chains, and step preferences from them, offline and from file to file."""

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

from ..data.chat import row_probe
from ..signals.credit.gae import step_gae
from ..signals.pairing.candidates import trace_candidates
from ..signals.pairing.pairs import pair_candidates, pair_rows
from ..signals.pairing.rollouts import nodes_from_rollouts
from ..signals.probing.likelihood import unit_values
from ..signals.probing.options import FLOOR
from ..signals.probing.probe import probe_step_values
from ..signals.probing.texts import Probe, as_probe
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
    """Compute values and advantages of every chain's steps, and write them to a JSONL file.

    The file appears when it is complete. A run that was killed continues with `resume`.

    Args:
        model: any Hugging Face causal LM.
        tokenizer: its tokenizer.
        chains: of `load_chains`.
        path: of the JSONL file.
        probe: as for `probe_step_values`.
        gamma: discount per step, as for `step_gae`. The chain's reward is at its end.
        lam: lambda of `step_gae`.
        resume: continue an earlier run with the same settings.
        batch_size: chains probed between two writes.
        progress: called with (chains done, chains in all).
        settings: more settings of the run, such as the model's name. `resume` refuses rows made with other settings.
        **options: of `probe_step_values`. Log-probabilities are put on the scale of rewards, see `unit_values`.

    Returns:
        A row for each chain: {"key": the chain's source, "prompt", "answer", "reward", "steps": [text] * K, "values":
        [V_0, ..., V_K], "advantages": [A_1, ..., A_K]}.

    Raises:
        ValueError: two chains have the same id, or an earlier run does not fit.
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
        probes = [row_probe(as_probe(probe), chain.template) for chain in some]
        values = probe_step_values(
            model, step_batch(some), probes, [c.answer for c in some], tokenizer=tokenizer, **options
        )
        if options.get("reduce") == "logprob":
            values = unit_values(values, options.get("floor", FLOOR))
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
    """Find step preferences at random states of every chain, and write them to a JSONL file.

    The question alone is one of the states. PATH.nodes keeps what was found for each chain, so a run that was killed
    continues with `resume`.

    Args:
        model: any Hugging Face causal LM.
        tokenizer: its tokenizer.
        chains: of `load_chains`.
        path: of the JSONL file.
        states_per_chain: random states of each chain. They depend on the chain's id and the seed alone.
        pairing: options of `pair_candidates`.
        seed: of states and samples.
        resume: continue an earlier run with the same settings.
        progress: called with (chains done, chains in all).
        settings: more settings of the run, such as the model's name.
        **options: of `trace_candidates`.

    Returns:
        The rows of `pair_rows`, each with the chain's id as "source".

    Raises:
        ValueError: an earlier run does not fit.
    """
    made = {"states": states_per_chain, "seed": seed, "pairing": pairing, **options, **(settings or {})}
    store = LineStore(f"{os.fspath(path)}.nodes", _fingerprint(chains, made), resume=resume)
    todo = [chain for chain in chains if chain.source not in store.rows]
    for done, chain in enumerate(todo):
        if progress is not None:
            progress(len(chains) - len(todo) + done, len(chains))
        every = range(max(len(chain.steps), 1))
        some = random.Random(f"{seed}:{chain.source}").sample(every, min(states_per_chain, len(every)))
        asked = {"probe": row_probe(as_probe(options.get("probe", "en")), chain.template)}
        nodes = trace_candidates(
            model, tokenizer, step_batch([chain]), [chain.answer], states=[(0, k) for k in sorted(some)], seed=seed,
            **{**options, **asked},
        )  # fmt: skip
        rows = pair_rows(pair_candidates(nodes, **(pairing or {})), [chain.prompt], [chain.steps])
        rows = [{**row, **chain.template} for row in rows]
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
    """Find step preferences among the chains themselves, where chains of one prompt part; write a JSONL file.

    Args:
        chains: of `load_chains`.
        traced: the rows of `trace_values` for these chains.
        tokenizer: of the chains.
        path: of the JSONL file.
        **pairing: options of `pair_candidates`.

    Returns:
        The rows of `pair_rows`, each with the chain's id as "source". See `nodes_from_rollouts`.
    """
    advantages = torch.tensor([a for row in traced for a in row["advantages"]])
    nodes = nodes_from_rollouts(step_batch(chains), advantages, tokenizer)
    pairs = pair_candidates(nodes, **pairing)
    rows = pair_rows(pairs, [c.prompt for c in chains], [c.steps for c in chains])
    whose = [chains[pair.node.sequence] for pair in pairs]
    rows = [{**row, **chain.template, "source": chain.source} for row, chain in zip(rows, whose, strict=True)]
    write_lines(path, rows)
    return rows


def _fingerprint(chains: Sequence[Chain], made: dict) -> dict:
    """What the rows depend on, in JSON types: options as they are, functions by name, the chains by hash."""

    def plain(value: Any) -> Any:
        if isinstance(value, Probe):
            return dataclasses.asdict(value)
        return getattr(value, "__qualname__", repr(value)) if callable(value) else value

    text = json.dumps([dataclasses.astuple(chain) for chain in chains])
    return {k: plain(v) for k, v in made.items()} | {"chains": hashlib.sha256(text.encode()).hexdigest()}
