# SPDX-License-Identifier: Apache-2.0
"""What a call costs the host: one loss and its backward at a size where the arithmetic takes no time.

    python -m benchmarks host [--rounds 3000]

Two sequences of 8 scored tokens, V = 32, float32, one thread: wrapper, checks, dispatch and autograd. Medians and 5 %
quantiles in microseconds, the contestants one after the other. Then what the linear route's plan of a larger batch
takes, with its tables: the first time, and for the same layout again.
"""

# pyright: reportMissingImports=false
# The peers' packages need not be installed.

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch

V, LENGTH = 32, 9


def ours() -> Callable[[], None]:
    from sspo_ext import StepLayout, step_pref_loss

    logits = torch.randn(2, LENGTH, V, requires_grad=True)
    ids = torch.arange(LENGTH).div(3, rounding_mode="floor").expand(2, -1).contiguous()
    layout = StepLayout.from_step_ids(torch.randint(V, (2, LENGTH)), ids)
    pairs, ref = layout.pair_by_index(), torch.zeros(layout.num_steps)

    def run() -> None:
        logits.grad = None
        step_pref_loss(logits, layout, pairs, ref=ref).loss.backward()

    return run


def ours_linear() -> Callable[[], None]:
    from sspo_ext import StepLayout, linear_step_pref_loss

    hidden, weight = torch.randn(2, LENGTH, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    ids = torch.arange(LENGTH).div(3, rounding_mode="floor").expand(2, -1).contiguous()
    layout = StepLayout.from_step_ids(torch.randint(V, (2, LENGTH)), ids)
    pairs, ref = layout.pair_by_index(), torch.zeros(layout.num_steps)

    def run() -> None:
        hidden.grad = weight.grad = None
        linear_step_pref_loss(hidden, weight, layout, pairs, ref=ref).loss.backward()

    return run


def trl() -> Callable[[], None]:
    """DPO of whole sequences from TRL's log-probs."""
    from trl.trainer.utils import selective_log_softmax

    logits, labels = torch.randn(2, LENGTH, V, requires_grad=True), torch.randint(V, (2, LENGTH))
    mask = torch.ones(2, LENGTH)

    def run() -> None:
        logits.grad = None
        sums = (selective_log_softmax(logits, labels) * mask).sum(1)
        (-torch.nn.functional.logsigmoid(0.1 * (sums[:1] - sums[1:]))).mean().backward()

    return run


def liger_linear() -> Callable[[], None]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, weight = torch.randn(2, LENGTH, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    labels, loss = torch.randint(V, (2, LENGTH)), LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False)

    def run() -> None:
        hidden.grad = weight.grad = None
        loss(weight, hidden, labels)[0].backward()

    return run


CONTESTANTS = {
    "sspo_ext step_pref_loss": ours,
    "TRL selective_log_softmax, DPO": trl,
    "sspo_ext linear_step_pref_loss": ours_linear,
    "Liger fused linear DPO": liger_linear,
}


def planning(calls: int) -> list[float]:
    """Seconds that each of some calls of one layout plans: 64 sequences of 512 tokens, steps of 32, pairs of steps."""
    from sspo_ext import StepLayout, linear_step_pref_loss
    from sspo_ext.routes.linear import engine, ops

    ids = (torch.arange(513) - 1).div(32, rounding_mode="floor").expand(64, -1).contiguous()
    layout = StepLayout.from_step_ids(torch.randint(V, ids.shape), ids)
    pairs, ref = layout.pair_by_index(), torch.zeros(layout.num_steps)
    hidden, weight = torch.randn(*ids.shape, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    seconds: list[float] = []

    def timed(function: Callable) -> Callable:
        def call(*args):
            start = time.perf_counter()
            result = function(*args)
            seconds[-1] += time.perf_counter() - start
            return result

        return call

    with (
        mock.patch.object(ops, "cached_plan", timed(ops.cached_plan)),
        mock.patch.object(engine, "kept_on_device", timed(engine.kept_on_device)),
    ):
        for _ in range(calls):
            seconds.append(0.0)
            linear_step_pref_loss(hidden, weight, layout, pairs, ref=ref, chunk_bytes=1024 * 4 * V)
    return seconds


def microseconds(run: Callable[[], None], rounds: int) -> tuple[float, float]:
    """(median, 5 % quantile)."""
    for _ in range(rounds // 10):
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    times.sort()
    return times[rounds // 2] * 1e6, times[rounds // 20] * 1e6


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3000)
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| | median, us | 5 % quantile, us |\n| --- | --- | --- |")
    for name, make in CONTESTANTS.items():
        try:
            median, low = microseconds(make(), rounds)
        except ImportError as error:
            print(f"{name} was not run: {error}")
            continue
        print(f"| {name} | {median:.0f} | {low:.0f} |")
    first, *later = (1e6 * seconds for seconds in planning(30))
    later.sort()
    print(f"| plan of 32,768 rows and 512 pairs, the first time | {first:.0f} | |")
    print(f"| plan of the same layout again | {later[len(later) // 2]:.0f} | {later[len(later) // 20]:.0f} |")


if __name__ == "__main__":
    main()
