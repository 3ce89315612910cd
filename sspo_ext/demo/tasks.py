# SPDX-License-Identifier: Apache-2.0
"""Generated reasoning tasks: problems, a wordy teacher's solutions in steps, a verifier, and a tokenizer.

A problem applies operations to a state, one line for each, and ends with an answer line:

    family   problem                    a needed line     answer
    sums     6 + 13 + 7                 6 + 13 = 19       the last sum, one token
    letters  d a c | rev | add b        rev : c a d       the letters at the end, several tokens
    sort     sort 7 3 12                3 : 3 7           the sorted numbers, several tokens

There are two languages, "en" and "zh". A model first imitates the teacher's solutions. The teacher checks, repeats,
sums up and hesitates, as reasoning models are said to do. He also slips: some slips he mends when he checks, others
lead to a wrong answer. No reward sees a length: a solution is right or wrong.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("sums", "letters", "sort")

LANGUAGES = ("en", "zh")

# The teacher's habits, with their probabilities: how many redundant lines follow a needed one, and of which kind.
# The needed lines of sorting are long themselves, so there he adds more lines to be as wordy.
_COUNTS = ((0, 0.2), (1, 0.35), (2, 0.3), (3, 0.15))

REDUNDANT_COUNTS = {"sums": _COUNTS, "letters": _COUNTS, "sort": ((0, 0.1), (1, 0.45), (2, 0.3), (3, 0.15))}

REDUNDANT_KINDS = (("check", 0.35), ("repeat", 0.2), ("so_far", 0.25), ("filler", 0.2))

OPENING = {"sums": 0.5, "letters": 0.5, "sort": 0.65}

SYSTEMATIC_SLIP, RANDOM_SLIP, MENDS, ANSWERS_EARLY = 0.4, 0.02, 0.6, 0.08

_WORDS = {
    "en": {
        "check": "check", "so_far": "so far", "filler": "wait let me think again", "opening": "hmm let me think",
        "answer": "####", "plus": "+", "equals": "=", "gives": ":", "ask": "= ?", "sort": "sort",
        "rev": "rev", "add": "add", "swap": "swap", "drop": "drop",
    },
    "zh": {
        "check": "检查", "so_far": "目前 为止", "filler": "等等 让 我 再 想 想", "opening": "嗯 让 我 想 想",
        "answer": "答案", "plus": "加", "equals": "得", "gives": "变成", "ask": "等于 几 ？",
        "sort": "排序", "rev": "倒转", "add": "添上", "swap": "交换", "drop": "去掉",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        prompt: The question; it ends with a newline.
        answer: The right answer as a text.
        start: The state before the operations.
        ops: The operations.
    """

    prompt: str
    answer: str
    start: Any = field(repr=False)
    ops: tuple = field(repr=False)


@dataclass(frozen=True)
class Review:
    """What a solution does.

    Attributes:
        correct: Whether the answer is right.
        steps: The number of its lines.
        skipped: The number of operations that no line applies.
    """

    correct: bool
    steps: int
    skipped: int


