# SPDX-License-Identifier: Apache-2.0
"""Machine code of the CUDA C++ kernels, read as machine_code.py reads that of the Triton kernels.

nvcc compiles them for one architecture at a time, with the flags of the package's build.

    python -m benchmarks.kernels.cuda_code [--arch 80 90 100] [--kernel bwd]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from . import disassembly
from .record import Report, add_loop, tables

ROOT = Path(__file__).parents[2]

ARCHS = ("80", "90", "100")

THREADS = {"token_logp_fwd": 128, "token_logp_bwd": 128, "step_loss_fwd": 32}

_DTYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


def compiled(kernel: str, arch: str, folder: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    import build_cuda

    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        raise SystemExit("cuda_code: nvcc was not found, neither by CUDA_HOME nor on PATH")
    cubin = folder / f"{kernel}.{arch}.cubin"
    source = ROOT / "csrc" / "cuda" / f"{kernel}.cu"
    subprocess.run([nvcc, *build_cuda.FLAGS, f"-arch=sm_{arch}", "-cubin", source, "-o", cubin], check=True)
    return cubin


def reports(archs=ARCHS, kernel: str = "") -> list[Report]:
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            for name in THREADS:
                if kernel in name:
                    found = disassembly.nvidia_functions(compiled(name, arch, Path(folder)))
                    made += [
                        _report(name, mangled, code, arch) for mangled, code in found.items() if "_kernel" in mangled
                    ]
    return made


def _report(name: str, mangled: str, code: disassembly.Code, arch: str) -> Report:
    found = re.search(r"_kernelI(.+?)Lb([01])E", mangled)
    dtype = _DTYPES[found[1]] if found else "float32"
    softcap = bool(found) and found[2] == "1"
    report = Report(
        name, dtype, "CUDA C++" + (", softcap" if softcap else ""), arch, THREADS[name] // 32, code.registers,
        0, code.spills, disassembly.widths(code.instructions, "load"), disassembly.widths(code.instructions, "store"),
    )  # fmt: skip
    if name.startswith("token_logp"):
        add_loop(report, _main_loop(code))
    return report


def _main_loop(code: disassembly.Code) -> list[disassembly.Instruction]:
    """The loop over whole passes: of the loops with 16-byte accesses only, the one that loads the most bytes.

    The loop for rows that lie differently in their 16 bytes also accesses single elements.
    """

    def moved(loop) -> int:
        accesses = [i for i in loop if i.kind in ("load", "store")]
        loads = sum(i.width for i in accesses if i.kind == "load")
        return loads if accesses and all(i.width == 16 for i in accesses) else 0

    return max(code.loops(), key=moved)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.cuda_code", description=__doc__ and __doc__.splitlines()[0]
    )
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    args = parser.parse_args(argv)
    print(tables(reports(args.arch, args.kernel)))


if __name__ == "__main__":
    main()
