# SPDX-License-Identifier: Apache-2.0
"""Candidates from rollouts that were sampled anyway, without further samples."""

from __future__ import annotations

from torch import Tensor

from ..._checks import check_shape
from ..values import StepBatch
from .node import Candidate, Node, best_first, text_after


def nodes_from_rollouts(batch: StepBatch, step_advantages: Tensor, tokenizer) -> list[Node]:
    r"""Find the states at which rollouts of one prompt diverge, with the steps that they took there.

    Steps are compared only after the same tokens: the prompt and all steps before. A state after which all rollouts go
    on with the same text has no node.

    Equal texts are merged, whether rollouts ended with them or went on: kept apart they could yield contradictory
    pairs. A merged text counts as `ended` only if every rollout ended there.

    Few rollouts share more than their first steps, and the mean of few advantages is mostly chance. For training,
    `trace_candidates` at chosen states is better. The method is ours.

    Args:
        batch: the rollouts. Those with the same prompt tokens may share states.
        step_advantages: (S,) float, from `step_gae`. The value of a step is the mean over the rollouts that took it.
        tokenizer: any Hugging Face tokenizer.

    Returns:
        The nodes, in the order in which their states first appear.

    Raises:
        ValueError: if `step_advantages` has another shape.

    Examples:
        >>> question, right, wrong = (tokenizer(text).input_ids for text in ("6 + 13 = ?\n", "19\n", "20\n"))
        >>> batch = StepBatch([question, question], [[right], [wrong]])
        >>> nodes = nodes_from_rollouts(batch, torch.tensor([0.5, -0.5]), tokenizer)
        >>> [(c.text, c.value) for c in nodes[0].candidates]
        [('19', 0.5), ('20', -0.5)]
    """
    check_shape("step_advantages", step_advantages, (sum(map(len, batch.step_ids)),))
    advantages = iter(step_advantages.tolist())
    places: dict[tuple, dict[str, list]] = {}  # {tokens before: {text: [ids, ended, advantages]}}
    first: dict[tuple, tuple[int, int]] = {}
    for b, (prompt, steps) in enumerate(zip(batch.prompt_ids, batch.step_ids, strict=True)):
        key: tuple = (tuple(prompt),)
        before = list(prompt)
        for k, step in enumerate(steps):
            written = text_after(tokenizer, before, step)
            first.setdefault(key, (b, k))
            entry = places.setdefault(key, {}).setdefault(written.strip(), [tuple(step), True, [], written])
            if entry[1] and k < len(steps) - 1:  # one that goes on decides what is written
                entry[0], entry[1], entry[3] = tuple(step), False, written
            entry[2].append(next(advantages))
            key, before = (*key, tuple(step)), [*before, *step]
    nodes = []
    for key, options in places.items():
        some = [
            Candidate(ids, text, len(of), ended, sum(of) / len(of), written=written)
            for text, (ids, ended, of, written) in options.items()
            if text
        ]
        if len(some) > 1:
            nodes.append(Node(*first[key], best_first(some)))
    return nodes
