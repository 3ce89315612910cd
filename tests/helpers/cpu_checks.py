# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/cpu under a sanitizer: as the program of checks in tests/backends/cpu_sanitizers, and as sspo_ext._C."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

from helpers.cuda_emulation import CSRC, compile_objects, compiler, link
from helpers.paths import TESTS

CHECKS = TESTS / "backends" / "cpu_sanitizers"
FLAGS = ["-ffp-contract=fast", "-Wno-psabi", "-Wno-maybe-uninitialized"]
# file of csrc/cpu/isa -> flags, as setup.py has them
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    ISAS["avx512_bf16"] = ISAS["avx512"]
PLAIN = ("dispatch.cpp", "step_loss.cpp")


def compile_csrc(
    folder: Path, sanitizer: str, csrc: Path = CSRC, only: tuple[str, ...] = (), more: tuple[str, ...] = ()
) -> list[Path]:
    """The objects of csrc/cpu but the binding's, or of the named sources."""
    cpu = csrc / "cpu"
    jobs = [(cpu / "isa" / f"{isa}.cpp", flags) for isa, flags in ISAS.items()] + [(cpu / name, []) for name in PLAIN]
    jobs = [(source, flags) for source, flags in jobs if not only or source.name in only]
    return [
        compiled
        for source, flags in jobs
        for compiled in compile_objects(folder, sanitizer, [source], csrc, [f"-I{cpu}", *FLAGS, *flags, *more])
    ]


def build_checks(folder: Path, sanitizer: str) -> Path:
    """The program of checks; its objects stay beside it."""
    own = [CHECKS / f"{name}.cpp" for name in ("checks", "bad_input", "product")]
    objects = compile_objects(folder, sanitizer, own, flags=[f"-I{CSRC / 'cpu'}", *FLAGS])
    return link(folder / "checks", [*objects, *compile_csrc(folder, sanitizer)], sanitizer)


def build_with_fault(folder: Path, sanitizer: str, sound: Path, file: str, old: str, new: str) -> Path:
    """The program of `sound` with `old` replaced by `new` in csrc/cpu/<file>; of a header in the baseline alone."""
    changed = folder / "csrc"
    shutil.copytree(CSRC, changed, ignore=shutil.ignore_patterns("cuda"))
    text = (changed / "cpu" / file).read_text()
    assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times: plant the fault elsewhere"
    (changed / "cpu" / file).write_text(text.replace(old, new))
    unused = ("-Wno-unused-parameter", "-Wno-unused-variable", "-Wno-unused-but-set-variable", "-Wno-unused-function")
    source = Path(file).name if file.endswith(".cpp") else "baseline.cpp"
    (objects,) = compile_csrc(folder, sanitizer, changed, (source,), unused)
    kept = [path for path in sound.parent.glob("*.o") if path.stem != objects.stem]
    return link(folder / "checks", [objects, *kept], sanitizer)


def build_module(folder: Path) -> Path:
    """sspo_ext._C under AddressSanitizer and UndefinedBehaviorSanitizer."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{CSRC / 'cpu'}"]
    binding = compile_objects(
        folder, "address", [CSRC / "cpu" / "binding.cpp"], flags=[*includes, "-fvisibility=hidden"]
    )
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return link(target, [*binding, *compile_csrc(folder, "address")], "address", "-shared")


def runtime_libraries() -> list[str] | None:
    """What a Python that was built without sanitizers must load first, or None where it is not found."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [str(compiler()), f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return found if all(Path(path).is_absolute() for path in found) else None
