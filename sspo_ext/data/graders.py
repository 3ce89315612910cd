"""Outcome rewards: what a completion is worth, by its answer alone.

A grader is any function `reward(prompt, completion, answer) -> float`, or one of TRL's,
`reward(prompts, completions, **columns) -> list[float]`, known by a parameter `prompts`, `completions` or
`completion_ids`. The ready-made ones import what they need when they are made.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..signals.probing.texts import Probe

Grader = Callable[..., Any]

DEFAULT_MARKER = "####"


def load_grader(name: str) -> Grader:
    """A grader by name:

    * "exact" or "exact:MARKER": 1 if the text after the last MARKER (default "####", else the last line that is not
      blank) is the answer, or one of several, white space aside;
    * "math-verify": 1 if the two are the same mathematics (package math-verify, which needs the main thread). An answer
      without $, \\(, \\[ or \\boxed is LaTeX as a whole, "\\sqrt{2}"; a completion is read as math-verify reads it:
      numbers in plain text, all else between such delimiters. ValueError for an answer without mathematics;
    * "reasoning-gym": the dataset's own score in [0, 1] of the text after the last "####"; the answer is the
      dataset's entry, {"question", "answer", "metadata": {"source_dataset", ...}} (package reasoning-gym);
    * "package.module:function": your own.

    Raises ValueError for anything else, ImportError for a package or module that is not there.
    """
    if name == "exact" or name.startswith("exact:"):
        return exact_grader(name.partition(":")[2] or DEFAULT_MARKER)
    if name == "math-verify":
        return _math_verify()
    if name == "reasoning-gym":
        return _reasoning_gym()
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise ValueError(
            "grader: expected 'exact', 'exact:MARKER', 'math-verify', 'reasoning-gym' or 'module:function', "
            f"got {name!r}"
        )
    found = getattr(importlib.import_module(module), attribute, None)
    if not callable(found):
        raise ValueError(f"grader: {module!r} has no function {attribute!r}")
    return found


def exact_grader(marker: str = DEFAULT_MARKER) -> Grader:
    def exact(prompt: str, completion: str, answer: Any) -> float:
        words = final_text(completion, marker).split()
        return float(any(words == text.split() for text in answer_texts(answer)))

    return exact


def final_text(completion: str, marker: str = DEFAULT_MARKER) -> str:
    """What follows the last `marker`; without one, the last line that is not blank; "" if there is none."""
    _, found, text = completion.rpartition(marker)
    if found:
        return text.strip()
    lines = completion.strip().splitlines()
    return lines[-1].strip() if lines else ""


def answer_text(answer: Any) -> str:
    """The answer as the model should write it: a text, a number, or the "answer" of a mapping."""
    value = answer.get("answer") if isinstance(answer, dict) else answer
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"answer: expected a text, a number or a mapping with an 'answer', got {answer!r}")
    return str(value)


def answer_texts(answer: Any) -> list[str]:
    """The accepted spellings: `answer_text` of the answer, or of each one of a list. ValueError for none, or a blank
    one, which saying nothing would match."""
    value = answer.get("answer") if isinstance(answer, dict) else answer
    texts = [answer_text(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"answer: expected a text, a number or several, none of them blank, got {answer!r}")
    return texts


def grade(grader: Grader, prompt: Any, completion: str, answer: Any, /, **columns: Any) -> float:
    """The reward of one completion, checked to be one finite number."""
    return grade_rows(grader, [{**columns, "prompt": prompt, "answer": answer}], [completion])[0]


def grade_rows(
    grader: Grader, rows: Sequence[Mapping], completions: Sequence[str], *, unit: bool = False, **more: Any
) -> list[float]:
    """The reward of every row's completion, each checked to be one finite number; with `unit` in [0, 1].

    A grader of TRL's form gets all rows in one call, their columns by name beside what `more` holds, and, where
    prompts are chat messages, completions as messages too; its None, "does not apply", is 0.
    """
    if not rows:
        return []
    if not _in_batches(grader):
        found = [grader(row["prompt"], text, row.get("answer")) for row, text in zip(rows, completions, strict=True)]
    else:
        prompts = [row["prompt"] for row in rows]
        said = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        columns = {name: [row.get(name) for row in rows] for name in names}
        found = grader(**{**columns, "prompts": prompts, "completions": said, **more})
        if not hasattr(found, "__len__") or len(found) != len(rows):
            raise ValueError(f"grader: expected a reward for each of {len(rows)} completions, got {found!r}")
        found = [0.0 if reward is None else reward for reward in found]
    return [_checked(reward, text, unit) for reward, text in zip(found, completions, strict=True)]


def _in_batches(grader: Grader) -> bool:
    try:
        return not {"prompts", "completions", "completion_ids"}.isdisjoint(inspect.signature(grader).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _checked(reward: Any, completion: str, unit: bool) -> float:
    try:
        value = float(reward)
    except (TypeError, ValueError) as error:
        raise TypeError(f"grader: expected a number, got {reward!r} for the completion {completion!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"grader: expected a finite reward, got {value} for the completion {completion!r}")
    if unit and not -1e-6 <= value <= 1 + 1e-6:
        raise ValueError(
            "reward_func: expected a reward in [0, 1], since values are probabilities of a right answer, "
            f"got {value:g} for the completion {completion!r}; rescale it (-1 and +1: (reward + 1) / 2), or train on "
            "the outcome alone (combine='outcome')"
        )
    return value


def answer_grader(grader: Grader, probe: Probe | None = None) -> Callable[..., float]:
    """A grader of completions as one of what `sspo_ext.signals` has: `grade(text, answer, prompt="", **columns)`.

    For `trace_candidates`, whose texts are responses, and for the graded probe, whose texts are short answers after the
    `probe`. Such an answer is graded as a completion that is the answer alone, and as one that says the probe's text
    before it, "The final answer is 26"; the better grade counts. So "exact" accepts 26 whatever the probe says, and a
    grader that looks for a mark of its own finds it in the probe.

    answer  as the grader takes it, or a list of accepted ones, of which the best grade counts
    """

    def graded(text: str, answer: Any, /, prompt: Any = "", **columns: Any) -> float:
        said = [] if probe is None else [f"{probe.text}{probe.separator}{text}"]
        accepted = answer if isinstance(answer, (list, tuple)) else [answer]
        return max(grade(grader, prompt, form, one, **columns) for one in accepted for form in (text, *said))

    return graded


def _math_verify() -> Grader:
    from math_verify import parse, verify

    @functools.lru_cache(4096)  # a group's completions share their answer
    def gold(text: str) -> list:
        bare = re.search(r"\$|\\boxed|\\[(\[]", text) is None
        found = parse(f"${text}$" if bare else text) or parse(text)
        if not found:
            raise ValueError(f"answer: math-verify reads no mathematics in {text!r}")
        return found

    def same_mathematics(prompt: str, completion: str, answer: Any) -> float:
        # "\$" is dollars to LaTeX, and to math-verify the beginning of a formula that never ends
        given = parse(completion)
        return float(any(verify(gold(text.replace("\\$", "")), given) for text in answer_texts(answer)))

    return same_mathematics


def _reasoning_gym() -> Grader:
    from reasoning_gym import get_score_answer_fn

    def dataset_score(prompt: str, completion: str, answer: Any) -> float:
        try:
            score = get_score_answer_fn(answer["metadata"]["source_dataset"])
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"answer: expected reasoning-gym's entry with metadata.source_dataset, got {answer!r}"
            ) from error
        return float(score(final_text(completion), answer))

    return dataset_score
