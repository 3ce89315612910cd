# SPDX-License-Identifier: Apache-2.0
"""Every loss next to the sigmoid loss, on the same logits. All losses should take the same time.

    python -m benchmarks losses [--rows 1024] [--vocab 128256] [--dtype bfloat16] [--rounds 7] [--only NAME,NAME]

Forward and backward of `step_pref_loss` on the logits route. Each round runs the sigmoid loss and the other loss
directly one after the other, in alternating order. The ratio is the median of the rounds' ratios, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sspo_ext.formulas.registry import PAIR_FORMULAS, PairFormula
from sspo_ext.losses.pref import step_pref_loss

from .problems import LogitsProblem, LogitsSpec

_MIXTURE = ["sigmoid", "sft", "bco_pair"]


def options_of(formula: PairFormula, ref: torch.Tensor) -> dict:
    options: dict = {"loss_type": formula.name}
    if formula.reference != "forbidden":
        options["ref"] = ref
    if formula.smoothing == "required":
        options["label_smoothing"] = 1e-3
    return options


def seconds(problem: LogitsProblem, leaf: torch.Tensor, options: dict) -> float:
    leaf.grad = None
    _wait(leaf)
    start = time.perf_counter()
    step_pref_loss(leaf, problem.layout, problem.pairs, **options).loss.backward()
    _wait(leaf)
    return time.perf_counter() - start


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def measure(problem: LogitsProblem, names: list[str], rounds: int) -> list[tuple[str, float, float, float, float]]:
    """(name, median milliseconds, median ratio to sigmoid, its quartiles)."""
    leaf = problem.leaf()
    sigmoid = options_of(PAIR_FORMULAS["sigmoid"], problem.ref)
    rows = []
    for name in names:
        if name == "mixture":
            options = {"loss_type": _MIXTURE, "ref": problem.ref}
        else:
            options = options_of(PAIR_FORMULAS[name], problem.ref)
        for warm in (sigmoid, options):
            seconds(problem, leaf, warm)
        times = []
        for number in range(rounds):
            order = (sigmoid, options) if number % 2 == 0 else (options, sigmoid)
            pair = [seconds(problem, leaf, o) for o in order]
            times.append(tuple(pair if number % 2 == 0 else reversed(pair)))
        ratios = sorted(other / base for base, other in times)
        quarter = len(ratios) // 4
        median = 1e3 * statistics.median(other for _, other in times)
        rows.append((name, median, statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names, separated by commas; 'mixture' is three losses at once")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = LogitsProblem(LogitsSpec(args.rows, args.vocab, getattr(torch, args.dtype)), device)
    names = args.only.split(",") if args.only else [*PAIR_FORMULAS, "mixture"]
    print(
        f"{args.rows} x {args.vocab} {args.dtype} on {device}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print(f"{'loss':26}{'ms':>10}{'/ sigmoid':>11}{'quartiles':>16}")
    for name, milliseconds, ratio, low, high in measure(problem, names, args.rounds):
        print(f"{name:26}{milliseconds:>10.2f}{ratio:>11.3f}{low:>9.3f}-{high:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
