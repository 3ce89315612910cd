# SPDX-License-Identifier: Apache-2.0
"""Writes examples/start_here.ipynb from the first two examples, and runs its cells for the outputs.

    python -m tools.write_notebook [--check]

`--check` writes nothing and runs nothing; it fails if the notebook's text is not that of the examples. The cells are
the examples' paragraphs, and the outputs are what they print.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("dpo", "own_steps")

NOTEBOOK = ROOT / "examples" / "start_here.ipynb"

_TITLE = """\
# Start here

Made from `dpo.py` and `own_steps.py` by `python -m tools.write_notebook`.
`pip install '.[train]'` in a clone is all that it needs; it works offline."""


def cells() -> list[dict]:
    """The cells without outputs."""
    found = [_cell("markdown", _TITLE)]
    for part in PARTS:
        text = (ROOT / "examples" / f"{part}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        docstring = ast.get_docstring(tree) or ""
        about = docstring.partition("\n\nSystem:")[0].replace("\nShows: ", "\n**What the table shows:** ", 1)
        title, _, rest = about.partition("\n\n")
        found.append(_cell("markdown", f"## {title.replace(chr(10), ' ')}\n\n{rest}"))
        code = "\n".join(text.splitlines()[tree.body[0].end_lineno or 0 :]).strip()
        found += [_cell("code", paragraph) for paragraph in _paragraphs(code)]
    for k, cell in enumerate(found):
        cell["id"] = f"cell-{k}"
    return found


def _paragraphs(code: str) -> list[str]:
    """The code in pieces between the blank lines that stand outside of every statement."""
    lines, tree = code.splitlines(), ast.parse(code)
    starts = [getattr(node, "decorator_list", None) or [node] for node in tree.body]
    first = {start[0].lineno for start in starts}
    edges = [0, *(k - 1 for k in sorted(first) if k > 1 and not lines[k - 2].strip()), len(lines)]
    return ["\n".join(lines[a:b]).strip() for a, b in zip(edges, edges[1:], strict=False)]


def _cell(kind: str, text: str) -> dict:
    cell = {"cell_type": kind, "id": "", "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def run(found: list[dict]) -> None:
    """Runs the code cells in one namespace, in order, and puts what they print into their outputs."""
    scope: dict = {"__name__": "__main__"}
    for count, cell in enumerate((cell for cell in found if cell["cell_type"] == "code"), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {count}", "exec"), scope)
        cell["execution_count"], text = count, printed.getvalue()
        if text:
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}]


def text_of(found: list[dict]) -> str:
    """The notebook file of cells."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def is_stale() -> bool:
    """Whether the notebook's cells are others than the examples'."""
    if not NOTEBOOK.exists():
        return True
    written = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], c["source"]) for c in written] != [(c["cell_type"], c["source"]) for c in cells()]


def main(argv: list[str] | None = None) -> int:
    """The command; 1 for a stale notebook with --check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write and run nothing; fail if the notebook is stale")
    if parser.parse_args(argv).check:
        print("stale: examples/start_here.ipynb" if is_stale() else "", end="")
        return int(is_stale())
    found = cells()
    sys.argv[1:] = []
    run(found)
    NOTEBOOK.write_text(text_of(found), encoding="utf-8")
    print("wrote: examples/start_here.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
