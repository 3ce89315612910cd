# SPDX-License-Identifier: Apache-2.0
"""README and docs/, as written: their code runs and prints what they say, links lead somewhere, no line is long.

The blocks of a page run in order, in one folder and one namespace. A block with `title="NAME"` is written to that file;
any other python block runs. Of bash the lines run that call the package, python or torchrun. A text block holds what
the block before it prints.

Mutations of the pages, each caught by the test named:
  a name that is not defined; a number in a text block                test_page
  a page with code that nobody runs                                   test_no_code_is_left_out
  a link to a heading that was renamed; to a file that moved          test_links
  a colour in figures/flow.py                                         test_figure
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from helpers.pages import FENCE, Block, blocks
from helpers.paths import DOCS, ROOT

pytest.importorskip("transformers")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *DOCS.rglob("*.md")])
# Pages whose names are the reader's own (`model`, `labels`): the test that gives them is in the file named.
FRAGMENTS = {"docs/integrating.md": "test_integrating.py", "docs/signals.md": "test_pairing.py"}
LONGEST_LINE = 300
_LINK = re.compile(r"(?:\]\(|(?:src|srcset|href)=\")([^)\"\s]+)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run_python(page: Path, block: Block, scope: dict) -> str:
    """What it prints. Its lines stand in a traceback as lines of the page."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), scope)
    return printed.getvalue()


def run_shell(block: Block) -> str:
    printed = io.StringIO()
    for line in block.text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "sspo-ext":
            with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", ["sspo-ext", *arguments]):
                with pytest.raises(SystemExit) as end:
                    runpy.run_module("sspo_ext.cli", run_name="__main__", alter_sys=True)
            assert not end.value.code, line
        elif program in ("python", "torchrun"):
            launcher = ["-m", "torch.distributed.run"] if program == "torchrun" else []
            paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, *launcher, *arguments], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            printed.write(done.stdout)
    return printed.getvalue()


def run_page(page: Path, scope: dict) -> None:
    """Runs all blocks of a page in the current folder."""
    printed = ""
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed = run_python(page, block, scope)
        elif block.language == "bash":
            printed = run_shell(block)
        elif block.language == "text":
            assert printed.rstrip() == block.text.rstrip(), f"{name_of(page)}:{block.line}"


def has_code(page: Path) -> bool:
    return any(block.language == "python" for block in blocks(page))


COMPLETE = [name_of(page) for page in PAGES if has_code(page) and name_of(page) not in FRAGMENTS]


@pytest.mark.parametrize("name", COMPLETE)
def test_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_page(ROOT / name, {"__name__": "page"})


def test_no_code_is_left_out():
    assert len(COMPLETE) >= 9
    for name, test in FRAGMENTS.items():
        assert has_code(ROOT / name)
        found = [path for path in (ROOT / "tests").rglob(test) if Path(name).name in path.read_text()]
        assert found, f"{name}: no {test} reads it"
    for page in PAGES:
        unknown = {block.language for block in blocks(page)} - {"python", "bash", "text", "json", "mermaid", "yaml", ""}
        assert not unknown, name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    if page in (DOCS / "losses.md", DOCS / "schemes.md"):  # made from definitions and headers; a row cannot be wrapped
        lines = [line for line in lines if not line.startswith("| ")]
    long = [f"{name_of(page)}:{n} ({len(line)})" for n, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
    assert not long


def anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and the site make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+?)(?: \{#.*\})?$", text, re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"[\s]+", "-", title) for title in words}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    """Of the repository as it lies there; `mkdocs build --strict` does the same for the site."""
    broken = []
    for link in _LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link) or anchor in ("only-light", "only-dark"):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_figure():
    assert subprocess.run([sys.executable, DOCS / "figures" / "flow.py", "--check"]).returncode == 0, (
        "run python docs/figures/flow.py"
    )
