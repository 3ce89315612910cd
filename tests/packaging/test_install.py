# SPDX-License-Identifier: Apache-2.0
"""`pip install .` with and without nvcc: what the wheel holds, and what `sspo-ext info` then says.

About two minutes of CPU time, so not among the default tests; the kernels are compiled for one architecture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
build_cuda = pytest.importorskip("build_cuda", reason="not a checkout of the repository")
needs_nvcc = pytest.mark.skipif(build_cuda.find_nvcc() is None, reason="no nvcc")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")

# Python runs this before a build starts: nvcc is nowhere, whatever this machine has in /usr/local
NO_NVCC = """
import pathlib, shutil

exists, which = pathlib.Path.exists, shutil.which
pathlib.Path.exists = lambda self, **options: self.name != "nvcc" and exists(self, **options)
shutil.which = lambda command, *args, **options: None if command == "nvcc" else which(command, *args, **options)
"""


def pip(source, folder, *, nvcc=True, **environment) -> subprocess.CompletedProcess:
    """`pip wheel .`, then the wheel into folder/site."""
    names = ("SSPO_BUILD_CUDA", "SSPO_BUILD_CPP", "TORCH_CUDA_ARCH_LIST", "CFLAGS", "CXXFLAGS")
    env = {k: v for k, v in os.environ.items() if k not in names} | environment
    if not nvcc:
        (folder / "hide").mkdir()
        (folder / "hide" / "sitecustomize.py").write_text(NO_NVCC)
        env["PYTHONPATH"] = os.pathsep.join([str(folder / "hide"), env.get("PYTHONPATH", "")])
        env["PATH"] = os.pathsep.join(p for p in env["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    shutil.rmtree(source / "build", ignore_errors=True)
    return done


def installed(folder: Path) -> tuple[set[str], str]:
    """Compiled modules in the wheel, and what `sspo-ext info` says with nothing but the wheel's package on the path."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder / "site")
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".cuh", ".h", ".o")) or n.startswith(("tests", "csrc"))]
    assert {"sspo_ext/py.typed", "sspo_ext/backends/cuda.py", "sspo_ext/backends/triton/token_logp_fwd.py"} <= set(
        names
    )
    modules = {re.match(r"sspo_ext/(\w+)\.", n)[1] for n in names if n.endswith(".so")}
    env = os.environ | {"PYTHONPATH": str(folder / "site")}
    script = "import sspo_ext; print(sspo_ext.__file__)\nfrom sspo_ext.cli.main import main\nmain(['info'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(str(folder)), done.stdout + done.stderr
    return modules, done.stdout


@pytest.fixture
def failing_nvcc(tmp_path):
    """CUDA_HOME of an nvcc that fails, and the file that tells that it ran."""
    home, ran = tmp_path / "cuda", tmp_path / "ran"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
    nvcc.chmod(0o755)
    return str(home), ran


@needs_compiler
def test_by_default_nvcc_is_left_alone(source, tmp_path, failing_nvcc):
    """It takes minutes, in which pip shows nothing. Nor is the module of an earlier build taken."""
    home, ran = failing_nvcc
    earlier = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/sspo_ext/_C_cuda.old.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    done = pip(source, tmp_path, CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    assert not ran.exists()
    modules, said = installed(tmp_path)
    assert modules == {"_C"} and "cpu: auto takes cpu" in said
    assert re.search(r"cuda / cuda: the module sspo_ext\._C_cuda could not be imported .* SSPO_BUILD_CUDA=1", said)
    assert "architectures of the CUDA module" not in said


@needs_compiler
def test_auto_goes_on_where_nvcc_fails(source, tmp_path, failing_nvcc):
    home, ran = failing_nvcc
    done = pip(source, tmp_path, CUDA_HOME=home, SSPO_BUILD_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert ran.exists() and installed(tmp_path)[0] == {"_C"}


@needs_nvcc
def test_with_nvcc(source, tmp_path):
    """The CUDA module alone, to be quick: it imports where there is no GPU."""
    done = pip(source, tmp_path, SSPO_BUILD_CUDA="1", SSPO_BUILD_CPP="0", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stderr
    modules, said = installed(tmp_path)
    assert modules == {"_C_cuda"} and "architectures of the CUDA module: sm_90" in said
    assert "cuda / cuda: the module" not in said


def test_insisting_without_nvcc(source, tmp_path):
    done = pip(source, tmp_path, nvcc=False, SSPO_BUILD_CUDA="1", SSPO_BUILD_CPP="0")
    assert done.returncode != 0
    assert "SSPO_BUILD_CUDA=1: nvcc was found neither by CUDA_HOME nor on PATH" in done.stdout + done.stderr


def test_declined(source, tmp_path):
    done = pip(source, tmp_path, SSPO_BUILD_CUDA="0", SSPO_BUILD_CPP="0")
    assert done.returncode == 0, done.stderr
    modules, said = installed(tmp_path)
    assert modules == set() and "cpu: auto takes reference" in said
