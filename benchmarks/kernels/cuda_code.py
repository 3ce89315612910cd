"""The CUDA C++ kernels in the table of machine_code.py: compiled by nvcc for one architecture at a time with
the flags of the package's build, and read the same way.

    python -m benchmarks.kernels.cuda_code [--arch 80 90 100] [--kernel bwd]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

from . import disassembly
from .record import Report, add_loop, tables

ROOT = Path(__file__).parents[2]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

ARCHS = ("80", "90", "100")

THREADS = {"token_logp_fwd": 128, "token_logp_bwd": 128, "step_loss_fwd": 32}

_DTYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


def compiled(kernel: str, arch: str, folder: Path) -> Path:
    sys.path.insert(0, str(ROOT))
    import build_cuda

    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        raise SystemExit("cuda_code: nvcc was found neither by CUDA_HOME nor on PATH")
    cubin = folder / f"{kernel}.{arch}.cubin"
    source = ROOT / "csrc" / "cuda" / f"{kernel}.cu"
    subprocess.run([nvcc, *build_cuda.FLAGS, f"-arch=sm_{arch}", "-cubin", source, "-o", cubin], check=True)
    return cubin


def functions(cubin: Path) -> dict[str, disassembly.Code]:
    """Mangled name -> machine code, of every kernel in a cubin, without the functions it calls."""

    def run(*command: str) -> str:
        return subprocess.run(
            [TOOLS / command[0], *command[1:], cubin], capture_output=True, text=True, check=True
        ).stdout

    usage = dict(re.findall(r"Function (\w+):\s*REG:(\d+)", run("cuobjdump", "--dump-resource-usage")))
    found: dict[str, disassembly.Code] = {}
    code = None
    for line in run("nvdisasm", "-c").splitlines():
        if section := re.match(r"^\s*\.section\s+\.text\.(\w+)", line):
            code = disassembly.Code([], {}, int(usage.get(section[1], 0)), 0)
            found[section[1]] = code
        elif code is not None and (label := re.match(r"^(\.L_x_\d+):", line)):
            code.labels[label[1]] = len(code.instructions)
        elif code is not None and (
            found_one := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line)
        ):
            target = re.search(r"`\((\.L_x_\d+)\)", found_one[2])
            code.instructions.append(disassembly.nvidia_instruction(found_one[1], found_one[2], target and target[1]))
    for code in found.values():
        code.spills = sum(i.kind == "spill" for i in code.instructions)
    return {name: code for name, code in found.items() if name in usage and "_kernel" in name}


def reports(archs=ARCHS, kernel: str = "") -> list[Report]:
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            for name in THREADS:
                if kernel in name:
                    for mangled, code in functions(compiled(name, arch, Path(folder))).items():
                        made += _reports_of(name, mangled, code, arch)
    return made


def _reports_of(name: str, mangled: str, code: disassembly.Code, arch: str) -> list[Report]:
    found = re.search(r"_kernelI(.+?)Lb([01])E", mangled)
    dtype = _DTYPES[found[1]] if found else "float32"
    softcap = bool(found) and found[2] == "1"
    report = Report(
        name, dtype, "CUDA C++" + (", softcap" if softcap else ""), arch, THREADS[name] // 32, code.registers,
        0, code.spills, disassembly.widths(code.instructions, "load"), disassembly.widths(code.instructions, "store"),
    )  # fmt: skip
    if name.startswith("token_logp"):
        add_loop(report, _main_loop(code))
    return [report]


def _main_loop(code: disassembly.Code) -> list[disassembly.Instruction]:
    """The loop over whole passes: the one that moves most bytes in accesses of 16 bytes alone. (The loop for rows that
    lie otherwise in their 16 bytes has single elements in it too.)
    """

    def moved(loop) -> int:
        accesses = [i for i in loop if i.kind in ("load", "store")]
        loads = sum(i.width for i in accesses if i.kind == "load")
        return loads if accesses and all(i.width == 16 for i in accesses) else 0

    return max(code.loops(), key=moved)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.cuda_code", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS)
    parser.add_argument("--kernel", default="", help="part of a kernel's name")
    args = parser.parse_args(argv)
    print(tables(reports(args.arch, args.kernel)))


if __name__ == "__main__":
    main()