class Task:
    """A family of tasks in one language.

    An answer line begins with `probe`, so this text also asks a model for its answer.

    Args:
        family: One of `FAMILIES`.
        language: One of `LANGUAGES`.
    """

    def __init__(self, family: str, language: str = "en"):
        if family not in FAMILIES or language not in LANGUAGES:
            raise ValueError(f"task: expected one of {FAMILIES} in one of {LANGUAGES}, got {family!r}, {language!r}")
        self.family, self.language = family, language
        self.words = _WORDS[language]
        self.probe = self.words["answer"]

    # ---- states and operations

    def problem(self, rng: random.Random) -> Problem:
        """A random problem."""
        w = self.words
        start: Any
        ops: Any
        if self.family == "sums":
            first, *ops = (rng.randint(2, 15) for _ in range(rng.randint(3, 5)))
            start, text = first, f" {w['plus']} ".join(map(str, (first, *ops)))
        elif self.family == "sort":
            first, *ops = rng.sample(range(1, 31), rng.randint(3, 5))
            start, text = (first,), f"{w['sort']} " + " ".join(map(str, (first, *ops)))
        else:
            start = tuple(rng.sample("abcdef", 3))
            ops = [("add", rng.choice("ghij")) if rng.random() < 0.4 else (rng.choice(("rev", "swap", "drop")),)]
            for _ in range(rng.randint(1, 3)):
                kinds = [k for k in ("rev", "swap", "add", "drop") if k != ops[-1][0]]
                kind = rng.choice(kinds)
                ops.append((kind, rng.choice("ghij")) if kind == "add" else (kind,))
            text = " | ".join([" ".join(start), *map(self._op_text, ops)])
        ops = tuple(ops)
        return Problem(f"{text} {w['ask']} \n", self.state_text(self._fold(start, ops)), start, ops)

    def problems(self, size: int, seed: int, *, held_out: bool) -> list[Problem]:
        """Distinct problems. A hash of the prompt splits all problems in two sides: a fifth is held out.

        Args:
            size: How many.
            seed: Decides which.
            held_out: Which side they are from.

        Returns:
            `size` problems.
        """
        rng = random.Random(seed)
        return distinct_problems(lambda _: self.problem(rng), size, held_out)

    def apply(self, state: Any, op: Any) -> Any:
        """The state after an operation."""
        if self.family == "sums":
            return state + op
        if self.family == "sort":
            return tuple(sorted((*state, op)))
        if op[0] == "rev":
            return state[::-1]
        if op[0] == "swap":
            return (*state[1::-1], *state[2:])
        return state[1:] if op[0] == "drop" else (*state, op[1])

    def slip(self, state: Any, op: Any, rng: random.Random) -> Any:
        """The state that the teacher writes: right, or a habitual slip where one applies, or rarely a random one."""
        right = self.apply(state, op)
        habit = None
        if self.family == "sums" and op % 10 >= 7 and state % 10 + op % 10 >= 10:
            habit = right - 10  # the carry is lost
        elif self.family == "sort" and right.index(op) not in (0, len(right) - 1):
            habit = (*state, op)  # put at the end
        elif self.family == "letters" and op[0] == "rev" and len(state) > 3:
            habit = (state[-1], *state[1:-1], state[0])  # only the ends change places
        elif self.family == "letters" and op[0] == "swap" and state[:1] > state[1:2]:
            habit = state
        if habit is not None and rng.random() < SYSTEMATIC_SLIP:
            return habit
        if rng.random() >= RANDOM_SLIP or not right:
            return right
        if self.family == "sums":
            return max(right + rng.choice((-2, -1, 1, 2)), 0)
        at = rng.randrange(len(right))
        return (*right[:at], rng.choice(right), *right[at + 1 :])

    def _fold(self, state: Any, ops: Sequence[Any]) -> Any:
        """The state after all operations."""
        for op in ops:
            state = self.apply(state, op)
        return state

    # ---- text

    def _op_text(self, op) -> str:
        return " ".join((self.words[op[0]], *op[1:]))

    def state_text(self, state: Any) -> str:
        """A state as a text."""
        return str(state) if self.family == "sums" else " ".join(map(str, state))

    def line(self, state: Any, op: Any, new: Any) -> str:
        """The line that applies an operation."""
        w = self.words
        if self.family == "sums":
            return f"{state} {w['plus']} {op} {w['equals']} {new}"
        return f"{self._op_key(op)} {w['gives']} {self.state_text(new)}".rstrip()

    def answer_line(self, text: str) -> str:
        """The line that gives the answer."""
        return f"{self.probe} {text}".rstrip()

    def minimal(self, problem: Problem) -> list[str]:
        """The shortest right solution."""
        state, lines = problem.start, []
        for op in problem.ops:
            new = self.apply(state, op)
            lines.append(self.line(state, op, new))
            state = new
        return [*lines, self.answer_line(problem.answer)]

    def demonstration(self, problem: Problem, rng: random.Random) -> list[str]:
        """A solution by the teacher: wordy, sometimes with an early answer, sometimes wrong."""
        w, state, k = self.words, problem.start, -1
        lines = [w["opening"]] if rng.random() < OPENING[self.family] else []
        for k, op in enumerate(problem.ops):
            new = self.slip(state, op, rng)
            needed = self.line(state, op, new)
            lines.append(needed)
            for _ in range(draw_from(REDUNDANT_COUNTS[self.family], rng)):
                if rng.random() < ANSWERS_EARLY:
                    return [*lines, self.answer_line(self.state_text(self._fold(new, problem.ops[k + 1 :])))]
                kind = draw_from(REDUNDANT_KINDS, rng)
                if kind == "check":
                    if rng.random() < MENDS:
                        new = self.apply(state, op)
                    lines.append(f"{w['check']} {self.line(state, op, new)}")
                elif kind == "repeat":
                    lines.append(self.line(state, op, new))
                elif kind == "so_far":
                    lines.append(f"{w['so_far']} {self.state_text(new)}".rstrip())
                else:
                    lines.append(w["filler"])
            state = new
            if rng.random() < ANSWERS_EARLY:
                break
        return [*lines, self.answer_line(self.state_text(self._fold(state, problem.ops[k + 1 :])))]

    def final_answer(self, completion: str) -> str | None:
        """The text after the last answer word, with single spaces; None if there is no such word."""
        _, found, answer = completion.rpartition(self.probe)
        return " ".join(answer.split()) if found else None

    def reward(self, prompt: str, completion: str, answer: str) -> float:
        """1 for the right answer, else 0."""
        return float(self.final_answer(completion) == answer)

    def review(self, problem: Problem, completion: str) -> Review:
        """Reads a solution line by line."""
        lines = [" ".join(line.split()) for line in completion.split("\n")]
        lines = [line for line in lines if line]
        written = [op for op in self.applied(lines) if op is not None]
        wanted = [self._op_key(op) for op in problem.ops]
        correct = bool(self.reward(problem.prompt, completion, problem.answer))
        return Review(correct, len(lines), len(wanted) - common_length(wanted, written))

    def applied(self, lines: Sequence[str]) -> list[str | None]:
        """The operation that each line applies; None for a line that applies none or repeats the one before it."""
        found, last = [], None
        for line in lines:
            op = self._applies(line)
            # Lines that apply nothing may stand between a line and its repeat.
            found.append(None if line == last else op)
            last = last if op is None else line
        return found

    def _op_key(self, op) -> str:
        return str(op) if self.family != "letters" else self._op_text(op)

    def _applies(self, line: str) -> str | None:
        """The operation that a line applies; None for a line that applies none, such as a check or a summary."""
        w = self.words
        if line.startswith((w["check"], w["so_far"], w["answer"])):
            return None
        if self.family == "sums":
            words = line.split()
            return words[2] if len(words) == 5 and words[1] == w["plus"] and words[3] == w["equals"] else None
        op, found, _ = line.partition(w["gives"])
        return op.strip() if found else None

    # ---- tokens

    def tokenizer(self):
        """A tokenizer in which every number, letter, word and newline is one token, and spaces separate tokens."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = dict.fromkeys(word for phrase in self.words.values() for word in phrase.split())
        items = [*map(str, range(100)), *"abcdefghij", "|"]
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "\n", *words, *items])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left",
            clean_up_tokenization_spaces=False,
        )  # fmt: skip


def solution_text(lines: Sequence[str]) -> str:
    """The lines as a model should write them: each but the last ends with a newline."""
    return " \n ".join(lines)


def distinct_problems(draw: Callable[[int], Any], size: int, held_out: bool) -> list[Any]:
    """Problems of different prompts, from one side of the split: the hash of a prompt decides, a fifth is held out.

    Args:
        draw: Makes a random problem; it is told how many there are already.
        size: How many are wanted.
        held_out: Which side they are from.

    Returns:
        `size` problems.
    """
    found: dict[str, Any] = {}
    while len(found) < size:
        problem = draw(len(found))
        if (hashlib.sha256(problem.prompt.encode()).digest()[0] < 51) == held_out:
            found.setdefault(problem.prompt, problem)
    return list(found.values())


def draw_from(table, rng: random.Random):
    """A value drawn from a table of (value, probability)."""
    values, weights = zip(*table, strict=True)
    return rng.choices(values, weights)[0]


def common_length(wanted: Sequence[str], written: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(written) + 1)
    for want in wanted:
        last = row[:]
        for j, word in enumerate(written):
            row[j + 1] = last[j] + 1 if word == want else max(last[j + 1], row[j])
    return row[-1]
