# SPDX-License-Identifier: Apache-2.0
"""Writes docs/schemes.md, the table of systems, from the headers of `examples/*.py`.

    python -m tools.write_schemes_page [--check]

`--check` writes nothing and fails if the page is stale. A header is the docstring of an example:

    A title in one sentence.

    What it does.

    Shows: what its table shows.

    System: a name
    Paper: arXiv 2305.18290
    Changes: what is different from plain DPO
    Ours: what the paper's page does not say          (may be left out)
    Test: the test of a hook in the library           (may be left out)

The four lines after "Shows" may stand several times, once a system, or not at all. A long line goes on indented.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.markdown import row

ROOT = Path(__file__).resolve().parents[1]

EXAMPLES = ROOT / "examples"

PAGE = ROOT / "docs" / "schemes.md"

KEYS = ("Shows", "System", "Paper", "Changes", "Ours", "Test")

START = ("dpo", "own_steps", "grpo_steps", "lora", "plain_loop", "two_processes")

_INTRO = """\
# Schemes

<!-- Written by `python -m tools.write_schemes_page` from the headers of examples/; do not edit. -->

Each system of the field is a file that runs: offline, on a small model, in under two minutes of two cores.
It uses public names alone, and prints one table.

    python examples/dpo.py

With `--quick` it is small, and shows only that the script runs. `pytest tests/examples` does that to all of them but
the slowest, and `pytest -m slow tests/examples` runs them in full.
What the calls do is told in [How to](how-to/dpo.md) and [Integrating](integrating.md).
What the tables show holds for one tiny model and one seed. It says how a scheme works, not how good it is.
"""

_VISION = (
    (
        "Diffusion-DPO",
        "2311.12908",
        "the logistic loss (`sigmoid`); its log-ratios are differences of denoising errors",
    ),
    ("DenseDPO", "2506.03517", "labels of segments, in the table above; the guided sampling of videos does not"),
    ("SmPO-Diffusion", "2506.02698", "the smoothed preference, in the table above; the inversion does not"),
    ("OPA-DPO", "2501.09695", "alignment before DPO, in the table above; corrupted images do not"),
    ("TARS", "2507.21584", "min-max and consistency, in the table above; which tokens ignore the image does not"),
)


@dataclass(frozen=True)
class System:
    """A system in an example's header."""

    name: str
    paper: str
    changes: str
    ours: str
    test: str


@dataclass(frozen=True)
class Example:
    """An example's header."""

    name: str  # of the file, without .py
    title: str
    shows: str
    systems: tuple[System, ...]


def read(path: Path) -> Example:
    """The header of an example.

    Raises:
        ValueError: It does not have the form; the message names file and line.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    title, _, rest = docstring.partition("\n\n")
    entries: list[tuple[str, str]] = []
    for line in rest.splitlines():
        found = re.match(rf"({'|'.join(KEYS)}): (.*)", line)
        if found:
            entries.append((found[1], found[2]))
        elif entries and line.startswith("    "):
            entries[-1] = entries[-1][0], f"{entries[-1][1]} {line.strip()}"
        elif entries and line.strip():
            raise ValueError(f"{path.name}: expected one of {', '.join(KEYS)}, or an indented line, got {line!r}")
    if [key for key, _ in entries].count("Shows") != 1 or entries[0][0] != "Shows":
        raise ValueError(f"{path.name}: expected one line Shows: before the systems")
    systems: list[dict[str, str]] = []
    for key, value in entries[1:]:
        if key == "System":
            systems.append({})
        if not systems or key in systems[-1]:
            raise ValueError(f"{path.name}: expected System: before {key}: {value}")
        systems[-1][key] = value
    for system in systems:
        missing = {"Paper", "Changes"} - set(system)
        if missing or not re.fullmatch(r"arXiv \d{4}\.\d{5}", system["Paper"]):
            raise ValueError(f"{path.name}: expected Paper: arXiv NNNN.NNNNN and Changes: for {system['System']}")
    return Example(
        path.stem, title.replace("\n", " ").strip(), dict(entries)["Shows"],
        tuple(System(*(s.get(key, "") for key in KEYS[1:])) for s in systems),
    )  # fmt: skip


def examples() -> list[Example]:
    """All examples, by name."""
    return [read(path) for path in sorted(EXAMPLES.glob("*.py"))]


def page() -> str:
    """The text of docs/schemes.md."""
    found = {example.name: example for example in examples()}
    parts = [_INTRO, "\n## Start here\n\n| file | what | its table shows |\n| --- | --- | --- |\n"]
    parts += [row(_link(name), found[name].title, found[name].shows) for name in START]
    parts.append(
        "\nThe first two are a notebook too: [start_here.ipynb](../examples/start_here.ipynb).\n"
        "\n## Systems\n\n"
        "| system | paper | what it changes | what is ours | file | test |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    systems = [(system, example) for example in found.values() for system in example.systems]
    for system, example in sorted(systems, key=lambda pair: pair[0].name.lower()):
        paper = _paper(system.paper.removeprefix("arXiv "))
        test = system.test or f"`test_example[{example.name}]`"
        parts.append(row(f"**{system.name}**", paper, system.changes, system.ours, _link(example.name), test))
    parts.append("\nWhat the tables of these files show:\n\n| file | what | its table shows |\n| --- | --- | --- |\n")
    parts += [row(_link(e.name), e.title, e.shows) for e in found.values() if e.name not in START]
    parts.append(
        "\n## Diffusion and vision methods\n\n| method | what of it applies to token log-probs |\n| --- | --- |\n"
    )
    parts += [row(f"{name} ({_paper(number)})", text) for name, number, text in _VISION]
    return "".join(parts)


def _paper(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


def _link(name: str) -> str:
    return f"[{name}.py](../examples/{name}.py)"


def main(argv: list[str] | None = None) -> int:
    """The command; 1 for a stale page with --check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if docs/schemes.md is stale")
    check = parser.parse_args(argv).check
    text = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    print(f"{'stale' if check else 'wrote'}: docs/schemes.md")
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
