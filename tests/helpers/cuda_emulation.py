# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels against the emulation: as the Python module sspo_ext._C_cuda, and as a program of checks
for the sanitizers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from helpers.paths import ROOT, TESTS

HERE = TESTS / "backends" / "cuda_emulation"
CSRC = ROOT / "csrc"
KERNELS = ("token_logp_fwd", "token_logp_bwd", "step_loss_fwd")
SANITIZERS = {  # unoptimised where instrumented: compiling is what takes time
    "none": ["-O1"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-g1", "-fsanitize=thread"],
}


def compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def why_not(sanitizer: str) -> str | None:
    """Why programs under this sanitizer ("none": any program) cannot be built and run here, or None."""
    if compiler() is None:
        return "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [compiler(), *SANITIZERS[sanitizer], str(source), "-o", f"{folder}/empty", "-pthread"]
        for step in (command, [f"{folder}/empty"]):
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                return f"-fsanitize={sanitizer}: {(done.stderr.strip() or 'fails').splitlines()[-1]}"
    return None


def run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{' '.join(map(str, command))}\n{done.stderr}"


def compile_objects(folder: Path, sanitizer: str, sources: list[Path], csrc: Path = CSRC, flags=()) -> list[Path]:
    """One object per source. csrc: where headers and kernels are, a changed copy for planted faults."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        options = [*SANITIZERS[sanitizer], "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        if source.name == "emulation.cpp" and sanitizer == "thread":
            # the scheduler is not what is tested, and its own accesses are no races
            options = [*options, "-fno-sanitize=thread", "-DEMULATION_TSAN"]
        includes = [f"-I{HERE}", f"-I{csrc}", f"-I{csrc / 'cuda'}"]
        target = folder / f"{source.stem}.o"
        run([compiler(), *options, *includes, *flags, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(compile_one, sources))


def link(target: Path, objects: list[Path], sanitizer: str, *flags: str) -> Path:
    run([compiler(), *SANITIZERS[sanitizer], *flags, *objects, "-o", target, "-pthread"])
    return target


def build_checks(folder: Path, sanitizer: str) -> Path:
    """The program of checks; its objects stay beside it."""
    sources = [CSRC / "cuda" / f"{name}.cu" for name in KERNELS]
    objects = compile_objects(folder, sanitizer, [*sources, HERE / "checks.cpp", HERE / "emulation.cpp"])
    return link(folder / "checks", objects, sanitizer)


def build_with_fault(folder: Path, sanitizer: str, sound: Path, file: str, old: str, new: str) -> Path:
    """The program of `sound` with `old` replaced by `new` in csrc/cuda/<file>."""
    changed = folder / "csrc"
    shutil.copytree(CSRC, changed, ignore=shutil.ignore_patterns("cpu"))
    text = (changed / "cuda" / file).read_text()
    assert old in text, f"{file} no longer has {old!r}: plant the fault elsewhere"
    (changed / "cuda" / file).write_text(text.replace(old, new, 1))
    affected = [name for name in KERNELS if file in (f"{name}.cu", "rows.cuh", "traits.cuh")]
    sources = [changed / "cuda" / f"{name}.cu" for name in affected]
    objects = compile_objects(folder, sanitizer, sources, changed, ["-Wno-unused-parameter", "-Wno-unused-variable"])
    kept = [path for path in sound.parent.glob("*.o") if path.stem not in affected]
    return link(folder / "checks", [*objects, *kept], sanitizer)


def build_module(folder: Path) -> ModuleType:
    """sspo_ext._C_cuda over the emulation, tensors being in host memory."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden"]
    sources = [CSRC / "cuda" / f"{name}.cu" for name in KERNELS]
    binding = CSRC / "cuda" / "binding.cpp"
    objects = compile_objects(folder, "none", [binding, *sources, HERE / "emulation.cpp"], flags=[*includes, "-g0"])
    target = link(folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", objects, "none", "-shared")
    spec = importlib.util.spec_from_file_location("_C_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
