# SPDX-License-Identifier: Apache-2.0
"""Logits route: time and memory of the step preference loss from (N, V) logits, next to its peers.

python -m benchmarks logits [--only logits-fp32 ...] [--redo] [--quick]
"""

from __future__ import annotations

import sys

import torch

import sspo_ext

from . import peers, tables
from .measure import Case, extra_peak_mib, interleave, ratio
from .problems import BETA, LogitsProblem, LogitsSpec
from .tables import Settings, Table, ms, short

INPLACE, NEW = "sspo_ext, gradient in place", "sspo_ext, gradient in a new buffer"

LOSS_ALONE, READ = "sigmoid loss alone", "two reads of as many logits"

COPY = "one copy of the logits into an existing buffer"

CUDA = torch.cuda.is_available()

DEVICE = "cuda" if CUDA else "cpu"


def our_cases(problem: LogitsProblem) -> list[Case]:
    """The in-place case overwrites the logits. Its `reset` puts them back from a copy and is not timed."""
    leaf, source = problem.leaf(), problem.logits.clone()

    def restore() -> None:
        leaf.grad = None
        problem.logits.copy_(source)

    def clear() -> None:
        leaf.grad = None

    return [
        Case(INPLACE, lambda: peers.run_ours(problem, leaf, True), restore),
        Case(NEW, lambda: peers.run_ours(problem, leaf, False), clear),
    ]


def peer_cases(problem: LogitsProblem) -> tuple[list[Case], list[str]]:
    """The peers that can run here, and a note on each of the others."""
    leaf = problem.scored_leaf()

    def clear() -> None:
        leaf.grad = None

    cases, notes = [], []
    for peer in peers.LOGITS_PEERS:
        reason = peers.reason(peer)
        if reason is not None:
            notes.append(f"* {peer.name} was not run: {reason}.")
            continue
        cases.append(Case(peer.name, lambda peer=peer: peers.run_logits_peer(peer, problem, leaf), clear))
    return cases, notes


def check(problem: LogitsProblem, cases: list[Case]) -> None:
    """Raises RuntimeError unless all contestants give the same gradient. Nothing is measured before this check."""
    leaf, rows = problem.leaf(), problem.layout.num_rows
    peers.run_ours(problem, leaf, False)
    assert leaf.grad is not None
    ours = leaf.grad[:rows]
    for peer in peers.LOGITS_PEERS:
        if any(case.name == peer.name for case in cases):
            theirs = problem.scored_leaf().detach().clone().requires_grad_()  # Liger writes over its input
            peers.run_logits_peer(peer, problem, theirs)
            assert theirs.grad is not None
            error = (theirs.grad.float() - ours.float()).norm() / ours.float().norm()
            if not error < (0.05 if problem.spec.dtype != torch.float32 else 1e-3):
                raise RuntimeError(f"{peer.name}: its gradient differs from ours by {error:.2g}; nothing was measured")


def check_all(dtype: torch.dtype) -> None:
    problem = LogitsProblem(LogitsSpec(64, 997, dtype, step=8), DEVICE)
    check(problem, peer_cases(problem)[0])


def time_table(settings: Settings, dtype: torch.dtype) -> Table:
    check_all(dtype)
    spec = LogitsSpec(settings.size(1024, 64), settings.size(128256, 4000), dtype)
    problem = LogitsProblem(spec, DEVICE)
    existing = torch.zeros_like(problem.logits)
    others, notes = peer_cases(problem)
    cases = [*our_cases(problem), *others, Case(COPY, lambda: existing.copy_(problem.logits))]
    times = interleave(cases, settings.count(9), limit_s=settings.limit_s)
    table = Table(
        "",
        f"Logits route, [{spec.rows} x {spec.vocab}] {short(dtype)}, loss and gradient",
        ["", "ms", "quartiles", "x in place", "x new buffer"],
        notes=["Ratios are a contestant's time over ours, medians of per-round ratios.", *notes],
    )
    for case in cases:
        table.rows.append(
            [case.name, *ms(times[case.name]), *(round(ratio(times, case.name, own), 2) for own in (INPLACE, NEW))]
        )
    copies = [f"{ratio(times, own, COPY):.2f}" for own in (INPLACE, NEW)]
    table.notes.append(f"* In place over one copy: {copies[0]}; new buffer over one copy: {copies[1]}.")
    table.note_rounds(times)
    return table


