# SPDX-License-Identifier: Apache-2.0
"""Linear route: one DPO step on the LM head, from hidden states to gradients, next to its peers.

python -m benchmarks linear [--only linear-bf16 ...] [--redo] [--quick]
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch

from sspo_ext.routes.linear.products import add_product

from . import peers, tables
from .measure import Case, extra_peak_mib, interleave, ratio
from .peers import LIGER, LINEAR_PEERS, OURS, TORCH, TRL, BareGemms, LinearPeer
from .problems import LinearProblem, LinearSpec
from .tables import Settings, Table, ms, short

FLOOR = "bare GEMMs of the plan"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def base_spec(settings: Settings, dtype: torch.dtype, **changes) -> LinearSpec:
    """Hidden [1024 x 1024], V = 128256, four sequences, half of each prompt: two pairs of 128 scored tokens a side."""
    size = settings.size
    spec = LinearSpec(4, size(256, 32), size(1024, 64), size(128256, 2003), dtype, step=settings.size(32, 4))
    return replace(spec, **changes)


def describe(spec: LinearSpec) -> str:
    return f"hidden [{spec.batch * spec.length} x {spec.hidden}], V {spec.vocab}, {short(spec.dtype)}"


def usable(contestants: list[LinearPeer], problem: LinearProblem) -> tuple[list[LinearPeer], list[str]]:
    running, notes = [], []
    for peer in contestants:
        reason = peers.reason(peer, problem)
        if reason is None:
            running.append(peer)
        else:
            notes.append(f"* {peer.name} was not run: {reason}.")
    return running, notes


def cases_for(problem: LinearProblem, contestants: list[LinearPeer], suffix: str = "") -> list[Case]:
    return [
        Case(peer.name + suffix, lambda peer=peer: peers.run_linear(peer, problem), problem.clear)
        for peer in contestants
    ]


def check(spec: LinearSpec) -> None:
    """Raises RuntimeError unless all contestants give the same gradients. Nothing is measured before this check.

    The batch is small and has one step a sequence, the case that every contestant supports.
    """
    problem = LinearProblem(replace(spec, length=16, hidden=32, vocab=501, step=None), DEVICE)

    def gradients(peer: LinearPeer):
        problem.clear()
        peers.run_linear(peer, problem)
        return [t.grad.float() for t in (problem.hidden, problem.weight) if t.grad is not None]

    # Liger takes no cached sums. It then runs without a reference: the cost is the same, the gradient is not.
    contestants = [
        p for p in LINEAR_PEERS if peers.reason(p, problem) is None and not (p is LIGER and spec.ref == "cached")
    ]
    ours = gradients(OURS)
    for peer in contestants:
        for mine, theirs in zip(ours, gradients(peer), strict=True):
            error = (theirs - mine).norm() / mine.norm()
            if not error < (0.1 if spec.dtype != torch.float32 else 1e-3):
                raise RuntimeError(f"{peer.name}: its gradient differs from ours by {error:.2g}; nothing was measured")


def time_table(settings: Settings, dtype: torch.dtype, ref: str) -> Table:
    spec = base_spec(settings, dtype, ref=ref)
    check(spec)
    problem, whole = LinearProblem(spec, DEVICE), replace(spec, step=None)
    sequences = _sharing(problem, whole)
    contestants, notes = usable(LINEAR_PEERS, problem)
    floor = BareGemms(problem)
    cases = [
        *cases_for(problem, [OURS]),
        *cases_for(sequences, [OURS], ", one step a response"),
        *cases_for(sequences, contestants),
        Case(FLOOR, floor),
    ]
    times = interleave(cases, settings.count(7), limit_s=settings.limit_s)
    table = Table(
        "",
        f"Linear route, {describe(spec)}, half prompt, trained head, "
        + ("reference included" if ref == "live" else "reference cached"),
        ["", "ms", "quartiles", "x sspo_ext", "sspo_ext x it"],
        notes=[
            "x sspo_ext: its time over ours, the median of per-round ratios; the last column is the inverse.",
            f"* Steps of {spec.step} tokens for sspo_ext; the peers have one step a response, all that Liger knows.",
            f"* The plan: {floor.plan}" + (f"; reference: {floor.ref_plan}." if floor.ref_plan else "."),
            *notes,
        ],
    )
    for case in cases:
        over = ratio(times, case.name, OURS.name)
        table.rows.append([case.name, *ms(times[case.name]), round(over, 3), round(1 / over, 3)])
    table.note_rounds(times)
    return table


def _sharing(problem: LinearProblem, spec: LinearSpec) -> LinearProblem:
    """The problem of `spec` on the tensors of `problem`."""
    other = LinearProblem.__new__(LinearProblem)
    other.__dict__ = {**problem.__dict__, **_layout_of(spec)}
    return other


def _layout_of(spec: LinearSpec) -> dict:
    """The fields that change with the steps of a problem. All other tensors stay those of the first problem."""
    small = LinearProblem(replace(spec, hidden=1), DEVICE)
    return {"spec": spec, "layout": small.layout, "pairs": small.pairs, "ref": small.ref, "targets": small.targets}


def frozen_table(settings: Settings) -> Table:
    table = Table(
        "",
        "Linear route: frozen head beside trained head, the same work (reference cached)",
        [
            "",
            "trained, ms",
            "quartiles",
            "frozen, ms",
            "quartiles",
            "frozen / trained",
            "GEMMs a row",
            "frozen / its bare GEMMs",
        ],
    )
    for dtype in (torch.float32, torch.bfloat16):
        trained = LinearProblem(base_spec(settings, dtype, ref="cached"), DEVICE)
        frozen = LinearProblem(base_spec(settings, dtype, ref="cached", head="frozen"), DEVICE)
        floor = BareGemms(frozen)
        cases = [*cases_for(trained, [OURS], " trained"), *cases_for(frozen, [OURS], " frozen"), Case(FLOOR, floor)]
        times = interleave(cases, settings.count(7), limit_s=settings.limit_s / 2)
        names = [case.name for case in cases]
        gemms = [BareGemms(p).plan.gemm_rows / floor.plan.num_rows for p in (trained, frozen)]
        table.rows.append(
            [short(dtype), *ms(times[names[0]]), *ms(times[names[1]]), round(ratio(times, names[1], names[0]), 3),
             f"{gemms[0]:.0f} and {gemms[1]:.0f}", round(ratio(times, names[1], FLOOR), 2)]
        )  # fmt: skip
        table.note_rounds(times)
    return table


def compare_table(
    settings: Settings, title: str, column: str, variants: dict[str, LinearSpec], contestants, rounds=5
) -> Table:
    """One row a variant: our milliseconds, our time over the bare GEMMs, then each contestant's time over ours."""
    columns = [column, "rows", "sspo_ext, ms", "quartiles", "/ bare GEMMs", *(f"{p.name}, x" for p in contestants)]
    table = Table("", title, columns, notes=["Contestants: their time over ours, medians of per-round ratios."])
    for label, spec in variants.items():
        problem = LinearProblem(spec, DEVICE)
        running, notes = usable(contestants, problem)
        table.notes += [note for note in notes if note not in table.notes]
        cases = [*cases_for(problem, [OURS, *running]), Case(FLOOR, BareGemms(problem))]
        times = interleave(cases, settings.count(rounds), limit_s=settings.limit_s / len(variants))
        others = [round(ratio(times, p.name, OURS.name), 2) if p in running else "-" for p in contestants]
        table.rows.append(
            [label, problem.layout.num_rows, *ms(times[OURS.name]), round(ratio(times, OURS.name, FLOOR), 2), *others]
        )
        table.note_rounds(times)
        del problem, cases
    return table


