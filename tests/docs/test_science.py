# SPDX-License-Identifier: Apache-2.0
"""docs/science.md: every number stands in a results file that its own paragraph links to, every command in one.

Mutations of the page, each red: a digit of a mean, of an error; another sign; two means whose errors are exchanged; a
link to another results file; no link beside a number; an option of a command.
"""

import re

import pytest
from helpers.paths import DOCS, ROOT

PAGE = DOCS / "science.md"
RESULTS = ROOT / "benchmarks" / "results"
# A number alone: not a part of a name (135M, GSM8K, SmolLM2) or of a longer number.
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?!\w|\.\d)")
WITH_ERROR = re.compile(rf"{NUMBER.pattern}\s?%? ± {NUMBER.pattern}\s?%?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ARXIV = re.compile(r"\[\d{4}\.\d{5}\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)")
LEVELS = {"95"}  # of intervals
NAMED = re.compile(r"lambda \d(?:\.\d)?")


def blocks_of(text: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables, without code."""
    text = re.sub(r"^(?: {4}.*|`[^`\n]+`)$", "", text, flags=re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n(?=[*|#] ?)", text)
    return [re.sub(r"`[^`]*`", "", block) for block in blocks if block.strip()]


def linked(block: str) -> str:
    """The text of the results files that a block links to."""
    paths = [(PAGE.parent / link).resolve() for link in LINK.findall(block) if re.search(r"/results/.*\.md$", link)]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths).replace("**", "").replace("\u2212", "-")


def problems_of(text: str) -> list[str]:
    """What of the page is in no results file that stands beside it."""
    found = []
    for block in blocks_of(text):
        source = linked(block)
        words = NAMED.sub("", LINK.sub("]", ARXIV.sub("", block)))
        there = set(NUMBER.findall(source))
        bare = {number.lstrip("+-") for number in there}
        squeezed = re.sub(r"\s", "", source)
        for number in NUMBER.findall(words):
            if number not in LEVELS and number not in (there if number[0] in "+-" else bare):
                found.append(f"{number} in: {block[:80]}")
        for pair in WITH_ERROR.findall(words):
            if re.sub(r"\s", "", pair) not in squeezed:
                found.append(f"{pair} in: {block[:80]}")
    return found


def commands_of(text: str) -> list[str]:
    return re.findall(r"^(?:`| {4})(python -m benchmarks [^`\n]+)`?$", text, re.MULTILINE)


def test_numbers():
    text = PAGE.read_text(encoding="utf-8")
    assert len(WITH_ERROR.findall(text)) >= 20
    assert not problems_of(text)


def test_commands():
    text = PAGE.read_text(encoding="utf-8")
    reports = "\n".join(path.read_text(encoding="utf-8") for path in sorted(RESULTS.rglob("*.md")))
    named = set(commands_of(text))
    assert len(named) >= 6
    assert not {command for command in named if f"`{command}`" not in reports}


TASKS = {"sums": "sums, en and zh", "letters": "letters, en and zh", "sorting": "sort, en and zh"}
OTHERS = {"outcome only": 0, "values shuffled": 2, "values zeroed": 4}  # columns of "Over seeds", greedy


def test_differences_stand_in_their_cells():
    """The page's table is part of the report's: not only the numbers, also what they belong to."""
    report = (RESULTS / "compression" / "RESULTS.md").read_text(encoding="utf-8").replace("**", "").replace("*", "")
    rows = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"SSPO less | control of | {' | '.join(TASKS)} | source" in rows
    checked = 0
    for row in rows:
        what, _, *cells = row.split(" | ")
        if ", lambda" not in what:
            continue
        other, arm = what.split(", ")
        for (task, name), cell in zip(TASKS.items(), cells, strict=False):
            (line,) = re.findall(rf"^\| {name} \| {re.escape(arm)} \| 6 \| (.*) \|$", report, re.MULTILINE)
            assert line.split(" | ")[OTHERS[other]] == cell, (what, task)
            checked += 1
    assert checked == 18


BLOCK = "The gain is +0.523 ± 0.288 over 3 runs ([results](../benchmarks/results/compression/RESULTS.md))."


@pytest.mark.parametrize(
    "old,new",
    [
        ("0.523", "0.524"),
        ("0.288", "0.289"),
        ("+0.523", "-0.523"),
        ("0.288", "0.026"),
        ("3 runs", "9999 runs"),
        ("compression/", "trace_run/"),
        (" ([results](../benchmarks/results/compression/RESULTS.md))", ""),
    ],
)
def test_what_is_in_no_file_is_found(old, new):
    assert not problems_of(BLOCK)
    assert old in BLOCK and problems_of(BLOCK.replace(old, new))
