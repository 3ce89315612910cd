# SPDX-License-Identifier: Apache-2.0
"""The report on one compiled kernel, what it predicts for each machine, and tables of reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import disassembly

ARCHS = ("80", "90", "100", "gfx942")

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Machine:
    name: str
    arch: str
    multiprocessors: int
    clock_ghz: float  # boost
    bandwidth_gbs: float
    # Of one multiprocessor: instructions (lanes) and special functions a clock, 4-byte registers, resident warps.
    issued_per_clock: int = 128
    special_per_clock: int = 16
    registers: int = 65536
    warps: int = 64
    warp: int = 32


# From the makers' data sheets, and from their programming guides for the limits of a multiprocessor.
MACHINES = (
    Machine("A100", "80", 108, 1.41, 2039),
    Machine("H100", "90", 132, 1.83, 3350),
    Machine("H200", "90", 132, 1.83, 4800),
    Machine("B200", "100", 148, 1.85, 8000),
    Machine("MI300X", "gfx942", 304, 2.1, 5300, 64, 16, 131072, 32, 64),
)

# Assumed, not published: time from a load to its data, on a busy machine. Bandwidth * latency must be in flight.
LATENCY_US = 0.8


@dataclass
class Report:
    kernel: str
    dtype: str
    facts: str
    arch: str
    num_warps: int
    registers: int
    shared_bytes: int
    spills: int
    loads: dict[int, int]  # width in bytes -> number of loads from global memory, in the whole kernel
    stores: dict[int, int]
    # The main loop, for one pass of a thread. 0 elements if the kernel has no main loop.
    elements: int = 0
    loop_instructions: int = 0
    loop_special: int = 0
    loop_barriers: int = 0
    loop_shuffles: int = 0  # with accesses to shared memory
    loop_loads: dict[int, int] | None = None
    loop_stores: dict[int, int] | None = None
    loop_bytes_in_flight: int = 0  # most of one thread at once
    predicted: dict[str, dict] | None = None  # by name of the machine

    @property
    def instructions_per_element(self) -> float:
        return self.loop_instructions / self.elements if self.elements else float("nan")


def add_loop(report: Report, loop: list[disassembly.Instruction]) -> None:
    kinds = [instruction.kind for instruction in loop]
    report.loop_loads, report.loop_stores = disassembly.widths(loop, "load"), disassembly.widths(loop, "store")
    report.elements = _bytes(report.loop_loads) // getattr(torch, report.dtype).itemsize
    report.loop_instructions, report.loop_special = len(loop), kinds.count("special")
    report.loop_barriers = kinds.count("barrier")
    report.loop_shuffles = kinds.count("shuffle") + kinds.count("shared")
    report.loop_bytes_in_flight = disassembly.bytes_in_flight(loop)
    if report.elements:
        report.predicted = {m.name: predict(report, m) for m in MACHINES if m.arch == report.arch}


def _bytes(widths: dict[int, int] | None) -> int:
    return sum(width * count for width, count in (widths or {}).items())


def predict(report: Report, machine: Machine) -> dict:
    """What bounds the main loop: memory, issue slots or special functions, by the fewest elements a clock."""
    per_clock = machine.bandwidth_gbs / machine.clock_ghz / machine.multiprocessors  # bytes
    memory = per_clock * report.elements / (_bytes(report.loop_loads) + _bytes(report.loop_stores))
    limits = {
        "memory": memory,
        "issue": machine.issued_per_clock * report.elements / report.loop_instructions,
        "special": machine.special_per_clock * report.elements / max(report.loop_special, 1),
    }
    bound = min(limits, key=lambda name: limits[name])
    threads = machine.warp * report.num_warps
    by_registers = machine.registers // (-(-report.registers // 8) * 8 * threads)
    programs = min(by_registers, machine.warps // report.num_warps)
    return {
        "bound": bound,
        "share_of_bandwidth": limits[bound] / memory,
        "issue_margin": limits["issue"] / memory,
        "special_margin": limits["special"] / memory,
        "kib_in_flight": programs * threads * report.loop_bytes_in_flight / 1024,
        "kib_needed": machine.bandwidth_gbs * 1e3 * LATENCY_US / machine.multiprocessors / 1024,
    }


def tables(reports: list[Report]) -> str:
    return f"{code_table(reports)}\n\n{PREDICTED}\n\n{prediction_table(reports)}"


PREDICTED = (
    "PREDICTED from the machine code and data sheets, measured on no GPU. In flight: of one multiprocessor, the "
    f"programs that its registers and warps allow times what a thread has asked for; needed: at {LATENCY_US} us."
)


def code_table(reports: list[Report]) -> str:
    def pairs(widths: dict[int, int] | None) -> str:
        return ", ".join(f"{count} x {width} B" for width, count in (widths or {}).items()) or "-"

    lines = _header(
        "kernel", "dtype", "", "arch", "registers", "spills", "loop loads", "loop stores", "elements",
        "instructions/el", "special/el", "barriers", "shuffles",
    )  # fmt: skip
    for r in reports:
        special = f"{r.loop_special / r.elements:.2f}" if r.elements else "-"
        rate = f"{r.instructions_per_element:.2f}" if r.elements else "-"
        lines.append(
            f"| {r.kernel} | {r.dtype} | {r.facts} | {r.arch} | {r.registers} | {r.spills} | {pairs(r.loop_loads)} | "
            f"{pairs(r.loop_stores)} | {r.elements} | {rate} | {special} | {r.loop_barriers} | {r.loop_shuffles} |"
        )
    return "\n".join(lines)


def prediction_table(reports: list[Report]) -> str:
    lines = _header(
        "kernel", "dtype", "", "machine", "bound by", "of peak bandwidth", "issue slots / needed", "special / needed",
        "KiB in flight", "KiB needed",
    )  # fmt: skip
    for r in reports:
        for machine, p in (r.predicted or {}).items():
            margins = f"{p['share_of_bandwidth']:.2f} | {p['issue_margin']:.2f} | {p['special_margin']:.2f}"
            in_flight = f"{p['kib_in_flight']:.0f} | {p['kib_needed']:.0f}"
            lines.append(f"| {r.kernel} | {r.dtype} | {r.facts} | {machine} | {p['bound']} | {margins} | {in_flight} |")
    return "\n".join(lines)


def _header(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