def mask_table(settings: Settings) -> Table:
    dtype = torch.bfloat16
    variants = {f"{m:.0%}": base_spec(settings, dtype, prompt=m, step=None) for m in (0.0, 0.5, 0.9)}
    title = f"Linear route, part of each sequence not scored: {describe(variants['0%'])}, reference included"
    return compare_table(settings, title, "not scored", variants, [LIGER, TORCH, TRL])


def steps_table(settings: Settings) -> Table:
    dtype = torch.bfloat16
    lengths = (1, 4, 16, 64, 256, 1024, 4096) if not settings.quick else (1, 4, 16)
    length = lengths[-1] + 1
    spec = LinearSpec(
        2, length, settings.size(256, 32), settings.size(32000, 997), dtype, prompt=1 / length, ref="cached"
    )
    variants = {str(step): replace(spec, step=step, chunk_bytes=settings.size(64 << 20, 64 << 10)) for step in lengths}
    title = f"Linear route, steps of 1 to {lengths[-1]} tokens: two responses of {lengths[-1]}, {describe(spec)}"
    table = compare_table(settings, title, "tokens a step", variants, [TORCH])
    table.notes.append(
        "* Budget 64 MiB: a pair of steps of 1024 or more does not fit in it and takes a fourth GEMM, in its floor too."
    )
    return table


