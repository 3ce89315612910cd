# SPDX-License-Identifier: Apache-2.0
"""A source folder without its compiled module: the installed package is used, or what to type is said.

Mutations that turned a test red: `_is_built` always true; the search through sys.path left out; no warning.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sspo_ext
from sspo_ext._source_tree import prefer_installed
from sspo_ext.backends import cpu

PACKAGE = Path(cpu.__file__).parents[1]  # with the compiled module, wherever it is
needs_module = pytest.mark.skipif(not any(PACKAGE.glob("_C.*.so")), reason="no compiled module was built")
SHOW = "import sspo_ext.backends.cpu as cpu; print(cpu.__file__, cpu._C is not None)"


@pytest.fixture
def clone(tmp_path):
    """A checkout's package folder as git gives it."""
    folder = tmp_path / "clone"
    shutil.copytree(
        Path(sspo_ext.__file__).parent, folder / "sspo_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (folder / "setup.py").touch()
    return folder


def run(folder: Path, *search: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search))}
    command = [sys.executable, "-W", "always", "-c", f"import sys; sys.path.insert(0, ''); {SHOW}"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@needs_module
def test_the_installed_package_is_found(clone):
    done = run(clone, PACKAGE.parent)
    where, built = done.stdout.split()
    assert Path(where).is_relative_to(PACKAGE) and built == "True", done.stderr
    assert "source folder" not in done.stderr


def test_what_to_type_is_said(clone, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(clone)])
    search = [str(clone / "sspo_ext")]
    with pytest.warns(UserWarning, match="Type `pip install -e .` in the folder above it"):
        prefer_installed(search)
    assert search == [str(clone / "sspo_ext")]


@needs_module
def test_a_built_folder_is_itself(clone):
    for module in PACKAGE.glob("_C.*.so"):
        shutil.copy(module, clone / "sspo_ext")
    where, built = run(clone, PACKAGE.parent).stdout.split()
    assert Path(where).is_relative_to(clone) and built == "True"
