# SPDX-License-Identifier: Apache-2.0
"""The demo on several seeds: its report, what is run again, and the pages that quote it.

Mutations that turned a test red: a digit of the table in README.md, of the sentence in docs/science.md; a setting of
DemoConfig; the runs' own errors in place of those over seeds; recorded seeds run again.
"""

import re
from dataclasses import asdict, replace

import pytest
from helpers.paths import ROOT

pytest.importorskip("transformers")

from benchmarks import records
from benchmarks.compression import demo_seeds
from sspo_ext.demo import DemoConfig

RESULTS = ROOT / "benchmarks/results/demo"


def row(seed: int, saved: float, gain: float, config: DemoConfig | None = None) -> dict:
    numbers = {"accuracy": 0.5 + gain, "tokens": 30.0 - seed, "steps": 4.0, "skipped": 0.1}
    return {
        "seed": seed, "machine": "a box", "cpu_seconds": 60, "config": asdict(config or DemoConfig(seed=seed)),
        "claim": {"shorter": [saved, 0.01], "right": [gain, 0.02]},
        "stages": {name: {"greedy": numbers, "sampled": numbers} for name in ("start", "outcome", "sspo")},
    }  # fmt: skip


def test_each_seed_is_one_number():
    claim = demo_seeds.over_seeds([row(0, 0.4, 0.01), row(1, 0.5, 0.03), row(2, 0.6, 0.05)])
    assert claim.shorter == pytest.approx((0.5, 4.3027 * 0.1 / 3**0.5), abs=1e-4)
    assert claim.right == pytest.approx((0.03, 4.3027 * 0.02 / 3**0.5), abs=1e-4)


def test_the_first_seeds_alone_are_told():
    """What was known before more seeds were run stays in the report."""
    rows = [row(seed, 0.4 + seed / 100, seed / 100) for seed in range(4)]
    text = demo_seeds.report(rows)
    assert "the first 3 seeds, sampled," in text and demo_seeds.over_seeds(rows[:3]).sentence("x")[-40:] in text
    assert "the first 3 seeds" not in demo_seeds.report(rows[:3])
    assert "One seed has no interval" in demo_seeds.report(rows[:1])


def test_report_of_other_settings_is_refused():
    with pytest.raises(ValueError, match="expected runs with the same settings"):
        demo_seeds.report([row(0, 0.4, 0.0), row(1, 0.4, 0.0, replace(DemoConfig(seed=1), updates=9))])


def test_recorded_seeds_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []

    def run(folder, config):
        ran.append(config.seed)
        folder.mkdir(parents=True)
        (folder / "demo.png").write_bytes(b"%d" % config.seed)
        return row(config.seed, 0.4, 0.01, config)

    monkeypatch.setattr(demo_seeds, "run", run)
    records.add(tmp_path / "demo.jsonl", [row(1, 0.4, 0.0, replace(DemoConfig(seed=1), updates=9))], ("seed",))
    more = ["--output", str(tmp_path), "--work", str(tmp_path / "work")]
    demo_seeds.main(["--seeds", "1", "0", *more])  # seed 1 is recorded with other settings
    demo_seeds.main(["--seeds", "0", "1", "2", *more])
    assert ran == [1, 0, 2] and (tmp_path / "demo.png").read_bytes() == b"0"
    assert "seed 0 is recorded already" in capsys.readouterr().out
    assert "--seeds 0 1 2`" in (tmp_path / "RESULTS.md").read_text()


def test_report_made_again_of_the_demo_as_it_is():
    rows = records.read(RESULTS / "demo.jsonl")
    assert len(rows) >= 3 and all(row["config"] == asdict(DemoConfig(seed=row["seed"])) for row in rows)
    assert records.with_notes(demo_seeds.report(rows), RESULTS) == (RESULTS / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/science.md"])
def test_pages_quote_it(page):
    """The sentence, and every line of the table that a page shows."""
    text, found = ((ROOT / page).read_text(encoding="utf-8"), (RESULTS / "RESULTS.md").read_text(encoding="utf-8"))
    (sentence,) = re.findall(r"\*\*(SSPO's solutions .*?)\*\*", found)
    assert sentence in text
    lines = re.findall(
        r"^\| (?:mean \[|right answers, (?:greedy|sampled)|tokens, |needed steps).*$", text, re.MULTILINE
    )
    assert not [line for line in lines if line not in found.splitlines()]
    assert len(lines) == (6 if page == "README.md" else 0)
