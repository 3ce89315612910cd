# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the linear route in bfloat16 next to its peers and the bare GEMMs, for `python -m benchmarks gpu`.

8192 scored rows, H = 4096, V = 151936: the shape whose time docs/gpu.md predicts. Every contestant runs once a round,
in shuffled order. `host` is the time until the call returns, without waiting for the device.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Protocol

import torch

import sspo_ext

from ..speed import linear, measure, peers
from ..speed.problems import LinearProblem, LinearSpec
from ..speed.tables import Table, ms
from .ledger import PEAK_TFLOPS, Shape, bare, ours
from .record import MACHINES


class Clock(Protocol):
    """benchmarks.kernels.gpu.Clock."""

    host_s: float

    def time(self, run) -> float: ...


def spec_of(quick: bool, head: str) -> LinearSpec:
    """16 sequences of 512 scored tokens, one step each; or a shape that only shows that the code runs."""
    spec = LinearSpec(16, 513, 4096, 151936, torch.bfloat16, prompt=1 / 513, step=None, head=head, ref="cached")
    return replace(spec, batch=4, length=9, hidden=32, vocab=503, prompt=1 / 9) if quick else spec


def policy_loss(problem: LinearProblem) -> torch.Tensor:
    """REINFORCE with an advantage for each step."""
    advantages = torch.linspace(-1, 1, problem.layout.num_steps, device=problem.hidden.device)
    return sspo_ext.linear_step_policy_loss(problem.hidden, problem.weight, problem.layout, advantages).loss


def predicted_ms(spec: LinearSpec, device_name: str) -> tuple[float, float] | None:
    """(ours, bare GEMMs) by the ledger, for the GPU of this name; None if it is not known."""
    machine = next((m for m in MACHINES if m.name in PEAK_TFLOPS and m.name in device_name), None)
    if machine is None:
        return None
    rows = spec.batch * (spec.length - 1)
    shape = Shape(rows, spec.vocab, spec.hidden, spec.head == "trained", length=spec.length - 1)
    return ours(shape).ms(machine), bare(shape).ms(machine)


def linear_table(device: str, clock: Clock, quick: bool, rounds: int, head: str) -> Table:
    """Loss and gradients from hidden states: ours, peers, bare GEMMs."""
    spec = spec_of(quick, head)
    linear.check(replace(spec, vocab=501))
    problem = LinearProblem(spec, device)
    running, notes = linear.usable(peers.LINEAR_PEERS, problem)
    floor = peers.BareGemms(problem)
    contestants = {
        "sspo_ext linear_step_pref_loss": lambda: peers.run_linear(peers.OURS, problem),
        "sspo_ext linear_step_policy_loss": lambda: policy_loss(problem).backward(),
        **{peer.name: lambda peer=peer: peers.run_linear(peer, problem) for peer in running},
        linear.FLOOR: floor,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    host: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    for number in range(rounds + 2):  # two to warm up: compile, autotune, allocate
        shuffle(order)
        for name in order:
            problem.clear()
            elapsed = clock.time(contestants[name])
            if number > 1:
                seconds[name].append(elapsed)
                host[name].append(clock.host_s)
    problem.clear()
    table = Table(
        f"linear-{head}",
        f"Linear route, {linear.describe(spec)}, {head} head, {problem.layout.num_rows} scored rows, reference cached",
        ["", "ms", "quartiles", "/ bare GEMMs", "host, ms"],
        notes=[f"* The plan: {floor.plan}.", *notes],
        rounds=rounds,
    )
    told = predicted_ms(spec, torch.cuda.get_device_name()) if device == "cuda" else None
    if told is not None:
        table.notes.append(
            f"* PREDICTED: {told[0]:.1f} ms, bare GEMMs {told[1]:.1f} ms, ratio {told[0] / told[1]:.2f}."
        )
    bare_s = measure.Spread.of(seconds[linear.FLOOR]).median
    for name in contestants:
        over = measure.Spread.of(seconds[name]).median / bare_s
        table.rows.append(
            [name, *ms(seconds[name]), round(over, 2), round(1e3 * measure.Spread.of(host[name]).median, 2)]
        )
    return table