def budgets_table(settings: Settings) -> Table:
    """Ours over the bare GEMMs with the same chunks, at three budgets of logits; the peers know no budget."""
    rows, step, dtype = settings.size(2048, 64), settings.size(32, 4), torch.bfloat16
    spec = replace(base_spec(settings, dtype, ref="cached"), length=rows // 4 + 1, prompt=0.0, step=step)
    check(spec)
    problem = LinearProblem(spec, DEVICE)
    whole = _sharing(problem, replace(spec, step=None))
    contestants, notes = usable([LIGER, TORCH, TRL], whole)
    table = Table(
        "",
        f"Linear route, budgets of logits: {problem.layout.num_rows} scored rows, H {spec.hidden}, V {spec.vocab}, "
        f"{short(dtype)}, trained head, reference cached",
        ["", "chunks", "ms", "quartiles", "/ bare GEMMs", *(f"{p.name}, x" for p in contestants)],
        notes=["Bare GEMMs: the same chunks, buffers that exist. Contestants: their time over ours.", *notes],
    )
    floors, cases = {}, cases_for(whole, contestants)
    for mib in (32, 128, 512) if not settings.quick else (0.02, 0.08, 0.32):
        own = _sharing(problem, replace(spec, chunk_bytes=int(mib * 2**20)))
        floors[mib] = BareGemms(own)
        cases += [*cases_for(own, [OURS], f", {mib} MiB"), Case(f"{FLOOR}, {mib} MiB", floors[mib])]
    times = interleave(cases, settings.count(5), limit_s=settings.limit_s)
    for mib, floor in floors.items():
        ours = f"{OURS.name}, {mib} MiB"
        others = [round(ratio(times, p.name, ours), 2) for p in contestants]
        table.rows.append(
            [ours, floor.plan.weight_chunks, *ms(times[ours]), round(ratio(times, ours, f"{FLOOR}, {mib} MiB"), 3),
             *others]
        )  # fmt: skip
    table.rows += [[p.name, "", *ms(times[p.name]), "", *[""] * len(contestants)] for p in contestants]
    table.note_rounds(times)
    malloc = " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_"))
    table.notes.append("* Freed memory: " + (f"kept by malloc ({malloc})." if malloc else "malloc's default."))
    return table


def weight_error_table(settings: Settings) -> Table:
    """The gradient of a bfloat16 head against float64, by how the products of its chunks are summed."""
    n, V, H, count = 32, settings.size(4096, 61), settings.size(256, 16), 64
    generator = torch.Generator().manual_seed(0)
    gradient, hidden = (torch.randn(count * n, size, generator=generator).bfloat16() for size in (V, H))
    truth = gradient.double().t() @ hidden.double()
    chunks = list(zip(gradient.split(n), hidden.split(n), strict=True))

    def rounded(dtype: torch.dtype) -> torch.Tensor:
        total = torch.zeros(V, H, dtype=dtype)
        for g, h in chunks:
            total += (g.t() @ h).to(dtype)
        return total

    def summed(pieces) -> torch.Tensor:
        total = torch.empty(V, H)
        for k, (g, h) in enumerate(pieces):
            add_product(total, g, h, k == 0)
        return total

    ways = {
        "one chunk, one product": gradient.t() @ hidden,
        f"{count} chunks, sspo_ext": summed(chunks),
        f"{count} chunks, each product rounded to bfloat16, sum in float32": rounded(torch.float32),
        f"{count} chunks, each product rounded to bfloat16, sum in bfloat16": rounded(torch.bfloat16),
    }
    table = Table(
        "",
        f"Gradient of a bfloat16 head, {count * n} rows, V {V}, H {H}: error against float64",
        ["", "root mean square error / that of the gradient", "x one chunk", "before the last rounding"],
        notes=["The gradient is delivered in bfloat16. The last column is the error of the sum before that."],
    )

    def error(value: torch.Tensor) -> float:
        return ((value.double() - truth).norm() / truth.norm()).item()

    one = error(ways["one chunk, one product"])
    for name, value in ways.items():
        delivered = error(value.bfloat16())
        before = "" if value.dtype == torch.bfloat16 else f"{error(value):.2g}"
        table.rows.append([name, f"{delivered:.3g}", f"{delivered / one:.3g}", before])
    return table


BUDGET = 32 << 20


