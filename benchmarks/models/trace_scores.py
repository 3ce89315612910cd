# SPDX-License-Identifier: Apache-2.0
"""What step values say about chains that are known to be right or wrong: scores, intervals, harmful steps."""

from __future__ import annotations

import re

import numpy as np

RESULT = re.compile(r"<<[^<>]*=\s*([-\d.,]+)\s*>>")

_TIE = 1e-4  # values of the same state differ by less from batch to batch


def question(key: str) -> str:
    return key.partition("/")[0]


def results(text: str) -> list[str]:
    """The results that a step calculates: c of each <<a*b=c>>."""
    return [r.replace(",", "").rstrip(".") for r in RESULT.findall(text)]


def judge(traced: list[dict], own: dict[str, list[float]], truths: dict[str, dict]) -> dict:
    """The tables: which score tells right from wrong solutions, and how a first harmful step changes the value."""
    scores = {
        "V of the question alone": lambda r: r["values"][0],
        "V after a third of the steps": lambda r: r["values"][round((len(r["steps"]) - 1) / 3)],
        "V after two thirds": lambda r: r["values"][round(2 * (len(r["steps"]) - 1) / 3)],
        "V before the last line": lambda r: r["values"][-2],
        "V after the last line": lambda r: r["values"][-1],
        "log-prob of the solution, sum": lambda r: own[r["key"]][0],
        "log-prob of the solution, mean": lambda r: own[r["key"]][1],
        "fewer characters": lambda r: -len("".join(r["steps"])),
        "gold answer's digits before the last line": lambda r: float(stands(r, truths)),
    }
    pairs: dict[str, list[dict]] = {}
    for row in traced:
        pairs.setdefault(question(row["key"]), []).append(row)
    rows = [sorted(two, key=lambda r: -r["reward"]) for two in pairs.values()]
    table = [{"name": name, **separation([[of(r) for r in two] for two in rows])} for name, of in scores.items()]
    return {"table": table, "parting": parting(rows), "harm": harm(rows, truths), "curves": curves(rows)}


def stands(row: dict, truths: dict[str, dict]) -> bool:
    """Whether the gold answer stands as a number in the steps before the last line."""
    text = "".join(row["steps"][:-1]).replace(",", "")
    return re.search(rf"(?<![\d.]){re.escape(truths[question(row['key'])]['answer'])}(?![\d]|\.\d)", text) is not None


def separation(scores: list[list[float]], draws: int = 2000) -> dict:
    """AUC over all pairs of a correct and a wrong solution, and within questions.

    The 95 % intervals are a bootstrap over questions. `scores` are (correct, wrong) of each question.
    """
    both = np.array(scores)

    def auc(some: np.ndarray) -> float:
        return wins(some[:, None, 0] - some[None, :, 1])

    def within(some: np.ndarray) -> float:
        return wins(some[:, 0] - some[:, 1])

    again = np.random.default_rng(0).integers(0, len(both), (draws, len(both)))
    found = {}
    for name, of in (("auc", auc), ("within", within)):
        some = np.sort([of(both[index]) for index in again])
        found |= {name: of(both), f"{name}_interval": [float(some[int(draws * q)]) for q in (0.025, 0.975)]}
    return found | {"correct": float(both[:, 0].mean()), "wrong": float(both[:, 1].mean())}


def wins(differences: np.ndarray) -> float:
    """Share of positive differences; ties count half."""
    return float((differences > _TIE).mean() + (abs(differences) <= _TIE).mean() / 2)


def parting(rows: list[list[dict]]) -> dict:
    """Compares the values after the first step in which the two solutions of a question differ."""
    scores = []
    for right, wrong in rows:
        at = next((k for k, (a, b) in enumerate(zip(right["steps"], wrong["steps"], strict=False)) if a != b), None)
        if at is not None and at < min(len(right["steps"]), len(wrong["steps"])) - 1:  # not in the answer's line
            scores.append([right["values"][at + 1], wrong["values"][at + 1]])
    return {"n": len(scores), **separation(scores)}


def harm(rows: list[list[dict]], truths: dict[str, dict]) -> dict:
    """How the value changes at harmful steps of wrong solutions.

    A step counts as harmful if it calculates a result that is in no correct solution of the question, by a human or a
    model. This is a stand-in. It misses a wrong use of right numbers, and it calls a right detour harmful.
    """
    names = ("first off", "first off, from V above 0.1", "on, before it", "on, in correct ones")
    changes: dict[str, list[float]] = {name: [] for name in names}
    around: dict[int, list[float]] = {}
    found = []
    for right, wrong in rows:
        known = set(truths[question(wrong["key"])]["results"])
        off = [bool(set(results(step)) - known) for step in wrong["steps"][:-1]]
        values = wrong["values"]
        if True in off:
            first = off.index(True)
            change = values[first + 1] - values[first]
            changes["first off"].append(change)
            if values[first] > 0.1:
                changes["first off, from V above 0.1"].append(change)
            changes["on, before it"] += [values[k + 1] - values[k] for k in range(first) if results(wrong["steps"][k])]
            for k, value in enumerate(values[:-1]):
                around.setdefault(k - first, []).append(value)
            progress = [b - a for a, b in zip(values[:-2], values[1:-1], strict=True)]
            if len(progress) > 1:
                found.append((progress.index(min(progress)) == first, 1 / len(progress)))
        values = right["values"]
        steps = right["steps"][:-1]
        changes["on, in correct ones"] += [values[k + 1] - values[k] for k, step in enumerate(steps) if results(step)]
    return {
        "changes": {name: interval(some) for name, some in changes.items()},
        "around": {str(k): interval(some) for k, some in sorted(around.items()) if len(some) >= 10},
        "lowest_is_first_off": interval([float(hit) for hit, _ in found]),
        "by_chance": float(np.mean([chance for _, chance in found])),
    }


def interval(values: list[float]) -> dict:
    """Mean and its standard error."""
    some = np.array(values)
    return {"n": len(some), "mean": float(some.mean()), "se": float(some.std(ddof=1) / np.sqrt(len(some)))}


def curves(rows: list[list[dict]], points: int = 11) -> dict:
    """Mean value along the chain, from the question to the state before the last line, of correct and wrong chains."""
    grid = np.linspace(0, 1, points)
    found = {}
    for name, side in (("correct", 0), ("wrong", 1)):
        lines = [
            np.interp(grid, np.linspace(0, 1, len(v)), v)
            for v in (two[side]["values"][:-1] for two in rows)
            if len(v) > 1
        ]
        found[name] = {
            "mean": np.mean(lines, 0).tolist(),
            "se": (np.std(lines, 0, ddof=1) / np.sqrt(len(lines))).tolist(),
        }
    return found | {"last": [[two[side]["values"][-2] for two in rows] for side in (0, 1)]}
