# SPDX-License-Identifier: Apache-2.0
"""What the arms are trained and judged on: word problems of our own, or GSM8K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import records
from sspo_ext.data.graders import answer_text, load_grader
from sspo_ext.demo.tasks import Review

from ..word_problems import PROBE, WordProblems

TRAIN = 1024  # word problems that are trained on, the same for every number of updates

ASK = "\nThink step by step and write each step on a line of its own. End with #### and the number."


class Problem(Protocol):
    """A prompt, as a text or as chat messages, and the right answer."""

    @property
    def prompt(self) -> Any:
        """What the model is given."""
        ...

    @property
    def answer(self) -> str:
        """What it should find."""
        ...


class Task(Protocol):
    """Problems and their judge.

    Attributes:
        name: Of the data.
        probe: What asks for the answer; None if it has to be found first.
        max_completion_length: The most tokens of a completion.
        usual: The tokens that a length penalty of 1 is the price of.
        short: The most tokens in the arm with a short maximal length.
    """

    name: str
    probe: str | None
    max_completion_length: int
    usual: int
    short: int

    def train(self, seed: int) -> list[Any]:
        """Problems to train on."""
        ...

    def held_out(self, size: int) -> list[Any]:
        """Problems that no arm trains on."""
        ...

    def reward(self, prompt: Any, completion: str, answer: Any) -> float:
        """1 for a right answer, else 0."""
        ...

    def review(self, problem: Any, completion: str) -> Review:
        """What a solution does."""
        ...

    def group(self, problem: Any) -> str:
        """What the problem is reported under, such as its language."""
        ...


class Words(WordProblems):
    """The word problems, English and Chinese in turn."""

    name, max_completion_length, usual, short = "words", 200, 100, 75
    probe: str | None = PROBE

    def train(self, seed: int) -> list[Any]:
        """See `Task`."""
        return self.problems(TRAIN, 1000 + seed, held_out=False)

    def held_out(self, size: int) -> list[Any]:
        """See `Task`."""
        return self.problems(size, 1, held_out=True)

    def group(self, problem: Any) -> str:
        """The language."""
        return problem.language


@dataclass(frozen=True)
class Question:
    """A question of GSM8K, asked as a user would."""

    prompt: Any
    answer: str


class GSM8K:
    """GSM8K, from the hub or from a folder with train.jsonl and test.jsonl.

    Args:
        folder: The folder; None loads openai/gsm8k with the package datasets.
        chat: Whether the model has a chat template.
    """

    name, max_completion_length, usual, short = "gsm8k", 320, 200, 160
    probe: str | None = None

    def __init__(self, folder: str | None, *, chat: bool):
        self.folder, self.chat = folder, chat
        self.reward = load_grader("math-verify")

    def _rows(self, split: str) -> list[Question]:
        if self.folder is None:
            from datasets import load_dataset

            rows: Sequence[Any] = load_dataset("openai/gsm8k", "main", split=split).to_list()  # type: ignore[union-attr]
        else:
            rows = records.read(Path(self.folder) / f"{split}.jsonl")
        if not rows:
            raise SystemExit(f"--gsm8k: expected a folder with {split}.jsonl, got {self.folder!r}")
        return [self._question(row) for row in rows]

    def _question(self, row: dict) -> Question:
        text = row["question"] + ASK
        prompt = [{"role": "user", "content": text}] if self.chat else text + "\n"
        return Question(prompt, answer_text(row["answer"]).replace(",", ""))

    def train(self, seed: int) -> list[Any]:
        """See `Task`."""
        return self._rows("train")

    def held_out(self, size: int) -> list[Any]:
        """See `Task`."""
        return self._rows("test")[:size]

    def review(self, problem: Any, completion: str) -> Review:
        """Steps are lines; which of them are needed is not known here."""
        lines = [line for line in completion.split("\n") if line.strip()]
        return Review(self.reward(problem.prompt, completion, problem.answer) >= 1, len(lines), 0)

    def group(self, problem: Any) -> str:
        """All are one group."""
        return "en"


def make_task(name: str, folder: str | None, tokenizer) -> Task:
    """The task of `--data`."""
    return Words() if name == "words" else GSM8K(folder, chat=bool(tokenizer.chat_template))
