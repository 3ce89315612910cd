"""What the kernels compile to, read from the machine code: registers, spills, access widths, the main loop per element.

    python -m benchmarks machine-code [--arch 80 90 100 gfx942] [--kernel bwd] [--dtype bfloat16] [--all] [--peers]
                                      [--cuda] [--out FOLDER] [--json FILE]

Compiles ahead of time, without a GPU, the specialisations that the launchers can choose (--all; by default those that
differ in their main loop), with --cuda the CUDA C++ kernels too, with --peers other packages' kernels. The main loop is
the innermost one that loads most bytes a pass; its instructions are those of one thread, over the elements that the
thread loads in a pass. From that and from published limits of the machines follow what bounds the loop and the
PREDICTED share of peak bandwidth: an upper bound from counting instructions, not a measurement.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined: interpreted kernels do not compile

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import disassembly
from benchmarks.bounds import bounds, bounds_table

ARCHS = ("80", "90", "100", "gfx942")
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Machine:
    name: str
    arch: str
    multiprocessors: int
    clock_ghz: float  # boost
    bandwidth_gbs: float
    # of one multiprocessor: lane-instructions and special functions a clock, 4-byte registers, warps that it holds
    issued_per_clock: int = 128
    special_per_clock: int = 16
    registers: int = 65536
    warps: int = 64
    warp: int = 32


# Makers' data sheets, and their programming guides for what a multiprocessor does and holds.
MACHINES = (
    Machine("A100", "80", 108, 1.41, 2039),
    Machine("H100", "90", 132, 1.83, 3350),
    Machine("H200", "90", 132, 1.83, 4800),
    Machine("B200", "100", 148, 1.85, 8000),
    Machine("MI300X", "gfx942", 304, 2.1, 5300, 64, 16, 131072, 32, 64),
)
# Assumed, not published: from a load's issue to its data under load. Bandwidth * latency must be in flight.
LATENCY_US = 0.8


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
    loop_bytes_in_flight: int = 0  # most that one thread has asked for and not waited for
    predicted: dict[str, dict] | None = None  # by machine

    @property
    def instructions_per_element(self) -> float:
        return self.loop_instructions / self.elements if self.elements else float("nan")


def specialisations(warp: int = 32, every: bool = False) -> Iterator[Specialisation]:
    from sspo_ext.backends.triton.rows import row_launch
    from sspo_ext.backends.triton.step_loss_fwd import BLOCK, _step_loss_fwd_kernel
    from sspo_ext.backends.triton.token_logp_bwd import _token_logp_bwd_kernel
    from sspo_ext.backends.triton.token_logp_fwd import _token_logp_fwd_kernel
    from sspo_ext.heads import PAIR_HEADS, head_id

    for dtype in POINTERS:
        for V in (128256, 1000) if every else (128256,):
            launch = row_launch(V, getattr(torch, dtype), warp)
            shape, num_warps = {"LANES": launch["LANES"], "VEC": launch["VEC"]}, launch["num_warps"]
            for softcap in (False, True):
                facts = (["softcap"] if softcap else []) + (["small V"] if V == 1000 else [])
                constexprs = {"SOFTCAP": softcap, **shape}
                fn = _token_logp_fwd_kernel
                yield Specialisation("token_logp_fwd", dtype, ", ".join(facts), fn, constexprs, num_warps)
                for aligned in (True, False):
                    for upstream in (True, False) if every else (True,):
                        more = [] if aligned else ["rows aligned otherwise"]
                        more += [] if upstream else ["no upstream"]
                        constexprs = {"SOFTCAP": softcap, "ALIGNED": aligned, "HAS_UPSTREAM": upstream, **shape}
                        fn = _token_logp_bwd_kernel
                        yield Specialisation(
                            "token_logp_bwd", dtype, ", ".join(facts + more), fn, constexprs, num_warps
                        )
    yield from _with_reductions(warp, every)
    flags = ("HAS_WEIGHTS", "HAS_REF", "HAS_PAIR_WEIGHTS", "HAS_MARGINS", "HAS_LABELS")
    for head in PAIR_HEADS:
        # of a head's 32 combinations of optional inputs, all and none
        for given in (True, False) if every else (True,):
            facts = f"{head}, {'all inputs' if given else 'no optional input'}"
            constexprs = {"FORMULA": head_id(head), "BLOCK": BLOCK, **dict.fromkeys(flags, given)}
            yield Specialisation("step_loss_fwd", "float32", facts, _step_loss_fwd_kernel, constexprs, 1)


def _with_reductions(warp: int, every: bool) -> Iterator[Specialisation]:
    """The row kernels with entropy and sum of squares, and with KL too: a loop then loads both tensors' elements."""
    from sspo_ext.backends.triton.row_reductions_bwd import _row_reductions_bwd_kernel
    from sspo_ext.backends.triton.row_reductions_fwd import _row_reductions_fwd_kernel
    from sspo_ext.backends.triton.rows import row_launch

    for dtype in POINTERS:
        launch = row_launch(128256, getattr(torch, dtype), warp)
        shape, num_warps = {"LANES": launch["LANES"], "VEC": launch["VEC"]}, launch["num_warps"]
        for softcap in (False, True):
            for ref in (False, True):
                for aligned in (True, False) if every else (True,):
                    facts = (["softcap"] if softcap else []) + (["KL"] if ref else [])
                    facts = ", ".join(facts + ([] if aligned else ["rows aligned otherwise"]))
                    constexprs = {"SOFTCAP": softcap, "HAS_REF": ref, "REF_ALIGNED": aligned, **shape}
                    fn = _row_reductions_fwd_kernel
                    yield Specialisation("row_reductions_fwd", dtype, facts, fn, constexprs, num_warps)
                    fn = _row_reductions_bwd_kernel
                    constexprs = {"ALIGNED": aligned, **constexprs}
                    yield Specialisation("row_reductions_bwd", dtype, facts, fn, constexprs, num_warps)