def memory_table(settings: Settings) -> Table:
    rows, vocab = settings.size(1024, 64), settings.size(128256, 4000)
    dtypes = (torch.float32, torch.bfloat16)
    columns = [f"{short(dtype)} {unit}" for dtype in dtypes for unit in ("MiB", "% of logits")]
    table = Table(
        "",
        f"Logits route, [{rows} x {vocab}]: peak memory beyond the logits themselves, gradient included",
        ["", *columns],
        notes=["Rise of the process's peak resident memory over one loss and backward, each in a fresh process."],
    )
    names = [INPLACE, NEW, *(p.name for p in peers.LOGITS_PEERS if peers.reason(p) is None)]
    for name in names:
        row = [name]
        for dtype in dtypes:
            extra = extra_peak_mib(peers.build_logits, name, LogitsSpec(rows, vocab, dtype))
            row += [round(extra, 1), round(100 * extra / (rows * vocab * dtype.itemsize / 2**20), 2)]
        table.rows.append(row)
    return table


def scaling_table(settings: Settings) -> Table:
    """Time for several N and V. In proportion to N * V means the same nanoseconds an element in every row."""
    dtype = torch.bfloat16
    all_rows = (256, 1024, 4096) if not settings.quick else (16, 64)
    vocabularies = (32000, 128256, 256000) if not settings.quick else (1000, 4000)
    table = Table(
        "",
        f"Logits route, {short(dtype)}: cost against N and V",
        ["N", "V", "in place, ms", "quartiles", "ns per element", "new buffer, ms", "quartiles", "ns per element"],
    )
    for rows in all_rows:
        for vocab in vocabularies:
            problem = LogitsProblem(LogitsSpec(rows, vocab, dtype), DEVICE)
            times = interleave(our_cases(problem), settings.count(7), limit_s=settings.limit_s / 9)
            row = [rows, vocab]
            for name in (INPLACE, NEW):
                median, quartiles = ms(times[name])
                row += [median, quartiles, round(1e6 * median / (rows * vocab), 3)]
            table.rows.append(row)
            table.note_rounds(times)
            del problem
    return table


def reduction_cases(problem: LogitsProblem) -> list[Case]:
    """The sigmoid loss alone, and with reductions of the same rows added to it. The gradient is made in place."""
    leaf, source, ref_logits = problem.leaf(), problem.logits.clone(), problem.logits.flip(0).contiguous()

    def restore() -> None:
        leaf.grad = None
        problem.logits.copy_(source)

    def run(**asked) -> None:
        out = sspo_ext.step_logps(leaf, problem.layout, inplace_backward=True, **asked)
        extra = [value.mean() for value in (out.entropy, out.sum_p2, out.kl) if value is not None]
        winner, loser = (out.sums - problem.ref)[problem.pairs.index.long()].unbind(1)
        loss = -torch.nn.functional.logsigmoid(BETA * (winner - loser)).mean()
        sum(extra, loss).backward()

    every = {"entropy": True, "sum_p2": True, "kl_ref_logits": ref_logits}
    return [
        Case(LOSS_ALONE, lambda: peers.run_ours(problem, leaf, True), restore),
        Case("+ entropy", lambda: run(entropy=True), restore),
        Case("+ sum of p^2", lambda: run(sum_p2=True), restore),
        Case("+ KL from reference logits", lambda: run(kl_ref_logits=ref_logits), restore),
        Case("+ all three", lambda: run(**every), restore),
    ]


def reductions_table(settings: Settings) -> Table:
    """What entropy, sum of p^2 and KL add to forward and backward."""
    rows, vocab = settings.size(1024, 64), settings.size(128256, 4000)
    table = Table(
        "",
        f"Logits route, [{rows} x {vocab}], loss and gradient in place: further reductions in the same pass",
        ["", "dtype", "ms", "quartiles", "x loss alone", "x reading a reference"],
        notes=[
            "Ratios are medians of per-round ratios. Reading a reference: the maximum of as many bits, twice (KL reads "
            "the reference's forward and backward)."
        ],
    )
    for dtype in (torch.float32, torch.bfloat16):
        problem = LogitsProblem(LogitsSpec(rows, vocab, dtype), DEVICE)
        bits = problem.logits.flip(0).contiguous().view(torch.int32)

        def read(bits: torch.Tensor = bits) -> None:
            bits.max()
            bits.max()

        cases = [*reduction_cases(problem), Case(READ, read)]
        times = interleave(cases, settings.count(9), limit_s=settings.limit_s / 2)
        for case in cases:
            own = [round(ratio(times, case.name, base), 3) for base in (LOSS_ALONE, READ)]
            table.rows.append([case.name, short(dtype), *ms(times[case.name]), *own])
        table.note_rounds(times)
        del problem
    return table


TABLES = {
    "logits-fp32": lambda settings: time_table(settings, torch.float32),
    "logits-bf16": lambda settings: time_table(settings, torch.bfloat16),
    "logits-memory": memory_table,
    "logits-scaling": scaling_table,
    "logits-reductions": reductions_table,
}


def main(argv: list[str]) -> None:
    tables.run(TABLES, argv, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
