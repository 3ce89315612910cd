# SPDX-License-Identifier: Apache-2.0
"""Builds sspo_ext._C_cuda, the CUDA kernels. Part of setup.py; needs nothing of torch.

SSPO_BUILD_CUDA=0 (the default) leaves the module out: nvcc takes minutes, in which pip shows nothing, and on GPUs
Triton comes first. =1 builds the module or fails. =auto builds it where nvcc is found; where that fails it warns and
goes on.
The architectures are those of TORCH_CUDA_ARCH_LIST or a default; the GPU of the building machine does not matter.
The CUDA runtime is linked statically, so the module can be imported on machines without a GPU or a driver.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.errors import BaseError, CompileError, LinkError

KERNELS = ["csrc/cuda/token_logp_fwd.cu", "csrc/cuda/token_logp_bwd.cu", "csrc/cuda/step_loss_fwd.cu"]
BINDING = "csrc/cuda/binding.cpp"
# With ftz exp2f is one instruction. What it flushes to 0 is below 2^-126 of a row's sum.
FLAGS = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
# Code for 8.0 runs on A100 and the rest of its generation; H100 and B200 have their own; PTX serves later GPUs.
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
OLDEST = 80  # the first with maxima of bfloat16 pairs
_FAMILIES = {"ampere": "8.0;8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0;12.0"}


class CudaExtension(Extension):
    """An extension that `build` compiles with nvcc."""


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable, "/nonexistent"), "bin", "nvcc")
        if nvcc.exists():
            return str(nvcc)
    found = shutil.which("nvcc")
    if found is None and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    return found


def setting() -> str:
    """SSPO_BUILD_CUDA: "0", "1" or "auto"."""
    wanted = os.environ.get("SSPO_BUILD_CUDA", "").lower() or "0"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SSPO_BUILD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    return wanted


def extensions(skip_auto: bool = False) -> list[CudaExtension]:
    """[_C_cuda] if it is to be built. skip_auto: C++ modules are switched off, so only SSPO_BUILD_CUDA=1 builds it."""
    wanted = setting()
    if wanted == "0" or (wanted == "auto" and (skip_auto or find_nvcc() is None)):
        return []
    if find_nvcc() is None:
        raise SystemExit("SSPO_BUILD_CUDA=1: nvcc was found neither by CUDA_HOME nor on PATH")
    headers = [str(path) for path in [*Path("csrc/cuda").glob("*.*h"), Path("csrc/formulas_generated.h")]]
    return [CudaExtension("sspo_ext._C_cuda", sources=[*KERNELS, BINDING], depends=sorted(headers), language="c++")]


def architectures(nvcc: str) -> tuple[list[int], list[int]]:
    """(machine code, PTX) architectures, with 80 for 8.0. TORCH_CUDA_ARCH_LIST has torch's notation."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    names = re.split(r"[;,\s]+", asked.lower() or DEFAULT_ARCHITECTURES.lower())
    for family, expansion in _FAMILIES.items():
        names = [part for name in names for part in (expansion.split(";") if name == family else [name])]
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(digits) for digits in re.findall(r"compute_(\d+)", listed)}
    binary, ptx = set(), set()
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+ptx)?", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected numbers like 9.0 or 8.0+PTX, got {name!r}")
        number = 10 * int(match[1]) + int(match[2])
        if number < OLDEST:  # the list may name them for other extensions; these kernels do not run there
            continue
        if asked and number not in known:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {name} is not known to {nvcc}, which knows {sorted(known)}")
        if number in known:
            binary.add(number)
            ptx |= {number} if match[3] else set()
    if not binary:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST={asked!r} names no architecture from 8.0 on; SSPO_BUILD_CUDA=0 builds none"
        )
    if not asked:
        ptx = {max(binary)}  # an older nvcc may not know the default list's last
    return sorted(binary), sorted(ptx)


def compile_command(nvcc: str, source: str, target: str, binary: list[int], ptx: list[int]) -> list[str]:
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in binary]
    codes += [f"-gencode=arch=compute_{n},code=compute_{n}" for n in ptx]
    return [nvcc, *FLAGS, *codes, "-c", source, "-o", target]


def build(command, ext: CudaExtension) -> None:
    """Compiles and links `ext` for the build_ext `command`.

    On failure it exits with advice. With SSPO_BUILD_CUDA=auto it warns, and leaves the module out.
    """
    try:
        _build(command, ext)
    except (SystemExit, BaseError, CompileError, LinkError, OSError, subprocess.SubprocessError) as failure:
        if setting() != "auto":
            raise
        ext.optional = True  # build_ext then does not look for it
        warnings.warn(f"SSPO_BUILD_CUDA=auto: left the CUDA module out. {str(failure).strip()}", stacklevel=2)


def _build(command, ext: CudaExtension) -> None:
    import pybind11
    from setuptools.modified import newer_group

    target = Path(command.get_ext_fullpath(ext.name))
    if not command.force and not newer_group([*ext.sources, *ext.depends, __file__], str(target)):
        return
    target.unlink(missing_ok=True)  # an older module must not stay where this build fails
    nvcc = find_nvcc()
    binary, ptx = architectures(nvcc)
    folder = Path(command.build_temp, "cuda")
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    named = ";".join([*(f"sm_{n}" for n in binary), *(f"compute_{n}" for n in ptx)])

    def run(arguments: list[str]) -> None:
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            raise SystemExit(
                f"\nsspo_ext: the CUDA module {ext.name} could not be built: {' '.join(arguments)} failed, its "
                "messages stand above. nvcc 11.8 or later and a C++ compiler it accepts are needed. To install without "
                "the CUDA module (Triton is used on GPUs then), set the environment variable SSPO_BUILD_CUDA=0 and "
                "install again.\n"
            )

    def compile_kernels(source: str) -> list[str]:
        made = str(folder / (Path(source).stem + ".o"))
        run(compile_command(nvcc, source, made, binary, ptx))
        return [made]

    def compile_binding() -> list[str]:
        return command.compiler.compile(
            [BINDING],
            output_dir=command.build_temp,
            include_dirs=[pybind11.get_include()],
            macros=[("SSPO_CUDA_ARCHITECTURES", f'"{named}"')],
            extra_postargs=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
        )

    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        jobs = [pool.submit(compile_kernels, source) for source in KERNELS] + [pool.submit(compile_binding)]
        objects = [made for job in jobs for made in job.result()]
    run([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(target)])
