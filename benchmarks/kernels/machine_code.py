# SPDX-License-Identifier: Apache-2.0
"""Machine code of the kernels: registers, spills, access widths, and the main loop's instructions per element.

    python -m benchmarks machine-code [--arch 80 90 100 gfx942] [--kernel bwd] [--dtype bfloat16] [--all] [--peers]
                                      [--cuda] [--out FOLDER] [--json FILE]

The kernels are compiled ahead of time, without a GPU. By default one specialisation is compiled for each main loop;
--all compiles every one that the launchers can choose. --cuda adds the CUDA C++ kernels, --peers the kernels of other
packages. The main loop is the innermost loop that loads the most bytes a pass. Instructions per element are those of
one thread over the elements that it loads. Together with published limits of the machines they tell what bounds the
loop, and give the PREDICTED share of peak bandwidth. That is an upper bound from counting, not a measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import records

from . import disassembly
from .bounds import bounds, bounds_table
from .record import ARCHS, POINTERS, PREDICTED, Report, add_loop, code_table, prediction_table, tables

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are defined: interpreted kernels do not compile


@dataclass(frozen=True)
class Specialisation:
    """A binary that a launcher can choose."""

    kernel: str
    dtype: str
    facts: str  # what sets it apart
    fn: Any  # made by triton.jit
    constexprs: dict
    num_warps: int


def specialisations(warp: int = 32, every: bool = False) -> Iterator[Specialisation]:
    """The specialisations of all kernels: one for each main loop, or every one.

    The kernels are imported here, since TRITON_INTERPRET must be unset before.
    """
    from sspo_ext.backends.triton.rows import row_launch
    from sspo_ext.backends.triton.step_loss_fwd import BLOCK, _step_loss_fwd_kernel
    from sspo_ext.backends.triton.token_logp_bwd import _token_logp_bwd_kernel
    from sspo_ext.backends.triton.token_logp_fwd import _token_logp_fwd_kernel
    from sspo_ext.formulas.registry import PAIR_FORMULAS, formula_id

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
    yield from _scaling(every)
    yield from _policy(every)
    flags = ("HAS_WEIGHTS", "HAS_REF", "HAS_PAIR_WEIGHTS", "HAS_MARGINS", "HAS_LABELS")
    for formula in PAIR_FORMULAS:
        # of a formula's 32 combinations of optional inputs, all and none
        for given in (True, False) if every else (True,):
            facts = f"{formula}, {'all inputs' if given else 'no optional input'}"
            constexprs = {"FORMULA": formula_id(formula), "BLOCK": BLOCK, **dict.fromkeys(flags, given)}
            yield Specialisation("step_loss_fwd", "float32", facts, _step_loss_fwd_kernel, constexprs, 1)


def _with_reductions(warp: int, every: bool) -> Iterator[Specialisation]:
    """The row kernels with entropy and sum of squares, without and with KL. With KL a loop loads from two tensors."""
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


def _scaling(every: bool) -> Iterator[Specialisation]:
    """The kernel that scales kept gradients."""
    from sspo_ext.backends.triton.scale_rows import _WARPS, _scale_rows_kernel

    for dtype in POINTERS:
        vec = 16 // getattr(torch, dtype).itemsize
        for aligned in (True, False) if every else (True,):
            constexprs = {"ALIGNED": aligned, "BLOCK": 32 * _WARPS * vec, "VEC": vec}
            facts = "" if aligned else "rows aligned otherwise"
            yield Specialisation("scale_rows", dtype, facts, _scale_rows_kernel, constexprs, _WARPS)


def _policy(every: bool) -> Iterator[Specialisation]:
    """The policy kernels: by default each formula at the longest level, with KL, entropy and old log-probs."""
    from sspo_ext.backends.triton.policy_constants import _policy_constants_kernel
    from sspo_ext.backends.triton.policy_loss_fwd import (
        BLOCK,
        MEAN,
        SUM,
        TOKENS,
        WARPS,
        _policy_loss_fwd_kernel,
    )  # fmt: skip
    from sspo_ext.formulas.policy import KL_ESTIMATORS, POLICY_FORMULAS

    for i, (name, definition) in enumerate(POLICY_FORMULAS.items()):
        ratio, last = definition.has_ratio, len(KL_ESTIMATORS) - 1
        levels = (TOKENS, MEAN, SUM) if ratio else (TOKENS,)
        for level in levels if every else levels[-1:]:
            for estimator in range(-1, last + 1) if every else (last,):
                for entropy in (False, True) if every else (True,):
                    facts = [name, ("token", "mean", "sum")[level]]
                    facts += [] if estimator < 0 else [f"k{estimator + 1}"]
                    constexprs = {"FORMULA": i, "HAS_RATIO": ratio, "HAS_OLD": ratio, "LEVEL": level, "BLOCK": BLOCK,
                                  "ESTIMATOR": estimator, "HAS_ENTROPY": entropy}  # fmt: skip
                    facts = ", ".join(facts + ["entropy"] * entropy)
                    yield Specialisation(
                        "policy_loss_fwd", "float32", facts, _policy_loss_fwd_kernel, constexprs, WARPS
                    )
    for norm in range(4) if every else (3,):
        flags = dict.fromkeys(("BY_STEP", "HAS_WEIGHTS", "HAS_THRESHOLD", "HAS_UNITS"), True)
        constexprs = {"NORM": norm, "BLOCK": BLOCK, **flags}
        facts = ("norm given", "norm of a tensor", "norm of rows", "norm of units")[norm]
        yield Specialisation("policy_constants", "float32", facts, _policy_constants_kernel, constexprs, WARPS)


_POINTER_TYPES = {
    **dict.fromkeys(("rows_ptr", "labels_ptr"), "*i64"),
    **dict.fromkeys(("row_of_ptr", "arrived_ptr", "step_offsets_ptr", "pair_index_ptr"), "*i32"),
    **dict.fromkeys(("adj_offsets_ptr", "adj_pairs_ptr", "offsets_ptr", "counters_ptr"), "*i32"),
    "step_of_row_ptr": "*i64",
    **dict.fromkeys(("lse_ptr", "ref_lse_ptr"), "*fp64"),
}


def signature(spec: Specialisation) -> dict[str, str]:
    import triton.language as tl

    scalars = {tl.int64: "i64", tl.int32: "i32", tl.float32: "fp32", tl.constexpr: "constexpr"}
    types = {
        **_POINTER_TYPES,
        **dict.fromkeys(("logits_ptr", "ref_logits_ptr", "out_ptr", "kept_ptr"), POINTERS[spec.dtype]),
    }
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
    if spec.kernel == "token_logp_fwd" and not amd:
        from sspo_ext.backends.triton import token_logp_fwd  # the module's attribute is the launcher

        options |= sys.modules[token_logp_fwd.__module__].registers(divmod(int(arch), 10))
    compiled = triton.compile(ASTSource(spec.fn, signature(spec), spec.constexprs), target=target, options=options)
    if amd:
        code = disassembly.amd(compiled.asm["amdgcn"])
    else:
        code = disassembly.nvidia(compiled.asm["cubin"])
    report = Report(
        spec.kernel, spec.dtype, spec.facts, arch, spec.num_warps,
        code.registers, compiled.metadata.shared, code.spills,
        disassembly.widths(code.instructions, "load"), disassembly.widths(code.instructions, "store"),
    )  # fmt: skip
    loop = code.main_loop()
    if loop is not None and spec.kernel.startswith(("token_logp", "row_reductions", "scale_rows")):
        add_loop(report, loop)
    return report


def load(path: Path) -> tuple[dict, list[Report]]:
    """(command and versions, from the first line; the reports)."""
    about, *rows = records.read(path)
    for row in rows:
        for name in ("loads", "stores", "loop_loads", "loop_stores"):
            # JSON keys are strings.
            row[name] = row[name] and {int(width): count for width, count in row[name].items()}
    return about, [Report(**row) for row in rows]


def write(folder: Path, ours: list[Report], cuda: list[Report], others: list[Report], command: str) -> None:
    """Writes machine-code.jsonl and machine-code.md."""
    from ..speed.measure import versions

    named = [replace(r, facts=", ".join(filter(None, ("Triton", r.facts)))) for r in ours]
    about, reports = {"command": command, "versions": versions()}, [*named, *cuda, *others]
    records.write(folder / "machine-code.jsonl", [about, *map(asdict, reports)])
    (folder / "machine-code.md").write_text(markdown(about, reports))


def markdown(about: dict, reports: list[Report]) -> str:
    named = [r for r in reports if r.facts.startswith("Triton")]
    ours = [replace(r, facts=r.facts.removeprefix("Triton").removeprefix(", ")) for r in named]
    cuda = [r for r in reports if r.facts.startswith("CUDA C++")]
    others = [r for r in reports if r not in named and r not in cuda]
    parts = [
        "# Machine code of the kernels, and what it predicts",
        f"`{about['command']}`",
        f"Compiled ahead of time on a machine without a GPU ({about['versions']}). Nothing here was measured on a GPU.",
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
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks machine-code", description=__doc__ and __doc__.splitlines()[0]
    )
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    parser.add_argument("--dtype", nargs="+", default=list(POINTERS), choices=list(POINTERS))
    parser.add_argument("--all", action="store_true", help="every specialisation, not only one for each main loop")
    parser.add_argument("--peers", action="store_true", help="also the kernels of Liger and TRL, where installed")
    parser.add_argument("--cuda", action="store_true", help="also the CUDA C++ kernels, compiled by nvcc")
    parser.add_argument("--out", type=Path, help="folder for machine-code.jsonl and .md")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    ours, cuda, others = [], [], []
    for arch in args.arch:
        for spec in specialisations(64 if arch.startswith("gfx") else 32, args.all):
            if args.kernel in spec.kernel and spec.dtype in args.dtype:
                ours.append(read(spec, arch))
    if args.cuda:
        from . import cuda_code

        archs = [arch for arch in args.arch if arch in cuda_code.ARCHS]
        cuda = [r for r in cuda_code.reports(archs, args.kernel) if r.dtype in args.dtype]
    if args.peers:
        from . import peer_code

        others = peer_code.reports(args.arch, args.dtype)
    print(tables([*ours, *cuda, *others]))
    if args.json:
        records.write(args.json, list(map(asdict, [*ours, *cuda, *others])))
    if args.out:
        flags = "".join(f" --{name}" for name in ("all", "peers", "cuda") if getattr(args, name))
        command = (
            f"python -m benchmarks machine-code --arch {' '.join(args.arch)} --dtype {' '.join(args.dtype)}{flags}"
        )
        write(args.out, ours, cuda, others, f"{command} --out FOLDER")


if __name__ == "__main__":
    main()
