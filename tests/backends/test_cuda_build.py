# SPDX-License-Identifier: Apache-2.0
"""nvcc compiles every CUDA source for every architecture without a warning; the build chooses architectures from its
settings alone. Nothing here needs a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
from helpers.paths import ROOT

pytest.importorskip("setuptools")
sys.path.append(str(ROOT))
build_cuda = pytest.importorskip("build_cuda", reason="not a checkout of the repository")

NVCC = build_cuda.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name in ("SSPO_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", build_cuda.KERNELS)
def test_compiles_without_warnings(source, tmp_path):
    command = build_cuda.compile_command(NVCC, source, str(tmp_path / "kernel.o"), *build_cuda.architectures(NVCC))
    done = subprocess.run([*command, "-Werror", "all-warnings"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()


@needs_nvcc
def test_default_architectures():
    binary, ptx = build_cuda.architectures(NVCC)
    assert {80, 90} <= set(binary) and ptx == [max(binary)]


@needs_nvcc
@pytest.mark.parametrize(
    ("asked", "binary", "ptx"),
    [
        ("8.0", [80], []),
        ("8.0;9.0+PTX", [80, 90], [90]),
        ("7.0 8.6, 9.0a", [86, 90], []),
        ("Ampere;Hopper", [80, 86, 90], []),
    ],
)
def test_architectures_as_torch_names_them(asked, binary, ptx, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build_cuda.architectures(NVCC) == (binary, ptx)


@needs_nvcc
@pytest.mark.parametrize("asked", ["7.0", "nine", "99.0"])
def test_architectures_that_cannot_be(asked, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        build_cuda.architectures(NVCC)


def test_when_it_is_built(monkeypatch):
    def with_nvcc(path):
        monkeypatch.setattr(build_cuda, "find_nvcc", lambda: path)

    with_nvcc("/somewhere/nvcc")
    assert build_cuda.extensions() == [], "pip would be silent for minutes"
    monkeypatch.setenv("SSPO_BUILD_CUDA", "")
    assert build_cuda.extensions() == []
    monkeypatch.setenv("SSPO_BUILD_CUDA", "0")
    assert build_cuda.extensions() == []
    monkeypatch.setenv("SSPO_BUILD_CUDA", "auto")
    assert [e.name for e in build_cuda.extensions()] == ["sspo_ext._C_cuda"]
    assert build_cuda.extensions(skip_auto=True) == []
    monkeypatch.setenv("SSPO_BUILD_CUDA", "1")
    assert build_cuda.extensions(skip_auto=True)
    with_nvcc(None)
    with pytest.raises(SystemExit, match="nvcc was found neither"):
        build_cuda.extensions()
    monkeypatch.setenv("SSPO_BUILD_CUDA", "auto")
    assert build_cuda.extensions() == []
    monkeypatch.setenv("SSPO_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1"):
        build_cuda.extensions()


@pytest.fixture
def command(tmp_path):
    """What a build needs of build_ext."""
    pytest.importorskip("pybind11")
    return types.SimpleNamespace(
        force=True,
        build_temp=str(tmp_path / "temp"),
        get_ext_fullpath=lambda name: str(tmp_path / "lib" / "module.so"),
        compiler=types.SimpleNamespace(compile=lambda *args, **kwargs: []),
    )


def nvcc_of(folder, script, monkeypatch):
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: str(nvcc))


FAILS = 'case "$1" in --list*) echo compute_90;; *) echo broken; exit 1;; esac'


def test_a_compiler_that_fails_names_the_way_out(command, monkeypatch, tmp_path, capfd):
    nvcc_of(tmp_path, FAILS, monkeypatch)
    monkeypatch.setenv("SSPO_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="SSPO_BUILD_CUDA=0"):
        build_cuda.build(command, build_cuda.extensions()[0])
    assert "broken" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("script", "architectures"), [(FAILS, ""), ("exit 3", ""), (FAILS, "nine")], ids=["compiling", "asked", "setting"]
)
def test_auto_warns_and_goes_on(command, script, architectures, monkeypatch, tmp_path):
    """Whatever fails: the compiler, the question what it can do, the list of architectures."""
    nvcc_of(tmp_path, script, monkeypatch)
    monkeypatch.setenv("SSPO_BUILD_CUDA", "auto")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    older = tmp_path / "lib" / "module.so"
    older.parent.mkdir()
    older.touch()
    (extension,) = build_cuda.extensions()
    with pytest.warns(UserWarning, match="SSPO_BUILD_CUDA=auto: left the CUDA module out"):
        build_cuda.build(command, extension)
    assert extension.optional and not older.exists()
