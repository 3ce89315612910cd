# SPDX-License-Identifier: Apache-2.0
"""Differences between arms on the same held-out problems, with their errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sspo_ext.demo.claim import standard_error

from .arms import ARMS

Tasks = Mapping[tuple[str, str], Mapping[str, list[dict]]]  # (family, language) -> arm -> its runs, by seed

HEADER = (
    "| task | arm | tokens, greedy | sampled | accuracy less RLOO's, greedy | sampled | skipped less the start's, "
    "greedy | sampled | skip a step, greedy (of these right) | accuracy less shuffled V's, greedy | sampled "
    "| less V = 0's, greedy | sampled |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)

NOTE = (
    "Tokens: change from the start model; the aim was -45 % or more. A difference is taken problem by problem, from "
    "each problem's mean over the seeds. It stands with ± 1.96 standard errors over problems, and with the smallest "
    "and the largest difference of single seeds in brackets. These errors leave out that other seeds would give other "
    "results. **Bold**: larger than the error and in favour of SSPO or step pairs (tokens: the aim is reached). "
    "*Italic*: larger than the error and against them."
)


def verdicts(tasks: Tasks) -> str:
    """One line for each task and SSPO arm. A dash stands where the other arm was not run."""
    lines = [HEADER]
    for (family, language), arms in sorted(tasks.items()):
        for name, text in (("sspo-0", "lambda 0"), ("sspo-9", "lambda 0.9")):
            if name not in arms:
                continue
            cells = [f"{family}, {language}", text]
            cells += [_tokens(arms, name, how) for how in ("greedy", "sampled")]
            for other, key, sign in (
                ("rloo", "correct", 1),
                ("start", "skipped", -1),
                (f"{name}-shuffled", "correct", 1),
                (f"{name}-zero", "correct", 1),
            ):
                cells += [_difference(arms, name, other, how, key, sign) for how in ("greedy", "sampled")]
                cells += [_skips(arms[name])] * (key == "skipped")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", NOTE])


PAIRS_HEADER = (
    "| task | step pairs + likelihood, less | accuracy, greedy | sampled | skipped, greedy | sampled |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def pair_verdicts(tasks: Tasks) -> str:
    """Step pairs less their likelihood alone, less pairs of whole solutions, and less SSPO's updates.

    Empty if no pairs were run.
    """
    lines = []
    for (family, language), arms in sorted(tasks.items()):
        for other in ("pairs-likelihood", "whole-pairs", "sspo-0"):
            if "pairs" in arms and other in arms:
                asked = [(how, *which) for which in (("correct", 1), ("skipped", -1)) for how in ("greedy", "sampled")]
                cells = [_difference(arms, "pairs", other, *which) for which in asked]
                seeds = [_of_seeds([arms], "pairs", other, *which) for which in asked]
                less = ARMS[other].text.removeprefix("... ")
                lines.append(f"| {family}, {language} | {less} | {' | '.join(cells)} |")
                lines.append(f"| {family}, {language}: over seeds | {less} | {' | '.join(seeds)} |")
    return "\n".join([PAIRS_HEADER, *lines]) if lines else ""


SEEDS_HEADER = (
    "| task | arm | runs | accuracy less RLOO's, greedy | sampled | less shuffled V's, greedy | sampled "
    "| less V = 0's, greedy | sampled |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)

SEEDS_NOTE = (
    "The same differences ± the half width of a 95 % interval of Student's t over runs. Each seed's mean is one "
    "number. A line that names two languages takes the runs of both together. These intervals include that other seeds "
    "would give other results. With three seeds they are wide, and by chance one difference in twenty lies beyond its "
    "error. Bold and italic as above."
)


def over_seeds(tasks: Tasks) -> str:
    """One line for each task and SSPO arm, and one for all languages of a family together."""
    families: dict[str, list[str]] = {}
    for family, language in sorted(tasks):
        families.setdefault(family, []).append(language)
    lines = [SEEDS_HEADER]
    for family, languages in families.items():
        groups = [[language] for language in languages] + ([languages] if len(languages) > 1 else [])
        for group in groups:
            some = [tasks[family, language] for language in group]
            for name, text in (("sspo-0", "lambda 0"), ("sspo-9", "lambda 0.9")):
                if not all(name in arms for arms in some):
                    continue
                cells = [f"{family}, {' and '.join(group)}", text, str(sum(len(arms[name]) for arms in some))]
                for other in ("rloo", f"{name}-shuffled", f"{name}-zero"):
                    cells += [_of_seeds(some, name, other, how, "correct", 1) for how in ("greedy", "sampled")]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", SEEDS_NOTE])


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t). The half width of one value is infinite."""
    n = len(values)
    mean = _tie(sum(values) / n)
    if n < 2:
        return mean, math.inf
    return mean, student(n - 1) * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t.

    Above 6 degrees of freedom an expansion (Abramowitz and Stegun 26.7.5), exact to three decimals.
    """
    exact = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469)
    if freedom <= len(exact):
        return exact[freedom - 1]
    z, n = 1.959964, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def accuracy(runs: list[dict], how: str) -> tuple[float, float]:
    """(mean, 1.96 standard errors over problems). A problem counts with its mean over the runs."""
    return total(runs, how, "correct"), 1.96 * standard_error(_by_problem(runs, how, "correct"))


def total(runs: list[dict], how: str, key: str) -> float:
    """Mean over runs and problems. It is one division of integers, so equal means are rounded alike."""
    return sum(sum(run[how][key]) for run in runs) / sum(len(run[how][key]) for run in runs)


def difference(runs: list[dict], others: list[dict], how: str, key: str) -> tuple[float, float, list[float]]:
    """(mean difference, 1.96 standard errors over problems, each seed's mean difference)."""
    ours, theirs = (_by_problem(some, how, key) for some in (runs, others))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    return (
        total(runs, how, key) - total(others, how, key),
        1.96 * standard_error(gaps),
        of_seeds(runs, others, how, key),
    )


def of_seeds(runs: list[dict], others: list[dict], how: str, key: str) -> list[float]:
    """Each seed's difference of means. If the others lack the seed, their first run is taken."""
    of_seed = {run["seed"]: run for run in others}
    return [_tie(total([r], how, key) - total([of_seed.get(r["seed"], others[0])], how, key)) for r in runs]


def _tie(value: float) -> float:
    """Drops the last digits. Otherwise the order of a sum could decide how the same number is rounded."""
    return round(value, 9)


def _by_problem(runs: list[dict], how: str, key: str) -> list[float]:
    return [sum(column) / len(runs) for column in zip(*(run[how][key] for run in runs), strict=True)]


def _difference(arms, name: str, other: str, how: str, key: str, sign: int) -> str:
    if other not in arms:
        return "-"
    mean, error, single = difference(arms[name], arms[other], how, key)
    return _marked(f"{mean:+.3f} ± {error:.3f} [{min(single):+.3f}, {max(single):+.3f}]", mean, error, sign)


def _of_seeds(tasks: Sequence[Mapping[str, list[dict]]], name: str, other: str, how: str, key: str, sign: int) -> str:
    if not all(name in arms and other in arms for arms in tasks):
        return "-"
    single = [gap for arms in tasks for gap in of_seeds(arms[name], arms[other], how, key)]
    mean, error = interval(single)
    return _marked(f"{mean:+.3f} ± {error:.3f}" if len(single) > 1 else f"{mean:+.3f}", mean, error, sign)


def _marked(text: str, mean: float, error: float, sign: int) -> str:
    if abs(mean) <= error:
        return text
    return f"**{text}**" if mean * sign > 0 else f"*{text}*"


def _skips(runs: list[dict]) -> str:
    """Share of the solutions that skip a needed step, and the share of these that are right."""
    pairs = [pair for run in runs for pair in zip(run["greedy"]["skipped"], run["greedy"]["correct"], strict=True)]
    right = [correct for skipped, correct in pairs if skipped]
    return f"{len(right) / len(pairs):.3f} ({sum(right) / len(right):.0%})" if right else "0"


def _tokens(arms, name: str, how: str) -> str:
    if "start" not in arms:
        return "-"
    ours, start = (sum(map(sum, (run[how]["tokens"] for run in arms[arm]))) / len(arms[arm]) for arm in (name, "start"))
    change = ours / start - 1
    return f"**{change:+.0%}**" if change <= -0.45 else f"{change:+.0%}"
