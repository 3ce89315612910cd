# SPDX-License-Identifier: Apache-2.0
"""docs/schemes.md and the notebook are those of the examples, and the table of systems is complete.

Mutations, each caught by the test named: a word changed in an example's header, or in a line of its code
(test_up_to_date); a system's block taken out (test_every_system_is_in_it); each check of `read` (test_malformed).
"""

import pytest
from helpers.paths import ROOT

from tools import write_notebook, write_schemes_page
from tools.write_schemes_page import examples, read

SYSTEMS = (
    "SSPO", "DPO", "SimPO", "LD-DPO", "TGDPO", "Direct Advantage", "OREO", "SPO-chain", "SPO-tree", "DenseDPO",
    "Curry-DPO", "APO", "OPA-DPO", "WebThinker", "More is less", "3D-properties", "ASFT", "BRAIn", "Triple PO", "RTO",
    "TRPA", "SmPO", "OFS-DPO, COFS-DPO", "SRPO", "MO-GRPO", "TARS", "EPO",
)  # fmt: skip
GOOD = '"""A title.\n\nText.\n\nShows: a\n    b.\n\nSystem: X\nPaper: arXiv 2305.18290\nChanges: c\n"""\n'


@pytest.fixture(autouse=True)
def source_tree(monkeypatch):
    """The files of this checkout, whichever copy of the tools is imported."""
    monkeypatch.setattr(write_schemes_page, "EXAMPLES", ROOT / "examples")
    monkeypatch.setattr(write_schemes_page, "PAGE", ROOT / "docs" / "schemes.md")
    monkeypatch.setattr(write_notebook, "ROOT", ROOT)
    monkeypatch.setattr(write_notebook, "NOTEBOOK", ROOT / "examples" / "start_here.ipynb")


def test_up_to_date():
    assert write_schemes_page.main(["--check"]) == 0, "run python -m tools.write_schemes_page"
    assert write_notebook.main(["--check"]) == 0, "run python -m tools.write_notebook"


def test_check_notices_stale_files(tmp_path, monkeypatch, capsys):
    page = tmp_path / "schemes.md"
    page.write_text("old\n")
    monkeypatch.setattr(write_schemes_page, "PAGE", page)
    assert write_schemes_page.main(["--check"]) == 1 and page.read_text() == "old\n"
    assert write_schemes_page.main([]) == 0 and write_schemes_page.main(["--check"]) == 0
    notebook = tmp_path / "start_here.ipynb"
    monkeypatch.setattr(write_notebook, "NOTEBOOK", notebook)
    assert write_notebook.main(["--check"]) == 1 and not notebook.exists()
    notebook.write_text(write_notebook.text_of(write_notebook.cells()).replace("load_start", "load_other"))
    assert write_notebook.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().out


def test_every_system_is_in_it():
    names = [system.name.partition(" (")[0] for example in examples() for system in example.systems]
    assert set(SYSTEMS) <= set(names) and len(set(names)) == len(names)


def test_read(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(GOOD)
    example = read(path)
    assert (example.name, example.title, example.shows) == ("x", "A title.", "a b.")
    assert [(s.name, s.paper, s.changes, s.ours) for s in example.systems] == [("X", "arXiv 2305.18290", "c", "")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Shows: a\n    b.\n\n", "", "one line Shows"),
        ("Shows: a\n    b.", "Shows: a\nShows: b.", "one line Shows"),
        ("Paper: arXiv 2305.18290\n", "", "Paper"),
        ("2305.18290", "2305", "Paper"),
        ("Changes: c\n", "", "Changes"),
        ("System: X\n", "", "System: before Paper"),
        ("Changes: c", "Changes: c\nPaper: arXiv 2305.18291", "System: before Paper"),
        ("Changes: c", "Changes: c\nmore", "indented"),
    ],
)
def test_malformed(tmp_path, old, new, message):
    assert old in GOOD
    path = tmp_path / "x.py"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=rf"x\.py: .*{message}"):
        read(path)
