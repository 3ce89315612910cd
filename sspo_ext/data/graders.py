# SPDX-License-Identifier: Apache-2.0
"""Graders: functions that reward a completion by its answer.

A grader has one of two forms:

* ours, `reward(prompt, completion, answer) -> float`;
* TRL's, `reward(prompts, completions, **columns) -> list[float]`, recognised by a parameter named `prompts`,
  `completions` or `completion_ids`.

The ready-made graders import their packages when `load_grader` makes them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .chat import goes_on, with_words

if TYPE_CHECKING:
    from ..signals.probing.texts import Probe

Grader = Callable[..., Any]

DEFAULT_MARKER = "####"


def load_grader(name: str) -> Grader:
    r"""Make a grader from its name.

    Args:
        name: one of

            * "exact" or "exact:MARKER": 1 if the text after the last MARKER equals the answer, or one of several
              answers, apart from white space. The default MARKER is "####". Without a MARKER in the completion, its
              last line that is not blank counts. Of an answer that is a solution with a MARKER, as GSM8K's are, the
              text after it counts. An answer that is a number, not a text, is equal in any spelling: 26, 26.0.
            * "math-verify": 1 if completion and answer are the same mathematics (package math-verify, which works in
              the main thread only). An answer without $, \(, \[ or \boxed is LaTeX as a whole: "\sqrt{2}". A completion
              is read as math-verify reads it: plain numbers anywhere, other mathematics only between delimiters. The
              grader raises ValueError for an answer without mathematics.
            * "reasoning-gym": the data set's own score, in [0, 1], of the text after the last "####" (package
              reasoning-gym). The answer is the data set's entry, {"question", "answer", "metadata":
              {"source_dataset", ...}}.
            * "package.module:function": your own function.

    Returns:
        The grader.

    Raises:
        ValueError: the name is none of these, or the module has no such function.
        ImportError: the package or module is not installed.

    Examples:
        >>> from sspo_ext.data.graders import load_grader
        >>> load_grader("exact")("6 + 13 = ", "6 + 13 = 19\n#### 19", 19)
        1.0
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
    """The grader "exact:MARKER" of `load_grader`."""

    def exact(prompt: str, completion: str, answer: Any) -> float:
        given = final_text(completion, marker)
        texts, values = answer_texts(answer), _accepted(answer)
        same_text = any(given.split() == text.rpartition(marker)[2].split() for text in texts)
        return float(same_text or any(not isinstance(one, str) and _as_number(given) == one for one in values))

    return exact


def final_text(completion: str, marker: str = DEFAULT_MARKER) -> str:
    """The text after the last `marker`. Without a marker, the last line that is not blank, or ""."""
    _, found, text = completion.rpartition(marker)
    if found:
        return text.strip()
    lines = completion.strip().splitlines()
    return lines[-1].strip() if lines else ""


def answer_text(answer: Any) -> str:
    """The answer as the model should write it, from a text, a number, or a mapping with an "answer".

    A whole number is written without a point: "26" for 26.0. Of a solution that ends in an answer, as GSM8K's do, it is
    the text after the last "####".
    """
    value = answer.get("answer") if isinstance(answer, dict) else answer
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"answer: expected a text, a number or a mapping with an 'answer', got {answer!r}")
    if isinstance(value, str):
        _, found, text = value.rpartition(DEFAULT_MARKER)
        return text.strip() if found else value
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"answer: expected a finite number, got {value}")
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(value)


def _accepted(answer: Any) -> list:
    """The accepted answers as they were given."""
    value = answer.get("answer") if isinstance(answer, dict) else answer
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def answer_texts(answer: Any) -> list[str]:
    """The accepted answers: `answer_text` of the answer, or of each in a list.

    Raises:
        ValueError: there is none, one is blank, which an empty completion would match, or a number is not finite.
        TypeError: an answer is neither a text nor a number.
    """
    texts = [answer_text(one) for one in _accepted(answer)]
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"answer: expected a text, a number or a list of them, none blank, got {answer!r}")
    return texts


def grade(grader: Grader, prompt: Any, completion: str, answer: Any, /, **columns: Any) -> float:
    """The reward of one completion, as `grade_rows` gives it."""
    return grade_rows(grader, [{**columns, "prompt": prompt, "answer": answer}], [completion])[0]


