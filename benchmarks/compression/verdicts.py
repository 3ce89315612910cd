"""What the table is asked, answered by differences on the same held-out problems."""

from __future__ import annotations

import math

from .arms import ARMS

HEADER = (
    "| task | arm | tokens, greedy | sampled | accuracy less RLOO's, greedy | sampled | skipped less the start's, "
    "greedy | sampled | skip a step, greedy (of these right) | accuracy less shuffled V's, greedy | sampled "
    "| less V = 0's, greedy | sampled |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
NOTE = (
    "Tokens: change from the start model (asked: -45 % or more). Differences ± 1.96 standard errors over the same "
    "problems, each problem's mean over the seeds, with the smallest and largest of single seeds in brackets; they do "
    "not hold the chance of drawing other seeds. **Bold**: beyond the error and in favour of SSPO, or of step pairs "
    "(tokens: as asked); *italic*: beyond the error and against it."
)


def verdicts(tasks: dict[tuple[str, str], dict[str, list[dict]]]) -> str:
    """One line for each task and SSPO arm; a dash where what it is compared with was not run."""
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


def pair_verdicts(tasks: dict[tuple[str, str], dict[str, list[dict]]]) -> str:
    """What step pairs add to the likelihood of the same search, to pairs of whole solutions, and to SSPO's updates;
    empty where no pairs were run."""
    lines = []
    for (family, language), arms in sorted(tasks.items()):
        for other in ("pairs-likelihood", "whole-pairs", "sspo-0"):
            if "pairs" in arms and other in arms:
                cells = [
                    _difference(arms, "pairs", other, how, key, sign)
                    for key, sign in (("correct", 1), ("skipped", -1))
                    for how in ("greedy", "sampled")
                ]
                lines.append(
                    f"| {family}, {language} | {ARMS[other].text.removeprefix('... ')} | {' | '.join(cells)} |"
                )
    return "\n".join([PAIRS_HEADER, *lines]) if lines else ""


def difference(runs: list[dict], others: list[dict], how: str, key: str) -> tuple[float, float, list[float]]:
    """(mean over problems of the difference of means over seeds, its 1.96 standard errors, means of each seed)."""
    ours, theirs = (_by_problem(some, how, key) for some in (runs, others))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / len(gaps)
    error = math.sqrt(sum((g - mean) ** 2 for g in gaps) / max(len(gaps) - 1, 1) / len(gaps))
    of_seed = {run["seed"]: run[how][key] for run in others}
    single = [(sum(run[how][key]) - sum(of_seed.get(run["seed"], others[0][how][key]))) / len(gaps) for run in runs]
    return mean, 1.96 * error, single


def _by_problem(runs: list[dict], how: str, key: str) -> list[float]:
    return [sum(column) / len(runs) for column in zip(*(run[how][key] for run in runs), strict=True)]


def _difference(arms, name: str, other: str, how: str, key: str, sign: int) -> str:
    if other not in arms:
        return "-"
    mean, error, single = difference(arms[name], arms[other], how, key)
    text = f"{mean:+.3f} ± {error:.3f} [{min(single):+.3f}, {max(single):+.3f}]"
    if abs(mean) <= error:
        return text
    return f"**{text}**" if mean * sign > 0 else f"*{text}*"


def _skips(runs: list[dict]) -> str:
    """Share of the solutions that leave out a needed step, and how many of these are right all the same."""
    pairs = [pair for run in runs for pair in zip(run["greedy"]["skipped"], run["greedy"]["correct"], strict=True)]
    right = [correct for skipped, correct in pairs if skipped]
    return f"{len(right) / len(pairs):.3f} ({sum(right) / len(right):.0%})" if right else "0"


def _tokens(arms, name: str, how: str) -> str:
    if "start" not in arms:
        return "-"
    ours, start = (sum(map(sum, (run[how]["tokens"] for run in arms[arm]))) / len(arms[arm]) for arm in (name, "start"))
    change = ours / start - 1
    return f"**{change:+.0%}**" if change <= -0.45 else f"{change:+.0%}"
