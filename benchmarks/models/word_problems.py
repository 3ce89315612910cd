# SPDX-License-Identifier: Apache-2.0
"""Word problems in the style of grade school, English and Chinese, and a wordy teacher's solutions.

    Tom has 12 apples. He buys 3 boxes of 4 apples. How many apples does Tom have now?

    Let me think about this step by step.
    The boxes hold 3 * 4 = 12 apples.          needed
    So far that is 12 apples.
    Together that is 12 + 12 = 24 apples.      needed
    Let me check: 12 + 12 = 24.
    #### 24                                    needed

A problem has two to four operations on small whole numbers. The teacher checks, repeats, sums up and hesitates, most of
all once he knows the answer. Some of his slips he mends when he checks, others lead to a wrong answer. A right answer
is worth 1 and any other 0: no reward sees a length.
"""

from __future__ import annotations

import operator
import random
import re
from dataclasses import dataclass
from typing import Any

from sspo_ext.demo.tasks import Review, common_length, distinct_problems, draw_from

from .word_texts import LANGUAGES, PROBE, TEXTS

# The teacher's habits, with their probabilities: how many redundant lines follow an operation, and the last one.
AFTER_EACH, AFTER_LAST = ((0, 0.5), (1, 0.4), (2, 0.1)), ((1, 0.25), (2, 0.4), (3, 0.35))

KINDS = (("check", 0.35), ("repeat", 0.2), ("so_far", 0.25), ("doubt", 0.2))

OPENING, RESTATES, SLIP, MENDS, ANSWERS_EARLY = 0.5, 0.4, 0.07, 0.5, 0.05

MOST = 60  # no state is larger

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

_EQUATION = re.compile(r"(\d+)\s*([-+*/])\s*(\d+)\s*=\s*(\d+)")