def grade_rows(
    grader: Grader,
    rows: Sequence[Mapping],
    completions: Sequence[str],
    *,
    unit: bool = False,
    missing: float | None = None,
    **more: Any,
) -> list[float]:
    """The rewards of completions, one for each row.

    Args:
        grader: of our form, called for each row; or of TRL's form, called once with all rows, their columns by name,
            and `more`. Where a prompt is chat messages, TRL's form gets the completion as messages too. A last message
            of the assistant's belongs to the completion that continues it.
        rows: with "prompt", and "answer" and other columns where the grader needs them.
        completions: a text for each row.
        unit: whether rewards must be in [0, 1].
        missing: what a reward of None, "does not apply", counts as. By default it is 0 in TRL's form, and an error in
            ours.
        **more: extra arguments for TRL's form.

    Returns:
        A finite number for each row.

    Raises:
        ValueError: a reward is not finite, is outside [0, 1] with `unit`, or the number of rewards is wrong.
        TypeError: a reward is not a number.
    """
    if not rows:
        return []
    if not _in_batches(grader):
        found = [grader(row["prompt"], text, row.get("answer")) for row, text in zip(rows, completions, strict=True)]
    else:
        asked = [_in_form(row["prompt"], text) for row, text in zip(rows, completions, strict=True)]
        prompts, in_form = [prompt for prompt, _ in asked], [completion for _, completion in asked]
        names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
        columns = {name: [row.get(name) for row in rows] for name in names}
        found = grader(**{**columns, "prompts": prompts, "completions": in_form, **more})
        if not hasattr(found, "__len__") or len(found) != len(rows):
            raise ValueError(f"grader: expected a reward for each of {len(rows)} completions, got {found!r}")
        missing = 0.0 if missing is None else missing
    return [
        missing if reward is None and missing is not None else _checked(reward, text, unit)
        for reward, text in zip(found, completions, strict=True)
    ]


def _in_form(prompt: Any, text: str) -> tuple[Any, Any]:
    """The prompt and the completion as TRL gives them: words of the assistant that it continues belong to it."""
    if isinstance(prompt, str):
        return prompt, text
    if not goes_on(prompt):
        return prompt, [{"role": "assistant", "content": text}]
    return list(prompt[:-1]), [with_words(prompt, text)[-1]]


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
            f"got {value:g} for the completion {completion!r}; rescale it (from [-1, 1]: (reward + 1) / 2), or train "
            "on the outcome alone (combine='outcome')"
        )
    return value


def answer_grader(grader: Grader, probe: Probe | None = None) -> Callable[..., float]:
    """Adapt a completion grader to short answers, as the graded probe and `trace_candidates` give them.

    The short answer is graded twice: alone, and behind the probe's text, as in "The final answer is 26". The better
    grade counts. So "exact" accepts 26 whatever the probe says, and a grader that looks for a marker finds it in the
    probe.

    Args:
        grader: of either form.
        probe: that the short answer follows; None: the text is a whole response and is graded once.

    Returns:
        `grade(text, answer, prompt="", **columns) -> float`. The answer is what the grader takes, or a list of accepted
        answers, of which the best grade counts.
    """

    def graded(text: str, answer: Any, /, prompt: Any = "", **columns: Any) -> float:
        with_probe = [] if probe is None else [f"{probe.text}{probe.separator}{text}"]
        accepted = answer if isinstance(answer, (list, tuple)) else [answer]
        return max(grade(grader, prompt, form, one, **columns) for one in accepted for form in (text, *with_probe))

    return graded


def _without_dollar_signs(text: str) -> str:
    r"""The text without "\$", a dollar sign to LaTeX. math-verify would read it as a formula's start or end.

    In "\\$" the dollar does end a formula, after a line break.
    """
    return re.sub(r"(?<!\\)((?:\\\\)*)\\\$", r"\1", text)


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
        given = parse(_without_dollar_signs(completion))
        return float(any(verify(gold(_without_dollar_signs(text)), given) for text in answer_texts(answer)))

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
        return float(score(final_text(completion), answer))  # pyright: ignore[reportCallIssue]  # typed as Callable[[], ...]

    return dataset_score
