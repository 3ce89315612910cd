# SPDX-License-Identifier: Apache-2.0
"""Bounds on the kernels' machine code, and whether each is met."""

from __future__ import annotations

from dataclasses import dataclass

from .record import Report

# Most instructions for a bfloat16 element in the main loop. With so many a Hopper GPU still keeps up with its memory.
MOST_INSTRUCTIONS = {"token_logp_fwd": 7.5, "token_logp_bwd": 6.0}


@dataclass
class Bound:
    demand: str
    report: Report
    got: str
    met: bool
    badness: float  # the largest is nearest to failing


def bounds(reports: list[Report], archs: tuple[str, ...] = ("90", "100")) -> list[Bound]:
    """Checks the kernels that are compiled for `archs`.

    No kernel may spill. The other bounds hold for the row kernels. Two cases have no bound on instructions: softcap,
    which computes a tanh, and logits whose rows lie differently in their 16 bytes than the gradient's. The table of
    predictions shows these.
    """
    found: list[Bound] = []
    for r in reports:
        if r.arch not in archs:
            continue
        found.append(Bound("no spills", r, str(r.spills), r.spills == 0, r.spills))
        if not r.kernel.startswith("token_logp"):
            continue
        inside = r.loop_barriers + r.loop_shuffles
        found.append(Bound("no barrier or shuffle in the main loop", r, str(inside), inside == 0, inside))
        if "aligned otherwise" in r.facts:
            continue
        widths = {*(r.loop_loads or {}), *(r.loop_stores or {})}
        got = ", ".join(f"{width} B" for width in sorted(widths))
        narrowest = min(widths, default=0)
        found.append(Bound("16-byte loads and stores in the main loop", r, got, narrowest >= 16, -narrowest))
        if "softcap" in r.facts:
            continue
        if r.dtype == "bfloat16":
            most, rate = MOST_INSTRUCTIONS[r.kernel], r.instructions_per_element
            demand = f"at most {most} instructions a bfloat16 element"
            found.append(Bound(demand, r, f"{rate:.2f}", rate <= most, rate))
        for machine, p in (r.predicted or {}).items():
            margin = min(p["issue_margin"], p["special_margin"])
            got = f"{p['bound']}; the next limit is {margin:.2f} times as far"
            found.append(Bound(f"predicted memory-bound on {machine}", r, got, p["bound"] == "memory", -margin))
            margin = p["kib_in_flight"] / p["kib_needed"]
            got = f"{p['kib_in_flight']:.0f} KiB a multiprocessor, {p['kib_needed']:.0f} needed"
            found.append(Bound(f"predicted bytes in flight on {machine}", r, got, margin >= 1, -margin))
    return found


def bounds_table(found: list[Bound]) -> str:
    """A line for each demand, kernel and architecture: how many specialisations meet it, and the worst one."""
    lines = ["| demand | kernel | arch | met by | worst |", "| --- | --- | --- | --- | --- |"]
    groups: dict[tuple[str, str, str], list[Bound]] = {}
    for bound in found:
        source = "CUDA C++" if "CUDA C++" in bound.report.facts else "Triton"
        groups.setdefault((bound.demand, f"{bound.report.kernel}, {source}", bound.report.arch), []).append(bound)
    for (demand, kernel, arch), members in sorted(groups.items(), key=lambda g: (*g[0][:2], g[0][2].zfill(6))):
        worst = max(members, key=lambda bound: (not bound.met, bound.badness))
        met = sum(bound.met for bound in members)
        lines.append(f"| {demand} | {kernel} | {arch} | {met} of {len(members)} | {worst.got} |")
    return "\n".join(lines)