_SIDE = "+side"  # the key of the addition of a product that stands on a line of its own


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        prompt: The question; it ends with a newline.
        answer: The right answer as a text.
        language: One of `LANGUAGES`.
        words: What stands in the language's sentences: name, item, ...
        start: The number at the start.
        ops: (operator, number): "+", "-", "*", "/", or "boxes" with (boxes, items in each), which is two operations.
    """

    prompt: str
    answer: str
    language: str
    words: dict[str, str]
    start: int
    ops: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Line:
    """A line of a solution.

    Attributes:
        text: What it says, without a newline.
        needed: Whether it applies an operation for the first time, or gives the answer.
    """

    text: str
    needed: bool


class WordProblems:
    """The task in some languages.

    Args:
        languages: Some of `LANGUAGES`.
    """

    def __init__(self, languages: tuple[str, ...] = LANGUAGES):
        if not languages or any(language not in LANGUAGES for language in languages):
            raise ValueError(f"languages: expected some of {LANGUAGES}, got {languages}")
        self.languages = languages

    # ---- problems

    def problem(self, rng: random.Random, language: str) -> Problem:
        """A random problem."""
        texts = TEXTS[language]
        words = texts.draw_words(rng)
        operations = rng.randint(2, 4)
        while True:
            start, kinds = rng.randint(2, 20), []
            while (left := operations - sum(1 + (k == "boxes") for k in kinds)) > 0:
                kinds.append(rng.choice("+-+-*/" if left < 2 else ["+", "-", "+", "-", "*", "/", "boxes", "boxes"]))
            ops = [(kind, (rng.randint(2, 5), rng.randint(2, 6)) if kind == "boxes" else _number(kind, rng))
                   for kind in kinds]  # fmt: skip
            states = _states(start, ops)
            if states and len({kind for kind in kinds if kind in "*/"}) == sum(kind in "*/" for kind in kinds):
                break
        told = [texts.start, *(rng.choice(texts.tell[kind]) for kind, _ in ops), texts.ask]
        numbers = [{"n": start}, *(_named(op) for op in ops), {}]
        sentences = (text.format(**words, **found) for text, found in zip(told, numbers, strict=True))
        return Problem(texts.space.join(sentences) + "\n", str(states[-1]), language, words, start, tuple(ops))

    def problems(self, size: int, seed: int, *, held_out: bool) -> list[Problem]:
        """Distinct problems, the languages in turn. A hash of the prompt splits all of them; a fifth is held out.

        Args:
            size: How many.
            seed: Decides which.
            held_out: Which side they are from.

        Returns:
            `size` problems.
        """
        rng, languages = random.Random(seed), self.languages
        return distinct_problems(lambda k: self.problem(rng, languages[k % len(languages)]), size, held_out)

    # ---- the teacher

    def demonstration(self, problem: Problem, rng: random.Random) -> list[Line]:
        """A solution by the teacher: wordy, sometimes with an early answer, sometimes wrong."""
        texts, words = TEXTS[problem.language], problem.words
        lines = [Line(rng.choice(texts.opening), False)] if rng.random() < OPENING else []
        if rng.random() < RESTATES:
            lines.append(Line(texts.restate.format(**words, n=problem.start), False))
        todo, state = _single(problem.ops), problem.start
        product = 0
        for k, (kind, number) in enumerate(todo):
            left, symbol, right = _sides(kind, number, state, product)
            new = _slip(left, symbol, right, rng)
            lines.append(Line(texts.line(texts.apply[kind], left, symbol, right, new, words), True))
            last = k == len(todo) - 1
            for _ in range(draw_from(AFTER_LAST if last else AFTER_EACH, rng)):
                text, new = self._redundant(problem, (left, symbol, right, new), kind == "boxes", rng)
                lines.append(Line(text, False))
            state, product = (state, new) if kind == "boxes" else (new, product)
            if not last and kind != "boxes" and rng.random() < ANSWERS_EARLY:
                state = _finish(state, todo[k + 1 :])
                break
        return [*lines, Line(f"{PROBE} {state}", True)]

    def _redundant(self, problem: Problem, equation: tuple, side: bool, rng: random.Random) -> tuple[str, int]:
        """A line that no solution needs, and the number that the teacher believes in after it."""
        texts, words = TEXTS[problem.language], problem.words
        left, symbol, right, new = equation
        kind = draw_from(KINDS, rng)
        if kind == "check":
            truth = _apply(left, symbol, right)
            if new != truth and rng.random() < MENDS:
                return texts.line(texts.mend, left, symbol, right, truth, words), truth
            return texts.line(texts.check, left, symbol, right, new, words), new
        if kind == "repeat":
            return texts.line(texts.repeat, left, symbol, right, new, words), new
        if kind == "so_far" and not side:
            return rng.choice(texts.so_far).format(**words, n=new), new
        return rng.choice(texts.doubt).format(**words), new

    def minimal(self, problem: Problem) -> list[str]:
        """The shortest right solution that skips nothing."""
        texts, state, product, lines = TEXTS[problem.language], problem.start, 0, []
        for kind, number in _single(problem.ops):
            left, symbol, right = _sides(kind, number, state, product)
            new = _apply(left, symbol, right)
            lines.append(texts.line(texts.apply[kind], left, symbol, right, new, problem.words))
            state, product = (state, new) if kind == "boxes" else (new, product)
        return [*lines, f"{PROBE} {state}"]

    # ---- the judge

    def reward(self, prompt: str, completion: str, answer: str) -> float:
        """1 for the right answer after the last words that announce one, else 0."""
        _, found, text = completion.rpartition(PROBE)
        return float(bool(found) and text.strip() == answer)

    def labels(self, problem: Problem, completion: str) -> list[Line]:
        """The lines of a solution, each with whether it was needed.

        Needed are the first line that applies an operation, in the problem's order, and the last line that answers.
        """
        wanted, lines, found = _keys(problem), [], self._written(problem, completion)
        answers = [k for k, (text, _) in enumerate(found) if text.startswith(PROBE)]
        for k, (text, key) in enumerate(found):
            applies = key in wanted
            if key is not None and applies:
                del wanted[: wanted.index(key) + 1]
            lines.append(Line(text, applies or k == (answers or [-1])[-1]))
        return lines

    def review(self, problem: Problem, completion: str) -> Review:
        """Reads a solution line by line; `skipped` counts the operations that no line applies."""
        found = self._written(problem, completion)
        keys = [key for _, key in found if key is not None]
        correct = bool(self.reward(problem.prompt, completion, problem.answer))
        wanted = _keys(problem)
        return Review(correct, len(found), len(wanted) - common_length(wanted, keys))

    def _written(self, problem: Problem, completion: str) -> list[tuple[str, str | None]]:
        """Each line, and the key of the operation that it applies: none for a check or a repeat."""
        texts, product, before, found = TEXTS[problem.language], None, None, []
        for line in filter(None, map(str.strip, completion.split("\n"))):
            match, key = _EQUATION.search(line), None
            if match and not line.startswith(texts.not_applied):
                left, symbol, right, result = match.groups()
                sides = f"{left}*{right}"
                if symbol == "*" and any(op == ("boxes", (int(left), int(right))) for op in problem.ops):
                    key, product = sides, result
                else:
                    key = _SIDE if symbol == "+" and right == product else symbol + right
                    product = None if key == _SIDE else product
                before, key = (left, symbol, right), None if before == (left, symbol, right) else key
            elif match and match[2] == "*" and product is not None:
                product = match[4]  # a check may mend it
            found.append((line, key))
        return found


def solution_text(lines: list[str]) -> str:
    """The lines as a model should write them: each but the last ends with a newline."""
    return "\n".join(lines)


def _number(kind: str, rng: random.Random) -> int:
    return {"+": rng.randint(2, 15), "-": rng.randint(2, 12), "*": rng.choice((2, 3)), "/": 2}[kind]


def _named(op: tuple) -> dict[str, int]:
    kind, number = op
    return dict(zip("ab", number, strict=True)) if kind == "boxes" else {"n": number}


def _single(ops) -> list[tuple[str, Any]]:
    """One entry for each operation: boxes are a product, and then its addition."""
    return [one for op in ops for one in ((op, ("side", 0)) if op[0] == "boxes" else (op,))]


def _keys(problem: Problem) -> list[str]:
    def key(kind, number) -> str:
        return _SIDE if kind == "side" else f"{number[0]}*{number[1]}" if kind == "boxes" else f"{kind}{number}"

    return [key(*op) for op in _single(problem.ops)]


def _sides(kind: str, number: Any, state: int, product: int) -> tuple[int, str, int]:
    """(left, operator, right) of the equation that applies an operation to a state."""
    if kind == "boxes":
        return number[0], "*", number[1]
    return (state, "+", product) if kind == "side" else (state, kind, number)


def _apply(left: int, symbol: str, right: int) -> int:
    return _OPERATORS[symbol](left, right)


def _finish(state: int, ops) -> int:
    """The state after single operations. The teacher does them in his head, so a wrong state stays wrong."""
    product = 0
    for kind, number in ops:
        new = max(_apply(*_sides(kind, number, state, product)), 0)
        state, product = (state, new) if kind == "boxes" else (new, product)
    return state


def _states(start: int, ops) -> list[int]:
    """The states after each operation. Empty if one is negative, too large, or a half is no whole number."""
    states = [start]
    for kind, number in ops:
        if kind == "/" and states[-1] % 2:
            return []
        states.append(states[-1] + number[0] * number[1] if kind == "boxes" else _apply(states[-1], kind, number))
        if not 1 <= states[-1] <= MOST:
            return []
    return states


def _slip(left: int, symbol: str, right: int, rng: random.Random) -> int:
    """What the teacher writes: the right number, or rarely one beside it."""
    new = max(_apply(left, symbol, right), 0)
    return max(new + rng.choice((-10, -2, -1, 1, 2, 10)), 0) if rng.random() < SLIP else new
