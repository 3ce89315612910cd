"""Generated arithmetic reasoning: problems, a teacher with bad habits, a verifier of steps, and a tokenizer.

A problem is a chain of sums ("7 + 5 - 9 ="), a solution one line per operation and an answer line. The teacher whose
solutions the model first imitates has two habits known from school and one of many a reasoning model: it loses carries,
it takes the smaller number from the larger whatever the order, and it repeats itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

_SIZES = {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 1}
LIMIT = 60  # running totals of six one-digit terms stay within, with and without slips


@dataclass(frozen=True)
class Problem:
    expression: str

    @property
    def prompt(self) -> str:
        return f"{self.expression} =\n"

    @cached_property
    def terms(self) -> list[tuple[str, int]]:
        """[("", 7), ("+", 5), ("-", 9)]"""
        words = self.expression.split()
        return [("", int(words[0]))] + [(op, int(b)) for op, b in zip(words[1::2], words[2::2], strict=True)]

    @cached_property
    def answer(self) -> int:
        return sum(-b if op == "-" else b for op, b in self.terms)


def problems(size: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
    """Distinct problems from reasoning-gym's chain_sum, none of them in `exclude`."""
    import reasoning_gym

    # Several times too many, because short sums repeat.
    data = reasoning_gym.create_dataset("chain_sum", size=4 * size, seed=seed, **_SIZES)
    found = dict.fromkeys(data[i]["metadata"]["expression"] for i in range(len(data)))
    kept = [Problem(e) for e in found if e not in exclude][:size]
    assert len(kept) == size
    return kept


def apply(op: str, a: int, b: int) -> int:
    return a + b if op == "+" else a - b


def slip(op: str, a: int, b: int) -> int | None:
    """What the habit makes of a op b, or None where it makes no difference."""
    if op == "+" and a >= 0 and a % 10 + b >= 10:
        return a + b - 10  # carry lost
    if op == "-" and 0 <= a < b:
        return b - a  # smaller from larger
    return None


def demonstration(problem: Problem, rng: random.Random, slips: float = 0.55, repeats: float = 0.65) -> str:
    """A solution as the teacher writes it."""
    total, lines = problem.terms[0][1], []
    for op, b in problem.terms[1:]:
        wrong = slip(op, total, b)
        result = wrong if wrong is not None and rng.random() < slips else apply(op, total, b)
        line = f"{total} {op} {b} = {result}"
        lines.append(line)
        if rng.random() < repeats:
            lines.append(f"check {line}" if rng.random() < 0.85 else f"so far {result}")
        total = result
    return "\n".join([*lines, f"answer {total}"])


@dataclass(frozen=True)
class Review:
    """A solution read line by line, up to its first bad line."""

    lines: list[str]
    correct: bool  # the answer is right
    bad: int | None  # the first line that is wrong or redundant
    kind: str | None  # "slip" or "redundant"
    better: str | None  # the line that should stand there


def review(problem: Problem, text: str) -> Review:
    """Finds the first line that is not the next needed one, and says what that would have been."""
    lines = text.split("\n")
    total, next_term = problem.terms[0][1], 1
    correct = lines[-1] == f"answer {problem.answer}"
    for k, line in enumerate(lines):
        if next_term < len(problem.terms):
            op, b = problem.terms[next_term]
            needed = f"{total} {op} {b} = {apply(op, total, b)}"
        else:
            needed = f"answer {total}"
        if line != needed:
            redundant = k > 0 and line in (f"check {lines[k - 1]}", f"so far {total}")
            return Review(lines, correct, k, "redundant" if redundant else "slip", needed)
        if next_term == len(problem.terms):
            return Review(lines, correct, *((k + 1, "slip", None) if k + 1 < len(lines) else (None, None, None)))
        total, next_term = apply(op, total, b), next_term + 1
    return Review(lines, correct, len(lines), "slip", None)


def branch_row(problem: Problem, found: Review) -> dict | None:
    """A preference row for the first bad line: what should stand there against what does, after the same good lines."""
    if found.better is None or found.bad >= len(found.lines) or not found.lines[found.bad]:
        return None
    before = [line + "\n" for line in found.lines[: found.bad]]
    better, worse = (
        line if line.startswith("answer") else line + "\n" for line in (found.better, found.lines[found.bad])
    )
    return {
        "prompt": problem.prompt,
        "chosen": [*before, better],
        "rejected": [*before, worse],
        "branch": len(before),
        "partial": True,
        "kind": found.kind,
    }


def make_tokenizer():
    """Every number and word one token; spaces are separators, a newline is a token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<eos>",
        "\n",
        "+",
        "-",
        "=",
        "check",
        "so",
        "far",
        "answer",
        *(str(n) for n in range(-LIMIT, LIMIT + 1)),
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def text_of(tokenizer, ids: list[int]) -> str:
    """The text up to the end-of-sequence token."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return " ".join(tokenizer.convert_ids_to_tokens(ids)).replace(" \n ", "\n").strip()
