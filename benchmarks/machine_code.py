"""What the Triton kernels compile to, read from the machine code: registers, spills, access widths, the main loop per
element.

    python -m benchmarks.machine_code [--arch 80 90 100 gfx942] [--kernel bwd] [--dtype bfloat16] [--all] [--json FILE]

Compiles ahead of time, without a GPU, the specialisations that the launchers can choose (--all; by default those that
differ in their main loop). The main loop is the innermost one that loads most bytes a pass; its instructions are
those of one thread, over the elements that the thread loads in a pass. From that and from published limits of the
machines follow what bounds the loop and the PREDICTED share of peak bandwidth: an upper bound from counting
instructions, not a measurement.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined: interpreted kernels do not compile

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import disassembly

ARCHS = ("80", "90", "100", "gfx942")
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Machine:
    name: str
    arch: str
    multiprocessors: int
    clock_ghz: float  # boost
    bandwidth_gbs: float


# NVIDIA's data sheets. A multiprocessor issues 128 lane-instructions and 16 special functions a clock, and holds 65536
# registers and 64 warps (CUDA C++ programming guide). Bandwidth * latency must be in flight; the latency is assumed.
MACHINES = (
    Machine("A100", "80", 108, 1.41, 2039),
    Machine("H100", "90", 132, 1.83, 3350),
    Machine("H200", "90", 132, 1.83, 4800),
    Machine("B200", "100", 148, 1.85, 8000),
)
ISSUED_PER_CLOCK, SPECIAL_PER_CLOCK, REGISTERS, WARPS, LATENCY_US = 128, 16, 65536, 64, 0.8


@dataclass(frozen=True)
class Specialisation:
    """A binary that a launcher can ask for."""

    kernel: str
    dtype: str
    facts: str  # what sets it apart
    fn: object
    constexprs: dict
    num_warps: int


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
    loads: dict[int, int]  # bytes wide -> instructions, global memory, whole kernel
    stores: dict[int, int]
    # the main loop, per pass of a thread; 0 elements if the kernel has none
    elements: int = 0
    loop_instructions: int = 0
    loop_special: int = 0
    loop_barriers: int = 0
    loop_shuffles: int = 0  # and accesses to shared memory
    loop_loads: dict[int, int] | None = None
    loop_stores: dict[int, int] | None = None
    predicted: dict[str, dict] | None = None  # by machine

    @property
    def instructions_per_element(self) -> float:
        return self.loop_instructions / self.elements if self.elements else float("nan")


def specialisations(warp: int = 32, every: bool = False) -> Iterator[Specialisation]:
    from sspo_ext.backends.triton import backward, forward, steps
    from sspo_ext.backends.triton._common import row_launch
    from sspo_ext.heads import PAIR_HEADS, head_id

    for dtype in POINTERS:
        for V in (128256, 1000) if every else (128256,):
            launch = row_launch(V, getattr(torch, dtype), warp)
            shape, num_warps = {"LANES": launch["LANES"], "VEC": launch["VEC"]}, launch["num_warps"]
            for softcap in (False, True):
                facts = (["softcap"] if softcap else []) + (["small V"] if V == 1000 else [])
                constexprs = {"SOFTCAP": softcap, **shape}
                fn = forward._token_logp_fwd_kernel
                yield Specialisation("token_logp_fwd", dtype, ", ".join(facts), fn, constexprs, num_warps)
                for aligned in (True, False):
                    for upstream in (True, False) if every else (True,):
                        more = [] if aligned else ["rows aligned otherwise"]
                        more += [] if upstream else ["no upstream"]
                        constexprs = {"SOFTCAP": softcap, "ALIGNED": aligned, "HAS_UPSTREAM": upstream, **shape}
                        fn = backward._token_logp_bwd_kernel
                        yield Specialisation(
                            "token_logp_bwd", dtype, ", ".join(facts + more), fn, constexprs, num_warps
                        )
    flags = ("HAS_WEIGHTS", "HAS_REF", "HAS_PAIR_WEIGHTS", "HAS_MARGINS", "HAS_LABELS")
    for head in PAIR_HEADS:
        # of a head's 32 combinations of optional inputs, all and none
        for given in (True, False) if every else (True,):
            facts = f"{head}, {'all inputs' if given else 'no optional input'}"
            constexprs = {"HEAD": head_id(head), "BLOCK": steps.BLOCK, **dict.fromkeys(flags, given)}
            yield Specialisation("step_loss_fwd", "float32", facts, steps._step_loss_fwd_kernel, constexprs, 1)


_POINTER_TYPES = {
    **dict.fromkeys(("rows_ptr", "labels_ptr"), "*i64"),
    **dict.fromkeys(("row_of_ptr", "arrived_ptr", "step_offsets_ptr", "pair_index_ptr"), "*i32"),
    **dict.fromkeys(("adj_offsets_ptr", "adj_pairs_ptr"), "*i32"),
    "lse_ptr": "*fp64",
}


def signature(spec: Specialisation) -> dict[str, str]:
    import triton.language as tl

    scalars = {tl.int64: "i64", tl.int32: "i32", tl.float32: "fp32", tl.constexpr: "constexpr"}
    types = {**_POINTER_TYPES, **dict.fromkeys(("logits_ptr", "out_ptr"), POINTERS[spec.dtype])}
    parameters = spec.fn.signature.parameters.items()
    return {name: scalars.get(p.annotation) or types.get(name, "*fp32") for name, p in parameters}


def read(spec: Specialisation, arch: str) -> Report:
    """Compiles one binary and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    options = {"num_warps": spec.num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(spec.fn, signature(spec), spec.constexprs), target=target, options=options)
    if amd:
        code = disassembly.amd(compiled.asm["amdgcn"])
    else:
        code = disassembly.nvidia(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")
    report = Report(
        spec.kernel, spec.dtype, spec.facts, arch, spec.num_warps,
        code.registers, compiled.metadata.shared, code.spills,
        disassembly.widths(code.instructions, "load"), disassembly.widths(code.instructions, "store"),
    )  # fmt: skip
    loop = code.main_loop()
    if loop is not None and spec.kernel.startswith("token_logp"):
        kinds = [instruction.kind for instruction in loop]
        report.loop_loads, report.loop_stores = disassembly.widths(loop, "load"), disassembly.widths(loop, "store")
        report.elements = _bytes(report.loop_loads) // getattr(torch, spec.dtype).itemsize
        report.loop_instructions, report.loop_special = len(loop), kinds.count("special")
        report.loop_barriers = kinds.count("barrier")
        report.loop_shuffles = kinds.count("shuffle") + kinds.count("shared")
        report.predicted = {m.name: predict(report, m) for m in MACHINES if m.arch == arch}
    return report


def _bytes(widths: dict[int, int]) -> int:
    return sum(width * count for width, count in widths.items())


def predict(report: Report, machine: Machine) -> dict[str, float | str]:
    """What bounds the main loop: the lowest of memory, issue slots and special functions, in elements a clock."""
    per_clock = machine.bandwidth_gbs / machine.clock_ghz / machine.multiprocessors  # bytes
    memory = per_clock * report.elements / (_bytes(report.loop_loads) + _bytes(report.loop_stores))
    limits = {
        "memory": memory,
        "issue": ISSUED_PER_CLOCK * report.elements / report.loop_instructions,
        "special": SPECIAL_PER_CLOCK * report.elements / max(report.loop_special, 1),
    }
    bound = min(limits, key=limits.get)
    threads = 32 * report.num_warps
    programs = min(REGISTERS // (-(-report.registers // 8) * 8 * threads), WARPS // report.num_warps)
    return {
        "bound": bound,
        "share_of_bandwidth": limits[bound] / memory,
        "issue_margin": limits["issue"] / memory,
        "special_margin": limits["special"] / memory,
        "kib_in_flight": programs * threads * _bytes(report.loop_loads) / 1024,
        "kib_needed": machine.bandwidth_gbs * 1e3 * LATENCY_US / machine.multiprocessors / 1024,
    }


def tables(reports: list[Report]) -> str:
    def pairs(widths: dict[int, int] | None) -> str:
        return ", ".join(f"{count} x {width} B" for width, count in (widths or {}).items()) or "-"

    lines = _head(
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
    lines += [
        "",
        f"PREDICTED, not measured. In flight: a multiprocessor's; needed: at a latency of {LATENCY_US} us.",
        "",
    ]
    lines += _head(
        "kernel", "dtype", "", "machine", "bound by", "of peak bandwidth", "issue slots / needed", "special / needed",
        "KiB in flight", "KiB needed",
    )  # fmt: skip
    for r in reports:
        for machine, p in (r.predicted or {}).items():
            margins = f"{p['share_of_bandwidth']:.2f} | {p['issue_margin']:.2f} | {p['special_margin']:.2f}"
            in_flight = f"{p['kib_in_flight']:.0f} | {p['kib_needed']:.0f}"
            lines.append(f"| {r.kernel} | {r.dtype} | {r.facts} | {machine} | {p['bound']} | {margins} | {in_flight} |")
    return "\n".join(lines)


def _head(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--dtype", nargs="+", default=list(POINTERS), choices=list(POINTERS))
    parser.add_argument("--all", action="store_true", help="every specialisation, not one for each main loop")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    reports = []
    for arch in args.arch:
        for spec in specialisations(64 if arch.startswith("gfx") else 32, args.all):
            if args.kernel in spec.kernel and spec.dtype in args.dtype:
                reports.append(read(spec, arch))
    print(tables(reports))
    if args.json:
        rows = [asdict(r) | {"instructions_per_element": r.instructions_per_element} for r in reports]
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
