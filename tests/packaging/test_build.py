# SPDX-License-Identifier: Apache-2.0
"""Packaging: what sdist and wheel hold, the switches of setup.py, what the compiled objects export, and the type stubs
of the C++ modules.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from helpers.paths import ROOT

if not (ROOT / "setup.py").exists():
    pytest.skip("not in a source tree", allow_module_level=True)
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


def setup_py(source, *args, **environment):
    env = (
        {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "CXXFLAGS")}
        | {"SSPO_BUILD_CUDA": "0"}
        | environment
    )
    command = [sys.executable, "setup.py", *map(str, args)]
    return subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)


def test_sdist_holds_every_source(source, tmp_path):
    done = setup_py(source, "-q", "sdist", "-d", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("sspo_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        str(p.relative_to(source)) for p in (source / "csrc").rglob("*.*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    }
    assert wanted and wanted <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "sspo_ext/py.typed", "sspo_ext/backends/cpu.py"} <= names


@pytest.mark.slow
def test_a_wheel_without_cpp_is_pure_and_says_why_it_is_slow(source, tmp_path):
    done = setup_py(source, "-q", "bdist_wheel", "-d", tmp_path, "-b", tmp_path / "b", SSPO_BUILD_CPP="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith((".so", ".cpp", ".h"))]
        archive.extractall(tmp_path / "site")
    script = (
        "import torch, sspo_ext; from sspo_ext import backends\n"
        "print(sspo_ext.__file__); print(backends.select('auto', 'cpu', torch.float32))\n"
        "print(backends.why_not('cpu', 'cpu', torch.float32))"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    env.pop("SSPO_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    where, selected, reason = done.stdout.splitlines()
    assert where.startswith(str(tmp_path)) and selected == "reference"
    assert "_C" in reason and "SSPO_BUILD_CPP=0" in reason


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"], ids=["missing", "failing"])
def test_a_build_that_fails_names_the_way_out(source, tmp_path, compiler):
    done = setup_py(source, "build_ext", "-b", tmp_path, "-t", tmp_path, CC=compiler, CXX=compiler)
    assert done.returncode != 0
    paragraph = done.stderr.strip().split("\n\n")[-1].splitlines()[-1]
    assert (
        paragraph.startswith("sspo_ext: the C++ module sspo_ext._C could not be built")
        and "SSPO_BUILD_CPP=0" in paragraph
    )
    assert not list(tmp_path.glob("sspo_ext/*.so"))


@pytest.mark.slow
@needs_compiler
def test_instruction_sets_stay_apart(source, tmp_path):
    """A kernel file that exported an inline function could give its AVX-512 version to a machine without AVX-512."""
    done = setup_py(source, "build_ext", "-b", tmp_path, "-t", tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("sspo_ext/_C*.so"))
    commands = [line for line in done.stdout.splitlines() if " -c csrc/" in line]
    for line in commands:
        flags = re.findall(r" -m(?:avx|fma|f16c|arch)\S*", line)
        assert bool(flags) == ("isa/avx" in line), line
    objects = list(tmp_path.rglob("isa/*.o"))
    assert objects and shutil.which("nm")
    for path in objects:
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        exported = [line.split(maxsplit=2)[2] for line in listing.splitlines() if re.search(r" [TWVuDRB] ", line)]
        assert exported == [f"sspo::k{path.stem.capitalize()}"], path.name


def test_no_torch_header_and_no_native_flags():
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
    assert "-march=native" not in (ROOT / "setup.py").read_text().replace("no -march=native", "")


@pytest.mark.parametrize("module, folder", [("_C", "cpu"), ("_C_cuda", "cuda")])
def test_stubs_name_what_the_module_has(module, folder):
    """Names against the binding's source; numbers of arguments against the module, where it is built."""
    stub = ast.parse((ROOT / "sspo_ext" / f"{module}.pyi").read_text()).body
    functions = {node.name: len(node.args.posonlyargs) for node in stub if isinstance(node, ast.FunctionDef)}
    constants = {node.target.id for node in stub if isinstance(node, ast.AnnAssign)}
    binding = (ROOT / "csrc" / folder / "binding.cpp").read_text()
    assert set(functions) == set(re.findall(r'm\.def\(\s*"(\w+)"', binding))
    assert constants == set(re.findall(r'm\.attr\("(\w+)"\)', binding))
    try:
        built = importlib.import_module(f"sspo_ext.{module}")
    except ImportError:
        return
    for name, count in functions.items():
        signature = getattr(built, name).__doc__.splitlines()[0]
        assert len(re.findall(r"\barg\d+:", signature)) == count, signature
