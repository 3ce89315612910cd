# SPDX-License-Identifier: Apache-2.0
"""On a GPU: first correctness, then times next to the predictions that were made without a GPU.

    python -m benchmarks gpu [--quick] [--rounds 20] [--out FOLDER] [--no-tests] [--without PEER]
    python -m benchmarks gpu --device cpu --quick      # only shows that the code runs: the times are a CPU's

1. `pytest -m gpu` compares every backend with float64 at real sizes. If a test fails, nothing is timed.
2. The bandwidth of a copy of 1 GiB is measured. The kernels are compared with it.
3. Each row kernel is timed alone by CUDA events. Its rate is that of the least bytes its work needs. The table shows it
   as a share of the copy's bandwidth, next to the prediction of benchmarks/results/gpu/machine-code.jsonl.
4. Loss and gradient from logits are timed in the same rounds as the peers.
5. So are loss and gradients from hidden states, trained and frozen head, preference and policy, with the bare GEMMs and
   the time of the host (gpu_linear.py).

The report is written after each table, so that a run that is cut short leaves what it has.

Every contestant runs once a round, in shuffled order. Each run takes another copy of the logits, so that no contestant
finds its rows in the L2 cache. Times are medians.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import sspo_ext
from benchmarks import records
from sspo_ext import backends

from ..speed import measure, peers, plots
from ..speed.logits import check as check_agreement
from ..speed.problems import BETA, LogitsProblem, LogitsSpec
from ..speed.tables import RESULTS, Table, ms, short
from .gpu_linear import linear_table

ROOT = Path(__file__).parents[2]

PREDICTIONS = RESULTS / "gpu" / "machine-code.jsonl"

VOCABULARIES = (32000, 50257, 128256, 151936, 256000)

NOT_PREDICTED = "-"


@dataclass
class Timed:
    """A contestant. `run(i)` works on buffers i and is timed. `reset(i)` restores what it changed, untimed."""

    name: str
    run: Callable[[int], object]
    reset: Callable[[int], object] = lambda i: None


class Clock:
    """Seconds that the device takes: between two events on a GPU, wall-clock time on a CPU."""

    def __init__(self, device: str):
        self.host_s = 0.0  # of the last run: until it returned
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device == "cuda" else None

    def time(self, run: Callable[[], object]) -> float:
        if self.events is None:
            start = time.perf_counter()
            run()
            self.host_s = time.perf_counter() - start
            return self.host_s
        before, after = self.events
        torch.cuda.synchronize()
        before.record()
        start = time.perf_counter()
        result = run()
        self.host_s = time.perf_counter() - start
        after.record()
        after.synchronize()
        del result
        return before.elapsed_time(after) * 1e-3


def interleave(cases: list[Timed], clock: Clock, rounds: int, copies: int) -> dict[str, list[float]]:
    """Seconds of each case in each round. Two rounds before these warm up: compile, autotune, allocate."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    order, count = list(cases), 0
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 2):
        shuffle(order)
        for case in order:
            count += 1
            i = count % copies
            case.reset(i)
            elapsed = clock.time(lambda case=case, i=i: case.run(i))
            case.reset(i)
            if number > 1:
                times[case.name].append(elapsed)
    return times


