"""What a state is worth to the model itself: it is made to answer after each of its steps.

SSPO (arXiv 2508.12604) calls this verbal value probing; its prompt and its exact value are not public, so the texts,
the two values and their defaults here are our reconstruction. V_k is on the scale of E[reward | answer after step k]:

    likelihood   the probability of the gold answer after the probe
    graded       the share of a few short sampled answers that a grader accepts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..._checks import check_choice, check_count, check_not_negative, describe
from ..branches.branch import ENGINES, SAMPLING_ENGINES
from ..values import StepBatch, StepValues
from .likelihood import likelihood_values
from .states import States
from .texts import Answer, AnyProbe, Probe


def probe_step_values(
    model: nn.Module,
    batch: StepBatch,
    probe: AnyProbe | Sequence[str | Probe],
    answers: Sequence[Answer] | Sequence[Any],
    *,
    mode: str = "likelihood",
    reduce: str = "joint",
    engine: str = "auto",
    max_tokens: int = 4096,
    tokenizer=None,
    grader: Callable[[str, Any], float] | None = None,
    num_samples: int = 5,
    max_answer_tokens: int = 10,
    temperature: float = 0.6,
    seed: int = 0,
) -> StepValues:
    """V_0..V_K of every sequence, in [0, 1]: after the question alone and after each of its K steps. No gradient.

    Args:
        model: any Hugging Face causal LM; runs in eval mode, and its modes are restored.
        batch: prompts (with the chat template's tokens, where there is one) and steps. Special tokens at the end of a
            response are left out before the probe: V_K is asked of the text.
        probe: a language of `PROBES`, any other text, a `Probe`, or token ids; or one text or Probe for each sequence.
            See `as_probe`.
        answers: (B,) the gold answer of each sequence. "likelihood": a text, several accepted texts, or the same in
            token ids; a number after a probe that is a text is taken as its text. "graded": whatever `grader` takes.
        mode: "likelihood" or "graded".
        reduce: "likelihood": "joint", exp(sum of log p) over the answer's tokens, the probability of the answer; or
            "mean", exp(mean of log p), which overstates long answers: with exact-match rewards the model then learns
            never to answer. Several texts: "joint" adds their probabilities, as different texts of which none is the
            beginning of another exclude each other (one that begins with another counts as that other); "mean" takes
            the largest, as it has no such meaning.
        engine: "separate", "packed", "cached" or "auto", see `sspo_ext.signals.branches.engines`. "graded" samples from a
            cache: "separate", "cached" or "auto".
        max_tokens: budget of one forward, in tokens.
        tokenizer: needed for texts, and for "graded".
        grader: "graded": grader(text of a sampled answer, the sequence's answer) -> 0..1 or bool.
        num_samples, max_answer_tokens, temperature, seed: "graded": how answers are sampled; temperature 0 is one
            greedy answer. An answer ends with its line or with the model's turn. Each answer has its own random
            numbers, so they depend neither on the engine nor on the batch.

    Returns:
        StepValues on the model's device, float32.

    Raises:
        ValueError, TypeError: an argument that does not fit, or has no effect in this mode, by name; values that are
            not finite (on the host).

    Example::

        >>> batch = StepBatch([tokenizer("6 + 13 + 7 = ?\\n").input_ids], [[tokenizer("6 + 13 = 19\\n").input_ids]])
        >>> probe_step_values(model, batch, "####", ["26"], tokenizer=tokenizer).to_lists()  # [[V_0, V_1]]
    """
    check_probe_options(
        mode=mode, reduce=reduce, engine=engine, max_tokens=max_tokens, grader=grader, num_samples=num_samples,
        max_answer_tokens=max_answer_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    if not isinstance(batch, StepBatch):
        raise TypeError(f"batch: expected a StepBatch, got {describe(batch)}")
    if len(answers) != len(batch):
        raise ValueError(f"answers: expected one for each of {len(batch)} sequences, got {len(answers)}")
    states = States(model, batch, probe, tokenizer)
    if mode == "graded":
        from .graded import graded_values

        values = graded_values(
            model, states, answers, tokenizer, grader, num_samples=num_samples, max_answer_tokens=max_answer_tokens,
            temperature=temperature, seed=seed, engine=engine, max_tokens=max_tokens,
        )  # fmt: skip
    else:
        values = likelihood_values(model, states, answers, reduce=reduce, engine=engine, max_tokens=max_tokens)
    counts = [len(batch.step_ids[b]) + 1 for b in range(len(batch))]
    return StepValues.from_tensor(values, torch.from_numpy(np.cumsum([0, *counts])))


def check_probe_options(
    *,
    mode: str = "likelihood",
    reduce: str = "joint",
    engine: str = "auto",
    max_tokens: int = 4096,
    grader: Any = None,
    num_samples: int = 5,
    max_answer_tokens: int = 10,
    temperature: float = 0.6,
    seed: int = 0,
) -> None:
    """What `probe_step_values` can say of its options without a model: values, and those without effect in a mode."""
    check_choice("mode", mode, ("likelihood", "graded"))
    check_choice("reduce", reduce, ("joint", "mean"))
    check_choice("engine", engine, ("auto", *(ENGINES if mode == "likelihood" else SAMPLING_ENGINES)))
    check_count("max_tokens", max_tokens)
    check_count("seed", seed, 0)
    check_count("num_samples", num_samples)
    check_count("max_answer_tokens", max_answer_tokens)
    check_not_negative("temperature", temperature)
    idle = {"reduce": reduce != "joint"}
    if mode == "likelihood":
        idle = {"grader": grader is not None, "num_samples": num_samples != 5}
        idle |= {"max_answer_tokens": max_answer_tokens != 10, "temperature": temperature != 0.6}
    for name in (name for name, given in idle.items() if given):
        raise ValueError(f"{name}: has no effect with mode {mode!r}; leave it out, or choose the other mode")
