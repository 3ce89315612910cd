# SPDX-License-Identifier: Apache-2.0
"""Every file of examples/ runs, prints one table, and uses public names alone; so does the notebook.

By default the fast ones run, in a reduced size. With `-m slow` the others do too, and all of them in full.

Mutations, each caught by the test named:
  an example that raises; one that prints nothing, a row with a cell too few, a nan     test_example
  an import of sspo_ext.objective in an example                                          test_public_names_alone
  a cell of the notebook that another one needs taken out                                test_notebook_runs
"""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from helpers.paths import DOCS, ROOT

pytest.importorskip("transformers")
FOLDER = ROOT / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
NEED = {"lora": "peft", "fast_slow": "peft"}
# A few run by default, in their reduced size; all of them with the slow tests.
BY_DEFAULT = {"dpo", "epo", "mo_grpo", "own_steps", "plain_loop", "sspo"}
QUICK = [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
LONGEST = 140  # lines


def check_table(printed: str) -> None:
    """One markdown table, with as many cells in every row, and without nan."""
    tables = re.findall(r"(?:^\|.*\|\n)+", printed, re.MULTILINE)
    assert len(tables) == 1, printed
    head, rule, *rows = tables[0].splitlines()
    assert re.fullmatch(r"\|( --- \|)+", rule) and rows
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert not re.search(r"\b(nan|inf)\b", tables[0])


@pytest.mark.parametrize("name", QUICK)
def test_example(name, monkeypatch, tmp_path):
    pytest.importorskip(NEED.get(name, "torch"))
    if name == "two_processes":  # its processes import it by its file
        check_table(run_as_program(name, "--quick"))
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--quick"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    check_table(printed.getvalue())
    assert not list(tmp_path.iterdir()), "expected no files in the current folder"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_full(name):
    pytest.importorskip(NEED.get(name, "torch"))
    check_table(run_as_program(name))


def run_as_program(name: str, *arguments: str) -> str:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_public_names_alone():
    """What an example imports from sspo_ext stands in the reference."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    public = set(re.findall(r"^(?::::|#) (sspo_ext\S*)", pages, re.MULTILINE))
    found = 0
    for name in NAMES:
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sspo_ext"):
                assert node.module in public, f"{name}: {node.module}"
                assert not any(alias.name.startswith("_") for alias in node.names), name
                found += 1
            assert not (isinstance(node, ast.Import) and any(a.name.startswith("sspo_ext") for a in node.names)), name
    assert found >= len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_short(name):
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST


def test_notebook_runs(monkeypatch, tmp_path):
    """Its cells run in order in one namespace, and print what stands below them in form."""
    notebook = json.loads((FOLDER / "start_here.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--quick"])
    scope: dict = {"__name__": "__main__"}
    tables = 0
    for cell in code:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), scope)
        written = "".join(text for output in cell["outputs"] for text in output["text"])
        assert bool(written) == bool(printed.getvalue())
        if written:
            check_table(printed.getvalue())
            check_table(written)
            tables += 1
    assert tables == 2