def copy_bandwidth(device: str, clock: Clock, size: int, rounds: int) -> float:
    """Bytes a second of a copy between two buffers; bytes read and bytes written both count."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    case = Timed("copy", lambda i: (target.copy_(source), source.copy_(target))[i % 2])
    times = interleave([case], clock, rounds, 2)["copy"]
    return 4 * size / measure.Spread.of(times).median  # two copies, each read and written


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is timed: real ones, or tiny ones that only show that the code runs."""

    quick: bool

    @property
    def vocabularies(self) -> tuple[int, ...]:
        return (997, 2003) if self.quick else VOCABULARIES

    @property
    def copy_bytes(self) -> int:
        return 1 << 20 if self.quick else 1 << 30

    def rows(self, vocab: int, dtype: torch.dtype) -> int:
        """Rows of 512 MiB of logits, ten times an H100's L2 cache."""
        return 16 if self.quick else (512 << 20) // (vocab * dtype.itemsize) // 64 * 64

    def copies(self, device: str) -> int:
        """Number of buffers: at least two, together at least four times the L2 cache."""
        if self.quick or device != "cuda":
            return 2
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return max(2, -(-4 * cache // (512 << 20)))


def our_backends(device: str, dtype: torch.dtype) -> list[str]:
    names = [n for n in backends.BACKENDS if n != "reference" and backends.why_not(n, device, dtype) is None]
    # On a CPU Triton is interpreted: such a time says nothing.
    return [n for n in names if not (n == "triton" and device == "cpu")]


def predictions(device_name: str) -> dict[tuple[str, str, str], dict]:
    """(kernel, backend, dtype) -> the prediction for the GPU of this name. Empty if there is none."""
    found = {}
    for report in records.read(PREDICTIONS)[1:]:  # the first line is about the file
        backend = {"Triton": "triton", "CUDA C++": "cuda"}.get(report["facts"])
        for machine, predicted in (report["predicted"] or {}).items():
            if backend and re.search(rf"\b{machine}\b", device_name):
                found[report["kernel"], backend, report["dtype"]] = predicted
    return found


def kernel_table(device: str, clock: Clock, scale: Scale, rounds: int, bandwidth: float) -> Table:
    """Each row kernel alone, next to its prediction."""
    predicted = predictions(torch.cuda.get_device_name() if device == "cuda" else "")
    table = Table(
        "kernels",
        "Row kernels alone",
        ["kernel", "backend", "V", "dtype", "rows", "ms", "quartiles", "GB/s", "of the copy's bandwidth",
         "PREDICTED bound", "PREDICTED of peak bandwidth"],
        notes=[
            "Bytes are the least that the work needs: one read forward; one read and one write backward. Predicted "
            "columns come from machine code alone, and are shares of the data sheet's bandwidth, which a copy does "
            "not reach either.",
        ],
    )  # fmt: skip
    for vocab in scale.vocabularies:
        for dtype in (torch.bfloat16, torch.float32):
            bench = RowKernels(LogitsSpec(scale.rows(vocab, dtype), vocab, dtype), device, scale.copies(device))
            cases = [case for name in our_backends(device, dtype) for case in bench.cases(name)]
            times = interleave(cases, clock, rounds, len(bench.views))
            for case in cases:
                kernel, name = case.name.split()
                rate = bench.least_bytes(kernel) / measure.Spread.of(times[case.name]).median
                told = predicted.get((kernel, name, str(dtype).removeprefix("torch.")), {})
                table.rows.append(
                    [kernel, name, vocab, short(dtype), bench.layout.num_rows, *ms(times[case.name]),
                     round(rate / 1e9, 1), round(rate / bandwidth, 3), told.get("bound", NOT_PREDICTED),
                     round(told["share_of_bandwidth"], 2) if told else NOT_PREDICTED]
                )  # fmt: skip
            table.rounds = rounds
            del bench, cases
            gc.collect()
    return table


class RowKernels:
    """The row kernels of any backend on the same logits, without autograd."""

    def __init__(self, spec: LogitsSpec, device: str, copies: int):
        problem = LogitsProblem(spec, device)
        self.layout = problem.layout
        self.views = [problem.logits[None]] + [problem.logits[None].clone() for _ in range(copies - 1)]
        self.target = torch.empty_like(self.views[0])
        self.coef = torch.ones(self.layout.num_rows, device=device)

    def least_bytes(self, kernel: str) -> int:
        rows, row = self.layout.num_rows, self.views[0].shape[-1] * self.target.itemsize
        # Backward also writes the last position's row, which is not scored.
        return rows * row if kernel.endswith("fwd") else (2 * rows + 1) * row

    def cases(self, name: str) -> list[Timed]:
        module, layout = backends.load(name), self.layout

        def forward(i: int):
            return module.token_logp_fwd(self.views[i], layout.rows, layout.labels, 1.0, 0.0)

        lse = forward(0)[1]

        def backward(i: int) -> None:
            module.token_logp_bwd(
                self.views[i], layout.row_of, layout.labels, lse, self.coef, None, 1.0, 0.0, self.target
            )

        return [Timed(f"token_logp_fwd {name}", forward), Timed(f"token_logp_bwd {name}", backward)]


def loss_table(device: str, clock: Clock, scale: Scale, rounds: int, vocab: int, dtype: torch.dtype) -> Table:
    """Loss and gradient from logits: each of our backends, the peers, and one copy of the logits."""
    problem = LogitsProblem(LogitsSpec(scale.rows(vocab, dtype), vocab, dtype), device)
    small = LogitsProblem(LogitsSpec(64, 997, dtype, step=8), device)
    running = [p for p in peers.LOGITS_PEERS if peers.reason(p) is None]
    check_agreement(small, [measure.Case(p.name, lambda: None) for p in running])
    source = problem.logits.clone()
    buffers = [problem.logits] + [source.clone() for _ in range(scale.copies(device) - 1)]
    leaves = [b.detach().requires_grad_() for b in buffers]
    rows = problem.spec.rows
    scored = [b[:rows].detach().requires_grad_() for b in buffers]

    def restore(i: int) -> None:
        leaves[i].grad = scored[i].grad = None
        buffers[i].copy_(source)

    def clear(i: int) -> None:
        leaves[i].grad = scored[i].grad = None

    def ours(i: int, name: str, inplace: bool) -> None:
        sspo_ext.step_pref_loss(
            leaves[i], problem.layout, problem.pairs, ref=problem.ref, beta=BETA, backend=name, inplace_backward=inplace
        ).loss.backward()

    cases = []
    for name in our_backends(device, dtype):
        cases.append(Timed(f"sspo_ext {name}, in place", lambda i, n=name: ours(i, n, True), restore))
        cases.append(Timed(f"sspo_ext {name}, new buffer", lambda i, n=name: ours(i, n, False), clear))
    for peer in running:
        # restore: Liger writes over its input
        cases.append(Timed(peer.name, lambda i, p=peer: peers.run_logits_peer(p, problem, scored[i]), restore))
    target = torch.empty_like(source)
    cases.append(Timed("one copy of the logits", lambda i: target.copy_(buffers[i])))
    times = interleave(cases, clock, rounds, len(buffers))
    table = Table(
        f"loss-{short(dtype)}-{vocab}",
        f"Loss and gradient, [{rows} x {vocab}] {short(dtype)}",
        ["", "ms", "quartiles", "x copy of the logits"],
        notes=[f"* {p.name} was not run: {why}." for p in peers.LOGITS_PEERS if (why := peers.reason(p))],
        rounds=rounds,
    )
    copy = measure.Spread.of(times["one copy of the logits"]).median
    for case in cases:
        over = measure.Spread.of(times[case.name]).median / copy
        table.rows.append([case.name, *ms(times[case.name]), round(over, 2)])
    return table


def tests_pass(device: str) -> bool:
    """Whether tests/backends/test_gpu.py passes for this device, in a process of its own."""
    marker = "gpu" if device == "cuda" else "not gpu and not slow"
    command = [sys.executable, "-m", "pytest", "-q", "tests/backends/test_gpu.py", "-m", marker, "-k", device]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def report(folder: Path | None, device: str, bandwidth: float, found: list[Table], command: str) -> str:
    """The report in Markdown. If a folder is given, the report, its tables and plots are written there."""
    kind = torch.cuda.get_device_name() if device == "cuda" else "a CPU: these are NO GPU times"
    parts = [f"# Measured on {kind}", "\n".join(f"* {k}: {v}" for k, v in measure.machine().items())]
    parts += [f"`{command}`", f"A copy moves {bandwidth / 1e9:.0f} GB/s, read and written."]
    for table in found:
        table.command, table.machine, table.when = command, measure.machine(), time.strftime("%Y-%m-%d %H:%M")
        table.load = [os.getloadavg()[0]] * 2
        parts.append(table.markdown())
        if folder:
            table.save(folder)
    if folder:
        pictures = [t for t in found if t.name.startswith("loss-")]
        if pictures:
            parts += [f"![loss and gradient]({name})" for name in plots.draw_losses(folder, pictures)]
        (folder / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only shows that the code runs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--rounds", type=int, help="default 20; with --quick 2")
    parser.add_argument("--out", type=Path, help="folder (default on a GPU: benchmarks/results/gpu/measured)")
    parser.add_argument("--no-tests", action="store_true", help="skip the correctness tests")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PEER", help="peers to leave out, by part of their name"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu: torch sees no GPU; --device cpu --quick runs the same code on the CPU")
    if not args.no_tests and not tests_pass(args.device):
        raise SystemExit("gpu: the checks failed, so nothing was timed")
    peers.left_out.update(args.without)
    scale, clock = Scale(args.quick), Clock(args.device)
    rounds = args.rounds or (2 if args.quick else 20)
    bandwidth = copy_bandwidth(args.device, clock, scale.copy_bytes, rounds)
    vocab = scale.vocabularies[len(scale.vocabularies) // 2]
    few = max(2, rounds // 2)  # of calls that take tens of milliseconds each
    makers: list[Callable[[], Table]] = [
        *(lambda head=head: linear_table(args.device, clock, args.quick, few, head) for head in ("trained", "frozen")),
        lambda: kernel_table(args.device, clock, scale, rounds, bandwidth),
        *(
            lambda dtype=dtype: loss_table(args.device, clock, scale, rounds, vocab, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ]
    folder = args.out or (RESULTS / "gpu" / "measured" if args.device == "cuda" else None)
    flags = (" --quick" if args.quick else "") + (f" --device {args.device}" if args.device != "cuda" else "")
    flags += f" --without {' '.join(map(repr, args.without))}" if args.without else ""
    command = f"python -m benchmarks gpu{flags} --rounds {rounds}"
    found: list[Table] = []
    text = ""
    for make in makers:
        found.append(make())
        gc.collect()
        text = report(folder, args.device, bandwidth, found, command)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