_POINTER_TYPES = {
    **dict.fromkeys(("rows_ptr", "labels_ptr"), "*i64"),
    **dict.fromkeys(("row_of_ptr", "arrived_ptr", "step_offsets_ptr", "pair_index_ptr"), "*i32"),
    **dict.fromkeys(("adj_offsets_ptr", "adj_pairs_ptr"), "*i32"),
    **dict.fromkeys(("lse_ptr", "ref_lse_ptr"), "*fp64"),
}


def signature(spec: Specialisation) -> dict[str, str]:
    import triton.language as tl

    scalars = {tl.int64: "i64", tl.int32: "i32", tl.float32: "fp32", tl.constexpr: "constexpr"}
    types = {**_POINTER_TYPES, **dict.fromkeys(("logits_ptr", "ref_logits_ptr", "out_ptr"), POINTERS[spec.dtype])}
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
    if loop is not None and spec.kernel.startswith(("token_logp", "row_reductions")):
        add_loop(report, loop)
    return report


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


def _bytes(widths: dict[int, int]) -> int:
    return sum(width * count for width, count in widths.items())


def predict(report: Report, machine: Machine) -> dict[str, float | str]:
    """What bounds the main loop: the lowest of memory, issue slots and special functions, in elements a clock."""
    per_clock = machine.bandwidth_gbs / machine.clock_ghz / machine.multiprocessors  # bytes
    memory = per_clock * report.elements / (_bytes(report.loop_loads) + _bytes(report.loop_stores))
    limits = {
        "memory": memory,
        "issue": machine.issued_per_clock * report.elements / report.loop_instructions,
        "special": machine.special_per_clock * report.elements / max(report.loop_special, 1),
    }
    bound = min(limits, key=limits.get)
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
    return "\n".join(lines)


def prediction_table(reports: list[Report]) -> str:
    lines = _head(
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


def _json(reports: list[Report]) -> str:
    rows = [asdict(r) | {"instructions_per_element": r.instructions_per_element} for r in reports]
    return json.dumps(rows, indent=1) + "\n"


def write(folder: Path, ours: list[Report], cuda: list[Report], others: list[Report], command: str) -> None:
    """machine-code.json and machine-code.md."""
    from benchmarks.measure import versions

    folder.mkdir(parents=True, exist_ok=True)
    named = [replace(r, facts=", ".join(filter(None, ("Triton", r.facts)))) for r in ours]
    (folder / "machine-code.json").write_text(_json([*named, *cuda, *others]))
    parts = [
        "# Machine code of the kernels, and what it predicts",
        f"`{command}`",
        f"Compiled ahead of time on a machine without a GPU ({versions()}). Nothing here was measured on a GPU.",
        "## Bounds",
        bounds_table(bounds([*named, *cuda])),
        "## Ours, Triton: what the code is",
        'Main loops of the row kernels. "Rows aligned otherwise": logits that are a slice, so that a row of them lies '
        "differently in its 16 bytes than its gradient does. The step kernel has no loop over the vocabulary.",
        code_table(ours),
    ]
    if cuda:
        parts += ["## Ours, CUDA C++: what the code is", code_table(cuda)]
    if others:
        parts += [
            "## Peers: what the code is",
            "Compiled by their own launch code, with their own settings. A kernel with two loops over the vocabulary "
            "has two lines. Where n columns are known to be divisible by 16, loads are wide; 50257 is not.",
            code_table(others),
        ]
    parts += ["## Predictions, all kernels", PREDICTED, prediction_table([*named, *cuda, *others])]
    (folder / "machine-code.md").write_text("\n\n".join(parts) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks machine-code", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--dtype", nargs="+", default=list(POINTERS), choices=list(POINTERS))
    parser.add_argument("--all", action="store_true", help="every specialisation, not one for each main loop")
    parser.add_argument("--peers", action="store_true", help="the kernels of Liger and TRL too, where installed")
    parser.add_argument("--cuda", action="store_true", help="the CUDA C++ kernels too, where nvcc is found")
    parser.add_argument("--out", type=Path, help="folder for machine-code.json and .md")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    ours, cuda, others = [], [], []
    for arch in args.arch:
        for spec in specialisations(64 if arch.startswith("gfx") else 32, args.all):
            if args.kernel in spec.kernel and spec.dtype in args.dtype:
                ours.append(read(spec, arch))
    if args.cuda:
        from benchmarks import cuda_code

        archs = [arch for arch in args.arch if arch in cuda_code.ARCHS]
        cuda = [r for r in cuda_code.reports(archs, args.kernel) if r.dtype in args.dtype]
    if args.peers:
        from benchmarks import peer_code

        others = peer_code.reports(args.arch, args.dtype)
    print(tables([*ours, *cuda, *others]))
    if args.json:
        args.json.write_text(_json([*ours, *cuda, *others]))
    if args.out:
        flags = "".join(f" --{name}" for name in ("all", "peers", "cuda") if getattr(args, name))
        command = (
            f"python -m benchmarks machine-code --arch {' '.join(args.arch)} --dtype {' '.join(args.dtype)}{flags}"
        )
        write(args.out, ours, cuda, others, f"{command} --out FOLDER")


if __name__ == "__main__":
    main()