def memory_table(settings: Settings) -> Table:
    dtype = torch.bfloat16
    totals = (8192, 16384, 32768) if not settings.quick else (64, 128)
    budget = settings.size(BUDGET, 64 << 10)
    contestants = {
        "sspo_ext, steps of 32": (OURS, {"step": 32}),
        "sspo_ext, one step a response": (OURS, {"step": None}),
        "sspo_ext, frozen head": (OURS, {"step": 32, "head": "frozen"}),
        **{p.name: (p, {"step": None}) for p in (LIGER, TORCH, TRL) if peers.reason(p) is None},
    }
    base = LinearSpec(
        2, 0, settings.size(256, 32), settings.size(32000, 997), dtype, prompt=0.0, ref="cached", chunk_bytes=budget
    )
    table = Table(
        "",
        f"Linear route: peak extra memory against tokens, H {base.hidden}, V {base.vocab}, {short(dtype)}, one pair of "
        f"responses, no prompt, reference cached, budget {budget / 2**20:.3g} MiB",
        ["", *(f"{total} tokens, MiB" for total in totals), *(f"{total}, less gradients" for total in totals)],
        notes=[
            "Rise of the process's peak resident memory over one step, each in a fresh process. 'Less gradients' "
            "leaves out those asked for (hidden: in proportion to the tokens; weight: constant): the method's own.",
        ],
    )
    for name, (peer, changes) in contestants.items():
        totals_mib, own_mib = [], []
        for total in totals:
            spec = replace(base, length=total // 2, **changes)
            try:
                extra = extra_peak_mib(peers.build_linear, peer.name, spec)
            except RuntimeError as error:
                table.notes.append(f"* {name}, {total} tokens: {error}.")
                totals_mib.append("-")
                own_mib.append("-")
                continue
            elements = (total + spec.vocab * (spec.head == "trained")) * spec.hidden
            gradients = elements * dtype.itemsize / 2**20
            totals_mib.append(round(extra, 1))
            own_mib.append(round(extra - gradients, 1))
        table.rows.append([name, *totals_mib, *own_mib])
    return table


def sweep_table(settings: Settings, axis: str) -> Table:
    """Time and memory against the length or the vocabulary, for the plots."""
    dtype = torch.bfloat16
    length, hidden, vocab = settings.size(1024, 32), settings.size(512, 32), settings.size(32000, 997)
    base = LinearSpec(2, length, hidden, vocab, dtype, step=None, chunk_bytes=64 << 20)
    if axis == "length":
        values = (256, 512, 1024, 2048, 4096) if not settings.quick else (16, 32)
        variants = {value: replace(base, length=value) for value in values}
    else:
        values = (8000, 32000, 64000, 128256, 256000) if not settings.quick else (500, 997)
        variants = {value: replace(base, length=settings.size(256, 16), vocab=value) for value in values}
    contestants = [OURS, LIGER, TORCH, TRL]
    contestants = [p for p in contestants if peers.reason(p) is None]
    table = Table(
        "",
        f"Linear route against {axis}: two sequences, half prompt, H {base.hidden}, "
        + (f"V {base.vocab}" if axis == "length" else f"length {next(iter(variants.values())).length}")
        + f", {short(dtype)}, reference included",
        [axis, *(f"{p.name}, ms" for p in contestants), *(f"{p.name}, MiB" for p in contestants)],
    )
    for value, spec in variants.items():
        problem = LinearProblem(spec, DEVICE)
        times = interleave(
            cases_for(problem, contestants), settings.count(5), limit_s=settings.limit_s / 2 / len(variants)
        )
        del problem
        memory = [round(extra_peak_mib(peers.build_linear, p.name, spec), 1) for p in contestants]
        table.rows.append([value, *(ms(times[p.name])[0] for p in contestants), *memory])
        table.note_rounds(times)
    return table


TABLES = {
    "linear-fp32": lambda settings: time_table(settings, torch.float32, "live"),
    "linear-bf16": lambda settings: time_table(settings, torch.bfloat16, "live"),
    "linear-cached-fp32": lambda settings: time_table(settings, torch.float32, "cached"),
    "linear-cached-bf16": lambda settings: time_table(settings, torch.bfloat16, "cached"),
    "linear-frozen": frozen_table,
    "linear-budgets": budgets_table,
    "linear-weight-error": weight_error_table,
    "linear-mask": mask_table,
    "linear-steps": steps_table,
    "linear-memory": memory_table,
    "linear-length": lambda settings: sweep_table(settings, "length"),
    "linear-vocabulary": lambda settings: sweep_table(settings, "vocabulary"),
}


def main(argv: list[str]) -> None:
    tables.run(TABLES, argv, __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
